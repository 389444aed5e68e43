"""Keeping our sampler in the DataLoader, alike on all processes, and at the right place."""

import warnings
from math import ceil
from typing import Any

from accelerate import skip_first_batches
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_doge.sampling.collation import describe_example, seeded
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.training.global_batch import accelerator_config, examples_per_batch
from hf_doge.training.same_stream import refuse_different_streams


def get_innermost_sampler(dataloader: DataLoader) -> Any:
    """
    The sampler that decides which examples are read, below every wrapper of accelerate; if there is none, what decides in its
    place.
    """
    batch_sampler: Any = getattr(dataloader, "batch_sampler", dataloader)
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    return getattr(batch_sampler, "sampler", batch_sampler)


class SamplerGuardCallback(TrainerCallback):
    """
    Raises at train begin if something replaced the trainer's sampler, if the processes do not draw alike, if an epoch does
    not come out even, or if a resumed run would not skip what it was trained on; warns of rows that are drawn at random; and moves the sampler to the epoch at hand. That includes a resumed epoch, where
    accelerate's wrapper for skipped batches does not pass `set_epoch` on, and, with `dispatch_batches`, skips too few.
    """

    def __init__(self, sampler: DomainWeightedSampler) -> None:
        self.sampler = sampler
        self._draws_not_skipped = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataloader = kwargs["train_dataloader"]
        found = get_innermost_sampler(dataloader)
        if found is not self.sampler:
            raise RuntimeError(
                f"The train DataLoader must draw through the trainer's {type(self.sampler).__name__}, but its innermost "
                f"sampler is {type(found).__name__}, so the domain weights would have no effect. Remove the code that "
                "replaces `_get_train_sampler`, `get_train_dataloader` or the prepared DataLoader."
            )
        if state.global_step > 0 and args.ignore_data_skip:
            raise ValueError(
                "A resumed run must go on behind the examples it was trained on, but with `ignore_data_skip=True` it would train "
                "on the first of an epoch again. Set it to False: of datasets nothing is read to skip them."
            )
        domains = self.sampler.domains
        settings = {name: getattr(self.sampler, name) for name in ("seed", "draw", "num_samples")}
        settings["rows by domain"] = dict(zip(domains.names, domains.sizes.tolist(), strict=True))
        refuse_different_streams(self.sampler.fingerprint(), settings, self.sampler.effective_weights)
        self._refuse_uneven_epoch(args, dataloader)
        if state.global_step > 0 or args.save_strategy != "no":
            _warn_of_random_rows(dataloader.dataset)
        self._draws_not_skipped = _count_draws_not_skipped(args, state, dataloader)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = int(state.epoch or 0)
        self.sampler.set_epoch(epoch)
        if self._draws_not_skipped:
            self.sampler.seek(epoch * self.sampler.num_samples + self._draws_not_skipped)
            self._draws_not_skipped = 0

    def _refuse_uneven_epoch(self, args: TrainingArguments, dataloader: DataLoader) -> None:
        batch_size, num_samples = examples_per_batch(args), self.sampler.num_samples
        if len(dataloader) * batch_size != num_samples:
            raise RuntimeError(
                f"An epoch of {num_samples} draws must come as {num_samples / batch_size:g} batches of {batch_size} "
                f"examples over {args.world_size} processes, but the train DataLoader has {len(dataloader)}, so some "
                "draws would be lost or trained on twice. Tensor, context and sequence parallelism and batch samplers "
                "of one's own are not supported."
            )


def _warn_of_random_rows(dataset: Any) -> None:
    """The data collator is seeded, a transform of the dataset is not."""
    if (getattr(dataset, "format", None) or {}).get("type") != "custom":
        return
    rows = []
    for seed in range(2):
        with seeded((), seed):
            rows.append(describe_example(dataset[0]))
    if rows[0] != rows[1]:
        warnings.warn(
            "The train set must give the same row each time, but its transform draws at random, so a resumed run sees other "
            "rows than one that was not interrupted. Draw in the data collator, whose generators are seeded by the batch.",
            stacklevel=2,
        )


def _count_draws_not_skipped(args: TrainingArguments, state: TrainerState, dataloader: DataLoader) -> int:
    """
    Draws by which a resumed epoch would begin too early.

    With `dispatch_batches` the main process draws a batch for every process, and steps of that size are counted; but
    accelerate up to 1.15 at least skips one batch a step. Whether the one installed does is tried out.
    """
    config = accelerator_config(args)
    if not config.dispatch_batches or config.split_batches or args.world_size == 1 or args.ignore_data_skip:
        return 0
    whole: Any = dataloader.batch_sampler
    skipped = len(whole) - len(skip_first_batches(dataloader, 1).batch_sampler)
    if skipped != 1:
        return 0
    accumulation = args.gradient_accumulation_steps
    steps_in_epoch = state.global_step % ceil(len(dataloader) / accumulation)
    return steps_in_epoch * accumulation * (args.world_size - 1) * args.train_batch_size


class StreamGuardCallback(TrainerCallback):
    """
    Raises at train begin if the processes do not draw alike from a stream of [`interleave_domains`]; warns where a resumed run
    does not skip what it was trained on.
    """

    def __init__(self, settings: dict[str, Any], weights: dict[str, float]) -> None:
        self.settings = settings
        self.weights = weights

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0 and args.ignore_data_skip:
            warnings.warn(
                "With `ignore_data_skip=True` a resumed run reads its streams from their beginning, so it trains on the first "
                "examples again and ends otherwise than one that was not interrupted. Set it to False for the same run.",
                stacklevel=2,
            )
        # the text of a float is exact
        refuse_different_streams(repr((self.settings, self.weights)), self.settings, self.weights)
