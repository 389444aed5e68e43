"""
How well each domain's gradient lines up with the target's, on a live model.

Exact ways behind one protocol, [`DomainAlignment`]. The two plain ones are here: [`PerDomainAlignment`] keeps every
domain's gradient until the weights are known: one backward per domain, K x P memory. [`StreamedAlignment`] keeps the
target's gradient only and computes each domain's again for the step: more backwards, 3 x P memory whatever K is. Both give
the same numbers, dropout included, because a repeated forward replays the random state of the first (see
[`RandomReplay`]). The third, all domains from one backward, is in `single_pass.py`.

Shapes: K = training domains, P = trainable parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_doge.functional.doge import clip_scale
from hf_doge.gradients.domain_gradients import Segments
from hf_doge.gradients.reduction import Reduction
from hf_doge.gradients.sharding import as_part_of, is_counted_here, is_spread, own_part

# One entry per trainable parameter, `None` where the loss does not reach it; of a sharded parameter, this process' part.
Gradient = list[Tensor | None]


@dataclass(frozen=True)
class MixedBatch:
    """
    One micro-batch of all domains together, its examples in the order of their domains.

    Attributes:
        segments (`Segments`): Which examples are of which domain.
        num_items (`int`): Labels (or examples) that its loss averages over.
        lengths (`frozenset[int]`): How many rows an example may have in a layer.
        compute_loss (`Callable[[], torch.Tensor]`): One forward; the mean loss over all its labels.
    """

    segments: Segments
    num_items: int
    lengths: frozenset[int]
    compute_loss: Callable[[], Tensor]


class GradientSource(Protocol):
    """
    One optimizer step's losses, ready to be differentiated: this process' share of them.

    Each backward adds `weight` times the gradient of the mean loss of one domain (over all micro-batches of the step, on
    all processes) to `.grad` of the parameters, and returns that mean loss as a detached scalar. What is returned and
    added is this process' share: the sum over the processes is the whole. Calling it again gives the same. To sharded
    parameters the sum is added, and all processes must make the same calls.
    """

    @property
    def present_domains(self) -> Sequence[int]:
        """The training domains that have at least one token in this step, on any process."""

    @property
    def target_weights(self) -> Mapping[int, float] | None:
        """Weight of each target that has at least one token; `None` when the targets are the training domains."""

    def num_items(self, domain: int) -> int:
        """Labels of a training domain in this step, on all processes."""

    def backward(self, domain: int, *, weight: float = 1.0) -> Tensor:
        """Differentiate the mean loss of a training domain."""

    def target_backward(self, target: int) -> Tensor:
        """Differentiate the mean loss of a target."""

    def mixed_batches(self) -> Iterator[MixedBatch]:
        """The train micro-batches of this process that have a label, uncut."""

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of a loss to `.grad`."""

    def sample(self) -> "GradientSource | None":
        """A few train examples of this process as a step of their own, in two domains if there are two; `None` without any."""


@dataclass
class Alignment:
    """
    What one step says about each domain. Entries of absent or non-finite domains are NaN.

    Attributes:
        inner_products (`torch.Tensor` of shape `(num_train_domains,)`, float64):
            `<g_j, G>` over the scored parameters, `G` the weighted sum of the target gradients.
        norms (`torch.Tensor` of shape `(num_train_domains,)`, float64):
            `||g_j||` over the scored parameters, after clipping; NaN unless they were asked for.
        target_norm (`torch.Tensor` of shape `()`, float64): `||G||` over the scored parameters.
        losses (`torch.Tensor` of shape `(num_train_domains,)`, float64): Mean loss of each domain.
        step_scales (`torch.Tensor` of shape `(num_train_domains,)`, float64):
            The factor that clips each domain's gradient (1 without clipping, 0 where the domain cannot step the model).
    """

    inner_products: Tensor
    norms: Tensor
    target_norm: Tensor
    losses: Tensor
    step_scales: Tensor

    @classmethod
    def empty(cls, num_domains: int) -> "Alignment":
        """All entries unknown."""
        unknown = torch.full((num_domains,), torch.nan, dtype=torch.float64)
        return cls(
            unknown, unknown.clone(), torch.tensor(torch.nan).double(), unknown.clone(), torch.zeros_like(unknown)
        )

    @property
    def usable(self) -> Tensor:
        """Mask of shape `(num_train_domains,)`: present, with a finite loss and a finite gradient."""
        return self.step_scales > 0


