"""
Gradient rows caught in the training backward itself.

Shapes: B = batch size, T = positions of all lookups of a forward.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_doge.gradients.embedding_uses import EmbeddingUses, counted_positions, join_by_example
from hf_doge.gradients.example_losses import loss_of
from hf_doge.gradients.fused_head import FUSED
from hf_doge.gradients.token_rows import PositionGradients
from hf_doge.tracing.even_weights import EvenWeights, count_labels
from hf_doge.tracing.online_identity import EXAMPLE_IDS
from hf_doge.tracing.online_scale import TrainingScale, check_loss_is_all, without_num_items
from hf_doge.tracing.settings import RecordingSettings

# Makes the gradients of the check, which no loss scale protects, survive in float16. A power of two rounds nothing.
_BOOST = 1024.0

_SAME_WEIGHT = 1e-2  # room for multiples in half precision


@dataclass
class CaughtRows:
    """
    Gradient rows of some examples, on the CPU. Those of equal example and token are to be added up.

    Attributes:
        examples, tokens (`torch.Tensor` of shape `(n,)`): Whose they are.
        rows (`torch.Tensor` of shape `(n, width)`): As caught.
        factors (`torch.Tensor` of shape `(n,)`): `factors * rows` belong to the examples' own losses.
    """

    examples: Tensor
    tokens: Tensor
    rows: Tensor
    factors: Tensor


@dataclass
class _Forward:
    """One training forward, and what its backward left of it. `terms` tells where in `loss_grad` the loss has a part."""

    example_ids: Tensor
    input_ids: Tensor
    factors: Tensor
    token_ids: list[Tensor]
    counted: list[Tensor]
    label_counts: Tensor
    terms: Tensor | None = None
    grads: dict[int, Tensor] = field(default_factory=dict)
    loss_grad: Tensor | None = None
    expected: list[Tensor] | None = None

    def keep_grad(self, position: int, grad: Tensor) -> None:
        self.grads[position] = grad

    def keep_loss_grad(self, grad: Tensor) -> None:
        self.loss_grad = grad

    def multiple(self) -> Tensor:
        """Which multiple of the model's loss was differentiated."""
        if self.loss_grad is None:
            raise ValueError(
                "The training loss must be the one the model returns, but the backward did not come through it. Losses "
                "computed from the model's other outputs cannot be recorded online: use `record='checkpoint'` with a "
                "`loss_fn`."
            )
        if self.terms is None:
            return self.loss_grad
        multiples = -self.loss_grad[self.terms]
        _require_one_weight(multiples)
        return multiples.mean() if len(multiples) else multiples.new_zeros(())


