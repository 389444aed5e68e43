"""
Scores of an index that has rows of words and of a layer, put together in several ways.

With `<g_p(x), g_p(x')>_c` the inner product of part p, the words or the layer, at checkpoint c, of learning rate `eta_c`:

- `sum`: `sum_c eta_c sum_p <g_p(x), g_p(x')>_c`, TracIn on both;
- `joint`: the same by cosine, each checkpoint's sum divided by the norms of both gradients, words and layer together;
- `mean`: `sum_c eta_c mean_p cos(g_p(x), g_p(x'))_c`, each part divided by its own norms;
- `rank`: the mean over p and c of the rank of `<g_p(x), g_p(x')>_c` among all examples, and `rank_cosine` of its cosine;
- `words`, `layer`, `words_cosine`, `layer_cosine`: one part alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_doge import InfluenceIndex
from hf_doge.evaluation.influence.rank_metrics import average_ranks
from hf_doge.tracing.queries import check_options

RULES = ("sum", "joint", "mean", "rank", "rank_cosine", "words", "layer", "words_cosine", "layer_cosine")


@dataclass(frozen=True)
class Parts:
    """
    Inner products and norms by part. C = checkpoints, P = parts (words, then the layer), Q = queries, N = examples.

    Attributes:
        learning_rates (`numpy.ndarray` of shape `(C,)`).
        products (`numpy.ndarray` of shape `(C, P, Q, N)`).
        query_squares (`numpy.ndarray` of shape `(C, P, Q)`): Squared norms of the queries' gradients.
        example_squares (`numpy.ndarray` of shape `(C, P, N)`): The same of the examples'.
    """

    learning_rates: np.ndarray
    products: np.ndarray
    query_squares: np.ndarray
    example_squares: np.ndarray

    @staticmethod
    def of(index: InfluenceIndex, queries: Sequence[dict[str, Any]]) -> "Parts":
        """Of an index of plain gradients with words and layers."""
        reader = index.reader
        num_words = reader.embedding_shape[0]
        without = (range(num_words, reader.vocabulary_size), range(num_words))  # what is not of the part
        scorer = index._scorer(index._records(queries, {}), check_options({"cosine": False}, reader))
        places = range(len(reader.checkpoints))
        return Parts(
            np.array([checkpoint["learning_rate"] for checkpoint in reader.checkpoints]),
            np.array(
                [[reader.scores(c, scorer.rows[c], exclude_tokens=one) for one in without] for c in places], float
            ),
            np.array([[scorer.rows[c].without(one).squared_norms().numpy() for one in without] for c in places]),
            np.array([[reader.self_influence(c, exclude_tokens=one) for one in without] for c in places]),
        )

    def scores(self, rule: str) -> np.ndarray:
        """Scores `(Q, N)` by one of `RULES`."""
        rates, products = self.learning_rates, self.products
        cosines = (
            products * _inverse_root(self.query_squares)[..., None] * _inverse_root(self.example_squares)[..., None, :]
        )
        if rule.startswith("rank"):
            return average_ranks(cosines if rule == "rank_cosine" else products).mean(axis=(0, 1))
        if rule == "mean":
            return np.einsum("c,cpqn->qn", rates, cosines) / products.shape[1]
        if rule == "joint":
            norms = [_inverse_root(squares.sum(axis=1)) for squares in (self.query_squares, self.example_squares)]
            return np.einsum("c,cpqn,cq,cn->qn", rates, products, *norms)
        chosen = {"words": slice(0, 1), "layer": slice(1, 2)}.get(rule.partition("_")[0], slice(None))
        return np.einsum("c,cpqn->qn", rates, (cosines if rule.endswith("cosine") else products)[:, chosen])


def _inverse_root(squares: np.ndarray) -> np.ndarray:
    """`1 / length`, and 0 for a gradient of length 0."""
    return np.divide(1.0, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)
