"""The YAML at the head of a card: written so that every parser reads the same, and changed in our keys alone."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from hf_doge.text import SafeLoader, check_yaml, printable

DIGEST_KEY = "description"  # a field of every `datasets.BuilderConfig`, without effect on what is read
DIGEST_PREFIX = "Content "
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 takes for a number, as the Hub's parser does, and repeats rather than refers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"0o[0-7]+$"), ["0"])


class HeaderError(ValueError):
    """The head of a card is not YAML, or is no mapping of names."""


def parse_header(text: str) -> dict[str, Any]:
    """
    The content of a header.

    Raises:
        HeaderError: It is not YAML, or is no mapping of names.
    """
    try:
        check_yaml(text)
        content = yaml.load(text, Loader=SafeLoader)  # a safe one
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates that are none and numbers without end
        raise HeaderError(f"the YAML at its head cannot be read: {printable(error, keep=chr(10))}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise HeaderError("the YAML at its head is no mapping of names")
    return content


def dump_header(content: Mapping[str, Any]) -> str:
    """Block YAML in the order of the keys, ending in a line break; nothing of nothing."""
    if not content:
        return ""
    options = {"Dumper": _Dumper, "sort_keys": False, "width": 10**9}
    text = yaml.dump(dict(content), allow_unicode=True, **options)
    # Characters that nobody sees are written as escapes, which takes all others beyond ASCII along.
    return text if printable(text, keep="\n") == text else yaml.dump(dict(content), **options)


def update_header(text: str, changes: Mapping[str, Any]) -> str:
    """
    A header with some keys replaced or added; the lines of the others, comments and order stay.

    Args:
        text (`str`): The header, without its `---`.
        changes (`Mapping`): Key -> new value.

    Raises:
        HeaderError: As [`parse_header`].
    """
    content = parse_header(text)
    changes = {key: value for key, value in changes.items() if key not in content or content[key] != value}
    if not changes:
        return text
    expected = {**content, **changes}
    updated = _replace_lines(text, changes)
    try:
        right = parse_header(updated) == expected
    except HeaderError:
        right = False
    # Braces around everything, or a value that others refer to: then only the content can be kept, not the lines.
    return updated if right else dump_header(expected)


def merge_entries(found: Any, own: Iterable[Mapping[str, Any]], *, names: Iterable[str]) -> list[dict[str, Any]]:
    """
    `configs` or `dataset_info` with our entries and, after them, the entries of somebody else.

    Args:
        found: What the card says now: a list of entries, one alone, or anything.
        own (`Iterable[Mapping]`): Our entries, each with a `config_name`.
        names (`Iterable[str]`): Names that are ours, whether there is an entry now or not.
    """
    entries = found if isinstance(found, list) else [found]
    others = [
        dict(entry)
        for entry in entries
        if isinstance(entry, dict) and entry.get("config_name", "default") not in set(names)
    ]
    own = [dict(entry) for entry in own]
    if any(entry.get("default") for entry in others):  # of several, `load_dataset` takes none
        for entry in own:
            entry.pop("default", None)
    return [*own, *others]


def unite(found: Any, own: Iterable[str]) -> list[Any]:
    """What is there, and what of ours is not."""
    found = [] if found is None else found if isinstance(found, list) else [found]
    return [*found, *(one for one in own if one not in found)]


def size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows, as `1K<n<10K`."""
    bounds = [10 ** (3 + power) for power in range(len(_SIZES))]
    if num_rows < bounds[0]:
        return f"n<{_SIZES[0]}"
    for position in range(1, len(_SIZES)):
        if num_rows < bounds[position]:
            return f"{_SIZES[position - 1]}<n<{_SIZES[position]}"
    return f"n>{_SIZES[-1]}"


def _replace_lines(text: str, changes: Mapping[str, Any]) -> str:
    """Lines of changed keys replaced where they stand, new keys at the end."""
    root = yaml.compose(text, Loader=SafeLoader)
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    pending = dict(changes)
    pieces, position = [], 0
    for key, value in root.value if root is not None else ():
        if key.value not in changes:
            continue
        first, last = key.start_mark.line, value.end_mark.line + (value.end_mark.column > 0)
        last = max(last, first + 1)
        while last > first + 1 and (not lines[last - 1].strip() or lines[last - 1].startswith("#")):
            last -= 1  # what stands between two keys belongs to the next
        pieces += lines[position:first]
        if key.value in pending:
            pieces.append(dump_header({key.value: pending.pop(key.value)}))
        position = last
    return "".join([*pieces, *lines[position:], dump_header(pending)])
