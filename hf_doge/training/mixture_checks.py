"""What a trainer must leave to [`~hf_doge.training.mixture.DomainWeightedMixin`], which draws its examples by weights."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

from datasets import IterableDataset
from torch.utils.data import RandomSampler
from transformers import Trainer

from hf_doge.sampling.streaming import warn_that_all_processes_read_everything

logger = logging.getLogger(__name__)


def refuse_lost_column(trainer: Trainer, domain_column: str) -> None:
    """The trainer may prepare the train set, but each example must keep its domain."""
    train_dataset: Any = trainer.train_dataset
    column_names = train_dataset.column_names  # `None` for streams that do not know
    if column_names is not None and domain_column not in column_names:
        raise ValueError(
            f"The train set must keep its column {domain_column!r}, but {type(trainer).__name__} prepared it down to "
            f"{column_names}. Rows that it packs itself mix domains: switch that off, or pack the data of each domain before."
        )


def refuse_untaken_rows(trainer: Trainer, dataset: Any, what: str) -> None:
    """Rows must have a column that the model reads, besides labels, where the Trainer drops all others. (`what` names them.)"""
    columns = getattr(dataset, "column_names", None)  # `None` for streams that do not know
    is_known = (getattr(dataset, "format", None) or {}).get("type") != "custom"
    if columns is None or not (trainer.args.remove_unused_columns and is_known) or trainer.model is None:
        return
    trainer._set_signature_columns_if_needed()
    taken: Any = trainer._signature_columns
    if not set(columns) & (set(taken) - {"labels", "label", "label_ids", *_own_columns(trainer)}):
        shown = sorted(name for name in columns if not name.startswith("__"))  # ours
        raise ValueError(
            f"{what} must hold what the model takes, such as `input_ids`, but their columns are {shown}, of which the "
            "Trainer drops what the model does not take. Tokenise them before, or set `remove_unused_columns=False` for a data "
            "collator that does it."
        )


def _own_columns(trainer: Any) -> tuple[Any, ...]:
    return trainer._domain_column, trainer._stream_column


def keeps_column(trainer: Trainer, column: str) -> bool:
    """Whether the examples of a stream still have a column after the trainer has prepared it; if not, that is said."""
    train_dataset: Any = trainer.train_dataset
    column_names = train_dataset.column_names  # `None` for streams that do not know
    if column_names is None or column in column_names:
        return True
    logger.warning(
        "Loss, tokens and share of each domain are not logged, since %s prepared the streams down to %s, without the column "
        "that tells the domain. Prepare them before, and pass what the model takes.",
        type(trainer).__name__,
        column_names,
    )
    return False


def refuse_lost_order(trainer: Trainer, get_sampler: Callable) -> None:
    """The sampler that ours takes the place of, the trainer's own, must be a plain random one: another means something."""
    dataset: Any = trainer.train_dataset
    lost = get_sampler(dataset) if inspect.signature(get_sampler).parameters else get_sampler()
    if type(lost) is RandomSampler and not lost.replacement and lost.num_samples == len(dataset):
        return
    owner = get_sampler.__qualname__.split(".")[-2]
    raise ValueError(
        "Examples are drawn by the weights, so the trainer must have no order of its own, but `_get_train_sampler` of "
        f"{owner} returns {'a ' + type(lost).__name__ if lost is not None else 'none'}, whose order (groups of one prompt, say) would be lost. Mix the data "
        f"instead: pass `interleave_domains(datasets, weights)` as `train_dataset` to {owner} without the mixin."
    )


def refuse_arguments(args: Any) -> None:
    """Arguments that ask for an order of their own, or change the number of examples of a step."""
    if getattr(args, "auto_find_batch_size", False):
        raise ValueError("The order depends on the batch size, so `auto_find_batch_size` must be off. Set the size.")
    strategy = getattr(args, "train_sampling_strategy", "random")
    strategy = "group_by_length" if getattr(args, "group_by_length", False) else strategy
    if strategy != "random":
        raise ValueError(
            f"The order is drawn by the weights, so `train_sampling_strategy` must be 'random', but got {strategy!r}. Set "
            "it to 'random'. If the trainer needs its own order, as trl's KTOTrainer does for every loss with a KL term "
            "(all but `loss_type='apo_zero_unpaired'`), mix the data instead: pass `interleave_domains(datasets, "
            "weights)` to that trainer without the mixin."
        )


def refuse_endless(args: Any) -> None:
    """A training on streams must say when it ends."""
    if getattr(args, "max_steps", -1) <= 0:
        raise ValueError("A mixture of streams has no end, so `max_steps` must be positive. Set it.")


def warn_of_reading_everything(args: Any, mixed: IterableDataset) -> None:
    """Where every process reads the mixture in full."""
    config, num_processes = args.accelerator_config, args.world_size
    if config.dispatch_batches is False and (mixed.num_shards < num_processes or config.split_batches):
        warn_that_all_processes_read_everything()
