"""Files of others: the ratios of a mixture (DoReMi, RegMix, Olmix, or a plain mapping in JSON or YAML), and records as JSON lines."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hf_doge.artifacts.parquet import read_parquet
from hf_doge.checks import is_unicode, show
from hf_doge.text import RepeatedKeyError, check_yaml, parse_json, printable, refuse_repeated


def read_ratios(path: Path) -> tuple[dict, str]:
    """
    Read the ratios of a mixture as they are written, neither checked nor normalised.

    Four shapes are known: `{"train_domain_weights": {name: ratio}, ...}` (DoReMi), `{"train": {name: ratio}, ...}`
    (RegMix, `mixture_config/config_1b/regmix.yaml`), `[{"domain": name, "weight": ratio}, ...]` (what `olmix fit` writes as
    `..._optimal.json`, `plot_and_log_weights` of allenai/olmix) and `{name: ratio}`.

    Returns:
        `tuple[dict, str]`: name -> ratio, and which shape it was (`"doremi"`, `"regmix"`, `"olmix"` or `"plain"`).

    Raises:
        ValueError: The file is neither JSON nor YAML, is malformed, repeats a key, holds no mapping or several of ratios, or
            is an artifact.
    """
    loaders = {".json": parse_json, ".yaml": parse_yaml, ".yml": parse_yaml}
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
        known = {"train_domain_weights": "doremi", "train": "regmix"}
        given = [key for key in known if isinstance(content.get(key), dict)]
        if len(given) > 1:
            raise ValueError(
                f"{str(path)!r} must hold ratios under one key, but does under {given}. Keep one of them."
            )
        for key in given:
            ratios, shape = content[key], known[key]
    elif _is_list_of_weights(content):
        ratios, shape = {row["domain"]: row["weight"] for row in content}, "olmix"
        refuse_repeated((row["domain"] for row in content), str(path))
    if not isinstance(ratios, dict) or not ratios:
        raise ValueError(f"{str(path)!r} must map domain names to ratios, but it holds {show(content)}.")
    return ratios, shape


def read_weights_table(content: bytes, name: str) -> dict[str, float]:
    """
    Domain -> weight in the table of an artifact.

    Raises:
        ValueError: It is no Parquet file, or has no such columns.
    """
    table = read_parquet(content, name)
    if not {"domain", "weight"} <= set(table.column_names):
        raise ValueError(f"{name!r} must have the columns domain and weight, but has {show(table.column_names)}.")
    return dict(zip(table["domain"].to_pylist(), table["weight"].to_pylist(), strict=True))


def holds_artifact(path: Path) -> bool:
    """Whether a file is there that is not known to be plain ratios: one of an artifact, be it damaged."""
    try:
        content = parse_json(path.read_bytes(), source=str(path))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(content, dict) or "format_version" in content


def _is_list_of_weights(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(row, dict) and {"domain", "weight"} <= row.keys() for row in content)
        and all(isinstance(row["domain"], str) for row in content)
    )


class _StrictLoader(yaml.SafeLoader):
    """
    Refuses repeated keys and numbers that YAML 1.1 and 1.2 read differently (`017`, `1:30`), takes keys as they are written
    (`no`, `1e3`, `2024-01-01`), and reads `1e-3` as YAML 1.2 does.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        refuse_repeated((key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)), self.name)
        self.flatten_mapping(node)
        for key, _ in node.value:
            if key.tag in _PLAIN_TAGS:
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            raise _OtherBaseError(
                f"Numbers must be written without leading zeros and colons, by which YAML 1.1 reads them as octal or"
                f" sexagesimal, but {node.value} stands in {self.name!r}, line {node.start_mark.line + 1}, column"
                f" {node.start_mark.column + 1}. Write it as a decimal number, or as a text in quotes."
            )
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


class _OtherBaseError(ValueError):
    """A number is meant to base 10, and would be read by another."""


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "timestamp")}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: bytes, *, source: str) -> Any:
    """
    The content of YAML 1.1 that repeats no key; keys are texts as they are written.

    Raises:
        ValueError: Malformed, too deep, or a key stands twice, or a number may be meant to another base. Names `source`.
    """
    try:
        check_yaml(text)
        loader = _StrictLoader(text)
        loader.name = source
        return loader.get_single_data()
    except (RepeatedKeyError, _OtherBaseError):
        raise
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates that are none and numbers without end
        raise ValueError(
            f"{source!r} must be YAML in UTF-8, but it is not: {printable(' '.join(str(error).split()))}."
        ) from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """
    The records of a file, one for each line: record `n` (from 1) is of line `n`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a JSON object in UTF-8, repeats a key, or holds NaN or a lone surrogate; or the file is
            empty or cut short. Names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The data file must exist, but {str(path)!r} does not. Check the path.")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _parse_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"A data file must be whole, but {str(path)!r} is not, behind line {number}: {error}."
        ) from error
    if number == 0:
        raise ValueError(f"A data file must hold at least one record, but {str(path)!r} is empty. Fill or remove it.")


def _parse_line(line: bytes, number: int, path: Path) -> dict[str, Any]:
    where = f"line {number} of {str(path)!r}"
    try:
        record = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A data file must be UTF-8 text, but {where} is not: {error}. Correct or remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Every line must be a JSON object, but {where} is {_start(line)}: {error}. Correct or remove it."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"Every line must be a JSON object, but {where} is {_start(line)}. Correct or remove it.")
    if b"\\ud" in line.lower() and not is_unicode(json.dumps(record, ensure_ascii=False)):
        raise ValueError(
            f"Text must be Unicode, but {where} holds a lone surrogate (half of a pair \\ud83d\\ude00). Correct or remove it."
        )
    return record


def _start(line: bytes) -> str:
    return show(line.decode(errors="replace")[:60])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON knows no {name}")
