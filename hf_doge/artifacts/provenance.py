"""Where an artifact comes from: process, dataset and model, without paths of this machine and without tokens."""

import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_doge._version import __version__
from hf_doge.text import HIDDEN, hide_secrets, names_secret, public_name, without_paths

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub")

_HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+|[^/@]+)@([0-9A-Za-z._-]+)/")


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
            shown.append(without_paths(argument))
        hide_next = is_secret and not is_assignment
    return hide_secrets(shlex.join(shown))


def describe_process() -> dict[str, Any]:
    """The command that runs, the versions of what runs it, and when."""
    return {
        "command": public_command(),
        # Sorted as in our JSON, so that a card made of either is the same.
        "versions": dict(sorted({"hf_doge": __version__, **_versions()}.items())),
        "hf_doge_commit": _get_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache  # each is read from a file
def _versions() -> dict[str, str]:
    return {library: version(library) for library in LIBRARIES}


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
