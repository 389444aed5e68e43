"""
Work on several processes that ends on all of them: with everyone's results, or with an error that names who failed.

Processes meet at barriers: each does its work, tells the others its result or its error, and waits for them. All of it goes
through the store that the process group was set up with, so no collective operation is left hanging when a process is
missing. A thread of each process sends a heartbeat every two seconds, from the first barrier to the end of the process.
"""

import atexit
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

SECONDS_WITHOUT_HEARTBEAT = 60.0
SECONDS_TO_ARRIVE = 30 * 60.0

_SECONDS_BETWEEN_HEARTBEATS = 2.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SHORTEST_NAP, _LONGEST_NAP = 0.002, 0.2  # between two looks of a process that waits
_SECONDS_TO_TELL = 10.0
_SECONDS_TO_BE_SEEN = 10.0  # network file systems remember for seconds what was not there
_ENDED = "ended"

Heartbeat = Callable[[], None]
Result = TypeVar("Result")


class ProcessFailedError(RuntimeError):
    """Another process failed, was killed or never came; the message names it and the cause."""


def num_processes() -> int:
    """The size of the process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The rank of this process, the main one being 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def join_processes() -> None:
    """
    Under `accelerate launch`, set up the process group of those that were launched, as the Trainer does; and send
    heartbeats from now on, so that the others hear of it if this process ends before it comes to their barrier.
    """
    if num_processes() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Without `cpu` it would leave CPUs without a process group.
        PartialState(cpu=not torch.accelerator.is_available())
    if num_processes() > 1:
        _process_group()


def default_device() -> torch.device:
    """A GPU if there is one; of several processes each has its own."""
    if num_processes() > 1:
        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_on_main_process(work: Callable[[Heartbeat], Any]) -> Any:
    """
    Run `work(heartbeat)` on the main process alone and return its result on all, once it has ended.

    As [`run_on_all_processes`], where the others do nothing.
    """
    return run_on_all_processes(lambda heartbeat: work(heartbeat) if process_index() == 0 else None)[0]


def run_on_all_processes(work: Callable[[Heartbeat], Any]) -> list[Any]:
    """
    Run `work(heartbeat)` on every process, and return the results of all on all, once all have ended.

    Every process must call this, each as often as the others. It may take hours. `work` calls `heartbeat()` every now
    and then, after each batch say, which ends it by [`ProcessFailedError`] if another process has failed meanwhile.

    Args:
        work (`Callable`): What this process does. Its result goes to the others as JSON, so it must be small.

    Returns:
        `list`: the result of each process, by rank.

    Raises:
        ProcessFailedError: On all other processes, if

            - `work` raised an error on one, which raises that error itself: as soon as they wait or call `heartbeat`;
            - one was killed, or its machine is gone: at most `SECONDS_WITHOUT_HEARTBEAT` (60) later; at once if it is the
              one that holds the store, or if it came to its end in an orderly way;
            - one lives, but does not come within `SECONDS_TO_ARRIVE` (30 minutes, what a collective operation gets).
    """
    if num_processes() == 1:
        return [work(lambda: None)]
    return _process_group().meet(work)


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
    dist.all_gather_object(gathered, results)
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


def require_shared_folder(folder: str | os.PathLike) -> None:
    """
    Every process calls this, with the folder that all of them are to write to; it is there already.

    Raises:
        ValueError: On a process that does not see what the main one writes there: the folder is on a disk of its machine.
        ProcessFailedError: On the others then; it names that process.
    """
    if num_processes() == 1:
        return
    folder = Path(folder)
    name = f".seen-by-all-{uuid.uuid4().hex}"

    def look(heartbeat: Heartbeat) -> None:
        end = time.monotonic() + _SECONDS_TO_BE_SEEN
        while process_index() > 0 and not (folder.is_dir() and written in os.listdir(folder)):
            if time.monotonic() > end:
                raise ValueError(
                    f"All processes must see the folder of the index, but process {process_index()} on"
                    f" {socket.gethostname()!r} does not find in {str(folder.absolute())!r} what the main process wrote"
                    " there. Choose an `output_dir` on a file system that all machines share."
                )
            time.sleep(_LONGEST_NAP)
            heartbeat()

    def write(heartbeat: Heartbeat) -> str:
        (folder / name).touch()
        return name

    written = run_on_main_process(write)
    try:
        run_on_all_processes(look)
    finally:
        if process_index() == 0:
            (folder / name).unlink()


class _ProcessGroup:
    """The processes of a group, as one of them sees them. The main one looks after all others, they look after it."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.default_store = store
        self.store = dist.PrefixStore("hf_doge", store)
        self.rank, self.size = rank, size
        self._num_barriers = 0
        self._pulses: dict[int, tuple[str | None, float]] = {}
        self._ended = threading.Event()
        self._process_id = os.getpid()
        self._beat(0)
        self._thread = threading.Thread(target=self._live, name="hf_doge-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.leave)

    def meet(self, work: Callable[[Heartbeat], Any]) -> list[Any]:
        barrier = _Barrier(self, self._num_barriers)
        self._num_barriers += 1
        try:
            barrier.arrive()
            return barrier.exchange(json.dumps(work(barrier.look_around)))
        except BaseException as error:
            if not isinstance(error, ProcessFailedError):
                barrier.fail(f"Process {self.rank} ({socket.gethostname()}) failed: {type(error).__name__}: {error}")
            barrier.break_up()
            raise

    def leave(self) -> None:
        """Tell the others, so that they need not find out; at the end of the process."""
        if self._ended.is_set() or os.getpid() != self._process_id:
            return
        self._ended.set()
        self._thread.join(timeout=_SECONDS_BETWEEN_HEARTBEATS)
        with suppress(RuntimeError):  # whoever holds the store has left already
            self.store.set(f"sign/{self.rank}", _ENDED)

    def pulse(self, rank: int) -> tuple[str | None, float]:
        """The last heartbeat of a process, and for how many seconds there has been no other."""
        key, now = f"sign/{rank}", time.monotonic()
        beat = self.store.get(key).decode() if self.store.check([key]) else None
        last = self._pulses.get(rank)
        if last is None or last[0] != beat:
            last = self._pulses[rank] = (beat, now)
        return beat, now - last[1]

    def forget_pulses(self) -> None:
        """Silence counts from now on: while this process was busy elsewhere, it heard nothing."""
        self._pulses.clear()

    def _live(self) -> None:
        number = 0
        with suppress(RuntimeError):  # the store is gone, and with it whom this could tell
            while not self._ended.wait(_SECONDS_BETWEEN_HEARTBEATS):
                number += 1
                self._beat(number)

    def _beat(self, number: int) -> None:
        self.store.set(f"sign/{self.rank}", str(number))


class _Barrier:
    """One call of [`run_on_all_processes`]."""

    def __init__(self, group: _ProcessGroup, number: int) -> None:
        self._group, self._store, self._number = group, group.store, number
        self._begin = self._last_look = time.monotonic()
        group.forget_pulses()

    def arrive(self) -> None:
        try:
            self._store.set(self._key("here", self._group.rank), "")
        except dist.DistNetworkError as error:
            raise self._lost_store() from error

    def fail(self, message: str) -> None:
        """Tell all; the first message stays."""
        with suppress(RuntimeError):  # the store is gone: no process can be told, nor needs to be
            self._store.compare_set(self._key("failed"), "", message)

    def break_up(self) -> None:
        """Having failed: the main process, which may hold the store, stays until the others know why, but not for long."""
        with suppress(RuntimeError):
            self._store.set(self._key("told", self._group.rank), "")
            left = set(range(1, self._group.size)) if self._group.rank == 0 else set()
            end = time.monotonic() + _SECONDS_TO_TELL
            while left and time.monotonic() < end:
                left = {rank for rank in left if not self._store.check([self._key("told", rank)])}
                left = {rank for rank in left if self._absence(rank) is None}
                time.sleep(_SHORTEST_NAP)

    def look_around(self) -> None:
        """What `work` gets as `heartbeat`."""
        if time.monotonic() - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return
        others = range(1, self._group.size) if self._group.rank == 0 else (0,)
        self._look(others)
        self._last_look = time.monotonic()

    def exchange(self, result: str) -> list[Any]:
        """Give this process's result and get all."""
        group, size = self._group, self._group.size
        try:
            self._store.set(self._key("done", group.rank), result)
            if group.rank > 0:
                self._wait_for([self._key("all")], {self._key("all"): 0})
                results = json.loads(self._store.get(self._key("all")))
                self._store.set(self._key("seen", group.rank), "")
                return results
            done = {self._key("done", rank): rank for rank in range(1, size)}
            self._wait_for(list(done), done)
            results = [json.loads(self._store.get(self._key("done", rank))) for rank in range(size)]
            self._store.set(self._key("all"), json.dumps(results))
            self._part(range(1, size))
            return results
        except dist.DistNetworkError as error:
            raise self._lost_store() from error

    def _wait_for(self, keys: Iterable[str], owners: dict[str, int]) -> None:
        missing, nap = list(keys), _SHORTEST_NAP
        while missing:
            missing = [key for key in missing if not self._store.check([key])]
            if missing:
                self._look([owners[key] for key in missing], waiting=True)
                time.sleep(nap)
                nap = min(1.5 * nap, _LONGEST_NAP)

    def _part(self, ranks: Iterable[int]) -> None:
        """Stay until all have read the results, as the store may go with this process; then clear away."""
        left = set(ranks)
        while left:
            left = {rank for rank in left if not self._store.check([self._key("seen", rank)])}
            left = {rank for rank in left if self._absence(rank) is None}  # the next barrier will notice
            time.sleep(_SHORTEST_NAP)
        for rank in range(self._group.size):
            for name in ("here", "done", "seen"):
                self._store.delete_key(self._key(name, rank))
        self._store.delete_key(self._key("all"))

    def _look(self, ranks: Iterable[int], *, waiting: bool = False) -> None:
        try:
            if self._store.check([self._key("failed")]):
                raise ProcessFailedError(self._store.get(self._key("failed")).decode())
            for rank in ranks:
                absence = self._absence(rank, waiting=waiting)
                if absence is not None and not (rank > 0 and self._store.check([self._key("done", rank)])):
                    message = f"Process {rank} {absence}. What was whole is kept: start again to go on from there."
                    self.fail(message)
                    raise ProcessFailedError(message)
        except dist.DistNetworkError as error:
            raise self._lost_store() from error

    def _absence(self, rank: int, *, waiting: bool = False) -> str | None:
        """Why a process is not to be waited for, if so."""
        beat, silence = self._group.pulse(rank)
        if beat == _ENDED:
            return "came to its end while the others still worked (its own output says why)"
        if beat is not None and silence > SECONDS_WITHOUT_HEARTBEAT:
            return f"has sent no heartbeat for {SECONDS_WITHOUT_HEARTBEAT:.0f} seconds: it was killed, or its machine is gone"
        late = waiting and time.monotonic() - self._begin > SECONDS_TO_ARRIVE
        if late and not self._store.check([self._key("here", rank)]):
            return f"did not come within {SECONDS_TO_ARRIVE / 60:.0f} minutes to where the others wait for it"
        return None

    def _lost_store(self) -> ProcessFailedError:
        return ProcessFailedError(
            "The store of the process group is gone, and with it the process that holds it: process 0, or the launcher. It"
            " was killed or came to its end. What was whole is kept: start again to go on from there."
        )

    def _key(self, name: str, rank: int | None = None) -> str:
        return f"{self._number}/{name}" if rank is None else f"{self._number}/{name}/{rank}"


_groups: list[_ProcessGroup] = []  # the current one, if any


def _process_group() -> _ProcessGroup:
    # torch has no public name for the store it was set up with, and another would need an address of its own.
    store = dist.distributed_c10d._get_default_store()
    if not _groups or _groups[0].default_store is not store:
        for left in _groups:
            left.leave()
        _groups[:] = [_ProcessGroup(store, dist.get_rank(), dist.get_world_size())]
    return _groups[0]
