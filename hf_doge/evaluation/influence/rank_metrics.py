"""
How alike two rankings are, and how well one finds what it should.

Ranks are a few lines here so that an index can be compared without scipy; a test holds them equal to it.
"""

from collections.abc import Sequence

import numpy as np

from hf_doge.checks import check_count, check_number, show


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, ascending; equal values share the mean of their ranks."""
    values = np.asarray(values)
    ranks = np.empty(values.shape)
    for place in np.ndindex(values.shape[:-1]):
        _, slots, counts = np.unique(values[place], return_inverse=True, return_counts=True)
        ranks[place] = (counts.cumsum() - (counts - 1) / 2)[slots]
    return ranks


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """
    Spearman's rank correlation along the last axis, in [-1, 1]: Pearson's correlation of the ranks, ties averaged.

    Args:
        first, second (`numpy.ndarray` of shape `(..., N)`): Scores of the same N examples, `N >= 2`.

    Returns:
        `numpy.ndarray` of shape `(...)`; NaN where one side has no order, all its values being equal.

    Raises:
        ValueError: if the shapes differ, or a score is no finite number.
    """
    first, second = _check_pair(first, second)
    first, second = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in map(average_ranks, (first, second)))
    norms = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    with np.errstate(invalid="ignore"):
        return (first * second).sum(axis=-1) / norms


def top_overlap(first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """
    Share of the `k` highest of `first` that are among the `k` highest of `second`, in [0, 1].

    Args:
        first, second (`numpy.ndarray` of shape `(..., N)`): Scores of the same N examples. Of equal ones the earlier counts.
        k (`int`): From 1 to N.

    Returns:
        `numpy.ndarray` of shape `(...)`.

    Raises:
        ValueError: if the shapes differ, a score is no finite number, or `k` is out of range.
    """
    first, second = _check_pair(first, second)
    k = check_count("k", k, most=first.shape[-1])
    tops = [np.argsort(-scores, axis=-1, kind="stable")[..., :k] for scores in (first, second)]
    return (tops[0][..., :, None] == tops[1][..., None, :]).any(axis=-1).mean(axis=-1)


def recall_at(suspicion: np.ndarray, positive: np.ndarray, fraction: float) -> float:
    """
    Share of the positives among the `fraction` of examples that are most suspicious, rounded to whole examples.

    Args:
        suspicion (`numpy.ndarray` of shape `(N,)`): High where a positive is expected. Of equal ones the earlier counts.
        positive (`numpy.ndarray` of shape `(N,)` and dtype bool): What should be found.
        fraction (`float`): In (0, 1].

    Raises:
        ValueError: if shapes differ, there is no positive, or `fraction` is out of range.
    """
    suspicion, positive = _check_labels(suspicion, positive)
    fraction = check_number("fraction", fraction, above=0, most=1)
    count = round(fraction * len(suspicion))
    inspected = np.argsort(-suspicion, kind="stable")[:count]
    return float(positive[inspected].sum() / positive.sum())


def area_under_roc(suspicion: np.ndarray, positive: np.ndarray) -> float:
    """
    Probability that a positive is more suspicious than a negative, equal ones counted half: 0.5 by chance.

    Raises:
        ValueError: if shapes differ, or one of the two kinds is missing.
    """
    suspicion, positive = _check_labels(suspicion, positive)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_negative:
        raise ValueError("There must be a negative example too, but all are positive.")
    ranks_sum = average_ranks(suspicion)[positive].sum()
    return float((ranks_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def recall_at_k(scores: np.ndarray, relevant: Sequence[Sequence[int]], k: int) -> np.ndarray:
    """
    Share of each query's relevant training examples, such as planted facts, that are among its `k` highest scores.

    Equal scores at the edge count by the share of them that still fits, as if their order were drawn at random.

    Args:
        scores (`numpy.ndarray` of shape `(Q, N)`): Scores of N training examples for Q queries.
        relevant (`Sequence[Sequence[int]]`): For each query the positions of the examples that should be found.
        k (`int`): From 1 to N.

    Returns:
        `numpy.ndarray` of shape `(Q,)`, in [0, 1].

    Raises:
        ValueError: if shapes differ, a score is no finite number, `k` or a position is out of range, a position is named
            twice, or a query has no relevant example.
    """
    scores, masks = _check_relevant(scores, relevant)
    k = check_count("k", k, most=scores.shape[1])
    edge = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]  # the k-th highest
    above, at_edge = scores > edge, scores == edge
    fits = (k - above.sum(axis=1)) / at_edge.sum(axis=1)
    return ((masks & above).sum(axis=1) + fits * (masks & at_edge).sum(axis=1)) / masks.sum(axis=1)


def average_precision(scores: np.ndarray, relevant: Sequence[Sequence[int]]) -> np.ndarray:
    """
    Average precision of finding each query's relevant training examples by descending score.

        AP = sum over distinct scores s of (recall at s - recall at the next higher one) * precision at s

    Equal scores count as one place, so that their order says nothing (as in scikit-learn); without equal scores this is
    the mean of the precision at each relevant example. Scores that are all equal have the share of relevant examples.

    Args:
        scores (`numpy.ndarray` of shape `(Q, N)`): Scores of N training examples for Q queries.
        relevant (`Sequence[Sequence[int]]`): For each query the positions of the examples that should be found.

    Returns:
        `numpy.ndarray` of shape `(Q,)`, in (0, 1]; its mean over queries is the mean average precision.

    Raises:
        ValueError: if shapes differ, a score is no finite number, a position is out of range or named twice, or a query
            has no relevant example.
    """
    scores, masks = _check_relevant(scores, relevant)
    values = np.empty(len(scores))
    for query, (row, mask) in enumerate(zip(scores, masks, strict=True)):
        order = np.argsort(-row, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(row[order]) != 0, True))  # the last place of each distinct score
        found = mask[order].cumsum()[ends]
        values[query] = (np.diff(found, prepend=0) * found / (ends + 1)).sum() / mask.sum()
    return values


def _check_relevant(scores: np.ndarray, relevant: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and which examples are relevant, both `(Q, N)`."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or 0 in scores.shape or len(relevant) != len(scores):
        raise ValueError(
            f"There must be scores of shape (num_queries, num_examples) and as many lists of relevant examples, but got the "
            f"shape {scores.shape} and {len(relevant)} list(s)."
        )
    if not np.isfinite(scores).all():
        raise ValueError("Scores must be finite numbers, but some are not. Leave out queries without a score.")
    masks = np.zeros(scores.shape, dtype=bool)
    for query, places in enumerate(relevant):
        known = [check_count(f"relevant[{query}]", place, least=0, most=scores.shape[1] - 1) for place in places]
        if not known:
            raise ValueError(f"Each query must have a relevant example, but query {query} has none. Leave it out.")
        if len(set(known)) < len(known):
            raise ValueError(f"`relevant[{query}]` must name each example once, but got {show(known)}.")
        masks[query, known] = True
    return scores, masks


def _check_pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim < 1 or first.shape[-1] < 2:
        raise ValueError(
            f"Both rankings must have one shape (..., N) with at least two examples, but got {first.shape} and "
            f"{second.shape}."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("Scores must be finite numbers, but some are not. Leave out queries without a score.")
    return first, second


def _check_labels(suspicion: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    suspicion, positive = np.asarray(suspicion, dtype=np.float64), np.asarray(positive, dtype=bool)
    if suspicion.shape != positive.shape or suspicion.ndim != 1 or not positive.any():
        raise ValueError(
            f"There must be one suspicion per example and at least one positive, but the shapes are {suspicion.shape} and "
            f"{positive.shape} with {int(positive.sum())} positive(s)."
        )
    if not np.isfinite(suspicion).all():
        raise ValueError("Suspicions must be finite numbers, but some are not.")
    return suspicion, positive
