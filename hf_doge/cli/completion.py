"""`hf-doge completion`: a script by which a shell completes commands and flags, made by shtab."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_doge.checks import check_choice
from hf_doge.cli.console import say
from hf_doge.cli.parser import PARSER_ALONE, CommandParser, ParserMade, parse

SHELLS = ("bash", "zsh", "tcsh")
_PLACES = ("_dir", "mixture", "index", "folder", "weights", "tokenizer", "checkpoints", "model_name_or_path")


@dataclass
class CompletionArguments:
    """Which shell."""

    _argument_group_name = "completion"

    shell: str = field(metadata={"positional": True, "help": "bash, zsh or tcsh."})

    def __post_init__(self) -> None:
        check_choice("shell", self.shell, SHELLS)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    (args,) = parse(
        argv,
        CompletionArguments,
        prog="hf-doge completion",
        description=(
            "Print a script that completes commands, flags and files in a shell. For bash: hf-doge completion bash > "
            "~/.local/share/bash-completion/completions/hf-doge; for zsh: hf-doge completion zsh > a folder of $fpath/_hf-doge."
        ),
    )
    try:
        import shtab
    except ImportError as error:
        raise ValueError("Completion needs shtab. Install it by `pip install 'hf-doge[completion]'`.") from error
    say(shtab.complete(whole_parser(shtab.FILE), shell=args.shell).rstrip("\n"))
    return 0


def whole_parser(files: Any) -> ArgumentParser:
    """One parser with every command and its flags; those that name a file or folder have `files` as their attribute `complete`."""
    from hf_doge.cli import COMMANDS

    whole = ArgumentParser(prog="hf-doge")
    commands = whole.add_subparsers()
    for command, purpose in COMMANDS.items():
        parser = parser_of(command)
        for action in parser._actions:
            if action.choices is None and (action.type is Path or action.dest.endswith(_PLACES)):
                action.complete = files  # type: ignore[attr-defined]  # what shtab looks for
        commands.add_parser(command, parents=[parser], add_help=False, help=purpose)
    return whole


def parser_of(command: str) -> CommandParser:
    """What reads the flags of a command."""
    try:
        import_module(f"hf_doge.cli.{command.replace('-', '_')}").main([PARSER_ALONE])
    except ParserMade as made:
        return made.parser
    raise RuntimeError(f"`hf-doge {command}` must read its flags by `parse`.")
