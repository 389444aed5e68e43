"""
What our docstrings write otherwise than griffe reads it. An extension of griffe.

Types of arguments stand between backticks, as upstream writes them. Cross references, `[`DomainWeights.save_pretrained`]` and
`[`~DomainWeights.save_pretrained`]` (which shows the last name alone), are resolved.

A name that nothing in the package has ends the build. One that has no page of its own is shown as code.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import griffe

_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
# `name (`type`, *optional*): What it is.`, and `name, other (`type`): What they are.`
_TYPED = re.compile(r"^( +)((?:\*{0,2}\w+, )*\*{0,2}\w+) \((.*`.*)\):( .*)?$", flags=re.MULTILINE)
_RESULT = re.compile(r"^( +)`([^`\n]+)`:(?= |$)", flags=re.MULTILINE)
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
        places = {one.path: one.path for one in objects}
        places |= {
            alias.path: alias.target_path for one in objects for alias in one.members.values() if alias.is_alias
        }
        for name, path in places.items():
            parts = name.split(".")
            for start in range(len(parts)):
                by_name[".".join(parts[start:])].append(path)
        for path in rendered:  # what a class inherits is on its page, too
            one = pkg[path.removeprefix(f"{pkg.name}.")]
            if one.is_class:
                for name, member in one.inherited_members.items():
                    # what has no docstring of its own is told by its class
                    shown_at = f"{path}.{name}" if member.docstring else path
                    by_name[f"{one.name}.{name}"].append(shown_at)
        missing: list[str] = []
        for one in objects:
            if one.docstring is not None:
                text = _REFERENCE.sub(
                    lambda match, place=one.path: _resolved(match, place, by_name, rendered, missing),
                    one.docstring.value,
                )
                one.docstring.value = _RESULT.sub(r"\1\2:", _TYPED.sub(_plain_types, text))
        if missing:
            raise LookupError("Nothing in the package is called so:\n" + "\n".join(missing))


def _walk(one: griffe.Object) -> Any:
    yield one
    for member in one.members.values():
        if not member.is_alias:
            yield from _walk(member)


def _plain_types(match: re.Match) -> str:
    names, kind = match[2].split(", "), match[3].replace("`", "").replace("*", "")
    if match[4] is None:  # what they are follows on lines of its own
        return f"{match[1]}{names[0]} ({kind}):"
    return "\n".join(f"{match[1]}{name} ({kind}):{match[4]}" for name in names)


def _resolved(
    match: re.Match, place: str, by_name: dict[str, list[str]], rendered: set[str], missing: list[str]
) -> str:
    name = match[2]
    shown = f"`{name.rpartition('.')[2] if match[1] else name}`"
    if name.split(".")[0] in _FOREIGN:
        return shown
    found = by_name.get(name, [])
    if not found:
        missing.append(f"{name!r} in the docstring of {place}")
        return shown
    near = max(found, key=lambda path: (_is_rendered(path, rendered), _common(path, place), -len(path)))
    return f"[{shown}][{near}]" if _is_rendered(near, rendered) else shown


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
