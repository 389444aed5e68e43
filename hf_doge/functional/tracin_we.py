"""
TracIn on word embeddings (TracIn-WE), https://huggingface.co/papers/2202.11844.

Shapes: T = token positions, W = distinct tokens of one example, D = embedding width, C = classes or vocabulary,
B = examples. An example is a pair `tokens (W,), rows (W, D)`: its distinct token ids in ascending order, and for each the
gradient of the example's loss with respect to that token's row of the embedding matrix. All other rows are zero.

    tokens, rows = token_gradient_rows(token_ids, output_grads)         # sum of g_t over the positions holding w
    score        = tracin_we_score(tokens, rows, tokens_q, rows_q)      # sum over shared w of <row_w, row'_w>
    score        = sum_checkpoints(scores, learning_rates)              # sum over checkpoints of eta_c * score_c

**Sign.** A proponent has a *positive* score: a gradient step on it lowers the query's loss. This is TracIn's own sign.
The paper writes a leading minus, and the authors' notebook computes the positive product but prints its lowest end as
"proponents"; we follow neither.

What we add to the paper: cosine and Adam scaling of the scores, top-k counted by token, TracIn on a tied output matrix,
and everything about synonyms that [`synonym_similarity`] lists as ours.
"""

import torch
from torch import Tensor

from hf_doge.checks import check_choice, check_count, check_number, check_shape

TOP_K_UNITS = ("position", "token")


def token_gradient_rows(token_ids: Tensor, output_grads: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Gradient of the embedding matrix, restricted to the rows that one example touches.

    The row of a token is the sum of the embedding-output gradients over all positions that hold it, so how often a
    token occurs enters only through that sum.

    Args:
        token_ids (`torch.Tensor` of shape `(num_positions,)`): The token at each position, `>= 0`.
        output_grads (`torch.Tensor` of shape `(num_positions, width)`):
            Gradient of the loss with respect to the embedding output at each position.
        mask (`torch.Tensor` of shape `(num_positions,)`, *optional*): False or 0 at positions that do not count.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `tokens (W,)`, ascending and distinct, and `rows (W, width)`.
    """
    mask = None if mask is None else mask[None]
    _, tokens, rows = batch_token_gradient_rows(token_ids[None], output_grads[None], mask)
    return tokens, rows


def batch_token_gradient_rows(
    token_ids: Tensor, output_grads: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    [`token_gradient_rows`] of every example of a batch at once. Half-precision gradients are summed in float32.

    Args:
        token_ids (`torch.Tensor` of shape `(batch_size, num_positions)`): The token at each position, `>= 0`.
        output_grads (`torch.Tensor` of shape `(batch_size, num_positions, width)`): Embedding-output gradients.
        mask (`torch.Tensor` of shape `(batch_size, num_positions)`, *optional*): False or 0 where padding stands.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: `offsets (batch_size + 1,)`, `tokens` and `rows`; example `i`
        owns `tokens[offsets[i]:offsets[i + 1]]` and the rows beside them.
    """
    if output_grads.shape[:2] != token_ids.shape:
        raise ValueError(
            f"`output_grads` must have one row per position of `token_ids` {tuple(token_ids.shape)}, but its shape is "
            f"{tuple(output_grads.shape)}. Take it from the output of the embedding that read these ids."
        )
    span = int(token_ids.max()) + 1 if token_ids.numel() else 1
    first_keys = torch.arange(len(token_ids) + 1, device=token_ids.device) * span
    keys = (first_keys[:-1, None] + token_ids).flatten()  # one number per (example, token), in CSR order
    grads = output_grads.flatten(end_dim=1)
    if mask is not None:
        counted = mask.flatten().nonzero().squeeze(1)
        keys, grads = keys[counted], grads[counted]
    grads = grads.float() if grads.dtype.itemsize < 4 else grads
    keys, slots = torch.unique(keys, return_inverse=True)
    rows = grads.new_zeros(len(keys), grads.shape[1]).index_add_(0, slots, grads)
    return torch.searchsorted(keys, first_keys), keys % span, rows


def top_k_rows(
    token_ids: Tensor, output_grads: Tensor, k: int, *, unit: str = "position", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    TracIn-WE-Topk: [`token_gradient_rows`] of the `k` tokens with the largest gradient norm, the others dropped.

    What is kept depends on this example alone, so the score of two truncated examples is still an inner product. With
    several checkpoints each is truncated by its own norms. Of equal norms the earlier position (or lower id) is kept.

    Args:
        token_ids (`torch.Tensor` of shape `(num_positions,)`): The token at each position.
        output_grads (`torch.Tensor` of shape `(num_positions, width)`): Embedding-output gradients.
        k (`int`): How many to keep, `>= 1`; all when there are fewer.
        unit (`str`):
            `"position"` truncates positions and then merges what is left, as the authors' code does: at most `k`
            tokens, and a kept token's row may miss some of its positions. `"token"` (ours) merges first and keeps `k`
            whole rows.
        mask (`torch.Tensor` of shape `(num_positions,)`, *optional*): False or 0 at positions that do not count.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `tokens (W,)`, ascending and distinct, and `rows (W, width)`, `W <= k`.
    """
    mask = None if mask is None else mask[None]
    _, tokens, rows = batch_top_k_rows(token_ids[None], output_grads[None], k, unit=unit, mask=mask)
    return tokens, rows


def batch_top_k_rows(
    token_ids: Tensor, output_grads: Tensor, k: int, *, unit: str = "position", mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[`top_k_rows`] of every example of a batch; shapes and returned values as in [`batch_token_gradient_rows`]."""
    check_top_k(k, unit)
    if unit == "position":
        norms = _norms(output_grads)
        norms = norms if mask is None else norms.masked_fill(~mask.bool(), -1.0)
        largest = norms.argsort(dim=1, descending=True, stable=True)[:, :k]
        kept = torch.zeros_like(token_ids, dtype=torch.bool).scatter_(1, largest, True)
        return batch_token_gradient_rows(token_ids, output_grads, kept if mask is None else kept & mask.bool())
    offsets, tokens, rows = batch_token_gradient_rows(token_ids, output_grads, mask)
    lengths = offsets.diff()
    examples = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths)
    order = _norms(rows).argsort(descending=True, stable=True)
    order = order[examples[order].argsort(stable=True)]  # by example, then by falling norm
    ranks = torch.arange(len(order), device=offsets.device) - offsets[examples]
    kept = order[ranks < k].sort().values
    return torch.cat([offsets[:1], lengths.clamp(max=k).cumsum(dim=0)]), tokens[kept], rows[kept]


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32 if rows.dtype.itemsize < 4 else None)


