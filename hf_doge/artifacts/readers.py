"""Domain weights in the files of others: DoReMi, RegMix, or a plain mapping in JSON or YAML."""

import json
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from hf_doge.checks import show
from hf_doge.text import printable

SafeLoader = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # libyaml's, ten times as fast, where PyYAML was built with it
_DEEPEST = 100


def read_ratios(path: Path) -> tuple[dict, str]:
    """
    Read the ratios of a mixture as they are written, neither checked nor normalised.

    Three shapes are known: `{"train_domain_weights": {name: ratio}, ...}` (DoReMi), `{"train": {name: ratio}, ...}`
    (RegMix) and `{name: ratio}`.

    Returns:
        `tuple[dict, str]`: name -> ratio, and which shape it was (`"doremi"`, `"regmix"` or `"plain"`).

    Raises:
        ValueError: The file is neither JSON nor YAML, is malformed, repeats a key, holds no mapping, or is an artifact.
    """
    loaders = {".json": parse_json, ".yaml": _parse_yaml, ".yml": _parse_yaml}
    if path.suffix.lower() not in loaders:
        raise ValueError(f"A weights file must end in one of {list(loaders)}, but got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"A weights file must exist, but {str(path)!r} does not. Check the path.")
    content = loaders[path.suffix.lower()](path.read_bytes(), source=str(path))
    ratios, shape = content, "plain"
    if isinstance(content, dict):
        if "format_version" in content:
            raise ValueError(
                f"{str(path)!r} belongs to an artifact of hf_doge. Read it by"
                f" `DomainWeights.from_pretrained({str(path.parent)!r})`."
            )
        for key, name in (("train_domain_weights", "doremi"), ("train", "regmix")):
            if isinstance(content.get(key), dict):
                ratios, shape = content[key], name
    if not isinstance(ratios, dict) or not ratios:
        raise ValueError(f"{str(path)!r} must map domain names to ratios, but it holds {show(content)}.")
    return ratios, shape


def parse_json(text: bytes, *, source: str) -> Any:
    """
    `json.loads` that refuses repeated keys, and what no honest file holds: thousands of levels, numbers of thousands of digits.

    Raises:
        ValueError: Malformed, too deep, or a key stands twice in one object. Names `source`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        _refuse_repeated((key for key, _ in pairs), source)
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
        _refuse_deep(content)
    except _RepeatedKeyError:
        raise
    except RecursionError as error:
        raise ValueError(f"{source!r} must be JSON of at most {_DEEPEST} levels, but has more.") from error
    except ValueError as error:
        raise ValueError(f"{source!r} must be JSON in UTF-8, but it is not: {printable(error)}.") from error
    return content


def check_yaml(text: bytes | str) -> None:
    """
    Look at YAML before anything is made of it.

    Raises:
        yaml.YAMLError: It is malformed, has too many levels (at which libyaml's reader ends the process), or its references
            would unfold to far more than is written.
    """
    most = 100_000 + 10 * len(text)
    sizes: dict[str, int] = {}  # of what has been read under a name; a reference into itself finds none
    open_nodes: list[tuple[str | None, int]] = []  # name, and entries counted until it began
    count = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            sizes |= {} if name is None else {name: count - before + 1}
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the reference *{event.anchor} must be to something that ends before it")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            sizes[event.anchor] = 1
        count += 1
        if len(open_nodes) > _DEEPEST:
            raise yaml.YAMLError(f"it has more than {_DEEPEST} levels")
        if count > most:
            raise yaml.YAMLError("its references unfold to far more than is written")


class _StrictLoader(yaml.SafeLoader):
    """Refuses repeated keys, takes keys as they are written (`no`, `1e3`, `2024-01-01`), and reads `1e-3` as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        _refuse_repeated((key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)), self.name)
        self.flatten_mapping(node)
        for key, _ in node.value:
            if key.tag in _PLAIN_TAGS:
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "timestamp")}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: bytes, *, source: str) -> Any:
    try:
        check_yaml(text)
        loader = _StrictLoader(text)
        loader.name = source
        return loader.get_single_data()
    except _RepeatedKeyError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates that are none and numbers without end
        raise ValueError(
            f"{source!r} must be YAML in UTF-8, but it is not: {printable(' '.join(str(error).split()))}."
        ) from error


class _RepeatedKeyError(ValueError):
    """A key stands twice in one mapping."""


def _refuse_repeated(keys: Iterable[Hashable], source: str) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise _RepeatedKeyError(
                f"Keys must be unique, but {key!r:.200} stands twice in {source!r}. Keep one of them."
            )
        seen.add(key)


def _refuse_deep(content: Any) -> None:
    level = [content]
    for _ in range(_DEEPEST + 1):
        level = [
            one
            for value in level
            if isinstance(value, dict | list)
            for one in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RecursionError
