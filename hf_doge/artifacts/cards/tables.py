"""What the YAML of a card says of Parquet files, so that `load_dataset` need not look and can check what it loads."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_doge.artifacts.cards.header import DIGEST_KEY, DIGEST_PREFIX, size_category

_INTEGERS = {getattr(pa, name)(): name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16")}
_NAMES = {
    **_INTEGERS,
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.bool_(): "bool",
    pa.string(): "string",
    pa.large_string(): "large_string",
}


@dataclass(frozen=True)
class TableFacts:
    """
    Of the files of one configuration together.

    Attributes:
        schema (`pyarrow.Schema`): Of all files.
        num_rows (`int`): In all files.
        num_bytes (`int`): In memory, as Arrow reads it. Measured on the first row group, for columns of numbers on that of the
            first file alone, and so of larger tables within a few bytes for each file.
        file_bytes (`int`): On disk.
    """

    schema: pa.Schema
    num_rows: int
    num_bytes: int
    file_bytes: int

    @classmethod
    def of(cls, files: Iterable[Path | bytes]) -> "TableFacts":
        """Facts of at least one Parquet file, given by where it is or by its content."""
        facts, row_bytes = [], None
        for file in files:
            if isinstance(file, bytes):
                one = _read(pq.ParquetFile(pa.BufferReader(file)), len(file), row_bytes)
            else:
                status = file.stat()
                one = _read_once(file, status.st_size, status.st_mtime_ns, row_bytes)
            facts.append(one)
            if row_bytes is None and one.num_rows and all(map(_has_fixed_width, one.schema.types)):
                row_bytes = one.num_bytes / one.num_rows
        return cls(
            facts[0].schema,
            sum(one.num_rows for one in facts),
            sum(one.num_bytes for one in facts),
            sum(one.file_bytes for one in facts),
        )

    @property
    def size_category(self) -> str:
        """The Hub's name for a number of rows."""
        return size_category(self.num_rows)

    def to_dataset_info(self, config_name: str) -> dict[str, Any]:
        """The entry of `dataset_info`, in terms of YAML, as `Dataset.push_to_hub` would write it."""
        return {
            "config_name": config_name,
            "features": _features(self.schema),
            "splits": [{"name": "train", "num_bytes": self.num_bytes, "num_examples": self.num_rows}],
            "download_size": self.file_bytes,
            "dataset_size": self.num_bytes,
        }


def config_entry(
    config_name: str, paths: list[str], *, checksums: Iterable[str], default: bool = False
) -> dict[str, Any]:
    """
    The entry of `configs` for files of one split.

    `load_dataset` caches what it reads of a folder by the content of `configs` and `dataset_info`, not by that of the files.
    So the entry changes with the checksums of the files, or a table that is saved over would be read old.
    """
    files = {"split": "train", "path": paths[0] if len(paths) == 1 else paths}
    content = hashlib.sha256("".join(checksums).encode()).hexdigest()
    return {
        "config_name": config_name,
        **({"default": True} if default else {}),
        DIGEST_KEY: f"{DIGEST_PREFIX}{content[:32]}",
        "data_files": [files],
    }


def _features(schema: pa.Schema) -> list[dict[str, Any]]:
    """The columns as `datasets` names them."""
    described = [_feature(field.type) for field in schema]
    if None in described or b"huggingface" in (schema.metadata or {}):  # labels and the like
        from datasets import Features  # takes half a second, which plain columns need not wait for
        from datasets.info import DatasetInfo, DatasetInfosDict
        from huggingface_hub import DatasetCardData

        card = DatasetCardData()
        info = DatasetInfo(features=Features.from_arrow_schema(schema))
        DatasetInfosDict({"default": info}).to_dataset_card_data(card)
        return card["dataset_info"]["features"]
    return [{"name": field.name, **one} for field, one in zip(schema, described, strict=True)]


def _feature(kind: pa.DataType) -> dict[str, Any] | None:
    """A plain value or a list of them; `None` of anything else."""
    if kind in _NAMES:
        return {"dtype": _NAMES[kind]}
    if not pa.types.is_list(kind) and not pa.types.is_fixed_size_list(kind):
        return None
    if kind.value_type not in _NAMES:
        return None
    length = {"length": kind.list_size} if pa.types.is_fixed_size_list(kind) else {}
    return {"list": _NAMES[kind.value_type], **length}


@lru_cache(maxsize=4096)
def _read_once(path: Path, size: int, mtime: int, row_bytes: float | None) -> TableFacts:
    """An index writes its card anew with each checkpoint; the files of earlier ones are as they were."""
    with pq.ParquetFile(path) as file:
        return _read(file, size, row_bytes)


def _read(file: pq.ParquetFile, size: int, row_bytes: float | None) -> TableFacts:
    metadata = file.metadata
    if row_bytes is None and metadata.num_rows:
        # On this thread: a process that ends soon after pyarrow started its reading threads may be aborted at exit.
        row_bytes = file.read_row_group(0, use_threads=False).nbytes / max(1, metadata.row_group(0).num_rows)
    return TableFacts(file.schema_arrow, metadata.num_rows, round((row_bytes or 0) * metadata.num_rows), size)


def _has_fixed_width(kind: pa.DataType) -> bool:
    return _has_fixed_width(kind.value_type) if pa.types.is_fixed_size_list(kind) else pa.types.is_primitive(kind)
