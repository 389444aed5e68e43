"""
Low-variance draws: which domain each draw takes, so that every domain's count stays within one of its share.

After any number of draws n, a domain of weight w has been drawn `n * w` times, rounded up or down. The rule is that of
quota scheduling: draw j of a domain may not come before its share has passed j - 1 and must come before its share
passes j; among the domains that may be drawn, the one whose deadline is next is. (Drawing the domain that is furthest
behind, the "largest deficit", is the same for two domains but leaves the bound with many.)

Such a schedule is defined draw by draw. To start at draw one billion all the same, the counts at every 65,536th draw
are fixed beforehand, by rounding all shares so that the draws on either side still fit (`round_two_ways`), and the
schedule fills the blocks between. So the cost of a jump is one block, whatever the draw.

Shapes: K = domains, S = slots, i.e. the domains scheduled here (all but the rarest, which share one slot).
"""

import heapq

import numpy as np

from hf_doge.sampling.ordering import ranks_among_equals, stable_order

_BLOCK = 2**16  # draws between two places where the counts are known without drawing
_FIRST_BLOCK = 2**10  # draws before the first of them; short, so that the first index comes at once
_ONE = 2**60  # a whole draw, in the integers that shares are counted in: sums of shares are exact


def make_quota_draws(weights: np.ndarray, *, lag: np.ndarray) -> "RoundRobinDraws | QuotaDraws":
    """The low-variance schedule of these weights: plain turns if all weights that are not zero are equal."""
    if np.ptp(weights[weights > 0]) == 0 and not lag.any():
        return RoundRobinDraws(weights)
    return QuotaDraws(weights, lag=lag)


