"""Case deletion: a training function that is a formula, so that every number is known."""

import json
import sys
from statistics import NormalDist

import numpy as np
import pytest

from hf_doge.cli import main as hf_doge
from hf_doge.evaluation.influence.case_deletion import case_deletion, strongest
from hf_doge.evaluation.influence.deletion_result import NOISE, CaseDeletionResult
from hf_doge.evaluation.intervals import bca_tails, bootstrap_interval

NUM_POINTS, NUM_EXAMPLES = 3, 12
generator = np.random.default_rng(0)
EFFECTS = generator.normal(size=(NUM_POINTS, NUM_EXAMPLES)) / 50  # what each example adds to each point's probability


class Training:
    """Probability 0.5, and the effects of the examples that are there, and a little of the seed."""

    def __init__(self, *, noise=0.0, fail_after=None):
        self.calls = []
        self.noise = noise
        self.fail_after = fail_after

    def __call__(self, removed, seed):
        if self.fail_after is not None and len(self.calls) == self.fail_after:
            raise KeyboardInterrupt("stopped by the test")
        self.calls.append((removed, seed))
        kept = np.ones(NUM_EXAMPLES)
        kept[list(removed)] = 0
        return lambda point: 0.5 + EFFECTS[point] @ kept + self.noise * np.sin(7 * seed + point)


RANDOM = generator.normal(size=(NUM_POINTS, NUM_EXAMPLES))


def run(training=None, **kwargs):
    scores = kwargs.pop("scores", {"effects": EFFECTS, "reversed": -EFFECTS, "random": RANDOM})
    settings = {"ks": (1, 3), "seeds": (1, 2), **kwargs}
    return case_deletion(scores, training or Training(), **settings)


def test_del_is_the_loss_of_what_the_removed_examples_added():
    result = run(Training(noise=0.05))
    for sign, order in (("+", np.sort(EFFECTS)[:, ::-1]), ("-", np.sort(EFFECTS))):
        expected = np.stack([-order[:, :k].sum(axis=1) for k in (1, 3)], axis=1)
        np.testing.assert_allclose(result.deletion("effects", sign), expected, atol=1e-12)
        np.testing.assert_allclose(result.auc("effects", sign), expected.mean(axis=1), atol=1e-12)


def test_negating_the_scores_swaps_del_plus_and_del_minus():
    result = run()
    np.testing.assert_allclose(result.auc("reversed", "+"), result.auc("effects", "-"))
    np.testing.assert_allclose(result.auc("reversed", "-"), result.auc("effects", "+"))
    summary = result.summary()
    assert summary["effects"]["auc_del+"]["mean"] < 0 < summary["effects"]["auc_del-"]["mean"]
    assert summary["effects"]["spread"]["mean"] == pytest.approx(-summary["reversed"]["spread"]["mean"])


def test_a_removed_set_is_retrained_once_per_seed():
    training = Training()
    result = run(training)
    assert len(training.calls) == len(set(training.calls)) == result.num_retrainings
    # 4 seeds with all, and per seed and scorer 2 signs and 2 ks for each point, of which the reversed scorer needs none
    assert result.num_retrainings <= 4 + 2 * 2 * (NUM_POINTS * 2 * 2)


def test_noise_is_what_other_seeds_do_with_nothing_removed():
    result = run(Training(noise=0.05), noise_seeds=(8, 9))
    points = np.arange(NUM_POINTS)
    expected = [np.sin(7 * (8 + i) + points) - np.sin(7 * (1 + i) + points) for i in range(2)]
    np.testing.assert_allclose(result.noise(), 0.05 * np.mean(expected, axis=0), atol=1e-12)
    assert run(Training()).summary()[NOISE]["std"] == 0


@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_evaluation_continues_where_it_stopped(tmp_path, cut):
    journal = tmp_path / "retrainings.jsonl"
    first = Training(fail_after=9)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        run(first, journal_path=journal)
    if cut:  # the power went while the last line was written
        journal.write_bytes(journal.read_bytes()[:-cut])
    second = Training()
    result = run(second, journal_path=journal)
    whole = Training()
    expected = run(whole)
    repeated = set(first.calls) & set(second.calls)
    assert len(repeated) <= (1 if cut else 0)
    assert set(first.calls) | set(second.calls) == set(whole.calls)
    assert result.summary() == expected.summary()
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_finished_evaluation_retrains_nothing_and_another_scorer_only_its_own(tmp_path):
    journal = tmp_path / "retrainings.jsonl"
    run(scores={"effects": EFFECTS}, journal_path=journal)
    again = Training()
    run(again, scores={"effects": EFFECTS, "reversed": -EFFECTS}, journal_path=journal)
    assert again.calls == []
    size = journal.stat().st_size
    run(again, scores={"effects": EFFECTS, "reversed": -EFFECTS}, journal_path=journal)
    assert journal.stat().st_size == size
    more = Training()
    run(more, scores={"effects": EFFECTS}, ks=(1, 2, 3), journal_path=journal)
    assert {len(removed) for removed, _ in more.calls} == {2}


