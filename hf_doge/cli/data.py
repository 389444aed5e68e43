"""`hf-doge data`: what there is to train on, as a table of the domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from hf_doge.artifacts import DomainWeights
from hf_doge.checks import check_count
from hf_doge.cli.arguments import DEFAULT_VOCAB, DataArguments
from hf_doge.cli.console import say
from hf_doge.cli.parser import parse
from hf_doge.data.blocks import BlockMaker
from hf_doge.data.domain_data import RecordDomain, load_tokenizer_of
from hf_doge.data.domain_files import select_domains
from hf_doge.data.mixture import MixtureConfig
from hf_doge.data.records import open_mixture
from hf_doge.sampling.lengths import IGNORED_LABEL


@dataclass
class BudgetArguments:
    """How long a training is, and where a tokenizer trained here is kept."""

    _argument_group_name = "budget"

    max_steps: int | None = field(
        default=None, metadata={"help": "Steps of a training: the table then tells the epochs of each domain."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks in a step, on each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches in a step."})
    num_processes: int = field(default=1, metadata={"help": "Processes of the training."})
    output_dir: str = field(default="doge_data", metadata={"help": "Folder for a tokenizer that is trained here."})

    def __post_init__(self) -> None:
        check_count("--max_steps", self.max_steps, optional=True)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes"):
            check_count(f"--{name}", getattr(self, name))

    def count_tokens(self, block_size: int) -> int | None:
        """Tokens of the training, where its length is known."""
        if self.max_steps is None:
            return None
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_processes
        return self.max_steps * batch * block_size


@dataclass(frozen=True)
class DomainCounts:
    """
    What there is of a domain.

    Attributes:
        num_rows (`int`): Rows to train on.
        num_tokens (`int`): Their tokens.
        num_losses (`int`): Those of them that have a loss.
        num_held_out (`int`): Rows to evaluate on.
    """

    num_rows: int
    num_tokens: int
    num_losses: int
    num_held_out: int


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--mixture={argv[0]}"
    data_args, budget = parse(
        argv,
        DataArguments,
        BudgetArguments,
        prog="hf-doge data",
        description=(
            "Show the domains of a mixture or a data folder: rows, tokens, mean length, and how often a training would go "
            "through each. `hf-doge data mixture.yaml` is short for `--mixture mixture.yaml`. Without --tokenizer and "
            f"--train_tokenizer_vocab, a tokenizer of {DEFAULT_VOCAB:,} entries is trained on the domains first."
        ),
        defaults={},
    )
    data_args.train_tokenizer_if_none()
    mixture = data_args.get_mixture(of_folder=True)
    assert mixture is not None
    counts = count_domains(data_args, mixture, Path(budget.output_dir))
    say(describe_counts(counts, num_tokens=budget.count_tokens(data_args.block_size), given=mixture.weights))
    return 0


def count_domains(data_args: DataArguments, mixture: MixtureConfig, output_dir: Path) -> dict[str, DomainCounts]:
    """Rows and tokens of every domain that is chosen, in the order of the mixture."""
    found = {name: RecordDomain(rows, data_args.dataset_num_proc) for name, rows in open_mixture(mixture).items()}
    names, _ = select_domains({name: one.splits for name, one in found.items()}, domains=data_args.domains)
    blocks = BlockMaker(load_tokenizer_of(data_args, output_dir, found, names), data_args.block_size, output_dir)
    counts = {}
    for name in names:
        rows = found[name].encode(blocks, "train")
        num_tokens = num_losses = 0
        for table in rows.with_format("arrow").iter(batch_size=1000):
            num_tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py()
            if "labels" in table.column_names:
                labels = pc.list_flatten(table["labels"]).to_numpy()
                num_losses += int(np.count_nonzero(labels != IGNORED_LABEL))
        limit = data_args.max_train_tokens
        if limit is not None and num_tokens > limit:
            num_tokens, num_losses = limit, num_losses * limit // num_tokens
        held_out = len(found[name].records.splits["validation"])
        counts[name] = DomainCounts(len(rows), num_tokens, num_losses or num_tokens, held_out)
    return counts


def describe_counts(
    counts: Mapping[str, DomainCounts], *, num_tokens: int | None = None, given: Mapping[str, float] | None = None
) -> str:
    """
    The table of the domains.

    Args:
        counts (`Mapping[str, DomainCounts]`): What there is of each.
        num_tokens (`int`, *optional*): Tokens of a training. With them, the table tells the epochs of each domain by equal
            weights, in proportion to tokens, and by `given`.
        given (`Mapping[str, float]`, *optional*): Shares that the mixture file gives.
    """
    domains = {name: {"num_rows": one.num_rows, "num_tokens": one.num_tokens} for name, one in counts.items()}
    mixtures = {"uniform": DomainWeights.uniform(domains).mean, "natural": DomainWeights.natural(domains).mean}
    if given is not None:
        mixtures["mixture"] = DomainWeights.from_mapping({name: given[name] for name in domains}).mean
    masked = any(one.num_losses < one.num_tokens for one in counts.values())
    header = ["domain", "rows", "held out", "tokens", *(["with a loss"] if masked else []), "mean length", "natural"]
    header += ["weight"] if given is not None else []
    header += [f"epochs, {name}" for name in mixtures] if num_tokens is not None else []
    lines = [header]
    for name, one in counts.items():
        line = [name, f"{one.num_rows:,}", f"{one.num_held_out:,}", f"{one.num_tokens:,}"]
        line += [f"{one.num_losses:,}"] if masked else []
        line += [f"{one.num_tokens / one.num_rows:,.1f}", f"{mixtures['natural'][name]:.4f}"]
        line += [f"{mixtures['mixture'][name]:.4f}"] if given is not None else []
        if num_tokens is not None:
            line += [f"{num_tokens * weights[name] / one.num_tokens:,.2f}" for weights in mixtures.values()]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    if num_tokens is not None:
        text.append(f"Epochs of a training on {num_tokens:,} tokens.")
    return "\n".join(text)
