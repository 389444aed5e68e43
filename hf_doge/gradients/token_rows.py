"""
From gradients by position to rows by token, for a batch of examples.

Shapes: B = batch size, T = positions of all lookups of a forward (encoder and decoder alike), S = positions of the tied
output layer, W = distinct tokens of one example, D = embedding width, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_doge.functional.tracin_we import (
    batch_token_gradient_rows,
    batch_top_k_rows,
    token_gradient_rows,
    top_k_rows,
)

# Relative to the norm of the rows: room for rounding, but not for another function.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}
_HALF_TOLERANCE = 0.3
# Of the length of one gradient along the other: rounding of single numbers averages out in it.
_LENGTH_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_HALF_LENGTH_TOLERANCE = 0.08


@dataclass
class TokenRows:
    """
    Merged gradient rows of a batch of examples, one after the other. A sequence of `(tokens (W,), rows (W, width))`.

    Attributes:
        offsets (`torch.Tensor` of shape `(batch_size + 1,)`): Example `i` owns entries `offsets[i]:offsets[i + 1]`.
        tokens (`torch.Tensor` of shape `(num_entries,)`): Token ids, ascending and distinct within an example.
        rows (`torch.Tensor` of shape `(num_entries, width)`): Gradient row of each, float32 or float64.
        virtual (`bool`):
            Whether the embedding matrix is frozen. Its gradient then says what training it would have done, and no
            example ever moved it.
    """

    offsets: Tensor
    tokens: Tensor
    rows: Tensor
    virtual: bool

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, example: int) -> tuple[Tensor, Tensor]:
        example = range(len(self))[example]  # negative positions count from the end
        start, end = self.offsets[example : example + 2].tolist()
        return self.tokens[start:end], self.rows[start:end]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        lengths = self.offsets.diff().tolist()
        return zip(self.tokens.split(lengths), self.rows.split(lengths), strict=True)

    @staticmethod
    def join(parts: Sequence["TokenRows"]) -> "TokenRows":
        """The examples of several batches, one after the other."""
        lengths = torch.cat([part.offsets.diff() for part in parts])
        offsets = torch.cat([parts[0].offsets[:1], lengths.cumsum(dim=0)])
        tokens, rows = torch.cat([part.tokens for part in parts]), torch.cat([part.rows for part in parts])
        return TokenRows(offsets, tokens, rows, parts[0].virtual)

    def between(self, start: int, stop: int) -> "TokenRows":
        """The examples `[start, stop)` alone."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - first
        return TokenRows(offsets, self.tokens[first:last], self.rows[first:last], self.virtual)

    def without(self, token_ids: Sequence[int]) -> "TokenRows":
        """The rows of all other tokens."""
        if len(token_ids) == 0:
            return self
        return self._only(~torch.isin(self.tokens, torch.as_tensor(list(token_ids))))

    def within(self, token_ids: range) -> "TokenRows":
        """The rows of the tokens of a range, in steps of 1."""
        return self._only((self.tokens >= token_ids.start) & (self.tokens < token_ids.stop))

    def _only(self, kept: Tensor) -> "TokenRows":
        counts = torch.cat([torch.zeros(1, dtype=torch.long), kept.long().cumsum(dim=0)])
        return TokenRows(counts[self.offsets], self.tokens[kept], self.rows[kept], self.virtual)

    def on_cpu(self) -> "TokenRows":
        """The same rows in main memory, as float32 (float64 stays)."""
        dtype = torch.float64 if self.rows.dtype == torch.float64 else torch.float32
        return TokenRows(self.offsets.cpu(), self.tokens.cpu(), self.rows.detach().to("cpu", dtype), self.virtual)

    def with_more(self, first: int, more: Tensor) -> "TokenRows":
        """
        Further rows behind those of each example.

        Args:
            first (`int`): The number of the first one, beyond all tokens.
            more (`torch.Tensor` of shape `(num_examples, num_more, width)`): The rows.
        """
        num_examples, num_more = more.shape[:2]
        lengths = self.offsets.diff() + num_more
        offsets = torch.cat([self.offsets[:1], lengths.cumsum(dim=0)])
        steps = torch.arange(num_more, device=more.device)
        last = (offsets[1:, None] - num_more + steps).flatten()
        is_more = torch.zeros(len(self.rows) + len(last), dtype=torch.bool, device=more.device)
        is_more[last] = True
        tokens = self.tokens.new_empty(len(is_more))
        rows = more.new_empty(len(is_more), more.shape[2])
        tokens[~is_more], tokens[is_more] = self.tokens, (first + steps).repeat(num_examples)
        rows[is_more] = more.flatten(end_dim=1)
        if len(self.rows):  # else they may be of another width
            rows[~is_more] = self.rows.to(rows.dtype)
        return TokenRows(offsets, tokens, rows, self.virtual)

    def squared_norms(self) -> Tensor:
        """Self-influence of each example, `(num_examples,)`."""
        squares = self.rows.double().square().sum(dim=1)
        owners = torch.arange(len(self)).repeat_interleave(self.offsets.diff())
        return torch.zeros(len(self), dtype=torch.float64).index_add_(0, owners, squares)

    def check(self, *, width: int, vocabulary_size: int) -> None:
        """
        Check that these can be rows of an index.

        Raises:
            ValueError: Rows of another width, tokens out of the vocabulary, or tokens of an example not distinct and
                ascending.
        """
        if self.rows.ndim != 2 or self.rows.shape[1] != width:
            raise ValueError(
                f"Gradient rows must have the width of the index, {width}, but their shape is {tuple(self.rows.shape)}. They"
                " are of another model."
            )
        tokens = self.tokens
        if len(tokens) == 0:
            return
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary_size:
            raise ValueError(
                f"Tokens must be in [0, {vocabulary_size}), the vocabulary of the index, but they go from"
                f" {int(tokens.min())} to {int(tokens.max())}. Use the tokenizer that the index was made with."
            )
        ascending = tokens.diff() > 0
        borders = self.offsets[1:-1]
        ascending[borders[(borders > 0) & (borders < len(tokens))] - 1] = True
        if not ascending.all():
            raise ValueError(
                "The tokens of an example must be distinct and ascending, but they are not. Merge repeated tokens with"
                " `token_gradient_rows` first."
            )