def balance_lag(lag: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Draws owed that the weights can pay: none to a domain of weight 0, each in (-1, 1), summing to 0."""
    limit, noise = 1 - 2.0**-10, 2.0**-20
    lag = np.where((weights > 0) & (np.abs(lag) > noise), np.clip(lag, -limit, limit), 0.0)
    ahead, behind = -lag[lag < 0].sum(), lag[lag > 0].sum()
    if ahead == 0 or behind == 0:
        return np.zeros_like(lag)
    smaller = min(ahead, behind)
    return np.where(lag < 0, lag * (smaller / ahead), lag * (smaller / behind))


class RoundRobinDraws:
    """
    Domains of equal weight in turns, in domain order: any K draws in a row hold each of K domains once.

    Args:
        weights (`np.ndarray` of shape `(num_domains,)`): Zero, or one and the same positive number.
    """

    def __init__(self, weights: np.ndarray) -> None:
        self._num_domains = len(weights)
        self._turns = np.flatnonzero(weights)

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each draw in `[start, stop)`, and how often that domain was drawn before it."""
        ranks, turns = np.divmod(np.arange(start, stop), len(self._turns))
        return self._turns[turns], ranks

    def counts(self, draw: int) -> np.ndarray:
        """How often each domain is drawn before `draw`: `int64` of shape `(num_domains,)`."""
        rounds, rest = divmod(draw, len(self._turns))
        counts = np.zeros(self._num_domains, np.int64)
        counts[self._turns] = rounds
        counts[self._turns[:rest]] += 1
        return counts


class QuotaDraws:
    """
    Draws whose counts differ from `draw * weights + lag` by less than one, for each domain and at any draw.

    Domains so rare that they have less than two draws in a block are drawn through one common slot, whose draws they
    share by a schedule of their own; the difference of such a domain is less than 1 + (its part of that slot), so
    less than two. A `lag` can ask for more than any order of draws can give; then the first draws miss the bound.

    Args:
        weights (`np.ndarray` of shape `(num_domains,)`):
            Shares `>= 0` that sum to 1. Those below 2^-42, less than a draw in four trillion, count as 0.
        lag (`np.ndarray` of shape `(num_domains,)`, *optional*):
            Draws each domain is owed from before; they sum to 0 and lie in (-1, 1).
        block (`int`, *optional*, defaults to 2^16):
            Draws between two places where the counts are known without drawing. A power of two.
    """

    def __init__(self, weights: np.ndarray, *, lag: np.ndarray | None = None, block: int = _BLOCK) -> None:
        lag = np.zeros(len(weights)) if lag is None else lag
        self._num_domains = len(weights)
        self._block = max(block, 1 << (4 * int(np.count_nonzero(weights)) - 1).bit_length())
        self._first_block = min(_FIRST_BLOCK, self._block // 4)
        # Inside a block a whole draw is this many units, so that 64 bits hold a block's draws. A share this close to a
        # whole number is that number: 10 draws at 0.3 are 3, whatever 0.3 is in binary.
        self._one = _ONE // self._block
        self._slack = self._one >> 20
        weights = np.where(weights * self._one < 4, 0.0, weights)
        common = np.flatnonzero(weights >= 2 / self._block)
        rare = np.flatnonzero((weights > 0) & (weights < 2 / self._block))
        self._domain_of_slot, slot_weights, slot_lag = common, weights[common], lag[common]
        self._rare, self._rare_draws = rare, None
        if rare.size:
            weight, owed = weights[rare].sum(), lag[rare].sum()
            self._domain_of_slot = np.append(common, rare[0])
            slot_weights, slot_lag = np.append(slot_weights, weight), np.append(slot_lag, owed)
            if rare.size > 1:
                shares = weights[rare] / weight
                self._rare_draws = make_quota_draws(shares, lag=balance_lag(lag[rare] - owed * shares, shares))
        # The common slot of the rare domains can have deadlines beyond the next block; see `_counts_at_block`.
        self._has_slow_slot = bool(rare.size) and slot_weights[-1] * self._block < 2
        self._shares_per_draw = _to_exact(slot_weights, total=_ONE)
        self._shares_at_start = _to_exact(balance_lag(slot_lag, slot_weights), total=0)
        self._rates = (self._shares_per_draw // self._block).astype(np.int64)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each draw in `[start, stop)`, and how often that domain was drawn before it."""
        slots, ranks = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        draw = start
        while draw < stop:
            number, first = self._block_of(draw)
            block_slots, block_ranks, counts = self._drawn_block(number)
            part = slice(draw - first, min(stop - first, len(block_slots)))
            end = first + part.stop
            slots[draw - start : end - start] = block_slots[part]
            ranks[draw - start : end - start] = block_ranks[part]
            ranks[draw - start : end - start] += counts[block_slots[part]]
            draw = end
        domains = self._domain_of_slot[slots]
        if self._rare_draws is not None:
            (at,) = np.nonzero(slots == len(self._rates) - 1)
            if at.size:
                rare, ranks[at] = self._rare_draws.draws(ranks[at[0]], ranks[at[-1]] + 1)
                domains[at] = self._rare[rare]
        return domains, ranks

    def counts(self, draw: int) -> np.ndarray:
        """How often each domain is drawn before `draw`: `int64` of shape `(num_domains,)`."""
        number, first = self._block_of(draw)
        counts_of_slots = self._counts_at_block(number)
        if draw > first:
            slots, _, _ = self._drawn_block(number)
            counts_of_slots = counts_of_slots + np.bincount(slots[: draw - first], minlength=len(self._rates))
        counts = np.zeros(self._num_domains, np.int64)
        counts[self._domain_of_slot] = counts_of_slots
        if self._rare_draws is not None:
            counts[self._rare] = self._rare_draws.counts(int(counts_of_slots[-1]))
        return counts

    def _block_of(self, draw: int) -> tuple[int, int]:
        """Number of the block a draw is in, and the draw that block begins with."""
        if draw < self._first_block:
            return 0, 0
        number = draw // self._block + 1
        return number, max(self._first_block, (number - 1) * self._block)

    def _drawn_block(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slot of each draw of a block, its rank among the slot's draws of the block, and the counts before."""
        if number not in self._blocks:
            counts = self._counts_at_block(number)
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            slots = self._schedule_block(number, counts)
            self._blocks[number] = slots, ranks_among_equals(slots, len(self._rates)), counts
        return self._blocks[number]

    def _shares_at(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole part of each slot's share of the draws before `draw`, and the rest in units of 1/`_one`."""
        shares = self._shares_at_start + int(draw) * self._shares_per_draw
        return (shares // _ONE).astype(np.int64), (shares % _ONE // self._block).astype(np.int64)

    def _counts_at_block(self, number: int) -> np.ndarray:
        """Draws of each slot before a block, each the slot's share rounded up or down."""
        if number == 0:
            return np.zeros(len(self._rates), np.int64)
        if number == 1 or number - 1 in self._blocks:
            slots, _, counts = self._drawn_block(number - 1)
            return counts + np.bincount(slots, minlength=len(self._rates))
        draw = (number - 1) * self._block
        whole, rest = self._shares_at(draw)
        whole += rest >= self._one - self._slack
        split = np.flatnonzero((rest > self._slack) & (rest < self._one - self._slack))
        if not split.size:
            return whole
        # Each slot left has one draw that may fall on either side of the boundary. Draws that can only just be made
        # before it compete for the last places, draws that are due soon after it for the first ones: neither may pile
        # up, whichever stretch of time is looked at.
        rest, rates = rest[split], self._rates[split]
        rest[np.abs(rest - self._one // 2).argmin()] += (draw - whole.sum()) * self._one - rest.sum()
        released = np.argsort(-(-rest // rates), kind="stable")
        due = np.argsort(-((rest - self._one) // rates), kind="stable")
        pinned = None
        if self._has_slow_slot and split[-1] == len(self._rates) - 1:
            # The draw of a slow slot may stand between this boundary and several others. They all put it where the
            # slot's share passes one half, or they would contradict each other.
            pinned = bool(rest[-1] >= self._one // 2 or whole[-1] < 0)
        whole[split] += round_two_ways(rest, released, due, one=self._one, pin_last=pinned)
        return whole

    def _schedule_block(self, number: int, counts: np.ndarray) -> np.ndarray:
        """The slots of the draws of one block: of the draws that are released, always the one due next."""
        first = self._first_block if number == 1 else max(0, number - 1) * self._block
        length = (self._first_block if number == 0 else number * self._block) - first
        whole, rest = self._shares_at(first)
        owed = (whole - counts) * self._one + rest
        if number == 0:
            num_jobs = np.maximum(-((self._slack - owed - length * self._rates) // self._one), 0)
            if self._has_slow_slot:
                num_jobs[-1] = max((owed[-1] + length * self._rates[-1] + self._one // 2) // self._one, 0)
        else:
            num_jobs = self._counts_at_block(number + 1) - counts
            assert num_jobs.min() >= 0
            assert num_jobs.sum() == length
        slots = np.repeat(np.arange(len(num_jobs)), num_jobs)
        jobs = ranks_among_equals(slots, len(num_jobs))
        rates, owed = self._rates[slots], owed[slots]
        released = np.clip((jobs * self._one + self._slack - owed) // rates, 0, length - 1)
        due = np.clip(-((owed + self._slack - (jobs + 1) * self._one) // rates), 0, 2**31)
        if number > 0:
            due = np.minimum(due, length)
        order = stable_order(released, length)
        urgency = (due * len(num_jobs) + slots)[order].tolist()
        num_released = np.searchsorted(released[order], np.arange(length), side="right").tolist()
        return np.array(_earliest_due_first(urgency, num_released)) % len(num_jobs)


def _earliest_due_first(urgency: list[int], num_released: list[int]) -> list[int]:
    """Take one of the jobs released by each time, the most urgent; the next to be released if there is none."""
    waiting: list[int] = []
    taken: list[int] = []
    num_waiting = 0
    push, pop = heapq.heappush, heapq.heappop  # the only loop over single draws: worth the local names
    for released in num_released:
        while num_waiting < released or not waiting:
            push(waiting, urgency[num_waiting])
            num_waiting += 1
        taken.append(pop(waiting))
    return taken


def round_two_ways(
    values: np.ndarray, first_order: np.ndarray, second_order: np.ndarray, *, one: int, pin_last: bool | None = None
) -> np.ndarray:
    """
    Round fractions up or down so that all sums from the start, in each of two orders, change by less than one.

    Binary digits are cleared from the lowest up. The values that have the digit are paired as they follow each other
    in the first order, and again in the second; the pairs link into rings of even length, around which values are
    moved up and down in turn. A pair keeps its sum, so each digit changes a sum by one cut pair at most.

    Args:
        values (`np.ndarray` of `int64`, shape `(S,)`): Fractions in (0, 1) in units of 1/`one`, with an integer sum.
        first_order, second_order (`np.ndarray` of integers, shape `(S,)`): Two permutations of `range(S)`.
        one (`int`): A power of two.
        pin_last (`bool`, *optional*): Round the last value up (True) or down (False), whatever it is.

    Returns:
        `np.ndarray` of `int64`, shape `(S,)`: 0 or 1 for each value.
    """
    values = values.copy()
    digit = 1
    while digit < one:
        odd = (values & digit) != 0
        if odd.any():
            direction = _alternate_around_rings(odd, first_order, second_order, pin_last=pin_last)
            values += digit * direction
        digit *= 2
    return values // one


def _alternate_around_rings(
    odd: np.ndarray, first_order: np.ndarray, second_order: np.ndarray, *, pin_last: bool | None
) -> np.ndarray:
    """+1 or -1 for each odd element, 0 for others, such that both elements of each pair have opposite signs."""
    partners = []
    for order in (first_order, second_order):
        members = order[odd[order]]
        partner = np.zeros(len(odd), np.int64)
        partner[members[0::2]], partner[members[1::2]] = members[1::2], members[0::2]
        partners.append(partner.tolist())
    first_partner, second_partner = partners
    direction = [0] * len(odd)
    starts = np.flatnonzero(odd).tolist()
    if pin_last is not None and odd[-1]:
        last = len(odd) - 1
        starts.insert(0, last if pin_last else first_partner[last])
    for element in starts:
        while not direction[element]:
            direction[element] = 1
            element = first_partner[element]
            direction[element] = -1
            element = second_partner[element]
    return np.array(direction)


def _to_exact(shares: np.ndarray, *, total: int) -> np.ndarray:
    """Shares as Python integers in units of 1/`_ONE` that sum to `total`; the largest takes what rounding leaves."""
    exact = np.array([int(share) for share in shares * _ONE], dtype=object)
    exact[np.abs(shares).argmax()] += total - exact.sum()
    return exact
