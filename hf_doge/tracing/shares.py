"""Work shared by the processes of `accelerate launch`, its results brought together on all of them."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed
from accelerate import PartialState
from accelerate.utils import gather_object

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
        RuntimeError: on every process, if the work of another one failed.
    """
    if not _launched():
        return work(0, count)
    state = PartialState()
    start, stop = (count * rank // state.num_processes for rank in (state.process_index, state.process_index + 1))
    results, error = [], None
    try:
        results = work(start, stop) if start < stop else []
    except Exception as failure:  # told to the others first, who would wait for ever
        error = failure
    told = gather_object([None if error is None else f"process {state.process_index}: {error}"])
    if error is not None:
        raise error
    failed = [message for message in told if message is not None]
    if failed:
        raise RuntimeError(f"Another process failed at its share of the queries, {failed[0]}")
    return gather_object(results)


def _launched() -> bool:
    """Whether there are other processes to share with."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
