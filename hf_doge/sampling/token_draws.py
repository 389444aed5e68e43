"""
Draws whose shares are of tokens: of the examples of all domains, in the order in which each domain gives them, always the one
whose tokens are due next.

If domain j has weight `w_j` and its example r begins after `S_j(r)` of the domain's tokens and has `l` of them, its middle is due
when `(S_j(r) + l / 2) / w_j` tokens of all domains have been drawn (the virtual time of fair queueing). Ordered by that, the tokens
drawn of a domain differ from `w_j` times all tokens by about its longest example. Each domain's examples are sorted by it, so any
draw is found by bisection, without those before it.

Shapes: K = domains, R = rows of the data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_doge.checks import show
from hf_doge.sampling.domains import DomainIndex
from hf_doge.sampling.permutation import pass_keys, permute

_NEAR = 2**14  # draws that are merged rather than searched for
_KEPT = 3  # passes of a domain whose tokens stay added up


class RowTokens:
    """
    Tokens of every row, in the order in which each domain gives its rows, pass by pass. Takes some 16 bytes for each row of
    the passes at hand.

    Args:
        domains ([`DomainIndex`]): Which row is of which domain.
        lengths (sequence of `int`, of length R): Tokens of each row of the data set, `>= 0`.
        domain_keys (`np.ndarray` of `uint64` and shape `(num_domains,)`): Keys of the orders, see [`pass_keys`].

    Attributes:
        totals (`np.ndarray` of `int64` and shape `(num_domains,)`): Tokens of each domain in one pass.

    Raises:
        `ValueError`: if there is not one whole number for each row.
    """

    def __init__(self, domains: DomainIndex, lengths: Sequence[int] | np.ndarray, domain_keys: np.ndarray) -> None:
        self._domains = domains
        self._keys = domain_keys
        self._lengths = check_lengths(lengths, domains.num_rows)
        self._passes: dict[int, dict[int, np.ndarray]] = {}
        sizes = domains.sizes
        self.totals = np.array([self._in_order(d, np.arange(sizes[d])).sum() for d in range(len(sizes))])

    @property
    def are_equal(self) -> bool:
        """Whether all rows have as many tokens, so that shares of tokens are shares of examples."""
        return bool(np.ptp(self._lengths) == 0)

    @property
    def means(self) -> np.ndarray:
        """Mean tokens of a row of each domain, `float64` of shape `(num_domains,)`; 0 for a domain without tokens."""
        return self.totals / np.maximum(self._domains.sizes, 1)

    def to_examples(self, shares: np.ndarray) -> np.ndarray:
        """The shares of examples whose tokens have these shares on average."""
        ratios = np.divide(shares, self.means, out=np.zeros_like(shares), where=shares > 0)
        return ratios / ratios.sum()

    def from_examples(self, shares: np.ndarray) -> np.ndarray:
        """The shares of tokens that examples in these shares have on average."""
        return shares * self.means / (shares * self.means).sum()

    def content(self) -> np.ndarray:
        """The tokens of all rows, for a digest."""
        return self._lengths

    def before(self, counts: np.ndarray) -> np.ndarray:
        """Tokens of the first `counts` examples of each domain, both `int64` of shape `(num_domains,)`."""
        found = np.zeros(len(counts), np.int64)
        for domain in np.flatnonzero(counts).tolist():
            number, position = divmod(int(counts[domain]), int(self._domains.sizes[domain]))
            found[domain] = number * self.totals[domain] + (self.ends(domain, number)[position - 1] if position else 0)
        return found

    def ends(self, domain: int, number: int) -> np.ndarray:
        """Tokens of a pass up to the end of each of its examples, `int64` of shape `(size of the domain,)`."""
        kept = self._passes.setdefault(int(domain), {})
        if number not in kept:
            while len(kept) >= _KEPT:
                del kept[next(iter(kept))]
            size = int(self._domains.sizes[domain])
            key = pass_keys(self._keys[domain : domain + 1], np.array([number]))
            order = permute(np.arange(size), np.full(size, size), np.repeat(key, size))
            kept[number] = np.cumsum(self._in_order(domain, order))
        return kept[number]

    def _in_order(self, domain: int, positions: np.ndarray) -> np.ndarray:
        rows = self._domains.rows(np.full(len(positions), domain), positions)
        return self._lengths[rows].astype(np.int64)

    def sizes(self) -> np.ndarray:
        """Rows of each domain."""
        return self._domains.sizes


class TokenDraws:
    """
    Draws from fixed shares of tokens, with random access.

    Args:
        shares (`np.ndarray` of shape `(num_domains,)`): Shares of the tokens, `>= 0`, summing to 1.
        tokens ([`RowTokens`]): Of the data.
        counts (`np.ndarray` of shape `(num_domains,)`): Examples that each domain gave before the first of these draws.
        lag (`np.ndarray` of shape `(num_domains,)`): Tokens that each domain is owed from before.
    """

    def __init__(self, shares: np.ndarray, tokens: RowTokens, *, counts: np.ndarray, lag: np.ndarray) -> None:
        self._shares = shares
        self._tokens = tokens
        self._first = counts
        self._offsets = -tokens.before(counts) - lag
        self._drawn = np.flatnonzero(shares)
        self._known: dict[int, np.ndarray] = {0: np.zeros(len(shares), np.int64)}  # counts at some draws

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each draw in `[start, stop)`, and how often that domain was drawn before it."""
        counts = self.counts(start)
        domains, ranks = self._merge(counts, stop - start)
        self._keep(stop, counts + np.bincount(domains, minlength=len(counts)))
        return domains, ranks

    def counts(self, draw: int) -> np.ndarray:
        """How often each domain is drawn before `draw`: `int64` of shape `(num_domains,)`."""
        if draw not in self._known:
            near = max((known for known in self._known if known <= draw), default=0)
            counts = self._known[near] if draw - near <= _NEAR else self._search(draw)
            domains, _ = self._merge(counts, draw - int(counts.sum()))
            self._keep(draw, counts + np.bincount(domains, minlength=len(counts)))
        return self._known[draw].copy()

    def _keep(self, draw: int, counts: np.ndarray) -> None:
        self._known.pop(draw, None)
        while len(self._known) > 8:
            del self._known[next(known for known in self._known if known)]
        self._known[draw] = counts

    def _dues(self, domain: int, number: int) -> np.ndarray:
        """When each example of a pass is due, in tokens of all domains, ascending."""
        ends = self._tokens.ends(domain, number)
        middles = (ends + np.append(0, ends[:-1])) / 2
        return (middles + (number * self._tokens.totals[domain] + self._offsets[domain])) / self._shares[domain]

    def _counts_due(self, time: float) -> np.ndarray:
        """How many examples of each domain are due up to a time."""
        counts = np.zeros(len(self._shares), np.int64)
        for domain in self._drawn.tolist():
            total, size = int(self._tokens.totals[domain]), int(self._tokens.sizes()[domain])
            number = max(int((time * self._shares[domain] - self._offsets[domain]) // total), 0)
            while number > 0 and self._dues(domain, number)[0] > time:  # where rounding led too far
                number -= 1
            due = int(np.searchsorted(self._dues(domain, number), time, side="right"))
            while due == size:
                number += 1
                due = int(np.searchsorted(self._dues(domain, number), time, side="right"))
            counts[domain] = max(number * size + due - int(self._first[domain]), 0)
        return counts

    def _search(self, draw: int) -> np.ndarray:
        """Counts of a few draws less than `draw`, all of them due before any other."""
        rate = (self._shares[self._drawn] / self._tokens.means[self._drawn]).sum()  # examples for a token
        low, high = 0.0, 2 * draw / rate + 1
        while self._counts_due(high).sum() <= draw:
            low, high = high, 2 * high
        found = self._counts_due(low)
        if found.sum() > draw:
            return np.zeros_like(found)
        for _ in range(200):
            if draw - found.sum() <= _NEAR // 4:
                break
            middle = (low + high) / 2
            if middle in (low, high):
                break
            counts = self._counts_due(middle)
            if counts.sum() <= draw:
                low, found = middle, counts
            else:
                high = middle
        return found

    def _merge(self, counts: np.ndarray, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
        """The draws that follow the given counts: domains, and their ranks."""
        if num_draws <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        rates = self._shares[self._drawn] / self._tokens.means[self._drawn]
        wanted = np.ceil(1.5 * num_draws * rates / rates.sum()).astype(np.int64) + 8
        while True:
            parts = [self._dues_from(d, counts[d], n) for d, n in zip(self._drawn, wanted, strict=True)]
            dues = np.concatenate(parts)
            owners = np.repeat(self._drawn, wanted)
            order = np.lexsort((owners, dues))[:num_draws]
            lacking = np.array([part[-1] for part in parts]) <= dues[order[-1]]
            if len(order) == num_draws and not lacking.any():
                break
            wanted[lacking] *= 2
            if len(order) < num_draws:
                wanted *= 2
        ranks = np.concatenate([counts[d] + np.arange(n) for d, n in zip(self._drawn, wanted, strict=True)])
        return owners[order], ranks[order]

    def _dues_from(self, domain: Any, count: int, num_examples: int) -> np.ndarray:
        """When the examples of a domain from the given one of these draws on are due."""
        first, size = int(self._first[domain] + count), int(self._tokens.sizes()[domain])
        number, position = divmod(first, size)
        parts, missing = [], int(num_examples)
        while missing > 0:
            part = self._dues(int(domain), number)[position : position + missing]
            parts.append(part)
            missing -= len(part)
            number, position = number + 1, 0
        return np.concatenate(parts)


def check_lengths(lengths: Any, num_rows: int) -> np.ndarray:
    """
    Tokens of each row as an array.

    Raises:
        `ValueError`: if there is not one whole number of at least 0 for each row.
    """
    found = np.asarray(lengths)
    is_whole = found.ndim == 1 and found.dtype.kind in "iu"
    if not is_whole or len(found) != num_rows or (len(found) and found.min() < 0):
        raise ValueError(
            f"`lengths` must be one whole number of tokens, at least 0, for each of the {num_rows} rows, but got {show(lengths)}."
        )
    return found


def refuse_tokenless_domains(shares: np.ndarray, totals: np.ndarray, names: Sequence[str]) -> None:
    """Raise if a domain has a share of the tokens but no token."""
    empty = [name for name, share, total in zip(names, shares, totals, strict=True) if share > 0 and total == 0]
    if empty:
        raise ValueError(f"Domains {empty} have a share of the tokens, but no row of theirs has a token. Drop them.")
