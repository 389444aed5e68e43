"""Planted facts: recall and average precision by hand, and what ties may not do."""

import numpy as np
import pytest

from hf_doge.evaluation.influence.rank_metrics import average_precision, recall_at_k

SCORES = np.array([[0.9, 0.1, 0.8, 0.3, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5]])
RELEVANT = [[0, 4, 1], [0]]


def test_average_precision_is_the_mean_precision_at_each_relevant_example():
    # First query: ranks 1, 3 and 5 hold them, so (1/1 + 2/3 + 3/5) / 3; second: rank 5 alone.
    np.testing.assert_allclose(average_precision(SCORES, RELEVANT), [(1 + 2 / 3 + 3 / 5) / 3, 1 / 5])
    np.testing.assert_allclose(average_precision(SCORES, [[0, 2], [4, 3]]), 1)


def test_recall_is_the_share_of_the_relevant_among_the_k_highest():
    np.testing.assert_allclose(recall_at_k(SCORES, RELEVANT, 1), [1 / 3, 0])
    np.testing.assert_allclose(recall_at_k(SCORES, RELEVANT, 3), [2 / 3, 0])
    np.testing.assert_allclose(recall_at_k(SCORES, RELEVANT, 5), 1)


@pytest.mark.parametrize("relevant", [[0, 1], [2, 3]])
def test_the_order_of_equal_scores_says_nothing(relevant):
    """Otherwise a constant would find whatever stands first."""
    constant = np.zeros((1, 4))
    assert average_precision(constant, [relevant])[0] == pytest.approx(0.5)
    assert recall_at_k(constant, [relevant], 2)[0] == pytest.approx(0.5)
    assert recall_at_k(constant, [relevant], 1)[0] == pytest.approx(0.25)


def test_ties_at_the_edge_count_by_the_share_that_fits():
    scores = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]])
    # The first place, and one of three equal ones, two of which are relevant.
    assert recall_at_k(scores, [[0, 1, 2]], 2)[0] == pytest.approx((1 + 2 / 3) / 3)
    # Precision 1/1 at the first score, 3/4 at the second, which finds two more.
    assert average_precision(scores, [[0, 1, 2]])[0] == pytest.approx((1 + 2 * 3 / 4) / 3)


def test_shuffling_the_examples_changes_nothing():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, size=(20, 30)).astype(float)
    relevant = [generator.choice(30, size=4, replace=False) for _ in range(20)]
    order = generator.permutation(30)
    moved = [np.argsort(order)[places] for places in relevant]
    for measure in (average_precision, lambda *given: recall_at_k(*given, 7)):
        np.testing.assert_allclose(measure(scores[:, order], moved), measure(scores, relevant), atol=1e-12)


@pytest.mark.parametrize(
    ("scores", "relevant", "message"),
    [
        (SCORES, [[0], []], "query 1 has none"),
        (SCORES, [[0], [5]], r"`relevant\[1\]` must be in \[0, 4\], but got 5"),
        (SCORES, [[-1], [0]], r"`relevant\[0\]` must be in \[0, 4\], but got -1"),
        (SCORES, [[0, 0], [1]], "each example once"),
        (SCORES, [[0]], r"shape \(2, 5\) and 1 list"),
        (SCORES[0], [[0]], "num_queries, num_examples"),
        (SCORES * np.nan, RELEVANT, "finite"),
        (SCORES, [[True], [False]], "whole number"),
    ],
)
def test_what_cannot_be_found_is_refused(scores, relevant, message):
    for measure in (average_precision, lambda *given: recall_at_k(*given, 1)):
        with pytest.raises(ValueError, match=message):
            measure(scores, relevant)


def test_k_must_be_within_the_examples():
    with pytest.raises(ValueError, match=r"`k` must be in \[1, 5\], but got 6"):
        recall_at_k(SCORES, RELEVANT, 6)
