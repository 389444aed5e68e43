"""Learning the weights under `accelerate launch`: the same on any number of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.launch import launch
from tests.learning_script import RESUMED, WAYS

SCRIPT = Path(__file__).parent / "learning_script.py"


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """
    Folders of what one process with 8 micro-batches learned, two with 4 and four with 2 (by number), what two learned with
    one larger micro-batch ("large"), and what one and four made of a run that two had begun ("resumed1", "resumed4").
    """
    folders = {name: tmp_path_factory.mktemp(f"run{name}") for name in (1, 2, 4, "large", "resumed1", "resumed4")}

    def job(name, num_processes, micro_batch=2, resume=False):
        return {
            "folder": str(folders[name]),
            "num_processes": num_processes,
            "micro_batch": micro_batch,
            "resume": resume,
        }

    launch(SCRIPT, json.dumps([job(2, 2), job("large", 2, 8)]), num_processes=2)
    for num_processes in (1, 4):
        resumed = f"resumed{num_processes}"
        shutil.copytree(folders[2] / "runs", folders[resumed] / "runs")
        jobs = [job(num_processes, num_processes), job(resumed, num_processes, resume=True)]
        launch(SCRIPT, json.dumps(jobs), num_processes=num_processes)
    return folders


def load(folder, way, rank=0):
    return torch.load(folder / f"{way}-{rank}.pt")


def assert_same_learning(found, expected, *, tolerance=1e-5):
    for name in ("weights", "losses", "parameters"):
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        found["scores"], expected["scores"], rtol=10 * tolerance, atol=tolerance, equal_nan=True
    )
    assert torch.equal(found["tokens"], expected["tokens"])
    assert torch.equal(found["examples"], expected["examples"])
    assert found["logged"] == pytest.approx(expected["logged"], rel=1e-4)


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_splitting_a_batch_over_processes_changes_nothing(learned, way, num_processes):
    expected = load(learned[1], way)
    assert (expected["weights"][-1] - 1 / 3).abs().max() > 1e-3  # there was something to learn
    assert_same_learning(load(learned[num_processes], way), expected)


@pytest.mark.parametrize("way", WAYS)
def test_all_processes_hold_the_same_weights_to_the_bit(learned, way):
    first, *others = [load(learned[4], way, rank) for rank in range(4)]
    for other in others:
        assert torch.equal(first["weights"], other["weights"])
        assert torch.equal(first["parameters"], other["parameters"])


@pytest.mark.parametrize("num_processes", [1, 4])
@pytest.mark.parametrize("way", RESUMED)
def test_a_run_saved_on_two_processes_resumes_on_one_and_on_four(learned, way, num_processes):
    assert_same_learning(load(learned[f"resumed{num_processes}"], way), load(learned[2], way))


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_of_any_size_give_the_same(learned, way):
    assert_same_learning(load(learned["large"], way), load(learned[1], way))
