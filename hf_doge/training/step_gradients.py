"""The losses of one optimizer step, cut by domain: what `gradients/alignment.py` differentiates."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_doge.gradients.alignment import RandomReplay


@dataclass
class DomainSlice:
    """The examples of one domain in one micro-batch, and how many tokens (or examples) its loss averages over."""

    inputs: dict[str, Any]
    num_items: int


def count_items(inputs: Mapping[str, Any], num_examples: int, *, labels_are_shifted: bool) -> Tensor:
    """
    How many labels of each example enter the loss: those that are not -100, one per example where there are no labels.

    Args:
        inputs (`Mapping[str, Any]`): One micro-batch.
        num_examples (`int`): Its number of examples, B.
        labels_are_shifted (`bool`): Whether the loss predicts each label from the position before (causal models).

    Returns:
        `torch.Tensor` of shape `(num_examples,)` and dtype int64, on the CPU.
    """
    labels = inputs.get("labels")
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif labels is not None and labels_are_shifted:
        labels = labels[..., 1:]
    if labels is None:
        return torch.ones(num_examples, dtype=torch.int64)
    return labels.ne(-100).reshape(num_examples, -1).sum(dim=1).cpu()


def cut_by_domain(
    inputs: Mapping[str, Any], domain_ids: Tensor, *, labels_are_shifted: bool
) -> dict[int, DomainSlice]:
    """
    Cut a micro-batch into one slice per domain that has a label in it.

    Args:
        inputs (`Mapping[str, Any]`): One micro-batch of B examples; tensors and lists of length B are cut.
        domain_ids (`torch.Tensor` of shape `(B,)`): Domain of each example.
        labels_are_shifted (`bool`): See [`count_items`].

    Raises:
        `ValueError`: if the collator merged the examples, so that rows cannot be told apart.
    """
    num_examples = len(domain_ids)
    merged = {
        name: tuple(value.shape)
        for name, value in inputs.items()
        if name in ("input_ids", "labels", "inputs_embeds") and torch.is_tensor(value) and len(value) != num_examples
    }
    if merged:
        raise ValueError(
            f"Every example must keep a row of its own in the batch, but for {num_examples} examples the collator "
            f"returned tensors of shape {merged}. Use a collator that pads instead of packing."
        )
    items = count_items(inputs, num_examples, labels_are_shifted=labels_are_shifted)
    domain_ids = domain_ids.cpu()
    slices = {}
    for domain in domain_ids.unique().tolist():
        rows = (domain_ids == domain).nonzero().squeeze(1)
        num_items = int(items[rows].sum())
        if num_items > 0:
            picked = {name: _pick_rows(value, rows, num_examples) for name, value in inputs.items()}
            slices[domain] = DomainSlice(picked, num_items)
    return slices


def _pick_rows(value: Any, rows: Tensor, num_examples: int) -> Any:
    if torch.is_tensor(value):
        return value[rows.to(value.device)] if value.dim() > 0 and len(value) == num_examples else value
    if isinstance(value, list) and len(value) == num_examples:
        return [value[row] for row in rows.tolist()]
    return value


class StepGradients:
    """
    A [`~hf_doge.gradients.alignment.GradientSource`] over the micro-batches of one step.

    Args:
        micro_batches (`list[dict[int, DomainSlice]]`): Train slices by domain, one dict per micro-batch.
        target_batches (`list[dict[int, DomainSlice]]`): Same for the targets; empty in the universal setting.
        target_weights (`dict[int, float]`, *optional*): Weight of each target; `None` in the universal setting.
        compute_loss (`Callable[[DomainSlice, int], Tensor]`):
            The loss that a slice adds to its domain's mean over that many items of the step.
        backward (`Callable[[Tensor], None]`): Differentiates a loss into `.grad`.
        replay (`RandomReplay`): Fresh for this step.
    """

    def __init__(
        self,
        micro_batches: list[dict[int, DomainSlice]],
        target_batches: list[dict[int, DomainSlice]],
        *,
        target_weights: dict[int, float] | None,
        compute_loss: Callable[[DomainSlice, int], Tensor],
        backward: Callable[[Tensor], None],
        replay: RandomReplay,
    ) -> None:
        self._train_slices = _collect_slices(micro_batches)
        self._target_slices = _collect_slices(target_batches)
        self.present_domains = sorted(self._train_slices)
        self.target_weights = target_weights
        if target_weights is not None:
            self.target_weights = {t: w for t, w in target_weights.items() if t in self._target_slices and w > 0}
        self._compute_loss = compute_loss
        self._backward = backward
        self._replay = replay
        self._seen: set[tuple[str, int]] = set()
        self.training_seconds = 0.0  # in each train domain's first backward: what training alone would take too

    @property
    def can_align(self) -> bool:
        """Whether there is something to compare with: the training domains, or a target that has a label."""
        return self.target_weights is None or bool(self.target_weights)

    def num_items(self, domain: int) -> int:
        """Labels of a training domain in this step."""
        return sum(piece.num_items for piece in self._train_slices.get(domain, []))

    def backward(self, domain: int, *, weight: float = 1.0) -> Tensor:
        """Add `weight` times the gradient of a training domain's mean loss to `.grad`; returns that loss."""
        return self._differentiate("train", domain, self._train_slices[domain], weight)

    def target_backward(self, target: int) -> Tensor:
        """Add the gradient of a target's mean loss to `.grad`; returns that loss."""
        return self._differentiate("target", target, self._target_slices[target], 1.0)

    def _differentiate(self, kind: str, domain: int, slices: list[DomainSlice], weight: float) -> Tensor:
        num_items = sum(piece.num_items for piece in slices)
        start = time.perf_counter()
        losses = []
        for position, piece in enumerate(slices):
            with self._replay((kind, domain, position)):
                loss = self._compute_loss(piece, num_items)
            self._backward(loss * weight)
            losses.append(loss.detach())
        if (kind, domain) not in self._seen:
            self._seen.add((kind, domain))
            self.training_seconds += time.perf_counter() - start if kind == "train" else 0.0
        return torch.stack(losses).sum()


def _collect_slices(batches: list[dict[int, DomainSlice]]) -> dict[int, list[DomainSlice]]:
    collected: dict[int, list[DomainSlice]] = {}
    for slices in batches:
        for domain, piece in slices.items():
            collected.setdefault(domain, []).append(piece)
    return collected
