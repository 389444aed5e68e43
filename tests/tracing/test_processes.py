"""Processes that work together end together: with all results, or with an error that names who failed and why."""

import json

import pytest

from tests.launch import start_without_launcher

SCRIPT = """
import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from hf_doge.tracing import processes
from hf_doge.tracing.processes import ProcessFailedError, run_on_all_processes, run_on_main_process
from tests.launch import end_process_group

dist.init_process_group("gloo")
rank = dist.get_rank()
told = {}


def tell(name, meet, work):
    try:
        told[name] = meet(work)
    except (ProcessFailedError, ValueError) as error:
        told[name] = f"{type(error).__name__}: {error}"


def fail_on_one(heartbeat):
    if rank == 1:
        raise ValueError("a bad example")
    for _ in range(600):  # a minute, unless told
        time.sleep(0.1)
        heartbeat()


tell("all", run_on_all_processes, lambda heartbeat: {"rank": rank})
tell("main", run_on_main_process, lambda heartbeat: [rank, "main"])
tell("fails", run_on_all_processes, fail_on_one)
tell("again", run_on_all_processes, lambda heartbeat: rank)
processes.SECONDS_TO_ARRIVE = 1.0
if rank == 1:
    time.sleep(3)
tell("late", run_on_all_processes, lambda heartbeat: rank)
if rank == 0:  # the other has come to its end
    tell("alone", run_on_all_processes, lambda heartbeat: rank)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(told))
end_process_group()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    processes = start_without_launcher(folder / "script.py", folder)
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_all_get_all_results(told):
    for own in told:
        assert own["all"] == [{"rank": 0}, {"rank": 1}]
        assert own["main"] == [0, "main"]


def test_an_error_of_one_ends_the_work_of_the_others_and_the_next_barrier_is_a_new_one(told):
    assert told[1]["fails"] == "ValueError: a bad example"
    assert told[0]["fails"].startswith("ProcessFailedError: Process 1 (")
    assert told[0]["fails"].endswith(") failed: ValueError: a bad example")
    assert told[0]["again"] == told[1]["again"] == [0, 1]


def test_who_lives_but_does_not_come_is_not_waited_for_without_end(told):
    for own in told:
        assert own["late"].startswith("ProcessFailedError: Process 1 did not come within 0 minutes")


def test_who_has_come_to_its_end_is_not_waited_for(told):
    assert told[0]["alone"].startswith("ProcessFailedError: Process 1 came to its end while the others still worked")
