"""
The rows of one checkpoint as a local memory map, sorted by token over all segments.

```
map.json           sizes, by which a damaged map is known
rows.bin           (num_rows, stored_width) in the dtype of the index
examples.bin       (num_rows,) example of each row, ascending within a token
scales.bin         (num_rows,) float32, for int8 only
offsets.npy        (vocabulary_size + 1,): rows [offsets[w], offsets[w + 1]) are those of token w
```

A map is a copy of what the Parquet files hold and can be deleted at any time. Whoever builds one deletes those that were
opened longest ago, until what is left is no larger than 20 GiB; maps opened within the last hour stay in any case.
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_doge.artifacts.influence.manifest import checkpoint_number, example_dtype
from hf_doge.artifacts.influence.segment_reader import SegmentReader, read_offsets
from hf_doge.files import DISK_IS_FULL, to_json

_LAYOUT = 1  # changes whenever the files do
_MAP = "map.json"
_ABANDONED_SECONDS = 24 * 60 * 60
_GROUP_BYTES = 64 * 2**20
_KEPT_BYTES = 20 * 2**30
_IN_USE_SECONDS = 60 * 60
_MAP_NAME = re.compile(r"[0-9a-f]{32}(-remote)?")
_LONG = 1_000_000  # rows, from which on a bar shows progress

MapMode = Literal["c", "r+", "w+"]
Arrays = dict[str, tuple[str, tuple[int, ...]]]  # name of a flat file -> dtype and shape


@dataclass
class RowMap:
    """
    Attributes:
        rows (`numpy.ndarray` of shape `(num_rows, stored_width)`): As stored.
        examples (`numpy.ndarray` of shape `(num_rows,)`): Example of each, ascending within a token.
        scales (`numpy.ndarray` of shape `(num_rows,)`, *optional*): What int8 rows are to be divided by.
        offsets (`numpy.ndarray` of shape `(vocabulary_size + 1,)`): Where the rows of each token begin and end.
        num_examples (`int`).
        row_tensor, example_tensor (`torch.Tensor`): `rows` and `examples` as torch sees them.
    """

    rows: np.ndarray
    examples: np.ndarray
    scales: np.ndarray | None
    offsets: np.ndarray
    num_examples: int

    def __post_init__(self) -> None:
        self.row_tensor = torch.from_numpy(self.rows)
        self.example_tensor = torch.from_numpy(self.examples)

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any], checkpoint: int, *, cache_dir: Path) -> "RowMap":
        """The map of a checkpoint of the index in `folder`; built in `cache_dir` unless it is there, and whole."""
        entry = config["checkpoints"][checkpoint]
        place = cache_dir / map_name(config, entry)
        found = open_place(place, lambda building: _build(building, folder, config, checkpoint))
        return cls(**found, num_examples=config["num_examples"])


def default_cache_dir() -> Path:
    """`$HF_HOME/hf_doge`."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_doge"


def open_place(place: Path, build: Callable[[Path], Arrays], *, mode: MapMode = "c") -> dict[str, Any]:
    """
    The arrays of a map, which is built unless it is there, and whole.

    Args:
        place (`Path`): Its folder in the cache.
        build (`Callable[[Path], Arrays]`):
            Makes `offsets.npy` and `<name>.bin` for each array in the new folder that it is given, and returns what they are.
        mode (`str`): Of `numpy.memmap`. `"c"`: the files stay as they are, and torch accepts the arrays.
    """
    for _ in range(10):
        found = _load(place, mode)
        if found is not None:
            note_use(place)
            return found
        _discard(place)
        building = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
        try:
            building.mkdir(parents=True)
            arrays = build(building)
            sizes = {path.name: path.stat().st_size for path in building.iterdir()}
            (building / _MAP).write_bytes(to_json({"arrays": arrays, "sizes": sizes}))
            os.rename(building, place)
            _prune(place.parent)
        except PermissionError as error:
            raise PermissionError(
                error.errno,
                f"The memory map of the index cannot be written ({error.strerror}). Pass `cache_dir`",
                str(place),
            ) from error
        except OSError as error:
            if error.errno in DISK_IS_FULL:
                raise OSError(
                    error.errno,
                    f"The memory map of the index cannot be written ({error.strerror}). Free some space, or delete what is in"
                    " its folder. Pass `cache_dir` for another",
                    str(place),
                ) from error
            if not place.exists():
                raise
            # Another process was quicker. Its map is taken if it is whole.
        finally:
            shutil.rmtree(building, ignore_errors=True)
    raise OSError(f"The memory map in {str(place)!r} keeps being damaged. Choose another `cache_dir`.")


