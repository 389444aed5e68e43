"""What cutting a step by domain takes for granted of its loss, tried before the first step."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.gradients.fused_head import output_layer
from hf_doge.sampling.collation import seeded
from hf_doge.training.loss_trials import (
    IGNORED,
    Targets,
    can_be_cast,
    has_first_label,
    is_integer,
    judge_shift,
    louder,
    other_labels,
    random_states,
    undisturbed,
)
from hf_doge.training.packing import EXAMPLE_LENGTHS
from hf_doge.training.step_gradients import DomainSlice, MicroBatch, RandomReplay, count_items

_TOLERANCE = 2e-5  # relative: room for float32's rounding, and for no other term
_HALF_TOLERANCE = 2e-2
_DOUBLED_TOLERANCE = 1e-6  # halving is exact in any precision
_NUM_AS_THEY_ARE = 2  # trials before those with other labels
_MAX_TRIALS = 18
_LOUDER = (16.0, 1024.0)  # powers of two, in turns
_MAX_EXAMPLES = 8  # of a trial with more than two
_NUM_TRIALS_TOGETHER = 6  # where all processes must make the same calls

ComputeLoss = Callable[[DomainSlice, int], Tensor]


@dataclass
class _Trial:
    """A few labels together and in two parts, with the loss of each under the same `num_items_in_batch`."""

    what: str
    counts: tuple[int, int, int]
    losses: tuple[float, float, float]

    def sums(self, *, is_divided: bool) -> tuple[float, float, float]:
        """The sum over the labels, as cutting by domain takes it: of all, and of either part."""
        number = self.counts[0]
        return tuple(
            loss * (number if is_divided else count) for loss, count in zip(self.losses, self.counts, strict=True)
        )


class LossLaw:
    """
    Tries out that the loss of a few labels together is the sum of the losses of each over `num_items_in_batch`, or their
    mean: with other examples, with fewer labels, and with other labels of all classes as far as these are known.

    Everything runs in float32, where the model allows it, and in training mode; in evaluation mode if that draws random
    numbers. Parameters, buffers, modes and random states are afterwards what they were.

    Args:
        model (`nn.Module`): As it is trained.
        compute_loss (`Callable[[DomainSlice, int], Tensor]`): The loss of a slice for a `num_items_in_batch`.
        batches (`Sequence[MicroBatch]`): With a label each.
        labels_are_shifted (`bool`): See [`count_items`].
        device (`torch.device`): Of the model.
        is_half (`bool`): Whether parts of the model compute in half precision whatever its parameters are.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_loss: ComputeLoss,
        batches: Sequence[MicroBatch],
        *,
        labels_are_shifted: bool,
        device: torch.device,
        is_half: bool,
    ) -> None:
        self.model = model
        self.is_divided: bool | None = None
        self._compute_loss = compute_loss
        self._labels_are_shifted = labels_are_shifted
        self._device = device
        self._replay = RandomReplay(device)
        self._targets = Targets()
        self._casts = can_be_cast(model)
        self._tolerance = _HALF_TOLERANCE if is_half or not self._casts else _TOLERANCE
        self._batches = batches
        self._groups, self._largest = _group(batches)
        self._doubled: list[tuple[float, float, float]] = []
        self._trials: list[_Trial] = []

    def check(self, *, makes_same_calls: bool) -> None:
        """
        Find out whether the loss is divided by `num_items_in_batch`, which [`is_divided`] tells then; it stays `None` if
        these batches cannot tell.

        Args:
            makes_same_calls (`bool`): Whether all processes call the loss equally often, whatever their examples are.

        Raises:
            ValueError: if the loss is neither such a sum nor such a mean.
        """
        with undisturbed(self.model, self._device, casts=self._casts), torch.no_grad():
            is_random = self._find_randomness()
            num_trials = _NUM_TRIALS_TOGETHER if makes_same_calls else self._count_trials()
            for number in range(num_trials):
                self._try(number, is_random=is_random)
            if is_random[0] or makes_same_calls:
                self._try_in_training()
        self._judge()

    def finds_shift(self) -> bool | None:
        """
        Whether the labels of the first position are left out, as by a loss that predicts each label from the position before: the
        loss is the same with other first labels, but not with other last ones. `None` if these batches cannot tell.

        Raises:
            ValueError: See [`judge_shift`].
        """
        batch = max(self._batches, key=lambda batch: has_first_label(batch.inputs).sum())
        has_first = has_first_label(batch.inputs)
        can_tell = bool(has_first.any()) and not batch.in_line
        rows = has_first.nonzero().squeeze(1) if can_tell else torch.arange(batch.num_examples)
        piece = batch.pick(rows[:_MAX_EXAMPLES])
        with undisturbed(self.model, self._device, casts=self._casts), torch.no_grad():
            self.model.eval()
            with self._targets:
                self._compute_loss(piece, max(piece.num_items, 1))
            labels: Any = piece.inputs.get("labels")
            altered = other_labels(labels, can_tell=can_tell)
            with louder(self.model, _LOUDER[0]):
                whole, again, *others = (
                    self._value(DomainSlice({**piece.inputs, **one}, piece.num_items), piece.num_items)
                    for one in ({}, {}, *altered)
                )
        room = abs(whole - again) + _DOUBLED_TOLERANCE * abs(whole)
        changes = [abs(loss - whole) / room if room else 0.0 for loss in others]
        return judge_shift(changes, labels) if can_tell else None

    def compare(self, other: ComputeLoss) -> float | None:
        """How many times as large the loss is as by another way to compute it, `None` if that cannot be told."""
        piece = self._slice(self._groups[0])
        with undisturbed(self.model, self._device, casts=self._casts), torch.no_grad():
            losses = [
                self._value(piece, piece.num_items, compute_loss) for compute_loss in (self._compute_loss, other)
            ]
        return losses[0] / losses[1] if all(map(isfinite, losses)) and losses[1] else None

    def _find_randomness(self) -> tuple[bool, bool]:
        """Whether the loss draws random numbers in training mode, and in evaluation mode."""
        found = []
        group = self._slice(self._groups[0])
        for is_training in (True, False):
            self.model.train(is_training)
            before = random_states(self._device)
            with self._targets:
                self._compute_loss(group, group.num_items)
            found.append(before != random_states(self._device))
        return tuple(found)

    def _count_trials(self) -> int:
        classes = self._classes
        if classes is None:
            return _NUM_AS_THEY_ARE + len(_LOUDER)
        num_windows = ceil(len(classes) / max(1, self._slice(self._groups[0]).num_items // 2))
        return min(_NUM_AS_THEY_ARE + (max(num_windows, 2) if len(classes) > 1 else 0), _MAX_TRIALS)

    def _try(self, number: int, *, is_random: tuple[bool, bool]) -> None:
        # two are enough for most; what depends on how often a label occurs needs more
        group = self._groups[number % len(self._groups)] if number % _NUM_AS_THEY_ARE else self._largest
        whole, what = self._alter(self._slice(group), number)
        if number < _NUM_AS_THEY_ARE:
            self.model.train()
            once, again, twice = (self._value(whole, factor * whole.num_items) for factor in (1, 1, 2))
            self._doubled.append((once, twice, abs(once - again)))
        self.model.train(not is_random[0])
        parts = self._split(whole, size=1 if is_random[1] else len(group[1]))
        factor = _LOUDER[number // _NUM_AS_THEY_ARE % 2] if number >= _NUM_AS_THEY_ARE else 1.0
        with louder(self.model, factor):
            losses = tuple(self._value(piece, whole.num_items) for piece in (whole, *parts))
        counts = tuple(piece.num_items for piece in (whole, *parts))
        if counts[1] + counts[2] == counts[0] and min(counts) > 0 and all(map(isfinite, losses)):
            self._trials.append(_Trial(what, counts, losses))

    def _try_in_training(self) -> None:
        """
        Two sets of examples with each other against either with itself, where training mode draws random numbers: what is
        drawn for a place is then the same in all of them.
        """
        batch, rows = self._largest
        alike = self._find_alike(batch, rows)
        rows = alike if len(alike) else rows[:1].repeat(2)  # so that all processes make the same calls
        one, other = rows.chunk(2)
        orders = [batch.pick(torch.cat(order)) for order in ((one, other), (other, one), (one, one), (other, other))]
        self.model.train()
        with louder(self.model, _LOUDER[0]):
            mixed, turned, *same = (self._value(piece, orders[0].num_items) for piece in orders)
        if len(alike) and all(map(isfinite, (mixed, turned, *same))):
            what = "of examples in training mode, against either half of them twice"
            self._trials.append(_Trial(what, (orders[0].num_items,) * 3, (mixed + turned, *same)))

    def _find_alike(self, batch: MicroBatch, rows: Tensor) -> Tensor:
        """Of which as many random numbers are drawn: an even number with as many labels and the same masks."""
        tensors = [value for value in batch.inputs.values() if torch.is_tensor(value) and value.dim() > 1]
        masks = [
            value
            for value in tensors
            if is_integer(value, 2) and len(value) == batch.num_examples and value.max() <= 1
        ]
        is_alike = batch.items[rows] == batch.items[rows[0]]
        if batch.in_line:
            lengths = batch.inputs[EXAMPLE_LENGTHS].cpu()
            is_alike &= lengths[rows] == lengths[rows[0]]
        for mask in masks:
            is_alike &= (mask[rows] == mask[rows[0]]).flatten(1).all(dim=1).cpu()
        alike = rows[is_alike].unique()
        return alike[: len(alike) // 2 * 2]

    def _value(self, piece: DomainSlice, num_items: int, compute_loss: ComputeLoss | None = None) -> float:
        with seeded((), 0), self._replay("trial"):
            return float(
                (compute_loss or self._compute_loss)(
                    DomainSlice(dict(piece.inputs), piece.num_items), max(num_items, 1)
                )
            )

    # the labels

    def _slice(self, group: tuple[MicroBatch, Tensor]) -> DomainSlice:
        batch, rows = group
        piece = batch.pick(rows)
        if len(rows) > 1 and rows[0] == rows[1]:  # an example that is alone, and itself turned by one position
            turned = {
                name: torch.cat([value[:1], value[1:].roll(1, dims=1)]) if is_integer(value, 2) else value
                for name, value in piece.inputs.items()
            }
            piece = self._count(turned, len(rows))
        return piece

    def _count(self, inputs: dict[str, Any], num_examples: int) -> DomainSlice:
        items = count_items(inputs, num_examples, labels_are_shifted=self._labels_are_shifted)
        return DomainSlice(inputs, int(items.sum()))

    def _with_labels(self, piece: DomainSlice, labels: Tensor) -> DomainSlice:
        num_examples = len(piece.inputs.get(EXAMPLE_LENGTHS, labels))
        return self._count({**piece.inputs, self._label_name: labels}, num_examples)

    @cached_property
    def _label_name(self) -> str | None:
        """Which input holds the labels: the usual names, or what a cross-entropy was asked for."""
        inputs = self._batches[0].inputs
        usual = [name for name in ("shift_labels", "labels") if torch.is_tensor(inputs.get(name))]
        return (usual + [name for name, value in inputs.items() if self._targets.are(value)] + [None])[0]

    @cached_property
    def _classes(self) -> Tensor | None:
        """Labels that may be tried: those of this step first, then all of which the loss knows, in random order."""
        name = self._label_name
        if name is None or not is_integer(self._batches[0].inputs[name], 1):
            return None
        seen = torch.cat([batch.inputs[name].reshape(-1).cpu() for batch in self._batches]).unique()
        seen = seen[seen != IGNORED]
        known = next((n for batch in self._batches if (n := self._targets.num_classes(batch.inputs[name]))), 0)
        config = getattr(self.model, "config", None)
        if not known and self._batches[0].inputs[name].dim() == 1:
            known = getattr(config, "num_labels", 0) or 0
        elif not known:
            known = len(getattr(output_layer(self.model), "weight", ()))
        others = torch.arange(known, dtype=seen.dtype)
        others = (
            others[~torch.isin(others, seen)] if len(seen) and seen.min() >= 0 and seen.max() < known else seen[:0]
        )
        named = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos")]
        special = torch.tensor([label for label in named if isinstance(label, int)] + self._targets.special)
        first = torch.isin(others, special.to(others.dtype))
        generator = torch.Generator().manual_seed(0)
        parts = (seen, others[first], others[~first])
        return torch.cat([some[torch.randperm(len(some), generator=generator)] for some in parts])

    @cached_property
    def _can_be_ignored(self) -> bool:
        """Whether -100 is known to stand for no label."""
        name = self._label_name
        if name is None or not is_integer(self._batches[0].inputs[name], 1):
            return False
        labels = [batch.inputs[name] for batch in self._batches]
        return not self._targets.ignores_another and any(
            bool((found == IGNORED).any()) or self._targets.num_classes(found) > 0 for found in labels
        )

    def _alter(self, piece: DomainSlice, number: int) -> tuple[DomainSlice, str]:
        """The same examples with fewer labels, or with other ones and other weights."""
        name = self._label_name
        if number >= _NUM_AS_THEY_ARE:
            piece = DomainSlice({**piece.inputs, **self._with_other_weights(piece)}, piece.num_items)
        if number == 0 or name is None:
            return piece, "as they are"
        labels = piece.inputs[name].clone()
        if number < _NUM_AS_THEY_ARE:
            if labels.dim() > 1 and len(labels) > 1 and self._can_be_ignored:
                places = labels[-1].ne(IGNORED).nonzero()
                labels[-1][tuple(places[len(places) // 2 + 1 :].T)] = IGNORED
            return self._with_labels(piece, labels), "with fewer labels in one of them"
        if labels.is_floating_point():
            return self._with_labels(piece, 1 - labels), "with other labels"
        classes, counted = self._classes, labels.ne(IGNORED)
        if classes is not None and len(classes) > 1:
            num = int(counted.sum())
            first = (number - _NUM_AS_THEY_ARE) * ceil(num / 2)
            labels[counted] = classes[(first + torch.arange(num)) % len(classes)].to(labels.device, labels.dtype)
        return self._with_labels(piece, labels), "with other labels"

    def _with_other_weights(self, piece: DomainSlice) -> dict[str, Tensor]:
        """What the model does not take is for the loss alone, such as weights of examples or tokens, which may be all 1 here."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        taken, generator = (
            {*inspect.signature(model.forward).parameters, self._label_name},
            torch.Generator().manual_seed(0),
        )
        return {
            name: value * (1 - torch.rand(value.shape, generator=generator) / 2).to(value)
            for name, value in piece.inputs.items()
            if name not in taken and torch.is_tensor(value) and value.dim() > 0 and value.is_floating_point()
        }

    def _split(self, piece: DomainSlice, *, size: int) -> list[DomainSlice]:
        """Two parts of a slice: the first of `size` examples and the others, or all of them with every other label."""
        if size > 1:
            whole = MicroBatch(piece.inputs, torch.zeros(size), labels_are_shifted=self._labels_are_shifted)
            first = max(1, size // 3)
            return [whole.pick(torch.arange(first)), whole.pick(torch.arange(first, size))]
        if not self._can_be_ignored:
            return [DomainSlice(piece.inputs, 0)] * 2  # which no trial is made of
        labels = piece.inputs[self._label_name]
        is_even = torch.arange(labels.numel(), device=labels.device).reshape(labels.shape) % 2 == 0
        return [self._with_labels(piece, labels.masked_fill(hidden, IGNORED)) for hidden in (is_even, ~is_even)]

    # what came of it

    def _judge(self) -> None:
        for once, twice, noise in self._doubled:
            if once == 0 or not (isfinite(once) and isfinite(twice)):
                continue
            room = 10 * noise + _DOUBLED_TOLERANCE * abs(once)
            found = [
                is_divided for is_divided, factor in ((True, 2), (False, 1)) if abs(factor * twice - once) <= room
            ]
            if not found or (self.is_divided is not None and found[0] != self.is_divided):
                raise ValueError(
                    "The loss must be divided by `num_items_in_batch` or be a mean over the labels, so that it can be "
                    f"averaged over a domain, but doubling `num_items_in_batch` changed it from {once:.8g} to "
                    f"{twice:.8g}. Switch off auxiliary losses (`output_router_logits`, ...) or make "
                    "`compute_loss_func` do one of the two."
                )
            self.is_divided = found[0]
        tried = [(trial, trial.sums(is_divided=bool(self.is_divided))) for trial in self._trials]
        if self.is_divided is None:  # by what holds for both kinds
            tried = [(trial, sums) for trial, sums in tried if trial.counts[1] == trial.counts[2] == trial.counts[0]]
        usual = min(max(((abs(a) + abs(b)) / trial.counts[0] for trial, (_, a, b) in tried), default=0.0), 1.0)
        noise = max(
            (10 * noise / abs(once) for once, _, noise in self._doubled if once and isfinite(noise)), default=0
        )
        for trial, (whole, first, second) in tried:
            size = max(abs(first) + abs(second), 0.1 * usual * trial.counts[0])
            if abs(whole - first - second) > (self._tolerance + noise) * size:
                raise ValueError(
                    "The loss must be a sum over the labels, divided by `num_items_in_batch`, or their mean, so that it "
                    f"can be cut by domain and micro-batch, but {trial.counts[0]} labels ({trial.what}) have a summed loss "
                    f"of {whole:.8g} together and of {first + second:.8g} in two parts. Class weights that are averaged "
                    "over, a mean over examples, a plain sum, auxiliary losses (`output_router_logits`, ...) and losses "
                    "that compare examples are not supported: switch them off, or return the sum over the labels divided "
                    "by `num_items_in_batch` from `compute_loss_func`."
                )


def _group(batches: Sequence[MicroBatch]) -> tuple[list[tuple[MicroBatch, Tensor]], tuple[MicroBatch, Tensor]]:
    """
    Two labelled examples each, and a few more of one micro-batch. An example that is alone in its micro-batch is taken
    twice, if its inputs can be.
    """
    pairs, singles = [], []
    for batch in batches:
        rows = (batch.items > 0).nonzero().squeeze(1)
        pairs += [(batch, rows[start : start + 2]) for start in range(0, len(rows) - 1, 2)]
        tensors = [value for value in batch.inputs.values() if torch.is_tensor(value) and value.dim() > 0]
        can_be_repeated = not batch.in_line and all(len(value) == batch.num_examples for value in tensors)
        singles.append((batch, rows[[0, 0]] if can_be_repeated and len(rows) else rows[:1]))
    groups = pairs or singles
    largest = max(batches, key=lambda batch: int((batch.items > 0).sum()))
    rows = (largest.items > 0).nonzero().squeeze(1)[:_MAX_EXAMPLES]
    return groups, (largest, rows) if len(rows) > 2 else groups[0]
