"""
The examples of a batch: a few of them, one alone, all in groups of similar length, or next to others than their own.

Rows of an example depend neither on the batch nor on padding, which [`EmbeddingGradientRecorder`] has checked before it runs
groups; so a padded batch may be run in pieces, and what padding would have cost is saved.

Shapes: B = batch size, T = positions.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.gradients.example_losses import ANSWERS, IGNORE_INDEX

# A forward and backward of next to nothing costs some 30 microseconds per module, in which one thread multiplies and adds
# half a million times in each direction (a small BERT on one core); twice that, for what goes with a group besides.
_WORK_PER_MODULE = 1_000_000
_LEAST_TOKENS = 64  # matrices of fewer lines are multiplied more slowly

_MOST_VALUES = 64  # an input of more is a number of its own for each example
_MISSING = (math.nan, -1.0, float(IGNORE_INDEX))  # what data say where a label is missing; a mean may leave it out
_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is given to compute its logits alone."""
    return {key: value for key, value in batch.items() if key != "labels"}


def few_examples(batch: Mapping[str, Any], examples: Tensor) -> dict[str, Any]:
    """
    The batch of some examples, padded as before.

    Args:
        batch (`Mapping`): Inputs of a model, with `input_ids`.
        examples (`torch.Tensor` of shape `(n,)`): Which to take.

    Returns:
        `dict[str, Any]`: the same keys; what has not one line for each example is passed on unchanged.
    """
    size = len(batch["input_ids"])
    return {
        key: value[examples.to(value.device)]
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        else value
        for key, value in batch.items()
    }


def single_example(
    batch: Mapping[str, Any], example: int, *, strip_padding: bool, encoder_decoder: bool
) -> dict[str, Any]:
    """
    The batch of one example.

    Args:
        batch (`Mapping`): Inputs of a model, with `input_ids`.
        example (`int`): Which example to take.
        strip_padding (`bool`):
            Whether to take out the positions that a 2-D `attention_mask` hides. Without one the padding stays.
        encoder_decoder (`bool`):
            Whether the labels have positions of their own. They then lose the ignored ones at either end, unless the
            batch brings the decoder's inputs with it.

    Returns:
        `dict[str, Any]`: the same keys; what is no tensor of the batch is passed on unchanged.
    """
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    strip_padding = strip_padding and input_ids.ndim == 2 and mask is not None and mask.shape == input_ids.shape
    alone = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            of_decoder = key.startswith("decoder_") or (key == "labels" and encoder_decoder)
            soft_labels = key == "labels" and value.is_floating_point()  # one per class, not per position
            by_position = value.ndim > 1 and value.shape[1] == input_ids.shape[1]
            value = value[example : example + 1] if value.shape[0] == input_ids.shape[0] else value
            if strip_padding and by_position and not of_decoder and not soft_labels:
                value = value[:, mask[example].bool()]
            if strip_padding and of_decoder and key == "labels" and "decoder_input_ids" not in batch:
                value = _without_ignored_ends(value)
        alone[key] = value
    return alone


def _without_ignored_ends(labels: Tensor) -> Tensor:
    if labels.ndim != 2 or labels.is_floating_point():
        return labels
    labelled = (labels[0] != IGNORE_INDEX).nonzero()
    return labels[:, labelled.min() : labelled.max() + 1]


@dataclass
class Group:
    """
    Some examples of a batch without the positions that are padding in all of them.

    Attributes:
        examples (`torch.Tensor` of shape `(n,)`): Which of the batch.
        positions (`torch.Tensor` of shape `(t,)`): Which positions are left.
        batch (`dict`): Of these alone.
    """

    examples: Tensor
    positions: Tensor
    batch: dict[str, Any]


def padding_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """The `attention_mask (B, T)` of `input_ids (B, T)`, as bool; None if the batch has no such mask."""
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(mask, Tensor) or input_ids.ndim != 2 or mask.shape != input_ids.shape:
        return None
    return mask.bool()


