"""`hf-doge sweep`: the best mixture that small runs can find."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

from transformers import TrainingArguments

from hf_doge.artifacts import DomainWeights
from hf_doge.checks import check_count
from hf_doge.cli.arguments import DataArguments, ModelArguments, get_output_dir
from hf_doge.cli.compare import MeasureArguments, tokens_of_run
from hf_doge.cli.console import save_plot, say
from hf_doge.cli.mixtures import describe_blocks, estimate_for_targets
from hf_doge.cli.parser import parse
from hf_doge.data.domain_data import match_repetition
from hf_doge.plots import plot_sweep
from hf_doge.training.sweep import MIN_RANK_CORRELATION, sweep_domain_weights

IS_HELPER = "HF_DOGE_SWEEP_HELPER"  # in the environment of a process that another one started to share its runs


@dataclass
class SweepArguments:
    """Which mixtures are tried, and what their law is asked for."""

    _argument_group_name = "sweep"

    num_mixtures: int = field(default=16, metadata={"help": "Mixtures to train on, each with every seed."})
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Seeds of the runs."})
    concentration: float = field(
        default=1.0,
        metadata={
            "help": "How near the mixtures stay to natural proportions, equal parts and the estimate. Positive."
        },
    )
    kl_penalty: float = field(
        default=0.01, metadata={"help": "Nats of loss that a nat of divergence from natural proportions costs."}
    )
    max_epochs_per_domain: float | None = field(
        default=None, metadata={"help": "The weights found read no domain more often than this."}
    )
    full_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the training that the weights are for, which the cap refers to. Default: of a run."
        },
    )
    match_repetition: bool = field(
        default=False,
        metadata={
            "help": "Cut each domain so that these runs repeat it as often as a training on --full_tokens would with the same "
            "weights (arXiv 2606.07597)."
        },
    )
    jobs: int = field(
        default=1,
        metadata={
            "help": "Processes on this machine that share the runs. More machines that see --output_dir share them by the "
            "same command."
        },
    )

    def __post_init__(self) -> None:
        check_count("--jobs", self.jobs)
        if self.match_repetition and self.full_tokens is None:
            raise ValueError(
                "`--match_repetition` must know the tokens of the training that the weights are for. Set `--full_tokens`."
            )


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    data_args, model_args, sweep_args, measure_args, args = parse(
        argv,
        DataArguments,
        ModelArguments,
        SweepArguments,
        MeasureArguments,
        TrainingArguments,
        prog="hf-doge sweep",
        description=(
            "Train small models on several mixtures, fit a law of their losses, and find the weights at its minimum. Finished "
            "runs are kept and not trained again. Every argument of a Trainer is a flag too."
        ),
        defaults={"output_dir": "doge_sweep", "learning_rate": 5e-4, "save_strategy": "no"},
    )
    if find_spec("scipy") is None:
        raise ValueError("A sweep needs scipy. Install it by `pip install 'hf-doge[sweep]'`.")
    data_args.take_tokenizer_of(model_args.model_name_or_path)
    output_dir = get_output_dir(args)
    data = measure_args.load(data_args, output_dir)
    domains, full_tokens = describe_blocks(data.train, data_args.block_size), sweep_args.full_tokens
    if sweep_args.match_repetition:
        data = match_repetition(data, num_tokens=tokens_of_run(args, data_args.block_size), full_tokens=full_tokens)
    options = measure_args.run_options(data, data_args, model_args)
    command = [sys.executable, "-m", "hf_doge", "sweep", *argv]
    alone = {**os.environ, IS_HELPER: "1"}
    helpers = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, env=alone)
        for _ in range(0 if IS_HELPER in os.environ else sweep_args.jobs - 1)
    ]
    try:
        weights, comparison = sweep_domain_weights(
            args=args,
            **options,
            centers=[estimate_for_targets(data)] if data.targets else [],
            num_mixtures=sweep_args.num_mixtures,
            seeds=sweep_args.seeds,
            concentration=sweep_args.concentration,
            kl_penalty=sweep_args.kl_penalty,
            max_epochs_per_domain=sweep_args.max_epochs_per_domain,
            full_tokens=None if sweep_args.match_repetition else full_tokens,  # a run repeats as often already
        )
    finally:
        for helper in helpers:
            helper.terminate()  # what it was training, if anything, is nobody's any more
            helper.wait()
    if sweep_args.match_repetition:
        recipe = {**weights.recipe, "full_tokens": full_tokens, "match_repetition": True}
        weights = DomainWeights.from_mapping(weights.mean, recipe=recipe, domains=domains, metadata=weights.metadata)
    folder = output_dir / "domain_weights"
    weights.save_pretrained(folder, plot=True)
    comparison.save(output_dir)
    plot = save_plot(partial(plot_sweep, weights.metadata["sweep"]), output_dir / "sweep.png")
    say(f"{weights.summary()}\n{_describe(weights.recipe)}")
    say(f"Weights: {folder}{f', plot: {plot}' if plot else ''}")
    return 0


def _describe(recipe: dict) -> str:
    change, low, high = recipe["predicted_change"]
    text = (
        f"Predicted change of the loss from natural proportions: {change:+.4f} nats [{low:+.4f}, {high:+.4f}]. Rank correlation "
        f"of the law with runs it has not seen: {recipe['rank_correlation']:.2f}."
    )
    if recipe["rank_correlation"] < MIN_RANK_CORRELATION:
        text += (
            f"\nThe law does not fit: below {MIN_RANK_CORRELATION} its optimum is a guess. Train longer, with more mixtures or "
            "seeds, and compare before use."
        )
    return text
