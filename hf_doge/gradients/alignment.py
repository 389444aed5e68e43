"""
How well each domain's gradient lines up with the target's: what is asked of one optimizer step, and what comes of it.

Exact ways behind one protocol, [`DomainAlignment`], which give the same numbers:

- `single_pass.py`: all domains from one backward of the mixed batch;
- `per_domain.py`: one backward per domain, every gradient kept until the weights are known (K x P memory), or each
  computed again for the step (3 x P memory whatever K is).

Domains may be aligned in halves, to tell what of a score is the noise of the examples at hand: then "domains" 2j and 2j + 1
are the first and the second half of domain j's examples, targets likewise, and there are two sums of targets: that of the
first halves and that of the second.

Shapes: K = training domains, P = trainable parameters.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_doge.gradients.domain_gradients import Segments
from hf_doge.gradients.vectors import Gradient, Vectors


@dataclass(frozen=True)
class MixedBatch:
    """
    One micro-batch of all domains together, its examples in the order of their domains.

    Attributes:
        segments (`Segments`): Which examples are of which domain.
        num_items (`int`): Labels (or examples) that its loss averages over.
        lengths (`frozenset[int]`): How many rows an example may have in a layer.
        compute_loss (`Callable[[], torch.Tensor]`): One forward; the mean loss over all its labels.
        in_line (`bool`): Whether its examples lie end to end in one line, of which each token counts as an example here.
    """

    segments: Segments
    num_items: int
    lengths: frozenset[int]
    compute_loss: Callable[[], Tensor]
    in_line: bool = False


class GradientSource(Protocol):
    """
    One optimizer step's losses, ready to be differentiated: this process' share of them.

    Each backward adds `weight` times the gradient of the mean loss of one domain (over all micro-batches of the step, on
    all processes) to `.grad` of the parameters, and returns that mean loss as a detached scalar. What is returned and
    added is this process' share: the sum over the processes is the whole. Calling it again gives the same. To sharded
    parameters the sum is added, and all processes must make the same calls.
    """

    @property
    def num_items(self) -> Tensor:
        """Labels of each training domain in this step, on all processes, shape `(num_train_domains,)`."""

    @property
    def present_domains(self) -> list[int]:
        """The training domains that have at least one token in this step, on any process."""

    @property
    def target_weights(self) -> Mapping[int, float] | None:
        """Weight of each target that has at least one token; `None` when the targets are the training domains."""

    def backward(self, domain: int, *, weight: float = 1.0) -> Tensor:
        """Differentiate the mean loss of a training domain."""

    def target_backward(self, target: int) -> Tensor:
        """Differentiate the mean loss of a target."""

    def mixed_batches(self) -> Iterator[MixedBatch]:
        """The train micro-batches of this process that have a label, uncut."""

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of a loss to `.grad`."""

    @property
    def uses_collectives(self) -> bool:
        """Whether all processes must call the loss equally often."""

    def equally_often(self, num_calls: int | None = None) -> AbstractContextManager[None]:
        """
        Inside, all processes come to the same number of calls of a loss that uses collectives; what is missing at the end is
        called with an example that does not count.

        Args:
            num_calls (`int`, *optional*):
                Of a trial, whose calls the trainer does not note: at least as many as a process can make in the block. By
                default, its mixed batches.
        """

    def sample(self) -> "GradientSource | None":
        """A few train examples of this process as a step of their own, in two domains if there are two; `None` without any."""


@dataclass
class Alignment:
    """
    What one step says about each domain. Entries of absent or non-finite domains are NaN.

    Attributes:
        inner_products (`torch.Tensor` of shape `(num_train_domains, num_targets)`, float64):
            `<g_j, G>` over the scored parameters, `G` the weighted sum of the target gradients. There is one `G`, or where
            domains are aligned in halves, one of the targets' first halves and one of their second.
        norms (`torch.Tensor` of shape `(num_train_domains,)`, float64):
            `||g_j||` over the scored parameters, after clipping; NaN unless they were asked for.
        target_norm (`torch.Tensor` of shape `()`, float64): `||G||` over the scored parameters.
        losses (`torch.Tensor` of shape `(num_train_domains,)`, float64): Mean loss of each domain.
        step_scales (`torch.Tensor` of shape `(num_train_domains,)`, float64):
            The factor that clips each domain's gradient: 1 without clipping, 0 where the domain cannot step the model,
            since it is absent or its loss or gradient is not finite.
    """

    inner_products: Tensor
    norms: Tensor
    target_norm: Tensor
    losses: Tensor
    step_scales: Tensor

    @classmethod
    def empty(cls, num_domains: int, num_targets: int) -> "Alignment":
        """All entries unknown."""
        products = torch.full((num_domains, num_targets), torch.nan, dtype=torch.float64)
        norms, losses = products[:, 0].clone(), products[:, 0].clone()
        return cls(products, norms, torch.tensor(torch.nan).double(), losses, torch.zeros_like(losses))


class TargetMetric(Protocol):
    """Which inner product: the plain one with what this makes of the target's gradient."""

    def __call__(self, vectors: Vectors, target: Gradient, *, weight: float) -> Gradient:
        """
        Args:
            vectors ([`Vectors`]): The parameters.
            target ([`Gradient`]): A weighted sum of gradients of mean losses.
            weight (`float`): The sum of those weights.
        """


class DomainAlignment(Protocol):
    """A way to the alignment of one step and to the weighted gradient that steps the model; equal on all processes."""

    def align(self, source: GradientSource, metric: TargetMetric | None = None) -> Alignment:
        """
        Compare every present domain's gradient with the target's; leaves `.grad` empty.

        Args:
            source (`GradientSource`): The step.
            metric (`TargetMetric`, *optional*): What the target's gradient is replaced by before it is compared.
        """

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        """
        Put `sum_j coefficients_j g_j` into `.grad` of the parameters.

        Args:
            source (`GradientSource`): The same step that was aligned.
            coefficients (`torch.Tensor` of shape `(num_train_domains,)`):
                Factor of each domain's gradient as the source gives it, clipping already multiplied in.
        """

    def write_weighted_gradient(self, source: GradientSource, coefficients: Tensor) -> Tensor:
        """
        The same for a step that was not aligned.

        Returns:
            `torch.Tensor` of shape `(num_train_domains,)`: the mean loss of each domain that was differentiated, NaN for
            the others and for a domain whose gradient is not finite; `.grad` is of no use then.
        """

    def forget(self) -> None:
        """Drop what is kept for [`write_gradient`], which is not going to be called."""


def apply_metric(
    metric: TargetMetric | None, vectors: Vectors, targets: list[Gradient], source: GradientSource
) -> list[Gradient]:
    """The sums of targets of a step, one or one for each half, in a metric."""
    if metric is None:
        return targets
    weights = source.target_weights or dict.fromkeys(source.present_domains, 1.0)
    totals = [sum(w for t, w in weights.items() if t % len(targets) == half) for half in range(len(targets))]
    return [metric(vectors, target, weight=total or 1.0) for target, total in zip(targets, totals, strict=True)]
