"""The records of a JSONL file, as the commands want them."""

from pathlib import Path
from typing import Any

from hf_doge.artifacts.readers import read_jsonl


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a JSONL file, `.gz` or not, see [`read_jsonl`]."""
    return list(read_jsonl(path))


def check_text_fields(names: list[str] | None) -> list[str] | None:
    """
    What `--text_field` names: the field of a text, or the two of a pair.

    Raises:
        ValueError: There are more, or one twice.
    """
    if names is not None and (len(names) > 2 or len(set(names)) < len(names)):
        raise ValueError(f"`--text_field` must be one field, or the two different ones of a pair, but got {names}.")
    return names


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
        if not isinstance(record.get(label_field), int | float | str | list):
            raise ValueError(
                f"Every record must have a label, a number or a name, in {label_field!r}, but {where} has "
                f"{record.get(label_field)!r:.60}. Name the field with `--label_field`."
            )
        selected["label"] = record[label_field]
    return selected
