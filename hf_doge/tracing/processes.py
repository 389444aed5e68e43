"""One process works, the others wait."""

import time
from collections.abc import Callable

import torch.distributed as dist

_SECONDS_BETWEEN_SIGNS = 10.0
_WORKING, _DONE = "working", "done"


def run_on_main_process(work: Callable[[Callable[[], None]], None]) -> None:
    """
    Run `work(sign_of_life)` on the main process and return on all processes when it has ended.

    Every process must call this. `work` calls `sign_of_life()` every now and then, at least once in the time that a
    collective operation may take (`ddp_timeout`, 30 minutes unless set), so that the others may wait for hours.

    Args:
        work (`Callable`): What the main process does.

    Raises:
        RuntimeError: on the other processes, if `work` raised an error on the main one, which raises that error itself.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        work(lambda: None)
    elif dist.get_rank() == 0:
        _work_and_tell(work)
    else:
        while (status := _broadcast(None)) == _WORKING:
            pass
        if status != _DONE:
            raise RuntimeError(f"The main process failed while this one waited for it: {status}")


def _work_and_tell(work: Callable[[Callable[[], None]], None]) -> None:
    told = time.monotonic()

    def sign_of_life() -> None:
        nonlocal told
        if time.monotonic() - told > _SECONDS_BETWEEN_SIGNS:
            _broadcast(_WORKING)
            told = time.monotonic()

    try:
        work(sign_of_life)
    except BaseException as error:
        _broadcast(f"{type(error).__name__}: {error}")
        raise
    _broadcast(_DONE)


def _broadcast(status: str | None) -> str:
    box = [status]
    dist.broadcast_object_list(box, src=0)
    return box[0]
