"""
What is known of some examples of an index on the Hub, when there is too much to fetch it all.

The Parquet files are kept here with holes: of each the end, which tells where the row groups are, and those that were
asked for. What is not fetched takes no space where the file system knows sparse files.
"""

import json
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_doge.artifacts.hub.ranges import ByteRange, RangedFile, read_all
from hf_doge.artifacts.influence.examples import harmless_metadata
from hf_doge.artifacts.parquet import check_claims_of_footer, open_parquet, read_parquet
from hf_doge.checks import check_names
from hf_doge.files import write_json

_END_BYTES = 2**16  # what pyarrow looks at first
_LARGEST_GROUP = 2**28  # bytes in memory; ours have 1024 rows


class RemoteExamples:
    """
    Args:
        files (`Sequence[RangedFile]`): The files of the examples, in their order.
        checksums (`Sequence[str]`): Their sha256, as config.json has them.
        cache_dir (`Path`): Where what was fetched is kept.

    Attributes:
        num_examples (`int`): Number of examples in all files.
        schema (`pyarrow.Schema`).

    Raises:
        ValueError: A file is not Parquet, or out of all proportion. Named.
        OSError: See [`RangedFile.read`].
    """

    def __init__(self, files: Sequence[RangedFile], checksums: Sequence[str], *, cache_dir: Path) -> None:
        self._parts = [
            _PartialParquet(file, cache_dir / f"examples-{checksum[:32]}")
            for file, checksum in zip(files, checksums, strict=True)
        ]
        first = self._parts[0].schema
        self.schema: pa.Schema = first.with_metadata(harmless_metadata(first))
        for part in self._parts:
            part.require(part.schema == self.schema, "it must have the columns of the other examples")
        counts = [group.num_rows for part in self._parts for group in part.groups]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._places = [(part, number) for part in self._parts for number in range(len(part.groups))]
        self.num_examples = int(self._starts[-1])

    def take(self, ids: Iterable[int]) -> pa.Table:
        """
        Fetch what is missing of the row groups that hold some examples.

        Args:
            ids (`Iterable[int]`): In `[0, num_examples)`, in any order, with repeats.

        Returns:
            `pyarrow.Table`: one row for each of `ids`, in their order.
        """
        ids = np.asarray(list(ids), dtype=np.int64)
        groups = np.unique(np.searchsorted(self._starts, ids, side="right") - 1)
        for part in self._parts:
            part.fetch([self._places[group][1] for group in groups.tolist() if self._places[group][0] is part])
        tables, held = [self.schema.empty_table()], []
        for group in groups.tolist():
            part, number = self._places[group]
            expected = np.arange(self._starts[group], self._starts[group + 1])
            tables.append(part.read(number, expected))
            held.append(expected)
        order = np.searchsorted(np.concatenate([np.zeros(0, dtype=np.int64), *held]), ids)
        return pa.concat_tables(tables).take(pa.array(order))


