"""
One backward for each domain: [`PerDomainAlignment`] keeps every domain's gradient until the weights are known, K x P memory;
[`StreamedAlignment`] keeps the target's only and computes each domain's again for the step: more backwards, 3 x P memory
whatever K is. Both give the same numbers, dropout included, if the source replays its random numbers.

Shapes: K = training domains, P = trainable parameters.
"""

from math import isfinite

import torch
from torch import Tensor

from hf_doge.functional.doge import clip_scale
from hf_doge.gradients.alignment import Alignment, GradientSource, TargetMetric, apply_metric
from hf_doge.gradients.vectors import Gradient, Vectors, own_part


class StreamedAlignment:
    """
    Keep one domain gradient at a time, beside the target's. Against a target of its own it costs two backwards per
    domain; in the universal setting three, because the sum of all domains has to be known first.

    Everything asked for is linear in each process' own gradients: once the target's gradient is summed over the
    processes (P numbers), the inner products are sums of K numbers, and the step is one more sum of P. Only a norm is not
    linear: where norms are needed (clipping, normalization, `self_term=False`), each domain's gradient is summed, K x P.

    With FSDP2, every backward leaves each process its part of the *summed* gradient. Inner products and
    norms are then sums over the parts, K numbers, and the step is a combination of parts.

    Args:
        vectors ([`Vectors`]): The trainable parameters. The model is stepped on all of them, scored or not.
        num_domains (`int`): How many training domains there are; twice as many where they are aligned in halves.
        num_targets (`int`): 2 where they are, 1 otherwise.
        max_norm (`float`, *optional*): Clip each domain's and each target's gradient, alone, to this norm.
        needs_norms (`bool`): Whether anybody reads [`Alignment.norms`].
    """

    def __init__(
        self,
        vectors: Vectors,
        *,
        num_domains: int,
        num_targets: int = 1,
        max_norm: float | None = None,
        needs_norms: bool = True,
    ) -> None:
        self.vectors = vectors
        self.num_domains = num_domains
        self.num_targets = num_targets
        self.max_norm = max_norm
        self.needs_norms = needs_norms or max_norm is not None
        # Whether each domain's gradient is summed over the processes before anything else.
        self.sums_each_domain = vectors.is_sharded or (vectors.reduction.is_needed and self.needs_norms)

    def align(self, source: GradientSource, metric: TargetMetric | None = None) -> Alignment:
        vectors, alignment = self.vectors, Alignment.empty(self.num_domains, self.num_targets)
        targets = self._sum_domains(source, alignment) if source.target_weights is None else self.sum_targets(source)
        targets = apply_metric(metric, vectors, targets, source)
        target_square, squares = vectors.inner_product(targets[0], targets[0]), alignment.norms
        for domain in source.present_domains:
            gradient = self._domain_gradient(source, domain, alignment)
            scale = alignment.step_scales[domain]
            if scale > 0:
                for position, target in enumerate(targets):
                    alignment.inner_products[domain, position] = scale * vectors.inner_product(gradient, target)
                if self.needs_norms:
                    squares[domain] = vectors.inner_product(gradient, gradient)
        if vectors.is_sharded:
            products = alignment.inner_products
            numbers = vectors.sum_numbers(torch.cat([products.flatten(), squares, target_square[None]]))
            found, squares, target_square = numbers.split([products.numel(), self.num_domains, 1])
            alignment.inner_products = found.view_as(products)
        elif not self.sums_each_domain:
            alignment.inner_products = vectors.sum_numbers(alignment.inner_products)
        alignment.norms = alignment.step_scales * squares.sqrt()
        alignment.target_norm = target_square.sqrt().squeeze()
        return alignment

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        self._write(source, coefficients)

    def write_weighted_gradient(self, source: GradientSource, coefficients: Tensor) -> Tensor:
        losses = self._write(source, coefficients)
        if self.vectors.are_finite():
            return losses
        self.vectors.take()
        for domain in losses.isfinite().nonzero().flatten().tolist():  # whose is it?
            source.backward(domain)
            if not self.vectors.are_finite():
                losses[domain] = torch.nan
            self.vectors.take()
        return losses

    def forget(self) -> None:
        pass  # nothing is kept

    def sum_targets(self, source: GradientSource) -> list[Gradient]:
        """`sum_m v_m G_m` over the given targets and all processes; or one of their first halves, and one of their second."""
        vectors, is_clipped = self.vectors, self.max_norm is not None
        totals = [vectors.zeros() for _ in range(self.num_targets)]
        for target, weight in (source.target_weights or {}).items():
            loss = source.target_backward(target)
            gradient = vectors.take()
            if is_clipped:
                vectors.sum_over_processes(gradient)
            _, scale = self._loss_and_scale(loss, gradient, is_summed=is_clipped)
            if scale == 0.0:
                # A target that is not a number leaves nothing to compare with.
                return [[torch.full_like(own_part(p), torch.nan) for p in vectors.parameters]] * self.num_targets
            vectors.add(totals[target % self.num_targets], gradient, scale=weight * scale)
        if not is_clipped:
            for total in totals:
                vectors.sum_over_processes(total)
        return totals

    def _write(self, source: GradientSource, coefficients: Tensor) -> Tensor:
        """`sum_j coefficients_j g_j` into `.grad`; returns the losses."""
        losses = torch.full((self.num_domains,), torch.nan, dtype=torch.float64)
        for domain in source.present_domains:
            if coefficients[domain] != 0:
                losses[domain] = source.backward(domain, weight=float(coefficients[domain])).double()
        total = self.vectors.take()
        self.vectors.sum_over_processes(total)
        self.vectors.put(total)
        return self.vectors.sum_numbers(losses)

    def _domain_gradient(self, source: GradientSource, domain: int, alignment: Alignment) -> Gradient:
        """The unclipped gradient of one domain; notes its loss and clip factor."""
        loss = source.backward(domain)
        gradient = self.vectors.take()
        if self.sums_each_domain:
            self.vectors.sum_over_processes(gradient)
        found = self._loss_and_scale(loss, gradient, is_summed=self.sums_each_domain)
        alignment.losses[domain], alignment.step_scales[domain] = found
        return gradient

    def _sum_domains(self, source: GradientSource, alignment: Alignment) -> list[Gradient]:
        """`sum_j g_j`, the universal target: the training domains of this very step; likewise in halves."""
        totals = [self.vectors.zeros() for _ in range(self.num_targets)]
        for domain in source.present_domains:
            gradient = self._domain_gradient(source, domain, alignment)
            scale = float(alignment.step_scales[domain])
            self.vectors.add(totals[domain % self.num_targets], gradient, scale=scale)
        if not self.sums_each_domain:
            for total in totals:
                self.vectors.sum_over_processes(total)
        return totals

    def _loss_and_scale(self, loss: Tensor, gradient: Gradient, *, is_summed: bool) -> tuple[float, float]:
        """A domain's or target's loss and the factor that clips its gradient; 0 where either is not finite."""
        vectors = self.vectors
        square = vectors.inner_product(gradient, gradient, scored_only=False)
        found = torch.stack([loss.double().cpu(), (~square.isfinite()).double(), square])
        total, num_broken, sum_of_squares = vectors.sum_numbers(found)
        norm = (sum_of_squares if vectors.is_sharded else square).sqrt()
        total, num_broken = float(total), float(num_broken)
        if num_broken or not isfinite(total):
            return total, 0.0
        if self.max_norm is None:
            return total, 1.0
        assert is_summed or not vectors.reduction.is_needed
        return total, float(clip_scale(norm, self.max_norm))


class PerDomainAlignment(StreamedAlignment):
    """Keep all K gradients: one backward per domain and, with a target of its own, one per target."""

    def align(self, source: GradientSource, metric: TargetMetric | None = None) -> Alignment:
        self._kept: dict[int, Gradient] = {}
        return super().align(source, metric)

    def _domain_gradient(self, source: GradientSource, domain: int, alignment: Alignment) -> Gradient:
        if domain not in self._kept:
            self._kept[domain] = super()._domain_gradient(source, domain, alignment)
        return self._kept[domain]

    def forget(self) -> None:
        self._kept = {}

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        total = self.vectors.zeros()
        for domain, gradient in self._kept.items():
            self.vectors.add(total, gradient, scale=float(coefficients[domain]))
        self._kept = {}
        if not self.sums_each_domain:
            self.vectors.sum_over_processes(total)
        self.vectors.put(total)
