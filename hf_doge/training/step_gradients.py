"""The losses of one optimizer step, cut by domain: what the alignments of `gradients/` differentiate."""

import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_doge.gradients.alignment import MixedBatch
from hf_doge.gradients.domain_gradients import Segments
from hf_doge.gradients.vectors import Reduction
from hf_doge.training.halves import Halves
from hf_doge.training.packing import EXAMPLE_LENGTHS, check_line, owners_in_line, pick_from_line


@dataclass
class DomainSlice:
    """The examples of one domain in one micro-batch, and how many tokens (or examples) its loss averages over."""

    inputs: dict[str, Any]
    num_items: int


class MicroBatch:
    """
    One micro-batch of B examples, on its device, and what each of them is.

    Args:
        inputs (`Mapping[str, Any]`): What the model takes; tensors and lists of length B belong to the examples. Or, where the
            examples lie end to end, a line of N tokens with the length of each example.
        domain_ids (`torch.Tensor` of shape `(B,)`): Domain of each example.
        labels_are_shifted (`bool`): See [`count_items`].

    Raises:
        `ValueError`: if the collator merged the examples, so that rows cannot be told apart.
    """

    def __init__(self, inputs: Mapping[str, Any], domain_ids: Tensor, *, labels_are_shifted: bool) -> None:
        self.inputs = inputs
        self.domain_ids = domain_ids.cpu()
        self.in_line = EXAMPLE_LENGTHS in inputs
        if self.in_line:
            check_line(inputs)
        else:
            _refuse_merged_examples(inputs, len(domain_ids))
        self.count_labels(labels_are_shifted=labels_are_shifted)

    def count_labels(self, *, labels_are_shifted: bool) -> None:
        """Count again what a loss that shifts its labels, or does not, makes of each example."""
        self.items = count_items(self.inputs, self.num_examples, labels_are_shifted=labels_are_shifted)

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.domain_ids)

    def count(self, values: Tensor, num_domains: int) -> Tensor:
        """Sum of a number per example, by domain: int64 of shape `(num_domains,)`."""
        return torch.zeros(num_domains, dtype=torch.int64).index_add_(0, self.domain_ids, values)

    def pick(self, rows: Tensor) -> DomainSlice:
        """Some of the examples."""
        if self.in_line:
            return DomainSlice(pick_from_line(self.inputs, rows), int(self.items[rows].sum()))
        picked = {name: _pick_rows(value, rows, self.num_examples) for name, value in self.inputs.items()}
        return DomainSlice(picked, int(self.items[rows].sum()))

    def slices(self) -> dict[int, DomainSlice]:
        """One slice per domain that has a label."""
        return {
            domain: self.pick((self.domain_ids == domain).nonzero().squeeze(1))
            for domain in self.domain_ids[self.items > 0].unique().tolist()
        }

    def sorted_by_domain(self, num_domains: int) -> tuple[DomainSlice, Segments]:
        """All examples, those of a domain next to each other, and how many; of a line its tokens, each a row by itself."""
        order = torch.argsort(self.domain_ids, stable=True)
        owners = self.domain_ids[order]
        if self.in_line:
            owners = owners.repeat_interleave(self.inputs[EXAMPLE_LENGTHS].cpu()[order])
        return self.pick(order), Segments(tuple(torch.bincount(owners, minlength=num_domains).tolist()))

    def lengths(self) -> frozenset[int]:
        """Rows that an example may have in a layer: one, or one for each of its positions."""
        if self.in_line:
            return frozenset({1})
        shapes = (v.shape for v in self.inputs.values() if torch.is_tensor(v) and len(v.shape) > 1)
        return frozenset({1, *(shape[1] for shape in shapes if shape[0] == self.num_examples)})


