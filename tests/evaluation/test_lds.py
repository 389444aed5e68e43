"""The linear datamodelling score: against a slow reference, where the truth is known, and with every scorer."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import Trainer, TrainingArguments

from hf_doge.evaluation.influence.case_deletion import case_deletion
from hf_doge.evaluation.influence.lds import (
    JOURNAL,
    _group_scores,
    class_margins,
    draw_subsets,
    linear_datamodelling_score,
    train_with_trainer,
)
from hf_doge.evaluation.influence.lds_result import LDSResult
from hf_doge.evaluation.influence.scorers import SCORERS, make_scorer
from hf_doge.evaluation.influence.small_models import TrainingRecipe, make_classifier, to_batches, train_classifier
from hf_doge.evaluation.intervals import bootstrap_interval
from tests.evaluation.test_case_deletion import EFFECTS, NUM_EXAMPLES, NUM_POINTS, RANDOM, Training
from tests.evaluation.test_scorers import CLASSES, VOCABULARY, make_data
from tests.tiny import VOCAB, tiny_classifier

SCORES = {"effects": EFFECTS, "reversed": -EFFECTS, "random": RANDOM}


def run(training=None, **kwargs):
    settings = {"scores": SCORES, "num_subsets": 9, "seeds": (1, 2), **kwargs}
    return linear_datamodelling_score(settings.pop("scores"), training or Training(), **settings)


def test_it_is_the_rank_correlation_of_sums_of_scores_and_mean_outputs():
    result = run(Training(noise=0.1), alpha=0.3, subset_seed=5)
    kept = draw_subsets(NUM_EXAMPLES, 9, alpha=0.3, seed=5)
    assert kept.sum(axis=1).tolist() == [4] * 9
    for name, scores in SCORES.items():
        for point in range(NUM_POINTS):
            predicted, measured = [], []
            for row in kept:
                predicted.append(sum(scores[point, place] for place in range(NUM_EXAMPLES) if row[place]))
                removed = tuple(place for place in range(NUM_EXAMPLES) if not row[place])
                measured.append(np.mean([Training(noise=0.1)(removed, seed)(point) for seed in (1, 2)]))
            assert result.lds(name)[point] == pytest.approx(spearmanr(predicted, measured).statistic, abs=1e-12)
        assert result.summary()[name]["mean"] == pytest.approx(result.lds(name).mean())
        assert result.summary()[name]["interval"] == list(bootstrap_interval(result.lds(name)))
    np.testing.assert_allclose(result.lds("effects"), 1)  # the outputs are sums of these
    np.testing.assert_allclose(result.lds("reversed"), -1)
    np.testing.assert_allclose(result.agreement(), 1)  # the seed's noise is the same for all subsets of a point


def test_exact_influence_on_a_linear_model_has_nearly_one_and_random_scores_have_nearly_none():
    """Ridge regression, whose influence is known in closed form: `x'^T (X^T X + I)^-1 x_i (y_i - x_i^T theta)`."""
    generator = np.random.default_rng(3)
    inputs, points = generator.normal(size=(200, 4)), generator.normal(size=(25, 4))
    targets = inputs @ generator.normal(size=4) + generator.normal(size=200)

    def fit(rows):
        hessian = inputs[rows].T @ inputs[rows] + np.eye(4)
        return hessian, np.linalg.solve(hessian, inputs[rows].T @ targets[rows])

    def train(removed, seed):
        _, theta = fit([place for place in range(200) if place not in set(removed)])
        return (points @ theta).__getitem__

    hessian, theta = fit(range(200))
    exact = points @ np.linalg.solve(hessian, inputs.T) * (targets - inputs @ theta)
    result = linear_datamodelling_score(
        {"exact": exact, "random": generator.normal(size=exact.shape)}, train, num_subsets=60
    )
    summary = result.summary()
    assert summary["exact"]["mean"] > 0.95
    assert abs(summary["random"]["mean"]) < 0.1
    assert result.differences("random")["exact"]["interval"][0] > 0.8


def test_subsets_are_drawn_by_their_number_without_replacement():
    kept = draw_subsets(40, 30, alpha=0.25, seed=1)
    assert kept.shape == (30, 40)
    assert (kept.sum(axis=1) == 10).all()
    np.testing.assert_array_equal(draw_subsets(40, 5, alpha=0.25, seed=1), kept[:5])
    assert len({row.tobytes() for row in kept}) == 30
    assert not np.array_equal(draw_subsets(40, 30, alpha=0.25, seed=2), kept)
    assert kept.any(axis=0).all()


def test_every_subset_has_the_same_part_of_each_stratum_and_a_score_of_the_class_then_says_nothing():
    labels = ["a", "b", "b"] * 4
    kept = draw_subsets(12, 20, strata=labels)
    assert (kept[:, np.array(labels) == "a"].sum(axis=1) == 2).all()
    assert (kept.sum(axis=1) == 6).all()
    assert len({row.tobytes() for row in kept}) > 15
    same = np.tile(np.array(labels) == "b", (NUM_POINTS, 1))
    result = run(scores={"same label": same, "effects": EFFECTS}, strata=labels)
    assert (result.lds("same label") == 0).all()
    np.testing.assert_allclose(result.lds("effects"), 1)
    with pytest.raises(ValueError, match="one group for each of the 12 examples"):
        run(strata=labels[:5])
    with pytest.raises(ValueError, match=r"`strata` must have groups of one kind.*\['NoneType', 'str'\]"):
        run(strata=[None, *labels[1:]])


@pytest.mark.parametrize("labels", [["a", *"bbb", *"ccccc", "d", "e", "f"], ["a", *"bb", *"cc"]], ids=["even", "odd"])
def test_each_example_of_a_stratum_of_any_size_is_drawn_equally_often(labels):
    kept = draw_subsets(len(labels), 2000, strata=labels)
    np.testing.assert_allclose(kept.mean(axis=0), 0.5, atol=5 * np.sqrt(0.25 / 2000))
    for label in set(labels):
        sizes = kept[:, np.array(labels) == label].sum(axis=1)
        assert set(sizes) == {labels.count(label) // 2, -(-labels.count(label) // 2)}
    assert set(kept.sum(axis=1)) == {len(labels) // 2, -(-len(labels) // 2)}
    np.testing.assert_array_equal(draw_subsets(len(labels), 7, strata=labels), kept[:7])
    single = kept[:, [labels.index(label) for label in "af"]] if "f" in labels else kept[:, :1]
    assert len({tuple(row) for row in single.tolist()}) == 2 ** single.shape[1]  # they are not drawn together


@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_evaluation_continues_where_it_stopped(tmp_path, cut):
    first, second, whole = Training(fail_after=5), Training(), Training()
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        run(first, output_dir=tmp_path)
    journal = tmp_path / JOURNAL
    if cut:  # the power went while the last line was written
        journal.write_bytes(journal.read_bytes()[:-cut])
    result = run(second, output_dir=tmp_path)
    assert result.summary() == run(whole).summary()
    assert len(set(first.calls) & set(second.calls)) == (1 if cut else 0)
    assert set(first.calls) | set(second.calls) == set(whole.calls)
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_finished_retraining_is_never_done_again_and_more_of_anything_costs_only_what_is_new(tmp_path):
    run(scores={"effects": EFFECTS}, output_dir=tmp_path)
    again, seeds, subsets = Training(), Training(), Training()
    assert run(again, output_dir=tmp_path).scorers == tuple(SCORES)
    assert again.calls == []
    run(seeds, seeds=(1, 2, 3), output_dir=tmp_path)
    assert {seed for _, seed in seeds.calls} == {3}
    assert len(seeds.calls) == 9
    result = run(subsets, num_subsets=11, seeds=(1, 2, 3), output_dir=tmp_path)
    assert len(subsets.calls) == 6
    assert result.summary() == run(num_subsets=11, seeds=(1, 2, 3)).summary()


def test_subsets_of_two_kinds_share_a_folder_and_a_line_is_written_once(tmp_path):
    kinds = [{}, {"strata": [0, 1] * 6}, {"alpha": 0.3}]
    for options in kinds:
        run(output_dir=tmp_path, **options)
    size = (tmp_path / JOURNAL).stat().st_size
    again = Training()
    for options in kinds:
        assert run(again, output_dir=tmp_path, **options).summary() == run(**options).summary()
    assert again.calls == []
    assert (tmp_path / JOURNAL).stat().st_size == size


def test_a_folder_of_another_evaluation_is_refused_by_what_differs(tmp_path):
    run(output_dir=tmp_path, identity={"model": "cnn"})
    with pytest.raises(ValueError, match=r"differs in \['model'\].*'cnn'.*'transformer'"):
        run(output_dir=tmp_path, identity={"model": "transformer"})
    with pytest.raises(ValueError, match=r"differs in \['num_points'\]"):
        run(output_dir=tmp_path, identity={"model": "cnn"}, scores={"fewer": EFFECTS[:2]})
    case_deletion(SCORES, Training(), ks=(1,), seeds=(1,), journal_path=tmp_path / "deletion" / JOURNAL)
    with pytest.raises(ValueError, match=r"differs in \['evaluation'\].*'linear datamodelling score'"):
        run(output_dir=tmp_path / "deletion")


def test_a_scorer_that_says_the_same_of_all_subsets_has_none():
    """Sums of one third are equal but for rounding."""
    result = run(scores={"constant": np.full_like(EFFECTS, 1 / 3), "nothing": np.zeros_like(EFFECTS)})
    assert result.lds("constant").tolist() == result.lds("nothing").tolist() == [0.0] * NUM_POINTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.01}, "keeps 0"),
        ({"alpha": 1.0}, r"`alpha` must be in \(0, 1\), but got 1.0"),
        ({"num_subsets": 1}, "`num_subsets` must be at least 2"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "different ones"),
        ({"scores": {"one": EFFECTS, "other": EFFECTS[:2]}}, "one shape"),
        ({"scores": {"one": np.full((2, 9), np.nan)}}, "finite"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_training(options, message):
    training = Training()
    with pytest.raises(ValueError, match=message):
        run(training, **options)
    assert training.calls == []


def test_outputs_that_are_no_numbers_or_all_equal_are_refused():
    with pytest.raises(ValueError, match="must return a function that gives finite numbers, but without 6"):
        run(lambda removed, seed: lambda point: float("nan"))
    with pytest.raises(ValueError, match=r"differ between subsets, but those of \[1\] are all equal"):
        run(lambda removed, seed: lambda point: 0.5 if point == 1 else len(set(removed) & {0, 1}))


def test_agreement_tells_chance_from_signal():
    def train(removed, seed):
        chance = np.random.default_rng([seed, *removed]).normal(size=NUM_POINTS)
        return chance.__getitem__

    assert run(seeds=(1,)).agreement() is None
    assert abs(run(train, num_subsets=200, seeds=(1, 2)).agreement().mean()) < 0.15
    assert "Agreement" in run().to_markdown()


def test_the_result_is_the_same_from_file(tmp_path):
    result = run(Training(noise=0.05))
    result.save(tmp_path, extra={"costs": {"effects": 0.5}})
    loaded = LDSResult.load(tmp_path)
    np.testing.assert_array_equal(loaded.kept, result.kept)
    assert loaded.summary() == result.summary()
    assert loaded.scorers == tuple(SCORES)
    assert (tmp_path / "lds.md").read_text() == result.to_markdown()
    assert json.loads((tmp_path / "lds.json").read_text())["costs"] == {"effects": 0.5}


def test_a_scorer_or_a_file_that_is_none_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`scorer` must be one of .* but got 'other'"):
        run().lds("other")
    (tmp_path / "lds.json").write_text('{"kept": []}')
    with pytest.raises(ValueError, match=r"lds.json' must hold an LDS, but does not: KeyError"):
        LDSResult.load(tmp_path)


def test_margins_are_log_odds_and_do_not_saturate():
    logits = torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    probability = logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(class_margins(logits, labels), (probability / (1 - probability)).log())
    assert class_margins(torch.tensor([[500.0, 0.0]]), torch.tensor([0])).item() == 500


def test_every_scorer_can_be_judged():
    """A small classifier, trained and traced by each."""
    train, points = make_data(24, seed=1), make_data(4, seed=2)
    recipe = TrainingRecipe(num_epochs=2, batch_size=8, learning_rate=1e-2, checkpoint_epochs=(1, 2))

    def make_model(seed):
        return make_classifier("cnn", VOCABULARY, CLASSES, width=8, seed=seed)

    def train_fn(removed, seed):
        model, _ = train_classifier(make_model, train, recipe, seed=seed, removed=removed)
        inputs = {name: points[name] for name in ("input_ids", "attention_mask")}
        return class_margins(model(**inputs).logits, points["labels"]).tolist().__getitem__

    _, checkpoints = train_classifier(make_model, train, recipe, seed=1, keep_checkpoints=True)
    models, rates = zip(*checkpoints, strict=True)
    scores = {
        name: make_scorer(name, models, rates).scores(to_batches(train), to_batches(points))
        for name in SCORERS
        if not name.startswith("bm25")  # needs a library
    }
    summary = linear_datamodelling_score(scores, train_fn, num_subsets=12).summary()
    assert list(summary) == list(scores)
    assert summary["tracin_we"]["mean"] > summary["random"]["mean"]


def test_a_factory_of_trainers_trains_on_what_is_kept(tmp_path):
    rows = [{"input_ids": [1 + place % (VOCAB - 1), 2, 3], "labels": place % 3} for place in range(6)]
    dataset = Dataset.from_list(rows)
    seen = []

    def make_trainer(kept, seed):
        seen.append((kept, seed))
        args = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", seed=seed,
        )  # fmt: skip
        return Trainer(tiny_classifier(seed=seed), args, train_dataset=dataset.select(kept))

    def measure(model):
        assert not model.training
        ids = torch.tensor([row["input_ids"] for row in rows[:2]])
        return class_margins(model(input_ids=ids).logits, torch.tensor([0, 1]))

    train_fn = train_with_trainer(make_trainer, measure, num_examples=6)
    first, other = train_fn((1, 4), 3), train_fn((0, 5), 3)
    assert seen == [([0, 2, 3, 5], 3), ([1, 2, 3, 4], 3)]
    assert isinstance(first(0), float)
    assert first(0) != other(0)
    assert train_fn((1, 4), 3)(1) == first(1)


def test_sums_that_cancel_leave_nothing_to_rank():
    labels = np.repeat([1.0, -1.0], 10)
    kept = np.array([np.r_[np.isin(np.arange(10), one), np.isin(np.arange(10), two)] for one, two in HALVES])
    found = _group_scores(np.stack([0.3 * labels, 0.3 * labels + 1e-3 * np.arange(20)]), kept)
    assert not found[0].any()
    np.testing.assert_allclose(found[1], kept @ (1e-3 * np.arange(20)), rtol=1e-9)


HALVES = [np.random.default_rng(seed).permuted(np.tile(np.arange(10), (2, 1)), axis=1)[:, :5] for seed in range(12)]
