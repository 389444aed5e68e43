"""What names and weights of domains must satisfy, wherever they come from."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

SIMPLEX_TOLERANCE = 1e-6


def require_names(names: Iterable[str]) -> tuple[str, ...]:
    """
    The names of domains as a tuple.

    Raises:
        ValueError: There is none, or one is no string, empty or repeated.
    """
    names = tuple(names)
    if not names:
        raise ValueError("At least one domain must be named, but got none.")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Domain names must be non-empty strings, but got {name!r} ({type(name).__name__}).")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"Domain names must be unique, but {repeated} are repeated.")
    return names


def require_ratios(argument: str, ratios: Mapping[str, float]) -> dict[str, float]:
    """
    Weights that may sum to anything positive, as plain floats.

    Raises:
        ValueError: A name is not valid, a weight is no finite number >= 0, or all are 0.
    """
    require_names(ratios)
    for name, ratio in ratios.items():
        if isinstance(ratio, bool) or not isinstance(ratio, Real) or not math.isfinite(ratio) or ratio < 0:
            raise ValueError(f"`{argument}` must be finite numbers >= 0, but domain {name!r} has {ratio!r}.")
    if not any(ratios.values()):
        raise ValueError(f"`{argument}` must have a positive sum, but all of {list(ratios)} are 0.")
    return {name: float(ratio) for name, ratio in ratios.items()}


def require_simplex(argument: str, weights: Mapping[str, float]) -> dict[str, float]:
    """
    Weights as [`require_ratios`] that also sum to 1 within 1e-6. They stay exactly as they are.

    Raises:
        ValueError: As there, or the sum is another.
    """
    checked = require_ratios(argument, weights)
    total = math.fsum(checked.values())
    if abs(total - 1.0) > SIMPLEX_TOLERANCE:
        raise ValueError(
            f"`{argument}` must sum to 1, but it sums to {total:.8g}. If these are ratios, normalise them by"
            " `DomainWeights.from_mapping(ratios)`."
        )
    return checked


def require_same_domains(argument: str, names: Iterable[str], expected: Iterable[str]) -> None:
    """
    Raises:
        ValueError: The names differ, whatever their order. Says which.
    """
    missing, unknown = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or unknown:
        raise ValueError(f"`{argument}` must have the domains of `mean`, but lacks {missing} and adds {unknown}.")


def require_json(argument: str, value: Any) -> Any:
    """
    A copy made of what JSON can hold: dicts with string keys, lists, strings, finite numbers, booleans, None.

    Raises:
        ValueError: It holds something else.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_plain_number))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must hold strings, finite numbers, booleans, None, lists and dicts, but {error}."
        ) from error


def _plain_number(value: Any) -> Any:
    """NumPy scalars as Python's; the rest is for `json` to refuse."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"got {value!r} ({type(value).__name__})")
