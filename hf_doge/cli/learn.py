"""`hf-doge learn`: learn domain weights with a proxy model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from datasets import Dataset, concatenate_datasets
from transformers import set_seed

from hf_doge.checks import check_count
from hf_doge.cli.arguments import DataArguments, ModelArguments, get_output_dir, get_resume
from hf_doge.cli.console import say
from hf_doge.cli.mixtures import describe_estimate, save_results
from hf_doge.cli.models import get_config, make_model
from hf_doge.cli.parser import parse
from hf_doge.data.blocks import collate_blocks
from hf_doge.data.domain_data import load_shared_domain_data
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer

HELDOUT_MIX = "heldout_mix"
TERMINATED = 143  # what shells say of a program that SIGTERM ended


@dataclass
class TargetArguments:
    """What the weights should serve."""

    _argument_group_name = "target"

    target: list[str] | None = field(
        default=None,
        metadata={
            "help": "Domain(s) that the weights should serve and that are kept out of the mixture (out-of-domain), or "
            "'heldout_mix' for equal parts carved from the training domains. Default: the training domains themselves."
        },
    )
    max_target_tokens: int | None = field(
        default=None, metadata={"help": "Use no more than this many train tokens of each target domain."}
    )
    heldout_fraction: float = field(
        default=0.1,
        metadata={
            "help": "With --target heldout_mix: share of the smallest domain that each domain gives, in (0, 1). "
            "The proxy is not trained on what is given."
        },
    )

    def __post_init__(self) -> None:
        check_count("--max_target_tokens", self.max_target_tokens, optional=True)
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"`--heldout_fraction` must be in (0, 1), but got {self.heldout_fraction}.")
        if self.target is not None and HELDOUT_MIX in self.target and len(self.target) > 1:
            raise ValueError(
                f"`--target` must be domains or 'heldout_mix', but got {self.target}. Drop one of the two."
            )


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    data_args, model_args, target_args, args = parse(
        argv,
        DataArguments,
        ModelArguments,
        TargetArguments,
        DoGEConfig,
        prog="hf-doge learn",
        description="Learn domain weights with a small proxy model, by DoGE. Every argument of a Trainer is a flag too.",
        defaults={"output_dir": "doge_proxy", "learning_rate": 5e-4},
    )
    data_args.take_tokenizer_of(model_args.model_name_or_path)
    resume, output_dir = get_resume(args), get_output_dir(args)
    uses_heldout_mix = target_args.target == [HELDOUT_MIX]
    data = load_shared_domain_data(
        data_args,
        output_dir,
        args=args,
        targets=() if uses_heldout_mix else target_args.target or (),
        max_target_tokens=target_args.max_target_tokens,
    )
    train, target = data.train, data.targets or None
    if uses_heldout_mix:
        train, target = carve_heldout_mix(train, target_args.heldout_fraction)

    config = get_config(model_args, data.tokenizer, data_args.block_size)
    set_seed(args.seed)
    trainer = DoGETrainer(
        make_model(model_args.model_name_or_path, config, data.tokenizer),
        args,
        train_dataset=train,
        target_dataset=target,
        eval_dataset=data.validation,
        data_collator=collate_blocks,
        processing_class=data.tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps and not trainer.has_settled:
        say(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint. Go on with "
            "`--resume_from_checkpoint last`."
        )
        return TERMINATED
    if args.should_save:
        save_results(trainer.domain_weights, output_dir)
        if data.targets:
            say(describe_estimate(trainer.domain_weights, data))
    return 0


def carve_heldout_mix(train: Mapping[str, Dataset], fraction: float) -> tuple[dict[str, Dataset], Dataset]:
    """
    Move the last blocks of every domain, the same number of each, into one target set.

    Args:
        train (`Mapping[str, Dataset]`): Blocks by domain.
        fraction (`float`): Share of the smallest domain that every domain gives, rounded up to a block.

    Returns:
        `tuple[dict[str, Dataset], Dataset]`: what is left to train on, and the mix.

    Raises:
        `ValueError`: if a domain would have nothing left.
    """
    smallest = min(train, key=lambda name: len(train[name]))
    num_given = max(1, round(fraction * len(train[smallest])))
    if num_given >= len(train[smallest]):
        raise ValueError(
            f"Every domain must keep a block to train on, but {smallest!r} has {len(train[smallest])} and would give "
            f"{num_given} to the held-out mix. Lower `--heldout_fraction` or `--block_size`."
        )
    kept = {name: rows.select(range(len(rows) - num_given)) for name, rows in train.items()}
    given = [rows.select(range(len(rows) - num_given, len(rows))) for rows in train.values()]
    return kept, concatenate_datasets(given)
