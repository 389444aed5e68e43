"""Whether the steps of a training weigh their examples alike, told by what the model's loss is multiplied by."""

import math

import torch
from torch import Tensor

from hf_doge.gradients.example_losses import IGNORE_INDEX

_SAME_WEIGHT = 1e-2  # room for multiples in half precision


class EvenWeights:
    """
    Compares what the model's loss is multiplied by at some steps with what it was at the first of them.

    It must be the same number; or, where the loss of the model is a mean over labelled tokens that a Trainer makes a sum, or
    a mean over all micro-batches of the step, the same per label. A step with another number of micro-batches (the last
    one of an epoch) divides by another number and is compared with its like.

    Args:
        loss_is_scaled (`bool`): Whether a scaler of fp16 multiplies the loss by a power of two, another one as it goes.
    """

    def __init__(self, *, loss_is_scaled: bool) -> None:
        self._loss_is_scaled = loss_is_scaled
        self._first: dict[int, list[float]] = {}
        self._even: dict[int, set[int]] = {}

    def others(self, multiple: Tensor, counts: Tensor, all_counts: list[Tensor]) -> str | None:
        """
        The multiples of two steps, in words, if they are not those of steps that weigh their examples alike.

        Args:
            multiple (`torch.Tensor` of shape `()`): What the loss of the first micro-batch of a step was multiplied by.
            counts (`torch.Tensor` of shape `(2,)`): Of its labels, see [`count_labels`].
            all_counts (`list[torch.Tensor]`): The same of all micro-batches of the step.
        """
        number, own = float(multiple), counts.double().clamp(min=1).cpu()
        total = torch.stack([one.to(counts.device) for one in all_counts]).sum(dim=0).double().cpu()
        found = [number, *(number / own).tolist(), *(number * total / own).tolist()]
        first = self._first.setdefault(len(all_counts), found)
        even = self._even.setdefault(len(all_counts), set(range(len(found))))
        even -= {place for place in even if not self._agree(first[place], found[place])}
        return None if even else f"{first[0]:.4g} and {number:.4g}"

    def _agree(self, first: float, second: float) -> bool:
        if first == 0 or second == 0 or not math.isfinite(first) or not math.isfinite(second):
            return first == second
        ratio = second / first
        if self._loss_is_scaled and ratio > 0:
            ratio /= 2.0 ** round(math.log2(ratio))
        return abs(ratio - 1) <= _SAME_WEIGHT


def count_labels(labels: object) -> Tensor:
    """How many labels of a batch count, shape `(2,)`: of all positions, and of all but the first, as causal models count."""
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        return torch.ones(2)
    if labels.ndim == 1 or labels.is_floating_point():
        return torch.full((2,), len(labels))
    counted = labels != IGNORE_INDEX
    return torch.stack([counted.sum(), counted[:, 1:].sum()])
