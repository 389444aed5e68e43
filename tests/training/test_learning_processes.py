"""Learning the weights under `accelerate launch`: the same on any number of processes."""

import json
from pathlib import Path

import pytest
import torch
from transformers.distributed import DistributedConfig

from tests.launch import launch, run_processes
from tests.training.learning_script import FEW, RESUMED, SHARDED, WAYS

pytestmark = pytest.mark.timeout(600)  # processes learn in the setup of the first test that reads what they left
SCRIPT = Path(__file__).parent / "learning_script.py"
SAVED = ("shards", "gathered")  # the state dicts that FSDP2 writes


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """
    Folders of what one process with 8 micro-batches learned, two with 4 and four with 2 (by number), what two learned with
    one larger micro-batch ("large"), and what one and four made of a run that two had begun ("resumed1", "resumed4").
    """
    folders = {name: tmp_path_factory.mktemp(f"run{name}") for name in (1, 2, 4, "large", "resumed1", "resumed4")}

    large = job(folders["large"], 2, micro_batch=8, ways=FEW)
    launch(SCRIPT, json.dumps([job(folders[2], 2), large]), num_processes=2)
    for num_processes, ways in ((1, tuple(WAYS)), (4, FEW)):
        resumed = job(folders[f"resumed{num_processes}"], num_processes, resume=str(folders[2] / "runs"))
        alone = job(folders[num_processes], num_processes, ways=ways)
        run_processes(SCRIPT, json.dumps([alone, resumed]), num_processes=num_processes)
    return folders


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Folders of what two processes learned on a sharded model, by how it was sharded, and of what resumed runs made of it."""
    if "dp_replicate_size" not in DistributedConfig.__dataclass_fields__:
        pytest.skip("older torch and transformers shard no model on CPUs")
    names = [*SHARDED, *(f"{sharding} resumed" for sharding in SAVED)]
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in names}
    jobs = [job(folders[sharding], 2, sharding=sharding) for sharding in SHARDED]
    for sharding in SAVED:
        resumed = folders[f"{sharding} resumed"]
        jobs.append(job(resumed, 2, sharding=sharding, resume=str(folders[sharding] / "runs")))
    run_processes(SCRIPT, json.dumps(jobs))
    return folders


def job(folder, num_processes, *, micro_batch=2, **options):
    return {"folder": str(folder), "num_processes": num_processes, "micro_batch": micro_batch, **options}


def load(folder, way, rank=0):
    return torch.load(folder / f"{way}-{rank}.pt")


def assert_same_learning(found, expected, *, tolerance=1e-5):
    for name in ("weights", "mean", "losses", "parameters"):
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        found["scores"], expected["scores"], rtol=10 * tolerance, atol=tolerance, equal_nan=True
    )
    assert torch.equal(found["tokens"], expected["tokens"])
    assert torch.equal(found["examples"], expected["examples"])
    assert found["logged"] == pytest.approx(expected["logged"], rel=1e-4)


@pytest.mark.parametrize(("way", "num_processes"), [*((way, 2) for way in WAYS), *((way, 4) for way in FEW)])
def test_splitting_a_batch_over_processes_changes_nothing(learned, way, num_processes):
    expected = load(learned[1], way)
    assert (expected["weights"][-1] - 1 / 3).abs().max() > 1e-3  # there was something to learn
    assert_same_learning(load(learned[num_processes], way), expected)


@pytest.mark.parametrize(("way", "num_processes"), [*((way, 2) for way in WAYS), *((way, 4) for way in FEW)])
def test_all_processes_hold_the_same_weights_to_the_bit(learned, way, num_processes):
    first, *others = [load(learned[num_processes], way, rank) for rank in range(num_processes)]
    for other in others:
        assert torch.equal(first["weights"], other["weights"])
        assert torch.equal(first["parameters"], other["parameters"])


def test_learning_settles_after_the_same_step_on_any_number_of_processes(learned):
    """The fourth of six, after two windows of two updates; the mean by inverse variance is compared above."""
    ends = [len(load(learned[number], "undecided", rank)["weights"]) for number, rank in ((1, 0), (2, 0), (2, 1))]
    assert ends == [4, 4, 4]


@pytest.mark.parametrize("num_processes", [1, 4])
@pytest.mark.parametrize("way", RESUMED)
def test_a_run_saved_on_two_processes_resumes_on_one_and_on_four(learned, way, num_processes):
    assert_same_learning(load(learned[f"resumed{num_processes}"], way), load(learned[2], way))


@pytest.mark.parametrize("way", FEW)
def test_micro_batches_of_any_size_give_the_same(learned, way):
    assert_same_learning(load(learned["large"], way), load(learned[1], way))


@pytest.mark.parametrize(("sharding", "way"), [(s, way) for s in SHARDED if s != "gathered" for way in SHARDED[s]])
def test_sharding_the_model_changes_nothing(learned, sharded, sharding, way):
    expected, found = load(learned[1], way), load(sharded[sharding], way)
    assert_same_learning(found, expected)
    assert found["nonfinite_steps"] == expected["nonfinite_steps"] == {"broken": 5, "overflown": 4}.get(way, 0)


@pytest.mark.parametrize(("sharding", "way"), [(sharding, way) for sharding in SHARDED for way in SHARDED[sharding]])
def test_processes_with_parts_of_a_model_hold_the_same_weights_to_the_bit(sharded, sharding, way):
    first, other = [load(sharded[sharding], way, rank) for rank in range(2)]
    assert torch.equal(first["weights"], other["weights"])
    assert torch.equal(first["parameters"], other["parameters"])


@pytest.mark.parametrize(("sharding", "way"), [(s, way) for s in SAVED for way in SHARDED[s] if way in RESUMED])
def test_a_sharded_run_resumes_to_the_bit(sharded, sharding, way):
    expected, found = load(sharded[sharding], way), load(sharded[f"{sharding} resumed"], way)
    for name in ("weights", "scores", "losses", "parameters"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)
    assert found["logged"] == expected["logged"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("CPUs", "accelerate does so on accelerators only, and here would train a whole copy"),
        ("FSDP1", "FSDP1 yet. Its flat parameters"),
        ("offloading", "FSDP's CPU offloading yet. It was not tried"),
        ("single pass", "`alignment='single_pass'` needs whole gradients of all domains on each process"),
        ("no state", "SGD without momentum, from a checkpoint of `FULL_STATE_DICT`. Set `fsdp_config="),
        ("tensor parallelism", "tensor, pipeline, expert or context parallelism yet. Use DDP or FSDP2"),
    ],
)
def test_ways_over_processes_that_are_not_right_yet_are_refused(sharded, what, message):
    for rank in range(2):
        assert message in torch.load(sharded["shards"] / f"refusals-{rank}.pt")[what]
