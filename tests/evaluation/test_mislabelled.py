"""Flipped labels are found by who should find them."""

import numpy as np
import pytest
import torch

from hf_doge.evaluation.influence.rank_metrics import area_under_roc, recall_at
from hf_doge.evaluation.influence.scorers import TracInWEScorer
from hf_doge.evaluation.influence.small_models import TrainingRecipe, make_classifier, to_batches, train_classifier
from hf_doge.evaluation.influence.small_tasks import flip_labels


def test_exactly_the_share_is_flipped_and_always_to_another_class():
    labels = np.arange(200) % 4
    flipped_labels, flipped = flip_labels(labels, 0.1, num_classes=4, seed=0)
    assert flipped.sum() == 20
    assert ((flipped_labels != labels) == flipped).all()
    assert set(flipped_labels.tolist()) == {0, 1, 2, 3}
    again, _ = flip_labels(labels, 0.1, num_classes=4, seed=0)
    other, _ = flip_labels(labels, 0.1, num_classes=4, seed=1)
    assert (again == flipped_labels).all()
    assert (other != flipped_labels).any()


def test_area_is_the_share_of_pairs_in_the_right_order():
    generator = np.random.default_rng(0)
    suspicion, positive = generator.integers(6, size=50).astype(float), generator.random(50) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in suspicion[positive] for b in suspicion[~positive]]
    assert area_under_roc(suspicion, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert area_under_roc(-suspicion, positive) == pytest.approx(1 - np.mean(pairs), abs=1e-12)


def test_recall_counts_the_positives_among_the_inspected():
    suspicion = np.array([0.9, 0.1, 0.8, 0.2, 0.5])
    positive = np.array([True, False, False, True, False])
    assert [recall_at(suspicion, positive, fraction) for fraction in (0.2, 0.4, 0.8, 1.0)] == [0.5, 0.5, 1.0, 1.0]


def test_a_perfect_ranking_and_a_random_one_are_told_apart():
    _, flipped = flip_labels(np.zeros(400, dtype=int), 0.1, num_classes=2, seed=0)
    perfect = flipped.astype(float)
    assert area_under_roc(perfect, flipped) == 1
    assert area_under_roc(-perfect, flipped) == 0
    assert 0.35 < area_under_roc(np.random.default_rng(0).random(400), flipped) < 0.65
    assert [recall_at(perfect, flipped, fraction) for fraction in (0.05, 0.1, 0.2)] == [0.5, 1.0, 1.0]


def test_self_influence_finds_flipped_labels_of_a_classifier_better_than_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    ids = torch.randint(1, 10, (120, 8), generator=generator) + 9 * labels[:, None]
    noisy, flipped = flip_labels(labels.numpy(), 0.1, num_classes=2, seed=0)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.from_numpy(noisy)}
    recipe = TrainingRecipe(num_epochs=4, batch_size=20, learning_rate=5e-3, checkpoint_epochs=(2, 4))
    _, checkpoints = train_classifier(
        lambda seed: make_classifier("cnn", 20, 2, width=8, seed=seed), data, recipe, seed=0, keep_checkpoints=True
    )
    suspicion = TracInWEScorer(*zip(*checkpoints, strict=True)).self_influence(to_batches(data))
    assert area_under_roc(suspicion, flipped) > 0.9
    assert recall_at(suspicion, flipped, 0.1) > 0.5  # 0.1 by chance


@pytest.mark.parametrize(
    ("labels", "share", "classes", "message"),
    [
        ([0, 1], 0.1, 2, "flip at least one"),
        ([0, 1], 1.0, 2, "leave at least one"),
        ([0, 2], 0.5, 2, "must be classes"),
        ([0, 0], 0.5, 1, "at least two"),
    ],
)
def test_what_cannot_be_flipped_is_refused(labels, share, classes, message):
    with pytest.raises(ValueError, match=message):
        flip_labels(np.array(labels), share, num_classes=classes, seed=0)


def test_rankings_that_do_not_fit_are_refused():
    flipped = np.array([True, False])
    with pytest.raises(ValueError, match="one suspicion per example"):
        recall_at(np.ones(3), flipped, 0.1)
    with pytest.raises(ValueError, match="at least one positive"):
        recall_at(np.ones(2), np.array([False, False]), 0.1)
    with pytest.raises(ValueError, match="`fraction`"):
        recall_at(np.ones(2), flipped, 1.5)
    with pytest.raises(ValueError, match="finite"):
        recall_at(np.array([np.nan, 1]), flipped, 0.1)
    with pytest.raises(ValueError, match="negative example"):
        area_under_roc([1.0, 2.0], [1, 1])


def test_the_modules_load_in_the_library_evaluate():
    evaluate = pytest.importorskip("evaluate")
    from pathlib import Path

    import hf_doge

    folder = Path(hf_doge.__file__).parent / "evaluation" / "metrics"
    metric = evaluate.load(str(folder / "auc_del"))
    assert metric.compute(predictions=[0.1, 0.4], references=[0.3, 0.3])["auc_del"] == pytest.approx(-0.05)
    metric = evaluate.load(str(folder / "mislabelled_recall"))
    found = metric.compute(predictions=[0.9, 0.1, 0.2], references=[1, 0, 0], fraction=0.34)
    assert found == {"recall": 1.0, "auc": 1.0}
