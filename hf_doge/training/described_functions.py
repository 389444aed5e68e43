"""What a function is, for a resumed run to share: its name, what it captures, and the digest of its code."""

import dis
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

LIBRARIES = ("torch", "transformers", "trl", "hf_doge")  # which have classes of the same names
_CODE = f"code of Python {sys.version_info.major}.{sys.version_info.minor}"  # another one compiles otherwise
_MOST_LEVELS = 4  # of functions and containers in what a function captures
_MOST_VALUES = 2**20  # of an array, bytes of a text, that are read whole
_MOST_ENTRIES = 1024  # of a tuple, and of larger arrays
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu|tpu|xla)(:[0-9]+)?")  # another one may go on


def name_of(one: Any) -> str | None:
    """
    The name of a function or class, or of the class of an object, behind that of its library. Libraries move theirs between
    modules, and what is in a script is elsewhere when the script is imported.
    """
    if one is None:
        return None
    one = one.func if isinstance(one, partial) else one
    named = one if hasattr(one, "__qualname__") else type(one)
    library = _library_of(named)
    return f"{library}.{named.__qualname__}" if library is not None else named.__qualname__


def describe_function(one: Any, name: str = "") -> dict[str, str | None]:
    """
    What tells a function from another one of the same name, in plain values.

    Args:
        one (`Any`): A function, a `functools.partial` of one, or an object that is called.
        name (`str`): What its entries are named by.

    Returns:
        `dict`: the name; `captured`, a digest of the numbers, texts, tensors and functions that a closure, a partial or defaults
        hold, where they hold some; and of a lambda, which has no name, the digest of its code. Lists, dicts and other objects
        change while a run goes on, so their content is not looked at, nor are globals; names of devices and the folders of paths
        are other ones on another machine. Of large arrays some values are read, evenly spaced.
    """
    described: dict[str, str | None] = {name or "name": name_of(one)}
    captured = _captured(one, 0)
    if captured:
        described[f"{name} captured".strip()] = digest(captured)
    function = _function_of(one)
    if function is not None and function.__name__ == "<lambda>":
        described[f"{name} {_CODE}".strip()] = digest(_code(function.__code__, None))
    return described


def describe_code(one: Any) -> dict[str, str]:
    """The digest of the code of a function, or of what an object does when it is called; nothing of that of libraries."""
    function = _function_of(one)
    if function is None or _library_of(function) is not None:
        return {}
    return {_CODE: digest(_code(function.__code__, function.__doc__))}


@torch.no_grad()
def digest_values(tensor: Tensor) -> str:
    """
    Digest of the shape of a tensor and of some 1,024 of its values, evenly spaced, as float32; of the name of its class where they
    cannot be read so: of sparse and nested ones, ones without values, and those of other packages that keep them in their way.
    """
    try:
        flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().flatten()
        values = flat[:: max(flat.numel() // _MOST_ENTRIES, 1)].float().cpu().numpy().tobytes()
        told = f"{tuple(tensor.shape)}".encode()
    except Exception:  # whatever a class of tensors raises for what it has not
        told, values = type(tensor).__name__.encode(), b""
    return hashlib.sha256(told + values).hexdigest()[:16]


def _function_of(one: Any) -> FunctionType | None:
    while isinstance(one, partial | MethodType):
        one = one.func if isinstance(one, partial) else one.__func__
    if callable(one) and not isinstance(one, FunctionType | type):
        one = type(one).__call__
    return _unwrapped(one) if isinstance(one, FunctionType) else None


def _unwrapped(one: FunctionType) -> FunctionType:
    """The function in a decorator of a library, such as `torch.no_grad()`, which is another one in its next version."""
    inner = vars(one).get("__wrapped__")
    while isinstance(inner, FunctionType) and str(one.__globals__.get("__name__")).partition(".")[0] in LIBRARIES:
        one, inner = inner, vars(inner).get("__wrapped__")
    return one


def _library_of(named: Any) -> str | None:
    library = (getattr(named, "__module__", None) or "").partition(".")[0]
    return library if library in LIBRARIES else None


def digest(parts: Any) -> str:
    """Of what plain values look like."""
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def _code(code: CodeType, doc: str | None) -> list[Any]:
    """What code does, without its place and its docstring."""
    constants = [_constant(one) for one in code.co_consts if doc is None or one != doc]
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars]


def _constant(one: Any) -> Any:
    """A constant of code, in plain values."""
    if isinstance(one, frozenset):
        return sorted(map(repr, one))  # texts in a set come in another order in each process
    if not isinstance(one, CodeType):
        return repr(one)
    first = next(iter(one.co_consts), None)
    return _code(one, first if one.co_name != "<lambda>" and isinstance(first, str) else None)


def _captured(one: Any, level: int) -> list[Any]:
    """Names and values that a function holds, as far as they stay what they are."""
    if isinstance(one, partial):
        held = [*enumerate(one.args), *sorted(one.keywords.items())]
        return _captured(one.func, level) + list(_plain(held, level))
    one = one.__func__ if isinstance(one, MethodType) else one
    if not isinstance(one, FunctionType) or _library_of(one) is not None:
        return []
    one = _unwrapped(one)
    names, cells = one.__code__.co_freevars, one.__closure__ or ()
    counted = _assigned(one.__code__)
    held = [
        (name, cell.cell_contents)
        for name, cell in zip(names, cells, strict=True)
        if name not in counted and _is_filled(cell)
    ]
    held += [*enumerate(one.__defaults__ or ()), *sorted((one.__kwdefaults__ or {}).items())]
    return list(_plain(held, level))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _assigned(code: CodeType) -> set[str]:
    """Variables of functions around it that code assigns (`nonlocal`): counters."""
    own = {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
    return own.union(*(_assigned(one) for one in code.co_consts if isinstance(one, CodeType)))


def _plain(held: list[tuple[Any, Any]], level: int) -> Iterator[tuple[Any, Any]]:
    for name, value in held:
        if isinstance(value, str | bytes):
            if not (isinstance(value, str) and _DEVICE.fullmatch(value)):
                yield name, _text(value)
        elif value is None or isinstance(value, bool | float | complex):
            yield name, value
        elif isinstance(value, int):
            yield name, hex(value) if value.bit_length() > _MOST_ENTRIES else value  # Python writes no longer ones
        elif isinstance(value, Tensor) and not value.requires_grad:
            yield name, digest_values(value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            yield name, _array(value)
        elif level < _MOST_LEVELS and isinstance(value, tuple):
            step = max(len(value) // _MOST_ENTRIES, 1)
            entries = [*enumerate(value)] if step == 1 else [(len(value), None), *enumerate(value[::step])]
            yield name, list(_plain(entries, level + 1))
        elif level < _MOST_LEVELS and isinstance(value, FunctionType | MethodType | partial):
            yield name, (name_of(value), _captured(value, level + 1))


def _array(value: np.ndarray) -> tuple[Any, ...]:
    """Shape, dtype and the digest of the values; of some of them where it may be a file of many gigabytes."""
    content = value
    if value.size > _MOST_VALUES:
        flat = value.reshape(-1) if value.flags.c_contiguous else value.flat  # without a copy
        content = np.asarray(flat[:: value.size // _MOST_ENTRIES])
    return value.shape, str(value.dtype), hashlib.sha256(content.tobytes()).hexdigest()


def _text(value: str | bytes) -> Any:
    """A text, of a path its last part, of a long one a digest."""
    if len(value) > _MOST_VALUES:
        content = value.encode(errors="surrogatepass") if isinstance(value, str) else value
        return len(value), hashlib.sha256(content).hexdigest()
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
