"""Files of records, one JSON object on a line, whole or gzip."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """
    All records of a JSONL file, `.gz` or not.

    Raises:
        `FileNotFoundError`: if it is not there.
        `ValueError`: for a line that is not a JSON object, naming file and line, and for a file without any.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The data file must exist, but {str(path)!r} does not. Check the path.")
    try:
        records = list(_read_lines(path))
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"A data file must be whole UTF-8 text, but {str(path)!r} is not: {error}.") from error
    if not records:
        raise ValueError(f"A data file must hold at least one record, but {str(path)!r} is empty.")
    return records


def select_fields(
    record: dict[str, Any], *, text_fields: list[str], label_field: str | None, where: str
) -> dict[str, Any]:
    """
    The texts of a record under their own names, and its label as `label`.

    Raises:
        `ValueError`: if a field is missing or a text is not one. Names `where`.
    """
    for name in text_fields:
        if not isinstance(record.get(name), str):
            raise ValueError(f"Every record must have a text in {name!r}, but {where} has {record.get(name)!r:.60}.")
    selected = {name: record[name] for name in text_fields}
    if label_field is not None:
        if not isinstance(record.get(label_field), int | str):
            raise ValueError(
                f"Every record must have a label, a whole number or a name, in {label_field!r}, but {where} has "
                f"{record.get(label_field)!r:.60}. Name the field with `--label_field`."
            )
        selected["label"] = record[label_field]
    return selected


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(
                    f"Every line must be a JSON object, but line {number} of {str(path)!r} is {line[:60]!r}. Correct or "
                    "remove it."
                )
            yield record
