"""The domain of every draw, under weights that may change on the way."""

from dataclasses import dataclass

import numpy as np

from hf_doge.sampling.iid import IIDDraws
from hf_doge.sampling.permutation import derive_key
from hf_doge.sampling.quota import QuotaDraws, RoundRobinDraws, balance_lag, make_quota_draws
from hf_doge.sampling.token_draws import RowTokens, TokenDraws

DRAW_MODES = ("quota", "iid")
UNITS = ("examples", "tokens")  # of which weights are shares

Draws = QuotaDraws | RoundRobinDraws | IIDDraws | TokenDraws


@dataclass
class Piece:
    """
    A stretch of draws under one set of weights.

    Attributes:
        first_draw (`int`): The first draw under these weights.
        shares (`np.ndarray` of shape `(num_domains,)`): The weights, summing to 1.
        counts (`np.ndarray` of shape `(num_domains,)`): How often each domain is drawn before `first_draw`.
        lag (`np.ndarray` of shape `(num_domains,)`): Draws, or tokens, each domain is owed from the pieces before.
    """

    first_draw: int
    shares: np.ndarray
    counts: np.ndarray
    lag: np.ndarray


class DrawSchedule:
    """
    Which domain each draw takes: a pure function of the weights, the draws they begin at, the mode and the seed.

    Args:
        shares (`np.ndarray` of shape `(num_domains,)`): Weights from draw 0 on, `>= 0`, summing to 1.
        draw (`str`): `"quota"` or `"iid"`; see the modules of these names.
        seed (`int`): Seed of the `"iid"` draws; the `"quota"` draws follow from the weights alone.
        tokens ([`RowTokens`], *optional*): The weights are shares of these, and not of the examples.
    """

    def __init__(self, shares: np.ndarray, *, draw: str, seed: int, tokens: RowTokens | None = None) -> None:
        if draw not in DRAW_MODES:
            raise ValueError(f"`draw` must be one of {list(DRAW_MODES)}, but got {draw!r}.")
        self._draw = draw
        self._seed = seed
        self._tokens = tokens
        self.pieces = [Piece(0, shares, np.zeros(len(shares), np.int64), np.zeros(len(shares)))]
        self._used: dict[int, Draws] = {}  # draws of the pieces read last

    def append(self, first_draw: int, shares: np.ndarray, *, counts: np.ndarray | None = None) -> None:
        """
        Use other weights from `first_draw` on; earlier draws stay as they are.

        Args:
            first_draw (`int`): Not before the first draw of the last piece.
            shares (`np.ndarray` of shape `(num_domains,)`): The weights, `>= 0`, summing to 1.
            counts (`np.ndarray` of shape `(num_domains,)`, *optional*):
                `self.counts(first_draw)`, where it is known already.
        """
        last = self.pieces[-1]
        counts = self.counts(first_draw) if counts is None else counts
        if self._tokens is None:
            owed = last.lag + (first_draw - last.first_draw) * last.shares - (counts - last.counts)
            lag = balance_lag(owed, shares)
        else:
            drawn = self._tokens.before(counts) - self._tokens.before(last.counts)
            lag = np.where(shares > 0, last.lag + drawn.sum() * last.shares - drawn, 0.0)
        self.pieces.append(Piece(first_draw, shares, counts, lag))

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """
        The draws in `[start, stop)`.

        Returns:
            Two `np.ndarray` of `int64` and shape `(stop - start,)`: the domain of each draw, and how often that domain
            is drawn before.
        """
        domain_ids, ranks = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        for number, piece in enumerate(self.pieces):
            first, end = max(start, piece.first_draw), stop
            if number + 1 < len(self.pieces):
                end = min(stop, self.pieces[number + 1].first_draw)
            if first < end:
                domains, ranks_in_piece = self._draws_of(number).draws(
                    first - piece.first_draw, end - piece.first_draw
                )
                domain_ids[first - start : end - start] = domains
                ranks[first - start : end - start] = ranks_in_piece + piece.counts[domains]
        return domain_ids, ranks

    def piece_at(self, draw: int) -> Piece:
        """The stretch that a draw is in."""
        return next(piece for piece in reversed(self.pieces) if piece.first_draw <= draw)

    def counts(self, draw: int) -> np.ndarray:
        """How often each domain is drawn before `draw`: `int64` of shape `(num_domains,)`."""
        number = max(number for number, piece in enumerate(self.pieces) if piece.first_draw <= draw)
        piece = self.pieces[number]
        return piece.counts + self._draws_of(number).counts(draw - piece.first_draw)

    def _draws_of(self, number: int) -> Draws:
        """The draws of a piece, counted from its first one."""
        if number not in self._used:
            while len(self._used) > 1:
                del self._used[next(iter(self._used))]
            piece = self.pieces[number]
            if self._draw == "iid":
                shares = piece.shares if self._tokens is None else self._tokens.to_examples(piece.shares)
                self._used[number] = IIDDraws(shares, key=derive_key(self._seed, "iid", piece.first_draw))
            elif self._tokens is not None:
                self._used[number] = TokenDraws(piece.shares, self._tokens, counts=piece.counts, lag=piece.lag)
            else:
                self._used[number] = make_quota_draws(piece.shares, lag=piece.lag)
        return self._used[number]