def check_top_k(k: int, unit: str) -> None:
    """Raise a `ValueError` unless `k` and `unit` are values that [`top_k_rows`] knows."""
    check_choice("unit", unit, TOP_K_UNITS)
    check_count("k", k)


def tracin_we_token_scores(
    tokens_a: Tensor, rows_a: Tensor, tokens_b: Tensor, rows_b: Tensor
) -> tuple[Tensor, Tensor]:
    """
    The paper's word gradient similarities: the part of the score that each shared token carries.

    `part_w = <dloss(a)/dTheta_w, dloss(b)/dTheta_w>`. Tokens of only one example carry exactly nothing. This is the
    definition; [`IndexReader.word_scores`] does it for the hits of a search.

    Args:
        tokens_a, tokens_b (`torch.Tensor` of shape `(W,)`): Distinct token ids of each example, ascending.
        rows_a, rows_b (`torch.Tensor` of shape `(W, width)`): Their gradient rows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the shared tokens, ascending, and their parts, which add up to
        [`tracin_we_score`].
    """
    _check_merged(tokens_a)
    _check_merged(tokens_b)
    if tokens_a.numel() == 0 or tokens_b.numel() == 0:
        return tokens_a[:0], rows_a.new_zeros(0)
    slots = torch.searchsorted(tokens_b, tokens_a).clamp(max=len(tokens_b) - 1)
    shared = tokens_b[slots] == tokens_a
    return tokens_a[shared], (rows_a[shared] * rows_b[slots[shared]]).sum(dim=-1)


