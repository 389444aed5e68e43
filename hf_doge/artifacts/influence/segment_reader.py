"""Reading the files that [`segments`] writes, rows and offsets: piece by piece, and believing nothing of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_doge.artifacts.influence.manifest import example_dtype
from hf_doge.artifacts.influence.segments import (
    EXAMPLE,
    LARGEST_PAGE,
    OFFSETS_SCHEMA,
    ROW_GROUP_SIZE,
    describe_schema,
    segment_schema,
)
from hf_doge.artifacts.parquet import check_claims_of_footer, open_parquet, read_parquet
from hf_doge.text import parse_json

_MAGIC_BYTES = 4  # that a Parquet file begins with


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
            ascending = len(tokens) == 0 or (tokens[0] >= last and (tokens[1:] >= tokens[:-1]).all())
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
            tokens, examples = batch.column("token_id").to_numpy(), batch.column(EXAMPLE).to_numpy()
            self._require(
                len(examples) == 0 or first <= examples.min() <= examples.max() < end,
                f"`{EXAMPLE}` must be in [{first}, {end})",
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
            for batch in file.iter_batches(batch_size=ROW_GROUP_SIZE, columns=columns, use_threads=False):
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
        self._require(max(groups, default=0) <= ROW_GROUP_SIZE, f"groups must have at most {ROW_GROUP_SIZE} rows")
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
        checkpoint (`int`): Number of the checkpoint, see [`checkpoint_number`].
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
    named = path.stem.rpartition("-")[2]  # an entry may begin earlier, with examples that have no rows
    first = int(named) if named.isdecimal() else runs["first_example"][:1]
    require(
        (runs["first_example"] == first).all(), "`first_example` must be that of its segment, which its name ends with"
    )
    require((counts >= 1).all(), "`num_rows` must be at least 1")
    require((counts.sum() == file["num_rows"]), f"`num_rows` must add up to {file['num_rows']}")
    if not num_runs:
        return runs
    require(
        tokens[0] >= 0 and tokens[-1] < config["vocabulary_size"] and (tokens[1:] >= tokens[:-1]).all(),
        f"`token_id` must ascend within [0, {config['vocabulary_size']})",
    )
    require((runs["first_row"] == np.cumsum(counts) - counts).all(), "`first_row` must count the rows before")
    require(counts.max() * row_bytes <= max(LARGEST_PAGE, row_bytes), "no run may exceed a row group")
    by_token = np.add.reduceat(counts, np.flatnonzero(np.append(True, np.diff(tokens) > 0)))
    require(by_token.max() <= file["num_examples"], "no token may have more rows than there are examples")
    gaps = []
    for name, size in (("grad_byte", row_bytes), ("example_byte", id_bytes)):
        starts = runs[name]
        gaps.append(starts[1:] - starts[:-1] - counts[:-1] * size)
        require(
            starts[0] >= _MAGIC_BYTES and (gaps[-1] >= 0).all(),
            f"`{name}` must ascend from run to run by the size of its rows at least",
        )
        require(starts[-1] < 2**62, f"`{name}` must be a place in a file")
        end = int(starts[-1] + counts[-1] * size)
        require(
            segment_bytes is None or end <= segment_bytes, f"`{name}` must lie in the file of {segment_bytes} bytes"
        )
    require(((gaps[0] > 0) == (gaps[1] > 0)).all(), "both places must leave something out between row groups alone")
    return runs
