"""
Exact scores of queries over the rows of one checkpoint, token by token, and the synonyms that they match.

[`synonym_similarity`] goes through the pairs of two examples from the highest cosine down. Going through the pairs of the
query's tokens and the whole vocabulary in that order visits those of each example in the same one, so all examples
are matched at once, and none of their token lists is ever put together.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_doge.artifacts.influence.row_map import RowMap

Neighbours = Mapping[int, tuple[np.ndarray, np.ndarray]]  # token -> ids of its synonyms and their cosines

_PIECE_BYTES = 1 << 20  # of float32: what is widened stays in the cache of one core until it is multiplied
_WORTH_A_THREAD = 1 << 21  # multiplications, about a millisecond


@dataclass
class _Postings:
    """All examples that hold one token, and all queries that do."""

    start: int
    end: int
    query_rows: Tensor  # (num_holding, stored_width)
    owners: list[int]


def add_scores(
    scores: np.ndarray,
    row_map: RowMap,
    tokens: np.ndarray,
    rows: Tensor,
    owners: np.ndarray,
    *,
    example_scales: np.ndarray | None = None,
) -> None:
    """
    Add to `scores` the inner products of all pairs of rows of the same token.

    Rows are widened to float32 in small pieces, so products and sums are those of the stored numbers in float32. Work
    is shared by as many threads as torch has, each with a range of examples of its own.

    Args:
        scores (`numpy.ndarray` of shape `(num_queries, num_examples)` and dtype float32): Changed in place.
        row_map (`RowMap`): Rows of the examples.
        tokens (`numpy.ndarray` of shape `(num_entries,)`): Token of each query row.
        rows (`torch.Tensor` of shape `(num_entries, stored_width)` and dtype float32): Gradient of each.
        owners (`numpy.ndarray` of shape `(num_entries,)`): Query of each.
        example_scales (`numpy.ndarray` of shape `(num_examples,)`, *optional*):
            Powers of two that the rows of each example are to be divided by.
    """
    plan = _plan(row_map, tokens, rows, owners)
    work = sum((postings.end - postings.start) * postings.query_rows.numel() for postings in plan)
    num_threads = max(1, min(torch.get_num_threads(), work // _WORTH_A_THREAD, scores.shape[1]))
    borders = np.linspace(0, scores.shape[1], num_threads + 1).astype(np.int64).tolist()

    def add(first: int, last: int) -> None:
        part = scores[:, first:last]
        scales = None if example_scales is None else example_scales[first:last]
        if scales is not None:  # exact, as they are powers of two
            part *= scales
        _add_range(torch.from_numpy(part), row_map, plan, first, last)
        if scales is not None:
            part /= scales

    with _one_thread():
        if num_threads == 1:
            add(0, scores.shape[1])
        else:
            with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(add, borders[:-1], borders[1:]))


def _plan(row_map: RowMap, tokens: np.ndarray, rows: Tensor, owners: np.ndarray) -> list[_Postings]:
    """The postings to go through: one for each distinct token that some example holds."""
    order = np.argsort(tokens, kind="stable")
    distinct, starts = np.unique(tokens[order], return_index=True)
    plan = []
    for token, entries in zip(distinct, np.split(order, starts[1:]), strict=False):
        start, end = row_map.offsets[token : token + 2].tolist()
        if start < end:
            plan.append(_Postings(start, end, rows[torch.from_numpy(entries)], owners[entries].tolist()))
    return plan


def _add_range(scores: Tensor, row_map: RowMap, plan: list[_Postings], first: int, last: int) -> None:
    """Add to `scores` those of examples `[first, last)`."""
    width = row_map.rows.shape[1]
    piece_rows = max(64, _PIECE_BYTES // (4 * width))
    widened = torch.empty(piece_rows, width)
    whole = (first, last) == (0, row_map.num_examples)
    for postings in plan:
        start, end = postings.start, postings.end
        if not whole:  # examples ascend within a token
            examples = row_map.examples[start:end]
            start, end = start + np.searchsorted(examples, [first, last])
        for begin in range(start, end, piece_rows):
            piece = slice(begin, min(begin + piece_rows, end))
            stored = row_map.row_tensor[piece]
            rows = stored if stored.dtype == torch.float32 else widened[: len(stored)].copy_(stored)
            examples = row_map.example_tensor[piece]
            examples = examples - first if first else examples
            if len(postings.owners) == 1:
                products = torch.mv(rows, postings.query_rows[0])[None]
            else:
                products = postings.query_rows @ rows.T  # (Q, D) @ (D, n) -> (Q, n)
            if row_map.scales is not None:
                products /= torch.from_numpy(row_map.scales[piece])
            for owner, values in zip(postings.owners, products, strict=True):
                scores[owner].index_add_(0, examples, values)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Teams of OpenMP threads cost more than pieces of this size, far more on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def synonym_matches(
    row_map: RowMap,
    tokens: np.ndarray,
    neighbours: Neighbours,
    *,
    excluded: np.ndarray,
    only: np.ndarray | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """
    Match the tokens of a query with other tokens of each example, each at most once on either side.

    A token that both hold is matched with itself, by nobody else, and is not told of here.

    Args:
        row_map (`RowMap`): Which examples hold which token.
        tokens (`numpy.ndarray` of shape `(W,)`): Distinct tokens of the query, ascending.
        neighbours (`Mapping`): At least of all `tokens`.
        excluded (`numpy.ndarray`): Tokens of examples that do not count.
        only (`numpy.ndarray`, *optional*): Ids of the examples to match; all if left out.

    Yields:
        `tuple[int, int, numpy.ndarray]`: position of a query token in `tokens`, a token of examples, and the places in the
        map of its rows in those examples where the two are matched; from the highest cosine down.
    """
    wanted = None
    if only is not None:
        wanted = np.zeros(row_map.num_examples, dtype=bool)
        wanted[only] = True
    taken: dict[int, np.ndarray] = {}  # query token -> whether it is matched, (num_examples,)
    free: dict[int, np.ndarray] = {}  # token of examples -> whether its rows are not matched yet
    for position, token in _pairs(row_map, tokens, neighbours, excluded):
        start, end = row_map.offsets[token : token + 2].tolist()
        owners = row_map.examples[start:end]
        if token not in free:
            free[token] = np.ones(end - start, dtype=bool) if wanted is None else wanted[owners]
        if position not in taken:
            taken[position] = np.zeros(row_map.num_examples, dtype=bool)
            itself = slice(*row_map.offsets[tokens[position] : tokens[position] + 2].tolist())
            taken[position][row_map.examples[itself]] = True
        matched = np.flatnonzero(free[token] & ~taken[position][owners])
        if len(matched):
            free[token][matched] = False
            taken[position][owners[matched]] = True
            yield position, token, start + matched


def _pairs(
    row_map: RowMap, tokens: np.ndarray, neighbours: Neighbours, excluded: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Pairs that some example may match, by falling cosine; of equal ones the lower ids."""
    positions, others, cosines = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for position, token in enumerate(tokens.tolist()):
        ids, near = neighbours[token]
        held = row_map.offsets[ids + 1] > row_map.offsets[ids]
        kept = held & ~np.isin(ids, tokens) & ~np.isin(ids, excluded)
        positions.append(np.full(int(kept.sum()), position))
        others.append(ids[kept])
        cosines.append(near[kept])
    positions, others, cosines = (np.concatenate(part) for part in (positions, others, cosines))
    order = np.lexsort((others, positions, -cosines))
    return zip(positions[order].tolist(), others[order].tolist(), strict=True)