def test_changed_scores_are_not_answered_from_an_old_line(tmp_path):
    journal = tmp_path / "retrainings.jsonl"
    run(scores={"scorer": EFFECTS}, journal_path=journal)
    result = run(scores={"scorer": RANDOM}, journal_path=journal)
    np.testing.assert_allclose(result.auc("scorer", "+"), run().auc("random", "+"))


def test_a_journal_of_another_evaluation_is_refused_by_what_differs(tmp_path):
    journal = tmp_path / "retrainings.jsonl"
    run(journal_path=journal, identity={"model": "cnn", "ids": (1, 2)})
    run(journal_path=journal, identity={"model": "cnn", "ids": (1, 2)})
    with pytest.raises(ValueError, match=r"differs in \['model'\].*'cnn'.*'transformer'"):
        run(journal_path=journal, identity={"model": "transformer", "ids": (1, 2)})


def test_an_altered_line_in_the_middle_is_refused(tmp_path):
    journal = tmp_path / "retrainings.jsonl"
    run(journal_path=journal)
    lines = journal.read_text().splitlines()
    lines[3] = lines[3][:20]
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="a line was altered"):
        run(journal_path=journal)


def test_the_result_is_the_same_from_file(tmp_path):
    result = run(Training(noise=0.05))
    result.save(tmp_path, extra={"cancellation": [1.0]})
    loaded = CaseDeletionResult.load(tmp_path)
    assert loaded.summary() == result.summary()
    assert loaded.scorers == result.scorers
    assert (tmp_path / "case_deletion.md").read_text() == result.to_markdown()
    assert json.loads((tmp_path / "case_deletion.json").read_text())["cancellation"] == [1.0]
    assert "| effects |" in result.to_markdown()


def test_differences_are_paired_by_point():
    result = run()
    expected = result.auc("random", "+") - result.auc("effects", "+")
    found = result.differences("effects")["random"]["auc_del+"]
    assert found["mean"] == pytest.approx(expected.mean())
    assert found["interval"] == list(bootstrap_interval(expected))
    with pytest.raises(ValueError, match="`reference` must be one of"):
        result.differences("other")


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(size=(300, 40))
    hits = [low < 0 < high for low, high in (bootstrap_interval(values, num_resamples=500) for values in draws)]
    assert 0.9 < np.mean(hits) < 0.99
    few = np.random.default_rng(2).normal(size=(400, 8))
    hits = [low < 0 < high for low, high in (bootstrap_interval(values, num_resamples=500) for values in few)]
    assert 0.92 < np.mean(hits) < 0.99  # a plain percentile bootstrap of eight points covers the mean in 88 %
    assert bootstrap_interval(np.array([0.3])) == (0.3, 0.3)
    assert bootstrap_interval(np.full(4, 0.1)) == (0.1, 0.1)
    with pytest.raises(ValueError, match="`confidence`"):
        bootstrap_interval(np.ones(3), confidence=95)


