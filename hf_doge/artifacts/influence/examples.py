"""The table of an index's training examples."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_doge.artifacts.influence.manifest import EXAMPLES_FILE, examples_files, first_added_example
from hf_doge.artifacts.parquet import as_stored, check_claims_of_footer, open_parquet, read_parquet, to_parquet
from hf_doge.checks import check_names, require_printable
from hf_doge.files import sha256, write_atomically
from hf_doge.text import parse_json

_PLAIN_FEATURES = {"Value", "ClassLabel", "List", "LargeList", "Sequence", "Array2D", "Array3D", "Array4D", "Array5D"}


def ordered_examples(table: pa.Table, num_examples: int) -> pa.Table:
    """
    The table by ascending `example_id`.

    Raises:
        ValueError: The column is missing, or does not hold each of `0 ... num_examples - 1` once.
    """
    if "example_id" not in table.column_names:
        raise ValueError(f"The examples must have a column `example_id`, but they have {table.column_names}.")
    require_printable("Columns of the examples", table.column_names)
    position = table.column_names.index("example_id")
    table = table.set_column(position, "example_id", pc.cast(table["example_id"], pa.int64()))
    ids = table["example_id"].to_numpy()
    unknown = ids[(ids < 0) | (ids >= num_examples)]
    if len(unknown):
        raise ValueError(f"Each `example_id` must be in [0, {num_examples}), but got {unknown[:5].tolist()}.")
    counts = np.bincount(ids, minlength=num_examples)
    for problem, wrong in (("repeat", counts > 1), ("are missing", counts == 0)):
        if wrong.any():
            raise ValueError(
                f"Each `example_id` in [0, {num_examples}) must be there once, but {np.flatnonzero(wrong)[:5].tolist()}"
                f" {problem}."
            )
    return table if (np.diff(ids) > 0).all() else table.take(pa.array(np.argsort(ids)))


def store_examples(folder: Path, config: Mapping[str, Any], table: pa.Table) -> dict[str, str]:
    """
    Write the files of the examples, unless they are there.

    Args:
        folder (`Path`), config (`Mapping`): The index, and the content of its config.json.
        table (`pyarrow.Table`): All examples, by ascending `example_id`.

    Returns:
        `dict[str, str]`: path and sha256 of what was written.

    Raises:
        ValueError: The index has other examples already.
    """
    recorded = {path: checksum for path, checksum in examples_files(config).items() if checksum is not None}
    there = all((folder / path).is_file() and sha256(folder / path) == recorded[path] for path in recorded)
    contents: dict[str, bytes] = {}
    if recorded and there:
        same = same_examples(table, read_examples(folder, config))  # bytes may differ with the version of pyarrow
    else:
        contents = _example_contents(table, list(recorded) or [EXAMPLES_FILE])
        same = not recorded or recorded == {path: sha256(content) for path, content in contents.items()}
    if not same:
        raise ValueError(
            f"The influence index in {str(folder)!r} has other examples already. Continue it with the dataset it was begun"
            " with, or choose another folder."
        )
    for path, content in contents.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_atomically(folder / path, content)
    return {path: sha256(content) for path, content in contents.items()}


def _example_contents(table: pa.Table, paths: Sequence[str]) -> dict[str, bytes]:
    """The files of all examples: those of an index that was made at once, and those that were added later."""
    starts = [0, *(first_added_example(path) for path in paths[1:]), len(table)]
    return {
        path: to_parquet(table.slice(first, last - first))
        for path, (first, last) in zip(paths, pairwise(starts), strict=True)
    }


def same_examples(table: pa.Table, stored: pa.Table) -> bool:
    """Whether a table holds what was read of the files of an index."""
    if table.equals(stored):
        return True
    # As it would be read, and by content, as a number that is missing (NaN) does not equal itself.
    contents = [to_parquet(one.combine_chunks().replace_schema_metadata()) for one in (as_stored(table), stored)]
    return contents[0] == contents[1]


def check_number_of_examples(folder: Path, config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: The files of the examples hold another number of them than config.json claims. Scores take memory for
            each.
    """
    found = 0
    for path in examples_files(config):
        with open_parquet(folder / path, str(folder / path)) as file:
            check_claims_of_footer(file, str(folder / path), (folder / path).stat().st_size)
            found += file.metadata.num_rows
    if found != config["num_examples"]:
        raise ValueError(
            f"The index in {str(folder)!r} must have {config['num_examples']} examples, as its config.json says, but its"
            f" files {list(examples_files(config))} have {found}. Fetch it again."
        )


def read_examples(folder: Path, config: Mapping[str, Any]) -> pa.Table:
    """
    All examples, row `i` being example `i`.

    Raises:
        ValueError: They are not those that config.json claims.
    """
    check_number_of_examples(folder, config)
    first = 0
    tables: list[pa.Table] = []
    for path in examples_files(config):
        table = read_parquet(folder / path, str(folder / path))
        check_names(table.column_names, what=f"Columns in {str(folder / path)!r}")
        ids = table["example_id"].to_numpy() if "example_id" in table.column_names else None
        if ids is None or not np.array_equal(ids, np.arange(first, first + len(table))):
            raise ValueError(
                f"{str(folder / path)!r} must have the examples {first} to {first + len(table) - 1} in this order, but does"
                " not. It is damaged or was manipulated: fetch the index again."
            )
        if tables and table.schema != tables[0].schema:
            raise ValueError(
                f"{str(folder / path)!r} must have the columns of the other examples, but differs. It is damaged or was"
                " manipulated: fetch the index again."
            )
        tables.append(table)
        first += len(table)
    return pa.concat_tables(tables).replace_schema_metadata(harmless_metadata(tables[0].schema))


def harmless_metadata(schema: pa.Schema) -> dict[bytes, bytes]:
    """
    What a file of examples says of its columns to `datasets`, without images, audio and any other type that would be decoded
    when a row is read: decoding fetches the addresses that the file gives. Such columns are plain, with the path as text.
    """
    try:
        noted = parse_json((schema.metadata or {})[b"huggingface"], source="the metadata of the examples")
        features = noted["info"]["features"].items()
    except (KeyError, TypeError, AttributeError, ValueError):  # none, or none that `datasets` wrote
        return {}
    kept = {name: feature for name, feature in features if _types(feature) <= _PLAIN_FEATURES}
    return {b"huggingface": json.dumps({"info": {"features": kept}}).encode()}


def _types(feature: Any) -> set[str]:
    """Names of all types in a feature, as its JSON has them, nested ones too."""
    if isinstance(feature, list):
        return set().union(*map(_types, feature))
    if not isinstance(feature, dict):
        return set()
    own = {feature["_type"]} if isinstance(feature.get("_type"), str) else set()
    return own.union(*map(_types, feature.values()))
