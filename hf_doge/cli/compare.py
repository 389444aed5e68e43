"""`hf-doge compare`: the same model on several mixtures."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_doge.artifacts import DomainWeights
from hf_doge.checks import check_count
from hf_doge.cli.arguments import DataArguments, ModelArguments, get_output_dir, get_resume
from hf_doge.cli.console import save_plot, say
from hf_doge.cli.mixtures import ESTIMATED, describe_blocks, estimate_for_targets, is_rule, load_weights
from hf_doge.cli.models import get_config, make_model
from hf_doge.cli.parser import parse
from hf_doge.data.blocks import collate_blocks
from hf_doge.data.domain_data import DomainData, load_domain_data, match_repetition, measure_bytes_per_token
from hf_doge.evaluation.comparison import BASELINES
from hf_doge.plots import plot_comparison
from hf_doge.training.adaptation import Adaptation
from hf_doge.training.compare import compare_mixtures
from hf_doge.training.global_batch import examples_per_step


@dataclass
class ComparisonArguments:
    """Which mixtures, how often."""

    _argument_group_name = "comparison"

    weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Mixtures beside the baselines, as name=WEIGHTS or WEIGHTS alone, which is then called 'learned'. "
            "WEIGHTS is the output folder of `hf-doge learn`, a folder or Hub name of an artifact, or a JSON or YAML "
            "file of weights."
        },
    )
    mixtures: list[str] = field(
        default_factory=lambda: list(BASELINES),
        metadata={
            "aliases": ["--baselines"],
            "help": "Mixtures by name: uniform, natural (in proportion to tokens), temperature:T (in proportion to tokens to "
            "the power of 1/T), unimax:EPOCHS (equal parts, no domain read more than EPOCHS times), and, with a target, "
            "estimated (by n-grams, see `hf-doge estimate`). Each is compared with uniform and natural, seed by seed.",
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3],
        metadata={"help": "Seeds of model initialisation and data order; every mixture is trained once with each."},
    )
    match_repetition: bool = field(
        default=False,
        metadata={
            "help": "Cut each domain so that these runs repeat it as often as a training on --full_tokens would with the same "
            "weights (arXiv 2606.07597)."
        },
    )
    full_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of the training that the mixtures are for, with --match_repetition."},
    )

    def __post_init__(self) -> None:
        check_count("--full_tokens", self.full_tokens, optional=True)
        if self.match_repetition != (self.full_tokens is not None):
            raise ValueError(
                "`--match_repetition` and `--full_tokens` must be given together, but got only one of them. Name the tokens "
                "of the training that the mixtures are for, or leave both out."
            )


@dataclass
class MeasureArguments:
    """What the mixtures should serve, and how that is measured."""

    _argument_group_name = "targets"

    target: list[str] | None = field(
        default=None, metadata={"help": "Domain(s) that no model is trained on, but all are evaluated on."}
    )
    max_target_tokens: int = field(
        default=100_000, metadata={"help": "Use no more than this many train tokens of each target."}
    )
    adapt_steps: list[int] = field(
        default_factory=lambda: [25, 100],
        metadata={
            "help": "Also measure each model on the targets after so many training steps on their train text, each a training "
            "of its own. 0 leaves this out."
        },
    )
    adapt_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of these steps. Default: --learning_rate."}
    )

    def load(self, data_args: DataArguments, output_dir: Path) -> DomainData:
        """Blocks of the domains and targets."""
        targets, limit = self.target or (), self.max_target_tokens
        return load_domain_data(data_args, output_dir, targets=targets, max_target_tokens=limit)

    def get_adaptation(self, data: DomainData) -> Adaptation | None:
        """How the targets are measured, if there are any and it was not left out."""
        if not data.targets or self.adapt_steps == [0]:
            return None
        return Adaptation(data.targets, steps=tuple(self.adapt_steps), learning_rate=self.adapt_learning_rate)

    def run_options(self, data: DomainData, data_args: DataArguments, model_args: ModelArguments) -> dict[str, Any]:
        """What all runs of a comparison or a sweep share, as [`compare_mixtures`] takes it."""
        config = get_config(model_args, data.tokenizer, data_args.block_size)
        return {
            "make_model": partial(make_model, model_args.model_name_or_path, config, data.tokenizer),
            "train_dataset": data.train,
            "eval_dataset": data.validation,
            "data_collator": collate_blocks,
            "tokens_per_example": data_args.block_size,
            "identity": {
                "model": model_args.model_name_or_path or (config and config.to_dict()),
                "data": data.fingerprints,
            },
            "adaptation": self.get_adaptation(data),
        }


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    data_args, model_args, comparison_args, measure_args, args = parse(
        argv,
        DataArguments,
        ModelArguments,
        ComparisonArguments,
        MeasureArguments,
        TrainingArguments,
        prog="hf-doge compare",
        description=(
            "Train the same model for the same number of tokens on several mixtures, and tabulate its perplexity on every "
            "domain and target, with paired changes against uniform and natural and their intervals over seeds. Finished runs are kept and not trained again. Every argument of a Trainer is a "
            "flag too, except that --seeds takes the place of --seed."
        ),
        defaults={"output_dir": "doge_comparison", "learning_rate": 5e-4, "save_strategy": "no"},
    )
    data_args.take_tokenizer_of(model_args.model_name_or_path)
    resume = get_resume(args)
    if isinstance(resume, str):
        raise ValueError(
            "`hf-doge compare` keeps finished runs and trains the others from their start, so `--resume_from_checkpoint` must "
            f"name no checkpoint, but got {resume!r}. Leave it out."
        )
    output_dir = get_output_dir(args)
    data = measure_args.load(data_args, output_dir)
    if comparison_args.match_repetition:
        num_tokens = tokens_of_run(args, data_args.block_size)
        data = match_repetition(data, num_tokens=num_tokens, full_tokens=comparison_args.full_tokens)
    mixtures = load_mixtures(comparison_args, data, block_size=data_args.block_size, args=args)
    comparison = compare_mixtures(
        args=args,
        mixtures=mixtures,
        seeds=comparison_args.seeds,
        **measure_args.run_options(data, data_args, model_args),
        bytes_per_token=measure_bytes_per_token(data),
    )
    comparison.save(output_dir)
    plot = save_plot(partial(plot_comparison, comparison.to_plot_rows()), output_dir / "comparison.png")
    say(comparison.to_markdown())
    say(f"Table: {output_dir / 'comparison.md'} (.parquet, .json){f', plot: {plot}' if plot else ''}")
    return 0


def tokens_of_run(args: TrainingArguments, block_size: int) -> int | None:
    """Tokens that a run is trained on; `None` where its steps follow from the data."""
    return args.max_steps * examples_per_step(args) * block_size if args.max_steps > 0 else None


def load_mixtures(
    comparison_args: ComparisonArguments, data: DomainData, *, block_size: int, args: TrainingArguments
) -> dict[str, DomainWeights]:
    """
    Weights of every mixture by name, those by rule first.

    Raises:
        `ValueError`: for an unknown rule, and for names that are repeated or cannot name a file.
    """
    domains = describe_blocks(data.train, block_size)
    num_tokens = tokens_of_run(args, block_size)
    mixtures: dict[str, DomainWeights] = {}

    def add(name: str, word: str, make: Callable[[], DomainWeights]) -> None:
        if name in mixtures or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"Every mixture must have a name of its own, of letters, digits and .-_, but got {name!r} in {word!r}. "
                "Write `--weights name=WEIGHTS`."
            )
        mixtures[name] = make()

    for word in comparison_args.mixtures:
        if word == ESTIMATED:
            add(word, word, partial(estimate_for_targets, data))
        elif is_rule(word):
            add(word.replace(":", "-"), word, partial(load_weights, word, domains, num_tokens=num_tokens))
        else:
            raise ValueError(
                f"`--mixtures` must be among uniform, natural, temperature:T, unimax:EPOCHS and {ESTIMATED}, but got {word!r}. "
                "Give others as `--weights`."
            )
    for word in comparison_args.weights or ():
        name, equals, spec = word.partition("=")
        if not equals:
            name, spec = "learned", word
        add(name, word, partial(load_weights, spec, domains, num_tokens=num_tokens, given=data.weights))
    return mixtures
