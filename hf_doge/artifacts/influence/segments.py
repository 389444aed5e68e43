"""One Parquet file of gradient rows: a range of examples, sorted by token."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hf_doge.artifacts.influence.encoding import encode_rows
from hf_doge.artifacts.influence.tables import to_parquet

_ROW_GROUP_SIZE = 16_384  # what DuckDB and the Hub's viewer read fastest
# Plain float16: split into streams of bytes it would be 6 % smaller, but neither DuckDB nor Polars reads that
# (https://github.com/duckdb/duckdb/issues/17114, https://github.com/pola-rs/polars/issues/21803).
_GRAD = "grad.list.element"
_VALUES = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8()}


def encode_segment(
    tokens: np.ndarray,
    examples: np.ndarray,
    rows: Tensor,
    *,
    dtype: str,
    checkpoint: int,
    facts: dict[str, Any],
) -> tuple[bytes, float]:
    """
    The content of a segment file.

    Args:
        tokens, examples (`numpy.ndarray` of shape `(num_rows,)`): Token and example of each row, by ascending example.
        rows (`torch.Tensor` of shape `(num_rows, stored_width)` and dtype float32): Their gradients.
        dtype (`str`): How they are stored.
        checkpoint (`int`): Position of the checkpoint.
        facts (`dict`): What else goes into the file's own metadata.

    Returns:
        `tuple[bytes, float]`: the file, and the power of two its float16 rows were multiplied by (else 1).
    """
    order = np.argsort(tokens, kind="stable")
    stored, scale = encode_rows(rows[torch.from_numpy(order)], dtype)
    num_rows, width = stored.shape
    columns = {
        "checkpoint": pa.array(np.full(num_rows, checkpoint, dtype=np.int32)),
        "token_id": pa.array(tokens[order].astype(np.int32)),
        "example_id": pa.array(examples[order]),
        "grad": pa.FixedSizeListArray.from_arrays(pa.array(stored.numpy().reshape(-1), type=_VALUES[dtype]), width),
    }
    segment_scale = scale if dtype == "float16" else 1.0
    if dtype != "float32":
        columns["scale"] = pa.array(np.full(num_rows, scale, dtype=np.float32))
    table = pa.table(columns)
    metadata = {"hf_doge": json.dumps({**facts, "scale": segment_scale}, sort_keys=True)}
    table = table.replace_schema_metadata(metadata)
    ordering = pq.SortingColumn.from_ordering(table.schema, [("token_id", "ascending"), ("example_id", "ascending")])
    content = to_parquet(
        table,
        # Bytes are four times as large in Parquet, which has none, unless they are entries of a dictionary.
        use_dictionary=["token_id", _GRAD] if dtype == "int8" else ["token_id"],
        write_statistics=[name for name in columns if name != "grad"],  # nobody looks for the range of a gradient
        row_group_size=_ROW_GROUP_SIZE,
        sorting_columns=ordering,
    )
    return content, segment_scale


def read_tokens(path: Path) -> Iterator[np.ndarray]:
    """The tokens of a segment, piece by piece."""
    for batch in _batches(path, ["token_id"]):
        yield batch.column("token_id").to_numpy()


def read_segment(path: Path) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Tokens and, piece by piece, the stored `rows`, their `examples`, and for int8 their `scales`."""
    for batch in _batches(path, None):
        grad = batch.column("grad")
        rows = grad.flatten().to_numpy(zero_copy_only=True).reshape(len(batch), grad.type.list_size)
        columns = {"rows": rows, "examples": batch.column("example_id").to_numpy()}
        if rows.dtype == np.int8:
            columns["scales"] = batch.column("scale").to_numpy()
        yield batch.column("token_id").to_numpy(), columns


def _batches(path: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    # On this thread: a process that ends soon after pyarrow started its reading threads may be aborted at exit.
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_ROW_GROUP_SIZE, columns=columns, use_threads=False)