def _check_merged(tokens: Tensor) -> None:
    if (tokens[1:] <= tokens[:-1]).any():
        raise ValueError(
            "The tokens of an example must be distinct and ascending, but they are not. Merge repeated tokens with "
            "`token_gradient_rows` first."
        )


def tracin_we_score(tokens_a: Tensor, rows_a: Tensor, tokens_b: Tensor, rows_b: Tensor) -> Tensor:
    """
    TracIn-WE of two examples at one checkpoint, learning rate left out: the sum of [`tracin_we_token_scores`].

    Equals the inner product of the two dense gradients of the embedding matrix. Large and positive: each example is a
    proponent of the other. Returns a `torch.Tensor` of shape `()`.

    This is the definition; [`IndexReader.scores`] does it for all examples of an index.
    """
    return tracin_we_token_scores(tokens_a, rows_a, tokens_b, rows_b)[1].sum()


def self_influence(rows: Tensor) -> Tensor:
    """
    Score of an example with itself, the squared norm of its embedding gradient, `>= 0`.

    This is the definition; [`IndexReader.self_influence`] does it for all examples of an index.

    Args:
        rows (`torch.Tensor` of shape `(W, width)`):
            Merged rows. Unmerged ones give another number as soon as a token repeats.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return rows.square().sum()


def sum_checkpoints(scores: Tensor, learning_rates: Tensor) -> Tensor:
    """
    TracInCP: `sum_c eta_c * score_c`. This is the definition; [`QueryScorer.scores`] adds checkpoint by checkpoint.

    Args:
        scores (`torch.Tensor` of shape `(num_checkpoints, ...)`): Scores, or parts of scores, at each checkpoint.
        learning_rates (`torch.Tensor` of shape `(num_checkpoints,)`):
            Learning rate in force at each, `>= 0`. The authors' notebook has 1 for all.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    check_shape("learning_rates", learning_rates, (len(scores),))
    return torch.tensordot(learning_rates.to(scores.dtype), scores, dims=1)


def cosine_scores(scores: Tensor, self_a: Tensor, self_b: Tensor) -> Tensor:
    """
    Scores freed from the length of both gradients: `score / sqrt(self_a * self_b)`, in [-1, 1]. Not in the paper.

    This is the definition; [`QueryScorer`] does it for all examples of an index.

    Args:
        scores (`torch.Tensor` of shape `(num_a, num_b)` or `()`): Scores at one checkpoint.
        self_a (`torch.Tensor` of shape `(num_a,)` or `()`): Self-influence of the examples along the first axis.
        self_b (`torch.Tensor` of shape `(num_b,)` or `()`): Same, along the second.

    Returns:
        `torch.Tensor` of the shape of `scores`; 0 where a gradient is zero, which has no direction.
    """
    norms = self_a.sqrt()[..., None] * self_b.sqrt() if scores.ndim == 2 else (self_a * self_b).sqrt()
    return torch.where(norms > 0, scores / norms, torch.zeros_like(scores))


def scale_by_second_moment(rows: Tensor, second_moments: Tensor, *, eps: float = 1e-8, sides: str = "both") -> Tensor:
    """
    Measure gradients in Adam's metric, so that `<row, row'>` becomes `<row, row' / (sqrt(v) + eps)>`. Not in the paper.

    Only the second moment is used: the first would make every row of the vocabulary non-zero. A rare token has a tiny
    `v` and so a very large score; a larger `eps`, or one mean `v` per row (shape `(W, 1)`), damps it.

    Args:
        rows (`torch.Tensor` of shape `(W, width)`): Merged gradient rows.
        second_moments (`torch.Tensor` of shape `(W, width)` or `(W, 1)`):
            Adam's bias-corrected `exp_avg_sq` for the same tokens, `>= 0`.
        eps (`float`): Adam's `eps`, `> 0`.
        sides (`str`):
            `"both"` divides by the square root, for rows of training examples and queries alike; `"one"` divides by
            the whole, for one of the two. Both ways give the same score.

    Returns:
        `torch.Tensor` of shape `(W, width)`.
    """
    check_choice("sides", sides, ("both", "one"))
    check_number("eps", eps, above=0)
    metric = second_moments.sqrt() + eps
    return rows / (metric.sqrt() if sides == "both" else metric)


