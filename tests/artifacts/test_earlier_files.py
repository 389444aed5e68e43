"""
Files that hf_doge wrote at commit 27c6364, before the package was rearranged, are read and continued.

`weights` and `checkpoint` are of a `DoGETrainer` stopped at its fourth step; each index has the first twelve examples of
`random_rows(NUM_EXAMPLES, seed=0)`.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from hf_doge import DomainWeights
from hf_doge.artifacts.influence import IndexReader
from hf_doge.training.learning_state import LearningState
from tests.artifacts.influence_rows import NUM_EXAMPLES, dense_scores, grow_index, random_rows, some

EARLIER = Path(__file__).with_name("written_at_27c6364")
MEAN = {"arxiv": 0.2210909563903437, "books": 0.4055305607379277, "code": 0.3733784828717285}
LAST = {"arxiv": 0.22054398065241718, "books": 0.41288799250095476, "code": 0.366568026846628}
TOLERANCES = {"float16": 1e-3, "int8": 2e-2}
NUM_WRITTEN = 12


def test_earlier_weights_are_read_and_saved_again_as_they_are(tmp_path):
    weights = DomainWeights.from_pretrained(EARLIER / "weights")
    assert (weights.mean, weights.last, weights.trajectory.steps.tolist()) == (MEAN, LAST, [2, 4])
    weights.save_pretrained(tmp_path / "again")
    assert DomainWeights.from_pretrained(tmp_path / "again") == weights
    table = load_dataset(str(tmp_path / "again"), "weights", split="train", cache_dir=str(tmp_path / "cache"))
    assert dict(zip(table["domain"], table["weight"], strict=True)) == MEAN


def test_an_earlier_checkpoint_is_resumed_with_all_that_it_learned():
    state = LearningState.load(EARLIER / "checkpoint", tuple(MEAN))
    assert state.mean.tolist() == list(MEAN.values())
    assert state.weights.tolist() == list(LAST.values())
    assert (state.num_updates, state.num_averaged, state.num_tokens.tolist()) == (4, 2, [60, 58, 51])
    assert [point.step for point in state.points] == [2, 4]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_an_earlier_index_is_searched_and_grows(dtype, tmp_path):
    rows = random_rows(NUM_EXAMPLES, seed=0)
    folder = shutil.copytree(EARLIER / f"index-{dtype}", tmp_path / "index")
    for grows, known in ((False, some(rows, 0, NUM_WRITTEN)), (True, rows)):
        if grows:
            grow_index(folder, rows, dtype=dtype)
        found = IndexReader.open(folder, cache_dir=tmp_path / f"maps{grows}").scores(0, rows)
        expected = dense_scores(rows, known)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= TOLERANCES[dtype] * np.abs(expected).max()
