"""Domain weights in the files of others: DoReMi, RegMix, or a plain mapping in JSON or YAML."""

import json
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml


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
        raise ValueError(f"{str(path)!r} must map domain names to ratios, but it holds {content!r:.80}.")
    return ratios, shape


def parse_json(text: bytes, *, source: str) -> Any:
    """
    `json.loads` that refuses repeated keys.

    Raises:
        ValueError: Malformed, or a key stands twice in one object. Names `source`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        _refuse_repeated((key for key, _ in pairs), source)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source!r} must be JSON in UTF-8, but it is not: {error}.") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses repeated keys, and reads `1e-3` as the number that it is in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        scalars = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        _refuse_repeated((self.construct_object(key) for key in scalars), self.name)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: bytes, *, source: str) -> Any:
    try:
        loader = _StrictLoader(text)
        loader.name = source
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{source!r} must be YAML in UTF-8, but it is not: {error}.") from error


def _refuse_repeated(keys: Iterable[Hashable], source: str) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"Keys must be unique, but {key!r} stands twice in {source!r}. Keep one of them.")
        seen.add(key)
