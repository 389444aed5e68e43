"""How many examples the processes take together: what a draw's number has to do with a training step."""

from typing import Any

from transformers import TrainingArguments

from hf_doge.sampling.prefetch import prefetch_lead


def examples_per_batch(args: TrainingArguments) -> int:
    """
    Examples of one micro-batch of all processes together.

    With `split_batches` accelerate cuts one batch of `per_device_train_batch_size` up among the processes; otherwise
    each process takes a batch of that size.

    Raises:
        `ValueError`: if a batch that is to be split cannot be.
    """
    if not accelerator_config(args).split_batches:
        return args.train_batch_size * args.world_size
    if args.train_batch_size % args.world_size:
        raise ValueError(
            f"With `split_batches` the batch size must be a multiple of the {args.world_size} processes, but it is "
            f"{args.train_batch_size}. Change `per_device_train_batch_size`."
        )
    return args.train_batch_size


def accelerator_config(args: TrainingArguments) -> Any:
    """As the arguments have read it: transformers declares what they are given."""
    return args.accelerator_config


def examples_per_step(args: TrainingArguments) -> int:
    """Examples of one optimizer step, over all processes and micro-batches."""
    return examples_per_batch(args) * args.gradient_accumulation_steps


def draws_of_batch(args: TrainingArguments, step: int, position: int) -> range:
    """
    The draws that this process trains on in one micro-batch: the processes take turns, micro-batch by micro-batch.

    Args:
        args (`TrainingArguments`): Of the run.
        step (`int`): Optimizer steps before this one.
        position (`int`): Micro-batches of the step before this one.
    """
    size = examples_per_batch(args)
    own = size // args.world_size
    first = step * examples_per_step(args) + position * size + args.process_index * own
    return range(first, first + own)


def describe_reading(args: TrainingArguments, num_shards: int) -> dict[str, Any]:
    """
    What decides which examples of a mixed stream a step holds, in plain values, for a resumed run to share.

    Where the mixture is read as one, by the main process for all or by all processes alike, that is the number of
    examples of a step. Where processes or workers read shards of their own, it is how these are shared out too.

    Args:
        args (`TrainingArguments`): Of the run.
        num_shards (`int`): Of the mixture.
    """
    config, reading = accelerator_config(args), {"examples_per_step": examples_per_step(args)}
    is_split = config.dispatch_batches is False and not config.split_batches and 1 < args.world_size <= num_shards
    if is_split or min(args.dataloader_num_workers, num_shards) > 1:
        reading |= {
            "num_shards": num_shards,
            "num_processes": args.world_size,
            "per_device_train_batch_size": args.train_batch_size,
            "dataloader_num_workers": args.dataloader_num_workers,
            "dispatch_batches": config.dispatch_batches is not False,
            "split_batches": config.split_batches,
        }
    return reading


def loader_lead(args: TrainingArguments) -> int:
    """
    [`~hf_doge.sampling.prefetch.prefetch_lead`] of a Trainer's train DataLoader.

    While `state.global_step` is `s`, in a callback or in `training_step`, no draw from
    `s * examples_per_step(args) + loader_lead(args)` on has been taken on any process.
    """
    return prefetch_lead(
        examples_per_batch(args),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
