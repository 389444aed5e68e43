"""Cards that two write: what stands between our markers is ours, the rest is the person's."""

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_doge.artifacts.cards.header import (
    DIGEST_KEY,
    DIGEST_PREFIX,
    HeaderError,
    dump_header,
    merge_entries,
    parse_header,
    unite,
    update_header,
)

BEGIN = "<!-- begin hf_doge: written anew with the artifact; what you write above or below stays -->"
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
    """

    header: dict[str, Any]
    title: str
    block: str
    config_names: tuple[str, ...]

    def merged_with(self, existing: str | None) -> str:
        """The card to write: `existing`, with a warning, if its YAML cannot be read or our markers are gone from it."""
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
        changes = {
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
    """The card that is there, whoever wrote it."""
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


def block_of(text: str) -> str | None:
    """What stands between the markers of a card; `None` where they are not there, one of each in order."""
    begins = list(_BEGIN.finditer(text))
    if len(begins) != 1 or text.count(END) != 1 or text.index(END) < begins[0].end():
        return None
    return text[begins[0].end() : text.index(END)].strip()


def escape_markers(text: str) -> str:
    """Text of others in which no marker can stand."""
    return text.replace("<!--", "<\\!--")


def _levels_to_caller() -> int:
    """How far up is the first line that is not of this package: cards are written below saving, pushing and training."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "hf_doge":
        level, frame = level + 1, frame.f_back
    return level
