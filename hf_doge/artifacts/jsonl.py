"""Files of records, one JSON object on a line, whole or gzip: the one reader of them."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_doge.checks import is_unicode, show


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """
    The records of a file, one for each line: record `n` (from 1) is of line `n`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a JSON object in UTF-8, repeats a key, or holds NaN or a lone surrogate; or the file is
            empty or cut short. Names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The data file must exist, but {str(path)!r} does not. Check the path.")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _parse_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"A data file must be whole, but {str(path)!r} is not, behind line {number}: {error}."
        ) from error
    if number == 0:
        raise ValueError(f"A data file must hold at least one record, but {str(path)!r} is empty. Fill or remove it.")


def _parse_line(line: bytes, number: int, path: Path) -> dict[str, Any]:
    where = f"line {number} of {str(path)!r}"
    try:
        record = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A data file must be UTF-8 text, but {where} is not: {error}. Correct or remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Every line must be a JSON object, but {where} is {_start(line)}: {error}. Correct or remove it."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"Every line must be a JSON object, but {where} is {_start(line)}. Correct or remove it.")
    if b"\\ud" in line.lower() and not is_unicode(json.dumps(record, ensure_ascii=False)):
        raise ValueError(
            f"Text must be Unicode, but {where} holds a lone surrogate (half of a pair \\ud83d\\ude00). Correct or remove it."
        )
    return record


def _start(line: bytes) -> str:
    return show(line.decode(errors="replace")[:60])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON knows no {name}")