def count_items(inputs: Mapping[str, Any], num_examples: int, *, labels_are_shifted: bool) -> Tensor:
    """
    How many labels of each example enter the loss: those that are not -100, one per example where there are no labels.

    Args:
        inputs (`Mapping[str, Any]`): One micro-batch.
        num_examples (`int`): Its number of examples, B.
        labels_are_shifted (`bool`): Whether the loss predicts each label from the position before (causal models), of labels that
            are classes by position, on axis 1.

    Returns:
        `torch.Tensor` of shape `(num_examples,)` and dtype int64, on the CPU.
    """
    labels = inputs.get("labels")
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif labels is not None and labels_are_shifted and labels.dim() > 1 and not labels.is_floating_point():
        labels = labels[:, 1:]
    if labels is None:
        return torch.ones(num_examples, dtype=torch.int64)
    if EXAMPLE_LENGTHS in inputs:
        counted, num_lost = labels.ne(-100).flatten().long().cpu(), inputs["labels"].numel() - labels.numel()
        owners = owners_in_line(
            torch.arange(num_examples), inputs[EXAMPLE_LENGTHS], len(counted) + num_lost, nobody=num_examples
        )
        return torch.zeros(num_examples + 1, dtype=torch.int64).index_add_(0, owners[num_lost:], counted)[:-1]
    return labels.ne(-100).reshape(num_examples, -1).sum(dim=1).cpu()


def count_labels(batches: list[MicroBatch], num_domains: int) -> Tensor:
    """Labels of each domain in some micro-batches, int64 of shape `(num_domains,)`."""
    return sum((batch.count(batch.items, num_domains) for batch in batches), torch.zeros(num_domains).long())


def count_examples(batches: list[MicroBatch], num_domains: int) -> Tensor:
    """Examples of each domain in some micro-batches, int64 of shape `(num_domains,)`."""
    ones = (torch.bincount(batch.domain_ids, minlength=num_domains) for batch in batches)
    return sum(ones, torch.zeros(num_domains).long())


def sum_counts(counts: list[Tensor], weights: Tensor, reduction: Reduction, *, step: int) -> list[Tensor]:
    """Sums over the processes. The same message tells whether all of them hold the same domain weights."""
    checksum = zlib.crc32(weights.numpy().tobytes())
    numbers = reduction.sum(torch.cat([*counts, torch.tensor([checksum])]).to(reduction.device)).cpu()
    if int(numbers[-1]) != checksum * reduction.num_processes:
        raise RuntimeError(
            f"All processes must hold the same domain weights, but at step {step} they differ. Start all of them with the same "
            "code, arguments, data and checkpoint."
        )
    return list(numbers[:-1].split([len(count) for count in counts]))


@dataclass(frozen=True)
class NumCalls:
    """The most calls of the loss that some process makes in a step: one that uses collectives all must call equally often."""

    train: list[int]  # with a slice of each domain
    target: list[int]  # with a slice of each target
    mixed: int = 0  # with a micro-batch of all domains


def agree_on_calls(
    train: list[MicroBatch], targets: list[MicroBatch], num_domains: int, num_targets: int, reduction: Reduction
) -> NumCalls:
    """Over all processes."""
    calls = torch.zeros(num_domains + num_targets + 1, dtype=torch.int64)
    for offset, batches in ((0, train), (num_domains, targets)):
        for batch in batches:
            calls[offset + batch.domain_ids[batch.items > 0].unique()] += 1
    calls[-1] = sum(bool(batch.items.any()) for batch in train)
    most = reduction.max(calls.to(reduction.device)).tolist()
    return NumCalls(most[:num_domains], most[num_domains:-1], most[-1])


def _refuse_merged_examples(inputs: Mapping[str, Any], num_examples: int) -> None:
    merged = {
        name: tuple(value.shape)
        for name, value in inputs.items()
        if name in ("input_ids", "labels", "inputs_embeds") and torch.is_tensor(value) and len(value) != num_examples
    }
    if merged:
        raise ValueError(
            f"Every example must keep a row of its own in the batch, but for {num_examples} examples the collator "
            f"returned tensors of shape {merged}. Use a collator that pads instead of packing; trainers that put several "
            "rows of one example into a batch (DPO's pairs, say) cannot learn weights, but with `DomainWeightedMixin` can "
            "train on given ones."
        )


