"""
How well each domain's gradient lines up with the target's, on a live model.

Two exact ways behind one protocol, [`DomainAlignment`]. [`PerDomainAlignment`] keeps every domain's gradient until the
weights are known: one backward per domain, K x P memory. [`StreamedAlignment`] keeps the target's gradient only and
computes each domain's again for the step: more backwards, 3 x P memory whatever K is. Both give the same numbers,
dropout included, because a repeated forward replays the random state of the first (see [`RandomReplay`]).

Shapes: K = training domains, P = trainable parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_doge.functional.doge import clip_scale

Gradient = list[Tensor | None]  # one entry per trainable parameter; None where the loss does not reach it


class GradientSource(Protocol):
    """
    One optimizer step's losses, ready to be differentiated.

    Each backward adds `weight` times the gradient of the mean loss of one domain (over all micro-batches of the step)
    to `.grad` of the parameters, and returns that mean loss as a detached scalar. Calling it again gives the same.
    """

    @property
    def present_domains(self) -> Sequence[int]:
        """The training domains that have at least one token in this step."""

    @property
    def target_weights(self) -> Mapping[int, float] | None:
        """Weight of each target that has at least one token; `None` when the targets are the training domains."""

    def backward(self, domain: int, *, weight: float = 1.0) -> Tensor:
        """Differentiate the mean loss of a training domain."""

    def target_backward(self, target: int) -> Tensor:
        """Differentiate the mean loss of a target."""


@dataclass
class Alignment:
    """
    What one step says about each domain. Entries of absent or non-finite domains are NaN.

    Attributes:
        inner_products (`torch.Tensor` of shape `(num_train_domains,)`, float64):
            `<g_j, G>` over the scored parameters, `G` the weighted sum of the target gradients.
        norms (`torch.Tensor` of shape `(num_train_domains,)`, float64):
            `||g_j||` over the scored parameters, after clipping.
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
    """A way to the alignment of one step and to the weighted gradient that steps the model."""

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


class _BackwardAlignment:
    """What both ways share: reading gradients off the parameters and comparing them."""

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        num_domains: int,
        scored_names: set[str] | None = None,
        max_norm: float | None = None,
    ) -> None:
        """
        Args:
            named_parameters: The trainable parameters with their names, each once.
            num_domains (`int`): How many training domains there are.
            scored_names (`set[str]`, *optional*): Parameters whose gradients are compared; all when `None`. The model
                is stepped on all parameters either way.
            max_norm (`float`, *optional*): Clip each domain's and each target's gradient, alone, to this norm.
        """
        self.parameters = [parameter for _, parameter in named_parameters]
        self.scored = [scored_names is None or name in scored_names for name, _ in named_parameters]
        self.num_domains = num_domains
        self.max_norm = max_norm

    def align(self, source: GradientSource) -> Alignment:
        alignment = Alignment.empty(self.num_domains)
        universal = source.target_weights is None
        target = self._sum_of_domains(source, alignment) if universal else self._sum_of_targets(source)
        alignment.target_norm = self._inner_product(target, target).sqrt()
        for domain in source.present_domains:
            gradient = self._domain_gradient(source, domain, alignment)
            scale = alignment.step_scales[domain]
            if scale > 0:
                alignment.inner_products[domain] = scale * self._inner_product(gradient, target)
                alignment.norms[domain] = scale * self._inner_product(gradient, gradient).sqrt()
        return alignment

    def _domain_gradient(self, source: GradientSource, domain: int, alignment: Alignment) -> Gradient:
        """The unclipped gradient of one domain; notes its loss and clip factor."""
        loss = source.backward(domain)
        gradient = self._take_gradient()
        alignment.losses[domain] = loss.double()
        alignment.step_scales[domain] = self._clip_scale(gradient) if loss.isfinite() else 0.0
        return gradient

    def _sum_of_domains(self, source: GradientSource, alignment: Alignment) -> Gradient:
        """`sum_j g_j`, the universal target: the training domains of this very step."""
        total: Gradient = [None] * len(self.parameters)
        for domain in source.present_domains:
            gradient = self._domain_gradient(source, domain, alignment)
            self._add_to(total, gradient, scale=float(alignment.step_scales[domain]))
        return total

    def _sum_of_targets(self, source: GradientSource) -> Gradient:
        """`sum_m v_m G_m` over the given targets."""
        total: Gradient = [None] * len(self.parameters)
        for target, weight in source.target_weights.items():
            loss = source.target_backward(target)
            gradient = self._take_gradient()
            scale = self._clip_scale(gradient) if loss.isfinite() else 0.0
            if scale == 0.0:
                # A target that is not a number leaves nothing to compare with.
                return [torch.full_like(parameter, torch.nan) for parameter in self.parameters]
            self._add_to(total, gradient, scale=weight * scale)
        return total

    def _take_gradient(self) -> Gradient:
        """Move the gradients off the parameters."""
        gradient = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradient

    def _clip_scale(self, gradient: Gradient) -> float:
        """The factor that clips the whole gradient; 0 where it is not finite."""
        norm = self._inner_product(gradient, gradient, scored_only=False).sqrt()
        if not norm.isfinite():
            return 0.0
        return 1.0 if self.max_norm is None else float(clip_scale(norm, self.max_norm))

    def _inner_product(self, left: Gradient, right: Gradient, *, scored_only: bool = True) -> Tensor:
        """Inner product over the parameters, summed in float64: one flat float32 sum is off by 1e-3."""
        device = self.parameters[0].device
        dtype = torch.float64 if device.type != "mps" else torch.float32  # MPS has no float64
        total = torch.zeros((), dtype=dtype, device=device)
        for a, b, scored in zip(left, right, self.scored, strict=True):
            if a is not None and b is not None and (scored or not scored_only):
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


class PerDomainAlignment(_BackwardAlignment):
    """Keep all K gradients: one backward per domain and, with a target of its own, one per target."""

    def align(self, source: GradientSource) -> Alignment:
        self._kept: dict[int, Gradient] = {}
        return super().align(source)

    def _domain_gradient(self, source: GradientSource, domain: int, alignment: Alignment) -> Gradient:
        if domain not in self._kept:
            self._kept[domain] = super()._domain_gradient(source, domain, alignment)
        return self._kept[domain]

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        total: Gradient = [None] * len(self.parameters)
        for domain, gradient in self._kept.items():
            self._add_to(total, gradient, scale=float(coefficients[domain]))
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        self._kept = {}


class StreamedAlignment(_BackwardAlignment):
    """
    Keep one domain gradient at a time, beside the target's. Against a target of its own it costs two backwards per
    domain; in the universal setting three, because the sum of all domains has to be known first.
    """

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        write_weighted_gradient(source, coefficients)


def write_weighted_gradient(source: GradientSource, coefficients: Tensor) -> dict[int, Tensor]:
    """
    Accumulate `sum_j coefficients_j g_j` in `.grad` by one backward per domain, without comparing gradients.

    Returns:
        `dict[int, torch.Tensor]`: the mean loss of each domain that was differentiated.
    """
    return {
        domain: source.backward(domain, weight=float(coefficients[domain]))
        for domain in source.present_domains
        if coefficients[domain] != 0
    }


class RandomReplay:
    """
    Runs a block of code again with the random numbers of its first time, so that a second forward drops what the
    first one dropped. The first run of a key uses and advances the global generators as usual; repeats leave them alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [] if device.type == "cpu" else [device]
        self.device_type = device.type
        self._states: dict[object, tuple[Tensor, list[Tensor]]] = {}

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
