"""`hf-doge train`: train a model on given domain weights."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments, set_seed

from hf_doge.cli.arguments import DataArguments, ModelArguments, get_output_dir, get_resume
from hf_doge.cli.console import say
from hf_doge.cli.mixtures import describe_blocks, load_weights
from hf_doge.cli.models import get_config, make_model
from hf_doge.cli.parser import parse
from hf_doge.data.blocks import collate_blocks
from hf_doge.data.domain_data import load_shared_domain_data
from hf_doge.training.mixture import DomainWeightedTrainer


@dataclass
class MixtureArguments:
    """What to draw the training data by."""

    _argument_group_name = "mixture"

    weights: str = field(
        metadata={
            "help": "uniform, natural (in proportion to tokens), mixture (those of the mixture file), the output folder of `hf-doge learn`, a folder or Hub "
            "name of an artifact, or a JSON or YAML file of weights."
        }
    )
    target: list[str] | None = field(
        default=None, metadata={"help": "Domain(s) that are not trained on, but evaluated on."}
    )
    max_epochs_per_domain: float | None = field(
        default=None, metadata={"help": "Most times a domain is repeated; what exceeds it goes to the other domains."}
    )
    draw: str = field(
        default="quota",
        metadata={"help": "How domains are drawn: quota (low variance) or iid (as in the paper)."},
    )
    unit: str = field(
        default="examples",
        metadata={"help": "What weights are shares of: examples or tokens. Blocks of one length make them the same."},
    )
    phases: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights that take over from --weights, each with the part of the steps before it: 0.8=natural 0.95=final.json."
        },
    )

    def read_phases(self) -> list[tuple[float, str]]:
        """The parts of the training, from 0 on, and the words for their weights."""
        phases = [(0.0, self.weights)]
        for phase in self.phases or ():
            fraction, equals, spec = phase.partition("=")
            try:
                phases.append((float(fraction), spec))
            except ValueError:
                equals = ""
            if not equals or not spec:
                raise ValueError(
                    f"`--phases` must be parts of the training and weights, as in 0.8=natural, but got {phase!r}."
                )
        return phases


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    data_args, model_args, mixture_args, args = parse(
        argv,
        DataArguments,
        ModelArguments,
        MixtureArguments,
        TrainingArguments,
        prog="hf-doge train",
        description="Train a model on given domain weights. Every argument of a Trainer is a flag too.",
        defaults={"output_dir": "doge_model", "learning_rate": 5e-4},
    )
    data_args.take_tokenizer_of(model_args.model_name_or_path)
    resume, output_dir = get_resume(args), get_output_dir(args)
    data = load_shared_domain_data(data_args, output_dir, args=args, targets=mixture_args.target or ())
    domains = describe_blocks(data.train, data_args.block_size)
    phases = [
        (fraction, load_weights(spec, domains, given=data.weights)) for fraction, spec in mixture_args.read_phases()
    ]
    weights = phases[0][1]
    config = get_config(model_args, data.tokenizer, data_args.block_size)
    set_seed(args.seed)
    trainer = DomainWeightedTrainer(
        make_model(model_args.model_name_or_path, config, data.tokenizer),
        args,
        train_dataset=data.train,
        domain_weights=phases,
        max_epochs_per_domain=mixture_args.max_epochs_per_domain,
        draw=mixture_args.draw,
        unit=mixture_args.unit,
        eval_dataset=data.validation,
        data_collator=collate_blocks,
        processing_class=data.tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()

    metrics = trainer.evaluate()
    perplexities = {name: math.exp(metrics[f"eval_{name}_loss"]) for name in data.validation}
    epochs = trainer.get_domain_epochs()
    results: dict[str, Any] = {"domain_weights": weights.mean, "perplexity": perplexities, "epochs": epochs}
    if len(phases) > 1:
        results["phases"] = [[fraction, one.mean] for fraction, one in phases]
    results_file = output_dir / "domain_results.json"
    if args.should_save:
        results_file.write_text(json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False), encoding="utf-8")
    width = max(map(len, perplexities))
    say(f"{'domain':<{width}}  weight  epochs  perplexity")
    for name, perplexity in perplexities.items():
        drawn = f"{weights.mean[name]:6.4f}  {epochs[name]:6.2f}" if name in epochs else f"{'target':>14}"
        say(f"{name:<{width}}  {drawn}  {perplexity:10.2f}")
    say(f"Model: {output_dir}, results: {results_file}")
    return 0
