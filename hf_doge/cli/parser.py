"""One style of flags for all commands: dataclasses, read by a parser that shows ours first."""

import json
import math
import re
import shutil
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    HelpFormatter,
    _ArgumentGroup,
)
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hf_doge.checks import LARGEST_RATE, check_number, is_unicode, show
from hf_doge.text import check_yaml, parse_json
from hf_doge.training.config import SELF_TERMS

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_SELF_TERM_WORDS = [choice for choice in SELF_TERMS if isinstance(choice, str)]
# Of the Trainer's arguments those that `--help` shows.
COMMON = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "warmup_steps"),
    *("save_steps", "seed", "resume_from_checkpoint"),
)
PARSER_ALONE = "-\0"  # in place of flags, which no shell can say: [`parse`] raises [`ParserMade`]
_ONE_LINE = 84  # characters of help beside a flag
_LAST_CLAUSE = re.compile(r"[,;:] [^,;:]*$")
_ASIDE = re.compile(r" \([^()]*[a-z]{3}[^()]*\)")
_FIRST_SENTENCE = re.compile(r".*?\.(?=\s+[A-Z'`0-9]|$)", flags=re.DOTALL)


class CommandParser(HfArgumentParser):
    """
    Flags of several dataclasses, in groups that their `_argument_group_name` names.

    `--help` shows our flags, the first sentence of each, and the most used of the Trainer's; `--help_all` shows everything. A
    field that more than one dataclass has is one flag, declared by the first; where it is not given, the others keep their
    defaults. A field whose metadata say `positional` is no flag but a word; then truth values are flags without a word behind
    them. One whose metadata say `switch` is on by `--x`, off by `--no_x`, and otherwise its default, which may be `None`.

    Args:
        dataclasses (`Sequence[type]`): What the flags fill.
        prog (`str`): The command.
        description (`str`): First lines of the help.
    """

    def __init__(self, dataclasses: Sequence[Any], *, prog: str, description: str) -> None:
        self.positional = [one.name for kind in dataclasses for one in fields(kind) if one.metadata.get("positional")]
        self._hidden: _ArgumentGroup | None = None
        words = self.positional or ["[CONFIG.yaml]"]
        super().__init__(dataclasses, prog=prog, usage=f"%(prog)s {' '.join(words)} [flags]", add_help=False)
        self.description = description
        group = self.add_argument_group("help")
        group.add_argument("-h", "--help", action="help", help="Show this.")
        more = "Show all that is to say of each flag, and the Trainer's other arguments, which are flags too."
        group.add_argument("--help_all", "--help-all", action=_HelpAll, nargs=0, default=SUPPRESS, help=more)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        kinds, own = get_type_hints(dtype), self.add_argument_group(getattr(dtype, "_argument_group_name", "flags"))
        trainer = {one.name for one in fields(TrainingArguments)} if issubclass(dtype, TrainingArguments) else set()
        common = self.add_argument_group("training (of the Trainer)") if trainer else own
        hidden = self._hidden = self.add_argument_group("the Trainer's other arguments") if trainer else self._hidden
        for one in fields(dtype):
            if one.init and f"--{one.name}" not in self._option_string_actions:
                one.type = kinds[one.name]
                group = own if one.name not in trainer else common if one.name in COMMON else hidden
                self._add_field(group, one)

    def _add_field(self, group: Any, one: Any) -> None:
        if one.metadata.get("positional"):
            group.add_argument(one.name, type=one.type, help=one.metadata["help"])
        elif self.positional and one.type is bool:
            group.add_argument(*_spellings(one.name), action="store_true", help=one.metadata["help"])
        elif one.metadata.get("switch"):
            options = {"dest": one.name, "default": one.default, "help": one.metadata["help"]}
            group.add_argument(*_spellings(one.name), type=string_to_bool, nargs="?", const=True, **options)
            group.add_argument(*_spellings(f"no_{one.name}"), action="store_false", **options)
        else:
            self._parse_dataclass_field(group, one)

    def format_help(self, *, everything: bool = False) -> str:
        """The help, in groups; by default without what few need."""
        width = max(80, min(120, shutil.get_terminal_size((120, 24)).columns))
        options = {"width": width, "max_help_position": 34}
        formatter = ArgumentDefaultsHelpFormatter(self.prog, **options) if everything else _Brief(self.prog, **options)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            if group._group_actions and (everything or group is not self._hidden):
                formatter.start_section(group.title)
                formatter.add_arguments(one for one in group._group_actions if everything or not _turns_off(one))
                formatter.end_section()
        return formatter.format_help()

    def read(self, argv: Sequence[str]) -> tuple:
        """One instance of each dataclass."""
        values, made, seen = vars(self.parse_args(argv)), [], set()
        for kind in self.dataclass_types:
            names = [one.name for one in fields(kind) if one.init]
            given = {name: values[name] for name in names if name not in seen or values[name] is not None}
            made.append(kind(**given))
            seen |= set(names)
        return tuple(made)