def join_groups(parts: Sequence[TokenRows], examples: Tensor) -> TokenRows:
    """
    The rows of a batch that was run in groups, in its own order.

    Args:
        parts (`Sequence[TokenRows]`): Of each group.
        examples (`torch.Tensor` of shape `(batch_size,)`): Which of the batch they belong to, group after group.
    """
    if len(parts) == 1:
        return parts[0]
    lengths = torch.cat([part.offsets.diff() for part in parts])
    order = examples.repeat_interleave(lengths).argsort(stable=True)
    offsets = torch.cat([parts[0].offsets[:1], lengths[examples.argsort()].cumsum(dim=0)])
    tokens, rows = torch.cat([part.tokens for part in parts]), torch.cat([part.rows for part in parts])
    return TokenRows(offsets, tokens[order], rows[order], parts[0].virtual)


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


@dataclass
class PositionGradients:
    """
    What one backward leaves, position by position.

    Attributes:
        token_ids (`torch.Tensor` of shape `(B, T)`): The tokens that were looked up.
        counted (`torch.Tensor` of shape `(B, T)` and dtype bool): False at padding.
        input_grads (`torch.Tensor` of shape `(B, T, D)`): Gradient of each lookup.
        hidden (`torch.Tensor` of shape `(B, S, D)`): What the tied output layer read; S = 0 if it does not count.
        logit_grads (`torch.Tensor` of shape `(B, S, V)`): Gradient of what it returned.
        scales (`torch.Tensor` of shape `(B,)`): Factor from the differentiated loss to the example's own.
        dropped (`torch.Tensor`, *optional*): Token ids that get no row.
        own_only (`bool`):
            Whether only the tokens that were looked up at a counted position get a row, their output part included, or
            every token of the vocabulary that the output part moves. No matter without an output part.
        layer_rows (`torch.Tensor` of shape `(B, K, D)`, *optional*): Those of chosen layers, see [`LayerUses.rows`].
        first_layer_row (`int`): The number of their first one.
    """

    token_ids: Tensor
    counted: Tensor
    input_grads: Tensor
    hidden: Tensor
    logit_grads: Tensor
    scales: Tensor
    dropped: Tensor | None = None
    own_only: bool = False
    layer_rows: Tensor | None = None
    first_layer_row: int = 0

    def __post_init__(self) -> None:
        if self.dropped is not None and self.dropped.numel():
            self.counted = self.counted & ~torch.isin(self.token_ids, self.dropped)

    def sizes(self) -> Tensor:
        """About how long the gradient of each example is, `(B,)`."""
        squares = self.input_grads.flatten(start_dim=1).norm(dim=1).square()
        if self.layer_rows is not None:
            squares = squares + self.layer_rows.flatten(start_dim=1).norm(dim=1).square()
        return squares.sqrt() * self.scales

    def example_rows(self, example: int) -> tuple[Tensor, Tensor]:
        """All rows of one example, of its words and of chosen layers, `tokens (W,)` and `rows (W, D)`."""
        tokens, rows = self._word_rows(example)
        if self.layer_rows is None:
            return tokens, rows
        more = self.layer_rows[example] * self.scales[example]
        numbers = self.first_layer_row + torch.arange(len(more), device=tokens.device)
        return torch.cat([tokens, numbers]), torch.cat([rows.to(more.dtype), more]) if len(rows) else more

    def _word_rows(self, example: int) -> tuple[Tensor, Tensor]:
        """
        The rows of one example's words, `tokens (W,)` and `rows (W, D)`: `sum_t dloss/doutput[t]` over the counted positions `t`
        that hold the token, plus, where the output layer is tied and counts, `sum_s dloss/dlogit[s, w] * hidden[s]`.
        """
        scale = self.scales[example]
        tokens, rows = token_gradient_rows(self.token_ids[example], self.input_grads[example], self.counted[example])
        if self.hidden.shape[1] == 0:
            return tokens, rows * scale
        logit_grads = self.logit_grads[example]
        if self.own_only:
            logit_grads = logit_grads[:, tokens]  # (S, W): the vocabulary times the width is never in memory
        predicting = (logit_grads != 0).any(dim=1)  # exactly 0 at positions without a label
        hidden = self.hidden[example, predicting].to(rows.dtype)
        output_rows = logit_grads[predicting].T.to(rows.dtype) @ hidden  # (V or W, S) @ (S, D)
        if self.own_only:
            return tokens, (rows + output_rows) * scale
        dense = output_rows.index_add_(0, tokens, rows)  # (V, D)
        if self.dropped is not None:
            dense[self.dropped] = 0
        tokens = (dense != 0).any(dim=1).nonzero().squeeze(1)
        return tokens, dense[tokens] * scale

    def merge(self, *, top_k: int | None, top_k_unit: str, virtual: bool) -> TokenRows:
        """The rows of all examples: the largest `top_k` of words, and all of layers."""
        words = self._merge_words(top_k=top_k, top_k_unit=top_k_unit, virtual=virtual)
        if self.layer_rows is None:
            return words
        return words.with_more(self.first_layer_row, self.layer_rows * self.scales[:, None, None])

    def _merge_words(self, *, top_k: int | None, top_k_unit: str, virtual: bool) -> TokenRows:
        """The rows of words; with an output part example by example, as each may be dense in the vocabulary."""
        if self.hidden.shape[1] == 0:
            positions = (self.token_ids, self.input_grads)
            if top_k is None:
                offsets, tokens, rows = batch_token_gradient_rows(*positions, self.counted)
            else:
                offsets, tokens, rows = batch_top_k_rows(*positions, top_k, unit=top_k_unit, mask=self.counted)
            rows *= self.scales.repeat_interleave(offsets.diff())[:, None]
            return TokenRows(offsets, tokens, rows, virtual)
        examples = []
        for example in range(len(self.scales)):
            tokens, rows = self._word_rows(example)
            examples.append((tokens, rows) if top_k is None else top_k_rows(tokens, rows, top_k, unit=top_k_unit))
        lengths = torch.tensor([0] + [len(tokens) for tokens, _ in examples], device=self.scales.device)
        tokens, rows = (torch.cat(parts) for parts in zip(*examples, strict=True))
        return TokenRows(lengths.cumsum(dim=0), tokens, rows, virtual)
