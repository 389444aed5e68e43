"""Work shared by the processes of `accelerate launch`, its results brought together on all of them."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed

from hf_doge.tracing.processes import join_processes, num_processes, process_index, run_on_all_processes

Result = TypeVar("Result")


def share_work(count: int, work: Callable[[int, int], list[Result]]) -> list[Result]:
    """
    Let each process do a contiguous part of `range(count)`; alone, all of it.

    Args:
        count (`int`): How many there are to do, the same on all processes.
        work (`Callable`): `work(start, stop) -> list`, with `start < stop`.

    Returns:
        `list`: the results of all processes in order, on every process.

    Raises:
        ProcessFailedError: if the work of another process failed or it was killed, see [`run_on_all_processes`]: on each
            process when its own share is done.
        ValueError: if processes were asked different numbers of things.
    """
    join_processes()
    if num_processes() == 1:
        return work(0, count)
    rank, size = process_index(), num_processes()
    start, stop = count * rank // size, count * (rank + 1) // size
    results: list[Result] = []

    def work_on_share(heartbeat: Callable[[], None]) -> int:
        if start < stop:
            results.extend(work(start, stop))
        return count

    counts = run_on_all_processes(work_on_share)
    if set(counts) != {count}:
        raise ValueError(f"All processes must ask the same, but they asked for {counts} results. Ask alike on all.")
    gathered: list[list[Result]] = [[] for _ in range(size)]
    torch.distributed.all_gather_object(gathered, results)
    return [result for share in gathered for result in share]


def build_on_each_machine(count: int, build: Callable[[int], None]) -> None:
    """
    Let each process call `build(number)` for some of `range(count)`, all of which are then there on every machine.

    Raises:
        ProcessFailedError: if another process failed.
    """
    join_processes()
    rank, size = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))

    def build_some(heartbeat: Callable[[], None]) -> None:
        for number in range(rank if size > 1 else 0, count, size):
            build(number)
            heartbeat()

    if num_processes() > 1:  # a process alone builds what it needs when it needs it
        run_on_all_processes(build_some)
