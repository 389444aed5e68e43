"""Parts of sentences on where an artifact comes from, the same on all cards."""

from collections.abc import Mapping
from typing import Any

from hf_doge.artifacts.cards.markdown import code_block, escape
from hf_doge.artifacts.cards.rendering import listing
from hf_doge.text import hide_secrets, public_name


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
    """A whole number and what it counts; nothing of anything else."""
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return f"{number:,} {unit}" if unit else f"{number:,}"


def join(*parts: Any) -> str | None:
    """The parts that are there, in a row."""
    return ", ".join(str(part) for part in parts if part) or None


def part_of(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of the metadata; a user's own may have anything there."""
    part = metadata.get(key)
    return dict(part) if isinstance(part, Mapping) else {}


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
