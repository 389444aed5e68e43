"""How many examples the processes take together: what a draw's number has to do with a training step."""

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
    if not args.accelerator_config.split_batches:
        return args.train_batch_size * args.world_size
    if args.train_batch_size % args.world_size:
        raise ValueError(
            f"With `split_batches` the batch size must be a multiple of the {args.world_size} processes, but it is "
            f"{args.train_batch_size}. Change `per_device_train_batch_size`."
        )
    return args.train_batch_size


def examples_per_step(args: TrainingArguments) -> int:
    """Examples of one optimizer step, over all processes and micro-batches."""
    return examples_per_batch(args) * args.gradient_accumulation_steps


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
