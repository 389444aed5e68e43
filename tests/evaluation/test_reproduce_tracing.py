"""The tracing experiments at their smallest size on generated text, and the scorers that only they have."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.reproduce import tracin_case_deletion as case_deletion
from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.layer_gradients import cancellation_by_entry, layer_gradients, weight_layers
from benchmarks.reproduce.tracin_index import write_index
from benchmarks.reproduce.tracin_lm import SIZES, gradients_by_side, largest_rows, make_model, middle_layers, own_rows
from benchmarks.reproduce.tracin_mislabelled import detection_area
from benchmarks.reproduce.tracin_scorers import (
    AdamCheckpoint,
    AdamTracInScorer,
    CosineTracInWEScorer,
    SameClassScorer,
    TracInLayerScorer,
    TracInWESynScorer,
    influence_last_all,
)
from hf_doge.evaluation.influence.scorers import InfluenceLastScorer, TracInLastScorer, TracInWEScorer
from hf_doge.evaluation.influence.small_models import make_classifier, to_batches

WORDS = {0: ["goal", "team", "cup", "coach"], 1: ["bank", "bond", "fund", "share"]}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for split, count in (("train", 70), ("test", 30)):
        write_lines(
            folder / "classification" / f"ag_news.{split}.jsonl",
            [{"text": " ".join(draw.choices([*WORDS[n % 2], "the", "a"], k=7)), "label": n % 2} for n in range(count)],
        )
    for number, domain in enumerate(("code", "legal")):
        for split, count in (("train", 16), ("validation", 4)):
            texts = [" ".join(draw.choices([*WORDS[number], "the", "a"], k=20)) for _ in range(count)]
            write_lines(folder / "lm" / f"{domain}.{split}.jsonl", [{"text": text} for text in texts])
    return folder


def run_tiny(name, data_dir, output_dir):
    main([name, "--scale", "tiny", "--data_dir", str(data_dir), "--output_dir", str(output_dir)])
    folder = output_dir / "results" / name
    return {path.name: path.read_bytes() for path in folder.glob("*.md")}, json.loads(
        (folder / "run.json").read_text()
    )


@pytest.mark.parametrize("name", ["tracin_case_deletion", "tracin_mislabelled", "tracin_lm"])
def test_a_second_run_takes_the_finished_parts_and_gives_the_same_tables(name, data_dir, tmp_path):
    tables, first = run_tiny(name, data_dir, tmp_path)
    parts = sorted((tmp_path / name / "parts").glob("*.json"))
    parts[0].unlink()  # as if the run had been killed before this part
    again, second = run_tiny(name, data_dir, tmp_path)
    assert again == tables
    assert first["num_parts_computed_now"] == len(parts)
    assert second["num_parts_computed_now"] == 1
    assert second["figures"] == first["figures"]
    assert (tmp_path / "results" / name / "plot.png").stat().st_size < 80_000


def test_the_index_of_the_explained_run_has_the_scores_that_case_deletion_used(data_dir, tmp_path):
    figures = write_index(data_dir / "classification", tmp_path / "index", "ag_news", "cnn", "tiny")
    assert figures["largest_difference"] < 1e-3  # float16 rows


@pytest.fixture(params=["cnn", "transformer"])
def classifier(request):
    return make_classifier(request.param, 20, 3, width=8, max_length=9, seed=3)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    data = {
        "input_ids": torch.randint(1, 20, (5, 9), generator=generator),
        "attention_mask": torch.ones(5, 9, dtype=torch.long),
        "labels": torch.tensor([0, 2, 1, 1, 0]),
    }
    data["attention_mask"][1, 6:] = 0
    return to_batches(data, 3)


def test_layer_gradients_are_those_of_each_example_alone(classifier, batches):
    layers = weight_layers(classifier)
    found = layer_gradients(classifier, batches, layers)
    example = {name: values[1:2, :6] if values.ndim == 2 else values[1:2] for name, values in batches[0].items()}
    for layer in layers:
        (alone,) = torch.autograd.grad(classifier(**example).loss, classifier.get_submodule(layer).weight)
        torch.testing.assert_close(found[layer][1], alone.flatten(), rtol=1e-4, atol=1e-6)


def test_examples_that_share_no_word_cancel_nothing_entry_by_entry(classifier):
    ids = torch.arange(1, 13).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    found = cancellation_by_entry(classifier, [batch])
    assert found["embedding"] == pytest.approx(1, rel=1e-5)
    assert found["classifier"] > 1.01
    batch["input_ids"], batch["labels"] = ids[:1].repeat(2, 1), torch.tensor([1, 1])
    assert list(cancellation_by_entry(classifier, [batch]).values()) == pytest.approx(
        [1] * (1 + len(weight_layers(classifier))), rel=1e-5
    )


def test_tracin_on_the_last_layer_is_the_layer_scorer_on_it(classifier, batches):
    ours = TracInLayerScorer([classifier], [0.5], layer="classifier").scores(batches, batches)
    np.testing.assert_allclose(
        ours, TracInLastScorer([classifier], [0.5]).scores(batches, batches), rtol=1e-3, atol=1e-6
    )


def test_without_synonyms_the_synonym_scorer_is_tracin_we(classifier, batches):
    plain = TracInWEScorer([classifier], [0.5]).scores(batches, batches)
    ours = TracInWESynScorer([classifier], [0.5], threshold=1.1).scores(batches, batches)
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-7)


def test_an_example_has_cosine_one_with_itself(classifier, batches):
    scores = CosineTracInWEScorer([classifier, classifier], [0.5, 0.25]).scores(batches, batches)
    np.testing.assert_allclose(scores.diagonal(), 0.75, rtol=1e-5)
    assert np.abs(scores).max() <= 0.75 + 1e-6


def test_knowing_the_label_alone_puts_the_class_first_and_the_others_last(batches):
    scores = SameClassScorer(seed=0).scores(batches, batches)
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()
    assert ((scores > 0) == (labels[:, None] == labels[None])).all()


def test_the_last_layers_influence_is_summed_over_checkpoints(classifier, batches):
    alone = InfluenceLastScorer(classifier, damping=1.0).scores(batches, batches)
    both = influence_last_all([classifier, classifier], [0.5, 0.25]).scores(batches, batches)
    np.testing.assert_allclose(both, 0.75 * alone, rtol=1e-5)


def test_with_equal_second_moments_adams_metric_is_a_factor(classifier, batches):
    moments = {name: torch.full_like(parameter, 0.25) for name, parameter in classifier.named_parameters()}
    checkpoint = AdamCheckpoint(classifier, 0.5, moments)
    words = TracInWEScorer([classifier], [0.5]).scores(batches, batches)
    last = TracInLastScorer([classifier], [0.5]).scores(batches, batches)
    for by_row in (False, True):
        found = AdamTracInScorer([checkpoint], by_row=by_row).scores(batches, batches)
        np.testing.assert_allclose(found, 2 * words, rtol=1e-4, atol=1e-7)
    found = AdamTracInScorer([checkpoint], layer="classifier").scores(batches, batches)
    np.testing.assert_allclose(found, 2 * last, rtol=1e-3, atol=1e-6)
    cosines = AdamTracInScorer([checkpoint], cosine=True).scores(batches, batches)
    np.testing.assert_allclose(
        cosines, CosineTracInWEScorer([classifier], [0.5]).scores(batches, batches), rtol=1e-4, atol=1e-6
    )


def test_the_explained_run_with_adams_state_is_the_explained_run(data_dir):
    sizes = replace(case_deletion.SIZES["tiny"], architectures=("transformer",))
    place = (data_dir / "classification", "ag_news", "transformer", sizes)
    explained, every = case_deletion.train_explained(*place), case_deletion.train_with_adam(*place)
    assert len(every) == explained.recipe.num_epochs + 1
    for epoch, checkpoint in zip(explained.recipe.checkpoint_epochs, explained.checkpoints, strict=True):
        assert every[epoch].learning_rate == checkpoint.learning_rate
        for name, parameter in checkpoint.model.state_dict().items():
            assert torch.equal(parameter, every[epoch].model.state_dict()[name])
        assert set(every[epoch].second_moments) == {name for name, _ in checkpoint.model.named_parameters()}
    assert every[0].learning_rate == explained.recipe.learning_rate
    assert not torch.equal(every[0].model.classifier.weight, every[1].model.classifier.weight)


def test_both_sides_of_a_tied_matrix_add_up_to_its_gradient():
    sizes = SIZES["tiny"]
    model = make_model(sizes, 300, seed=0).model
    documents = torch.randint(0, 300, (3, sizes.num_tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": documents, "attention_mask": torch.ones_like(documents), "labels": documents}
    (found,) = gradients_by_side(model, [batch], middle_layers(sizes))
    loss = model(input_ids=documents[1:2], labels=documents[1:2]).loss * (sizes.num_tokens - 1)
    (alone,) = torch.autograd.grad(loss, model.get_input_embeddings().weight)
    torch.testing.assert_close(found["full"][1], alone.flatten(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["full"], found["input"] + found["output"])


def test_few_rows_are_the_own_ones_or_the_largest():
    gradients = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[1, 1, 4], [0, 2, 9]])
    own, largest = own_rows(gradients, documents), largest_rows(gradients, documents)
    assert own.norm(dim=2).nonzero().tolist() == [[0, 1], [0, 4], [1, 0], [1, 2], [1, 9]]
    for example in range(2):
        expected = gradients[example].norm(dim=1).argsort(descending=True)[:3].sort().values
        assert largest[example].norm(dim=1).nonzero().squeeze(1).tolist() == expected.tolist()


def test_finding_all_wrong_labels_first_has_the_largest_area():
    flipped = np.array([True, False, False, True, False, False, False, False])
    assert detection_area(flipped.astype(float), flipped) == pytest.approx(1 - 0.25 / 2)
    assert detection_area(-flipped.astype(float), flipped) == pytest.approx(0.25 / 2)
