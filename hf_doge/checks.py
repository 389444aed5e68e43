"""
What the arguments of every public entrance must be: one question, one message.

Each function takes the name of the argument and its value, and returns the value in Python's own type: scalars of NumPy
and torch count as the numbers they are, `True` is no number, and `2.0` is no whole number. What cannot be taken is
refused by a `ValueError` that says what must hold and what was given. With `optional`, `None` passes.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Literal, overload

from hf_doge.text import UNSEEN, holds_token, printable

SIMPLEX_TOLERANCE = 1e-6
LARGEST_RATE = 1e30  # beyond it, and below its inverse, products with gradients leave the range of float32
_LARGEST_COUNT = 2**63 - 1
_SHOWN = 80  # characters of a value in a message


@overload
def check_count(
    name: str, value: Any, *, least: int = ..., most: int = ..., optional: Literal[False] = ...
) -> int: ...
@overload
def check_count(name: str, value: Any, *, least: int = ..., most: int = ..., optional: bool) -> int | None: ...
def check_count(
    name: str, value: Any, *, least: int = 1, most: int = _LARGEST_COUNT, optional: bool = False
) -> int | None:
    """A whole number from `least` to `most`, by default one of 64 bits."""
    if optional and value is None:
        return None
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise ValueError(f"`{name}` must be a whole number, but got {show(value)}.{_advice(value)}")
    number = int(number)
    if not least <= number <= most:
        law = f"at least {least}" if number < least and most > 2**31 else f"in [{least}, {most}]"
        raise ValueError(f"`{name}` must be {law}, but got {show(value)}.")
    return number


@overload
def check_seed(name: str, value: Any, *, least: int = ..., most: int = ..., optional: Literal[False] = ...) -> int: ...
@overload
def check_seed(name: str, value: Any, *, least: int = ..., most: int = ..., optional: bool) -> int | None: ...
def check_seed(
    name: str, value: Any, *, least: int = -(2**63), most: int = 2**64 - 1, optional: bool = False
) -> int | None:
    """A whole number that a generator of random numbers takes: of 64 bits, unless its range is given."""
    return check_count(name, value, least=least, most=most, optional=optional)


@overload
def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = ...,
    above: float | None = ...,
    most: float | None = ...,
    below: float | None = ...,
    finite: bool = ...,
    unit: str = ...,
    optional: Literal[False] = ...,
) -> float: ...
@overload
def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = ...,
    above: float | None = ...,
    most: float | None = ...,
    below: float | None = ...,
    finite: bool = ...,
    unit: str = ...,
    optional: bool,
) -> float | None: ...
def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    unit: str = "",
    optional: bool = False,
) -> float | None:
    """A number, never NaN, that is `>= least`, `> above`, `<= most` and `< below`, and not infinite unless `finite` is off."""
    if optional and value is None:
        return None
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f"`{name}` must be a number, but got {show(value)}.{_advice(value)}")
    try:
        number = number if isinstance(number, int | float) and abs(number) < 2**63 else float(number)
    except OverflowError:
        number = math.nan  # beyond every float
    fits = (
        not math.isnan(number)
        and not (finite and math.isinf(number))
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    if not fits:
        law = _range(
            least, above, most, below, unit=f" {unit}" if unit else "", finite=finite and not math.isfinite(number)
        )
        raise ValueError(f"`{name}` must be {law}, but got {show(value)}.")
    return number


@overload
def check_flag(name: str, value: Any, *, optional: Literal[False] = ...) -> bool: ...
@overload
def check_flag(name: str, value: Any, *, optional: bool) -> bool | None: ...
def check_flag(name: str, value: Any, *, optional: bool = False) -> bool | None:
    """`True` or `False`. Any text would count as yes."""
    if optional and value is None:
        return None
    flag = _plain(value)
    if not isinstance(flag, bool):
        raise ValueError(f"`{name}` must be True or False, but got {show(value)}.")
    return flag


@overload
def check_choice(name: str, value: Any, choices: Sequence[str], *, optional: Literal[False] = ...) -> str: ...
@overload
def check_choice(name: str, value: Any, choices: Sequence[str], *, optional: bool) -> str | None: ...
def check_choice(name: str, value: Any, choices: Sequence[str], *, optional: bool = False) -> str | None:
    """One of the given strings."""
    if optional and value is None:
        return None
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, but got {show(value)}.")
    return str(value)


@overload
def check_text(name: str, value: Any, *, what: str = ..., optional: Literal[False] = ...) -> str: ...
@overload
def check_text(name: str, value: Any, *, what: str = ..., optional: bool) -> str | None: ...
def check_text(name: str, value: Any, *, what: str = "a text that is not blank", optional: bool = False) -> str | None:
    """A string that is not blank and that UTF-8 can hold."""
    if optional and value is None:
        return None
    if not isinstance(value, str) or not value.strip() or "\0" in value or not is_unicode(value):
        raise ValueError(f"`{name}` must be {what}, but got {show(value)}.")
    return value


def refuse_tokens(**told: str | None) -> None:
    """No text that others will read may hold an access token of the Hub. The message does not repeat it."""
    for name, value in told.items():
        if isinstance(value, str) and holds_token(value):
            raise ValueError(f"`{name}` must not hold an access token, as others will read it, but does. Remove it.")


@overload
def check_path(name: str, value: Any, *, optional: Literal[False] = ...) -> str | os.PathLike[str]: ...
@overload
def check_path(name: str, value: Any, *, optional: bool) -> str | os.PathLike[str] | None: ...
def check_path(name: str, value: Any, *, optional: bool = False) -> str | os.PathLike[str] | None:
    """The path of a file or folder, or a name on the Hub: text or a path object, not empty, without a NUL."""
    if optional and value is None:
        return None
    try:
        path = os.fspath(value)
        fits = isinstance(path, str) and path.strip() and "\0" not in path and os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        fits = False
    if not fits:
        raise ValueError(f"`{name}` must be a path, but got {show(value)}.")
    return value


@overload
def check_repo_id(name: str, value: Any, *, optional: Literal[False] = ...) -> str: ...
@overload
def check_repo_id(name: str, value: Any, *, optional: bool) -> str | None: ...
def check_repo_id(name: str, value: Any, *, optional: bool = False) -> str | None:
    """The name of a repository on the Hub."""
    if optional and value is None:
        return None
    from huggingface_hub.utils import validate_repo_id  # the client takes long to load

    try:
        validate_repo_id(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"`{name}` must be like 'user/name', but got {show(value)}: {printable(error)}") from error
    return value


def check_function(name: str, value: Any, *, what: str = "a function", optional: bool = False) -> Any:
    """Something that can be called."""
    if not callable(value) and not (optional and value is None):
        raise ValueError(f"`{name}` must be {what}, but got {show(value)}.")
    return value


@overload
def check_mapping(name: str, value: Any, *, optional: Literal[False] = ...) -> Mapping: ...
@overload
def check_mapping(name: str, value: Any, *, optional: bool) -> Mapping | None: ...
def check_mapping(name: str, value: Any, *, optional: bool = False) -> Mapping | None:
    """A dictionary or the like."""
    if not isinstance(value, Mapping) and not (optional and value is None):
        raise ValueError(f"`{name}` must be a dict, but got {show(value)}.")
    return value


def check_names(names: Iterable[str], *, what: str = "Domain names") -> tuple[str, ...]:
    """Names as a tuple: strings, not blank, all different, without characters that cannot be seen; at least one."""
    if isinstance(names, str | bytes) or not isinstance(names, Iterable) or getattr(names, "ndim", 1) == 0:
        raise ValueError(f"{what} must be a list of strings, but got {show(names)}.")
    names = tuple(names)
    if not names:
        raise ValueError(f"{what} must be given, but got none. Name at least one.")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{what} must be non-empty strings, but got {show(name)} ({type(name).__name__}).")
        if not is_unicode(name):
            raise ValueError(f"{what} must be Unicode, but {show(name)} holds a lone surrogate. Rename it.")
    require_printable(what, names)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"{what} must be different, but {repeated} appear more than once. Rename them.")
    return names


def require_printable(what: str, names: Iterable[Any]) -> None:
    """
    Args:
        what (`str`): What the names are of, as a message begins: "Domain names".
        names (`Iterable`): Those that are strings are looked at.

    Raises:
        ValueError: A name has a character that [`~hf_doge.text.printable`] would escape. The message shows it escaped.
    """
    for name in names:
        if isinstance(name, str) and UNSEEN.search(name):
            raise ValueError(
                f"{what} must have no line breaks, control characters or characters that cannot be seen, but got"
                f' "{printable(name)[:200]}". Rename it.'
            )


def read_ratio(value: Any) -> float | None:
    """A weight as a plain float; `None` if it is no finite number of at least 0."""
    try:
        return float(check_number("weight", value, least=0))
    except ValueError:
        return None


def check_ratios(name: str, ratios: Mapping[str, float]) -> dict[str, float]:
    """Weights by domain that may sum to anything positive, as plain floats."""
    if not isinstance(ratios, Mapping):
        raise ValueError(f"`{name}` must map names of domains to numbers, but got {show(ratios)}.")
    check_names(ratios)
    checked = {}
    for domain, given in ratios.items():
        ratio = read_ratio(given)
        if ratio is None:
            raise ValueError(f"`{name}` must be finite numbers >= 0, but domain {domain!r} has {show(given)}.")
        checked[domain] = ratio
    total = _sum(checked.values())
    if not 0 < total < math.inf:
        found = f"all of {list(ratios)} are 0" if total == 0 else "theirs is infinite"
        raise ValueError(f"`{name}` must have a positive sum, but {found}.")
    return checked


def check_simplex(name: str, weights: Mapping[str, float]) -> dict[str, float]:
    """Weights as [`check_ratios`] that also sum to 1 within 1e-6. They stay exactly as they are."""
    checked = check_ratios(name, weights)
    total = _sum(checked.values())
    if abs(total - 1.0) > SIMPLEX_TOLERANCE:
        raise ValueError(
            f"`{name}` must sum to 1, but it sums to {total:.8g}. If these are ratios, normalise them by"
            " `DomainWeights.from_mapping(ratios)`."
        )
    return checked


def check_same_domains(name: str, domains: Iterable[str], expected: Iterable[str]) -> None:
    """The same names, whatever their order. Says which differ."""
    if not isinstance(domains, Iterable):
        raise ValueError(f"`{name}` must have the domains of `mean`, but got {show(domains)}.")
    missing, unknown = sorted(set(expected) - set(domains)), sorted(set(domains) - set(expected), key=str)
    if missing or unknown:
        raise ValueError(f"`{name}` must have the domains of `mean`, but lacks {missing} and adds {unknown}.")


def check_json(name: str, value: Any) -> Any:
    """A copy made of what JSON in UTF-8 can hold: dicts with string keys, lists, strings, finite numbers, booleans, None."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require_printable(f"Keys in `{name}`", (key for key, _ in pairs))
        return dict(pairs)

    try:
        text = json.dumps(value, allow_nan=False, default=_plain_or_refuse)
        json.dumps(value, ensure_ascii=False, default=_plain_or_refuse).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{name}` must hold strings, finite numbers, booleans, None, lists and dicts, but {printable(error)}."
        ) from error
    return json.loads(text, object_pairs_hook=plain)


def check_shape(name: str, tensor: Any, shape: Sequence[int | None]) -> None:
    """A tensor of torch of this shape; `None` stands for any size."""
    found = tensor.shape if hasattr(tensor, "new_zeros") else None
    if (
        found is None
        or len(found) != len(shape)
        or any(size not in (None, one) for one, size in zip(found, shape, strict=True))
    ):
        law = f"({', '.join('any' if size is None else str(size) for size in shape)})"
        got = f"the shape {tuple(found)}" if found is not None else show(tensor)
        raise ValueError(f"`{name}` must be a tensor of shape {law}, but got {got}.")


@contextmanager
def naming(source: str) -> Iterator[None]:
    """What is wrong with the values of a file is told with the name of the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source!r}: {error}") from error


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it, which it cannot hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def show(value: Any) -> str:
    """A value as a message shows it: on one line, cut."""
    try:
        shown = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python writes
        shown = f"a {type(value).__name__} of more than 4,300 digits"
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


def _plain(value: Any) -> Any:
    """The scalars of NumPy and torch as Python's own numbers; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _plain_or_refuse(value: Any) -> Any:
    number = _plain(value)
    if number is value:
        raise TypeError(f"got {show(value)} ({type(value).__name__})")
    return number


def _sum(numbers: Iterable[float]) -> float:
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf


def _advice(value: Any) -> str:
    return " Give the number itself, not a text." if isinstance(value, str) else ""


def _range(
    least: float | None, above: float | None, most: float | None, below: float | None, *, unit: str, finite: bool
) -> str:
    low, high = (least if least is not None else above), (most if most is not None else below)
    if low is not None and high is not None:
        return f"in {'[' if least is not None else '('}{low:g}, {high:g}{']' if most is not None else ')'}{unit}"
    if low is None and high is None:
        return "finite" if finite else "a number, not NaN"
    if low is not None:
        law = "positive" if above == 0 else f"at least {low:g}" if least is not None else f"above {low:g}"
    else:
        law = f"at most {high:g}" if most is not None else f"below {high:g}"
    return f"{law}{unit} and finite" if finite else law + unit
