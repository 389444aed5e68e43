"""
The rows of one checkpoint of an index on the Hub, of those tokens alone that were asked for.

It is a [`RowMap`] with holes: every row that was fetched is where it would be in the map of the whole index, so searching it
gives the very same numbers. What is not fetched takes no space where the file system knows sparse files.

```
rows.bin, examples.bin, offsets.npy     as in a map of all rows
fetched.bin        (vocabulary_size,): of each token 0, or 1 + the crc32 of its rows and examples
```
"""

import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_doge.artifacts.hub.ranges import ByteRange, RangedFile, join_near, read_all
from hf_doge.artifacts.influence.manifest import checkpoint_number
from hf_doge.artifacts.influence.row_map import Arrays, RowMap, map_arrays, map_name, note_use, open_place
from hf_doge.artifacts.influence.segment_reader import read_offsets

# What lies between two ranges is read along if it is shorter. With 8 KiB a query of 60 words reads 3 % more than its rows;
# with 32 KiB 23 % more, by a quarter fewer requests (`benchmarks/remote_search.py`).
_LARGEST_GAP = 8 * 2**10
_LARGEST_REQUEST = 4 * 2**20
_LONG = 2**20  # bytes, from which on a bar shows progress


@dataclass(frozen=True)
class _Piece:
    """A run of values of one token: bytes of a segment file, and their place in a file of the map."""

    token: int
    name: str
    file: int
    range: ByteRange
    place: int


