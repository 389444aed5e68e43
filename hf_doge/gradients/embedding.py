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
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor, nn

from hf_doge.functional.tracin_we import check_top_k
from hf_doge.gradients.batches import split
from hf_doge.gradients.embedding_backward import EmbeddingBackward
from hf_doge.gradients.example_losses import ExampleLosses, LossFunction, check_finite
from hf_doge.gradients.token_rows import TokenRows, join_groups
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
    it is read, and as it is predicted or wrongly expected anywhere in the example. Ours; the paper has the first sum alone.
    On a small language model whose matrices are tied, leaving out the 30 of 600 documents it names raised the loss of 24
    held-out continuations by .160 [.075, .245] nats more than `"input"` (95 % intervals), .187 [.099, .275] more than BM25
    and about as much as `"full"`, +.012 [-.026, .049]: `python -m benchmarks.reproduce tracin_lm --data_dir ../shared/data
    --output_dir outputs/reproduce`. An example has as many rows as with `"input"`. What it costs beside that: the
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
            losses=ExampleLosses(loss_fn, reduction=loss_reduction),
            tied=tied,
            pad_token_id=pad_token_id,
            drop_token_ids=drop_token_ids,
        )
        self._verification = Verification(self._backward, is_on=verify)
        self._warned = False

    @property
    def matrix(self) -> Tensor:
        """The embedding matrix of the model."""
        return self._backward.matrix

    def __enter__(self) -> "EmbeddingGradientRecorder":
        self._backward.__enter__()
        if self._backward.virtual and not self._warned:
            self._warned = True
            warnings.warn(
                "The input embeddings of the model are frozen, so no training example ever moved them: the recorded "
                "gradients are virtual. Train the embeddings too if you want the influence of training itself.",
                stacklevel=2,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            last = self._verification.finish() if kind is None else None
            if last is not None:
                self._rows(last, compare=True)
        finally:
            self._backward.__exit__(kind, error, traceback)

    def copy(self) -> "EmbeddingGradientRecorder":
        """A recorder that knows what this one has learned of its batches. What it learns itself stays its own."""
        other = copy.copy(self)
        other._verification = copy.copy(self._verification)
        return other

    def record(self, batch: Mapping[str, object]) -> TokenRows:
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

    def look_at(self, batch: Mapping[str, object]) -> None:
        """Refuse a batch as [`record`] would, and keep nothing of it."""
        self._record(batch)

    def check(self, batch: Mapping[str, object]) -> None:
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

    def _record(self, batch: Mapping[str, object]) -> TokenRows:
        prepared = self._backward.prepare(batch)
        compare = self._verification.look(batch, prepared)
        rows = self._rows(prepared, compare=compare)
        self._verification.last = None if compare else prepared
        return rows

    def _rows(self, batch: dict[str, object], *, compare: bool) -> TokenRows:
        """The rows of a batch; those of two of its examples may be compared with these alone, by the model's own loss."""
        labels = batch.get("labels")
        by_class = isinstance(labels, Tensor) and not labels.is_floating_point()
        groups = split(batch, self._verification.layout, self.model)
        largest = max(groups, key=lambda group: len(group.examples))
        parts = []
        for group in groups:
            from_logits = by_class and bool(self._verification.from_logits)
            gradients, loss = self._backward.differentiate(group.batch, from_logits=from_logits)
            check_finite(loss)
            if compare and group is largest:
                self._verification.compare(batch, group, gradients, loss)
            parts.append(gradients.merge(top_k=self.top_k, top_k_unit=self.top_k_unit, virtual=self._backward.virtual))
        return join_groups(parts, torch.cat([group.examples for group in groups]))
