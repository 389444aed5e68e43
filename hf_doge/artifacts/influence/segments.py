"""
One Parquet file of gradient rows: a range of examples, sorted by token.

Rows of float16 and float32 and their example ids lie in it plainly, one page in each row group, so that any of them can be
read by its place in bytes, over HTTP say, without a Parquet reader. A second file, the offsets, tells these places:

| column | |
|---|---|
| `checkpoint`, `first_example` | which segment: number of the checkpoint, and what the segment's name ends with |
| `token_id` | ascending |
| `first_row`, `num_rows` | rows `[first_row, first_row + num_rows)` of the segment, all of one row group |
| `grad_byte`, `example_byte` | where in the file the first of them begins, and its example id |
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hf_doge.artifacts.influence.encoding import encode_rows
from hf_doge.artifacts.influence.manifest import example_dtype
from hf_doge.artifacts.influence.tables import to_parquet
from hf_doge.artifacts.parquet import check_claims_of_footer, open_parquet
from hf_doge.artifacts.readers import parse_json
from hf_doge.text import printable

_ROW_GROUP_SIZE = 16_384  # what DuckDB and the Hub's viewer read fastest
_OFFSETS_GROUP_SIZE = 2**20
# Plain float16: split into streams of bytes it would be 6 % smaller, but neither DuckDB nor Polars reads that
# (https://github.com/duckdb/duckdb/issues/17114, https://github.com/pola-rs/polars/issues/21803).
_GRAD = "grad.list.element"
_VALUES = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8()}
_EXAMPLE = "example_id"
LARGEST_PAGE = 2**30  # Parquet counts the bytes of a page in 31 bits
OFFSETS_SCHEMA = pa.schema(
    {
        "checkpoint": pa.int32(),
        "first_example": pa.int64(),
        "token_id": pa.int32(),
        "first_row": pa.int64(),
        "num_rows": pa.int32(),
        "grad_byte": pa.int64(),
        "example_byte": pa.int64(),
    }
)


class EncodedSegment(NamedTuple):
    """
    Attributes:
        content (`bytes`): Of the segment file.
        offsets (`bytes`, *optional*): Of the file of its offsets; int8 has none, as Parquet has no bytes of one byte.
        scale (`float`): The power of two that float16 rows were multiplied by (else 1).
    """

    content: bytes
    offsets: bytes | None
    scale: float


def encode_segment(
    tokens: np.ndarray,
    examples: np.ndarray,
    rows: Tensor,
    *,
    dtype: str,
    checkpoint: int,
    facts: dict[str, Any],
) -> EncodedSegment:
    """
    The content of a segment file, and of its offsets.

    Args:
        tokens, examples (`numpy.ndarray` of shape `(num_rows,)`): Token and example of each row, by ascending example.
        rows (`torch.Tensor` of shape `(num_rows, stored_width)` and dtype float32): Their gradients.
        dtype (`str`): How they are stored.
        checkpoint (`int`): Number of the checkpoint, see [`checkpoint_number`].
        facts (`dict`): What else goes into the file's own metadata: the name of the checkpoint and the `first_example`.
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
    row_bytes = width * stored.element_size()
    group_rows = min(_ROW_GROUP_SIZE, max(1, LARGEST_PAGE // row_bytes))
    readable = dtype != "int8"
    content = to_parquet(
        table,
        compression={name: "zstd" for name in columns if name not in ("grad", _EXAMPLE)} if readable else "zstd",
        # Bytes are four times as large in Parquet, which has none, unless they are entries of a dictionary.
        use_dictionary=["token_id"] if readable else ["token_id", _GRAD],
        write_statistics=[name for name in columns if name != "grad"],  # nobody looks for the range of a gradient
        row_group_size=group_rows,
        data_page_size=2**31 - 1 if readable else None,
        sorting_columns=ordering,
    )
    if not readable:
        return EncodedSegment(content, None, segment_scale)
    values = {_GRAD: stored.numpy(), _EXAMPLE: examples[order]}
    places = _places(content, values)
    ends = _run_ends(tokens[order], group_rows)
    starts = np.append(0, ends[:-1]).astype(np.int64) if len(ends) else ends
    runs = {
        "checkpoint": np.full(len(starts), checkpoint),
        "first_example": np.full(len(starts), facts["first_example"]),
        "token_id": tokens[order][starts],
        "first_row": starts,
        "num_rows": ends - starts,
    }
    for name, column in (("grad_byte", _GRAD), ("example_byte", _EXAMPLE)):
        group, within = np.divmod(starts, group_rows)
        runs[name] = places[column][group] + within * values[column][:1].nbytes
    return EncodedSegment(content, _encode_offsets(runs), segment_scale)


def _places(content: bytes, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where the values of some columns begin in each row group: at the end of what Parquet has of the column there."""
    metadata = pq.read_metadata(pa.BufferReader(content))
    places = {name: np.zeros(metadata.num_row_groups, dtype=np.int64) for name in values}
    first = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = {
            group.column(position).path_in_schema: group.column(position) for position in range(group.num_columns)
        }
        last = first + group.num_rows
        for name, column in values.items():
            expected = column[first:last].reshape(-1).view(np.uint8)
            begin = chunks[name].data_page_offset + chunks[name].total_compressed_size - len(expected)
            if not np.array_equal(np.frombuffer(content, np.uint8, len(expected), begin), expected):
                raise RuntimeError(
                    f"Column {name!r} must lie plainly in its Parquet file, but pyarrow {pa.__version__} writes it in"
                    " another way. Please report this, and install pyarrow 26 until it is mended."
                )
            places[name][number] = begin
        first = last
    return places


def _run_ends(tokens: np.ndarray, group_rows: int) -> np.ndarray:
    """Where the rows of one token in one row group end, `(num_runs,)`."""
    following = np.arange(1, len(tokens) + 1)
    is_end = following % group_rows == 0
    is_end[:-1] |= tokens[1:] != tokens[:-1]
    is_end[-1:] = True
    return following[is_end]


def _encode_offsets(runs: dict[str, np.ndarray]) -> bytes:
    table = pa.table({field.name: pa.array(runs[field.name], field.type) for field in OFFSETS_SCHEMA})
    constant = ["checkpoint", "first_example"]
    return to_parquet(
        table,
        row_group_size=_OFFSETS_GROUP_SIZE,
        use_dictionary=constant,
        # Differences are small and alike: a seventh of the size.
        column_encoding={name: "DELTA_BINARY_PACKED" for name in table.column_names if name not in constant},
        sorting_columns=pq.SortingColumn.from_ordering(table.schema, [("token_id", "ascending")]),
    )


class SegmentReader:
    """
    Reads a segment file piece by piece, and believes nothing of it: also not when its checksum is right.

    Args:
        path (`Path`): The file.
        config (`Mapping`): The content of config.json.
        checkpoint (`int`): Number of the checkpoint, see [`checkpoint_number`].
        file (`Mapping`): The entry of the segment in `config`.
    """

    def __init__(self, path: Path, *, config: Mapping[str, Any], checkpoint: int, file: Mapping[str, Any]) -> None:
        self._path, self._config, self._checkpoint, self._file = path, config, checkpoint, file

    def tokens(self) -> Iterator[np.ndarray]:
        """
        The tokens, ascending.

        Raises:
            ValueError: The file is no Parquet, or not of this segment. Names it and what is wrong.
        """
        last = 0
        for batch in self._batches(["token_id"]):
            tokens = batch.column("token_id").to_numpy()
            ascending = len(tokens) == 0 or (tokens[0] >= last and (np.diff(tokens) >= 0).all())
            self._require(
                ascending and (len(tokens) == 0 or tokens[-1] < self._config["vocabulary_size"]),
                f"`token_id` must ascend within [0, {self._config['vocabulary_size']})",
            )
            last = tokens[-1] if len(tokens) else last
            yield tokens

    def rows(self) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Tokens and, piece by piece, the stored `rows`, their `examples`, and for int8 their `scales`."""
        first, end = self._file["first_example"], self._file["first_example"] + self._file["num_examples"]
        last = -1
        for batch in self._batches(None):
            grad = batch.column("grad")
            rows = grad.flatten().to_numpy(zero_copy_only=True).reshape(len(batch), grad.type.list_size)
            tokens, examples = batch.column("token_id").to_numpy(), batch.column(_EXAMPLE).to_numpy()
            self._require(
                len(examples) == 0 or first <= examples.min() <= examples.max() < end,
                f"`{_EXAMPLE}` must be in [{first}, {end})",
            )
            places = tokens.astype(np.int64) * (end - first) + (examples - first)
            self._require(
                len(places) == 0 or (places[0] > last and (np.diff(places) > 0).all()),
                "rows must be sorted by `token_id` and `example_id`, none twice",
            )
            last = places[-1] if len(places) else last
            self._require(
                (batch.column("checkpoint").to_numpy() == self._checkpoint).all(), "`checkpoint` must be its own"
            )
            columns = {"rows": rows, "examples": examples}
            if rows.dtype == np.int8:
                columns["scales"] = batch.column("scale").to_numpy()
                good = np.isfinite(columns["scales"]) & (columns["scales"] > 0)
                self._require(good.all(), "`scale` must be finite and above 0")
            else:
                self._require(np.isfinite(rows).all(), "`grad` must be finite")
            yield tokens, columns

    def _batches(self, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        with open_parquet(self._path, str(self._path)) as file:
            self._check_schema(file)
            # On this thread: a process that ends soon after pyarrow started its reading threads may be aborted at exit.
            for batch in file.iter_batches(batch_size=_ROW_GROUP_SIZE, columns=columns, use_threads=False):
                has_null = any(column.null_count for column in batch.columns)
                if columns is None:
                    has_null |= batch.column("grad").flatten().null_count > 0
                self._require(not has_null, "no value may be null")
                yield batch

    def _check_schema(self, file: pq.ParquetFile) -> None:
        """What the end of the file says, before anything else is read."""
        config = self._config
        expected = segment_schema(config["dtype"], config["stored_width"], example_dtype(config))
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
        self._require(
            schema.names == expected.names and schema.types == expected.types,
            f"columns must be {describe_schema(expected)}, but are {describe_schema(schema)}",
        )
        self._require(
            num_rows == self._file["num_rows"], f"it must have {self._file['num_rows']} rows, but has {num_rows}"
        )
        groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        self._require(max(groups, default=0) <= _ROW_GROUP_SIZE, f"groups must have at most {_ROW_GROUP_SIZE} rows")
        row_bytes, size = config["stored_width"] * np.dtype(config["dtype"]).itemsize, self._path.stat().st_size
        self._require(
            max(groups, default=0) * row_bytes <= max(LARGEST_PAGE, row_bytes),
            f"groups must have at most {LARGEST_PAGE} bytes of rows",
        )
        check_claims_of_footer(file, str(self._path), size)
        if config["dtype"] != "int8":
            needed = num_rows * row_bytes
            self._require(needed <= size, f"{num_rows} rows take {needed} bytes, but it has {size}")

    def _require(self, holds: Any, law: str) -> None:
        if not holds:
            raise ValueError(
                f"The gradients in {str(self._path)!r} are damaged or were manipulated: {law}. Fetch the index again."
            )


def check_scales(folder: Path, config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: config.json gives the rows of a segment another scale than the segment was written with.
    """
    for file in (file for checkpoint in config["checkpoints"] for file in checkpoint["files"]):
        path = folder / file["path"]
        with open_parquet(path, str(path)) as opened:
            facts = opened.metadata.metadata or {}
        told = parse_json(facts.get(b"hf_doge", b"{}"), source=str(path))
        written = told.get("scale", file["scale"]) if isinstance(told, dict) else None
        if written != file["scale"]:
            raise ValueError(
                f"The rows of {file['path']!r} were written with the scale {written!r}, but config.json in {str(folder)!r} has"
                f" {file['scale']!r}. It is damaged or was manipulated: fetch the index again."
            )


def segment_schema(dtype: str, width: int, example_type: str) -> pa.Schema:
    """The columns of a segment file."""
    fields = {
        "checkpoint": pa.int32(),
        "token_id": pa.int32(),
        _EXAMPLE: pa.type_for_alias(example_type),
        "grad": pa.list_(_VALUES[dtype], width),
    }
    return pa.schema(fields if dtype == "float32" else fields | {"scale": pa.float32()})


def describe_schema(schema: pa.Schema) -> str:
    """Names and types, on one line."""
    return printable(", ".join(f"{field.name} {field.type}" for field in schema))
