"""Pushing from several processes that a launcher started: one pushes for all, and the others wait until it has."""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hf_doge.artifacts.hub.errors import PushError

logger = logging.getLogger(__name__)

_SECONDS_TO_BEGIN = 10 * 60.0
_SECONDS_BETWEEN_LOOKS = 0.1
_calls: Counter[str] = Counter()  # of this process, by what is pushed to


def is_first_process() -> bool:
    """Whether this process pushes for all that `accelerate launch` or `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def told_to_others(place: str) -> Iterator[None]:
    """On the first process, around a push: the others hear when it begins and ends, well or not."""
    tell = _teller(place)
    tell("begun")
    try:
        yield
    finally:
        tell("ended")


def wait_for_first(place: str) -> None:
    """
    On the others: wait for the end of the push that the first process makes by the same call. Where it makes none, or the
    processes have no group to hear of each other, this returns.

    Raises:
        PushError: The first process ended before its push did.
    """
    store = _store()
    if store is None:
        return
    _calls[place] += 1
    end = time.monotonic() + _SECONDS_TO_BEGIN
    try:
        while not store.check([_key(place, "ended")]):
            if time.monotonic() > end and not store.check([_key(place, "begun")]):
                logger.warning("The first process does not push to %s, so this one goes on.", place)
                return
            # Not `store.wait`, which keeps all other threads of this process from the store.
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except RuntimeError as error:  # the store is gone, and with it who held it
        raise PushError(f"The process that pushes to {place} ended before its push did. Push again.") from error


def _teller(place: str) -> Callable[[str], None]:
    store = _store()
    if store is None:
        return lambda what: None
    _calls[place] += 1
    keys = {what: _key(place, what) for what in ("begun", "ended")}

    def tell(what: str) -> None:
        with suppress(RuntimeError):  # nobody is left to hear it
            store.set(keys[what], "")

    return tell


def _key(place: str, what: str) -> str:
    return f"hf_doge/push/{place}/{_calls[place]}/{what}"


def _store() -> Any | None:
    distributed = sys.modules.get("torch.distributed")  # who has not imported it has no group
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    # torch has no public name for the store it was set up with.
    return distributed.distributed_c10d._get_default_store() if distributed.get_world_size() > 1 else None
