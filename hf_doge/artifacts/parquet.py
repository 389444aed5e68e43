"""
Parquet in memory and in files. Of files of others, errors name the file, and reading takes no memory out of all proportion
to the file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_doge.text import printable

# A few bytes of Parquet can stand for any number of rows, or of copies of a long text.
_ALLOWED = 2**28  # bytes in memory, whatever the size of the file
_ALLOWED_RATIO = 100  # bytes in memory for each of the file; text is packed to a tenth at best
_MOST_ROWS = 2**16  # that are decoded at once
_GROUP_ROWS = 1024  # so that a few rows of a file on the Hub can be read without most of the others


def to_parquet(table: pa.Table, **options: Any) -> bytes:
    """A table as the content of a Parquet file, the same on every run."""
    sink = pa.BufferOutputStream()
    defaults = {"compression": "zstd", "write_page_index": True, "row_group_size": _GROUP_ROWS}
    pq.write_table(table, sink, **{**defaults, **options})
    return sink.getvalue().to_pybytes()


def as_stored(table: pa.Table) -> pa.Table:
    """A table as it comes back from its Parquet file, which has no seconds, say."""
    return pq.ParquetFile(pa.BufferReader(to_parquet(table))).read(use_threads=False)


@contextmanager
def open_parquet(source: Path | bytes | pa.BufferReader, name: str) -> Iterator[pq.ParquetFile]:
    """
    A Parquet file.

    Raises:
        ValueError: It is none, or cannot be read; also while it is open. Names it as `name`.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, not of Parquet
            raise
        raise ValueError(
            f"{name!r} must be a Parquet file, but cannot be read: {printable(error)}. Fetch it again."
        ) from error


def allowed_bytes(file_bytes: int) -> int:
    """How much memory the content of a file may take."""
    return max(_ALLOWED, _ALLOWED_RATIO * file_bytes)


def check_claims_of_footer(
    file: pq.ParquetFile, name: str, file_bytes: int, groups: Sequence[int] | None = None
) -> None:
    """
    Raises:
        ValueError: By its end, the rows of a file (of some row groups) take out of all proportion to its size.
    """
    found = range(file.metadata.num_row_groups) if groups is None else groups
    chosen = [file.metadata.row_group(number) for number in found]
    in_rows = sum(group.num_rows for group in chosen) * sum(map(_width, file.schema_arrow.types))
    _refuse_beyond(max(in_rows, sum(group.total_byte_size for group in chosen)), name, file_bytes)


def read_parquet(
    source: Path | bytes | pa.BufferReader, name: str, *, groups: Sequence[int] | None = None
) -> pa.Table:
    """
    The whole table, or some of its row groups.

    Raises:
        ValueError: As [`open_parquet`] and [`check_claims_of_footer`], or what it holds turns out so large.
    """
    size = (
        source.stat().st_size
        if isinstance(source, Path)
        else len(source)
        if isinstance(source, bytes)
        else source.size()
    )
    with open_parquet(source, name) as file:
        check_claims_of_footer(file, name, size, groups)
        found = range(file.metadata.num_row_groups) if groups is None else groups
        # One entry of a dictionary may be as long as all of a row group, and stand in each of its rows.
        longest = max((file.metadata.row_group(number).total_byte_size for number in found), default=1)
        rows = max(1, min(_MOST_ROWS, _ALLOWED // max(1, longest)))
        batches, held = [], 0
        # On this thread: a process that ends soon after pyarrow started its reading threads may be aborted at exit.
        for batch in file.iter_batches(batch_size=rows, row_groups=list(found), use_threads=False):
            held += batch.nbytes
            _refuse_beyond(held, name, size)
            batches.append(batch)
        return pa.Table.from_batches(batches, schema=file.schema_arrow)


def _refuse_beyond(num_bytes: int, name: str, file_bytes: int) -> None:
    allowed = allowed_bytes(file_bytes)
    if num_bytes > allowed:
        raise ValueError(
            f"{name!r} must need at most {allowed / 2**30:.3g} GiB of memory, as a file of {file_bytes:,} bytes, but"
            f" claims {num_bytes / 2**30:.3g} GiB or more. It is damaged or was manipulated: fetch it again."
        )


def _width(kind: pa.DataType) -> int:
    """Bytes of a value at least."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    if pa.types.is_struct(kind):
        return sum(_width(field.type) for field in kind)
    try:
        return max(1, kind.bit_width // 8)
    except ValueError:  # of texts and lists
        return 4
