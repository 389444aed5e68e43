"""
The loss of each example of a batch, out of one scalar that a model returns for all of them.

The loss of a transformers model is a mean over terms: over examples, or over the labelled tokens of the whole batch. Its
gradient with respect to anything only example `i` touches is therefore `1 / num_terms` times the gradient of the sum of
example `i`'s terms, so one backward of the mean serves every example: counting terms is all that is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE_INDEX = -100  # a label that no loss counts, as in PyTorch and transformers
LOSS_REDUCTIONS = ("sum", "mean")

ANSWERS = ("start_positions", "end_positions")  # the labels of question answering: places among the tokens

LossFunction = Callable[[object, Mapping[str, Any]], Tensor]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_HALF_TOLERANCE = 1e-2
_TERM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # relative to the gradient of one term
_HALF_TERM_TOLERANCE = 5e-2


class ExampleLosses:
    """
    Turns what a model returns into one scalar to differentiate and a factor per example.

    Args:
        loss_fn (`Callable`, *optional*):
            `loss_fn(outputs, batch) -> (batch_size,)`, instead of the model's own loss.
        reduction (`str`):
            Whether the loss of an example is the `"sum"` or the `"mean"` of its terms in the model's own loss.

    Attributes:
        by_token (`bool`): Whether the loss was found to be the cross-entropy of labelled tokens.

    Raises:
        ValueError: if `reduction` is unknown.
    """

    def __init__(self, loss_fn: LossFunction | None = None, *, reduction: str = "sum") -> None:
        if reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"`loss_reduction` must be one of {list(LOSS_REDUCTIONS)}, but got {reduction!r}.")
        self.loss_fn = loss_fn
        self.reduction = reduction
        self.by_token = False
        self._label_shift: int | None = None
        self._one_term = False  # whether labels with an axis more are yes or no for each class of an example

    def prepare(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        Check the labels, learn on the first batch which token a label belongs to, and drop labels that an example does
        not have alone: with padding on the left, a causal model predicts the first token of a text from padding.

        Args:
            model (`nn.Module`): Run once, without gradients, on the first batch whose labels have a position axis.
            batch (`Mapping`): What the model is to be given, with `input_ids` of shape `(batch_size, ...)`.

        Returns:
            `Mapping`: the batch, or a copy with other labels.

        Raises:
            ValueError: if an example has no label, or the model's loss is not a mean over labelled tokens although the
                labels have a position axis.
        """
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if self.loss_fn is not None:
            return batch
        _check_answers(batch)
        if labels is None or not _are_numbers(labels):
            return batch
        _check_labelled(labels)
        if labels[0].numel() == 1 or self._one_term:
            return batch
        if self._label_shift is None:
            with torch.no_grad():
                outputs = model(**batch)
            logits, apart = logits_of(outputs), labels.shape != batch["input_ids"].shape
            if apart and isinstance(logits, Tensor) and logits.shape == labels.shape and labels.min() >= 0:
                self._one_term = True
                return batch
            if labels.ndim > 2:
                raise ValueError(
                    f"`labels` must be one for each example or each token, but are of shape {tuple(labels.shape)}. Pass"
                    " `loss_fn(outputs, batch)`, which returns one loss per example."
                )
            self._label_shift = _find_label_shift(outputs, labels)
            self.by_token = True
        if self._label_shift == 1 and mask is not None and mask.shape == labels.shape:
            labels = labels.clone()
            labels[:, 1:][mask[:, :-1] == 0] = IGNORE_INDEX
        _check_labelled(labels[:, self._label_shift :])
        return {**batch, "labels": labels}

    def total(self, outputs: object, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """
        The sum of the examples' losses, up to a factor for each.

        Args:
            outputs: What the model returned, with `.loss` unless there is a `loss_fn`.
            batch (`Mapping`): What the model was given, from [`prepare`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: a scalar, and `scales (batch_size,)`: the gradient of example `i`'s
            loss is `scales[i]` times that of the scalar, wherever only example `i` has a part.

        Raises:
            ValueError: if there is no loss, or not one per example from `loss_fn`, with a gradient.
        """
        batch_size = batch["input_ids"].shape[0]
        if self.loss_fn is not None:
            losses = self.loss_fn(outputs, dict(batch))  # a copy, that it may take parts out of
            _check_losses(losses, outputs, batch_size)
            return losses.sum(), torch.ones_like(losses, requires_grad=False)
        loss = loss_of(outputs)
        if loss is None:
            raise ValueError(
                f"The model must return a loss, but it returned none for a batch with {sorted(batch)}. Add labels to "
                "the batch or pass `loss_fn`."
            )
        counts = self._count_terms(batch).to(loss.device, loss.dtype if loss.dtype.itemsize >= 4 else torch.float32)
        return loss * counts.sum(), 1 / counts if self.reduction == "mean" else torch.ones_like(counts)

    def at_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """
        The gradient of the examples' losses with respect to the logits, at a fraction of the price of [`total`]: the
        softmax less the labels, written once, where autograd goes four times through as many numbers.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, num_positions, num_classes)`): From the model.
            batch (`Mapping`): With its labels, from [`prepare`], which has found the loss to be their cross-entropy.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the gradient of the sum of all labelled tokens' losses, of
            the shape and dtype of `logits`; a scalar that is finite where that sum is; `scales (batch_size,)` as of
            [`total`].
        """
        logits, labels = logits.detach(), batch["labels"].to(logits.device)
        shift = self._label_shift
        assert shift is not None
        expected = F.pad(labels[:, shift:], (0, shift), value=IGNORE_INDEX).flatten()
        ignored = (expected == IGNORE_INDEX).nonzero().squeeze(1)
        places = expected.index_fill(0, ignored, 0)[:, None]
        dtype = logits.dtype if logits.dtype.itemsize >= 4 else torch.float32
        grad = torch.softmax(logits, dim=-1, dtype=dtype)
        lines = grad.view(-1, grad.shape[-1])
        picked = lines.gather(1, places)
        lines.scatter_(1, places, picked - 1)
        lines.index_fill_(0, ignored, 0)
        # 0 unless a label's logit is infinite or a line holds NaN or infinity, which makes all of its softmax NaN
        finite = (0 * picked + 0 * logits.flatten(end_dim=1).gather(1, places)).index_fill(0, ignored, 0).sum()
        counts = self._count_terms(batch).to(logits.device, dtype)
        return grad.to(logits.dtype), finite, 1 / counts if self.reduction == "mean" else torch.ones_like(counts)

    def has_logits(self, outputs: object, batch: Mapping[str, Any]) -> bool:
        """Whether [`at_logits`] can be used: the model returned a line of logits for each label."""
        logits = logits_of(outputs)
        return (
            self.by_token
            and isinstance(logits, Tensor)
            and logits.is_floating_point()
            and logits.dtype != torch.float64  # for those who want every digit, and models round it in their loss
            and logits.shape[:-1] == batch["labels"].shape
        )

    def counted_labels(self, labels: Tensor) -> Tensor:
        """The labels without those that no position predicts: the first of each text, in a causal model."""
        counted = labels.clone()
        counted[:, : self._label_shift or 0] = IGNORE_INDEX
        return counted

    def has_equal_terms(self, outputs: object, batch: Mapping[str, Any]) -> bool:
        """
        Whether the loss that a model returned with gradients on weighs all labelled tokens of the batch alike, and no other.

        Its gradient at each line of logits must be that of [`at_logits`] over their number, which tells weights apart that
        the loss itself hides: those of a model that knows nothing yet are all nearly the same.
        """
        loss, logits = loss_of(outputs), logits_of(outputs)
        assert loss is not None
        assert logits is not None
        (grad,) = torch.autograd.grad(loss, logits, allow_unused=True, retain_graph=True)
        if grad is None:  # the loss is of logits that the model keeps to itself
            shift = self._label_shift
            errors = _shift_errors(loss, logits, batch["labels"])
            return errors[shift] < torch.inf
        expected, finite, _ = self.at_logits(logits, batch)
        if not finite.isfinite():
            return True  # for other reasons than weights, which `check_finite` gives
        num_terms = self._count_terms(batch).sum().to(logits.device, torch.promote_types(grad.dtype, torch.float32))
        sizes = expected.norm(dim=-1, dtype=num_terms.dtype).clamp(min=0.1)
        errors = (grad * num_terms).sub_(expected).norm(dim=-1)
        return bool((errors <= _TERM_TOLERANCE.get(logits.dtype, _HALF_TERM_TOLERANCE) * sizes).all())

    def _count_terms(self, batch: Mapping[str, Any]) -> Tensor:
        """How many of the terms that the model's loss averages belong to each example, shape `(B,)`."""
        labels = batch.get("labels")
        if labels is None or not _are_numbers(labels) or self._one_term:
            return torch.ones(batch["input_ids"].shape[0])
        labelled = (labels != IGNORE_INDEX).reshape(len(labels), -1)
        return labelled[:, self._label_shift or 0 :].sum(dim=1)


def _check_losses(losses: object, outputs: object, batch_size: int) -> None:
    """What `loss_fn` returned must be a loss per example, and where the model's logits have gradients it must too."""
    if not isinstance(losses, Tensor):
        raise ValueError(
            f"`loss_fn` must return a tensor with one loss per example, shape ({batch_size},), but it returned a"
            f" {type(losses).__name__}. Return the losses, stacked."
        )
    if losses.shape != (batch_size,):
        raise ValueError(
            f"`loss_fn` must return one loss per example, shape ({batch_size},), but its shape is "
            f"{tuple(losses.shape)}. Reduce over tokens, not over examples."
        )
    logits = logits_of(outputs)
    has_gradient = isinstance(logits, Tensor) and logits.requires_grad
    if not losses.is_floating_point() or (has_gradient and not losses.requires_grad):
        raise ValueError(
            f"`loss_fn` must return losses with a gradient, but those it returned have none ({losses.dtype}). Compute them from"
            " `outputs` without `detach`, `argmax` or `torch.no_grad`."
        )


def loss_of(outputs: object) -> Tensor | None:
    """The loss among what a model returned: an object, a dictionary, or a tuple that begins with it."""
    return _part_of(outputs, "loss", 0)


def logits_of(outputs: object) -> Tensor | None:
    """The logits among what a model returned; in a tuple they come first, or after the loss."""
    return _part_of(outputs, "logits", 1 if loss_of(outputs) is not None else 0)


def _part_of(outputs: object, name: str, place: int) -> Tensor | None:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if not isinstance(outputs, tuple | list) or hasattr(outputs, name):
        return getattr(outputs, name, None)
    found = outputs[place] if len(outputs) > place else None
    scalar = isinstance(found, Tensor) and found.ndim == 0
    return found if scalar == (name == "loss") else None


def _are_numbers(labels: Tensor) -> bool:
    """Whether labels are classes or tokens; others are numbers to come close to, or truth values."""
    return not labels.is_floating_point() and labels.dtype != torch.bool


def _check_answers(batch: Mapping[str, Any]) -> None:
    """Models leave answers outside of the tokens out of their mean, so that the others of the batch count more."""
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        mask = torch.ones_like(input_ids)
    ends = (mask * torch.arange(1, input_ids.shape[-1] + 1, device=mask.device)).amax(dim=-1)
    for name in ANSWERS:
        places = batch.get(name)
        outside = isinstance(places, Tensor) and (places.reshape(len(input_ids), -1) >= ends[:, None]).any(dim=1)
        if isinstance(outside, Tensor) and outside.any():
            raise ValueError(
                f"Every example must have its answer among its tokens, but `{name}` of those at"
                f" {outside.nonzero().squeeze(1).tolist()} of the batch lies behind them. Drop them, or let it be 0, the"
                " first token, where there is no answer."
            )


def check_finite(loss: Tensor) -> None:
    """Raise a `ValueError` if the loss of a batch is not a number or infinite."""
    if not loss.isfinite():
        raise ValueError(f"The loss of a batch must be finite, but got {loss.item()}. Record in a wider dtype.")


def _check_labelled(labels: Tensor) -> None:
    empty = (labels == IGNORE_INDEX).reshape(len(labels), -1).all(dim=1)
    if empty.any():
        raise ValueError(
            f"Every example must have a label that counts, but those at {empty.nonzero().squeeze(1).tolist()} of the "
            f"batch have none but {IGNORE_INDEX} (a causal model never predicts the first token). Drop them."
        )


def _find_label_shift(outputs: object, labels: Tensor) -> int:
    """0 where a position predicts its own label, 1 where it predicts the next: whichever gives the model's loss."""
    logits, loss = logits_of(outputs), loss_of(outputs)
    if loss is None:
        raise ValueError(
            "The model must return its loss for a batch with labels, but it returned none. Pass `loss_fn`, which returns"
            " one loss per example."
        )
    check_finite(loss)
    errors = _shift_errors(loss, logits, labels)
    if not errors or min(errors) == torch.inf:
        raise not_a_mean("")
    return errors.index(min(errors))


def _shift_errors(loss: Tensor, logits: object, labels: Tensor) -> list[float]:
    """How far the cross-entropy of the logits is from the loss, for either shift; infinity where that is too far."""
    errors = []
    if isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape:
        logits = logits.to(loss.dtype if loss.dtype.itemsize >= 4 else torch.float32)
        for shift in (0, 1):
            predicted = logits[:, : labels.shape[1] - shift].flatten(end_dim=1)
            expected = F.cross_entropy(predicted, labels[:, shift:].flatten(), ignore_index=IGNORE_INDEX)
            errors.append(float((expected - loss).abs()))
    tolerance = _TOLERANCE.get(loss.dtype, _HALF_TOLERANCE) * float(loss.abs().clamp(min=1.0))
    return [error if error <= tolerance else torch.inf for error in errors]  # NaN too: no label left after the shift


def not_a_mean(where: str) -> ValueError:
    """The error of a loss whose share of each example is unknown."""
    return ValueError(
        f"The model's own loss must be the mean cross-entropy of its logits over the labelled tokens, but it is not{where},"
        " so the share of each example is unknown. Pass `loss_fn(outputs, batch)`, which returns one loss per example."
    )