def _pick_rows(value: Any, rows: Tensor, num_examples: int) -> Any:
    if torch.is_tensor(value):
        return value[rows.to(value.device)] if value.dim() > 0 and len(value) == num_examples else value
    if isinstance(value, list) and len(value) == num_examples:
        return [value[row] for row in rows.tolist()]
    return value


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
        with self.leave_alone():
            torch.set_rng_state(cpu_state)
            for device, state in zip(self.devices, device_states, strict=True):
                torch.get_device_module(self.device_type).set_rng_state(state, device)
            yield

    def leave_alone(self) -> AbstractContextManager[None]:
        """Put the random state back where it was before the block."""
        return torch.random.fork_rng(devices=self.devices, device_type=self.device_type if self.devices else "cuda")


class StepLoss(Protocol):
    """The loss of one slice of a step, and its gradient; see [`~hf_doge.training.domain_loss.DomainLoss`]."""

    device: torch.device
    num_calls: int  # that came to an end so far

    def __call__(self, piece: DomainSlice, num_items: int) -> Tensor:
        """What the slice adds to its domain's mean over that many items of the step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to `.grad`."""

    def call_for_nothing(self, piece: DomainSlice) -> None:
        """Take part in a call of the other processes with an example that does not count."""

    def unnoticed(self) -> AbstractContextManager[None]:
        """Inside, the trainer does not note what it notes of every loss."""


