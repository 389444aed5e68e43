"""Keeping our sampler in the DataLoader, and at the right epoch."""

from typing import Any

from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_doge.sampling.sampler import DomainWeightedSampler


def get_innermost_sampler(dataloader: DataLoader) -> Sampler:
    """The sampler that decides which examples are read, below every wrapper of accelerate."""
    batch_sampler = dataloader.batch_sampler
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    return batch_sampler.sampler


class SamplerGuardCallback(TrainerCallback):
    """
    Raises at train begin if something replaced the trainer's sampler, and moves it to the epoch at hand, also in a
    resumed epoch, where accelerate's wrapper for skipped batches does not pass `set_epoch` on.
    """

    def __init__(self, sampler: DomainWeightedSampler) -> None:
        self.sampler = sampler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = get_innermost_sampler(kwargs["train_dataloader"])
        if found is not self.sampler:
            raise RuntimeError(
                f"The train DataLoader must draw through the trainer's {type(self.sampler).__name__}, but its innermost "
                f"sampler is {type(found).__name__}, so the domain weights would have no effect. Remove the code that "
                "replaces `_get_train_sampler`, `get_train_dataloader` or the prepared DataLoader."
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
