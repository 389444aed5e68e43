"""
What the batches of a recording must show: that the rows of an example are those that it has alone.

The examples of one batch can hide that they depend on each other: where all have one class, a loss with class weights is
the plain mean. So the others are asked about with other labels, each class among them, other tokens and other lengths. See
[`EmbeddingGradientRecorder`] for what is checked when.
"""

import inspect
from collections.abc import Mapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_doge.gradients.batches import (
    Group,
    Layout,
    Novelty,
    altered_batches,
    class_name,
    few_examples,
    label_names,
    label_range,
    padding_mask,
    single_example,
    with_classes,
    with_missing,
    without_labels,
)
from hf_doge.gradients.embedding_uses import Lookup, join_by_example
from hf_doge.gradients.example_losses import IGNORE_INDEX, ExampleLosses, check_finite, logits_of, loss_of, not_a_mean
from hf_doge.gradients.token_rows import PositionGradients, lengths_agree, rows_agree

_CONCLUSIVE_LOSS = 1e-3  # below it the gradient of a cross-entropy is mostly rounding in float32
_CONCLUSIVE_DISTANCE = 1e-7  # the same of a distance to labels that are numbers, which no softmax rounds
_LATER_ROOM = 6  # for rounding, where batch after batch is looked at: more of them may have an unlucky example
_LATER_BATCHES = 8  # of so many, some are compared
_NUM_COMPARED = 4  # examples of a batch that are run together, to be compared with some of them alone
_NUM_CLASSES = 256  # so many are all asked about before a training; of more, some, and then those that occur


