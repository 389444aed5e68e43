"""Every retraining on a line of its own, written as soon as it is known, so that an evaluation can be interrupted."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm.auto import tqdm

from hf_doge._version import __version__


class RetrainingKey(NamedTuple):
    """What a retraining was for: a scorer's `k` strongest proponents (sign `"+"`) or opponents (`"-"`) of a point."""

    scorer: str
    point: int
    sign: str
    k: int
    seed: int


class SubsetKey(NamedTuple):
    """A retraining on the part of the training set that was drawn as number `subset`, counted from 0."""

    subset: int
    seed: int


Key = RetrainingKey | SubsetKey
AnyKey = TypeVar("AnyKey", RetrainingKey, SubsetKey)


def removal_digest(removed: Iterable[int]) -> str:
    """The same for equal sets of positions, whatever their order."""
    return hashlib.sha256(",".join(map(str, sorted(removed))).encode()).hexdigest()[:16]


class RetrainingJournal:
    """
    A JSONL file of finished retrainings, and the memory of what they gave.

    The first line says which evaluation it belongs to, each other one has a key, the digest of the removed set, and one
    number for every test point. A last line that was cut short is dropped, and that retraining done again.

    Args:
        path (`Path`, *optional*): The file, made when it does not exist; `None` keeps everything in memory.
        identity (`Mapping`): What must be equal for results to belong together, such as data and recipe. Plain values.
        key_type (`type`): What a retraining was for, [`RetrainingKey`] or [`SubsetKey`].
        values (`str`): Name of the numbers in the file.

    Raises:
        ValueError: if the file belongs to another evaluation, or a line in the middle of it cannot be read.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        identity: Mapping[str, Any],
        key_type: type[RetrainingKey] | type[SubsetKey] = RetrainingKey,
        values: str = "probabilities",
    ) -> None:
        self.path = path
        self.key_type, self.values = key_type, values
        self.identity = json.loads(json.dumps(dict(identity)))  # as it will be read: tuples are lists
        self._results: dict[tuple[str, int], list[float]] = {}
        self._noted: set[tuple[Key, str]] = set()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (lines := _read_whole_lines(path)):
            self._load(lines)
        else:
            self._append({"identity": self.identity, "hf_doge_version": __version__})

    def __len__(self) -> int:
        """Number of different retrainings: removed sets times seeds."""
        return len(self._results)

    def find(self, digest: str, seed: int) -> list[float] | None:
        """What retraining without this set under this seed gave, if it is known, under whatever key."""
        return self._results.get((digest, seed))

    def add(self, key: Key, digest: str, values: Sequence[float]) -> None:
        """Note a result under a key. One that stands there already costs no line."""
        self._results[digest, key.seed] = list(values)
        if (key, digest) in self._noted:
            return
        self._noted.add((key, digest))
        self._append({**key._asdict(), "removed": digest, self.values: list(values)})

    def measure(
        self, plan: Mapping[AnyKey, tuple[int, ...]], retrain: Callable[[tuple[int, ...], int], list[float]]
    ) -> dict[AnyKey, list[float]]:
        """
        What every planned retraining gave; only those that are not known are done, each removed set once per seed.

        Args:
            plan (`Mapping`): The removed positions by key.
            retrain (`Callable`): `retrain(removed, seed)` gives one number per test point.
        """
        digests = {removed: removal_digest(removed) for removed in plan.values()}
        places = {key: (digests[removed], key.seed) for key, removed in plan.items()}
        missing = {place for place in places.values() if self.find(*place) is None}
        with tqdm(total=len(missing), desc="Retraining", unit="run") as progress:
            for key, removed in plan.items():
                values = self.find(*places[key])
                if values is None:
                    values = retrain(removed, key.seed)
                    progress.update()
                self.add(key, digests[removed], values)
        return {key: self._results[place] for key, place in places.items()}

    def _load(self, lines: Sequence[bytes]) -> None:
        try:
            header, *entries = [json.loads(line) for line in lines]
            identity = header["identity"]
            if identity != self.identity:
                entries = []  # told below
            for entry in entries:
                key = self.key_type(*(entry[name] for name in self.key_type._fields))
                self._noted.add((key, entry["removed"]))
                self._results[entry["removed"], key.seed] = entry[self.values]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(self.path)!r} must hold one JSON object per line as an evaluation wrote them, but a line was "
                f"altered ({error}). Move the file away to start again."
            ) from error
        if identity != self.identity:
            different = sorted(
                name
                for name in {*identity, *self.identity}
                if identity.get(name, "nothing") != self.identity.get(name, "nothing")
            )
            raise ValueError(
                f"{str(self.path)!r} must belong to the same evaluation, but it differs in {different}: there "
                f"{ {name: identity.get(name) for name in different} }, here "
                f"{ {name: self.identity.get(name) for name in different} }. Use another folder, or the same settings."
            )

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read_whole_lines(path: Path) -> list[bytes]:
    """All lines that end; what follows the last end is cut off the file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()
