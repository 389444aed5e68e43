"""Reading the JSON files of a checkpoint: what is damaged is refused by the file's name."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from hf_doge.checks import show
from hf_doge.entries import Kind, find_misfit
from hf_doge.text import parse_json


def read_entries(
    path: Path, kinds: Mapping[str, Kind] | None = None, *, optional: Container[str] = ()
) -> dict[str, Any]:
    """
    What a JSON file of a checkpoint holds.

    Args:
        path (`Path`): The file.
        kinds (mapping of `str` to [`~hf_doge.entries.Kind`], *optional*): What entries must be.
        optional (container of `str`): Entries that may be missing.

    Raises:
        `ValueError`: if it is damaged. Names the file.
    """
    entries = parse_json(path.read_bytes(), source=str(path))
    if not isinstance(entries, dict):
        raise damaged(path, f"it holds {show(entries)} instead of an object")
    if misfit := find_misfit(entries, kinds or {}, optional=optional):
        raise damaged(path, misfit)
    return entries


def damaged(path: Path, problem: str) -> ValueError:
    """The error of a file of a checkpoint that holds what no run writes."""
    return ValueError(
        f"{str(path)!r} must be as the run wrote it, but {problem}. Resume from another checkpoint, or restore the file."
    )
