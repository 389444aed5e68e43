"""`hf-doge estimate`: domain weights in seconds, without training."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_doge.cli.arguments import DEFAULT_VOCAB, DataArguments
from hf_doge.cli.mixtures import describe_blocks, estimate_for_targets, is_rule, load_weights, save_results
from hf_doge.cli.parser import parse
from hf_doge.data.domain_data import load_domain_data

logger = logging.getLogger(__name__)


@dataclass
class EstimateDataArguments(DataArguments):
    """As [`DataArguments`]; `--mixture` was once the name of `--rule`, and scripts may still use it so."""

    rule: str = field(
        default="natural",
        metadata={
            "help": "Without a target: uniform, natural, temperature:T (in proportion to tokens to the power of 1/T), or "
            "unimax:EPOCHS:TOKENS (equal parts of TOKENS tokens, no domain read more than EPOCHS times)."
        },
    )

    def __post_init__(self) -> None:
        if self.mixture is not None and is_rule(self.mixture):
            logger.warning("`--mixture %s` will be read as a file from version 0.3 on. Write `--rule`.", self.mixture)
            self.rule, self.mixture = self.mixture, None
        super().__post_init__()


@dataclass
class EstimateArguments:
    """What the weights should serve, and where they go."""

    _argument_group_name = "estimate"

    output_dir: str = field(default="doge_estimate", metadata={"help": "Folder for weights, blocks and tokenizer."})
    target: list[str] | None = field(
        default=None,
        metadata={
            "help": "Domain(s) that the weights should serve and that are kept out of the mixture. Without one, "
            "`--rule` says by which rule the domains are weighed."
        },
    )
    order: int = field(default=2, metadata={"help": "1 for unigrams, 2 for bigrams interpolated with them."})
    max_target_tokens: int = field(
        default=100_000, metadata={"help": "Use no more than this many train tokens of each target domain."}
    )


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    data_args, args = parse(
        argv,
        EstimateDataArguments,
        EstimateArguments,
        prog="hf-doge estimate",
        description=(
            "Estimate domain weights without training: those under which n-gram models of the domains make the target most "
            "likely, or by a rule. Without --tokenizer and --train_tokenizer_vocab, a tokenizer of "
            f"{DEFAULT_VOCAB:,} entries is trained on the domains first."
        ),
        defaults={},
    )
    data_args.train_tokenizer_if_none()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    targets = args.target or ()
    data = load_domain_data(data_args, output_dir, targets=targets, max_target_tokens=args.max_target_tokens)
    if targets:
        weights = estimate_for_targets(data, order=args.order)
    else:
        weights = load_weights(data_args.rule, describe_blocks(data.train, data_args.block_size), given=data.weights)
    save_results(weights, output_dir)
    return 0
