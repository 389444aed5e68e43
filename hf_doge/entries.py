"""What the entries of a file that a run reads again must be: [`find_misfit`] says in words which is not."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

from hf_doge.checks import SIMPLEX_TOLERANCE, show

_LARGEST_COUNT = 2**63 - 1


class Kind(NamedTuple):
    """What an entry must be: in words, and as a question."""

    words: str
    is_met: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_any_number(value: Any) -> bool:
    return isinstance(value, float) or _is_number(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


COUNT = Kind("a whole number from 0 on", _is_count)
NUMBER = Kind("a finite number", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NAMES = Kind(
    "a list of names",
    lambda value: isinstance(value, list) and value != [] and all(isinstance(name, str) for name in value),
)


def vector_of(length: int) -> Kind:
    """A list of as many numbers, of which NaN says that there is none; sums of what has overflowed are infinite."""
    return Kind(
        f"a list of {length} numbers",
        lambda value: isinstance(value, list) and len(value) == length and all(map(_is_any_number, value)),
    )


def list_of(kind: Kind) -> Kind:
    """A list, maybe empty, of entries of a kind."""
    return Kind(f"a list of entries that are each {kind.words}", lambda value: _all_are(kind, value))


def _all_are(kind: Kind, value: Any) -> bool:
    return isinstance(value, list) and all(map(kind.is_met, value))


def counts_of(names: Sequence[str]) -> Kind:
    """A whole number from 0 on for each name."""
    return Kind(f"a whole number for each of {show(list(names))}", lambda value: _has(names, COUNT, value))


def shares_of(names: Sequence[str]) -> Kind:
    """A number `>= 0` for each name, summing to 1."""
    return Kind(
        f"numbers >= 0 that sum to 1 for {show(list(names))}",
        lambda value: (
            _has(names, NUMBER, value)
            and min(value.values()) >= 0
            and abs(sum(value.values()) - 1) <= SIMPLEX_TOLERANCE
        ),
    )


def _has(names: Sequence[str], kind: Kind, value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == set(names) and all(map(kind.is_met, value.values()))


def kind_like(value: Any) -> Kind:
    """What is of the kind of a value that is given: of flags, counts, numbers of any size or NaN, and vectors of as many."""
    if isinstance(value, bool):
        return FLAG
    if isinstance(value, int):
        return COUNT
    if isinstance(value, list):
        return vector_of(len(value))
    return Kind("a number", _is_any_number)


def find_misfit(
    entries: Any, kinds: Mapping[str, Kind], *, optional: Container[str] = (), whose: str = "its"
) -> str | None:
    """
    The first entry that is missing or not of its kind, in words that follow "but"; `None` if all are as they must be.

    Args:
        entries (`Any`): An object, as JSON gives it, or else a misfit itself.
        kinds (mapping of `str` to [`Kind`]): The kind of each entry; others do not matter.
        optional (container of `str`): Those that may be missing.
        whose (`str`): What the entries are of, as the words begin.
    """
    if not isinstance(entries, dict):
        return f"{whose} content is {show(entries)} instead of an object"
    for name, kind in kinds.items():
        if name not in entries and name not in optional:
            return f"{whose} `{name}` is missing"
        if name in entries and not kind.is_met(entries[name]):
            return f"{whose} `{name}` is {show(entries[name])} instead of {kind.words}"
    return None
