"""`hf-doge export`: domain weights as another training framework reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.export import FORMS
from hf_doge.cli.console import say
from hf_doge.cli.parser import parse


@dataclass
class ExportArguments:
    """Which weights, for which framework."""

    _argument_group_name = "export"

    weights: str = field(
        metadata={
            "positional": True,
            "help": "Output folder of `hf-doge learn`, `estimate` or `sweep`, a folder or Hub name of domain weights, or a "
            "JSON or YAML file of weights.",
        }
    )
    format: str = field(metadata={"choices": sorted(FORMS), "help": "The framework."})
    paths: list[str] | None = field(
        default=None,
        metadata={
            "metavar": "NAME=PATH",
            "help": "Where the data of each domain is, as the framework takes it; a name given twice has two. All formats "
            "need them but datasets and llama-factory, which name data sets by domains.",
        },
    )
    num_rows: list[str] | None = field(
        default=None,
        metadata={"metavar": "NAME=N", "help": "Rows of the data of each domain; only axolotl needs them."},
    )
    output: Path | None = field(default=None, metadata={"help": "File to write, instead of printing."})


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    (args,) = parse(
        argv,
        ExportArguments,
        prog="hf-doge export",
        description=(
            "Print domain weights, or write them to a file, in the form that another training framework reads. Domains of "
            "weight 0 are left out."
        ),
    )
    load = DomainWeights.from_file if Path(args.weights).is_file() else DomainWeights.from_pretrained
    weights = load(args.weights)
    text = weights.export(
        args.format,
        paths=_by_domain("--paths", args.paths),
        num_rows=_by_domain("--num_rows", args.num_rows, of=_whole_number),
        path=args.output,
    )
    say(text.rstrip("\n") if args.output is None else f"Written: {args.output}")
    return 0


def _by_domain(flag: str, words: Sequence[str] | None, of: Callable[[str], Any] = str) -> dict[str, Any] | None:
    """
    What `NAME=VALUE` words say; the values of a name given several times are a list.

    Raises:
        `ValueError`: for a word without `=`.
    """
    if words is None:
        return None
    found: dict[str, list] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"`{flag}` must be words of the form NAME=VALUE, but got {word!r}.")
        found.setdefault(name, []).append(of(value))
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _whole_number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text  # refused where it is used, by its name
