"""Where an artifact comes from, without what is nobody else's business: no path of this machine, no token."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_doge._version import __version__
from hf_doge.text import HIDDEN, hide_secrets, names_secret

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub")

_HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+|[^/@]+)@([0-9A-Za-z._-]+)/")
_HUB_NAME = re.compile(r"(datasets/)?[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(@[A-Za-z0-9._/-]+)?")
_SEPARATORS = re.compile(r"(://|[=,;:'\"\n]+)")  # paths come behind them, as in `--data=wiki:/home/me/x`
_PATH_START = r"(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)?[/\\]+(?=[^\s/\\])"
_PATH = re.compile(rf"(?<!\S){_PATH_START}\S+|(?<!\S)~[\w.-]+(?!\S)")


def public_name(name: Any) -> str | None:
    """
    Name of a model, tokenizer or dataset as others may read it: a name on the Hub as it is, of a local path its last part.

    A name counts as a path if it is absolute, does not have the form `name` or `owner/name`, or is here on disk.
    """
    if name is None or not str(name):
        return None
    text = hide_secrets(str(name))
    return text if _HUB_NAME.fullmatch(text) and not _exists(text) else _last_part(text)


def public_content(content: Any) -> Any:
    """
    What JSON holds with every text that is a path cut to its last part, every path within a text likewise, and without
    tokens. For configurations of models, which name where they were loaded from, and arguments.
    """
    if isinstance(content, Mapping):
        return {
            key: HIDDEN if value and isinstance(value, str) and names_secret(str(key)) else public_content(value)
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [public_content(value) for value in content]
    return _shortened(content) if isinstance(content, str) else content


def public_command(arguments: Sequence[str] | None = None) -> str:
    """
    The command line of this process as others may read it: paths cut to their last part, what follows `--hub_token` and
    its like hidden.

    Args:
        arguments (`Sequence[str]`, *optional*): As `sys.argv`, which it is by default.
    """
    import shlex

    first, *rest = list(sys.argv if arguments is None else arguments) or [""]
    module = _module_at(first)
    shown, hide_next = ["python", "-m", module] if module else [_program(first)], False
    for argument in rest:
        flag, is_assignment, _ = argument.partition("=")
        is_secret = names_secret(flag, flag=True)
        if hide_next:
            shown.append(HIDDEN)
        elif is_secret and is_assignment:
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(_shortened(argument))
        hide_next = is_secret and not is_assignment
    return hide_secrets(shlex.join(shown))


def describe_process() -> dict[str, Any]:
    """The command that runs, the versions of what runs it, and when."""
    versions = {"hf_doge": __version__, **{library: version(library) for library in LIBRARIES}}
    return {
        "command": public_command(),
        "versions": dict(
            sorted(versions.items())
        ),  # as JSON of ours has them, so that a card made of either is the same
        "hf_doge_commit": _get_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """
    Which datasets of the Hub it was read from, each `datasets/name@commit`, as far as `load_dataset` noted it; empty for
    others.
    """
    noted = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = (_HUB_FILE.match(str(address)) for address in noted)
    return {"sources": sorted({f"datasets/{match[1]}@{match[2]}" for match in found if match is not None})}


def describe_model(model: Any) -> dict[str, Any]:
    """Class, where its weights began and at which commit of the Hub, and size of a model of torch."""
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "name_or_path": public_name(getattr(config, "name_or_path", None)) or "",
        "revision": getattr(config, "_commit_hash", None),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _shortened(text: str) -> str:
    text = hide_secrets(text)
    pieces = _SEPARATORS.split(text)
    for position in range(0, len(pieces), 2):
        piece, before = pieces[position], pieces[position - 1] if position else ""
        if before == "://" and not pieces[position - 2].endswith("file"):
            continue  # an address
        if re.match(_PATH_START, piece) or before == "://":
            pieces[position] = _last_part(piece)  # whole: names of folders may hold spaces
        else:
            pieces[position] = _PATH.sub(lambda match: _last_part(match[0]), piece)
    return "".join(pieces)


def _last_part(path: str) -> str:
    """Of a path or an address; without what may come behind it in an address."""
    parts = [part for part in re.split(r"[/\\]+", re.sub(r"[?#].*", "", path)) if part.strip("~.:")]
    return parts[-1] if parts else "."


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long for the file system, so no file
        return False


def _module_at(path: str) -> str | None:
    """The module that `python -m` runs from this path; `None` for our own command, which has a name, and for scripts."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not path or spec.origin != path or spec.name.startswith("hf_doge."):
        return None
    return spec.name.removesuffix(".__main__")


def _program(path: str) -> str:
    """`hf-doge`, `train.py`, or what was typed at a prompt."""
    name = Path(path).name
    if name == "__main__.py":
        return Path(path).parent.name.replace("_", "-")
    return name or "python"


@cache
def _get_commit() -> str | None:
    """The commit of hf_doge where it runs from a git checkout of its own; asked for once."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