def note_use(place: Path) -> None:
    """Keep a map from being deleted for a while."""
    with suppress(OSError):  # a folder that others built may be read-only
        os.utime(place / _MAP)


def map_name(config: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    shape = [config[key] for key in ("dtype", "stored_width", "vocabulary_size", "num_examples")]
    content = [_LAYOUT, shape, [(file["sha256"], file["first_example"]) for file in entry["files"]]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def map_arrays(config: Mapping[str, Any], num_rows: int) -> Arrays:
    """The flat files."""
    arrays = {
        "rows": (config["dtype"], (num_rows, config["stored_width"])),
        "examples": (example_dtype(config), (num_rows,)),
    }
    return arrays | ({"scales": ("float32", (num_rows,))} if config["dtype"] == "int8" else {})


def _map(path: Path, dtype: str, shape: Sequence[int], mode: MapMode) -> np.ndarray:
    if 0 in shape:  # an empty file cannot be mapped
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, shape=tuple(shape), mode=mode)


def _load(place: Path, mode: MapMode) -> dict[str, Any] | None:
    """The arrays, or `None` when the map is not there or damaged."""
    try:
        facts = json.loads((place / _MAP).read_bytes())
        if any((place / name).stat().st_size != size for name, size in facts["sizes"].items()):
            return None
        arrays = {
            name: _map(place / f"{name}.bin", dtype, shape, mode) for name, (dtype, shape) in facts["arrays"].items()
        }
        return {"scales": None, **arrays, "offsets": np.load(place / "offsets.npy", allow_pickle=False)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _discard(place: Path) -> None:
    """Delete a damaged map, and what builds that were killed have left."""
    away = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
    with suppress(OSError):  # not there, or gone already
        os.rename(place, away)  # first out of the way, so that no process finds half of it
        shutil.rmtree(away, ignore_errors=True)
    for left in place.parent.glob(f".{place.name}-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _prune(cache_dir: Path) -> None:
    """Keep the folder within its bounds, see above. Processes that already opened a map can keep reading it."""
    opened, sizes, now = {}, {}, time.time()
    for place in cache_dir.iterdir():
        left = place.name.startswith(".") and _MAP_NAME.match(place.name[1:])
        with suppress(OSError):
            if left and now - place.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(place, ignore_errors=True)  # of a build that was killed
            elif _MAP_NAME.fullmatch(place.name):
                opened[place] = (place / _MAP).stat().st_mtime
                sizes[place] = sum(_size_on_disk(path) for path in place.iterdir())
    total = sum(sizes.values())
    for place in sorted(sizes, key=opened.__getitem__):
        if total <= _KEPT_BYTES or now - opened[place] < _IN_USE_SECONDS:
            break
        away = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
        with suppress(OSError):
            os.rename(place, away)  # first out of the way, so that no process finds half of it
            shutil.rmtree(away, ignore_errors=True)
            total -= sizes[place]


def _size_on_disk(path: Path) -> int:
    """Without the holes of a map that is filled bit by bit, where the system tells."""
    found = path.stat()
    return getattr(found, "st_blocks", 0) * 512 or found.st_size


def _build(building: Path, folder: Path, config: Mapping[str, Any], checkpoint: int) -> Arrays:
    """Merge the segments: count the rows of each token, then put each segment's rows to their places."""
    entry, number = config["checkpoints"][checkpoint], checkpoint_number(config["checkpoints"], checkpoint)
    files = sorted(entry["files"], key=lambda file: file["first_example"])
    counts = np.zeros(config["vocabulary_size"], dtype=np.int64)
    segments = []
    for file in files:
        segments.append(SegmentReader(folder / file["path"], config=config, checkpoint=number, file=file))
        own = np.zeros_like(counts)
        for tokens in segments[-1].tokens():
            own += np.bincount(tokens, minlength=len(counts))
        if file.get("offsets_path") is not None:
            _check_offsets(folder, config, number, file, own)
        counts += own
    offsets = np.concatenate([[0], np.cumsum(counts)])
    arrays = map_arrays(config, int(offsets[-1]))
    free = offsets[:-1].copy()  # where the next row of each token goes
    pieces = (piece for segment in segments for piece in segment.rows())
    with ExitStack() as stack:
        # By writing, not through a map: its pages would count as memory, and a full disk would end the process.
        sinks = {name: stack.enter_context((building / f"{name}.bin").open("wb")) for name in arrays}
        total = sum(file["num_rows"] for file in files)
        bar = tqdm(total=total, desc=f"Mapping {entry['name']}", unit="row", disable=total < _LONG)
        progress = stack.enter_context(bar)
        for tokens, columns in _grouped(pieces):
            distinct, starts, counts = np.unique(tokens, return_index=True, return_counts=True)
            places = free[distinct]
            free[distinct] += counts
            # Tokens that follow each other in the map too are one run: all of them, where there is one segment.
            first = np.flatnonzero(np.append(True, places[1:] != places[:-1] + counts[:-1]))
            runs = (starts[first].tolist(), np.add.reduceat(counts, first).tolist(), places[first].tolist())
            for name, sink in sinks.items():
                _write_runs(sink, columns[name], *runs)
            progress.update(len(tokens))
    np.save(building / "offsets.npy", offsets)
    return arrays


def _check_offsets(
    folder: Path, config: Mapping[str, Any], checkpoint: int, file: Mapping[str, Any], counts: np.ndarray
) -> None:
    """Nobody reads them here, but who reads the same index in parts does."""
    path = folder / file["offsets_path"]
    size = (folder / file["path"]).stat().st_size
    runs = read_offsets(path, config=config, checkpoint=checkpoint, file=file, segment_bytes=size)
    told = np.zeros_like(counts)
    np.add.at(told, runs["token_id"], runs["num_rows"])
    if (told != counts).any():
        raise ValueError(
            f"The offsets in {str(path)!r} are damaged or were manipulated: they must tell of the rows that"
            f" {file['path']!r} has of each token. Fetch the index again."
        )


def _grouped(
    pieces: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]],
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """As many pieces at a time as fit into `_GROUP_BYTES`, sorted by token: long runs are written faster."""
    group: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    num_bytes = 0
    for piece in chain(pieces, [None]):
        if piece is None or num_bytes + piece[1]["rows"].nbytes > _GROUP_BYTES:
            if group:
                tokens = np.concatenate([one[0] for one in group])
                order = np.argsort(tokens, kind="stable")  # examples stay in order within a token
                columns = {name: np.concatenate([one[1][name] for one in group])[order] for name in group[0][1]}
                yield tokens[order], columns
            group, num_bytes = [], 0
        if piece is not None:
            group.append(piece)
            num_bytes += piece[1]["rows"].nbytes


def _write_runs(sink: BinaryIO, values: np.ndarray, starts: list[int], counts: list[int], places: list[int]) -> None:
    """Write each run of `values` to its place, counted in values."""
    size = values[:1].nbytes
    for start, count, place in zip(starts, counts, places, strict=True):
        sink.seek(place * size)
        sink.write(values[start : start + count].data)
