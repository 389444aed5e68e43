"""Figures of hits and scores: what a setting of an index explains."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

FIRST_PAGE = 10  # queries
STRONGEST = 3  # words


def label_share(scores: np.ndarray, labels: np.ndarray, predicted: np.ndarray, *, top_k: int = 10) -> float:
    """How many of the `top_k` strongest proponents `(num_queries, num_examples)` have the label that the query was given."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return float((labels[best] == predicted[:, None]).mean())


def hub_share(scores: np.ndarray, *, top_k: int = 10, num_hubs: int = 12) -> float:
    """Which part of all places among the `top_k` the `num_hubs` most frequent examples hold."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    counts = np.sort(np.bincount(best.ravel(), minlength=scores.shape[1]))
    return float(counts[-num_hubs:].sum() / best.size)


def strongest_words(hits: Dataset, *, num_words: int = STRONGEST) -> list[list[str]]:
    """Of each hit that is a proponent the words that carry most of its score."""
    rows = (hit for hit in hits if hit["kind"] == "proponent")
    return [[word for word, _ in strongest(hit)[:num_words]] for hit in rows]


def strongest(hit: dict) -> list[tuple[str, float]]:
    """Words of a hit by the size of their part, each once."""
    parts: dict[str, float] = {}
    for word, score in zip(hit["words"], hit["word_scores"], strict=True):
        parts[word] = parts.get(word, 0.0) + score
    return sorted(parts.items(), key=lambda one: -abs(one[1]))


def page_figures(hits: Dataset, special: Sequence[str], punctuation: Sequence[str] = (".", "?", "!")) -> dict:
    """Of the first page's hits: how often special tokens and ends of sentences are among the three strongest words."""
    first = hits.filter(lambda query: query < FIRST_PAGE, input_columns="query")
    words = strongest_words(first)
    total = Counter(word for hit in words for word in hit)
    return {
        "special_in_top3": round(float(np.mean([bool(set(hit) & set(special)) for hit in words])), 3),
        "punctuation_in_top3": round(float(np.mean([bool(set(hit) & set(punctuation)) for hit in words])), 3),
        "frequent_words": [word for word, _ in total.most_common(6)],
    }