class StepGradients:
    """
    A [`~hf_doge.gradients.alignment.GradientSource`] over the micro-batches of one step.

    Args:
        loss (`StepLoss`): Of a slice.
        micro_batches (`list[MicroBatch]`): This process' train examples.
        target_batches (`list[MicroBatch]`): Its share of the targets; empty in the universal setting.
        num_items (`torch.Tensor` of shape `(num_domains,)`): Labels of each domain in the step, on all processes.
        target_items (`torch.Tensor` of shape `(num_targets,)`): Same for the targets.
        target_weights (`dict[int, float]`, *optional*): Weight of each target; `None` in the universal setting.
        num_parts (`int`): 2 where the "domains" are halves, see [`Halves`].
        num_calls (`NumCalls`, *optional*): How often the loss is called at least, where it uses collectives.
        spare (`MicroBatch`, *optional*): Where an example that does not count comes from on a process that has none.
    """

    def __init__(
        self,
        loss: StepLoss,
        micro_batches: list[MicroBatch],
        target_batches: list[MicroBatch],
        *,
        num_items: Tensor,
        target_items: Tensor,
        target_weights: dict[int, float] | None,
        num_parts: int = 1,
        num_calls: NumCalls | None = None,
        spare: MicroBatch | None = None,
    ) -> None:
        self._loss = loss
        self._micro_batches = micro_batches
        self._target_batches = target_batches
        self.num_items = num_items
        self._target_items = target_items
        self.present_domains = num_items.nonzero().flatten().tolist()
        self.target_weights = target_weights
        if target_weights is not None:
            self.target_weights = {t: w for t, w in target_weights.items() if target_items[t] > 0 and w > 0}
        self.halves = Halves(num_items) if num_parts == 2 else None
        self.is_present = self.halves.is_present if self.halves else num_items > 0  # by domain
        # Whether there is something to compare with: the training domains, or a target that has a label.
        self.can_align = self.target_weights is None or bool(self.target_weights)
        self._num_calls, self.uses_collectives = num_calls, num_calls is not None
        self._spare = spare
        self._replay = RandomReplay(loss.device)
        self._seen: set[tuple[str, int]] = set()
        self.training_seconds = 0.0  # in the first differentiation of each example: what training alone would take too

    @cached_property
    def _train_slices(self) -> dict[int, list[DomainSlice]]:
        return _collect_slices(self._micro_batches)

    @cached_property
    def _target_slices(self) -> dict[int, list[DomainSlice]]:
        return _collect_slices(self._target_batches)

    def backward(self, domain: int, *, weight: float = 1.0) -> Tensor:
        """Add `weight` times the gradient of a training domain's mean loss to `.grad`; returns that loss."""
        slices = self._train_slices.get(domain, [])
        return self._differentiate("train", domain, slices, int(self.num_items[domain]), weight)

    def target_backward(self, target: int) -> Tensor:
        """Add the gradient of a target's mean loss to `.grad`; returns that loss."""
        slices = self._target_slices.get(target, [])
        return self._differentiate("target", target, slices, int(self._target_items[target]), 1.0)

    def mixed_batches(self) -> Iterator[MixedBatch]:
        """The train micro-batches that have a label, sorted by domain."""
        for position, batch in enumerate(self._micro_batches):
            if batch.items.sum() == 0:
                continue
            piece, segments = batch.sorted_by_domain(len(self.num_items))
            compute_loss = partial(self._mixed_loss, piece, ("mixed", position))
            yield MixedBatch(segments, piece.num_items, batch.lengths(), compute_loss, in_line=batch.in_line)

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of a loss to `.grad`."""
        start = time.perf_counter()
        self._loss.backward(loss)
        self.training_seconds += time.perf_counter() - start

    def sample(self, num_examples: int = 3) -> "StepGradients | None":
        """
        A few of this process' train examples as a step of their own, the first as domain 0 and the others as domain 1 (if
        there is one); `None` if none has a label.
        """
        for batch in sorted(self._micro_batches, key=lambda batch: -min(int((batch.items > 0).sum()), 2)):
            rows = (batch.items > 0).nonzero().squeeze(1)[:num_examples]
            if len(rows) == 0:
                continue
            few = copy(batch)
            few.inputs, few.items = batch.pick(rows).inputs, batch.items[rows]
            few.domain_ids = torch.arange(len(rows)).clamp(max=min(1, len(self.num_items) - 1))
            items = few.count(few.items, len(self.num_items))
            no_targets = torch.zeros(0, dtype=torch.int64)
            return StepGradients(self._loss, [few], [], num_items=items, target_items=no_targets, target_weights=None)
        return None

    def _mixed_loss(self, piece: DomainSlice, key: object) -> Tensor:
        start = time.perf_counter()
        loss = self._replayed_loss(piece, piece.num_items, key)
        self.training_seconds += time.perf_counter() - start
        return loss

    def _replayed_loss(self, piece: DomainSlice, num_items: int, key: object) -> Tensor:
        with self._replay(key):
            return self._loss(piece, num_items)

    def _differentiate(
        self, kind: str, domain: int, slices: list[DomainSlice], num_items: int, weight: float
    ) -> Tensor:
        start = time.perf_counter()
        losses = [torch.zeros((), device=self._loss.device)]
        for position, piece in enumerate(slices):
            loss = self._replayed_loss(piece, num_items, (kind, domain, position))
            self._loss.backward(loss * weight)
            losses.append(loss.detach())
        self._keep_up(kind, domain, len(slices))
        if (kind, domain) not in self._seen:
            self._seen.add((kind, domain))
            self.training_seconds += time.perf_counter() - start if kind == "train" else 0.0
        return torch.stack([loss.to(losses[-1].dtype) for loss in losses]).sum()

    def _keep_up(self, kind: str, domain: int, num_made: int) -> None:
        """Call the loss as often as the other processes do."""
        if self._num_calls is not None:
            needed = self._num_calls.train if kind == "train" else self._num_calls.target
            self._call_for_nothing(needed[domain] - num_made)

    @contextmanager
    def equally_often(self, num_calls: int | None = None) -> Iterator[None]:
        """See [`~hf_doge.gradients.alignment.GradientSource`]; where an error ends the block, too."""
        before, is_check = self._loss.num_calls, num_calls is not None
        with self._loss.unnoticed() if is_check else nullcontext():
            try:
                yield
            finally:
                if self._num_calls is not None:
                    needed = num_calls if num_calls is not None else self._num_calls.mixed
                    self._call_for_nothing(needed - (self._loss.num_calls - before))

    def _call_for_nothing(self, num_calls: int) -> None:
        """With an example that does not count; leaves the random state alone."""
        for _ in range(num_calls):
            batch = next(iter(self._micro_batches + self._target_batches), self._spare)
            assert batch is not None
            with self._replay.leave_alone():
                self._loss.call_for_nothing(batch.pick(torch.tensor([0])))


def _collect_slices(batches: list[MicroBatch]) -> dict[int, list[DomainSlice]]:
    collected: dict[int, list[DomainSlice]] = {}
    for batch in batches:
        for domain, piece in batch.slices().items():
            collected.setdefault(domain, []).append(piece)
    return collected