@dataclass(frozen=True)
class Layout:
    """
    How the tensors of a batch are laid out, learned from one and expected of others.

    Attributes:
        keys (`frozenset[str]`): All keys of the batch.
        by_example (`frozenset[str]`): Those of tensors of shape `(B, ...)`.
        by_position (`frozenset[str]`): Those of tensors of shape `(B, T, ...)` or `(1, T, ...)`.
    """

    keys: frozenset[str]
    by_example: frozenset[str]
    by_position: frozenset[str]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Layout":
        """The layout of a batch of several examples."""
        batch_size, num_positions = batch["input_ids"].shape
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0}
        return cls(
            keys=frozenset(batch),
            by_example=frozenset(key for key, value in tensors.items() if len(value) == batch_size),
            by_position=frozenset(
                key
                for key, value in tensors.items()
                if value.ndim > 1 and value.shape[1] == num_positions and len(value) in (1, batch_size)
            ),
        )

    def fits(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch has these keys, of these shapes."""
        if self.keys != frozenset(batch):
            return False
        found = Layout.of(batch)
        return self.by_example <= found.by_example and self.by_position <= found.by_position


def tokens_per_call(model: nn.Module) -> float:
    """
    How many tokens the model could work through in the time that one more call of it takes, about. Infinite where it
    runs on an accelerator, which does more tokens at once in the same time.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return float("inf")
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    work = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in looked_up or id(parameter) in multiplied
    )
    calls = sum(1 for _ in model.modules())
    return max(_LEAST_TOKENS, torch.get_num_threads() * _WORK_PER_MODULE * calls / max(work, 1))


def split(batch: Mapping[str, Any], layout: Layout | None, model: nn.Module) -> list[Group]:
    """
    The batch in groups, where that saves padding.

    Args:
        batch (`Mapping`): With `input_ids`.
        layout ([`Layout`], *optional*): Of the batches whose padding can be left out; other batches stay whole.
        model (`nn.Module`): Which works on them.
    """
    input_ids, labels = batch["input_ids"], batch.get("labels")
    mask = None if layout is None else padding_mask(batch)
    if mask is None or not layout.fits(batch):
        whole = (torch.arange(size, device=input_ids.device) for size in (len(input_ids), input_ids.shape[-1]))
        return [Group(*whole, batch)]
    if "labels" in layout.by_position and not labels.is_floating_point():
        labelled = labels != IGNORE_INDEX  # what has a label counts, padding or not
        mask = mask | (labelled.flatten(start_dim=2).any(dim=2) if labels.ndim > 2 else labelled)
    return split_by_length(batch, mask, layout=layout, cost=tokens_per_call(model))


def split_by_length(batch: Mapping[str, Any], mask: Tensor, *, layout: Layout, cost: float) -> list[Group]:
    """
    The batch in groups of similar length, such that what they cost together is least.

    Args:
        batch (`Mapping`): Which `layout` fits.
        mask (`torch.Tensor` of shape `(B, T)`): True where there is no padding.
        layout ([`Layout`]): Which of its tensors have lines and positions.
        cost (`float`): What a group costs, in tokens, see [`tokens_per_call`].

    Returns:
        `list[Group]`: every example is in one of them.
    """
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    groups, start = [], 0
    for stop in _borders(lengths[order].tolist(), cost):
        examples = order[start:stop].sort().values
        positions = mask[examples].any(dim=0).nonzero().squeeze(1)
        groups.append(Group(examples, positions, _take(batch, examples, positions, layout)))
        start = stop
    return groups


def _borders(lengths: list[int], cost: float) -> list[int]:
    """Where the groups of ascending `lengths` end, such that the sum of `cost + size * longest` is least."""
    ends = [end for end in range(1, len(lengths) + 1) if end == len(lengths) or lengths[end] != lengths[end - 1]]
    if cost == float("inf"):
        return ends[-1:]
    least = {0: (0.0, 0)}  # end of a group -> what all up to there cost, and where the group begins
    for end in ends:
        longest = lengths[end - 1]
        least[end] = min((total + cost + (end - start) * longest, start) for start, (total, _) in least.items())
    borders, end = [], len(lengths)
    while end:
        borders.append(end)
        end = least[end][1]
    return borders[::-1]


