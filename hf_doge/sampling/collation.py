"""Collators that draw at random (masking, say): a batch is collated alike whatever was drawn before it, and by whom."""

import copy
import functools
import random
import re
import types
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_OPAQUE = (
    random.SystemRandom,
    type,
    types.ModuleType,
    torch.nn.Module,
    Tensor,
    np.ndarray,
    str,
    bytes,
    int,
    float,
    complex,
)
_LIBRARIES = ("torch", "numpy", "transformers", "datasets", "accelerate", "tokenizers", "trl", "peft", "hf_doge")
_MOST_LOOKED_AT = 2000  # objects, the nearest first
_MOST_IN_ONE = 100  # entries of a container
_WRAPPED = ("data_collator", "collator", "collate_fn")  # where a collator keeps the one that it wraps


class SeededCollator:
    """
    Calls a collator with every generator that it can draw from seeded by the seed and the batch's first and last example.

    What it draws so depends on neither worker count nor history, and a resumed run masks what the uninterrupted one masks.
    Seeded are torch's, NumPy's and Python's own generators, and those that the collator holds: in attributes, what it wraps,
    closures, defaults, and globals of its code, of other modules too, also if the first call makes them. All are left as they were. For the first
    batch it is called thrice, to see whether it draws from what cannot be seen; of that it warns.

    Args:
        collator (`Callable`): `collator(list of examples) -> batch`.
        seed (`int` or `None`): Seed of the run; with `None` only what is called with a seed is seeded.
    """

    def __init__(self, collator: Callable[[list], Any], *, seed: int | None) -> None:
        self.collator = collator
        self.seed = seed
        self._generators: list[Generator] | None = None  # not looked for yet

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # not there yet while a worker unpickles
            raise AttributeError(name)
        return getattr(self.collator, name)  # `tokenizer` and the like

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_generators": None}

    def __call__(self, examples: list, seed: int | None = None) -> Any:
        """
        Collate a list of examples.

        Args:
            examples (`list`): What the collator takes.
            seed (`int`, *optional*): Instead of the one that the examples make.
        """
        if seed is None and self.seed is None:
            return self.collator(examples)
        if seed is None:
            content = f"{self.seed} {describe_example(examples[0])} {describe_example(examples[-1])}"
            seed = zlib.crc32(content.encode(errors="surrogatepass"))
        before = None
        if self._generators is None:
            with seeded(find_generators(self.collator), seed):
                self.collator(copy.deepcopy(examples))  # may make generators
            self._generators = find_generators(self.collator)
            with seeded(self._generators, seed):
                before = self.collator(copy.deepcopy(examples))
        with seeded(self._generators, seed):
            batch = self.collator(examples)
        if before is not None and differ(before, batch):
            warnings.warn(
                "The data collator must collate a batch alike each time, but it draws from a random state (or counts) where it "
                "cannot be seeded, so a resumed run draws otherwise than one that was not interrupted. Let it draw from "
                "torch's, NumPy's or Python's own generator, or keep a generator as an attribute of the collator.",
                stacklevel=3,
            )
        return batch


def unseeded_copy(collator: Any) -> Any:
    """A copy of a collator and of those it wraps, that can be called without a trace in it, and seeds nothing by itself."""
    if not hasattr(collator, "__dict__") or isinstance(collator, (types.FunctionType, types.MethodType, type)):
        return collator
    twin = copy.copy(collator)
    for name, value in vars(collator).items():
        if name in _WRAPPED and callable(value):
            object.__setattr__(twin, name, unseeded_copy(value))
    if isinstance(twin, SeededCollator):
        twin.seed = None
    return twin


@contextmanager
def seeded(generators: Sequence[Generator], seed: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's own generators (of the CPU) and these begin at `seed`; after it, all go on."""
    with preserved(generators):
        for generator in (*_own_generators(), *generators):
            _seed(generator, seed)
        yield


@contextmanager
def preserved(generators: Sequence[Generator] = ()) -> Iterator[None]:
    """Whatever is drawn inside, Python's, NumPy's and torch's own generators (of the CPU) and these go on after it."""
    generators = (*_own_generators(), *generators)
    states = [_get_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            _set_state(generator, state)


def find_generators(collator: Any) -> list[Generator]:
    """The generators that a collator holds or that its code names, those nearest first."""
    found: list[Generator] = []
    looked_at: dict[int, Any] = {}
    queue = deque([collator])
    while queue and len(looked_at) < _MOST_LOOKED_AT:
        one = queue.popleft()
        if id(one) in looked_at:
            continue
        looked_at[id(one)] = one  # kept, so that no other object gets its id meanwhile
        if one is None or isinstance(one, _OPAQUE) or hasattr(one, "convert_tokens_to_ids"):
            continue
        if isinstance(one, Generator):
            found.append(one)
        else:
            queue.extend(_parts(one))
    return found


def differ(first: Any, second: Any) -> bool:
    """Whether two batches hold other tensors."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return False
    pairs = [(value, second.get(key)) for key, value in first.items() if isinstance(value, Tensor)]
    return any(
        not isinstance(other, Tensor)
        or value.shape != other.shape
        or not bool(((value == other) | ((value != value) & (other != other))).all())
        for value, other in pairs
    )


def _parts(one: Any) -> list[Any]:
    """What an object is made of, as far as it may lead to a generator."""
    if isinstance(one, (Mapping, list, tuple, set)):
        values = one.values() if isinstance(one, Mapping) else one
        return list(values) if len(one) <= _MOST_IN_ONE else []
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, types.FunctionType):
        return [] if _is_of_library(one) else _parts_of_function(one)
    slots = [name for cls in type(one).__mro__ for name in _as_tuple(vars(cls).get("__slots__", ()))]
    held = [*getattr(one, "__dict__", {}).values(), *(getattr(one, name, None) for name in slots)]
    classes = [cls for cls in type(one).__mro__ if not _is_of_library(cls) and cls.__module__ != "builtins"]
    return held + [value for cls in classes for value in vars(cls).values()]


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names: list[str] = []
    codes = deque([function.__code__])
    while codes:
        code = codes.popleft()
        names += code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = list(dict.fromkeys(names))
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [one for one in named if isinstance(one, types.ModuleType)]  # `module.generator`
    return [*cells, *defaults, *named, *(vars(one)[name] for one in modules for name in names if name in vars(one))]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_of_library(one: Any) -> bool:
    return (getattr(one, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _own_generators() -> tuple[Generator, ...]:
    return torch.default_generator, np.random.mtrand._rand, random._inst


def _seed(generator: Generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)


def _get_state(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def describe_example(example: Any) -> str:
    """An example as text: of an image its bytes, of no object its place in memory."""
    if isinstance(example, Mapping):
        example = {key: value.tobytes() if _is_image(value) else value for key, value in example.items()}
    text = str(example)
    return re.sub(r"(<[^<>]+) at 0x[0-9a-fA-F]+>", r"\1>", text) if " at 0x" in text else text


def _is_image(value: Any) -> bool:
    return hasattr(value, "tobytes") and not isinstance(value, (np.ndarray, np.generic))
