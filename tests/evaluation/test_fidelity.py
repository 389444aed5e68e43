"""Rank correlation and overlap, each against an independent formula."""

import numpy as np
import pytest

from benchmarks.fidelity import fidelity_table, measure_fidelity
from hf_doge.evaluation.influence.rank_metrics import average_ranks, spearman, top_overlap

generator = np.random.default_rng(0)
FIRST, SECOND = generator.normal(size=(2, 5, 30))


def test_without_ties_spearman_is_one_minus_the_squared_rank_distances():
    ranks = [[sorted(row).index(value) for value in row] for row in (FIRST[2], SECOND[2])]
    distances = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    assert spearman(FIRST, SECOND)[2] == pytest.approx(1 - 6 * distances / (30 * (30**2 - 1)), abs=1e-12)


def test_with_ties_spearman_is_the_correlation_that_pandas_has():
    pandas = pytest.importorskip("pandas")
    first, second = generator.integers(5, size=(2, 40))
    expected = pandas.Series(first).rank().corr(pandas.Series(second).rank())
    assert float(spearman(first, second)) == pytest.approx(expected, abs=1e-12)
    assert average_ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]


def test_ranks_and_their_correlation_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    first, second = generator.integers(5, size=(2, 6, 40))
    np.testing.assert_array_equal(average_ranks(first), stats.rankdata(first, axis=-1))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(first, second), expected, rtol=1e-12)


def test_spearman_knows_only_the_order():
    np.testing.assert_allclose(spearman(FIRST, np.exp(3 * FIRST)), 1)
    np.testing.assert_allclose(spearman(FIRST, -FIRST), -1)
    assert np.isnan(spearman(FIRST[0], np.zeros(30)))


def test_overlap_is_that_of_the_two_sets():
    for k in (1, 10, 30):
        expected = [
            len(set(np.argsort(-a)[:k].tolist()) & set(np.argsort(-b)[:k].tolist())) / k
            for a, b in zip(FIRST, SECOND, strict=True)
        ]
        np.testing.assert_allclose(top_overlap(FIRST, SECOND, k), expected)


def test_the_exact_index_is_faithful_and_noise_costs_fidelity():
    exact = measure_fidelity("exact", FIRST, FIRST, bytes_per_example=100)
    noisy = measure_fidelity("noisy", FIRST, FIRST + SECOND, bytes_per_example=50)
    assert (exact.spearman, exact.top_overlap, exact.bottom_overlap) == (1, 1, 1)
    assert noisy.spearman_worst <= noisy.spearman < 1
    table = fidelity_table([exact, noisy])
    assert "| exact | 100 | 1.0000 | 1.0000 | 1.000 | 1.000 |" in table


def test_a_query_without_order_is_counted_and_left_out():
    silent = FIRST.copy()
    silent[1] = 0
    assert measure_fidelity("silent", FIRST, silent, bytes_per_example=1).num_unordered == 1
    with pytest.raises(ValueError, match="unequal scores"):
        measure_fidelity("mute", FIRST, np.zeros_like(FIRST), bytes_per_example=1)


def test_scores_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        spearman(FIRST, SECOND[:, :9])
    with pytest.raises(ValueError, match="finite"):
        spearman(FIRST, SECOND * np.inf)
    with pytest.raises(ValueError, match="`k` must be"):
        top_overlap(FIRST, SECOND, 31)
