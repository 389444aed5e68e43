"""
Scores of recorded queries against an index: TracIn-WE, https://huggingface.co/papers/2202.11844.

    score(x, x') = sum over checkpoints c of learning_rate_c * sum over tokens w in both of <g_w(x), g_w(x')>
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from hf_doge.artifacts.influence import IndexReader
from hf_doge.gradients.layers import ChosenLayers
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.query_rows import RecordedQueries

_BLOCK_BYTES = 64 * 2**20  # scores held at a time
_BLOCK_VALUES = 1024  # of which the largest is known before all are compared


@dataclass
class TokenParts:
    """
    What each token carries of the scores of one query with some examples, learning rates included.

    Attributes:
        example_ids (`numpy.ndarray` of shape `(n,)`): The examples.
        tokens (`numpy.ndarray` of shape `(W,)`): Tokens of the query that have a row at any checkpoint, then layers.
        parts (`numpy.ndarray` of shape `(num_checkpoints, n, W)`): Adds up to the scores.
        by_example (`list[dict[int, float]]`):
            The same scores by the token of each example, all checkpoints together: another one than the query's where
            synonyms are matched.
        layer_names (`dict[int, str]`): Names of the tokens that are layers.
    """

    example_ids: np.ndarray
    tokens: np.ndarray
    parts: np.ndarray
    by_example: list[dict[int, float]]
    layer_names: dict[int, str] = field(default_factory=dict)


class QueryScorer:
    """
    Scores of some queries with all training examples.

    Args:
        reader ([`IndexReader`]): The index.
        recorded ([`RecordedQueries`]): The queries, with their rows at each checkpoint, of width `reader.width`.
        excluded_tokens (`Sequence[int]`): Tokens that do not count; the queries have no rows of them any more.
        cosine (`bool`): Whether scores are divided by the norms of both gradients.
        layers (`str`): How the rows of layers count next to those of words, see [`SearchOptions`].
    """

    def __init__(
        self,
        reader: IndexReader,
        recorded: RecordedQueries,
        *,
        excluded_tokens: Sequence[int] = (),
        cosine: bool = False,
        layers: str = "count",
    ) -> None:
        self.reader = reader
        self.queries, self.rows = recorded.queries, recorded.rows
        self._plain = recorded.rows
        self._is_measured = reader.config.get("metric") == "optimizer"
        if self._is_measured:
            self.rows = [reader.metric(place).measured(rows) for place, rows in enumerate(recorded.rows)]
        self._excluded = excluded_tokens
        self._layer_names: dict[int, str] = {}
        recorded_layers = reader.config.get("layers")
        if recorded_layers is not None:
            self._layer_names = ChosenLayers.from_dict(recorded_layers, width=reader.width).names()
        self._layer_rows = np.array([*self._layer_names, reader.vocabulary_size])  # where the rows of each layer begin
        self._parts = self._parts_of(layers)
        self._synonyms = recorded.synonyms if self._parts[0].start == 0 else None  # of words, if they count
        self._query_scales: list[np.ndarray] = []  # of each part the learning rate, and with `cosine` 1 / |g(x)|
        self._example_scales: list[np.ndarray | None] = []  # with `cosine` 1 / |g(x')| of each part
        for position, (checkpoint, rows) in enumerate(zip(reader.checkpoints, self.rows, strict=True)):
            scale = np.full((len(self._parts), len(self.queries)), checkpoint["learning_rate"] / len(self._parts))
            if cosine:
                squares = [self._squares(position, rows.within(part)) for part in self._parts]
                squares[0] += self._squares_of_unheld(position)
                scale = scale * _inverse_root(np.stack(squares))
                squares = [reader.self_influence(position, exclude_tokens=self._beyond(part)) for part in self._parts]
            self._query_scales.append(scale)
            self._example_scales.append(_inverse_root(np.stack(squares)) if cosine else None)

    def _parts_of(self, layers: str) -> list[range]:
        """
        The rows of each part that has a score of its own, words first. The score is the mean of theirs; others do not count, nor
        does a part of which all is excluded.
        """
        num_words, end = self.reader.embedding_shape[0], self.reader.vocabulary_size
        if layers == "mean":
            words = [0] if self.reader.config["layers"]["embedding"] else []
            parts = [range(first, last) for first, last in pairwise([*words, *self._layer_rows.tolist()])]
            excluded = set(self._excluded)
            return [part for part in parts if not excluded.issuperset(part)] or parts
        return [{"count": range(end), "drop": range(num_words), "only": range(num_words, end)}[layers]]

    def _beyond(self, part: range) -> list[int]:
        """The rows of examples that do not count in a part."""
        return [*self._excluded, *range(part.start), *range(part.stop, self.reader.vocabulary_size)]

    def _squares(self, checkpoint: int, rows: TokenRows) -> np.ndarray:
        """Squared lengths of the queries' gradients, `(num_queries,)`, of some of their rows."""
        projected = self.reader.project(checkpoint, rows.rows)
        return TokenRows(rows.offsets, rows.tokens, projected, rows.virtual).squared_norms().numpy()

    def _squares_of_unheld(self, checkpoint: int) -> np.ndarray:
        """
        Squared lengths in the optimizer's metric, `(num_queries,)`, that matches of synonyms add to queries: those of tokens that
        no example holds, each measured as the nearest token that one does.
        """
        squares = np.zeros(len(self.queries))
        if not self._synonyms or not self._is_measured:
            return squares
        metric = self.reader.metric(checkpoint)
        for query in range(len(squares)):
            for token, row in zip(*self._words(checkpoint, query), strict=True):
                near, cosines = self._synonyms[checkpoint][int(token)]
                held = np.isin(near, metric.tokens)
                if held.any() and int(token) not in metric.tokens:
                    nearest = int(near[held][cosines[held].argmax()])
                    measured = row.float().cpu()[None] / metric.divisor(nearest)
                    squares[query] += float(self.reader.project(checkpoint, measured).square().sum())
        return squares

    def scores(self, start: int, stop: int) -> np.ndarray:
        """TracIn-WE of the queries `[start, stop)` with all examples, `(stop - start, num_examples)` in float32."""
        total = np.zeros((stop - start, self.reader.num_examples), dtype=np.float32)
        for checkpoint, rows in enumerate(self.rows):
            example_scales = self._example_scales[checkpoint]
            for place, part in enumerate(self._parts):
                # sum over w of <g_w(x), g_w(x')>
                scores = self.reader.scores(checkpoint, rows.between(start, stop).within(part))
                for query in range(start, stop) if place == 0 else ():  # words come first
                    for _, _, examples, matched in self._synonym_parts(checkpoint, query):
                        scores[query - start, examples] += matched
                scores *= self._query_scales[checkpoint][place, start:stop, None].astype(np.float32)
                if example_scales is not None:
                    scores *= example_scales[place].astype(np.float32)
                total += scores
        return total

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All [`~QueryScorer.scores`], as many queries at a time as fit, and before them the position of the first."""
        count = len(self.queries)
        size = max(1, _BLOCK_BYTES // (4 * self.reader.num_examples))
        for start in tqdm(range(0, count, size), desc="Scoring", leave=False, disable=count <= size):
            yield start, self.scores(start, min(start + size, count))

    def token_parts(self, query: int, example_ids: np.ndarray) -> TokenParts:
        """What each token carries of one query's scores with some examples; a layer is the token of its first row."""
        counted = range(self._parts[0].start, self._parts[-1].stop)
        own = [rows.between(query, query + 1).within(counted) for rows in self.rows]
        tokens = np.unique(self._shown(np.concatenate([rows.tokens.numpy() for rows in own])))
        parts = np.zeros((len(own), len(example_ids), len(tokens)))
        by_example: list[dict[int, float]] = [{} for _ in example_ids]
        order = np.argsort(example_ids)
        for checkpoint, rows in enumerate(own):
            token_ids, shown = rows.tokens.numpy(), self._shown(rows.tokens.numpy())
            found = self.reader.word_scores(
                checkpoint, token_ids, self.reader.project(checkpoint, rows.rows), example_ids
            )
            found, scales = found.astype(np.float64), self._scales(checkpoint, query, example_ids, token_ids)
            for row, column in zip(*found.nonzero(), strict=True):
                _add(by_example[row], int(shown[column]), found[row, column] * scales[row, column])
            for column, token, examples, values in self._synonym_parts(checkpoint, query, only=example_ids):
                places = order[np.searchsorted(example_ids, examples, sorter=order)]
                found[places, column] += values
                for place, value in zip(places, values.tolist(), strict=True):
                    _add(by_example[place], token, value * scales[place, column])
            np.add.at(parts[checkpoint].T, np.searchsorted(tokens, shown), (found * scales).T)
        return TokenParts(example_ids, tokens, parts, by_example, self._layer_names)

    def _scales(self, checkpoint: int, query: int, example_ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """What the inner product of each row of a query with some examples is multiplied by, `(n, W)`."""
        scales, example_scales = np.zeros((len(example_ids), len(tokens))), self._example_scales[checkpoint]
        for place, part in enumerate(self._parts):
            inside = (tokens >= part.start) & (tokens < part.stop)
            own = np.ones(len(example_ids)) if example_scales is None else example_scales[place, example_ids]
            scales[:, inside] = self._query_scales[checkpoint][place, query] * own[:, None]
        return scales

    def _shown(self, tokens: np.ndarray) -> np.ndarray:
        """Words as they are, and rows of a layer as its first one."""
        places = np.searchsorted(self._layer_rows, tokens, side="right")
        return np.where(places > 0, self._layer_rows[places - 1], tokens)

    def _words(self, checkpoint: int, query: int) -> tuple[Tensor, Tensor]:
        """The rows of a query's words as they were before any metric: layers have no synonyms."""
        tokens, rows = self._plain[checkpoint][query]
        is_word = tokens < self.reader.embedding_shape[0]
        return tokens[is_word], rows[is_word]

    def _synonym_parts(
        self, checkpoint: int, query: int, *, only: np.ndarray | None = None
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """What matches of different tokens add to a query's scores at a checkpoint, before any scale."""
        if not self._synonyms:
            return
        tokens, rows = self._words(checkpoint, query)
        yield from self.reader.synonym_scores(
            checkpoint,
            tokens,
            rows if self._is_measured else self.reader.project(checkpoint, rows),
            self._synonyms[checkpoint],
            exclude_tokens=self._excluded,
            only=only,
        )


def select_extremes(scores: np.ndarray, top_k: int) -> np.ndarray:
    """
    Ids of the `top_k` most positive and most negative of some scores `(N,)`, outermost first; of equal ones the lower id.

    A score of exactly 0 is neither: the example shares no token with the query.
    """
    positive, negative = _largest(scores, top_k), _largest(-scores, top_k)
    return np.concatenate([positive[scores[positive] > 0], negative[scores[negative] < 0]])


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest, of equal ones the lower id."""
    count = min(count, len(values))
    candidates = np.arange(len(values))
    num_blocks = len(values) // _BLOCK_VALUES
    if num_blocks >= count:
        # `count` blocks have a largest value of at least `bound`, so nothing below it can be among the first.
        maxima = values[: num_blocks * _BLOCK_VALUES].reshape(num_blocks, _BLOCK_VALUES).max(axis=1)
        bound = np.partition(maxima, num_blocks - count)[num_blocks - count]
        candidates = np.flatnonzero(values >= bound)
    found = values[candidates]
    last = np.partition(found, len(found) - count)[len(found) - count]
    above, equal = candidates[found > last], candidates[found == last]
    return np.concatenate([above[np.lexsort((above, -values[above]))], equal[: count - len(above)]])


def _add(parts: dict[int, float], token: int, part: float) -> None:
    parts[token] = parts.get(token, 0.0) + part


def _inverse_root(squares: np.ndarray) -> np.ndarray:
    """`1 / length`, and 0 for a gradient of length 0, which has no direction."""
    lengths = np.sqrt(squares.astype(np.float64))
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
