"""What passes over the wire: the log of the requests, and the faults that are asked for."""

import itertools
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields


@dataclass
class LogEntry:
    """One request, from the moment its head is there; `sent` and `received` count bodies and grow while they move."""

    index: int
    server: str
    method: str
    path: str
    query: str
    user: str | None
    authorization: bool
    user_agent: str
    range: str | None
    started: float
    status: int | None = None
    sent: int = 0
    received: int = 0
    fault: str | None = None
    seconds: float | None = None


@dataclass
class Fault:
    """
    What happens to requests whose `METHOD` is `method` and whose path with query the pattern is found in.

    The first `nth - 1` requests that match pass, the next `times` are hit (all, if `None`), and the others pass.
    """

    method: str
    pattern: str
    nth: int = 1
    times: int | None = 1
    server: str | None = None
    # An answer in place of the real one, after the body has been read.
    status: int | None = None
    message: str = "Injected fault"
    code: str | None = None
    retry_after: float | None = None
    # "before": at the head of the request; "body": in the middle of the body, of the request if it has one and else of
    # the answer; "reply": done, then in the middle of the answer.
    cut: str | None = None
    # Done, but the connection ends before the answer.
    lost_reply: bool = False
    # Whether a connection that ends is reset, or closed in good order.
    reset: bool = True
    # Seconds before anything else happens.
    delay: float = 0.0
    # Wait for `release`: "before" anything is done, or "after", with the answer kept back.
    hold: str | None = None
    # Somebody else's commit, made just before: {"kind", "id", "revision", "files": {path: text}}.
    other_commit: dict | None = None
    # Another body in place of the right one, of the same length, to see whether contents are checked.
    corrupt: bool = False
    id: int = 0
    matched: int = 0
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        if self.cut not in (None, "before", "body", "reply") or self.hold not in (None, "before", "after"):
            raise ValueError(f"`cut` is 'before', 'body' or 'reply', and `hold` 'before' or 'after'; got {self}.")
        re.compile(self.pattern)

    def label(self) -> str:
        """A short name for the log."""
        kinds = {
            "status": self.status,
            "cut": self.cut,
            "lost_reply": self.lost_reply,
            "hold": self.hold,
            "other_commit": self.other_commit is not None,
            "corrupt": self.corrupt,
            "delay": self.delay,
        }
        return ", ".join(name if value is True else f"{name}={value}" for name, value in kinds.items() if value)

    def state(self) -> dict:
        """Everything a test may want to see, as JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "released"}


class Traffic:
    """The log and the faults of all the servers of one Hub."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: list[LogEntry] = []
        self.faults: list[Fault] = []
        # makes the commits of `Fault.other_commit`; set by the server
        self.other_commit: Callable[..., str] | None = None
        self._index = itertools.count()
        self._fault_id = itertools.count(1)

    def begin(self, **request: object) -> LogEntry:
        """Log a request whose head has been read."""
        with self.lock:
            entry = LogEntry(index=next(self._index), started=time.time(), **request)
            self.entries.append(entry)
        return entry

    def add(self, settings: dict) -> int:
        """Order a fault; returns its number."""
        fault = Fault(**settings)
        with self.lock:
            fault.id = next(self._fault_id)
            self.faults.append(fault)
        return fault.id

    def fault_for(self, entry: LogEntry) -> Fault | None:
        """The fault that hits a request, if any; all that match count it."""
        target = f"{entry.path}?{entry.query}" if entry.query else entry.path
        with self.lock:
            hit = None
            for fault in self.faults:
                if fault.method not in ("*", entry.method) or not re.search(fault.pattern, target):
                    continue
                if fault.server not in (None, entry.server):
                    continue
                fault.matched += 1
                in_turn = fault.matched >= fault.nth and (fault.times is None or fault.hits < fault.times)
                if in_turn and hit is None:
                    fault.hits += 1
                    hit = fault
            if hit is not None:
                entry.fault = hit.label()
        return hit

    def release(self, fault_id: int | None) -> None:
        """Let what a fault holds back go on."""
        with self.lock:
            for fault in self.faults:
                if fault_id in (None, fault.id):
                    fault.released.set()

    def clear(self) -> None:
        """No more faults; what is held back goes on."""
        self.release(None)
        with self.lock:
            self.faults.clear()

    def log(self, *, clear: bool = False) -> list[dict]:
        """The requests so far, in the order of their heads."""
        with self.lock:
            entries = [asdict(entry) for entry in self.entries]
            if clear:
                self.entries.clear()
        return entries