def cancellation_ratio(example_grads: Tensor, net_update: Tensor | None = None) -> Tensor:
    """
    How much the examples undo each other's updates of a weight: `C(W) = sum_i ||dW_i|| / ||dW||`.

    Two forms. In one pass, with gradients at one checkpoint, the net is their sum: then `C >= 1`, 1 exactly when all
    point the same way, sqrt(N) for N orthogonal ones of equal norm; it has no bound near a stationary point. Over a
    stretch of training the net is the change of the weight, `net_update`, with `example_grads` times the learning rate
    above it. C grows with N and falls with sparsity: compare layers on the same examples only.

    Args:
        example_grads (`torch.Tensor` of shape `(num_examples, ...)`):
            Gradient (or update) of the weight by each example alone.
        net_update (`torch.Tensor` of shape `(...)`, *optional*): `W_after - W_before`.

    Returns:
        `torch.Tensor` of shape `()`: infinity when the net is zero, NaN when every example's gradient is zero too.
    """
    net = example_grads.sum(dim=0) if net_update is None else net_update
    return example_grads.flatten(start_dim=1).norm(dim=1).sum() / net.norm()


def last_layer_score(
    inputs_a: Tensor, output_grads_a: Tensor, inputs_b: Tensor, output_grads_b: Tensor, *, bias: bool = False
) -> Tensor:
    """
    TracIn-Last: the inner product of two gradients of a linear layer, from their factors, without forming them.

    `sum_{t,s} (a_t . a'_s) (d_t . d'_s)`; with its bias `(a_t . a'_s + 1) (d_t . d'_s)`, where the 1 says nothing about
    the inputs. A classifier has one position, a language model's head one per predicted token. This is the definition;
    [`TracInLastScorer`] does it for all pairs of examples of a classifier.

    Args:
        inputs_a, inputs_b (`torch.Tensor` of shape `(num_positions, width)` or `(width,)`): What the layer read.
        output_grads_a, output_grads_b (`torch.Tensor` of shape `(num_positions, num_classes)` or `(num_classes,)`):
            Gradient of the loss with respect to what it returned; for cross-entropy `softmax - onehot`.
        bias (`bool`): Whether the layer's bias counts too.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    similarities = torch.atleast_2d(inputs_a) @ torch.atleast_2d(inputs_b).T  # (T, D) @ (D, S) -> (T, S)
    saliencies = torch.atleast_2d(output_grads_a) @ torch.atleast_2d(output_grads_b).T  # (T, C) @ (C, S) -> (T, S)
    return ((similarities + 1 if bias else similarities) * saliencies).sum()


def tied_score(
    input_a: tuple[Tensor, Tensor],
    output_a: tuple[Tensor, Tensor],
    input_b: tuple[Tensor, Tensor],
    output_b: tuple[Tensor, Tensor],
) -> Tensor:
    """
    TracIn on an embedding matrix that is also the output matrix, without its dense gradient. Not in the paper.

    The gradient is an input part, sparse in tokens, plus an output part, dense in the vocabulary but of low rank. The
    score is the sum of [`tracin_we_score`], [`last_layer_score`] and the two cross terms. This is the definition;
    [`EmbeddingGradientRecorder`] with `tied="full"` records rows whose [`tracin_we_score`] is the same.

    Args:
        input_a, input_b (`tuple[torch.Tensor, torch.Tensor]`): `tokens (W,)` and `rows (W, width)` of the input part.
        output_a, output_b (`tuple[torch.Tensor, torch.Tensor]`):
            What the output matrix read, `(num_positions, width)`, and the gradient of the loss with respect to the
            logits, `(num_positions, vocabulary_size)`.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    same = tracin_we_score(*input_a, *input_b) + last_layer_score(*output_a, *output_b)
    return same + _cross_score(input_a, output_b) + _cross_score(input_b, output_a)


def _cross_score(inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> Tensor:
    """`sum_w <row_w, sum_s d_{s,w} h_s>`: only the output rows of the input's tokens are formed."""
    (tokens, rows), (hidden, logit_grads) = inputs, outputs
    return (rows * (logit_grads[:, tokens].T @ hidden)).sum()