class RemoteMap:
    """
    Args:
        config (`Mapping`): The content of config.json.
        checkpoint (`int`): Position of the checkpoint.
        segments (`Sequence[RangedFile]`): The segment files on the Hub, in the order of `config`.
        offsets (`Sequence[Path]`): Their offsets on this machine.
        cache_dir (`Path`): Where rows are kept; the next query for the same tokens reads nothing.

    Attributes:
        row_map ([`RowMap`]): With the rows of the tokens that were fetched. Others must not be looked at.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        checkpoint: int,
        *,
        segments: Sequence[RangedFile],
        offsets: Sequence[Path],
        cache_dir: Path,
    ) -> None:
        self._config, self._number = config, checkpoint_number(config["checkpoints"], checkpoint)
        self._entry = config["checkpoints"][checkpoint]
        self._segments, self._offsets = segments, offsets
        self._place = cache_dir / f"{map_name(config, self._entry)}-remote"
        self._lock = threading.Lock()
        self._open()

    def fetch(self, tokens: np.ndarray) -> None:
        """
        See that the rows of some tokens are here, by ranged reads of what is missing.

        Args:
            tokens (`numpy.ndarray`): Distinct.

        Raises:
            ValueError: What the Hub holds is no gradients of these examples. Names the file.
            OSError: See [`RangedFile.read`]; or the disk is full.
        """
        with self._lock:
            note_use(self._place)
            if not self._place.exists():  # deleted since, to make room
                self._open()
            missing = np.asarray([token for token in tokens.tolist() if not self._is_here(token)], dtype=np.int64)
            if len(missing):
                self._read(missing)

    def _open(self) -> None:
        # The files are written to next to the map; in this mode it sees that, and need not fit into memory.
        found = open_place(self._place, self._build, mode="r+")
        self._fetched = found.pop("fetched")
        self.row_map = RowMap(**found, num_examples=self._config["num_examples"])
        self._known: set[int] = set()

    def _is_here(self, token: int) -> bool:
        if token not in self._known:
            start, end = self.row_map.offsets[token : token + 2]
            if start < end and int(self._fetched[token]) != self._checksum(token):
                return False
            self._known.add(token)
        return True

    def _checksum(self, token: int) -> int:
        """Tells rows that were fetched from a hole and from what a power cut left."""
        piece = slice(*self.row_map.offsets[token : token + 2].tolist())
        begun = zlib.crc32(np.ascontiguousarray(self.row_map.rows[piece]).view(np.uint8).data)
        return 1 + zlib.crc32(np.ascontiguousarray(self.row_map.examples[piece]).view(np.uint8).data, begun)

    def _build(self, building: Path) -> Arrays:
        """An empty map, and its offsets."""
        counts = np.zeros(self._config["vocabulary_size"], dtype=np.int64)
        for position in range(len(self._segments)):
            runs = self._runs(position)
            np.add.at(counts, runs["token_id"], runs["num_rows"])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        arrays = map_arrays(self._config, int(offsets[-1])) | {"fetched": ("int64", counts.shape)}
        for name, (dtype, shape) in arrays.items():
            with (building / f"{name}.bin").open("wb") as file:
                file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        np.save(building / "offsets.npy", offsets)
        return arrays

    def _runs(self, position: int) -> dict[str, np.ndarray]:
        return read_offsets(
            self._offsets[position],
            config=self._config,
            checkpoint=self._number,
            file=self._entry["files"][position],
        )

    def _read(self, tokens: np.ndarray) -> None:
        pieces = list(self._pieces(tokens))
        groups: list[tuple[int, list[_Piece]]] = []
        for position in range(len(self._segments)):
            by_range = {piece.range: piece for piece in pieces if piece.file == position}
            for ranges in join_near(by_range, largest_gap=_LARGEST_GAP, largest_size=_LARGEST_REQUEST):
                groups.append((position, [by_range[one] for one in ranges]))
        wanted = [
            (self._segments[position], ByteRange(group[0].range.start, group[-1].range.stop))
            for position, group in groups
        ]
        total = sum(one.stop - one.start for _, one in wanted)
        bar = tqdm(total=total, desc="Reading rows", unit="B", unit_scale=True, leave=False, disable=total < _LONG)
        writing = threading.Lock()
        left = Counter(piece.token for piece in pieces)
        names = ("rows", "examples")
        sinks = {name: (self._place / f"{name}.bin").open("r+b") for name in names}

        def receive(number: int, content: bytes) -> None:
            position, group = groups[number]
            for piece in group:
                start = piece.range.start - wanted[number][1].start
                values = memoryview(content)[start : start + piece.range.stop - piece.range.start]
                self._check(position, piece, values)
                with writing:
                    sinks[piece.name].seek(piece.place)
                    sinks[piece.name].write(values)
                    left[piece.token] -= 1

        def progress(num_bytes: int) -> None:
            with writing:
                bar.update(num_bytes)

        try:
            with bar:
                read_all(wanted, receive, progress=progress)
        finally:
            for sink in sinks.values():
                with sink:
                    sink.flush()
                    os.fsync(sink.fileno())  # before a token is called fetched
            self._note([token for token in tokens.tolist() if left[token] == 0])

    def _pieces(self, tokens: np.ndarray) -> Iterator[_Piece]:
        """What to read, by segment."""
        arrays = map_arrays(self._config, 0)
        sizes = {
            name: int(np.prod(arrays[name][1][1:], dtype=np.int64)) * np.dtype(arrays[name][0]).itemsize
            for name in ("rows", "examples")
        }
        # Where the next row of each token goes.
        free = dict(zip(tokens.tolist(), self.row_map.offsets[tokens].tolist(), strict=True))
        order = sorted(range(len(self._segments)), key=lambda one: self._entry["files"][one]["first_example"])
        for position in order:
            runs = self._runs(position)
            for run in np.flatnonzero(np.isin(runs["token_id"], tokens)).tolist():
                token, count = int(runs["token_id"][run]), int(runs["num_rows"][run])
                for name, column in (("rows", "grad_byte"), ("examples", "example_byte")):
                    start = int(runs[column][run])
                    whole = ByteRange(start, start + count * sizes[name])
                    yield _Piece(token, name, position, whole, free[token] * sizes[name])
                free[token] += count

    def _check(self, position: int, piece: _Piece, values: memoryview) -> None:
        file = self._entry["files"][position]
        dtype = map_arrays(self._config, 0)[piece.name][0]
        array = np.frombuffer(values, dtype)
        if piece.name == "rows":
            good, law = np.isfinite(array).all(), "gradients must be finite"
        else:
            end = file["first_example"] + file["num_examples"]
            good = array[0] >= file["first_example"] and array[-1] < end and (array[1:] > array[:-1]).all()
            law = f"the examples of a token must ascend within [{file['first_example']}, {end})"
        if not good:
            raise ValueError(
                f"{file['path']!r} in {self._segments[position].repo_id!r} is damaged or was manipulated: {law}, but those"
                " fetched do not. Its author must push it again."
            )

    def _note(self, tokens: Sequence[int]) -> None:
        """Call tokens fetched: also when others could not be."""
        for token in tokens:
            start, end = self.row_map.offsets[token : token + 2].tolist()
            examples = self.row_map.examples[start:end]
            if (examples[1:] <= examples[:-1]).any():
                raise ValueError(
                    f"The rows of token {token} in {self._segments[0].repo_id!r} are damaged or were manipulated: each"
                    " example may have one of them. Its author must push the index again."
                )
            if start < end:
                self._fetched[token] = self._checksum(token)
            self._known.add(token)
        if isinstance(self._fetched, np.memmap):
            self._fetched.flush()
