"""Scores of queries over all checkpoints, and the strongest of them."""

import numpy as np
import pytest

from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing import scoring
from hf_doge.tracing.queries import check_options
from hf_doge.tracing.query_rows import RecordedQueries
from hf_doge.tracing.scoring import QueryScorer, select_extremes
from tests.artifacts.influence_rows import NUM_EXAMPLES, dense_scores, open_writer, random_rows, write_checkpoint

LEARNING_RATES = (1.0, 3.0)


@pytest.fixture
def rows():
    return [random_rows(NUM_EXAMPLES, seed=seed) for seed in range(2)]


@pytest.fixture
def reader(tmp_path, rows):
    writer = open_writer(tmp_path / "index", num_examples=NUM_EXAMPLES, dtype="float32")
    for step, (recorded, rate) in enumerate(zip(rows, LEARNING_RATES, strict=True)):
        write_checkpoint(writer, recorded, name=f"checkpoint-{step}", step=step, learning_rate=rate)
    return IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "maps")


def test_the_score_is_the_sum_over_checkpoints_of_learning_rate_times_inner_product(reader, rows, monkeypatch):
    queries = [random_rows(9, seed=2), random_rows(9, seed=3)]
    scorer = QueryScorer(reader, RecordedQueries([None] * 9, queries))
    parts = zip(LEARNING_RATES, queries, rows, strict=True)
    expected = sum(rate * dense_scores(asked, recorded) for rate, asked, recorded in parts)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * np.abs(expected).max()}
    np.testing.assert_allclose(scorer.scores(0, 9), expected, **tolerance)
    np.testing.assert_allclose(scorer.scores(4, 7), expected[4:7], **tolerance)
    monkeypatch.setattr(scoring, "_BLOCK_BYTES", 2 * 4 * NUM_EXAMPLES)  # two queries at a time
    starts, blocks = zip(*scorer.blocks(), strict=True)
    assert starts == (0, 2, 4, 6, 8)
    np.testing.assert_allclose(np.concatenate(blocks), expected, **tolerance)


@pytest.mark.parametrize("block", [1, 2, 1024])
def test_of_equal_scores_the_lower_id_comes_first(monkeypatch, block):
    monkeypatch.setattr(scoring, "_BLOCK_VALUES", block)
    scores = np.array([0, 2, 1, 2, -3, 2, 0, -3], dtype=np.float32)
    assert select_extremes(scores, 4).tolist() == [1, 3, 5, 2, 4, 7]
    assert select_extremes(scores, 2).tolist() == [1, 3, 4, 7]
    assert select_extremes(scores, 99).tolist() == [1, 3, 5, 2, 4, 7]


@pytest.mark.parametrize("top_k", [1, 10, 100, 5000])
def test_the_extremes_are_the_ends_of_a_sorted_list(top_k):
    scores = np.random.default_rng(0).integers(-300, 300, 5000).astype(np.float32)
    highest, lowest = (np.argsort(sign * scores, kind="stable")[:top_k] for sign in (-1, 1))
    expected = [*highest[scores[highest] > 0], *lowest[scores[lowest] < 0]]
    assert select_extremes(scores, top_k).tolist() == expected


def test_an_unknown_option_is_a_type_error(reader):
    with pytest.raises(TypeError, match="unexpected 'cosines'"):
        check_options({"cosines": True}, reader)
