"""
The README.md of an artifact: YAML and a block between our markers are ours, the rest is the person's.

The YAML is written so that every parser reads the same, and changed in our keys alone. It says of the Parquet files what
`load_dataset` then need not look up and can check.
"""

import hashlib
import re
import sys
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hf_doge.text import SafeLoader, check_yaml, printable

BEGIN = "<!-- begin hf_doge: written again with the artifact; what you write above or below stays -->"
END = "<!-- end hf_doge -->"

_BEGIN = re.compile(r"<!-- begin hf_doge\b[^>\n]*-->")
_HEADER = re.compile(r"\A\s*---[ \t]*\n(?:(.*?)\n)??---[ \t]*(?:\n|\Z)", flags=re.DOTALL)


@dataclass(frozen=True)
class Card:
    """
    What we would say, for a card that may be there already.

    Args:
        header (`dict[str, Any]`): YAML of a new card. `configs`, `dataset_info` and `size_categories` are kept up to date,
            `tags` united with those there; all other keys are the person's once the card exists.
        title (`str`): Heading of a new card; later the person's.
        block (`str`): Markdown between the markers.
        config_names (`tuple[str, ...]`): Names in `configs` and `dataset_info` that are ours.
        draft (`str`, *optional*): The card where the artifact was made, for a place that has none.
    """

    header: dict[str, Any]
    title: str
    block: str
    config_names: tuple[str, ...]
    draft: str | None = None

    def merged_with(self, existing: str | None) -> str:
        """The card to write: `existing`, with a warning, if its YAML cannot be read or our markers are gone from it."""
        existing = self.draft if existing is None else existing
        if existing is None or not existing.strip():
            return self._assemble(dump_header(self.header), self._new_body())
        newline = "\r\n" if "\r\n" in existing else "\n"
        text = existing.removeprefix("\ufeff").replace("\r\n", "\n")
        header, body = split_card(text)
        try:
            found = parse_header(header)
            merged_header = update_header(header, self._changes(found))
        except HeaderError as error:
            self._warn(f"it is kept as it is, since {error}. Let it say")
            return existing
        merged_body = self._new_body() if not body.strip() else self._replace_block(body)
        if merged_body is None:
            renewed, found = self._with_new_digests(existing, found)
            missing = {key: value for key, value in self._changes(found).items() if found.get(key) != value}
            if missing:
                self._warn(
                    "its hf_doge markers are gone, so it is kept as it is, but for digests of the data. For `load_dataset`, let its YAML say"
                )
            return renewed
        return self._assemble(merged_header, merged_body).replace("\n", newline)

    def _changes(self, found: dict[str, Any]) -> dict[str, Any]:
        changes: dict[str, Any] = {
            key: merge_entries(found.get(key), self.header[key], names=self.config_names)
            for key in ("configs", "dataset_info")
            if key in self.header
        }
        if "size_categories" in self.header:
            changes["size_categories"] = self.header["size_categories"]
        changes["tags"] = unite(found.get("tags"), self.header.get("tags", ()))
        return changes

    def _with_new_digests(self, card: str, found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A person's card and its YAML with our digests brought up to date: the old ones let `load_dataset` read old data."""
        own = {entry["config_name"]: entry[DIGEST_KEY] for entry in self.header.get("configs", ())}
        entries = found["configs"] if isinstance(found.get("configs"), list) else []
        for position, entry in enumerate(entries):
            told, digest = (
                (entry.get(DIGEST_KEY), own.get(entry.get("config_name"))) if isinstance(entry, dict) else ("", "")
            )
            if digest and isinstance(told, str) and told.startswith(DIGEST_PREFIX):
                card = card.replace(told, digest, 1)
                entries = [*entries[:position], {**entry, DIGEST_KEY: digest}, *entries[position + 1 :]]
        return card, {**found, **({"configs": entries} if entries else {})}

    def _new_body(self) -> str:
        return f"\n# {self.title}\n\n{self._marked_block()}\n"

    def _marked_block(self) -> str:
        return f"{BEGIN}\n\n{self.block.strip()}\n\n{END}"

    def _replace_block(self, body: str) -> str | None:
        """The body with our block in its place; `None` where the markers are not there, one of each in order."""
        begins = list(_BEGIN.finditer(body))
        if len(begins) != 1 or body.count(END) != 1 or body.index(END) < begins[0].end():
            return None
        return body[: begins[0].start()] + self._marked_block() + body[body.index(END) + len(END) :]

    def _assemble(self, header: str, body: str) -> str:
        return f"---\n{header}---\n{body}"

    def _warn(self, what: str) -> None:
        needed = {key: value for key, value in self.header.items() if key in ("configs", "dataset_info", "tags")}
        warnings.warn(f"README.md was edited: {what}\n{dump_header(needed)}", stacklevel=_levels_to_caller())


def read_card(path: Path) -> str | None:
    """The card that is there."""
    return card_text(path.read_bytes()) if path.exists() else None


def card_text(content: bytes) -> str:
    """A card from the content of a file; bytes that are no UTF-8 come back by [`card_bytes`]."""
    return content.decode("utf-8", errors="surrogateescape")


def card_bytes(card: str) -> bytes:
    """A card as the content of a file."""
    return card.encode("utf-8", errors="surrogateescape")


def split_card(text: str) -> tuple[str, str]:
    """The YAML of a card, without its `---`, and the rest."""
    match = _HEADER.match(text)
    if match is None:
        return "", text
    return f"{match[1]}\n" if match[1] else "", text[match.end() :]


def _levels_to_caller() -> int:
    """How far up is the first line that is not of this package: cards are written below saving, pushing and training."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "hf_doge":
        level, frame = level + 1, frame.f_back
    return level


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
    options: dict[str, Any] = {"Dumper": _Dumper, "sort_keys": False, "width": 10**9}
    text = yaml.dump(dict(content), allow_unicode=True, **options)
    # Invisible characters are written as escapes, which takes all others beyond ASCII along.
    return text if printable(text, keep="\n") == text else yaml.dump(dict(content), **options)


def update_header(text: str, changes: Mapping[str, Any]) -> str:
    """
    A header with some keys replaced or added; the lines of the others, comments and order stay.

    Args:
        text (`str`): The header, without its `---`.
        changes (`Mapping`): Key -> new value.

    Raises:
        HeaderError: It is not YAML, or is no mapping of names.
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
    `configs` or `dataset_info` with our entries and, after them, all other entries.

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
    entries_of_ours = [dict(entry) for entry in own]
    if any(entry.get("default") for entry in others):  # of several, `load_dataset` takes none
        for entry in entries_of_ours:
            entry.pop("default", None)
    return [*entries_of_ours, *others]


def unite(found: Any, own: Iterable[str]) -> list[Any]:
    """What is there, and what of ours is not."""
    found = [] if found is None else found if isinstance(found, list) else [found]
    return [*found, *(one for one in own if one not in found)]


def size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows, as `1K<n<10K`."""
    names = [f"n<{_SIZES[0]}", *(f"{least}<n<{most}" for least, most in pairwise(_SIZES)), f"n>{_SIZES[-1]}"]
    return names[bisect_right([10 ** (3 + power) for power in range(len(_SIZES))], num_rows)]


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


@dataclass(frozen=True)
class TableFacts:
    """
    What is added up over the files of one configuration.

    Attributes:
        schema (`pyarrow.Schema`): Schema that all files share.
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

    def to_dataset_info(self, config_name: str) -> dict[str, Any]:
        """The entry of `dataset_info`, in terms of YAML, as `Dataset.push_to_hub` would write it."""
        return {
            "config_name": config_name,
            "features": _features(self.schema),
            "splits": [{"name": "train", "num_bytes": self.num_bytes, "num_examples": self.num_rows}],
            "download_size": self.file_bytes,
            "dataset_size": self.num_bytes,
        }


def data_header(
    tables: Mapping[str, TableFacts],
    paths: Mapping[str, list[str]],
    checksums: Mapping[str, Iterable[str]],
    *,
    default: str,
) -> dict[str, Any]:
    """
    What the header of any artifact says of its data.

    `load_dataset` caches what it reads of a folder by the content of `configs` and `dataset_info`, not by that of the files.
    So an entry of `configs` changes with the checksums of its files, or a table that is saved over would be read old.

    Args:
        tables (`Mapping[str, TableFacts]`): Name of each configuration -> what its files hold.
        paths (`Mapping[str, list[str]]`): Name -> the files of its one split, or patterns of them.
        checksums (`Mapping[str, Iterable[str]]`): Name -> sha256 of its files.
        default (`str`): The configuration that is read if none is named, and by which the size counts.
    """
    configs = []
    for name in tables:
        files = {"split": "train", "path": paths[name][0] if len(paths[name]) == 1 else paths[name]}
        content = hashlib.sha256("".join(checksums[name]).encode()).hexdigest()
        entry = {"config_name": name, **({"default": True} if name == default else {})}
        configs.append({**entry, DIGEST_KEY: f"{DIGEST_PREFIX}{content[:32]}", "data_files": [files]})
    return {
        "size_categories": [size_category(tables[default].num_rows)],
        "library_name": "hf_doge",
        "configs": configs,
        "dataset_info": [facts.to_dataset_info(name) for name, facts in tables.items()],
    }


def _features(schema: pa.Schema) -> list[dict[str, Any]]:
    """The columns as `datasets` names them in YAML."""
    from datasets import Features
    from datasets.info import DatasetInfo, DatasetInfosDict
    from huggingface_hub import DatasetCardData

    card = DatasetCardData()
    info = DatasetInfo(features=Features.from_arrow_schema(schema))
    DatasetInfosDict({"default": info}).to_dataset_card_data(card)
    return card["dataset_info"]["features"]


@lru_cache(maxsize=4096)
def _read_once(path: Path, size: int, mtime: int, row_bytes: float | None) -> TableFacts:
    """Facts of a file of this size and time: an index writes its card at each checkpoint, and earlier files are unchanged."""
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
