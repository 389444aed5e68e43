"""Flags that several commands share, and how flags are read from the command line and from a file."""

import json
import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_doge.checks import LARGEST_RATE, check_count, check_number, is_unicode, show
from hf_doge.text import check_yaml, parse_json
from hf_doge.training.config import SELF_TERMS

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_SELF_TERM_WORDS = [choice for choice in SELF_TERMS if isinstance(choice, str)]


@dataclass
class DataArguments:
    """Where the text is and how it is cut."""

    data_dir: str = field(
        metadata={
            "help": "Folder with <domain>.train.jsonl[.gz] and <domain>.validation.jsonl[.gz] (or <domain>/train.jsonl "
            "...), one pair per domain; each record has a field `text`."
        }
    )
    domains: list[str] | None = field(
        default=None, metadata={"help": "Domains to train on. Default: all in the folder that are not targets."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub name of a tokenizer."})
    train_tokenizer_vocab: int | None = field(
        default=None,
        metadata={
            "help": "Train a byte-level BPE tokenizer of this many entries on an equal share of each training domain, "
            "and keep it in <output_dir>/tokenizer. At least 257."
        },
    )
    block_size: int = field(default=512, metadata={"help": "Tokens per training example. At least 2."})
    max_train_tokens: int | None = field(
        default=None, metadata={"help": "Use no more than this many train tokens of each domain."}
    )
    max_validation_tokens: int | None = field(
        default=None, metadata={"help": "Use no more than this many validation tokens of each domain."}
    )

    def __post_init__(self) -> None:
        for name in ("train_tokenizer_vocab", "max_train_tokens", "max_validation_tokens"):
            check_count(f"--{name}", getattr(self, name), optional=True)
        if not 2 <= self.block_size <= 2**31:
            raise ValueError(f"`--block_size` must be at least 2 tokens, but got {self.block_size}.")


@dataclass
class ModelArguments:
    """A model to start from, or the shape of a new one."""

    model_size: str = field(
        default="tiny",
        metadata={"help": "Shape of a new model: nano, micro, tiny, mini, small, 60m, 82m, 124m or 210m."},
    )
    model_type: str = field(default="llama", metadata={"help": "Architecture of `model_size`: llama or gpt2."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "JSON file with the configuration of a new model, instead of `model_size`."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to start from, instead of a new one: folder or Hub name."}
    )


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
    parser = HfArgumentParser(dataclasses, prog=prog, usage="%(prog)s [CONFIG.yaml] --data_dir DIR [flags]")
    parser.description = description
    parser.set_defaults(**defaults)
    if any(issubclass(kind, TrainingArguments) for kind in dataclasses):
        parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())  # else torch warns on a CPU
    if (action := parser._option_string_actions.get("--self_term")) is not None:
        action.type, action.metavar = _read_self_term, f"{{{','.join(_SELF_TERM_WORDS)}}}"  # not a truth value alone
    argv = list(argv)
    configured = []
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in CONFIG_SUFFIXES:
        configured = read_flags(Path(argv.pop(0)), parser)
    refuse_repeated_flags(parser, argv)
    parsed = parser.parse_args_into_dataclasses([*configured, *argv], look_for_args_file=False)
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


def get_output_dir(args: TrainingArguments) -> Path:
    """The output folder, made if it is not there."""
    assert args.output_dir is not None  # the arguments set one
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir


def get_resume(args: TrainingArguments) -> str | bool | None:
    """
    What to resume from: with `--resume_from_checkpoint last` (or `true`) the last checkpoint of the output folder, with
    `none` (or `false`) nothing. The argument is unset, so that what is saved does not depend on how often a run was resumed.

    Raises:
        `ValueError`: for a word that is none of these and no folder.
    """
    asked, args.resume_from_checkpoint = args.resume_from_checkpoint, None
    word = str(asked).strip().lower()
    if word in ("none", "false", "no", ""):
        return None
    if word in ("last", "true", "yes"):
        return True
    if asked is None or not Path(asked).is_dir():
        raise ValueError(
            f"`--resume_from_checkpoint` must be last (or true), none (or false), or the folder of a checkpoint, but got "
            f"{asked!r}, and there is no such folder."
        )
    return asked
