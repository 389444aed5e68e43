"""
What it takes to compare an example of a batch with the same example alone, whatever the others are.

The examples of one batch can hide that they depend on each other: where all have one class, a loss with class weights is
the plain mean. So the others are asked about with other labels, each class among them, other tokens and other lengths.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hf_doge.functional.tracin_we import token_gradient_rows
from hf_doge.gradients.example_losses import ANSWERS, IGNORE_INDEX

# Relative to the norm of the rows: room for rounding, but not for another function.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}
_HALF_TOLERANCE = 0.3
# Of the length of one gradient along the other: rounding of single numbers averages out in it.
_LENGTH_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_HALF_LENGTH_TOLERANCE = 0.08

_MOST_VALUES = 64  # an input of more is a number of its own for each example

_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


def rows_agree(
    example: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    *,
    dtype: torch.dtype,
    least: float = 0.0,
    room: float = 1,
) -> bool:
    """
    Whether two computations of an example's `tokens (W,), rows (W, width)` in `dtype` differ by rounding only. A row
    that one of them lacks counts as zero.

    Args:
        least (`float`): The norm that such rows have at least, where `other` may be all rounding.
        room (`float`): How many times what a first look allows for rounding.
    """
    (tokens, rows), (other_tokens, other_rows) = example, other
    _, difference = token_gradient_rows(torch.cat([tokens, other_tokens]), torch.cat([rows, -other_rows]))
    tolerance = min(0.5, room * _TOLERANCE.get(dtype, _HALF_TOLERANCE))
    return bool(difference.norm() <= tolerance * other_rows.norm().clamp(min=least))


def lengths_agree(example: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], *, dtype: torch.dtype) -> bool:
    """Whether one of two computations of an example's rows is not a multiple of the other, as weights would make it."""
    (tokens, rows), (other_tokens, other_rows) = example, other
    merged, sums = token_gradient_rows(
        torch.cat([tokens, other_tokens]), torch.cat([rows, torch.zeros_like(other_rows)])
    )
    shared = sums[torch.isin(merged, other_tokens)].flatten().double()
    other_rows = other_rows.flatten().double()
    length = (shared @ other_rows) / (other_rows @ other_rows)
    return bool((length - 1).abs() <= _LENGTH_TOLERANCE.get(dtype, _HALF_LENGTH_TOLERANCE))


class Novelty:
    """
    Which batches to look at again: those with what none before them had (a value, numbers of another size, more positions,
    padding), for it may be what makes examples depend on each other; and the first, eighth, sixteenth, thirty-second one.
    """

    def __init__(self) -> None:
        self.num_batches = 0
        self._values: dict[str, set[int]] = {}
        self._ranges: dict[str, tuple[float, float]] = {}

    def found(self, batch: Mapping[str, object], *, padding_ids: Iterable[int | None], token_labels: bool) -> bool:
        """Whether to look at a batch. `token_labels`: its `labels` are tokens, too many to know each."""
        self.num_batches += 1
        count = self.num_batches
        new = count == 1 or (count >= 8 and count & (count - 1) == 0)
        ids = batch["input_ids"]
        padded = any(bool((ids == token).any()) for token in padding_ids if token is not None)
        new |= self._add("padding", {int(padded)}) | self._extends("length", 1.0, float(ids.shape[-1]))
        for name, values in batch.items():
            if not isinstance(values, Tensor) or not values.numel() or name in _INPUTS - {"attention_mask"}:
                continue
            if not name.startswith("decoder_") and not (name == "labels" and token_labels):
                if values.is_floating_point():
                    new |= self._extends(name, float(values.min()), float(values.max()))
                else:
                    new |= self._add(name, set(values.unique().tolist()))
        return new

    def _add(self, name: str, values: set[int]) -> bool:
        known = self._values.setdefault(name, set())
        new = len(known) < _MOST_VALUES and not values <= known
        known |= values
        return new

    def _extends(self, name: str, least: float, most: float) -> bool:
        low, high = self._ranges.get(name, (math.inf, -math.inf))
        room = max(high - low, 0)
        new = least < low - room or most > high + room
        if new:
            self._ranges[name] = min(low, least), max(high, most)
        return new