class TrainingCapture(AbstractContextManager):
    """
    Watches a model train and gives the rows of each example of each micro-batch, freed from the scale of the step.

    Hooks on the model take the example ids out of a training batch before the model sees them; hooks on what the model
    reads from its embedding matrix keep the gradients that pass. Nothing that is computed changes by a bit. Forwards in
    evaluation mode, without gradients, or without example ids pass unseen.

    Args:
        model (`nn.Module`): As trained, unwrapped.
        settings ([`RecordingSettings`]): Which rows to keep, of which loss.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Knows padding and special tokens.
        half_precision (`bool`): Whether the training step runs in half precision, in part at least.
        check_backward (`bool`):
            Whether to compare the first backward with that of the model's loss alone, which runs a second backward once.
            Reentrant gradient checkpointing does not allow it.
        loss_is_scaled (`bool`): Whether a scaler of fp16 multiplies the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: RecordingSettings,
        tokenizer: PreTrainedTokenizerBase | None = None,
        half_precision: bool = False,
        check_backward: bool = True,
        loss_is_scaled: bool = False,
    ) -> None:
        self.model = model
        options = settings.recorder_options(tokenizer)
        self._top_k = {"top_k": options["top_k"], "top_k_unit": options["top_k_unit"]}
        self._pad_token_id = options["pad_token_id"]
        self._dropped = torch.tensor(options["drop_token_ids"], dtype=torch.long)
        self._scale = TrainingScale(model, loss_reduction=settings.loss_reduction)
        self._half_precision = half_precision
        self._uses = EmbeddingUses(model)
        self._check_backward = check_backward
        self._check_this = False
        self._checking = False
        self._ids: Tensor | None = None
        self._forwards: list[_Forward] = []
        self._caught: list[CaughtRows] = []
        self._multiples: list[Tensor] = []
        self._label_counts: list[Tensor] = []
        self._weights: EvenWeights | None = EvenWeights(loss_is_scaled=loss_is_scaled)

    def __enter__(self) -> "TrainingCapture":
        with ExitStack() as stack:
            stack.enter_context(self._uses)
            before = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
            stack.callback(before.remove)
            stack.callback(self.model.register_forward_hook(self._after_forward, with_kwargs=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        for caught in (self._forwards, self._caught, self._multiples, self._label_counts):
            caught.clear()
        self._ids = None

    def take(self) -> list[CaughtRows]:
        """
        What was caught since the last call, by micro-batch and lookup.

        Raises:
            ValueError: if the training loss is not a multiple of the model's own, the same in all of the step.
        """
        self._drain()
        caught, multiples, counts = self._caught, self._multiples, self._label_counts
        self._caught, self._multiples, self._label_counts = [], [], []
        self._forwards = []  # what has no gradient by now was not trained on
        if len(multiples) > 1:
            _require_one_weight(torch.stack(multiples))
        self._compare_steps(multiples, counts)
        return caught

    def _compare_steps(self, multiples: list[Tensor], counts: list[Tensor]) -> None:
        """Warn once if other steps were made with another multiple of the model's loss."""
        if self._weights is None or not multiples or len(counts) < len(multiples):
            return
        others = self._weights.others(multiples[0], counts[0], counts)
        if others is not None:
            self._weights = None
            warnings.warn(
                f"The loss of the model is multiplied by {others} at different steps, so examples do not weigh the same."
                " Recorded is the loss that the model returns, without such weights: let the model weigh its own loss, or"
                " use `record='checkpoint'` with a `loss_fn`.",
                stacklevel=2,
            )

    def _drain(self) -> None:
        """Take from finished backwards what is needed, and off the device: micro-batches may be many and large."""
        finished = [forward for forward in self._forwards if forward.grads]
        self._forwards = [forward for forward in self._forwards if not forward.grads]
        for forward in finished:
            multiple = forward.multiple()
            self._multiples.append(multiple)
            if forward.terms is None:  # a sum, which is divided by the labels of all the step
                self._label_counts.append(forward.label_counts)
            self._caught.extend(self._rows(forward, multiple))

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._checking:
            return None
        self._uses.clear()
        self._ids = None
        if EXAMPLE_IDS not in kwargs:
            return None
        kwargs = dict(kwargs)
        ids = kwargs.pop(EXAMPLE_IDS)
        if module.training and torch.is_grad_enabled():
            self._ids = ids
            self._checking = True
            try:
                self._drain()
                self._check_this = self._scale.check(kwargs)
            except BaseException:
                self._stack.close()  # the training ends here, and leaves the model as it was
                raise
            finally:
                self._checking = False
                self._uses.clear()
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, outputs: Any) -> None:
        if self._checking or self._ids is None:
            return
        lookups = list(self._uses.lookups)
        self._uses.clear()  # the graph must not outlive the step
        ids, self._ids = self._ids, None
        log_probs = getattr(outputs, "log_probs", None) if kwargs.get(FUSED) else None
        loss = loss_of(outputs) if log_probs is None else -log_probs.sum()
        if loss is None or not loss.requires_grad or not lookups:
            self._stack.close()
            raise ValueError(
                f"`{type(module).__name__}` must return the training loss and read its input embeddings itself, but "
                f"{'it returned no loss' if loss is None else 'its embeddings were not read with gradients on'}. "
                "Losses computed outside the model (`compute_loss_func`, label smoothing) and sharded or compiled models "
                "cannot be recorded online: use `record='checkpoint'`."
            )
        batch = without_num_items(kwargs)
        forward = _Forward(
            example_ids=ids,
            input_ids=batch["input_ids"],
            factors=self._scale.factors(kwargs, summed=log_probs is not None),
            token_ids=[lookup.token_ids for lookup in lookups],
            counted=[counted_positions(lookup, batch, pad_token_id=self._pad_token_id) for lookup in lookups],
            label_counts=count_labels(batch.get("labels")),
            terms=None if log_probs is None else outputs.label_mask,
        )
        if self._check_this and self._check_backward:
            outputs_read = [lookup.output for lookup in lookups]
            boost = torch.full_like(loss, _BOOST)
            grads = torch.autograd.grad(loss, outputs_read, boost, retain_graph=True, materialize_grads=True)
            forward.expected = [grad / _BOOST for grad in grads]
        self._check_this = False
        (loss if log_probs is None else log_probs).register_hook(forward.keep_loss_grad)
        for position, lookup in enumerate(lookups):
            lookup.output.register_hook(partial(forward.keep_grad, position))
        self._forwards.append(forward)

    def _rows(self, forward: _Forward, multiple: Tensor) -> Iterator[CaughtRows]:
        width = self._uses.matrix.shape[1]
        grads = [
            forward.grads[position]
            if position in forward.grads
            else forward.factors.new_zeros(*token_ids.shape, width)
            for position, token_ids in enumerate(forward.token_ids)
        ]
        if forward.expected is not None:
            check_loss_is_all(grads, forward.expected, multiple, half_precision=self._half_precision)
        factors = forward.factors.to(grads[0].device)
        scales = factors / multiple.to(factors.device, factors.dtype)
        scales = scales.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # no term, or not trained: the gradient is 0
        if self._top_k["top_k"] is None:
            yield from self._by_position(forward, grads, scales)
        else:
            yield self._by_token(forward, grads, scales)

    def _by_position(self, forward: _Forward, grads: list[Tensor], scales: Tensor) -> Iterator[CaughtRows]:
        """Not merged yet, which is cheaper to do for many steps at once."""
        nothing = forward.input_ids.new_zeros(len(forward.input_ids), 0)
        for token_ids, counted, grad in zip(forward.token_ids, forward.counted, grads, strict=True):
            tokens = join_by_example([token_ids], nothing, forward.input_ids)  # (B, T)
            if len(self._dropped):
                counted = counted & ~torch.isin(token_ids, self._dropped.to(token_ids.device))
            positions = counted.flatten().nonzero().squeeze(1)
            lines = positions // tokens.shape[1]
            yield CaughtRows(
                examples=forward.example_ids[lines].cpu(),
                tokens=tokens.flatten()[positions].cpu(),
                rows=grad.reshape(-1, grad.shape[-1]).index_select(0, positions).cpu(),
                factors=scales[lines].cpu(),
            )

    def _by_token(self, forward: _Forward, grads: list[Tensor], scales: Tensor) -> CaughtRows:
        """Merged and truncated as [`EmbeddingGradientRecorder`] does."""
        nothing = grads[0].new_zeros(len(forward.input_ids), 0, grads[0].shape[-1])
        gradients = PositionGradients(
            token_ids=join_by_example(forward.token_ids, nothing[..., 0].long(), forward.input_ids),
            counted=join_by_example(forward.counted, nothing[..., 0].bool(), forward.input_ids),
            input_grads=join_by_example(grads, nothing, forward.input_ids),
            hidden=nothing,
            logit_grads=nothing,
            dropped=self._dropped.to(nothing.device),
            scales=scales,
        )
        merged = gradients.merge(**self._top_k, virtual=not self._uses.matrix.requires_grad)
        return CaughtRows(
            examples=forward.example_ids.repeat_interleave(merged.offsets.diff()).cpu(),
            tokens=merged.tokens.cpu(),
            rows=merged.rows.cpu(),
            factors=torch.ones(len(merged.tokens), dtype=merged.rows.dtype),
        )


def _require_one_weight(multiples: Tensor) -> None:
    """All micro-batches of a step, and all terms of a loss, must weigh the same."""
    if not len(multiples):
        return
    smallest, largest = multiples.aminmax()
    if largest - smallest > _SAME_WEIGHT * multiples.abs().max():
        raise ValueError(
            "All examples of a step must weigh the same in what is trained, but their losses are multiplied by "
            f"{float(smallest):.4g} to {float(largest):.4g}. A training that reweights examples or tokens cannot be "
            "recorded online: use `record='checkpoint'`."
        )
