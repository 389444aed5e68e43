"""BM25 over the tokens of the examples of an index, by the library `bm25s`: what a search engine finds by shared words."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def require_bm25s() -> Any:
    """
    The library.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError(
            "BM25 needs bm25s. Install it by `pip install 'hf-doge[evaluate-influence]'`, or leave this scorer out."
        ) from error
    return bm25s


class LexicalIndex:
    """
    Some texts, to be searched by the tokens that they share with a query.

    Args:
        texts (`Sequence[Sequence[int]]`): Token ids of each, without those that are no words.

    Raises:
        ImportError: `bm25s` is not installed.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        library = require_bm25s()
        self.num_texts = len(texts)
        self._known = {token for text in texts for token in text}
        self._index = library.BM25()
        if self._known:
            self._index.index([list(map(str, text)) for text in texts], show_progress=False)

    def known(self, tokens: Sequence[int]) -> list[int]:
        """Those of some tokens that a text holds, as often as they are given."""
        return [token for token in tokens if token in self._known]

    def scores(self, tokens: Sequence[int]) -> np.ndarray:
        """BM25 of a query's tokens with all texts, `(num_texts,)`, each `>= 0`: the sum of what each token adds."""
        known = [str(token) for token in self.known(tokens)]
        return np.asarray(self._index.get_scores(known)) if known else np.zeros(self.num_texts)