def _spellings(name: str) -> dict[str, None]:
    """With underscores and with hyphens, where they differ."""
    return dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])


class _HelpAll(Action):
    """Prints the whole help and ends, as `--help` does."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser._print_message(parser.format_help(everything=True), sys.stdout)
        parser.exit()


class _Brief(HelpFormatter):
    """One name of each flag, the first sentence of its help, in two lines, and its default."""

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return ", ".join(one for one in action.option_strings if "-" not in one[2:])

    def _get_help_string(self, action: Action) -> str:
        said = _FIRST_SENTENCE.match(action.help or "")
        text = said[0].rstrip() if said else action.help or ""
        shown = action.default not in (None, False, SUPPRESS) and "Default:" not in text and action.option_strings
        default = " (default: %(default)s)" if shown else ""
        room = _ONE_LINE - (len(f" (default: {action.default})") if shown else 0)
        if len(text) > room:
            text = _ASIDE.sub("", text)
        if len(text) > room + _ONE_LINE:
            text = _LAST_CLAUSE.sub("", text[: room + _ONE_LINE - 4]) + " ..."
        return text + default


def _turns_off(action: Action) -> bool:
    """Whether it is the `--no_x` of a flag `--x`."""
    return bool(action.option_strings) and action.option_strings[0] == f"--no_{action.dest}"


class ParserMade(Exception):
    """Carries the parser of a command to whoever asked for it instead of running the command."""

    def __init__(self, parser: CommandParser) -> None:
        super().__init__(parser)
        self.parser = parser


def parse(
    argv: Sequence[str], *dataclasses: Any, prog: str, description: str, defaults: Mapping[str, Any] | None = None
) -> tuple:
    """
    Read the flags of several dataclasses.

    Args:
        argv (`Sequence[str]`): What follows the command. A YAML or JSON file may come first: its keys are flags, and
            flags given after it win.
        dataclasses (`type`): What the flags fill.
        prog (`str`): The command, for messages.
        description (`str`): First lines of `--help`.
        defaults (`Mapping[str, Any]`, *optional*): Defaults of this command that differ from the dataclasses'.

    Returns:
        `tuple`: one instance per dataclass.

    Raises:
        `SystemExit`: as `argparse` does, after `--help` or for flags it does not understand.
        `ValueError`: for values a dataclass refuses, and for a file that is not a mapping.
    """
    parser = CommandParser(dataclasses, prog=prog, description=description)
    parser.set_defaults(**(defaults or {}))
    if (action := parser._option_string_actions.get("--self_term")) is not None:
        action.type, action.metavar = _read_self_term, f"{{{','.join(_SELF_TERM_WORDS)}}}"  # not a truth value alone
    if any(issubclass(kind, TrainingArguments) for kind in dataclasses):
        parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())  # else torch warns on a CPU
    argv = list(argv)
    if argv == [PARSER_ALONE]:
        raise ParserMade(parser)
    configured = []
    if argv and not parser.positional and not argv[0].startswith("-") and Path(argv[0]).suffix in CONFIG_SUFFIXES:
        configured = read_flags(Path(argv.pop(0)), parser)
    refuse_repeated_flags(parser, argv)
    parsed = parser.read([*configured, *argv])
    for args in parsed:
        _check_numbers(args)
        if isinstance(args, TrainingArguments):
            _refuse_missing_reports(args)
    return parsed


def _refuse_missing_reports(args: TrainingArguments) -> None:
    """What the Trainer would find out after the data are read and the model is made."""
    known, there = INTEGRATION_TO_CALLBACK, get_available_reporting_integrations()
    missing = [name for name in args.report_to or () if name in known and name not in there]
    if missing:
        raise ValueError(
            f"`--report_to` names {', '.join(missing)}, which cannot be used here: the package is not installed. Install it, or"
            " use `--report_to none`."
        )


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