class DomainAlignment(Protocol):
    """A way to the alignment of one step and to the weighted gradient that steps the model; equal on all processes."""

    def align(self, source: GradientSource) -> Alignment:
        """Compare every present domain's gradient with the target's; leaves `.grad` empty."""

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


class BackwardAlignment:
    """
    What all ways share: gradients are read off the parameters, compared, and added up over the processes.

    Everything asked for is linear in each process' own gradients: once the target's gradient is summed over the
    processes (P numbers), the inner products are sums of K numbers, and the step is one more sum of P. Only a norm is not
    linear: where norms are needed (clipping, normalization, `self_term=False`), each domain's gradient is summed, K x P.

    Of a model sharded by FSDP2 every backward leaves each process its part of the *summed* gradient. Inner products and
    norms are then sums over the parts, K numbers, and the step is a combination of parts.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        num_domains: int,
        scored_names: set[str] | None = None,
        max_norm: float | None = None,
        needs_norms: bool = True,
    ) -> None:
        """
        Args:
            named_parameters: The trainable parameters with their names, each once.
            num_domains (`int`): How many training domains there are.
            scored_names (`set[str]`, *optional*): Parameters whose gradients are compared; all when `None`. The model
                is stepped on all parameters either way.
            max_norm (`float`, *optional*): Clip each domain's and each target's gradient, alone, to this norm.
            needs_norms (`bool`): Whether anybody reads [`Alignment.norms`].
        """
        self.parameters = [parameter for _, parameter in named_parameters]
        self.scored = [scored_names is None or name in scored_names for name, _ in named_parameters]
        self.num_domains = num_domains
        self.max_norm = max_norm
        self.needs_norms = needs_norms or max_norm is not None
        self.reduction = Reduction()
        self.is_sharded = any(map(is_spread, self.parameters))
        self.is_counted = [is_counted_here(parameter) for parameter in self.parameters]

    def align(self, source: GradientSource) -> Alignment:
        alignment = Alignment.empty(self.num_domains)
        universal = source.target_weights is None
        target = self._sum_of_domains(source, alignment) if universal else self._sum_of_targets(source)
        if universal and not self._sums_each_domain:
            self._sum_over_processes(target)
        target_square, squares = self._inner_product(target, target), alignment.norms
        for domain in source.present_domains:
            gradient = self._domain_gradient(source, domain, alignment)
            scale = alignment.step_scales[domain]
            if scale > 0:
                alignment.inner_products[domain] = scale * self._inner_product(gradient, target)
                if self.needs_norms:
                    squares[domain] = self._inner_product(gradient, gradient)
        if self.is_sharded:
            numbers = torch.cat([alignment.inner_products, squares, target_square[None]])
            alignment.inner_products, squares, target_square = self._sum_numbers(numbers).split(
                [self.num_domains, self.num_domains, 1]
            )
        elif not self._sums_each_domain:
            alignment.inner_products = self._sum_numbers(alignment.inner_products)
        alignment.norms = alignment.step_scales * squares.sqrt()
        alignment.target_norm = target_square.sqrt().squeeze()
        return alignment

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        self._write(source, coefficients)

    def write_weighted_gradient(self, source: GradientSource, coefficients: Tensor) -> Tensor:
        losses = self._write(source, coefficients)
        if self._is_finite([parameter.grad for parameter in self.parameters]):
            return losses
        self._take_gradient()
        for domain in losses.isfinite().nonzero().flatten().tolist():  # whose is it?
            source.backward(domain)
            if not self._is_finite(self._take_gradient()):
                losses[domain] = torch.nan
        return losses

    def _write(self, source: GradientSource, coefficients: Tensor) -> Tensor:
        """`sum_j coefficients_j g_j` into `.grad`; returns the losses."""
        losses = torch.full((self.num_domains,), torch.nan, dtype=torch.float64)
        for domain in source.present_domains:
            if coefficients[domain] != 0:
                losses[domain] = source.backward(domain, weight=float(coefficients[domain])).double()
        self._sum_over_processes_in_place()
        return self._sum_numbers(losses)

    def forget(self) -> None:
        pass  # nothing is kept

    @property
    def _sums_each_domain(self) -> bool:
        """Whether each domain's gradient is summed over the processes before anything else."""
        return self.is_sharded or (self.reduction.is_needed and self.needs_norms)

    def _domain_gradient(self, source: GradientSource, domain: int, alignment: Alignment) -> Gradient:
        """The unclipped gradient of one domain; notes its loss and clip factor."""
        loss = source.backward(domain)
        gradient = self._take_gradient()
        if self._sums_each_domain:
            self._sum_over_processes(gradient)
        alignment.losses[domain], alignment.step_scales[domain] = self._loss_and_scale(loss, gradient)
        return gradient

    def _loss_and_scale(
        self, loss: Tensor, gradient: Gradient, *, is_summed: bool | None = None
    ) -> tuple[float, float]:
        """A domain's or target's loss and the factor that clips its gradient; 0 where either is not finite."""
        is_summed = self._sums_each_domain if is_summed is None else is_summed
        square = self._inner_product(gradient, gradient, scored_only=False)
        found = torch.stack([loss.double().cpu(), (~square.isfinite()).double(), square])
        total, num_broken, sum_of_squares = self._sum_numbers(found)
        norm = (sum_of_squares if self.is_sharded else square).sqrt()
        total, num_broken = float(total), float(num_broken)
        if num_broken or not isfinite(total):
            return total, 0.0
        if self.max_norm is None:
            return total, 1.0
        assert is_summed or not self.reduction.is_needed
        return total, float(clip_scale(norm, self.max_norm))

    def _sum_of_domains(self, source: GradientSource, alignment: Alignment) -> Gradient:
        """`sum_j g_j`, the universal target: the training domains of this very step."""
        total: Gradient = [None] * len(self.parameters)
        for domain in source.present_domains:
            gradient = self._domain_gradient(source, domain, alignment)
            self._add_to(total, gradient, scale=float(alignment.step_scales[domain]))
        return total

    def _sum_of_targets(self, source: GradientSource) -> Gradient:
        """`sum_m v_m G_m` over the given targets and all processes."""
        total: Gradient = [None] * len(self.parameters)
        for target, weight in source.target_weights.items():
            loss = source.target_backward(target)
            gradient = self._take_gradient()
            if self.max_norm is not None:
                self._sum_over_processes(gradient)
            _, scale = self._loss_and_scale(loss, gradient, is_summed=self.max_norm is not None)
            if scale == 0.0:
                # A target that is not a number leaves nothing to compare with.
                return [torch.full_like(own_part(parameter), torch.nan) for parameter in self.parameters]
            self._add_to(total, gradient, scale=weight * scale)
        if self.max_norm is None:
            self._sum_over_processes(total)
        return total

    def _take_gradient(self) -> Gradient:
        """Move the gradients off the parameters."""
        gradient = [None if parameter.grad is None else own_part(parameter.grad) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradient

    def _put_gradient(self, gradient: Gradient) -> None:
        """Into `.grad` of the parameters."""
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = None if part is None else as_part_of(parameter, part)

    def _sum_over_processes_in_place(self) -> None:
        """Sum `.grad` of the parameters over the processes."""
        gradient = self._take_gradient()
        self._sum_over_processes(gradient)
        self._put_gradient(gradient)

    def _sum_over_processes(self, gradient: Gradient) -> None:
        """In place; a parameter that some process reaches is one that all have a gradient of."""
        if self.is_sharded or not self.reduction.is_needed:
            return
        device = self.parameters[0].device
        reached = self.reduction.sum(torch.tensor([grad is not None for grad in gradient], device=device).int())
        for position, is_reached in enumerate(reached.tolist()):
            if is_reached and gradient[position] is None:
                gradient[position] = torch.zeros_like(self.parameters[position])
        self.reduction.sum_([grad for grad in gradient if grad is not None])

    def _is_finite(self, gradient: Gradient) -> bool:
        """Whether a gradient is finite on all processes."""
        device = self.parameters[0].device
        norms = [
            torch.linalg.vector_norm(own_part(part), dtype=torch.float32 if part.dtype.itemsize < 4 else None).to(
                device
            )
            for part in gradient
            if part is not None
        ]
        is_broken = bool(norms) and not torch.stack([norm.float() for norm in norms]).isfinite().all()
        return float(self._sum_numbers(torch.tensor(float(is_broken)))) == 0

    def _sum_numbers(self, numbers: Tensor) -> Tensor:
        """Sum a few numbers over the processes; they come and go on the CPU."""
        if not self.reduction.is_needed:
            return numbers
        return self.reduction.sum(numbers.to(self.parameters[0].device)).cpu()

    def _inner_product(self, left: Gradient, right: Gradient, *, scored_only: bool = True) -> Tensor:
        """
        Inner product over the parameters, summed in float64: one flat float32 sum is off by 1e-3. Of sharded parameters,
        what the parts of this process add to it.
        """
        device = self.parameters[0].device
        dtype = torch.float64 if device.type != "mps" else torch.float32  # MPS has no float64
        total = torch.zeros((), dtype=dtype, device=device)
        for a, b, scored, counted in zip(left, right, self.scored, self.is_counted, strict=True):
            if a is not None and b is not None and counted and (scored or not scored_only):
                total += (a.float() * b.float() if a.dtype.itemsize < 4 else a * b).sum(dtype=dtype).to(device)
        return total.cpu().double()

    def _add_to(self, total: Gradient, gradient: Gradient, *, scale: float) -> None:
        """`total += scale * gradient`; a scale of 0 adds nothing, not even NaN."""
        if scale == 0.0:
            return
        for position, grad in enumerate(gradient):
            if grad is None:
                continue
            if total[position] is None:
                total[position] = grad * scale
            else:
                total[position].add_(grad, alpha=scale)


class PerDomainAlignment(BackwardAlignment):
    """Keep all K gradients: one backward per domain and, with a target of its own, one per target."""

    def align(self, source: GradientSource) -> Alignment:
        self._kept: dict[int, Gradient] = {}
        return super().align(source)

    def _domain_gradient(self, source: GradientSource, domain: int, alignment: Alignment) -> Gradient:
        if domain not in self._kept:
            self._kept[domain] = super()._domain_gradient(source, domain, alignment)
        return self._kept[domain]

    def forget(self) -> None:
        self._kept = {}

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        total: Gradient = [None] * len(self.parameters)
        for domain, gradient in self._kept.items():
            self._add_to(total, gradient, scale=float(coefficients[domain]))
        self._kept = {}
        if not self._sums_each_domain:
            self._sum_over_processes(total)
        self._put_gradient(total)


class StreamedAlignment(BackwardAlignment):
    """
    Keep one domain gradient at a time, beside the target's. Against a target of its own it costs two backwards per
    domain; in the universal setting three, because the sum of all domains has to be known first.
    """


class RandomReplay:
    """
    Runs a block of code again with the random numbers of its first time, so that a second forward drops what the
    first one dropped. The first run of a key uses and advances the global generators as usual; repeats leave them alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [] if device.type == "cpu" else [device]
        self.device_type = device.type
        self._states: dict[object, tuple[Tensor, list[Tensor]]] = {}

    def fresh(self) -> "RandomReplay":
        """One that has not run anything yet."""
        again = copy(self)
        again._states = {}
        return again

    @contextmanager
    def __call__(self, key: object) -> Iterator[None]:
        """Run the block under the random state that `key` first ran under."""
        if key not in self._states:
            device_states = [torch.get_device_module(self.device_type).get_rng_state(d) for d in self.devices]
            self._states[key] = (torch.get_rng_state(), device_states)
            yield
            return
        cpu_state, device_states = self._states[key]
        with torch.random.fork_rng(devices=self.devices, device_type=self.device_type if self.devices else "cuda"):
            torch.set_rng_state(cpu_state)
            for device, state in zip(self.devices, device_states, strict=True):
                torch.get_device_module(self.device_type).set_rng_state(state, device)
            yield
