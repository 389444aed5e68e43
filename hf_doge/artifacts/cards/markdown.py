"""Names and numbers of others as Markdown that shows them as they are."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_doge.artifacts.cards.merge import escape_markers
from hf_doge.text import printable

_SPECIAL = re.compile(r"([\\`*\[\]|~$])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_MOST_ROWS, _MOST_LINES, _LONGEST_LINE = 200, 400, 2000  # beyond which nobody reads a card
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escape(text: Any) -> str:
    """Text on one line in which nothing is markup: not the bar that ends a cell of a table, no tag, link or formula."""
    line = printable(re.sub(r"[ \t\r\n]+", " ", str(text)).strip())
    line = _SPECIAL.sub(lambda match: f"\\{match[0]}", line)
    line = re.sub(r"[&<>]", lambda match: _ENTITIES[match[0]], line)
    return re.sub(r"(?i)(?<=www)\.|:(?=//)", lambda match: f"&#{ord(match[0])};", line)  # no address becomes a link


def code(text: Any) -> str:
    """Text on one line as code: between more backticks than it has in a row, a bar escaped for the cell of a table."""
    line = escape_markers(printable(text)).replace("|", "\\|") or " "
    ticks = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def table(columns: Mapping[str, Sequence[Any]]) -> str:
    """
    Equally long columns under their titles, the first to the left, the others to the right. Cells are escaped. Of many rows
    the first are shown, and a note says how many were left out.
    """
    rows = list(zip(*columns.values(), strict=True))
    lines = [" | ".join(columns), " | ".join(["---", *["---:"] * (len(columns) - 1)])]
    lines += [" | ".join(escape(cell) for cell in row) for row in rows[:_MOST_ROWS]]
    return "\n".join(f"| {line} |" for line in lines) + _left_out(len(rows) - _MOST_ROWS, "rows")


def json_block(content: Any) -> str:
    """A fenced block of readable JSON, that no text in it can end."""
    lines = printable(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False), keep="\n").splitlines()
    text = "\n".join(line[:_LONGEST_LINE] for line in lines[:_MOST_LINES])
    left_out = _left_out(len(lines) - _MOST_LINES, "lines")
    return f"```json\n{text.replace('<!--', chr(92) + 'u003c!--')}\n```{left_out}"


def names_of(names: Sequence[Any], shown: int = 8) -> str:
    """Some names, escaped, and how many more there are."""
    return ", ".join(map(escape, names[:shown])) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def _left_out(number: int, what: str) -> str:
    return (
        f"\n\n{number:,} more {what} are left out here; the files next to this card have them all."
        if number > 0
        else ""
    )


def code_block(text: str, language: str = "text") -> str:
    """A fenced block of text, with a fence longer than any in it."""
    text = printable(text, keep="\n")
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{escape_markers(text)}\n{fence}"


def seconds(number: float) -> str:
    """A duration as a person says it."""
    if number < 120:
        return f"{number:.3g} s"
    if number < 7200:
        return f"{number / 60:.3g} minutes"
    return f"{number / 3600:,.1f} hours"