def _take(batch: Mapping[str, Any], examples: Tensor, positions: Tensor, layout: Layout) -> dict[str, Any]:
    batch_size, num_positions = batch["input_ids"].shape
    taken = dict(batch)
    if len(examples) < batch_size:
        taken |= {key: taken[key][examples] for key in layout.by_example}
    if len(positions) < num_positions:
        taken |= {key: taken[key][:, positions] for key in layout.by_position}
    return taken


@dataclass
class Novelty:
    """
    Which batches to look at again: those with what none before them had (a value, numbers of another size, more positions,
    padding), for it may be what makes examples depend on each other; and the first, eighth, sixteenth, thirty-second one.
    """

    num_batches: int = 0
    _values: dict[str, set[int]] = field(default_factory=dict)
    _ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def found(self, batch: Mapping[str, Any], *, padding_ids: Iterable[int | None], token_labels: bool) -> bool:
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
                    there = values[~values.isnan()]
                    new |= bool(len(there)) and self._extends(name, float(there.min()), float(there.max()))
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


def label_names(batch: Mapping[str, Any]) -> list[str]:
    """What of a batch says what is to be predicted: all that is neither tokens nor goes with them."""
    size = len(batch["input_ids"])
    return [
        name
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        if name not in _INPUTS and not name.startswith(("decoder_", "global_"))
        if value.shape[:2] != batch["input_ids"].shape or name == "labels"
    ]


def label_range(batch: Mapping[str, Any], name: str, logits: object) -> int | None:
    """How many values a label can have, as classes of `logits (B, ..., C)` or places among tokens; None if unknown."""
    labels = batch[name]
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    if name in ANSWERS:
        return batch["input_ids"].shape[-1]
    classes = logits.shape[-1] if isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape else 0
    return classes if classes > 1 and labels.max() < classes else None


def class_name(batch: Mapping[str, Any], ranges: Mapping[str, int | None]) -> str | None:
    """Which of the labels says of what class an example is, if any: one whole number."""
    for name in sorted(ranges, key=lambda name: name != "labels"):
        labels = batch[name]
        if labels[0].numel() == 1 and labels.dtype in (torch.int64, torch.int32) and name not in ANSWERS:
            return name
    return None


def altered_batches(batch: Mapping[str, Any], ranges: Mapping[str, int | None]) -> Iterator[dict[str, Any]]:
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


def with_classes(batch: Mapping[str, Any], name: str, classes: Tensor, *, first: int) -> dict[str, Any]:
    """The batch whose examples from the first on have the labels `classes`, over and over, wherever they have one."""
    labels = batch[name].clone()
    places = (labels[first:] != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    drawn = classes.to(labels.device, labels.dtype)
    labels[first:].view(-1)[places] = drawn[torch.arange(len(places), device=labels.device) % len(drawn)]
    return {**batch, name: labels}


def with_missing(
    few: Mapping[str, Any], batch: Mapping[str, Any], asked: set[tuple[str, float]]
) -> Iterator[dict[str, Any]]:
    """The examples `few` with a label less, not the first one's, by each value of `batch` that may say so and is not `asked`."""
    for name in label_names(batch):
        for value in _MISSING if name in few else ():
            labels = few[name].clone()
            others = labels[1:].view(-1)
            found, gone = (one.isnan() if math.isnan(value) else one == value for one in (batch[name], others))
            if (name, value) not in asked and bool(found.any()) and not bool(gone.all()):
                asked.add((name, value))
                others[(~gone).nonzero()[0]] = value
                yield {**few, name: labels}


def _is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() and values.dtype != torch.bool


def _opposite(labels: Tensor) -> Tensor:
    if labels.dtype == torch.bool:
        return ~labels
    binary = labels.is_floating_point() or bool(((labels == 0) | (labels == 1)).all())
    return 1 - labels if binary else labels


def _other_tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
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
