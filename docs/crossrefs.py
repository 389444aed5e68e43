"""
Cross references of docstrings, `[`DomainWeights.save_pretrained`]` and `[`~DomainWeights.save_pretrained`]` (which shows the
last name alone), as the pages resolve them. An extension of griffe.

A name that nothing in the package has ends the build. One that has no page of its own is shown as code.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import griffe

_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
_FOREIGN = ("torch", "transformers", "datasets", "numpy", "pyarrow", "huggingface_hub", "accelerate", "trl")
_RENDERED = re.compile(r"^::: ([\w.]+)", flags=re.MULTILINE)
API = Path(__file__).resolve().parent / "api"


class CrossReferences(griffe.Extension):
    """Rewrites the references of all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Find every name first, for a reference may be to what comes later."""
        rendered = set(_RENDERED.findall("\n".join(page.read_text() for page in API.glob("*.md"))))
        objects = list(_walk(pkg))
        by_name = defaultdict(list)
        for one in objects:
            parts = one.path.split(".")
            for start in range(len(parts)):
                by_name[".".join(parts[start:])].append(one.path)
        for path in rendered:  # what a class inherits is on its page, too
            one = pkg[path.removeprefix(f"{pkg.name}.")]
            if one.is_class:
                for name in one.inherited_members:
                    by_name[f"{one.name}.{name}"].append(f"{path}.{name}")
        for one in objects:
            if one.docstring is not None:
                one.docstring.value = _REFERENCE.sub(
                    lambda match, place=one.path: _resolved(match, place, by_name, rendered), one.docstring.value
                )


def _walk(one: griffe.Object) -> Any:
    yield one
    for member in one.members.values():
        if not member.is_alias:
            yield from _walk(member)


def _resolved(match: re.Match, place: str, by_name: dict[str, list[str]], rendered: set[str]) -> str:
    name = match[2]
    shown = f"`{name.rpartition('.')[2] if match[1] else name}`"
    if name.split(".")[0] in _FOREIGN:
        return shown
    found = by_name.get(name, [])
    if not found and place.count(".") and name.count(".") == 0:  # an argument or attribute of the same object
        return _refuse(name, place)
    if not found:
        return _refuse(name, place)
    near = max(found, key=lambda path: (_is_rendered(path, rendered), _common(path, place), -len(path)))
    return f"[{shown}][{near}]" if _is_rendered(near, rendered) else shown


def _refuse(name: str, place: str) -> str:
    raise LookupError(f"The docstring of {place} refers to {name!r}, but nothing in the package is called so.")


def _is_rendered(path: str, rendered: set[str]) -> bool:
    for known in rendered:
        rest = path.removeprefix(known).lstrip(".")
        if path == known or (
            path.startswith(f"{known}.") and not any(part.startswith("_") for part in rest.split("."))
        ):
            return True
    return False


def _common(one: str, other: str) -> int:
    count = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count
