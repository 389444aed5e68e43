"""
Per-example, per-token gradients of the embedding matrix from one forward and one backward per batch.

Only what is read from the embedding matrix requires a gradient (see [`EmbeddingUses`]), so the backward skips every
parameter's own gradient. Position `(i, t)` of the batch gets its gradient from the loss of example `i` alone, as long
as examples do not see each other, which is checked on the first batch; merged by token these are example `i`'s rows.

Shapes: B = batch size, T = positions, W = distinct tokens of one example, D = embedding width, V = vocabulary.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.functional.tracin_we import check_top_k
from hf_doge.gradients.batches import Group, split, without_labels
from hf_doge.gradients.embedding_uses import (
    EmbeddingUses,
    Lookup,
    counted_positions,
    evaluation_mode,
    full_precision,
    input_embedding_matrix,
    join_by_example,
    no_parameter_gradients,
    require_seen,
    same_problem_type,
)
from hf_doge.gradients.example_losses import ExampleLosses, LossFunction, check_finite, logits_of
from hf_doge.gradients.layer_uses import LayerUses
from hf_doge.gradients.layers import EMBEDDING, ChosenLayers, Virtual
from hf_doge.gradients.token_rows import PositionGradients, TokenRows, join_groups
from hf_doge.gradients.verification import Verification

TIED_PARTS = ("input", "output", "full", "own")


class EmbeddingGradientRecorder(AbstractContextManager):
    """
    Records the embedding gradient of each example of a batch as if the example had been alone.

    ```python
    with EmbeddingGradientRecorder(model) as recorder:
        for batch in loader:  # padded, with labels
            for tokens, rows in recorder.record(batch):
                ...
    ```

    Inside the context the model is in evaluation mode and none of its parameters requires a gradient; both are put
    back exactly as they were. `.grad` is never touched.

    The loss is the model's own, `model(**batch).loss`: a mean over examples, or over labelled tokens where labels are
    integers with a position axis. Which token a label belongs to (its own, or the one before, as in causal models) is
    read off the first batch by computing the cross-entropy both ways; a model whose loss is neither is refused. Up to
    four examples of the first batch of at least two, and of the first one with padding, are compared with one or two of
    them, each alone and without padding, and a model that gives them other rows is refused. (A loss next to 0 decides
    nothing; then the next batch is compared.)

    What has been compared is made use of: a batch is run in groups of similar length, without the padding that a group
    does not need; and a cross-entropy over many classes is differentiated without the model computing it. Rows are the same
    either way but for rounding.

    **Own rows**, `tied="own"`: a token `w` has a row if the example looks it up at a counted position (in the decoder too,
    where there is one), and the row is that of the whole matrix's gradient,

        row_w = sum_{t: x_t = w} dloss/de_t + sum_s dloss/dlogit[s, w] * h_s        (D,)

    with `e_t (D,)` what is read at position `t` and `h_s (D,)` what the tied output layer reads at position `s`: the word as
    it is read, and as it is predicted or wrongly expected anywhere in the example. Ours; the paper has the first sum alone,
    and what is better is measured in `benchmarks/reproduce/RESULTS.md`. An example has as many rows as with `"input"`. What it costs besides: the
    logits, `(B, S, V)`, are copied once and their gradient is kept until the rows are made, which for each example takes
    `S * W * D` multiplications. A model without a tied output layer has the rows of `"input"`.

    Args:
        model (`nn.Module`):
            A model that reads `input_ids`, has `get_input_embeddings()` and returns an object with `.loss`, such as
            any of transformers.
        loss_fn (`Callable`, *optional*):
            `loss_fn(outputs, batch) -> (batch_size,)`, one loss per example, instead of the model's own. It must
            depend on each example alone, and reduces over tokens as it likes.
        loss_reduction (`str`):
            Whether the loss of an example is the `"sum"` or the `"mean"` of its token losses. A classifier has one
            loss per example and is indifferent.
        tied (`str`):
            Which use of an embedding matrix that is also the output matrix counts: `"input"`, the paper's (sparse: only
            the example's tokens have rows), `"output"`, `"full"`, their sum, or `"own"`, the rows of their sum that
            belong to the example's tokens. `"output"` and `"full"` give an example a row for every token of the
            vocabulary with a non-zero gradient, so set `top_k` unless the vocabulary is small; then one dense gradient is
            held at a time. `"own"` is described below.
        top_k (`int`, *optional*): Keep only the `top_k` tokens of largest norm, see [`top_k_rows`].
        top_k_unit (`str`): `"position"` or `"token"`. The output part has no positions and takes `"token"`.
        pad_token_id (`int`, *optional*):
            Padding besides that of a 2-D `attention_mask` and of `nn.Embedding(padding_idx=...)`, which never count.
            A decoder's first token is its start, and counts even if it is this one. Leave it out if real text holds
            it too (a padding token that is also the end of text).
        drop_token_ids (`Sequence[int]`):
            Tokens that get no row, as if they were padding: special ones, say. They are left out before `top_k`.
        verify (`bool`): Whether to compare the first batches with examples alone.
        layers ([`ChosenLayers`], *optional*): Layers that have rows next to those of words, or instead of them; with all of
            an example's positions, also those of dropped tokens, and next to the `top_k` of words.

    Raises:
        ValueError: if the model has no input embeddings or an option is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: LossFunction | None = None,
        loss_reduction: str = "sum",
        tied: str = "input",
        top_k: int | None = None,
        top_k_unit: str = "position",
        pad_token_id: int | None = None,
        drop_token_ids: Sequence[int] = (),
        verify: bool = True,
        layers: ChosenLayers | None = None,
    ) -> None:
        if tied not in TIED_PARTS:
            raise ValueError(f"`tied` must be one of {list(TIED_PARTS)}, but got {tied!r}.")
        if top_k is not None:
            check_top_k(top_k, top_k_unit)
            if tied != "input" and top_k_unit != "token":
                raise ValueError(
                    f"`top_k_unit` must be 'token' with `tied={tied!r}`, but got {top_k_unit!r}: rows of the output "
                    "part belong to no position."
                )
        self.model = model
        self.top_k = top_k
        self.top_k_unit = top_k_unit
        self._backward = EmbeddingBackward(
            model,
            loss_fn=loss_fn,
            loss_reduction=loss_reduction,
            tied=tied,
            pad_token_id=pad_token_id,
            drop_token_ids=drop_token_ids,
            layers=layers,
        )
        self._verification = Verification(self._backward, is_on=verify)
        self._warned = False

    @property
    def matrix(self) -> Tensor:
        """The embedding matrix of the model."""
        return self._backward.matrix

    def __enter__(self) -> "EmbeddingGradientRecorder":
        self._backward.__enter__()
        if not self._warned and self._backward.frozen.parts:
            self._warned = True
            warnings.warn(self._backward.frozen.warning(), stacklevel=2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            last = self._verification.finish() if kind is None else None
            if last is not None:
                self._rows(last, split(last, self._verification.layout, self.model), compare=True)
        finally:
            self._backward.__exit__(kind, error, traceback)

    def copy(self) -> "EmbeddingGradientRecorder":
        """A recorder that knows what this one has learned of its batches. What it learns itself stays its own."""
        other = copy.copy(self)
        other._verification = copy.copy(self._verification)
        return other

    def record(self, batch: Mapping[str, Any]) -> TokenRows:
        """
        One forward, one backward, and the rows of each example.

        Args:
            batch (`Mapping`):
                What the model takes, padded, with `input_ids` of shape `(batch_size, num_positions)` (or
                `(batch_size, num_choices, num_positions)`) and labels. Tensors are moved to the model's device.

        Returns:
            [`TokenRows`] of the batch, on the model's device.

        Raises:
            ValueError: if the batch has no `input_ids`, an example has no label, or the model does not fit (see above).
            RuntimeError: if called outside the context.
        """
        return self._record(batch)

    def look_at(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch as [`record`] would, and keep nothing of it."""
        self._record(batch)

    def check(self, batch: Mapping[str, Any]) -> None:
        """
        Refuse what [`record`] would refuse of a first batch, for less than it costs to record it.

        Args:
            batch (`Mapping`): As for [`record`]. Only one with several examples shows whether they see each other.

        Raises:
            ValueError, RuntimeError: as [`record`].
        """
        self._verification.check(self._backward.prepare(batch))

    def ask_all_labels(self) -> None:
        """Ask about the labels that the batches so far did not have as well, before an hour of training is lost."""
        self._verification.ask_all_labels()

    def _record(self, batch: Mapping[str, Any]) -> TokenRows:
        prepared = self._backward.prepare(batch)
        compare = self._verification.look(batch, prepared)
        rows = self._rows(prepared, split(prepared, self._verification.layout, self.model), compare=compare)
        self._verification.last = None if compare else prepared
        return rows

    def _rows(self, batch: dict[str, Any], groups: list[Group], *, compare: bool) -> TokenRows:
        """The rows of a batch; those of two of its examples may be compared with these alone, by the model's own loss."""
        labels = batch.get("labels")
        by_class = isinstance(labels, Tensor) and not labels.is_floating_point()
        largest = max(groups, key=lambda group: len(group.examples))
        parts = []
        for group in groups:
            from_logits = by_class and bool(self._verification.from_logits)
            gradients, loss = self._backward.differentiate(group.batch, from_logits=from_logits)
            check_finite(loss)
            if compare and group is largest:
                self._verification.compare(batch, group, gradients, loss)
            parts.append(
                gradients.merge(top_k=self.top_k, top_k_unit=self.top_k_unit, virtual=self._backward.frozen.is_all)
            )
        return join_groups(parts, torch.cat([group.examples for group in groups]))


class EmbeddingBackward(AbstractContextManager):
    """
    Differentiates the losses of batches with respect to what a model reads from its embedding matrix.

    Inside the context the model is in evaluation mode, computes without the autocast of accelerate, and none of its
    parameters requires a gradient; all of it is put back exactly as it was.

    Args:
        model (`nn.Module`): With input embeddings.
        loss_fn, loss_reduction, tied, pad_token_id, drop_token_ids, layers: See [`EmbeddingGradientRecorder`].

    Attributes:
        matrix (`torch.Tensor`): The embedding matrix.
        frozen ([`Virtual`]): Which parts of what is recorded are frozen; known inside the context.
        padding_ids (`tuple[int, ...]`): The tokens that are padding wherever they stand; known inside the context.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: LossFunction | None = None,
        loss_reduction: str = "sum",
        tied: str = "input",
        pad_token_id: int | None = None,
        drop_token_ids: Sequence[int] = (),
        layers: ChosenLayers | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.losses = ExampleLosses(loss_fn, reduction=loss_reduction)
        self.matrix = input_embedding_matrix(model)
        self.tied = tied
        self.pad_token_id = pad_token_id
        self.drop_token_ids = tuple(drop_token_ids)
        self._uses: EmbeddingUses | None = None
        self._layer_uses: LayerUses | None = None

    def __enter__(self) -> "EmbeddingBackward":
        self.matrix = input_embedding_matrix(self.model)  # may have been resized since
        words = () if self.matrix.requires_grad else (EMBEDDING,)
        self.frozen = Virtual(words, bool(words)) if self.layers is None else Virtual.of(self.model, self.layers)
        padding = (self.pad_token_id, getattr(self.model.get_input_embeddings(), "padding_idx", None))
        self.padding_ids = tuple(token for token in padding if token is not None)
        with ExitStack() as stack:
            stack.enter_context(full_precision(self.model))
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(same_problem_type(self.model))
            stack.enter_context(no_parameter_gradients(self.model))
            uses = EmbeddingUses(self.model, lookups=self.tied != "output", projections=self.tied != "input")
            self._uses = stack.enter_context(uses)
            if self.layers is not None:
                self._layer_uses = stack.enter_context(LayerUses(self.model, self.layers))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._uses = self._layer_uses = None
        self._stack.close()

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in."""
        return torch.float16 if torch.is_autocast_enabled(self.matrix.device.type) else self.matrix.dtype

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """
        The batch on the model's device, with the labels that count for each example alone, see [`ExampleLosses.prepare`].

        Raises:
            ValueError: It has no token ids, or an example no label.
            RuntimeError: This is called outside the context.
        """
        if self._uses is None:
            raise RuntimeError("`record` must be called inside the context: `with EmbeddingGradientRecorder(...)`.")
        return self.losses.prepare(self.model, self._to_device(batch))

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        fed = [name for name in ("inputs_embeds", "decoder_inputs_embeds") if batch.get(name) is not None]
        if fed or batch.get("input_ids") is None:
            raise ValueError(
                f"The batch must hold `input_ids` and no ready embeddings, but its keys are {sorted(batch)}. "
                "TracIn-WE needs to know which token each embedding belongs to: feed token ids."
            )
        device = self.matrix.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def differentiate(
        self, batch: Mapping[str, Any], *, from_logits: bool = False
    ) -> tuple[PositionGradients, Tensor]:
        """The gradients of every position, and the loss that was differentiated (finite or not, if `from_logits`)."""
        uses = self._uses
        self._clear()
        uses.differentiable = self.layers is None or self.layers.embedding
        with torch.enable_grad():
            if from_logits:
                outputs = self.model(**without_labels(batch))
                differentiated = logits_of(outputs)
                grad_outputs, loss, scales = self.losses.at_logits(differentiated, batch)
            else:
                outputs = self.model(**batch)
                loss, scales = self.losses.total(outputs, batch)
                differentiated, grad_outputs = loss, None
        lookups, projections = list(uses.lookups), list(uses.projections)
        layer_uses = [] if self._layer_uses is None else self._layer_uses.take()
        self._clear()
        if uses.differentiable:
            require_seen(self.model, lookups, projections, tied=self.tied)
        read = lookups if uses.differentiable else []
        wanted = [*(use.output for use in (*read, *projections)), *(output for _, _, output in layer_uses)]
        if not wanted or not differentiated.requires_grad:
            raise ValueError(
                f"The loss must depend on what the model reads from its input embeddings, but "
                f"`{type(self.model).__name__}` did not read them with gradients on. Feed it token ids."
            )
        found = torch.autograd.grad(differentiated, wanted, grad_outputs, allow_unused=True)
        ids, num_words = batch["input_ids"], len(read) + len(projections)
        grads = [
            torch.zeros_like(one) if grad is None else grad
            for one, grad in zip(wanted, found[:num_words], strict=False)
        ]
        nothing = self.matrix.new_zeros(len(ids), 0, self.matrix.shape[1])
        counted = [counted_positions(lookup, batch, pad_token_id=self.pad_token_id) for lookup in lookups]
        unread = [] if read else [torch.zeros_like(lookup.output) for lookup in lookups]
        layer_rows = None
        if self._layer_uses is not None:
            layer_rows = self._layer_uses.rows(layer_uses, found[num_words:], ids)
        gradients = PositionGradients(
            token_ids=join_by_example([lookup.token_ids for lookup in lookups], nothing[..., 0].long(), ids),
            counted=uses.differentiable & join_by_example(counted, nothing[..., 0].bool(), ids),
            input_grads=join_by_example(grads[: len(read)] or unread, nothing, ids),
            hidden=join_by_example([use.inputs for use in projections], nothing, ids),
            logit_grads=join_by_example(grads[len(read) :], nothing, ids),
            scales=scales.to(self.matrix.device),
            dropped=torch.tensor(self.drop_token_ids, dtype=torch.long, device=self.matrix.device),
            own_only=self.tied == "own",
            layer_rows=layer_rows,
            first_layer_row=len(self.matrix),
        )
        return gradients, loss.detach()

    def _clear(self) -> None:
        self._uses.clear()
        if self._layer_uses is not None:
            self._layer_uses.clear()

    def run(self, batch: Mapping[str, Any]) -> tuple[object, list[Lookup]]:
        """What the model returns with gradients on, and what it has looked up for it."""
        self._clear()
        self._uses.differentiable = True
        with torch.enable_grad():
            outputs = self.model(**batch)
        lookups = list(self._uses.lookups)
        self._clear()
        return outputs, lookups
