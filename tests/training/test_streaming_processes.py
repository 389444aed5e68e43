"""Training on streams on two processes: no example twice, none lost, in the proportions asked for, and resumed."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from hf_doge.sampling.streaming import interleave_domains
from tests.launch import run_processes
from tests.training import mixture_processes
from tests.training.mixture_processes import SPLITS_STREAMS, WEIGHTS, interleave, skip_if_it_could_not_resume, streams

STEPS = 12  # of 4 examples
SCALE = 12  # 276 rows, so that no domain is exhausted: no row may be seen twice
SETTINGS = {
    "dispatched": {"num_shards": 1},
    "dispatched_workers": {"num_shards": 4, "dataloader_num_workers": 2},
    "split_dispatched": {"num_shards": 1, "split_batches": True},
    "sharded": {"num_shards": 2, "dispatch_batches": False},
    "sharded_workers": {"num_shards": 4, "dispatch_batches": False, "dataloader_num_workers": 2},
    "read_by_all": {"num_shards": 1, "dispatch_batches": False},
    "read_by_all_workers": {"num_shards": 1, "dispatch_batches": False, "dataloader_num_workers": 2},
    "split_read_by_all": {"num_shards": 2, "dispatch_batches": False, "split_batches": True},
    "plain": {"num_shards": 1, "plain": True},
    "plain_sharded": {"num_shards": 2, "plain": True, "dispatch_batches": False},
    "plain_read_by_all": {"num_shards": 1, "plain": True, "dispatch_batches": False},
}
if not SPLITS_STREAMS:  # an older accelerate lets every process read everything
    SETTINGS = {name: options for name, options in SETTINGS.items() if "sharded" not in name}
SAVED_AT = [5]
RESUMED = ("dispatched", "dispatched_workers", "sharded_workers", "read_by_all", "plain_sharded")
RESUMED = [name for name in RESUMED if name in SETTINGS]
FIRST_ROWS = {"wiki": 0, "code": 11 * SCALE, "arxiv": 18 * SCALE}


@pytest.fixture(scope="module")
def tell(tmp_path_factory):
    """All trainings in one launch; what the two processes told, by name."""
    folder, plan = tmp_path_factory.mktemp("streams"), []
    for name, options in SETTINGS.items():
        run = {"run": "train_on_streams", "max_steps": STEPS, "scale": SCALE, **options, "folder": str(folder / name)}
        plan.append({**run, "name": name, "save_at": SAVED_AT if name in RESUMED else []})
        if name in RESUMED:
            checkpoint = folder / name / f"checkpoint-{SAVED_AT[0]}"
            plan.append({**run, "name": f"{name}_resumed", "resume": str(checkpoint)})
    other = {
        "run": "train_on_streams",
        "name": "other_weights",
        "folder": str(folder),
        "num_shards": 2,
        "max_steps": 1,
    }
    plan.append({**other, "by_rank": [WEIGHTS, {**WEIGHTS, "code": 0.31}]})
    (folder / "plan.json").write_text(json.dumps(plan))
    run_processes(Path(mixture_processes.__file__), folder / "plan.json")
    return {
        entry["name"]: [json.loads((folder / f"{entry['name']}-{rank}.json").read_text()) for rank in range(2)]
        for entry in plan
    }


def rows_of(stream, num_rows):
    return [example["row"] for example in islice(stream, num_rows)]


def domain_of(row):
    return max((first, name) for name, first in FIRST_ROWS.items() if first <= row)[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_no_example_reaches_two_processes_and_none_is_repeated_or_left_out(tell, name):
    rows = interleave(tell[name])
    assert len(rows) == STEPS * 4
    assert len(set(rows)) == len(rows)
    for stream in streams(SETTINGS[name]["num_shards"], SCALE).values():
        for index in range(stream.num_shards):
            shard = [example["row"] for example in stream.shard(num_shards=stream.num_shards, index=index)]
            seen = sorted(set(shard) & set(rows))
            assert seen == shard[: len(seen)]


@pytest.mark.parametrize("name", ["dispatched", "split_dispatched", "read_by_all", "split_read_by_all", "plain"])
def test_where_the_stream_is_not_split_two_processes_train_on_it_as_one_would(tell, name):
    mixed = interleave_domains(streams(1, SCALE), WEIGHTS, num_samples=1000)
    assert interleave(tell[name]) == rows_of(mixed, STEPS * 4)


@pytest.mark.skipif(not SPLITS_STREAMS, reason="accelerate does not split streams")
@pytest.mark.parametrize("name", ["sharded", "plain_sharded"])
def test_where_it_is_split_each_process_trains_on_its_part_in_order(tell, name):
    mixed = interleave_domains(streams(2, SCALE), WEIGHTS, num_samples=1000)
    for rank, told in enumerate(tell[name]):
        part = rows_of(mixed.shard(num_shards=2, index=rank), STEPS * 2)
        assert [row for batch in told["micro_batches"] for row in batch] == part


@pytest.mark.parametrize("name", SETTINGS)
def test_the_examples_of_all_processes_follow_the_weights(tell, name):
    rows = interleave(tell[name])
    counts, parts = Counter(map(domain_of, rows)), SETTINGS[name].get("dataloader_num_workers", 1) * 2
    assert all(abs(counts[name] - len(rows) * weight) < 2 * parts for name, weight in WEIGHTS.items())


@pytest.mark.skipif(not SPLITS_STREAMS, reason="accelerate does not split streams")
@pytest.mark.parametrize("name", ["sharded", "sharded_workers", "plain_sharded"])
def test_each_process_follows_the_weights_and_draws_out_of_step_with_the_other(tell, name):
    drawn = [[domain_of(row) for batch in told["micro_batches"] for row in batch] for told in tell[name]]
    for one in drawn:
        counts, parts = Counter(one), SETTINGS[name].get("dataloader_num_workers", 1)
        assert all(abs(counts[name] - len(one) * weight) < 2 * parts for name, weight in WEIGHTS.items())
    equal = sum(first == second for first, second in zip(*drawn, strict=True)) / len(drawn[0])
    assert equal < 0.6  # 0.38 if they were independent, 1 in step


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_with_the_next_examples(tell, name):
    skip_if_it_could_not_resume(tell[f"{name}_resumed"])
    assert interleave(tell[f"{name}_resumed"]) == interleave(tell[name])[SAVED_AT[0] * 4 :]


@pytest.mark.parametrize("name", SETTINGS)
def test_reading_everything_on_every_process_is_warned_of_once(tell, name):
    expected = "Each of the 2 processes reads the whole mixture to keep 1/2 of it"
    warnings = [message for told in tell[name] for message in told["warnings"]]
    unseen = [message for message in warnings if "loss of each domain is not logged" in message]  # of this model
    assert len(unseen) == (not name.startswith("plain"))
    warnings = [message for message in warnings if message not in unseen]
    assert [message[: len(expected)] for message in warnings] == [expected] * ("read_by_all" in name)


def test_processes_that_draw_differently_are_refused_on_all_of_them(tell):
    for told in tell["other_weights"]:
        assert "the weight of 'code' is 0.3 on rank 0, 0.30693" in told["error"]
        assert told["micro_batches"] == []
