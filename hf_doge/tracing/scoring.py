"""Scores of recorded queries against an index, all checkpoints together."""

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm.auto import tqdm

from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.synonym_search import Neighbours
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.hits import TokenParts

_BLOCK_BYTES = 64 * 2**20  # scores held at a time


class QueryScorer:
    """
    Weighs the scores at each checkpoint by its learning rate and adds them up.

    Args:
        reader ([`IndexReader`]): The index.
        rows (`Sequence[TokenRows]`): Rows of the queries at each checkpoint, of width `reader.width`.
        excluded_tokens (`Sequence[int]`): Tokens that do not count; the queries have no rows of them any more.
        cosine (`bool`): Whether scores are divided by the norms of both gradients.
        synonyms (`Sequence[Neighbours]`, *optional*): Of the queries' tokens at each checkpoint, to match them as well.
    """

    def __init__(
        self,
        reader: IndexReader,
        rows: Sequence[TokenRows],
        *,
        excluded_tokens: Sequence[int] = (),
        cosine: bool = False,
        synonyms: Sequence[Neighbours] = (),
    ) -> None:
        self.reader = reader
        self.rows = rows
        self.synonyms = synonyms
        self._excluded = excluded_tokens
        self._query_scales: list[np.ndarray] = []
        self._example_scales: list[np.ndarray | None] = []
        for position, checkpoint in enumerate(reader.checkpoints):
            scale = np.full(len(rows[position]), checkpoint["learning_rate"], dtype=np.float64)
            self._query_scales.append(scale * self._query_norms(position) if cosine else scale)
            squares = reader.self_influence(position, exclude_tokens=excluded_tokens) if cosine else None
            self._example_scales.append(None if squares is None else _inverse_root(squares))

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Scores `(num_queries_of_block, num_examples)` in float32, and before them the position of the first query."""
        count = len(self.rows[0])
        size = max(1, _BLOCK_BYTES // (4 * self.reader.num_examples))
        for first in tqdm(range(0, count, size), desc="Scoring", leave=False, disable=count <= size):
            stop = min(first + size, count)
            block = np.zeros((stop - first, self.reader.num_examples), dtype=np.float32)
            for position, rows in enumerate(self.rows):
                part = self.reader.scores(position, rows.between(first, stop))
                for query in range(first, stop):
                    for _, _, examples, parts in self._synonym_parts(position, query):
                        part[query - first, examples] += parts
                part *= self._query_scales[position][first:stop, None].astype(np.float32)
                if self._example_scales[position] is not None:
                    part *= self._example_scales[position].astype(np.float32)
                block += part
            yield first, block

    def token_parts(self, query: int, example_ids: np.ndarray) -> TokenParts:
        """What each token carries of one query's scores with some examples."""
        own = [rows[query] for rows in self.rows]
        tokens = np.unique(np.concatenate([token_ids.numpy() for token_ids, _ in own]))
        parts = np.zeros((len(own), len(example_ids), len(tokens)))
        by_example: list[dict[int, float]] = [{} for _ in example_ids]
        order = np.argsort(example_ids)
        for position, (token_ids, query_rows) in enumerate(own):
            found = self.reader.word_scores(position, token_ids, self.reader.project(query_rows), example_ids)
            found = found.astype(np.float64)
            scales = np.full(len(example_ids), self._query_scales[position][query])
            if self._example_scales[position] is not None:
                scales *= self._example_scales[position][example_ids]
            for row, column in zip(*found.nonzero(), strict=True):
                _add(by_example[row], int(token_ids[column]), found[row, column] * scales[row])
            for column, token, examples, values in self._synonym_parts(position, query, only=example_ids):
                places = order[np.searchsorted(example_ids, examples, sorter=order)]
                found[places, column] += values
                for place, value in zip(places, values.tolist(), strict=True):
                    _add(by_example[place], token, value * scales[place])
            parts[position][:, np.searchsorted(tokens, token_ids.numpy())] = found * scales[:, None]
        return TokenParts(example_ids, tokens, parts, by_example)

    def _synonym_parts(
        self, position: int, query: int, *, only: np.ndarray | None = None
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """What matches of different tokens add to a query's scores at a checkpoint, before any scale."""
        if not self.synonyms:
            return
        tokens, rows = self.rows[position][query]
        yield from self.reader.synonym_scores(
            position,
            tokens,
            self.reader.project(rows),
            self.synonyms[position],
            exclude_tokens=self._excluded,
            only=only,
        )

    def _query_norms(self, position: int) -> np.ndarray:
        rows = self.rows[position]
        projected = TokenRows(rows.offsets, rows.tokens, self.reader.project(rows.rows), rows.virtual)
        return _inverse_root(projected.squared_norms().numpy())


def _add(parts: dict[int, float], token: int, part: float) -> None:
    parts[token] = parts.get(token, 0.0) + part


def _inverse_root(squares: np.ndarray) -> np.ndarray:
    """`1 / length`, and 0 for a gradient of length 0, which has no direction."""
    lengths = np.sqrt(squares.astype(np.float64))
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