def label_names(batch: Mapping[str, object]) -> list[str]:
    """What of a batch says what is to be predicted: all that is neither tokens nor goes with them."""
    size = len(batch["input_ids"])
    return [
        name
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        if name not in _INPUTS and not name.startswith(("decoder_", "global_"))
        if value.shape[:2] != batch["input_ids"].shape or name == "labels"
    ]


def label_range(batch: Mapping[str, object], name: str, logits: object) -> int | None:
    """How many values a label can have, as classes of `logits (B, ..., C)` or places among tokens; None if unknown."""
    labels = batch[name]
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    if name in ANSWERS:
        return batch["input_ids"].shape[-1]
    classes = logits.shape[-1] if isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape else 0
    return classes if classes > 1 and labels.max() < classes else None


def class_name(batch: Mapping[str, object], ranges: Mapping[str, int | None]) -> str | None:
    """Which of the labels says of what class an example is, if any: one whole number."""
    for name in sorted(ranges, key=lambda name: name != "labels"):
        labels = batch[name]
        if labels[0].numel() == 1 and labels.dtype in (torch.int64, torch.int32) and name not in ANSWERS:
            return name
    return None


def altered_batches(batch: Mapping[str, object], ranges: Mapping[str, int | None]) -> Iterator[dict[str, object]]:
    """
    Batches that have the first example of `batch` and otherwise differ: in labels, tokens and how many of them count.

    Args:
        batch (`Mapping`): Of several examples.
        ranges (`Mapping`): The names of its labels, and how many values each can have, see [`label_range`].
    """
    yield _other_tokens(batch)
    for change in (lambda labels: labels.roll(1, dims=0), lambda labels: labels[:1].expand_as(labels), _opposite):
        # Whole numbers that go with labels (which task or source an example is of) may have no other values.
        fixed = set(ranges) - {"labels"} if change is _opposite and "labels" in ranges else set()
        fixed = {name for name in fixed if _is_whole(batch[name])}
        other = {name: torch.cat([batch[name][:1], change(batch[name])[1:]]) for name in ranges if name not in fixed}
        if any(not torch.equal(labels, batch[name]) for name, labels in other.items()):
            yield {**batch, **other}
    for name, count in ranges.items():
        if count is not None and (name in ANSWERS or batch[name][0].numel() > 1):
            yield with_classes(batch, name, torch.arange(count), first=1)


def with_classes(batch: Mapping[str, object], name: str, classes: Tensor, *, first: int) -> dict[str, object]:
    """The batch whose examples from the first on have the labels `classes`, over and over, wherever they have one."""
    labels = batch[name].clone()
    places = (labels[first:] != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    drawn = classes.to(labels.device, labels.dtype)
    labels[first:].view(-1)[places] = drawn[torch.arange(len(places), device=labels.device) % len(drawn)]
    return {**batch, name: labels}


def _is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() and values.dtype != torch.bool


def _opposite(labels: Tensor) -> Tensor:
    if labels.dtype == torch.bool:
        return ~labels
    binary = labels.is_floating_point() or bool(((labels == 0) | (labels == 1)).all())
    return 1 - labels if binary else labels


def _other_tokens(batch: Mapping[str, object]) -> dict[str, object]:
    """The batch whose examples but the first are read backwards, and without their second half where a mask says so."""
    input_ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    if input_ids.ndim != 2:
        return dict(batch)
    masked = isinstance(mask, Tensor) and mask.shape == input_ids.shape
    counted = mask.bool() if masked else torch.ones_like(input_ids, dtype=torch.bool)
    ids, kept = input_ids.clone(), counted.clone()
    for line in range(1, len(ids)):
        places = counted[line].nonzero().squeeze(1)
        ids[line, places] = input_ids[line, places.flip(0)]
        kept[line, places[(len(places) + 1) // 2 :]] = False
    other = {**batch, "input_ids": ids}
    if masked:
        other["attention_mask"] = mask * kept
    if masked and isinstance(labels, Tensor) and labels.shape == ids.shape and not labels.is_floating_point():
        other["labels"] = labels.masked_fill(counted & ~kept, IGNORE_INDEX)
    return other
