"""What the cards of all artifacts share: names and numbers of others as Markdown that shows them as they are, and the templates."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2

from hf_doge.text import hide_secrets, printable, public_content, public_name

_SPECIAL = re.compile(r"([\\`*\[\]|~$])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_MOST_ROWS, _MOST_LINES, _LONGEST_LINE = 200, 400, 2000  # longer cards are not read
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
    """A fenced block of readable JSON without paths and secrets, that no text in it can end."""
    lines = printable(
        json.dumps(public_content(content), indent=2, sort_keys=True, ensure_ascii=False), keep="\n"
    ).splitlines()
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


def file_size(num_bytes: int) -> str:
    """A number of bytes as a person says it."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1000:.3g} kB"


def format_table(columns: dict[str, list[str]]) -> str:
    """Columns of equally many cells under their titles: the first aligned to the left, the others to the right."""
    lines = []
    for row in zip(*([title, *map(printable, cells)] for title, cells in columns.items()), strict=True):
        lines.append(row)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def escape_markers(text: str) -> str:
    """Text of others in which no marker can stand."""
    return text.replace("<!--", "<\\!--")


def hub_link(name: Any) -> str:
    """A link where it must be a name on the Hub; a name of one part may as well be the last part of a path."""
    shown = public_name(name) or ""
    repository, _, revision = shown.partition("@")
    if "/" not in repository:
        return escape(shown)
    kind = "datasets/" if repository.startswith("datasets/") else ""
    tree = f"/tree/{revision}" if revision else ""
    return f"[{escape(shown.removeprefix(kind))}](https://huggingface.co/{repository}{tree})"


def counted(number: Any, unit: str | None = None) -> str | None:
    """A whole number and what it counts, given in the plural; nothing of anything else."""
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    if unit and number == 1:
        unit = re.sub(r"s\b", "", unit, count=1)
    return f"{number:,} {unit}" if unit else f"{number:,}"


def join(*parts: Any) -> str | None:
    """The parts that are there, in a row."""
    return ", ".join(str(part) for part in parts if part) or None


def part_of(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of the metadata; a user's own may have anything there."""
    part = metadata.get(key)
    return dict(part) if isinstance(part, Mapping) else {}


def named_part(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of the metadata, which of a user's own may be a name alone."""
    return {"name_or_path": metadata[key]} if isinstance(metadata.get(key), str) else part_of(metadata, key)


def sources_of(metadata: Mapping[str, Any]) -> list[str]:
    """Links to the data sets that the metadata name."""
    named = part_of(metadata, "dataset").get("sources")
    return [hub_link(name) for name in named if isinstance(name, str)] if isinstance(named, list | tuple) else []


def revision(facts: Mapping[str, Any]) -> str | None:
    """The commit that a model or tokenizer was read at, if it is known."""
    return f"revision {escape(facts['revision'])}" if facts.get("revision") else None


def run_facts(metadata: Mapping[str, Any], *, written_by: str | None) -> str:
    """Software, commit, date and command, as `describe_process` records them; begins and ends within a list."""
    versions, commit = part_of(metadata, "versions"), metadata.get("hf_doge_commit")
    known = ", ".join(f"{escape(name)} {escape(version)}" for name, version in versions.items())
    facts = listing(
        {
            "Software": known or (f"{escape('hf_doge')} {escape(written_by)}" if written_by else None),
            "Commit of `hf_doge`": escape(commit) if commit else None,
            "Date": escape(metadata["date"]) if metadata.get("date") else None,
        }
    )
    command = metadata.get("command")
    shown = f"\n\nCommand:\n\n{code_block(hide_secrets(str(command)), 'bash')}" if command else ""
    return (f"\n{facts}" if facts else "") + shown


PLACEHOLDER = "path/or/name"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("hf_doge.artifacts.cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown; what others wrote is escaped where it is put into words
    )


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values."""
    return _environment().get_template(template).render(**values).strip()


def place_of(repo_id: str | None) -> dict[str, Any]:
    """What every template says of where the artifact is: its name, and what comes before its paths in SQL."""
    if repo_id is None:
        return {"place": PLACEHOLDER, "root": "", "is_local": True}
    return {"place": repo_id, "root": f"hf://datasets/{repo_id}/", "is_local": False}


def listing(facts: dict[str, str | None]) -> str:
    """A list of what is known, and nothing of what is not."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
