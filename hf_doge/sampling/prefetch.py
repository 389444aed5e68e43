"""How far a DataLoader runs ahead of the training step."""

_DEFAULT_PREFETCH_FACTOR = 2  # torch's, for loaders with workers


def prefetch_lead(
    batch_size: int,
    *,
    gradient_accumulation_steps: int = 1,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
) -> int:
    """
    The most draws that a `DataLoader`, also one prepared by accelerate, may have taken beyond those trained on.

    Trained on are the draws of all optimizer steps done. The Trainer takes the micro-batches of a step before the
    first of them is trained on, accelerate takes one more to see the end coming, and each worker has `prefetch_factor`
    batches in the making. Ranks take the whole stream and keep their part, so all of them are equally far ahead.

    Weights that are to take effect at the same draw whatever the loader, see [`DomainWeightedSampler.set_weights`],
    begin at least this far ahead: fix a number of steps once, large enough for the loaders that you allow.

    Args:
        batch_size (`int`):
            Examples of one micro-batch of all processes together.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1):
            Micro-batches of an optimizer step.
        num_workers (`int`, *optional*, defaults to 0):
            Of the `DataLoader` of each process.
        prefetch_factor (`int`, *optional*):
            Of the `DataLoader`; torch's 2 by default.

    Returns:
        `int`: `batch_size * (gradient_accumulation_steps + 1 + num_workers * prefetch_factor)`.
    """
    prefetch_factor = _DEFAULT_PREFETCH_FACTOR if prefetch_factor is None else prefetch_factor
    return batch_size * (gradient_accumulation_steps + 1 + num_workers * prefetch_factor)
