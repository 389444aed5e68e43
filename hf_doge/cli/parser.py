"""One style of flags for all commands: dataclasses, read by a parser that shows ours first."""

import json
import math
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
)
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_doge.checks import LARGEST_RATE, check_number, is_unicode, show
from hf_doge.text import check_yaml, parse_json
from hf_doge.training.config import SELF_TERMS

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_SELF_TERM_WORDS = [choice for choice in SELF_TERMS if isinstance(choice, str)]
_OF_TRAINER = frozenset(one.name for one in fields(TrainingArguments))


class CommandParser(HfArgumentParser):
    """
    Flags of several dataclasses, in groups that their `_argument_group_name` names.

    A field that more than one dataclass has is one flag, declared by the first; where it is not given, the others keep their
    defaults.

    Args:
        dataclasses (`Sequence[type]`): What the flags fill.
        prog (`str`): The command.
        description (`str`): First lines of the help.
    """

    def __init__(self, dataclasses: Sequence[Any], *, prog: str, description: str) -> None:
        super().__init__(dataclasses, prog=prog, usage="%(prog)s [CONFIG.yaml] --data_dir DIR [flags]")
        self.description = description

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        group: Any = (
            self.add_argument_group(dtype._argument_group_name) if hasattr(dtype, "_argument_group_name") else self
        )
        kinds = get_type_hints(dtype)
        for one in fields(dtype):
            if one.init and f"--{one.name}" not in self._option_string_actions:
                one.type = kinds[one.name]
                self._parse_dataclass_field(group, one)

    def read(self, argv: Sequence[str]) -> tuple:
        """One instance of each dataclass."""
        values, made, seen = vars(self.parse_args(argv)), [], set()
        for kind in self.dataclass_types:
            names = [one.name for one in fields(kind) if one.init]
            given = {name: values[name] for name in names if name not in seen or values[name] is not None}
            made.append(kind(**given))
            seen |= set(names)
        return tuple(made)


def parse(argv: Sequence[str], *dataclasses: Any, prog: str, description: str, defaults: dict[str, Any]) -> tuple:
    """
    Read the flags of several dataclasses.

    Args:
        argv (`Sequence[str]`): What follows the command. A YAML or JSON file may come first: its keys are flags, and
            flags given after it win.
        dataclasses (`type`): What the flags fill.
        prog (`str`): The command, for messages.
        description (`str`): First lines of `--help`.
        defaults (`dict[str, Any]`): Defaults of this command that differ from the dataclasses'.

    Returns:
        `tuple`: one instance per dataclass.

    Raises:
        `SystemExit`: as `argparse` does, after `--help` or for flags it does not understand.
        `ValueError`: for values a dataclass refuses, and for a file that is not a mapping.
    """
    parser = CommandParser(dataclasses, prog=prog, description=description)
    parser.set_defaults(**defaults)
    if (action := parser._option_string_actions.get("--self_term")) is not None:
        action.type, action.metavar = _read_self_term, f"{{{','.join(_SELF_TERM_WORDS)}}}"  # not a truth value alone
    if any(issubclass(kind, TrainingArguments) for kind in dataclasses):
        parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())  # else torch warns on a CPU
    argv = list(argv)
    configured = []
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in CONFIG_SUFFIXES:
        configured = read_flags(Path(argv.pop(0)), parser)
    refuse_repeated_flags(parser, argv)
    parsed = parser.read([*configured, *argv])
    for args in parsed:
        _check_numbers(args)
    return parsed


def parse_once(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """
    What a parser makes of the words of the command line.

    Raises:
        `SystemExit`: as `argparse` does, after `--help` or for flags it does not understand.
        `ValueError`: if a flag is given twice.
    """
    refuse_repeated_flags(parser, argv)
    return parser.parse_args(argv)


def refuse_repeated_flags(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """
    `argparse` would take the last one, unseen.

    Raises:
        `ValueError`: if a flag is given twice with different values, under whichever of its names, or a key stands twice in
            its JSON.
    """
    seen: dict[str, list[str]] = {}
    for position, word in enumerate(argv):
        if word == "--":
            return
        flag, _, value = word.partition("=")
        if (value or word).startswith("{"):
            parse_json((value or word).encode(), source=flag if value else word)
        if not flag.startswith("--"):
            continue
        actions = parser._option_string_actions
        found = [flag] if flag in actions else [name for name in actions if name.startswith(flag)]
        names = {actions[name].dest for name in found}
        if len(names) != 1:  # unknown or more than one: for argparse to refuse
            continue
        (name,) = names
        rest = takewhile(lambda one: not one.startswith("--"), argv[position + 1 :])
        given = [found[0], *([value] if "=" in word else rest)]
        if seen.setdefault(name, given) != given:
            raise ValueError(
                f"A flag must be given once, but `{' '.join(seen[name])}` and `{' '.join(given)}` differ."
            )


def read_flags(path: Path, parser: ArgumentParser) -> list[str]:
    """
    The flags in a YAML or JSON file.

    Scalars are taken as they are written, so that `eval_strategy: no` and `learning_rate: 5e-4` mean what they say; a
    value left empty or `null` leaves the default.

    Raises:
        `ValueError`: if the file is not a mapping of flags of the parser to values, or a key stands in it twice.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        contents = _ConfigLoader(text).get_single_data()  # JSON is YAML too
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source!r} must be YAML or JSON, but it is not: {' '.join(str(error).split())}.") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{source!r} must map flags to values, as in `learning_rate: 5e-4`. Write one flag per line.")
    flags: list[str] = []
    seen: dict[str, Any] = {}
    for name, value in contents.items():
        action = parser._option_string_actions.get(f"--{name}")
        if action is None:
            near = get_close_matches(str(name), [flag[2:] for flag in parser._option_string_actions], n=1)
            advice = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{source!r} must hold flags of `{parser.prog}` only, but it has {name!r}, that is `--{name}`.{advice}"
            )
        if action.dest in seen:
            raise ValueError(
                f"{source!r} must set each flag once, but {seen[action.dest]!r} and {name!r} are the same."
            )
        seen[action.dest] = name
        if value in ("", "null"):
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        odd = [one for one in values if not isinstance(one, str) or not is_unicode(one)]
        if odd:
            raise ValueError(f"{source!r} must have texts or numbers under {name!r}, but got {show(odd[0])}.")
        if isinstance(value, list):
            flags += [f"--{name}", *value]
        else:
            flags.append(f"--{name}={values[0]}")
    return flags


def _read_self_term(word: str) -> bool | str:
    if word in _SELF_TERM_WORDS:
        return word
    try:
        return string_to_bool(word)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(
            f"must be one of {', '.join(_SELF_TERM_WORDS)}, true or false, but got {show(word)}"
        ) from error


class _ConfigLoader(yaml.BaseLoader):
    """All scalars as they are written; no key twice, at any level."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.YAMLError(f"keys must be unique, but {repeated[0]!r} stands twice. Keep one of them")
        return super().construct_mapping(node, deep=deep)


def _check_numbers(args: Any) -> None:
    """No float that a flag can give is NaN, and a learning rate stays where its products with gradients are finite."""
    for one in fields(args):
        value = getattr(args, one.name)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"`--{one.name}` must be a number, but got {value}.")
    if isinstance(args, TrainingArguments):
        check_number("--learning_rate", args.learning_rate, least=0, most=LARGEST_RATE)
