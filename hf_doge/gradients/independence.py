"""What it takes to compare an example of a batch with the same example alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_doge.functional.tracin_we import token_gradient_rows
from hf_doge.gradients.example_losses import IGNORE_INDEX

# Relative to the norm of the rows: room for rounding, but not for another function.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}
_HALF_TOLERANCE = 0.3


def few_examples(batch: Mapping[str, object], examples: Tensor) -> dict[str, object]:
    """
    The batch of some examples, padded as before.

    Args:
        batch (`Mapping`): Inputs of a model, with `input_ids`.
        examples (`torch.Tensor` of shape `(n,)`): Which to take.

    Returns:
        `dict[str, object]`: the same keys; what has not one line for each example is passed on unchanged.
    """
    size = len(batch["input_ids"])
    return {
        key: value[examples.to(value.device)]
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        else value
        for key, value in batch.items()
    }


def single_example(
    batch: Mapping[str, object], example: int, *, strip_padding: bool, encoder_decoder: bool
) -> dict[str, object]:
    """
    The batch of one example.

    Args:
        batch (`Mapping`): Inputs of a model, with `input_ids`.
        example (`int`): Which example to take.
        strip_padding (`bool`):
            Whether to take out the positions that a 2-D `attention_mask` hides. Without one the padding stays.
        encoder_decoder (`bool`):
            Whether the labels have positions of their own. They then lose the ignored ones at either end, unless the
            batch brings the decoder's inputs with it.

    Returns:
        `dict[str, object]`: the same keys; what is no tensor of the batch is passed on unchanged.
    """
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    strip_padding = strip_padding and input_ids.ndim == 2 and mask is not None and mask.shape == input_ids.shape
    alone = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            of_decoder = key.startswith("decoder_") or (key == "labels" and encoder_decoder)
            soft_labels = key == "labels" and value.is_floating_point()  # one per class, not per position
            by_position = value.ndim > 1 and value.shape[1] == input_ids.shape[1]
            value = value[example : example + 1] if value.shape[0] == input_ids.shape[0] else value
            if strip_padding and by_position and not of_decoder and not soft_labels:
                value = value[:, mask[example].bool()]
            if strip_padding and of_decoder and key == "labels" and "decoder_input_ids" not in batch:
                value = _without_ignored_ends(value)
        alone[key] = value
    return alone


def _without_ignored_ends(labels: Tensor) -> Tensor:
    if labels.ndim != 2 or labels.is_floating_point():
        return labels
    labelled = (labels[0] != IGNORE_INDEX).nonzero()
    return labels[:, labelled.min() : labelled.max() + 1]


def rows_agree(example: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], *, dtype: torch.dtype) -> bool:
    """
    Whether two computations of an example's `tokens (W,), rows (W, width)` in `dtype` differ by rounding only. A row
    that one of them lacks counts as zero.
    """
    (tokens, rows), (other_tokens, other_rows) = example, other
    _, difference = token_gradient_rows(torch.cat([tokens, other_tokens]), torch.cat([rows, -other_rows]))
    return bool(difference.norm() <= _TOLERANCE.get(dtype, _HALF_TOLERANCE) * other_rows.norm())


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """The model without the autocast that accelerate puts around its forward: as it computes on its own."""
    original, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is None or wrapped is None:
        yield
        return
    try:
        model.forward = original
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.forward = wrapped
