"""
The loss of every token, caught where a model reduces them to the one number it returns, or read where it returns them one by
one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_doge.gradients.alignment import MixedBatch
from hf_doge.gradients.domain_gradients import Segments


class UnsplittableLossError(Exception):
    """The loss is not a sum over tokens that can be told apart."""


class TokenLosses(TorchFunctionMode):
    """
    Keeps the losses that go into each `cross_entropy` called inside the context, before they are added up.

    Every loss of transformers ends there (language models, masked ones, seq2seq, classifiers), and so do most of one's
    own. What the model returns stays what it is. Log-probabilities of labels that a model returns, as trl's fused head does,
    are losses too, once [`read`] has seen them.

    ```python
    with TokenLosses() as losses:
        loss = model(**batch).loss
    losses.by_row  # (R,): sums to the loss, times the number of labels
    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._caught: list[Tensor | None] = []
        self._counted: list[Tensor] = []
        # Losses and which labels count, of each forward that returned them.
        self._told: list[tuple[Tensor, Tensor]] = []

    def read(self, outputs: Any) -> None:
        """Take the losses of labels whose log-probabilities a model returned, in shape `(B, T - 1)`; 0 for those that are ignored."""
        log_probs = getattr(outputs, "log_probs", None)
        if isinstance(log_probs, Tensor) and log_probs.dim() == 2:
            mask = getattr(outputs, "label_mask", None)
            counted = log_probs.detach().ne(0) if mask is None else mask
            self._told.append((-log_probs.flatten(), counted.flatten()))

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy:
            return func(*args, **kwargs)
        return self._cross_entropy(*args, **kwargs)

    def _cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        plain = weight is None and size_average is None and reduce is None and input.dim() == 2 and target.dim() == 1
        if not plain or reduction not in ("mean", "sum"):
            self._caught.append(None)
            return F.cross_entropy(
                input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
            )
        losses = F.cross_entropy(
            input, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
        counted = target.ne(ignore_index)
        self._caught.append(losses)
        self._counted.append(counted)
        total = losses.sum()
        return total if reduction == "sum" else total / counted.sum()

    @property
    def num_caught(self) -> int:
        """How many calls of `cross_entropy` there were."""
        return len(self._caught)

    @property
    def by_row(self) -> Tensor:
        """
        The losses of the rows, shape `(R,)`; 0 where a label is ignored.

        Raises:
            `UnsplittableLossError`: if there was no cross-entropy to catch, more than one, or one with class weights.
        """
        return self._find()[0]

    @property
    def counted(self) -> Tensor:
        """Which of the rows have a label that counts, bool of shape `(R,)`; raises as [`by_row`] does."""
        return self._find()[1]

    def _find(self) -> tuple[Tensor, Tensor]:
        if len(self._told) == 1:
            return self._told[0]
        if len(self._caught) != 1 or self._caught[0] is None:
            raise UnsplittableLossError(
                "the loss is not one plain cross-entropy over tokens"
                if self._caught or self._told
                else "the loss comes from no cross-entropy of torch"
            )
        return self._caught[0], self._counted[0]


def require_same_total(by_row: Tensor, loss: Tensor, num_items: int) -> None:
    """
    Raise unless the losses that were caught are the loss that was returned.

    Args:
        by_row (`torch.Tensor` of shape `(R,)`): What was caught.
        loss (`torch.Tensor` of shape `()`): What was returned, divided by `num_items`.
        num_items (`int`): Labels that count.
    """
    total, expected = float(by_row.detach().double().sum()), float(loss.detach()) * num_items
    tolerance = 1e-2 if loss.dtype.itemsize < 4 else 1e-4
    if abs(total - expected) > tolerance * max(abs(expected), 1e-6):
        raise UnsplittableLossError(
            f"its tokens add up to {total:.6g}, while the model returned {expected:.6g}: another term is in it"
        )


def weighted_token_loss(
    model: nn.Module, batch: MixedBatch, num_items: Tensor, coefficients: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    One forward of a mixed batch.

    Args:
        model (`nn.Module`): As the loss calls it.
        batch (`MixedBatch`): A micro-batch.
        num_items (`torch.Tensor` of shape `(K,)`): Labels of each domain in the whole step.
        coefficients (`torch.Tensor` of shape `(K,)`, *optional*): 1 by default.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss to differentiate, `sum_j coefficients_j L_j` as far as this micro-batch
        adds to it, and the detached part that it adds to each mean loss `L_j`, float64 of shape `(K,)` on the CPU.

    Raises:
        `UnsplittableLossError`: if the loss is not the sum of its tokens' losses.
    """
    with TokenLosses() as caught:
        handle = model.register_forward_hook(
            # log-probabilities without a gradient are for the trainer's logs
            lambda _, args, outputs: caught.read(outputs) if torch.is_grad_enabled() else None
        )
        try:
            loss = batch.compute_loss()
        finally:
            handle.remove()
    by_row, segments = caught.by_row, batch.segments
    if batch.in_line and len(by_row) == segments.num_examples - 1:
        by_row = F.pad(by_row, (0, 1))  # the last token predicts nothing
    if loss.isfinite() and by_row.isfinite().all():
        require_same_total(by_row, loss, batch.num_items)
    items = num_items.clamp(min=1).double()
    found = _sum_by_domain(by_row, segments).cpu() / items
    if not loss.isfinite():  # perhaps in a term that was not caught
        found = found.masked_fill(found != 0, torch.nan)
    factors = (1.0 if coefficients is None else coefficients) / items
    factors = factors.to(by_row.device, by_row.dtype)[segments.row_domains(len(by_row), by_row.device)]
    return (by_row * factors).sum(), found


def _sum_by_domain(by_row: Tensor, segments: Segments) -> Tensor:
    """Sums over the rows of each domain, float64 of shape `(K,)`, detached; 0 for absent domains."""
    rows = by_row.detach().double()
    if len(rows) % segments.num_examples:
        raise UnsplittableLossError(f"{len(rows)} losses do not divide among {segments.num_examples} examples")
    sums = torch.zeros(len(segments.sizes), dtype=torch.float64, device=rows.device)
    sums[segments.present] = segments.sums(rows)
    return sums
