"""
Synonym matches of one query with all examples of a checkpoint, pair of tokens by pair of tokens.

[`synonym_similarity`] goes through the pairs of two examples from the highest cosine down. Going through the pairs of the
query's tokens and the whole vocabulary in that order visits those of each example in the same one, so all examples
are matched at once, and none of their token lists is ever put together.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from hf_doge.artifacts.influence.row_map import RowMap

Neighbours = Mapping[int, tuple[np.ndarray, np.ndarray]]  # token -> ids of its synonyms and their cosines


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
    places, words, near = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for position, token in enumerate(tokens.tolist()):
        ids, cosine = neighbours[token]
        held = row_map.offsets[ids + 1] > row_map.offsets[ids]
        kept = held & ~np.isin(ids, tokens) & ~np.isin(ids, excluded)
        places.append(np.full(int(kept.sum()), position))
        words.append(ids[kept])
        near.append(cosine[kept])
    positions, others, cosines = np.concatenate(places), np.concatenate(words), np.concatenate(near)
    order = np.lexsort((others, positions, -cosines))
    return zip(positions[order].tolist(), others[order].tolist(), strict=True)
