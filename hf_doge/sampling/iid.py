"""
Independent draws: the domain of each draw is drawn from the weights alone, as in the DoGE paper.

To know how often a domain came before draw n without drawing the n before, counts are drawn first and the order after:
the counts of a long segment are multinomial; given them, the counts of its first half are multivariate hypergeometric;
halving goes on down to a leaf, whose order is a shuffle of its counts. That is exactly the law of independent draws.
Every random number comes from a generator keyed by (key, place in the tree), so any draw is reached by one way down.
"""

import numpy as np

from hf_doge.sampling.ordering import ranks_among_equals

_LEAF = 2**12
_SEGMENT = 2**29  # numpy draws hypergeometric counts of populations below 10**9


class IIDDraws:
    """
    Independent draws from fixed weights, with random access in O(num_domains * log(draws)).

    Args:
        weights (`np.ndarray` of shape `(num_domains,)`): Probabilities `>= 0` that sum to 1.
        key (`int`): 64 bits that name the stream.
    """

    def __init__(self, weights: np.ndarray, *, key: int) -> None:
        self._num_domains = len(weights)
        self._drawn = np.flatnonzero(weights)  # others are left out, lest a rounding error draw one
        self._probabilities = weights[self._drawn]
        self._key = key
        self._segment_counts: list[np.ndarray] = []
        # By level of the tree: the node visited last, and the counts of its left half.
        self._path: dict[int, tuple[int, np.ndarray]] = {}
        self._leaf: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each draw in `[start, stop)`, and how often that domain was drawn before it."""
        domains, ranks = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        for leaf in range(start // _LEAF, -(-stop // _LEAF)):
            order, leaf_ranks, before = self._drawn_leaf(leaf)
            first = leaf * _LEAF
            part = slice(max(start - first, 0), min(stop - first, _LEAF))
            at = slice(first + part.start - start, first + part.stop - start)
            domains[at] = self._drawn[order[part]]
            ranks[at] = leaf_ranks[part] + before[order[part]]
        return domains, ranks

    def counts(self, draw: int) -> np.ndarray:
        """How often each domain is drawn before `draw`: `int64` of shape `(num_domains,)`."""
        leaf, rest = divmod(draw, _LEAF)
        drawn, _ = self._counts_around_leaf(leaf)
        if rest:
            order, _, _ = self._drawn_leaf(leaf)
            drawn = drawn + np.bincount(order[:rest], minlength=len(self._drawn))
        counts = np.zeros(self._num_domains, np.int64)
        counts[self._drawn] = drawn
        return counts

    def _generator(self, level: int, node: int) -> np.random.Generator:
        place = level << 56 | node
        return np.random.Generator(np.random.Philox(key=np.array([self._key, place], dtype=np.uint64)))

    def _drawn_leaf(self, leaf: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions in `_drawn` of a leaf's draws, their ranks inside the leaf, and the counts before the leaf."""
        if self._leaf is None or self._leaf[0] != leaf:
            before, inside = self._counts_around_leaf(leaf)
            order = self._generator(255, leaf).permutation(np.repeat(np.arange(len(inside)), inside))
            self._leaf = leaf, order, ranks_among_equals(order, len(inside)), before
        return self._leaf[1:]

    def _counts_around_leaf(self, leaf: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts before a leaf and inside it."""
        segment, place = divmod(leaf, _SEGMENT // _LEAF)
        while len(self._segment_counts) <= segment:
            generator = self._generator(0, len(self._segment_counts))
            self._segment_counts.append(generator.multinomial(_SEGMENT, self._probabilities))
        before = np.zeros(len(self._drawn), np.int64)
        for counts in self._segment_counts[:segment]:
            before += counts
        inside, size, node = self._segment_counts[segment], _SEGMENT, segment
        for level in range(1, (_SEGMENT // _LEAF).bit_length()):
            size //= 2
            if self._path.get(level, (None,))[0] != node:
                left = self._generator(level, node).multivariate_hypergeometric(inside, size, method="marginals")
                self._path[level] = node, left
            left = self._path[level][1]
            if place * _LEAF & size:
                before += left
                inside, node = inside - left, 2 * node + 1
            else:
                inside, node = left, 2 * node
        return before, inside