class _PartialParquet:
    """One file with holes, and next to it the crc32 of what was fetched, which tells it from holes."""

    def __init__(self, file: RangedFile, place: Path) -> None:
        self._file, self._path, self._journal = file, place.with_suffix(".parquet"), place.with_suffix(".json")
        place.parent.mkdir(parents=True, exist_ok=True)
        known = self._known()
        if known is None:
            self._begin()
            known = self._known()
        self.require(known is not None, "what was fetched of it cannot be read back")
        assert known is not None
        self._crcs: dict[str, int] = known["crcs"]
        with open_parquet(self._path, file.path) as parquet:
            metadata, self.schema = parquet.metadata, parquet.schema_arrow
            check_claims_of_footer(parquet, file.path, known["size"])
        check_names(self.schema.names, what=f"Columns in {file.path!r} of {file.repo_id!r}")
        self.groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        for group in self.groups:
            places = self._place(group)
            self.require(0 <= places.start < places.stop <= known["size"], "its row groups must lie in it")
            self.require(0 <= group.total_byte_size <= _LARGEST_GROUP, f"a row group may take {_LARGEST_GROUP} bytes")

    def require(self, holds: Any, law: str) -> None:
        """
        Raises:
            ValueError: It does not hold. Names the file.
        """
        if not holds:
            raise self._error(law)

    def fetch(self, numbers: Sequence[int]) -> None:
        """See that some row groups are here."""
        missing = {
            str(number): self._place(self.groups[number]) for number in numbers if str(number) not in self._crcs
        }
        if not missing:
            return
        ranges, names = list(missing.values()), list(missing)
        contents: dict[str, bytes] = {}
        read_all(
            [(self._file, one) for one in ranges],
            lambda position, content: contents.update({names[position]: content}),
        )
        self._write({missing[name].start: content for name, content in contents.items()})
        self._crcs |= {name: zlib.crc32(content) for name, content in contents.items()}
        self._note()

    def read(self, number: int, ids: np.ndarray) -> pa.Table:
        """A row group that was fetched, and is that of some examples."""
        table = read_parquet(self._path, self._file.path, groups=[number])
        found = table["example_id"].to_numpy() if "example_id" in table.column_names else None
        self.require(
            found is not None and np.array_equal(found, ids), f"group {number} must have the examples from {ids[0]} on"
        )
        return table

    def _known(self) -> Mapping[str, Any] | None:
        """What the journal tells, as far as it is still so."""
        try:
            known = json.loads(self._journal.read_bytes())
            size, end = known["size"], known["end"]
            if self._path.stat().st_size != size or self._crc(ByteRange(size - end, size)) != known["crcs"]["end"]:
                return None
            metadata = pq.read_metadata(self._path)
            known["crcs"] = {
                name: crc
                for name, crc in known["crcs"].items()
                if name == "end" or self._crc(self._place(metadata.row_group(int(name)))) == crc
            }
        except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException):
            return None
        self._size, self._end = size, end
        return known

    def _begin(self) -> None:
        """Fetch the end of the file."""
        self._size = self._file.size
        end = min(self._size, _END_BYTES)
        content = self._file.read(self._size - end, self._size)
        self.require(content[-4:] == b"PAR1", "it must be a Parquet file")
        needed = min(self._size, int.from_bytes(content[-8:-4], "little") + 8)
        if needed > end:
            content = self._file.read(self._size - needed, self._size - end) + content
        self._end = len(content)
        if self._known() is not None:
            return  # another process was quicker, and may have fetched more since
        own = self._path.with_name(f".{self._path.name}-{uuid.uuid4().hex}")
        try:
            with own.open("wb") as file:
                file.truncate(self._size)
                file.seek(self._size - self._end)
                file.write(content)
            os.replace(own, self._path)
        finally:
            own.unlink(missing_ok=True)
        self._crcs = {"end": zlib.crc32(content)}
        self._note()

    def _note(self) -> None:
        write_json(self._journal, {"size": self._size, "end": self._end, "crcs": self._crcs})

    def _write(self, contents: Mapping[int, bytes]) -> None:
        with self._path.open("r+b") as file:
            for start, content in contents.items():
                file.seek(start)
                file.write(content)

    def _crc(self, place: ByteRange) -> int:
        with self._path.open("rb") as file:
            file.seek(place.start)
            return zlib.crc32(file.read(place.stop - place.start))

    @staticmethod
    def _place(group: pq.RowGroupMetaData) -> ByteRange:
        columns = [group.column(position) for position in range(group.num_columns)]
        starts = [min(one.data_page_offset, one.dictionary_page_offset or one.data_page_offset) for one in columns]
        return ByteRange(
            min(starts), max(start + one.total_compressed_size for start, one in zip(starts, columns, strict=True))
        )

    def _error(self, law: str) -> ValueError:
        return ValueError(
            f"{self._file.path!r} in {self._file.repo_id!r} is damaged or was manipulated: {law}. Its author must push it"
            " again."
        )