def test_without_widening_the_bootstrap_is_the_bca_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).exponential(size=12)
    means = values[np.random.default_rng(0).integers(12, size=(2000, 12))].mean(axis=1)
    outer = NormalDist().inv_cdf(0.025)
    tails = bca_tails(means, values.mean(), values - values.mean(), (outer, -outer))
    expected = stats.bootstrap((values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(0))
    np.testing.assert_allclose(np.quantile(means, tails), expected.confidence_interval, rtol=1e-9)


def test_the_strongest_are_the_ends_and_of_equal_ones_the_earlier():
    scores = np.array([0.0, 3.0, -1.0, 3.0, 0.0])
    assert strongest(scores, 2, "+") == (1, 3)
    assert strongest(scores, 3, "+") == (0, 1, 3)
    assert strongest(scores, 2, "-") == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {}}, "array of one shape"),
        ({"scores": {"a": EFFECTS, "b": EFFECTS[:2]}}, "array of one shape"),
        ({"scores": {"a": EFFECTS * np.nan}}, "must be finite"),
        ({"ks": (3, 1)}, "ascending"),
        ({"ks": (NUM_EXAMPLES,)}, "less than the 12"),
        ({"ks": ()}, "ascending"),
        ({"seeds": ()}, "at least one each"),
        ({"seeds": (1, 1)}, "all different"),
        ({"noise_seeds": (1, 5)}, "all different"),
        ({"training": lambda removed, seed: lambda point: float("nan")}, "probabilities from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)


def test_the_picture_has_a_curve_for_every_scorer(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_doge.influence_plots import plot_case_deletion

    figure = plot_case_deletion(run().to_plot_rows(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines[:3]] == ["effects", "reversed", "random"]
        assert list(axes.lines[0].get_xdata()) == [1, 3]
    with pytest.raises(ValueError, match="at least one scorer"):
        plot_case_deletion([])
    with pytest.raises(
        ValueError, match=r"Every row of the table must have .* row 0 has .* without \['low', 'high'\]"
    ):
        plot_case_deletion([{"scorer": "a", "sign": "+", "k": 1, "mean": 0.0}])


def test_a_scorer_or_a_file_that_is_none_is_refused_by_name(tmp_path):
    for scorer, sign in (("other", "+"), ("random", "x")):
        with pytest.raises(ValueError, match=rf"`scorer` must be one of .* but got '{scorer}' and '[{sign}]'"):
            run().auc(scorer, sign)
    (tmp_path / "case_deletion.json").write_text('{"ks": [1]}')
    with pytest.raises(ValueError, match=r"case_deletion.json' must hold a case deletion, but does not: KeyError"):
        CaseDeletionResult.load(tmp_path)


def write_task(folder, *, num_train=40, num_test=12):
    for split, count in (("train", num_train), ("test", num_test)):
        draw = np.random.default_rng(count)
        records = [
            {"text": " ".join(f"word{draw.integers(8) + 8 * (i % 2)}" for _ in range(6)), "label": i % 2}
            for i in range(count)
        ]
        (folder / f"toy.{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def flags(folder, *more):
    """Those of a small run; a flag in `more` takes the place of it."""
    own = {
        "--data_dir": [str(folder)],
        "--task": ["toy"],
        "--output_dir": [str(folder / "out")],
        "--num_train": ["40"],
    }
    own |= {"--num_test": ["12"], "--num_points": ["2"], "--seeds": ["1"], "--ks": ["10"], "--width": ["8"]}
    own |= {"--scorers": ["tracin_we", "random"]}
    kept = [word for name, values in own.items() if name not in more for word in (name, *values)]
    return ["evaluate-influence", *kept, *more]


@pytest.mark.parametrize("architecture", ["cnn", "transformer"])
def test_the_command_leaves_table_plot_and_journal_and_continues(tmp_path, capsys, architecture):
    write_task(tmp_path)
    assert hf_doge(flags(tmp_path, "--architecture", architecture)) == 0
    table = capsys.readouterr().out
    assert "| tracin_we |" in table
    assert "Cancellation ratio" in table
    folder = tmp_path / "out"
    result = CaseDeletionResult.load(folder)
    assert result.scorers == ("tracin_we", "random")
    contents = json.loads((folder / "case_deletion.json").read_text())
    assert len(contents["cancellation"]) == 4
    assert set(contents["label_agreement"]) == {"tracin_we", "random"}
    journal = (folder / "retrainings.jsonl").read_bytes()
    assert hf_doge(flags(tmp_path, "--architecture", architecture)) == 0
    assert (folder / "retrainings.jsonl").read_bytes() == journal


def test_the_command_names_the_extra_of_a_scorer_whose_library_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    write_task(tmp_path)
    assert hf_doge(flags(tmp_path, "--scorers", "bm25")) == 2
    assert "hf-doge[evaluate-influence]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scorers", "tracin"], "`--scorers` must be one of"),
        (["--task", "other"], "must hold other.train.jsonl"),
        (["--num_points", "99"], "from 1 to the 12 test examples"),
        (["--num_train", "99"], "toy.train must have as many examples"),
        (["--ks", "40"], "less than the 40 training examples"),
    ],
)
def test_the_command_says_in_one_line_what_cannot_be(tmp_path, capsys, more, message):
    write_task(tmp_path)
    assert hf_doge(flags(tmp_path, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
