"""
All domains from one forward and one backward of the mixed batch.

The loss that is differentiated is `sum_j L_j`, the mean loss of each domain, in one forward: every token counts
`1 / (labels of its domain)`. On the way back each layer's weight gradient is formed domain by domain instead of at once
(`segmented.py`), so each `g_j`, its inner products and its norm come out of that same backward, and the step
`sum_j alpha_j g_j` with the *new* weights is a combination of what is there already.

Per domain, gradients are kept multiplied out (`K x P` memory, no product more than a plain backward) or, with many domains or
few rows a domain, as the factors of each layer (memory by tokens, whatever K is; two products more per layer).
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hf_doge.functional.doge import clip_scale
from hf_doge.gradients.alignment import Alignment, GradientSource, MixedBatch, TargetMetric, apply_metric
from hf_doge.gradients.domain_gradients import DomainGradients, squared_norm
from hf_doge.gradients.fused_head import FUSED, WholeLogitsError, ask_for_logits
from hf_doge.gradients.per_domain import StreamedAlignment
from hf_doge.gradients.segmented import HiddenBatchError, SegmentedBackward
from hf_doge.gradients.token_losses import UnsplittableLossError, weighted_token_loss
from hf_doge.gradients.vectors import Gradient

logger = logging.getLogger(__name__)

_INEXACT = (HiddenBatchError, UnsplittableLossError, WholeLogitsError)  # what leaves the plain way only
_CALLS_OF_CHECK = 4  # of the loss, at most: all domains together twice, each of two alone
MIN_ROWS_PER_DOMAIN = 24  # of a micro-batch, below which a product more is cheaper than a matrix per domain


class SinglePassAlignment:
    """
    One forward and one backward of the mixed batch, for all domains.

    Where that cannot be exact, `plain` takes over: for one step if a loss or gradient is not finite, and for good if a
    module hides the batch dimension or the loss does not come apart into tokens. Which, and why, is logged once; with
    `is_required` it is an error instead.

    Args:
        model (`nn.Module`): The model itself, not its DDP wrapper.
        plain ([`StreamedAlignment`]): What takes over; it also knows the parameters, the domains and the norms.
        memory_budget (`float`): Bytes that kept matrices may take.
        tolerance (`float`): By how much of its length a gradient may differ from the plain way's in the check before the
            first step: rounding, 1e-3 in float32 and 0.1 in bfloat16.
        is_required (`bool`): Whether to raise rather than let `plain` take over for good.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plain: StreamedAlignment,
        memory_budget: float,
        tolerance: float = 1e-3,
        is_required: bool = False,
    ) -> None:
        self.model = model
        self.plain = plain
        self.vectors = plain.vectors
        self.num_domains = plain.num_domains
        self.memory_budget = memory_budget
        self.tolerance = tolerance
        self.is_required = is_required
        self._stores: list[DomainGradients] = []
        self._is_plain = False  # for good
        self._is_verified = False
        self._num_compared = 0  # domains that the check has seen on this process
        self._step_is_plain = False

    def align(self, source: GradientSource, metric: TargetMetric | None = None) -> Alignment:
        alignment = None
        self._verify(source)
        if not self._is_plain:
            targets = None if source.target_weights is None else self.plain.sum_targets(source)
            losses = self._run(source)
            if losses is not None:
                alignment = self._compare(source, targets, losses, metric)
        self._step_is_plain = alignment is None
        return self.plain.align(source, metric) if alignment is None else alignment

    def write_gradient(self, source: GradientSource, coefficients: Tensor) -> None:
        if self._step_is_plain:
            self.plain.write_gradient(source, coefficients)
            return
        total = [store.combine(coefficients) if not store.is_empty else None for store in self._stores]
        self._clear_stores()
        if not self.plain.sums_each_domain:
            self.vectors.sum_over_processes(total)
        self.vectors.put(total)

    def forget(self) -> None:
        self._stores = []  # with their memory: the next alignment may be many steps away
        self.plain.forget()

    def write_weighted_gradient(self, source: GradientSource, coefficients: Tensor) -> Tensor:
        """Between two updates of the weights: one ordinary step on the weighted loss."""
        self._verify(source)
        if not self._is_plain:
            losses = self._run_weighted(source, coefficients)
            if losses is not None:
                total = self.vectors.take()
                self.vectors.sum_over_processes(total)
                self.vectors.put(total)
                if self.vectors.are_finite():
                    return losses
                self.vectors.take()
        return self.plain.write_weighted_gradient(source, coefficients)

    def _compare(
        self, source: GradientSource, targets: list[Gradient] | None, losses: Tensor, metric: TargetMetric | None
    ) -> Alignment | None:
        """Read off the alignment; `None` if something is not finite."""
        present, num_targets = source.present_domains, self.plain.num_targets
        sums_each_domain = self.plain.sums_each_domain
        if sums_each_domain:
            self._sum_domains_over_processes(present)
        scales = torch.zeros(self.num_domains, dtype=torch.float64)
        scales[present] = 1.0
        products = torch.full((self.num_domains, num_targets), torch.nan, dtype=torch.float64)
        scored_norms = products[:, 0].clone()
        if self.plain.needs_norms:
            norms = self._sum_over_parameters(lambda store, _: store.squared_norms(), scored_only=False).sqrt()
            if self.plain.max_norm is not None:
                scales[present] = clip_scale(norms[present], self.plain.max_norm)
            if not all(self.vectors.scored):
                norms = self._sum_over_parameters(lambda store, _: store.squared_norms()).sqrt()
            scored_norms[present] = scales[present] * norms[present]
        if targets is None and metric is None and not self.vectors.reduction.is_needed:
            target, found = self._compare_with_sum(self._of_each_target(scales))
        else:
            if targets is None:
                targets = self._combine(scales)
            target = _stack(apply_metric(metric, self.vectors, targets, source))
            found = self._sum_over_parameters(
                lambda store, position: None if (g := target[position]) is None else store.inner_products(g),
                *([num_targets] if num_targets > 1 else []),
            )
            if not sums_each_domain:
                found = self.vectors.sum_numbers(found)
        products[present] = (scales.unsqueeze(1) * found.view_as(products))[present]
        target_norm = self.vectors.inner_product(target, target).sqrt()
        if not (target_norm.isfinite() and products[present].isfinite().all()):
            return None
        return Alignment(products, scored_norms, target_norm, losses, scales)

    def _of_each_target(self, scales: Tensor) -> Tensor:
        """The factor of each domain in the sum that it is compared with; for halves, in that of either half."""
        num_targets = self.plain.num_targets
        if num_targets == 1:
            return scales
        halves = torch.arange(self.num_domains) % num_targets
        return torch.stack([scales * (halves == half) for half in range(num_targets)])

    def _combine(self, scales: Tensor) -> list[Gradient]:
        """The sums of the scaled gradients, over all processes."""
        coefficients = self._of_each_target(scales)
        sums = [None if store.is_empty else store.combine(coefficients) for store in self._stores]
        targets = [sums] if coefficients.dim() == 1 else []
        for half in range(self.plain.num_targets - len(targets)):
            targets.append([None if total is None else total[half] for total in sums])
        if not self.plain.sums_each_domain:
            for target in targets:
                self.vectors.sum_over_processes(target)
        return targets

    def _compare_with_sum(self, coefficients: Tensor) -> tuple[Gradient, Tensor]:
        """The sums of the scaled gradients, and the inner product of each domain's with them."""
        target: Gradient = []
        products = self._zeros(*coefficients.shape[:-1])
        for store, scored in zip(self._stores, self.vectors.scored, strict=True):
            total, found = (None, None) if store.is_empty else store.combine_and_compare(coefficients)
            target.append(total)
            if scored and found is not None:
                products += found.to(products.device)
        return target, products.cpu()

    def _sum_over_parameters(
        self, question: Callable[[DomainGradients, int], Tensor | None], *num_targets: int, scored_only: bool = True
    ) -> Tensor:
        """Ask each parameter's store for K numbers, or for K of each target, and add them up: float64 on the CPU."""
        total = self._zeros(*num_targets)
        for position, (store, scored) in enumerate(zip(self._stores, self.vectors.scored, strict=True)):
            if not store.is_empty and (scored or not scored_only):
                answer = question(store, position)
                if answer is not None:
                    total += answer.to(total.device)
        return total.cpu()

    def _zeros(self, *num_targets: int) -> Tensor:
        return torch.zeros(self.num_domains, *num_targets, dtype=torch.float64, device=self.vectors.device)

    def _sum_domains_over_processes(self, present: list[int]) -> None:
        """Every domain's own gradient, summed over the processes: K x P numbers, for the sake of its norm."""
        for position, store in enumerate(self._stores if present else []):
            found = [store.of_domain(domain) for domain in present]
            gradients = [torch.zeros_like(self.vectors.parameters[position]) if g is None else g for g in found]
            self.vectors.reduction.sum_(gradients)
            self._stores[position] = DomainGradients.from_dense(
                dict(zip(present, gradients, strict=True)), num_domains=self.num_domains
            )

    def _run(self, source: GradientSource) -> Tensor | None:
        """One backward of every micro-batch into new stores; the mean losses, `None` if that failed on some process."""
        losses, trouble, is_finite = torch.zeros(self.num_domains, dtype=torch.float64), None, True
        try:
            with source.equally_often() if source.uses_collectives else nullcontext():
                losses = self._backward_all(source)
            is_finite = bool(losses.isfinite().all())
        except _INEXACT as error:
            trouble = str(error)
        return self._agree(source, losses, trouble, is_finite)

    def _backward_all(self, source: GradientSource) -> Tensor:
        """Fill new stores; returns what this process adds to the mean losses, and stops where one is not finite."""
        batches = list(source.mixed_batches())
        self._stores = self._make_stores(batches)
        losses = torch.zeros(self.num_domains, dtype=torch.float64)
        stores = dict(zip(self.vectors.parameters, self._stores, strict=True))
        handle = self.model.register_forward_pre_hook(
            lambda model, args, kwargs: (
                ask_for_logits(model, args, kwargs, memory_budget=self.memory_budget) if FUSED in kwargs else None
            ),
            with_kwargs=True,
        )
        try:
            with SegmentedBackward(self.model, stores) as segmented:
                for batch in batches:
                    segmented.start(batch.segments, batch.lengths, in_line=batch.in_line)
                    loss, found = weighted_token_loss(self.model, batch, source.num_items)
                    losses += found
                    if not found.isfinite().all():
                        break
                    source.differentiate(loss)
        finally:
            handle.remove()
        missed = [
            name for name, p in zip(self.vectors.names, self.vectors.parameters, strict=True) if p.grad is not None
        ]
        if missed:  # all domains together, from a use that went past us
            raise HiddenBatchError(f"the parameter {missed[0]!r} is used outside of the module that owns it")
        return losses

    def _run_weighted(self, source: GradientSource, coefficients: Tensor) -> Tensor | None:
        """One ordinary backward of the weighted loss into `.grad`; as [`_run`] otherwise."""
        losses, trouble = torch.zeros(self.num_domains, dtype=torch.float64), None
        try:
            with source.equally_often() if source.uses_collectives else nullcontext():
                for batch in source.mixed_batches():
                    loss, found = weighted_token_loss(self.model, batch, source.num_items, coefficients)
                    losses += found
                    source.differentiate(loss)
        except UnsplittableLossError as error:
            trouble = str(error)
        agreed = self._agree(source, losses, trouble, bool(losses.isfinite().all()))
        if agreed is not None:
            agreed[coefficients == 0] = torch.nan  # as the plain way, which does not look at them
        return agreed

    def _agree(self, source: GradientSource, losses: Tensor, trouble: str | None, is_finite: bool) -> Tensor | None:
        """What came of it on all processes together: the losses, or `None` and nothing left behind."""
        state = torch.tensor([float(trouble is not None), float(not is_finite)], dtype=torch.float64)
        total = self.vectors.sum_numbers(torch.cat([losses, state]))
        losses, (num_troubled, num_broken) = total[:-2], total[-2:].tolist()
        if num_troubled:
            self._give_up(trouble or "another process met what it cannot take apart")
        if num_troubled or num_broken:
            self._clear_stores()
            self.vectors.take()
            return None
        absent = torch.ones(self.num_domains, dtype=torch.bool)
        absent[list(source.present_domains)] = False
        return losses.masked_fill(absent, torch.nan)

    def _give_up(self, trouble: str) -> None:
        message = f"All domains cannot be had from one backward: {trouble}."
        if self.is_required:
            raise ValueError(f"{message} Use `alignment='auto'`, which goes the plain way instead.")
        logger.warning("%s From here on each domain is differentiated alone, which is exact too, but slower.", message)
        self._is_plain = True

    def _verify(self, source: GradientSource) -> None:
        """
        Before the first step: does one backward of a few examples give what each domain's own backward gives?

        In training mode, as it will be used; in evaluation mode if that draws random numbers (dropout), which are others
        for a mixed batch than for its parts, or if the loss uses collectives. One example shows what is lost, two show what
        is mixed up: where no micro-batch has two, the first step that has is looked at again.
        """
        if self._is_verified or self._is_plain:
            return
        sample = source.sample()
        shows_more = sample is not None and len(sample.present_domains) > self._num_compared
        if not self.vectors.sum_numbers(torch.tensor([float(shows_more)], dtype=torch.float64)).item():
            return
        was_training = self.model.training
        try:
            if source.uses_collectives:  # whose number may differ between the modes, so all processes are in one
                self.model.eval()
            with source.equally_often(_CALLS_OF_CHECK):
                trouble = self._check(sample) if sample is not None and shows_more else None
        finally:
            self.model.train(was_training)
        found = self._num_compared >= min(2, self.num_domains), trouble is not None
        num_conclusive, num_troubled = self.vectors.sum_numbers(torch.tensor(found, dtype=torch.float64)).tolist()
        if num_troubled:
            self._give_up(trouble or "another process met what it cannot take apart")
        self._is_verified = num_conclusive > 0

    def _check(self, sample: GradientSource) -> str | None:
        """In what the two ways differ, in words, as far as a sample shows it."""
        try:
            self._num_compared, trouble = self._compare_with_plain(sample)
        finally:
            self._clear_stores()
            self.vectors.take()
        return trouble

    def _compare_with_plain(self, sample: GradientSource) -> tuple[int, str | None]:
        """How many domains were compared, and in what the two ways differ, in words; leaves the random state alone."""
        device = self.vectors.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            before = _random_state(devices)
            losses, trouble = self._try(sample)
            if trouble is None and not all(map(torch.equal, before, _random_state(devices))):
                self.model.eval()
                losses, trouble = self._try(sample)
            if trouble is not None or losses is None or not losses.isfinite().all():
                return self._num_compared, trouble
            return len(sample.present_domains), self._find_difference(sample)

    def _try(self, sample: GradientSource) -> tuple[Tensor | None, str | None]:
        """The mean losses of a backward of all domains, or why there is none."""
        try:
            return self._backward_all(sample), None
        except _INEXACT as error:
            return None, str(error)
        except RuntimeError as error:  # torch's, of shapes and of what autograd forbids
            for domain in sample.present_domains:
                sample.backward(domain)  # the model's own error comes up here, as it is
            return None, f"what works for one domain alone fails for all together ({str(error).splitlines()[0]})"

    def _find_difference(self, sample: GradientSource) -> str | None:
        """Which parameter's gradient in the stores is another one than its examples alone give, in words."""
        for domain in sample.present_domains:
            sample.backward(domain)
            alone = self.vectors.take()
            floor = 1e-2 * self.vectors.inner_product(alone, alone, scored_only=False).sqrt()
            for name, expected, store in zip(self.vectors.names, alone, self._stores, strict=True):
                found = store.of_domain(domain)
                if expected is None and found is None:
                    continue
                expected, found = (
                    torch.zeros(store.shape, device=store.device) if g is None else g for g in (expected, found)
                )
                error = squared_norm(found - expected).sqrt().cpu()
                length = squared_norm(expected).sqrt().cpu()
                if not error <= self.tolerance * (length + floor):
                    off = f"{error / length:.2g} of its length"
                    return f"the gradient of {name!r} is off by {off} from that of its examples alone"
        return None

    def _clear_stores(self) -> None:
        for store in self._stores:
            store.clear()

    def _make_stores(self, batches: list[MixedBatch]) -> list[DomainGradients]:
        """Empty ones: those of the step before, with their memory, if they are of the kind that these batches need."""
        self._clear_stores()
        bytes_needed = self.num_domains * sum(p.numel() * p.element_size() for p in self.vectors.parameters)
        rows = sum(batch.segments.num_examples * max(batch.lengths) for batch in batches) / max(len(batches), 1)
        keeps_dense = bytes_needed <= self.memory_budget and rows >= MIN_ROWS_PER_DOMAIN * self.num_domains
        if self._stores and self._stores[0].keeps_dense == keeps_dense:
            return self._stores
        return [
            DomainGradients(p.shape, p.dtype, p.device, num_domains=self.num_domains, keeps_dense=keeps_dense)
            for p in self.vectors.parameters
        ]


def _stack(targets: list[Gradient]) -> Gradient:
    """Several gradients as one of tensors that have them in their first dimension; one as it is."""
    if len(targets) == 1:
        return targets[0]
    stacked: Gradient = []
    for parts in zip(*targets, strict=True):
        some = next((part for part in parts if part is not None), None)
        whole = [torch.zeros_like(some) if part is None else part for part in parts] if some is not None else None
        stacked.append(None if whole is None else torch.stack(whole))
    return stacked


def _random_state(devices: Sequence[torch.device]) -> list[Tensor]:
    """Of the CPU and of the devices."""
    return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in devices)]