class Backward(Protocol):
    """What is asked of [`EmbeddingBackward`]; see there."""

    model: nn.Module
    matrix: Tensor
    losses: ExampleLosses
    tied: str
    padding_ids: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in."""

    def differentiate(
        self, batch: Mapping[str, Any], *, from_logits: bool = False
    ) -> tuple[PositionGradients, Tensor]:
        """The gradients of every position, and the loss."""

    def run(self, batch: Mapping[str, Any]) -> tuple[object, list[Lookup]]:
        """What the model returns, and what it has looked up."""


class Verification:
    """
    Looks at batches before they are recorded, and learns what may be left out of the work on later ones.

    Args:
        backward ([`Backward`]): Of the model.
        is_on (`bool`): Whether to compare anything.

    Attributes:
        layout ([`Layout`], *optional*): Of the batches whose padding can be left out.
        from_logits (`bool`, *optional*): Whether the model need not compute its loss; None until that is known.
        last (`dict`, *optional*): A batch that was recorded and not compared.
    """

    def __init__(self, backward: Backward, *, is_on: bool) -> None:
        self._backward = backward
        self._is_on = is_on
        self._verified = False
        self._encoder_decoder = bool(getattr(getattr(backward.model, "config", None), "is_encoder_decoder", False))
        # Whether a model reads its input once, and by position, is told by its lookups.
        self._loss_is_stock = has_stock_loss(backward.model)
        self._may_split = is_on and backward.tied != "output" and not self._encoder_decoder
        self.layout: Layout | None = None
        may_omit_labels = _labels_are_optional(backward.model) and not self._encoder_decoder
        self.from_logits: bool | None = None if may_omit_labels else False
        self.last: dict[str, Any] | None = None
        self._compared_last = False
        self._few: dict[str, Any] | None = None  # examples to ask about further labels with
        self._label_name: str | None = None  # whose values are asked about one by one
        self._num_labels: int | None = None  # how many there are, if that is known
        self._novelty = Novelty()
        self._asked: set[int] = set()
        self._unasked: set[int] = set()
        self._asked_missing: set[tuple[str, float]] = set()

    def look(self, given: Mapping[str, Any], batch: dict[str, Any]) -> bool:
        """
        See what a batch shows before it is recorded.

        Args:
            given (`Mapping`), batch (`dict`): As it came, and prepared.

        Returns:
            `bool`: whether its rows are to be compared too, by [`compare`].

        Raises:
            ValueError: Its examples depend on each other or on padding, or the loss is not a mean of theirs.
        """
        if self._is_on and len(batch["input_ids"]) > 1 and (not self._verified or self._shows_padding(batch)):
            self._compare(batch)
        if self._verified and self.from_logits is None:
            self.from_logits = self._logits_suffice(batch)
        if self._is_on:
            self._note_labels(batch)
            # Values that may say that a label is missing, as soon as a batch has one.
            for altered in with_missing(self._few or {}, batch, self._asked_missing):
                self._require_unmoved(altered, self._rows_alone(self._few, 0, strip_padding=False)[0])
        by_token, padding_ids = self._backward.losses.by_token, self._backward.padding_ids
        return self._is_on and self._novelty.found(given, padding_ids=padding_ids, token_labels=by_token)

    def compare(self, batch: dict[str, Any], group: Group, gradients: PositionGradients, loss: Tensor) -> None:
        """
        Refuse a group of the batch if two of its examples have other rows alone.

        Args:
            batch (`dict`), group ([`Group`]): All, and some that were run together.
            gradients ([`PositionGradients`]), loss (`torch.Tensor`): What came out.
        """
        for place in {0, len(group.examples) - 1}:
            self._stands_alone(batch, gradients, place, int(group.examples[place]), loss, room=_LATER_ROOM)

    def check(self, batch: dict[str, Any]) -> None:
        """Refuse a batch, prepared, as [`look`] would refuse a first one, and ask about all labels."""
        if len(batch["input_ids"]) > 1:
            self._compare(batch)
        else:
            check_finite(self._backward.differentiate(batch)[1])
        self._note_labels(batch)
        self.ask_all_labels()

    def finish(self) -> dict[str, Any] | None:
        """Ask about what is left to ask when all batches are recorded. Returns the last one, if it is to be compared."""
        self._ask_further(at_least=1)
        if self.last is None or not self._is_on or self._compared_last or self._novelty.num_batches <= _LATER_BATCHES:
            return None
        self._compared_last = True
        return self.last

    def ask_all_labels(self) -> None:
        """Ask about the labels that the batches so far did not have as well, before an hour of training is lost."""
        if self._num_labels is not None:
            step = -(-self._num_labels // max(_NUM_CLASSES, self._num_places()))
            self._unasked |= set(range(0, self._num_labels, step)) - self._asked
            self._ask_further(at_least=1)

    def _compare(self, batch: dict[str, Any]) -> None:
        """Compare the examples with most padding and with most ignored labels with themselves alone."""
        batch_size = len(batch["input_ids"])
        padding = self._padding(batch)
        compared = {int(padding.argmax())}
        labels = batch.get("labels")
        if labels is not None and not labels.is_floating_point():
            compared.add(int((labels == IGNORE_INDEX).reshape(batch_size, -1).sum(dim=1).argmax()))
        others = (example for example in range(batch_size) if example not in compared)
        chosen = sorted([*compared, *islice(others, _NUM_COMPARED - len(compared))])
        few = few_examples(batch, torch.tensor(chosen, device=batch["input_ids"].device))
        gradients, loss = self._backward.differentiate(few)
        check_finite(loss)
        conclusive = [
            self._stands_alone(few, gradients, place, chosen[place], loss, within=place)
            for place in map(chosen.index, compared)
        ]
        self._verified = all(conclusive)
        if self._few is None:
            self._ask(few)
        mask = padding_mask(batch)
        if self._verified and self._may_split and mask is not None and not bool(mask[sorted(compared)].all()):
            read_once = torch.equal(gradients.token_ids, few["input_ids"])
            self.layout, self._may_split = (Layout.of(batch), True) if read_once else (None, False)

    def _shows_padding(self, batch: dict[str, Any]) -> bool:
        """Whether a batch has the first padding that could be left out."""
        mask = padding_mask(batch) if self._may_split and self.layout is None else None
        return mask is not None and not bool(mask.all())

    def _padding(self, batch: Mapping[str, Any]) -> Tensor:
        """How much padding each example has, shape `(B,)`."""
        input_ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        padded = torch.zeros_like(input_ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
            padded |= mask == 0
        for token in self._backward.padding_ids:
            padded |= input_ids == token
        return padded.reshape(len(input_ids), -1).sum(dim=1)

    def _stands_alone(
        self,
        batch: dict[str, Any],
        gradients: PositionGradients,
        place: int,
        example: int,
        loss: Tensor,
        *,
        within: int | None = None,
        room: float = 1,
    ) -> bool:
        """
        Refuse the model if the example at a place has other rows alone; False where its loss is too small to tell.

        Args:
            batch (`dict`): With the example, at `within` if that is not `example`.
            gradients ([`PositionGradients`]): Of some examples, the example at `place`.
            loss (`torch.Tensor`): Theirs, summed.
            room (`float`): For rounding, see [`rows_agree`].
        """
        together, at = gradients.example_rows(place), example if within is None else within
        alone, own_loss = self._rows_alone(batch, at, strip_padding=len(batch["input_ids"]) > 1)
        if rows_agree(together, alone, dtype=self._backward.dtype, room=room):
            return bool((alone[1] != 0).any())
        if not self._is_conclusive(own_loss, batch):
            # next to nothing alone: then rounding is small against the rows of the others
            least = float(gradients.sizes().max()) if self._is_conclusive(loss, batch) else torch.inf
            if rows_agree(together, alone, dtype=self._backward.dtype, room=room, least=least):
                return False
        padded, _ = self._rows_alone(batch, at, strip_padding=False)
        name = type(self._backward.model).__name__
        if rows_agree(together, padded, dtype=self._backward.dtype, room=room):
            raise ValueError(
                f"Padding must not change an example's gradient, but example {example} of the batch has another with "
                f"padding than without in `{name}`. Pad inputs and labels on the side the model was made for, label "
                f"padding {IGNORE_INDEX}, and pass `attention_mask` and, with padding on the left, `position_ids`."
            )
        raise self._dependent(f"example {example} of the batch", "")

    def _is_conclusive(self, loss: Tensor, batch: Mapping[str, Any]) -> bool:
        """Whether the gradient of a loss is more than rounding."""
        labels = batch.get("labels")
        numbers = isinstance(labels, Tensor) and labels.is_floating_point() and self._backward.dtype.itemsize >= 4
        numbers = numbers and not bool(((labels == 0) | (labels == 1)).all())
        return float(loss) >= (_CONCLUSIVE_DISTANCE if numbers else _CONCLUSIVE_LOSS)

    def _dependent(self, example: str, where: str) -> ValueError:
        return ValueError(
            f"An example's gradient must not depend on its batch, but {example} has another alone "
            f"than together with the others{where} in `{type(self._backward.model).__name__}`. Its layers or its loss (class weights?)"
            " mix examples: pass a `loss_fn` if it is the loss, or record with batch size 1."
        )

    def _ask(self, few: dict[str, Any]) -> None:
        """
        Refuse the model if an example has other rows where the others of the batch are altered: what the examples at hand
        have in common, all of one class, say, can hide that they depend on each other.
        """
        with torch.no_grad():
            logits = logits_of(self._backward.model(**few))
        ranges = {name: label_range(few, name, logits) for name in label_names(few)}
        classes = class_name(few, ranges)
        places = torch.arange(len(few["input_ids"]), device=few["input_ids"].device)
        for first in places.tolist():
            turned = few_examples(few, places.roll(-first))
            alone, loss = self._rows_alone(turned, 0, strip_padding=False)
            if not self._is_conclusive(loss, turned) and ranges.get(classes) is not None:
                other = (turned[classes][:1] + 1) % ranges[classes]
                turned[classes] = torch.cat([other, turned[classes][1:]])
                alone, loss = self._rows_alone(turned, 0, strip_padding=False)
            if self._is_conclusive(loss, turned):
                break
        else:
            return  # all too small to tell anything
        for altered in list(altered_batches(turned, ranges)):
            self._require_unmoved(altered, alone)
        self._few, self._label_name, self._num_labels = turned, classes, ranges.get(classes)

    def _require_unmoved(self, altered: dict[str, Any], alone: tuple[Tensor, Tensor]) -> None:
        gradients, loss = self._backward.differentiate(altered)
        together = gradients.example_rows(0)
        if loss.isfinite() and not (
            rows_agree(together, alone, dtype=self._backward.dtype)
            and lengths_agree(together, alone, dtype=self._backward.dtype)
        ):
            raise self._dependent("an example", " when these are altered (other labels, tokens or lengths)")

    def _note_labels(self, batch: dict[str, Any]) -> None:
        """Ask about the labels of a batch that were not asked about."""
        first = not self._asked
        if self._backward.losses.by_token and self._label_name is None:
            self._ask_of_terms(batch)
        if self._label_name not in batch or len(self._asked) == self._num_labels:
            return
        if self._backward.losses.by_token and self._loss_is_stock:
            return  # a forward for each token of a vocabulary would cost as much as the recording of a small dataset
        labels = batch[self._label_name]
        self._unasked |= set(labels[labels != IGNORE_INDEX].unique().tolist()) - self._asked
        # Weights of classes would make the rows of this very batch wrong; those of tokens make the whole loss another.
        self._ask_further(at_least=self._num_places() if self._backward.losses.by_token and not first else 1)

    def _num_places(self) -> int:
        """How many labels are asked about in one forward."""
        labels = self._few[self._label_name]
        return int((labels != IGNORE_INDEX).sum()) if self._backward.losses.by_token else len(labels) - 1

    def _ask_further(self, *, at_least: int) -> None:
        """Ask about labels that wait for it, as many at a time as the examples have room for."""
        if len(self._unasked) < at_least:
            return
        by_token, name = self._backward.losses.by_token, self._label_name
        alone = None if by_token else self._rows_alone(self._few, 0, strip_padding=False)[0]
        for classes in torch.tensor(sorted(self._unasked)).split(self._num_places()):
            if by_token:
                self._require_equal_terms(with_classes(self._few, name, classes, first=0))
            else:
                self._require_unmoved(with_classes(self._few, name, classes, first=1), alone)
        self._asked |= self._unasked
        self._unasked = set()

    def _ask_of_terms(self, batch: dict[str, Any]) -> None:
        """Refuse a loss that is the mean over labelled tokens only for some numbers of them."""
        some = torch.arange(len(batch["labels"]), device=batch["labels"].device)[:_NUM_COMPARED]
        few = few_examples(batch, some)
        few["labels"] = self._backward.losses.counted_labels(few["labels"])
        with torch.no_grad():
            logits = logits_of(self._backward.model(**few))
        self._few, self._label_name, self._num_labels = few, "labels", logits.shape[-1]
        labels = few["labels"].clone()
        places = (labels[0] != IGNORE_INDEX).nonzero().squeeze(1)
        labels[0, places[: len(places) // 2]] = IGNORE_INDEX
        if len(labels) > 1:
            labels[-1] = IGNORE_INDEX
        self._require_equal_terms({**few, "labels": labels}, silent=len(labels) > 1)

    def _require_equal_terms(self, batch: dict[str, Any], *, silent: bool = False) -> None:
        """`silent`: the last example has no label, so that nothing of the loss may be its own."""
        outputs, lookups = self._backward.run(batch)
        if not self._backward.losses.has_equal_terms(outputs, batch):
            raise not_a_mean(" where the labels are others than those of the first examples (class weights?)")
        if not silent or not lookups:
            return
        grads = torch.autograd.grad(
            loss_of(outputs), [one.output for one in lookups], allow_unused=True, materialize_grads=True
        )
        nothing = self._backward.matrix.new_zeros(len(batch["input_ids"]), 0, self._backward.matrix.shape[1])
        sizes = join_by_example(grads, nothing, batch["input_ids"]).flatten(start_dim=1).float().norm(dim=1)
        if sizes[-1] > 1e-12 * sizes.max():  # it is exactly 0 where nothing but the labelled tokens has a part
            raise not_a_mean(": an example without a label has a part in it (a loss that balances experts?)")

    def _logits_suffice(self, batch: dict[str, Any]) -> bool | None:
        """Whether an example has the same rows if the model computes its logits only; None where that cannot be told."""
        labels = batch.get("labels")
        if not self._backward.losses.by_token or labels is None or labels.is_floating_point():
            return None if self._backward.losses.by_token else False
        alone = single_example(batch, 0, strip_padding=True, encoder_decoder=self._encoder_decoder)
        with torch.no_grad():
            outputs = self._backward.model(**without_labels(alone))
        if not self._backward.losses.has_logits(outputs, alone):
            return False
        (rows, _), (others, _) = (
            self._backward.differentiate(alone, from_logits=from_logits) for from_logits in (True, False)
        )
        rows, others = rows.example_rows(0), others.example_rows(0)
        return rows_agree(rows, others, dtype=self._backward.dtype) if bool((others[1] != 0).any()) else None

    def _rows_alone(
        self, batch: dict[str, Any], place: int, *, strip_padding: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        alone = single_example(batch, place, strip_padding=strip_padding, encoder_decoder=self._encoder_decoder)
        gradients, loss = self._backward.differentiate(alone)
        return gradients.example_rows(0), loss


def has_stock_loss(model: nn.Module) -> bool:
    """
    Whether the loss is computed by transformers' own code for the model, which gives no token a weight of its own: neither
    the class nor its `forward` nor its `loss_function` is anyone else's. Wrappers that keep the forward (accelerate's for
    mixed precision, PEFT's) are looked through.
    """
    if callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()
    forward = getattr(inspect.unwrap(model.forward), "__func__", inspect.unwrap(model.forward))
    return (
        type(model).__module__.startswith("transformers.models.")
        and forward is inspect.unwrap(type(model).forward)
        and getattr(getattr(model, "loss_function", None), "__module__", None) == "transformers.loss.loss_utils"
    )


def _labels_are_optional(model: nn.Module) -> bool:
    """Whether the model's forward says that it can do without labels."""
    labels = inspect.signature(model.forward).parameters.get("labels")
    return labels is not None and labels.default is None
