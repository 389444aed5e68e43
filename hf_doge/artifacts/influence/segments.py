"""
One Parquet file of gradient rows: a range of examples, sorted by token, as float16, float32 or int8.

A row has the columns `checkpoint`, `token_id`, `example_id`, `grad` (as many numbers as are stored) and, unless they are float32,
`scale`: `grad / scale` is the gradient of the example's loss with respect to the embedding of the token, projected or in Adam's
metric where the index was recorded so.

Rows of float16 and float32 and their example ids lie in it plainly, one page in each row group, so that any of them can be
read by its place in bytes, over HTTP say, without a Parquet reader. A second file, the offsets, tells these places:

| column | |
|---|---|
| `checkpoint`, `first_example` | which segment: number of the checkpoint, and what the segment's name ends with |
| `token_id` | ascending |
| `first_row`, `num_rows` | rows `[first_row, first_row + num_rows)` of the segment, all of one row group |
| `grad_byte`, `example_byte` | where in the file the first of them begins, and its example id |
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hf_doge.artifacts.parquet import to_parquet
from hf_doge.functional.layers import projection_matrix
from hf_doge.text import printable

ROW_GROUP_SIZE = 16_384  # what DuckDB and the Hub's viewer read fastest
_OFFSETS_GROUP_SIZE = 2**20
# Plain float16: split into streams of bytes it would be 6 % smaller, but neither DuckDB nor Polars reads that
# (https://github.com/duckdb/duckdb/issues/17114, https://github.com/pola-rs/polars/issues/21803).
_GRAD = "grad.list.element"
_VALUES = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8()}
EXAMPLE = "example_id"
_LARGEST_EXPONENT = 15  # rows are scaled to have their largest number in [2 ** 14, 2 ** 15); float16 ends at 2 ** 16
_LARGEST_SCALE = 64  # as a power of two; leaves room for sums of scaled products in float32
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
    segment_scale = scale if isinstance(scale, float) else 1.0
    if dtype != "float32":
        columns["scale"] = pa.array(np.full(num_rows, scale, dtype=np.float32))
    table = pa.table(columns)
    metadata = {"hf_doge": json.dumps({**facts, "scale": segment_scale}, sort_keys=True)}
    table = table.replace_schema_metadata(metadata)
    ordering = pq.SortingColumn.from_ordering(table.schema, [("token_id", "ascending"), ("example_id", "ascending")])
    row_bytes = width * stored.element_size()
    group_rows = min(ROW_GROUP_SIZE, max(1, LARGEST_PAGE // row_bytes))
    readable = dtype != "int8"
    content = to_parquet(
        table,
        compression={name: "zstd" for name in columns if name not in ("grad", EXAMPLE)} if readable else "zstd",
        # Bytes are four times as large in Parquet, which has none, unless they are entries of a dictionary.
        use_dictionary=["token_id"] if readable else ["token_id", _GRAD],
        write_statistics=[name for name in columns if name != "grad"],  # nobody looks for the range of a gradient
        row_group_size=group_rows,
        data_page_size=2**31 - 1 if readable else None,
        sorting_columns=ordering,
    )
    if not readable:
        return EncodedSegment(content, None, segment_scale)
    values = {_GRAD: stored.numpy(), EXAMPLE: examples[order]}
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
    for name, column in (("grad_byte", _GRAD), ("example_byte", EXAMPLE)):
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
                    " another way. Please report this, and install pyarrow 26 until it is fixed."
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


def segment_schema(dtype: str, width: int, example_type: str) -> pa.Schema:
    """The columns of a segment file."""
    fields = {
        "checkpoint": pa.int32(),
        "token_id": pa.int32(),
        EXAMPLE: pa.type_for_alias(example_type),
        "grad": pa.list_(_VALUES[dtype], width),
    }
    return pa.schema(fields if dtype == "float32" else fields | {"scale": pa.float32()})


def describe_schema(schema: pa.Schema) -> str:
    """Names and types, on one line."""
    return printable(", ".join(f"{field.name} {field.type}" for field in schema))


def projection_sha256(matrix: Tensor) -> str:
    """Checksum of the signs."""
    return hashlib.sha256((matrix > 0).numpy().tobytes()).hexdigest()


def describe_projection(
    width: int, projected_width: int | None, seed: int, *, kind: str = "random"
) -> dict[str, Any] | None:
    """
    What config.json says of a projection; None where there is none.

    Raises:
        ValueError: Its width is not given.
    """
    if projected_width is None and kind != "random":
        raise ValueError(f"`projection={kind!r}` needs a `projection_width`: so many components are kept. Pass one.")
    if projected_width is None:
        return None
    if kind != "random":  # each checkpoint has its own, which is written
        return {"kind": kind, "width": projected_width, "seed": seed}
    checksum = projection_sha256(projection_matrix(width, projected_width, seed))
    return {"width": projected_width, "seed": seed, "sha256": checksum}


def recorded_projection(config: Mapping[str, Any]) -> Tensor | None:
    """
    The random projection that config.json tells of; None where there is none.

    Raises:
        ValueError: It cannot be drawn again.
    """
    asked = config.get("projection")
    if asked is None or "kind" in asked:
        return None
    matrix = projection_matrix(config["width"], asked["width"], asked["seed"])
    if projection_sha256(matrix) != asked["sha256"]:
        raise ValueError(
            f"The projection of the index must be drawn again for queries, but torch {torch.__version__} draws another"
            f" than hf_doge {printable(config.get('hf_doge_version'))[:40]} did then. Use the torch it was made with."
        )
    return matrix


def encode_rows(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor | float]:
    """
    Rows of one segment to their stored form; `stored / scale` gives them back.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, stored_width)` and dtype float32): Finite.
        dtype (`str`): `"float32"`, `"float16"` (times a power of two, so that tiny gradients stay) or `"int8"`.

    Returns:
        `tuple`: the stored rows, and their scale: one number, or for int8 a float32 tensor of shape `(num_rows,)`.
    """
    if dtype == "float32":
        return rows, 1.0
    if dtype == "float16":
        largest = _largest(rows)
        exponent = _LARGEST_EXPONENT - math.frexp(largest)[1] if largest > 0 else 0
        scale = math.ldexp(1.0, min(exponent, _LARGEST_SCALE))
        return (rows * scale).half(), scale
    largest = torch.linalg.vector_norm(rows, ord=math.inf, dim=1)
    scales = torch.where(largest > 0, (127 / largest).clamp(max=2.0**_LARGEST_SCALE), 1.0)
    return (rows * scales[:, None]).round_().to(torch.int8), scales


def _largest(rows: Tensor) -> float:
    if rows.numel() == 0:
        return 0.0
    smallest, largest = rows.aminmax()
    return max(float(largest), -float(smallest))
