"""Flags that several commands share, and how flags are read from the command line and from a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


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


def parse(argv: Sequence[str], *dataclasses: type, prog: str, description: str, defaults: dict[str, Any]) -> tuple:
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
    parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available(), **defaults)  # else torch warns on a CPU
    argv = list(argv)
    if argv and not argv[0].startswith("-") and Path(argv[0]).suffix in CONFIG_SUFFIXES:
        argv = [*read_flags(Path(argv[0])), *argv[1:]]
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def read_flags(path: Path) -> list[str]:
    """
    The flags in a YAML or JSON file.

    Scalars are taken as they are written, so that `eval_strategy: no` and `learning_rate: 5e-4` mean what they say; a
    value left empty or `null` leaves the default.

    Raises:
        `ValueError`: if the file is not a mapping of flags to values.
    """
    try:
        contents = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # JSON is YAML too
    except yaml.YAMLError as error:
        raise ValueError(
            f"{str(path)!r} must be YAML or JSON, but it is not: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(contents, dict):
        raise ValueError(
            f"{str(path)!r} must map flags to values, as in `learning_rate: 5e-4`. Write one flag per line."
        )
    flags = []
    for name, value in contents.items():
        if value in ("", "null"):
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *value]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def get_output_dir(args: TrainingArguments) -> Path:
    """The output folder, made if it is not there."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir


def get_resume(args: TrainingArguments) -> str | bool | None:
    """
    What to resume from: with `--resume_from_checkpoint last` (or `true`) the last checkpoint of the output folder, with
    `none` (or `false`) nothing.

    Raises:
        `ValueError`: for a word that is none of these and no folder.
    """
    asked = args.resume_from_checkpoint
    word = str(asked).strip().lower()
    if word in ("none", "false", "no", ""):
        return None
    if word in ("last", "true", "yes"):
        return True
    if not Path(asked).is_dir():
        raise ValueError(
            f"`--resume_from_checkpoint` must be last (or true), none (or false), or the folder of a checkpoint, but got "
            f"{asked!r}, and there is no such folder."
        )
    return asked
