"""What every method should beat, whatever the model thinks: chance, and what a search engine finds by shared words."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from hf_doge.artifacts.influence.lexical_search import LexicalIndex, require_bm25s
from hf_doge.evaluation.influence.scorers.base import Batches


class RandomScorer:
    """
    Scores drawn from a normal distribution: removing its proponents is removing examples at random.

    Args:
        seed (`int`): Seeds the draw.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        generator = np.random.default_rng(self.seed)
        shape = [sum(len(batch["input_ids"]) for batch in batches) for batches in (queries, train)]
        return generator.standard_normal(shape)


class BM25Scorer:
    """
    BM25 over the token ids that models read, by the library `bm25s`.

    BM25 knows no opponents: its scores are `>= 0`, so its lowest end is examples that share nothing. With `signed`,
    examples of another label than the query's count negative, so that both ends share words with it. Ours.

    Args:
        signed (`bool`): Whether the label decides the sign.
        ignore_tokens (`Sequence[int]`): Token ids that are no words, such as `[CLS]`.

    Raises:
        ImportError: `bm25s` is not installed.
    """

    def __init__(self, *, signed: bool = False, ignore_tokens: tuple[int, ...] = ()) -> None:
        require_bm25s()
        self.signed = signed
        self.ignore_tokens = frozenset(ignore_tokens)

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        texts, query_texts = self._words(train), self._words(queries)
        index = LexicalIndex(texts)
        scores = np.stack([index.scores(words) for words in query_texts]).astype(np.float64)
        if self.signed:
            scores *= np.where(_labels(queries)[:, None] == _labels(train)[None], 1.0, -1.0)
        return scores

    def _words(self, batches: Batches) -> list[list[int]]:
        """Token ids of each example, padding left out."""
        return [
            [token for token in ids[mask.bool()].tolist() if token not in self.ignore_tokens]
            for batch in batches
            for ids, mask in zip(batch["input_ids"], _mask(batch["input_ids"], batch), strict=True)
        ]


def _mask(input_ids: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", input_ids.new_ones(input_ids.shape))


def _labels(batches: Batches) -> np.ndarray:
    return np.concatenate([batch["labels"].cpu().numpy() for batch in batches])
