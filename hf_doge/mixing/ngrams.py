"""Unigram and bigram models of sources, evaluated on what a target holds."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hf_doge.mixing.tokens import Tokens

NO_CONTEXT = -1  # the context of the first token of a row
MERGE_ABOVE = 4_000_000  # pairs that wait to be summed, 64 MB


@dataclass(frozen=True)
class TargetBigrams:
    """
    The distinct bigrams of a target, sorted by context and token.

    Attributes:
        contexts, tokens (`np.ndarray` of shape `(num_bigrams,)`): `contexts` is -1 where a token begins its row.
        counts (`np.ndarray` of shape `(num_bigrams,)`): How often each occurs.
    """

    contexts: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the target that count."""
        return int(self.counts.sum())

    @classmethod
    def of(cls, batches: Iterable[Tokens], *, max_tokens: int | None = None) -> "TargetBigrams":
        """Count the first `max_tokens` tokens that count."""
        counter, left = _PairCounter(), np.inf if max_tokens is None else max_tokens
        for contexts, tokens in _bigrams(batches):
            taken = int(min(len(tokens), left))
            counter.add(contexts[:taken], tokens[:taken])
            left -= taken
            if left <= 0:
                break
        return cls(*counter.total())


@dataclass(frozen=True)
class SourceCounts:
    """
    What a source says of the bigrams of a target: all that the models below need.

    Attributes:
        bigrams (`np.ndarray` of shape `(num_bigrams,)`): Count of each bigram of the target in the source.
        contexts (`np.ndarray` of shape `(num_bigrams,)`): How often its context occurs there before a token.
        continuations (`np.ndarray` of shape `(num_bigrams,)`): How many different tokens follow that context there.
        unigrams (`np.ndarray` of shape `(num_bigrams,)`): Count of its token there.
        num_tokens (`int`), num_rows (`int`): In all that was read.
        is_whole (`bool`): Whether the source was read to its end.
        largest_token (`int`): The largest token id, -1 without any.
    """

    bigrams: np.ndarray
    contexts: np.ndarray
    continuations: np.ndarray
    unigrams: np.ndarray
    num_tokens: int
    num_rows: int
    largest_token: int
    is_whole: bool

    @classmethod
    def of(cls, batches: Iterable[Tokens], target: TargetBigrams, *, max_tokens: int | None = None) -> "SourceCounts":
        """Count a source, keeping the bigrams whose context the target has, and no more."""
        known = np.unique(target.contexts[target.contexts != NO_CONTEXT])
        counter, unigrams = _PairCounter(), np.zeros(1, dtype=np.int64)
        num_tokens, num_rows, is_whole = 0, 0, True
        for contexts, tokens in _bigrams(batches):
            if max_tokens is not None and num_tokens + len(tokens) > max_tokens:
                contexts, tokens = contexts[: max_tokens - num_tokens], tokens[: max_tokens - num_tokens]
                is_whole = False
            num_tokens += len(tokens)
            num_rows += int((contexts == NO_CONTEXT).sum())
            batch = np.bincount(tokens, minlength=len(unigrams))
            batch[: len(unigrams)] += unigrams
            unigrams = batch
            places = np.searchsorted(known, contexts).clip(max=max(len(known) - 1, 0))
            kept = known[places] == contexts if len(known) else np.zeros(len(contexts), dtype=bool)
            counter.add(contexts[kept], tokens[kept])
            if not is_whole:
                break
        contexts, tokens, counts = counter.total()
        starts, ends = (np.searchsorted(contexts, target.contexts, side=side) for side in ("left", "right"))
        sums = np.concatenate([[0], np.cumsum(counts)])
        return cls(
            bigrams=_look_up(_pair_key(contexts, tokens), counts, _pair_key(target.contexts, target.tokens)),
            contexts=sums[ends] - sums[starts],
            continuations=ends - starts,
            unigrams=_look_up(np.arange(len(unigrams)), unigrams, target.tokens),
            num_tokens=num_tokens,
            num_rows=num_rows,
            largest_token=int(np.flatnonzero(unigrams).max(initial=-1)),
            is_whole=is_whole,
        )

    def probabilities(self, *, order: int, vocab_size: int) -> np.ndarray:
        """
        Probability of each token of the target's bigrams after its context, shape `(num_bigrams,)`, all positive.

        Unigrams (`order` 1) have add-one smoothing, `(c(w) + 1) / (N + V)`. Bigrams (`order` 2) are interpolated with them
        by Witten and Bell's estimate: `(c(v, w) + T(v) p(w)) / (c(v) + T(v))`, where `T(v)` tokens follow the context `v`.
        """
        unigram = (self.unigrams + 1) / (self.num_tokens + vocab_size)
        if order == 1:
            return unigram
        total = self.contexts + self.continuations
        bigram = (self.bigrams + self.continuations * unigram) / np.maximum(total, 1)
        return np.where(total > 0, bigram, unigram)


class _PairCounter:
    """Counts pairs of numbers, and merges what it has whenever much is waiting."""

    def __init__(self) -> None:
        self._keys = [np.empty(0, dtype=np.int64)]
        self._counts = [np.empty(0, dtype=np.int64)]
        self._num_waiting = 0

    def add(self, contexts: np.ndarray, tokens: np.ndarray) -> None:
        keys, counts = np.unique(_pair_key(contexts, tokens), return_counts=True)
        self._keys.append(keys)
        self._counts.append(counts)
        self._num_waiting += len(keys)
        if self._num_waiting > MERGE_ABOVE:
            self._merge()

    def total(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct pairs, sorted, and their counts."""
        self._merge()
        return self._keys[0] >> 32, self._keys[0] & 0xFFFFFFFF, self._counts[0]

    def _merge(self) -> None:
        keys, places = np.unique(np.concatenate(self._keys), return_inverse=True)
        counts = np.bincount(places, weights=np.concatenate(self._counts), minlength=len(keys))
        self._keys, self._counts, self._num_waiting = [keys], [counts.astype(np.int64)], 0


def _bigrams(batches: Iterable[Tokens]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Contexts and tokens of all tokens that count; rows do not run on into each other."""
    for ids, first, counted in batches:
        if len(ids) and (ids.min() < 0 or ids.max() >= 2**31):
            raise ValueError(f"Token ids must be in [0, 2**31), but got {ids.min()} to {ids.max()}.")
        contexts = np.where(first, NO_CONTEXT, np.roll(ids, 1))
        yield contexts[counted], ids[counted]


def _pair_key(contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """One number for each pair, in the order of context and token."""
    return (contexts << 32) | tokens


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not among the sorted keys."""
    if len(keys) == 0:
        return np.zeros(len(wanted), dtype=np.int64)
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
