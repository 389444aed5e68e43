"""
From the training loss back to the loss of each example.

A training step differentiates `a * loss`, where `loss` is what the model returned and `a` collects whatever the Trainer
multiplies it by: accumulation steps, processes, the loss scale of fp16. `a` needs no formula: it is the gradient that
arrives at `loss` in the backward. The model's `loss` in turn is the sum of its terms (examples, or labelled tokens) over
their number in the batch or, if the Trainer passes it in and the model uses it, over `num_items_in_batch`. Which of the
two, that the terms of an example are its own, and that nothing but `loss` is differentiated, is checked on the first
batch; it is refused if it does not hold.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.embedding_uses import full_precision, input_embedding_matrix
from hf_doge.gradients.example_losses import IGNORE_INDEX, ExampleLosses, check_finite, loss_of
from hf_doge.tracing.batches import preserved_random_state

NUM_ITEMS = "num_items_in_batch"

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 3e-2


class TrainingScale:
    """
    Knows how the model's loss comes out of those of the examples.

    Args:
        model (`nn.Module`): As trained, unwrapped.
        loss_reduction (`str`): Whether an example's loss is the `"sum"` or the `"mean"` of its terms.
    """

    def __init__(self, model: nn.Module, *, loss_reduction: str) -> None:
        self.model = model
        self._matrix = input_embedding_matrix(model)
        self._losses = ExampleLosses(reduction=loss_reduction)
        self._checked: set[tuple[bool, bool]] = set()
        self._uses_num_items = False

    def check(self, inputs: Mapping[str, Any]) -> bool:
        """
        Check, on the first batch of each kind, that the model's loss is what we take it for. Draws no random number and
        leaves no trace in the model.

        Args:
            inputs (`Mapping`): All that the training step is about to call the model with.

        Returns:
            `bool`: whether there was something to check.

        Raises:
            ValueError: if the scale of an example cannot be told.
        """
        has_num_items = inputs.get(NUM_ITEMS) is not None
        if (has_num_items, True) in self._checked:
            return False
        batch = without_num_items(inputs)
        labels = batch.get("labels")
        rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            # a causal model never predicts the first token; for the others one label less decides nothing here
            labels = labels.reshape(len(labels), -1)
            rows = (labels[:, int(labels.shape[1] > 1) :] != IGNORE_INDEX).any(dim=1).nonzero().squeeze(1)
        kind = (has_num_items, len(rows) > 1)  # a single example cannot show that it is independent of others
        if kind in self._checked or len(rows) == 0:
            return False
        few = _take(batch, rows[:2])
        try:
            self._check(few, num_items=has_num_items)
        except ValueError as error:
            raise ValueError(
                f"This training cannot be recorded online; fix it or use `record='checkpoint'`. {error}"
            ) from error
        self._checked.add(kind)
        return True

    def _check(self, few: Mapping[str, Any], *, num_items: bool) -> None:
        # evaluation mode, no gradient of a parameter
        with preserved_random_state(), full_precision(self.model), EmbeddingGradientRecorder(self.model) as recorder:
            recorder.check(few)  # an example alone has the rows it has next to another
            few = self._losses.prepare(self.model, few)
            if num_items:
                self._uses_num_items = self._find_num_items(few)

    def factors(self, inputs: Mapping[str, Any], *, summed: bool = False) -> Tensor:
        """
        What the gradient of the model's loss must be multiplied by to be that of each example's own.

        Args:
            inputs (`Mapping`): What the model was called with.
            summed (`bool`): Whether the loss is the sum of its terms rather than their mean.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: of no meaning for an example without any label, whose gradient is 0.
        """
        num_terms, scales = self._num_terms(without_num_items(inputs))
        if summed:
            return scales
        if inputs.get(NUM_ITEMS) is not None and self._uses_num_items:
            num_terms = torch.as_tensor(inputs[NUM_ITEMS], dtype=scales.dtype, device=scales.device)
        return scales * num_terms

    def _num_terms(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """How many terms the batch has, and the factor from their sum to each example's own loss."""
        dtype = self._matrix.dtype if self._matrix.dtype.itemsize >= 4 else torch.float32
        one = torch.ones((), dtype=dtype, device=batch["input_ids"].device)
        return self._losses.total(SimpleNamespace(loss=one), batch)

    @torch.no_grad()
    def _find_num_items(self, batch: Mapping[str, Any]) -> bool:
        """Whether the model divides by the number it is given rather than by its own count."""
        loss = loss_of(self.model(**batch))
        check_finite(loss)
        num_terms, _ = self._num_terms(batch)
        num_items = 2 * num_terms.to(loss.device) + 1
        given = loss_of(self.model(**batch, **{NUM_ITEMS: num_items}))
        ignored, used = (
            torch.isclose(given * ratio, loss, rtol=_HALF_TOLERANCE) for ratio in (1, num_items / num_terms)
        )
        if bool(ignored) == bool(used):
            raise ValueError(
                f"The model's loss must be a mean over its own terms or a sum over `{NUM_ITEMS}`, but with "
                f"{int(num_terms)} terms it is {float(loss):.6g} alone and {float(given):.6g} with {int(num_items)} "
                "items. Use `record='checkpoint'`."
            )
        return bool(used)


def check_loss_is_all(
    caught: list[Tensor], expected: list[Tensor], loss_grad: Tensor, *, half_precision: bool
) -> None:
    """
    Refuse a training loss that is not a multiple of the model's own.

    Args:
        caught (`list[torch.Tensor]`): Gradients at the lookups in the training backward.
        expected (`list[torch.Tensor]`): Those of the model's loss alone.
        loss_grad (`torch.Tensor` of shape `()`): Gradient at the model's loss in the training backward.
        half_precision (`bool`): Whether part of the backward runs in half precision, whatever the dtype of its end.

    Raises:
        ValueError: if `caught` is not `loss_grad * expected`.
    """
    for found, alone in zip(caught, expected, strict=True):
        alone = alone.double() * loss_grad.double()
        error, size = float((found.double() - alone).norm()), float(alone.norm())
        tolerance = _HALF_TOLERANCE if half_precision else _TOLERANCE.get(found.dtype, _HALF_TOLERANCE)
        if not error <= tolerance * max(size, 1e-30):
            raise ValueError(
                "What is trained must be a multiple of the loss that the model returns, but the gradient of the "
                f"embeddings is off by {error / max(size, 1e-30):.1%} from that. A `compute_loss` that adds to or "
                "reweights the model's loss cannot be recorded online: use `record='checkpoint'` with a `loss_fn`."
            )


def without_num_items(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the data collator made it."""
    return {name: value for name, value in inputs.items() if name != NUM_ITEMS}


def _take(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some examples of a batch; options of the forward, which are no tensors, stay at their defaults."""
    size = len(batch["input_ids"])
    return {
        name: value[rows.to(value.device)] if value.ndim > 0 and len(value) == size else value
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
