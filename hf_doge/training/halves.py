"""A step whose examples are split in two halves, domain by domain, for scores that do not compare an example with itself."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_doge.gradients.alignment import Alignment
from hf_doge.gradients.vectors import Reduction


class Examples(Protocol):
    """Of one micro-batch; see [`~hf_doge.training.step_gradients.MicroBatch`]."""

    domain_ids: Tensor
    items: Tensor


def split_in_halves(batches: Sequence[Examples], num_domains: int, reduction: Reduction) -> None:
    """
    Make "domains" 2j and 2j + 1 of the examples of domain j, in turns over those with a label in the whole step: the same halves
    on any number of processes that take their micro-batches in turns.
    """
    counts = [torch.bincount(batch.domain_ids[batch.items > 0], minlength=num_domains) for batch in batches]
    num_batches = int(reduction.max(torch.tensor(len(batches), device=reduction.device)))
    table = torch.zeros(num_batches, reduction.num_processes, num_domains, dtype=torch.int64)
    for position, count in enumerate(counts):
        table[position, reduction.process_index] = count
    table = reduction.sum(table.to(reduction.device)).cpu()
    before = (table.flatten(0, 1).cumsum(dim=0) - table.flatten(0, 1)).view_as(table)
    for position, batch in enumerate(batches):
        ids, halves = batch.domain_ids, torch.zeros_like(batch.domain_ids)
        for domain in ids.unique().tolist():
            rows = (ids == domain).nonzero().squeeze(1)
            rank = batch.items[rows].gt(0).cumsum(dim=0) - 1 + before[position, reduction.process_index, domain]
            halves[rows] = rank % 2
        batch.domain_ids = 2 * ids + halves


class Halves:
    """
    What is known of the halves 2j and 2j + 1 of each domain j, as numbers of the domains.

    Args:
        num_items (`torch.Tensor` of shape `(2 * num_domains,)`): Labels of each half in the step, on all processes.
    """

    def __init__(self, num_items: Tensor) -> None:
        self._items = num_items.view(-1, 2)
        self.is_present = self._items.sum(dim=1) > 0

    def by_domain(self, alignment: Alignment) -> tuple[Tensor, Tensor, Tensor]:
        """
        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]` of shape `(num_domains,)` each: the mean losses; whether the domain
            can step the model, since all that is there of it is finite; whether it also has a score, for which it needs both
            halves.
        """
        is_broken = (self._items > 0) & (alignment.step_scales.view(-1, 2) == 0)
        usable = self.is_present & ~is_broken.any(dim=1)
        return self.mean_losses(alignment.losses), usable, usable & self._items.gt(0).all(dim=1)

    def mean_losses(self, losses: Tensor) -> Tensor:
        """Mean loss of each domain from those of its halves; NaN where one that is there is not finite."""
        parts = torch.where(self._items > 0, losses.view(-1, 2) * self._items, 0.0)
        return parts.sum(dim=1) / self._items.sum(dim=1)  # 0 / 0 is NaN

    def spread(self, shares: Tensor) -> Tensor:
        """The factor of each half's mean gradient in the step, from the shares of the domains."""
        items = self._items
        return (shares.unsqueeze(1) * items / items.sum(dim=1, keepdim=True).clamp(min=1)).flatten()
