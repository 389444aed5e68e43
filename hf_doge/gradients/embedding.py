"""
Per-example, per-token gradients of the embedding matrix from one forward and one backward per batch.

Only what is read from the embedding matrix requires a gradient (see [`EmbeddingUses`]), so the backward skips every
parameter's own gradient. Position `(i, t)` of the batch gets its gradient from the loss of example `i` alone, as long
as examples do not see each other, which is checked on the first batch; merged by token these are example `i`'s rows.

Shapes: B = batch size, T = positions, W = distinct tokens of one example, D = embedding width, V = vocabulary.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor, nn

from hf_doge.functional.tracin_we import check_top_k
from hf_doge.gradients.embedding_uses import EmbeddingUses, Lookup, input_embedding_matrix
from hf_doge.gradients.example_losses import (
    IGNORE_INDEX,
    ExampleLosses,
    LossFunction,
    check_finite,
    logits_of,
    loss_of,
    not_a_mean,
)
from hf_doge.gradients.independence import (
    Novelty,
    altered_batches,
    class_name,
    few_examples,
    label_names,
    label_range,
    lengths_agree,
    rows_agree,
    single_example,
    with_classes,
)
from hf_doge.gradients.padding import Group, Layout, padding_mask, split_by_length, tokens_per_call
from hf_doge.gradients.token_rows import PositionGradients, TokenRows, join_groups

TIED_PARTS = ("input", "output", "full", "own")

_CONCLUSIVE_LOSS = 1e-3  # below it the gradient of a cross-entropy is mostly rounding in float32
_CONCLUSIVE_DISTANCE = 1e-7  # the same of a distance to labels that are numbers, which no softmax rounds
_LATER_ROOM = 6  # for rounding, where batch after batch is looked at: more of them may have an unlucky example
_NUM_COMPARED = 4  # examples of a batch that are run together, to be compared with some of them alone
_NUM_CLASSES = 256  # so many are all asked about before a training; of more, some, and then those that occur


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
        self.matrix = input_embedding_matrix(model)
        self.tied = tied
        self.top_k = top_k
        self.top_k_unit = top_k_unit
        self.pad_token_id = pad_token_id
        self.drop_token_ids = tuple(drop_token_ids)
        self._losses = ExampleLosses(loss_fn, reduction=loss_reduction)
        self._verify = verify
        self._verified = False
        self._encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        # Whether a model reads its input once, and by position, is told by its lookups.
        self._may_split = verify and tied != "output" and not self._encoder_decoder
        self._layout: Layout | None = None  # of the batches whose padding can be left out
        self._from_logits: bool | None = None if _labels_are_optional(model) and not self._encoder_decoder else False
        self._uses: EmbeddingUses | None = None
        self._warned = False
        self._few: dict[str, object] | None = None  # examples to ask about further labels with
        self._label_name: str | None = None  # whose values are asked about one by one
        self._num_labels: int | None = None  # how many there are, if that is known
        self._novelty = Novelty()
        self._last: dict[str, object] | None = None  # a batch that was not compared
        self._compared_last = False
        self._asked: set[int] = set()
        self._unasked: set[int] = set()

    def __enter__(self) -> "EmbeddingGradientRecorder":
        self.virtual = not self.matrix.requires_grad
        if self.virtual and not self._warned:
            self._warned = True
            warnings.warn(
                "The input embeddings of the model are frozen, so no training example ever moved them: the recorded "
                "gradients are virtual. Train the embeddings too if you want the influence of training itself.",
                stacklevel=2,
            )
        with ExitStack() as stack:
            stack.enter_context(_evaluation_mode(self.model))
            stack.enter_context(_same_problem_type(self.model))
            stack.enter_context(_no_parameter_gradients(self.model))
            uses = EmbeddingUses(self.model, lookups=self.tied != "output", projections=self.tied != "input")
            self._uses = stack.enter_context(uses)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._ask_further(at_least=1)
                if self._last is not None and not self._compared_last and self._novelty.num_batches > 8:
                    self._compared_last = True
                    self._parts(self._last, compare=True)
        finally:
            self._uses = None
            self._stack.close()

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

    def _record(self, batch: Mapping[str, object]) -> TokenRows:
        given, batch = batch, self._prepared(batch)
        if self._verify:
            mask = padding_mask(batch) if self._may_split else None
            padded = mask is not None and self._layout is None and not bool(mask.all())
            if len(batch["input_ids"]) > 1 and (padded or not self._verified):
                self._compare(batch)
            self._note_labels(batch)
        if self._verified and self._from_logits is None:
            self._from_logits = self._logits_suffice(batch)
        compare = self._verify and self._novelty.found(
            given, padding_ids=self._padding_ids(), token_labels=self._losses.by_token
        )
        rows = self._parts(batch, compare=compare)
        self._last = None if compare or not self._verify else batch
        return rows

    def _parts(self, batch: dict[str, object], *, compare: bool) -> TokenRows:
        """The rows of a batch; those of two of its examples may be compared with these alone, by the model's own loss."""
        labels = batch.get("labels")
        by_class = isinstance(labels, Tensor) and not labels.is_floating_point()
        groups = self._groups(batch, padding_mask(batch) if self._may_split else None)
        largest = max(groups, key=lambda group: len(group.examples))
        parts = []
        for group in groups:
            gradients, loss = self._differentiate(group.batch, from_logits=bool(self._from_logits) and by_class)
            check_finite(loss)
            if compare and group is largest:
                for place in {0, len(group.examples) - 1}:
                    self._stands_alone(batch, gradients, place, int(group.examples[place]), loss, room=_LATER_ROOM)
            parts.append(gradients.merge(top_k=self.top_k, top_k_unit=self.top_k_unit, virtual=self.virtual))
        return join_groups(parts, torch.cat([group.examples for group in groups]))

    def check(self, batch: Mapping[str, object]) -> None:
        """
        Refuse what [`record`] would refuse of a first batch, for less than it costs to record it.

        Args:
            batch (`Mapping`): As for [`record`]. Only one with several examples shows whether they see each other.

        Raises:
            ValueError, RuntimeError: as [`record`].
        """
        batch = self._prepared(batch)
        if len(batch["input_ids"]) > 1:
            self._compare(batch)
        else:
            check_finite(self._differentiate(batch)[1])
        self._note_labels(batch)
        self.ask_all_labels()

    def ask_all_labels(self) -> None:
        """Ask about the labels that the batches so far did not have as well, before an hour of training is lost."""
        if self._num_labels is not None:
            step = -(-self._num_labels // max(_NUM_CLASSES, self._num_places()))
            self._unasked |= set(range(0, self._num_labels, step)) - self._asked
            self._ask_further(at_least=1)

    def _prepared(self, batch: Mapping[str, object]) -> dict[str, object]:
        if self._uses is None:
            raise RuntimeError("`record` must be called inside the context: `with EmbeddingGradientRecorder(...)`.")
        return self._losses.prepare(self.model, self._to_device(batch))

    def _groups(self, batch: dict[str, object], mask: Tensor | None) -> list[Group]:
        """The batch in groups, where that saves padding."""
        input_ids, labels = batch["input_ids"], batch.get("labels")
        if mask is None or self._layout is None or not self._layout.fits(batch):
            whole = (torch.arange(size, device=input_ids.device) for size in (len(input_ids), input_ids.shape[-1]))
            return [Group(*whole, batch)]
        if "labels" in self._layout.by_position and not labels.is_floating_point():
            mask = mask | (labels != IGNORE_INDEX)  # what has a label counts, padding or not
        return split_by_length(batch, mask, layout=self._layout, cost=tokens_per_call(self.model))

    def _to_device(self, batch: Mapping[str, object]) -> dict[str, object]:
        fed = [name for name in ("inputs_embeds", "decoder_inputs_embeds") if batch.get(name) is not None]
        if fed or batch.get("input_ids") is None:
            raise ValueError(
                f"The batch must hold `input_ids` and no ready embeddings, but its keys are {sorted(batch)}. "
                "TracIn-WE needs to know which token each embedding belongs to: feed token ids."
            )
        device = self.matrix.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _differentiate(
        self, batch: Mapping[str, object], *, from_logits: bool = False
    ) -> tuple[PositionGradients, Tensor]:
        """The gradients of every position, and the loss that was differentiated (finite or not, if `from_logits`)."""
        batch_size = batch["input_ids"].shape[0]
        uses = self._uses
        uses.clear()
        with torch.enable_grad():
            if from_logits:
                outputs = self.model(**_without_labels(batch))
                differentiated = logits_of(outputs)
                grad_outputs, loss, scales = self._losses.at_logits(differentiated, batch)
            else:
                outputs = self.model(**batch)
                loss, scales = self._losses.total(outputs, batch)
                differentiated, grad_outputs = loss, None
        lookups, projections = list(uses.lookups), list(uses.projections)
        uses.clear()
        if self.tied == "output" and not projections:
            raise ValueError(
                f"`tied='output'` needs an output layer that multiplies by the embedding matrix, but "
                f"`{type(self.model).__name__}` has none. Use `tied='input'`."
            )
        if self.tied != "input" and not projections and _has_tied_output(self.model, self.matrix):
            raise ValueError(
                f"`tied={self.tied!r}` needs to see the output layer multiply by the embedding matrix, but that of "
                f"`{type(self.model).__name__}`, which is tied to it, does so in a way of its own (not by `F.linear` within "
                "a module that holds the matrix). Use `tied='input'`."
            )
        wanted = [use.output for use in (*lookups, *projections)]
        embeddings = self.model.get_input_embeddings()
        if not lookups and any(hasattr(module, "trainable_tokens_delta") for module in embeddings.modules()):
            raise ValueError(
                "The input embeddings must be trained as a whole or not at all, but of those of"
                f" `{type(self.model).__name__}` only some tokens are (`trainable_token_indices` of PEFT), which are kept"
                " apart. Train all of them (`modules_to_save` with the name of the embedding layer), or none."
            )
        if not wanted or not differentiated.requires_grad:
            raise ValueError(
                f"The loss must depend on what the model reads from its input embeddings, but "
                f"`{type(self.model).__name__}` did not read them with gradients on. Feed it token ids."
            )
        grads = torch.autograd.grad(differentiated, wanted, grad_outputs, allow_unused=True, materialize_grads=True)
        lookup_grads, logit_grads = grads[: len(lookups)], grads[len(lookups) :]
        nothing = self.matrix.new_zeros(batch_size, 0, self.matrix.shape[1])
        gradients = PositionGradients(
            token_ids=join_by_example(
                [lookup.token_ids for lookup in lookups], nothing[..., 0].long(), batch["input_ids"]
            ),
            counted=join_by_example(
                [counted_positions(lookup, batch, pad_token_id=self.pad_token_id) for lookup in lookups],
                nothing[..., 0].bool(),
                batch["input_ids"],
            ),
            input_grads=join_by_example(lookup_grads, nothing, batch["input_ids"]),
            hidden=join_by_example([use.inputs for use in projections], nothing, batch["input_ids"]),
            logit_grads=join_by_example(logit_grads, nothing, batch["input_ids"]),
            scales=scales.to(self.matrix.device),
            dropped=torch.tensor(self.drop_token_ids, dtype=torch.long, device=self.matrix.device),
            own_only=self.tied == "own",
        )
        return gradients, loss.detach()

    def _compare(self, batch: dict[str, object]) -> None:
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
        gradients, loss = self._differentiate(few)
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
            self._layout, self._may_split = (Layout.of(batch), True) if read_once else (None, False)

    def _padding(self, batch: Mapping[str, object]) -> Tensor:
        """How much padding each example has, shape `(B,)`."""
        input_ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        padded = torch.zeros_like(input_ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
            padded |= mask == 0
        for token in self._padding_ids():
            if token is not None:
                padded |= input_ids == token
        return padded.reshape(len(input_ids), -1).sum(dim=1)

    def _padding_ids(self) -> tuple[int | None, ...]:
        return self.pad_token_id, getattr(self.model.get_input_embeddings(), "padding_idx", None)

    def _stands_alone(
        self,
        batch: dict[str, object],
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
        if self._agree(together, alone, room=room):
            return bool((alone[1] != 0).any())
        if not self._is_conclusive(own_loss, batch):
            # next to nothing alone: then rounding is small against the rows of the others
            sizes = gradients.input_grads.flatten(start_dim=1).norm(dim=1) * gradients.scales
            least = float(sizes.max()) if self._is_conclusive(loss, batch) else torch.inf
            if self._agree(together, alone, room=room, least=least):
                return False
        padded, _ = self._rows_alone(batch, at, strip_padding=False)
        name = type(self.model).__name__
        if self._agree(together, padded, room=room):
            raise ValueError(
                f"Padding must not change an example's gradient, but example {example} of the batch has another with "
                f"padding than without in `{name}`. Pad inputs and labels on the side the model was made for, label "
                f"padding {IGNORE_INDEX}, and pass `attention_mask` and, with padding on the left, `position_ids`."
            )
        raise self._dependent(f"example {example} of the batch", "")

    def _is_conclusive(self, loss: Tensor, batch: Mapping[str, object]) -> bool:
        """Whether the gradient of a loss is more than rounding."""
        labels = batch.get("labels")
        numbers = isinstance(labels, Tensor) and labels.is_floating_point() and self._dtype.itemsize >= 4
        numbers = numbers and not bool(((labels == 0) | (labels == 1)).all())
        return float(loss) >= (_CONCLUSIVE_DISTANCE if numbers else _CONCLUSIVE_LOSS)

    def _dependent(self, example: str, where: str) -> ValueError:
        return ValueError(
            f"An example's gradient must not depend on its batch, but {example} has another alone "
            f"than together with the others{where} in `{type(self.model).__name__}`. Its layers or its loss (class weights?)"
            " mix examples: pass a `loss_fn` if it is the loss, or record with batch size 1."
        )

    def _ask(self, few: dict[str, object]) -> None:
        """
        Refuse the model if an example has other rows where the others of the batch are altered: what the examples at hand
        have in common, all of one class, say, can hide that they depend on each other.
        """
        with torch.no_grad():
            logits = logits_of(self.model(**few))
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
        for altered in altered_batches(turned, ranges):
            self._require_unmoved(altered, alone)
        self._few, self._label_name, self._num_labels = turned, classes, ranges.get(classes)

    def _require_unmoved(self, altered: dict[str, object], alone: tuple[Tensor, Tensor]) -> None:
        gradients, loss = self._differentiate(altered)
        together = gradients.example_rows(0)
        if loss.isfinite() and not (
            self._agree(together, alone) and lengths_agree(together, alone, dtype=self._dtype)
        ):
            raise self._dependent("an example", " when these are altered (other labels, tokens or lengths)")

    def _note_labels(self, batch: dict[str, object]) -> None:
        """Ask about the labels of a batch that were not asked about."""
        first = not self._asked
        if self._losses.by_token and self._label_name is None:
            self._ask_of_terms(batch)
        if self._label_name not in batch or len(self._asked) == self._num_labels:
            return
        labels = batch[self._label_name]
        self._unasked |= set(labels[labels != IGNORE_INDEX].unique().tolist()) - self._asked
        # Weights of classes would make the rows of this very batch wrong; those of tokens make the whole loss another.
        self._ask_further(at_least=self._num_places() if self._losses.by_token and not first else 1)

    def _num_places(self) -> int:
        """How many labels are asked about in one forward."""
        labels = self._few[self._label_name]
        return int((labels != IGNORE_INDEX).sum()) if self._losses.by_token else len(labels) - 1

    def _ask_further(self, *, at_least: int) -> None:
        """Ask about labels that wait for it, as many at a time as the examples have room for."""
        if len(self._unasked) < at_least:
            return
        by_token, name = self._losses.by_token, self._label_name
        alone = None if by_token else self._rows_alone(self._few, 0, strip_padding=False)[0]
        for classes in torch.tensor(sorted(self._unasked)).split(self._num_places()):
            if by_token:
                self._require_equal_terms(with_classes(self._few, name, classes, first=0))
            else:
                self._require_unmoved(with_classes(self._few, name, classes, first=1), alone)
        self._asked |= self._unasked
        self._unasked = set()

    def _ask_of_terms(self, batch: dict[str, object]) -> None:
        """Refuse a loss that is the mean over labelled tokens only for some numbers of them."""
        some = torch.arange(len(batch["labels"]), device=batch["labels"].device)[:_NUM_COMPARED]
        few = few_examples(batch, some)
        few["labels"] = self._losses.counted_labels(few["labels"])
        with torch.no_grad():
            logits = logits_of(self.model(**few))
        self._few, self._label_name, self._num_labels = few, "labels", logits.shape[-1]
        labels = few["labels"].clone()
        places = (labels[0] != IGNORE_INDEX).nonzero().squeeze(1)
        labels[0, places[: len(places) // 2]] = IGNORE_INDEX
        if len(labels) > 1:
            labels[-1] = IGNORE_INDEX
        self._require_equal_terms({**few, "labels": labels}, silent=len(labels) > 1)

    def _require_equal_terms(self, batch: dict[str, object], *, silent: bool = False) -> None:
        """`silent`: the last example has no label, so that nothing of the loss may be its own."""
        self._uses.clear()
        with torch.enable_grad():
            outputs = self.model(**batch)
        lookups = [lookup.output for lookup in self._uses.lookups]
        self._uses.clear()
        if not self._losses.has_equal_terms(outputs, batch):
            raise not_a_mean(" where the labels are others than those of the first examples (class weights?)")
        if not silent or not lookups:
            return
        grads = torch.autograd.grad(loss_of(outputs), lookups, allow_unused=True, materialize_grads=True)
        nothing = self.matrix.new_zeros(len(batch["input_ids"]), 0, self.matrix.shape[1])
        sizes = join_by_example(grads, nothing, batch["input_ids"]).flatten(start_dim=1).float().norm(dim=1)
        if sizes[-1] > 1e-12 * sizes.max():  # it is exactly 0 where nothing but the labelled tokens has a part
            raise not_a_mean(": an example without a label has a part in it (a loss that balances experts?)")

    def _logits_suffice(self, batch: dict[str, object]) -> bool | None:
        """Whether an example has the same rows if the model computes its logits only; None where that cannot be told."""
        labels = batch.get("labels")
        if not self._losses.by_token or labels is None or labels.is_floating_point():
            return None if self._losses.by_token else False
        alone = self._alone(batch, 0, strip_padding=True)
        with torch.no_grad():
            outputs = self.model(**_without_labels(alone))
        if not self._losses.has_logits(outputs, alone):
            return False
        (rows, _), (others, _) = (self._differentiate(alone, from_logits=from_logits) for from_logits in (True, False))
        rows, others = rows.example_rows(0), others.example_rows(0)
        return self._agree(rows, others) if bool((others[1] != 0).any()) else None

    def _alone(self, batch: dict[str, object], place: int, *, strip_padding: bool) -> dict[str, object]:
        return single_example(batch, place, strip_padding=strip_padding, encoder_decoder=self._encoder_decoder)

    def _rows_alone(
        self, batch: dict[str, object], place: int, *, strip_padding: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        gradients, loss = self._differentiate(self._alone(batch, place, strip_padding=strip_padding))
        return gradients.example_rows(0), loss

    def _agree(
        self, together: tuple[Tensor, Tensor], alone: tuple[Tensor, Tensor], *, least: float = 0.0, room: float = 1
    ) -> bool:
        return rows_agree(together, alone, dtype=self._dtype, least=least, room=room)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if torch.is_autocast_enabled(self.matrix.device.type) else self.matrix.dtype


def counted_positions(lookup: Lookup, batch: Mapping[str, object], *, pad_token_id: int | None = None) -> Tensor:
    """
    Which positions of a lookup are not padding, by the masks of the batch, `padding_idx` and `pad_token_id`; of a decoder
    that predicts its `labels` those up to the last label.

    Args:
        lookup ([`Lookup`]): From a forward with `batch`.
        batch (`Mapping`): What the model was given.
        pad_token_id (`int`, *optional*): See [`EmbeddingGradientRecorder`].

    Returns:
        `torch.Tensor` of the shape of `lookup.token_ids`, dtype bool.
    """
    token_ids = lookup.token_ids
    counted = torch.ones_like(token_ids, dtype=torch.bool)
    for ids_name, mask_name in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        mask = batch.get(mask_name)
        if mask is not None and mask.numel() == token_ids.numel() and _same_ids(batch.get(ids_name), token_ids):
            counted &= mask.reshape(token_ids.shape).bool()
    if lookup.padding_idx is not None:
        counted &= token_ids != lookup.padding_idx
    if pad_token_id is not None:
        padding = token_ids == pad_token_id
        if not _same_ids(batch["input_ids"], token_ids):
            padding[..., 0] = False  # T5 starts its decoder with the padding token
        counted &= ~padding
    needed = _up_to_last_label(token_ids, batch)
    return counted if needed is None else counted & needed


def _up_to_last_label(token_ids: Tensor, batch: Mapping[str, object]) -> Tensor | None:
    """
    True at the positions that a decoder also reads of each example alone, where `labels` are not padded: without padding
    it never reads the last label. None if these ids are not those of a decoder with labels.
    """
    labels, given = batch.get("labels"), batch.get("decoder_input_ids")
    if not isinstance(labels, Tensor) or labels.shape != token_ids.shape or labels.is_floating_point():
        return None
    if _same_ids(batch["input_ids"], token_ids):
        return None
    labelled = labels != IGNORE_INDEX
    if given is None:
        differs = token_ids[..., 1:] != labels[..., :-1]  # a decoder reads a label one place after it predicts it
        decoder = not bool((labelled[..., :-1] & differs).any())
    else:
        decoder = _same_ids(given, token_ids)
    return labelled.flip(-1).cumsum(dim=-1).flip(-1) > 0 if decoder else None


def _same_ids(given: Tensor | None, token_ids: Tensor) -> bool:
    """Whether the lookup read these very ids, in any shape."""
    return (
        given is not None and given.numel() == token_ids.numel() and torch.equal(given.flatten(), token_ids.flatten())
    )


def join_by_example(parts: Sequence[Tensor], nothing: Tensor, input_ids: Tensor) -> Tensor:
    """All uses of the matrix in one forward side by side, one line per example; `nothing` where there is none."""
    batch_size, num_feature_axes = len(input_ids), nothing.ndim - 2
    lines = []
    for part in parts:
        positions = part.shape[: part.ndim - num_feature_axes]
        # several choices of one example may be lines of their own; a batch of one owns every position there is
        by_example = len(positions) > 1 and positions[0] in (batch_size, input_ids.shape[:-1].numel())
        if not by_example and batch_size > 1:
            raise ValueError(
                f"The embedding matrix must be used with one line per example, but a batch of {batch_size} used it "
                f"with shape {tuple(positions)}. Models that flatten, transpose or pack a batch cannot be recorded in "
                "batches: use batch size 1."
            )
        lines.append(part.reshape(batch_size, -1, *part.shape[len(positions) :]))
    return torch.cat(lines, dim=1) if lines else nothing


def _without_labels(batch: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _has_tied_output(model: nn.Module, matrix: Tensor) -> bool:
    """Whether the model says that its output layer is the embedding matrix."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(output, "weight", None) is matrix


def _labels_are_optional(model: nn.Module) -> bool:
    """Whether the model's forward says that it can do without labels."""
    labels = inspect.signature(model.forward).parameters.get("labels")
    return labels is not None and labels.default is None


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def _same_problem_type(model: nn.Module) -> Iterator[None]:
    """Classifiers of transformers note in their configuration what they make of the first labels: that is training's to do."""
    configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "problem_type")]
    kinds = [config.problem_type for config in configs]
    try:
        yield
    finally:
        for config, kind in zip(configs, kinds, strict=True):
            config.problem_type = kind


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    requiring = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in requiring:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in requiring:
            parameter.requires_grad_(True)
