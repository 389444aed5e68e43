"""Arrow tables as Parquet."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# So that a few rows of a file on the Hub can be read without most of the others.
_GROUP_ROWS = 1024


def to_parquet(table: pa.Table, **options: Any) -> bytes:
    """A table as the content of a Parquet file, the same on every run."""
    sink = pa.BufferOutputStream()
    defaults = {"compression": "zstd", "write_page_index": True, "row_group_size": _GROUP_ROWS}
    pq.write_table(table, sink, **{**defaults, **options})
    return sink.getvalue().to_pybytes()


def as_stored(table: pa.Table) -> pa.Table:
    """A table as it comes back from its Parquet file, which has no seconds, say."""
    return pq.ParquetFile(pa.BufferReader(to_parquet(table))).read(use_threads=False)
