"""`hf-doge compare`: the same model on several mixtures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import TrainingArguments

from hf_doge.artifacts import DomainWeights
from hf_doge.cli.arguments import DataArguments, ModelArguments, get_output_dir, get_resume, parse
from hf_doge.cli.blocks import collate_blocks
from hf_doge.cli.console import save_plot, say
from hf_doge.cli.data import load_domain_data
from hf_doge.cli.mixtures import describe_blocks, load_weights
from hf_doge.cli.models import get_config, make_model
from hf_doge.evaluation.comparison import BASELINES
from hf_doge.plots import plot_comparison
from hf_doge.training.compare import compare_mixtures


@dataclass
class ComparisonArguments:
    """Which mixtures, how often."""

    weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Mixtures beside the baselines, as name=WEIGHTS or WEIGHTS alone, which is then called 'learned'. "
            "WEIGHTS is the output folder of `hf-doge learn`, a folder or Hub name of an artifact, or a JSON or YAML "
            "file of weights."
        },
    )
    baselines: list[str] = field(
        default_factory=lambda: list(BASELINES),
        metadata={"help": "Which of uniform and natural (in proportion to tokens) to compare with."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3],
        metadata={"help": "Seeds of model initialisation and data order; every mixture is trained once with each."},
    )
    target: list[str] | None = field(
        default=None, metadata={"help": "Domain(s) that no model is trained on, but all are evaluated on."}
    )


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    data_args, model_args, comparison_args, args = parse(
        argv,
        DataArguments,
        ModelArguments,
        ComparisonArguments,
        TrainingArguments,
        prog="hf-doge compare",
        description=(
            "Train the same model for the same number of tokens on uniform, natural and given weights, and tabulate its "
            "perplexity on every domain. Finished runs are kept and not trained again. Every argument of a Trainer is a "
            "flag too, except that --seeds takes the place of --seed."
        ),
        defaults={"output_dir": "doge_comparison", "learning_rate": 5e-4, "save_strategy": "no"},
    )
    if isinstance(get_resume(args), str):
        raise ValueError(
            "`hf-doge compare` keeps finished runs and trains the others from their start, so `--resume_from_checkpoint` must "
            f"name no checkpoint, but got {args.resume_from_checkpoint!r}. Leave it out."
        )
    output_dir = get_output_dir(args)
    data = load_domain_data(data_args, output_dir, targets=comparison_args.target or ())
    mixtures = load_mixtures(comparison_args, describe_blocks(data.train, data_args.block_size))
    config = get_config(model_args, data.tokenizer, data_args.block_size)
    comparison = compare_mixtures(
        partial(make_model, model_args.model_name_or_path, config),
        args,
        mixtures=mixtures,
        seeds=comparison_args.seeds,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=collate_blocks,
        tokens_per_example=data_args.block_size,
        identity={
            "model": model_args.model_name_or_path or config.to_dict(),
            "data": data.fingerprints,
        },
    )
    comparison.save(output_dir)
    plot = save_plot(partial(plot_comparison, comparison.to_plot_rows()), output_dir / "comparison.png")
    say(comparison.to_markdown())
    say(f"Table: {output_dir / 'comparison.md'} (.parquet, .json){f', plot: {plot}' if plot else ''}")
    return 0


def load_mixtures(args: ComparisonArguments, domains: dict[str, dict[str, int]]) -> dict[str, DomainWeights]:
    """
    Weights of every mixture by name, baselines first.

    Raises:
        `ValueError`: for an unknown baseline, and for names that are repeated or cannot name a file.
    """
    unknown = sorted(set(args.baselines) - set(BASELINES))
    if unknown:
        raise ValueError(
            f"`--baselines` must be among {list(BASELINES)}, but got {unknown}. Give others as `--weights`."
        )
    mixtures = {name: load_weights(name, domains) for name in args.baselines}
    for word in args.weights or ():
        name, equals, spec = word.partition("=")
        if not equals:
            name, spec = "learned", word
        if name in mixtures or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"Every mixture must have a name of its own, of letters, digits and .-_, but got {name!r} in {word!r}. "
                "Write `--weights name=WEIGHTS`."
            )
        mixtures[name] = load_weights(spec, domains)
    return mixtures
