"""
The plain values in a file of `torch.save`, such as `training_args.bin`, without running any of it.

A pickle names classes and functions, which are called as it is loaded. Here every name stands for an empty shell, which does
nothing and keeps what it is given, so that numbers, texts and dictionaries of them come back, and nothing else. What the
pickle asks for is counted before it is loaded, since a few bytes can ask for all of the memory.
"""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

_LARGEST = 2**18  # bytes; arguments take some thousands
_MOST_OPERATIONS = 20_000  # arguments take some hundreds; more could nest or collide without end
_MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})  # each makes room for as many objects as its number says


class _Shell:
    """What stands for any object: a call, a new one and a filled one all end here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Shell":
        shell = super().__new__(cls)
        _Shell.__init__(shell, *args)  # a pickle may leave it out
        return shell

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing: what a shell holds is not asked for."""

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""

    def add(self, value: Any) -> None:
        """Nothing."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Shell

    def persistent_load(self, pid: Any) -> Any:
        return None


def read_state(path: Path) -> dict[str, Any]:
    """
    The attributes of the object that a file holds: numbers, texts, truth values and dictionaries of texts with these. An enum is
    its value. Anything else is left out, and all of it where the file is missing, damaged or of another kind.

    Args:
        path (`Path`): Written by `torch.save`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            if len(names) != 1 or names[0].file_size > _LARGEST:
                return {}
            with archive.open(names[0]) as file:
                content = file.read(_LARGEST)
        _require_small(content)
        found = _InertUnpickler(io.BytesIO(content)).load()
    except Exception:  # whoever wrote it can make any error of it
        return {}
    state = found.state if isinstance(found, _Shell) else None
    if not isinstance(state, dict):
        return {}
    values = {name: _plain(value) for name, value in state.items() if isinstance(name, str)}
    return {name: value for name, value in values.items() if value is not None}


def _require_small(content: bytes) -> None:
    """Raises `ValueError` where loading takes more time or memory than the length of the pickle says."""
    for number, (operation, given, _) in enumerate(pickletools.genops(content)):  # refuses lengths that are not there
        place = int(given or 0) if operation.name in _MEMO else 0
        if max(number, place) >= _MOST_OPERATIONS:
            raise ValueError(f"A pickle of arguments must be small, but its operation {number} is {operation.name}.")


def _plain(value: Any) -> Any:
    if isinstance(value, _Shell) and len(value.args) == 1:
        value = value.args[0]
    if isinstance(value, dict):
        good = all(isinstance(name, str) and isinstance(one, bool | int | float | str) for name, one in value.items())
        return dict(value) if good else None
    return value if isinstance(value, bool | int | float | str) else None
