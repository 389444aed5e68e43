"""Where in the segment files the rows of each token lie: reading and checking the offsets tables, see `segments`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_doge.artifacts.influence.manifest import example_dtype
from hf_doge.artifacts.influence.segments import LARGEST_PAGE, OFFSETS_SCHEMA, describe_schema
from hf_doge.artifacts.parquet import open_parquet, read_parquet

_MAGIC_BYTES = 4  # that a Parquet file begins with


def read_offsets(
    path: Path,
    *,
    config: Mapping[str, Any],
    checkpoint: int,
    file: Mapping[str, Any],
    segment_bytes: int | None = None,
) -> dict[str, np.ndarray]:
    """
    The offsets of one segment.

    Args:
        path (`Path`): Their file.
        config (`Mapping`): The content of config.json.
        checkpoint (`int`): Position of the checkpoint.
        file (`Mapping`): The entry of the segment in `config`.
        segment_bytes (`int`, *optional*): Size of the segment file, if that is known.

    Returns:
        `dict[str, numpy.ndarray]`: `token_id`, `num_rows`, `grad_byte` and `example_byte` of each run of rows.

    Raises:
        ValueError: They cannot be those of the segment. Names the file and what is wrong.
    """

    def require(holds: Any, law: str) -> None:
        if not holds:
            raise ValueError(
                f"The offsets in {str(path)!r} are damaged or were manipulated: {law}. Fetch the index again."
            )

    with open_parquet(path, str(path)) as table_file:
        schema = table_file.schema_arrow
        require(
            schema.names == OFFSETS_SCHEMA.names and schema.types == OFFSETS_SCHEMA.types,
            f"columns must be {describe_schema(OFFSETS_SCHEMA)}, but are {describe_schema(schema)}",
        )
        num_runs = table_file.metadata.num_rows
        require(num_runs <= file["num_rows"], f"{num_runs} runs cannot share {file['num_rows']} rows")
    table = read_parquet(path, str(path))
    require(not any(column.null_count for column in table.columns), "no value may be null")
    runs = {name: table[name].to_numpy() for name in table.column_names}
    tokens, counts = runs["token_id"], runs["num_rows"].astype(np.int64)
    row_bytes = config["stored_width"] * np.dtype(config["dtype"]).itemsize
    id_bytes = np.dtype(example_dtype(config)).itemsize
    require((runs["checkpoint"] == checkpoint).all(), f"`checkpoint` must be {checkpoint}")
    require(len(np.unique(runs["first_example"])) <= 1, "`first_example` must be that of one segment")
    require((counts >= 1).all(), "`num_rows` must be at least 1")
    require((counts.sum() == file["num_rows"]), f"`num_rows` must add up to {file['num_rows']}")
    if not num_runs:
        return runs
    require(
        tokens[0] >= 0 and tokens[-1] < config["vocabulary_size"] and (np.diff(tokens) >= 0).all(),
        f"`token_id` must ascend within [0, {config['vocabulary_size']})",
    )
    require((runs["first_row"] == np.cumsum(counts) - counts).all(), "`first_row` must count the rows before")
    require(counts.max() * row_bytes <= max(LARGEST_PAGE, row_bytes), "no run may exceed a row group")
    by_token = np.add.reduceat(counts, np.flatnonzero(np.append(True, np.diff(tokens) > 0)))
    require(by_token.max() <= file["num_examples"], "no token may have more rows than there are examples")
    for name, size in (("grad_byte", row_bytes), ("example_byte", id_bytes)):
        starts = runs[name]
        require(
            starts[0] >= _MAGIC_BYTES and (starts[1:] - starts[:-1] >= counts[:-1] * size).all(),
            f"`{name}` must ascend from run to run by the size of its rows at least",
        )
        require(starts[-1] < 2**62, f"`{name}` must be a place in a file")
        end = int(starts[-1] + counts[-1] * size)
        require(
            segment_bytes is None or end <= segment_bytes, f"`{name}` must lie in the file of {segment_bytes} bytes"
        )
    return runs
