"""The texts of an index searched by the words that they share with a query, with the hits of any other search."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.lexical_search import LexicalIndex
from hf_doge.tracing.hits import text_columns
from hf_doge.tracing.queries import Query, dialogue_kind, text_fields
from hf_doge.tracing.scoring import TokenParts
from hf_doge.tracing.token_queries import attended
from hf_doge.tracing.words import read_ids, read_text

_BLOCK = 64  # queries at a time


def lexical_index(reader: IndexReader, tokenizer: Any | None) -> LexicalIndex:
    """
    The examples of an index as tokens, without special ones.

    Raises:
        ValueError: It holds neither their tokens nor their texts.
        ImportError: `bm25s` is not installed.
    """
    examples, special = reader.examples, set(reader.config["special_token_ids"])
    columns = text_columns(examples.features)
    if "input_ids" in examples.column_names:
        texts = (ids or () for ids in examples["input_ids"])
    elif columns and tokenizer is not None:
        pairs = zip(*(examples[name] for name in columns), strict=True)
        texts = (tokenizer(*(text or "" for text in pair), verbose=False)["input_ids"] for pair in pairs)
    elif columns:
        raise ValueError(
            "`scorer='bm25'` needs the tokenizer of the index to compare texts. Pass it as `processing_class`."
        )
    else:
        raise ValueError(
            "`scorer='bm25'` compares texts, but this index holds none of its examples: neither their tokens (`input_ids`) nor"
            " one or two columns of their texts"
            + (" (it was published with `redact_text`)." if reader.config.get("redacted") else ".")
            + f" Its columns are {examples.column_names}. Search where it was recorded, or by gradients."
        )
    return LexicalIndex([[token for token in ids if token not in special] for ids in texts])


def text_query(record: Mapping[str, Any], tokenizer: Any) -> Query:
    """A record of [`check_queries`] as a text, answer and all."""
    if "input_ids" in record:
        ids = attended(record["input_ids"], record.get("attention_mask")).flatten()
        return Query({}, read_ids(tokenizer, ids.tolist()))
    kind = dialogue_kind(record)
    if kind is None:
        return Query({}, read_text(tokenizer, [record[name] for name in text_fields(record)]))
    parts = [record[name] for name in kind]
    texts = [part if isinstance(part, str) else "\n".join(str(one["content"]) for one in part) for part in parts]
    return Query({}, read_text(tokenizer, ["".join(texts)]))


class LexicalScorer:
    """
    BM25 of some queries with all examples; used as [`QueryScorer`] is.

    Args:
        index ([`LexicalIndex`]): The examples.
        queries (`Sequence[Query]`): Their readings hold the tokens.
        special_tokens (`Sequence[int]`): Tokens that are no words.
    """

    def __init__(self, index: LexicalIndex, queries: Sequence[Query], special_tokens: Sequence[int]) -> None:
        special = set(special_tokens)
        self.index, self.queries = index, list(queries)
        self._tokens = [
            index.known([token for token in query.reading.token_ids if token not in special]) for query in queries
        ]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Scores of some queries at a time `(n, num_examples)`, and before them the position of the first."""
        for start in range(0, len(self.queries), _BLOCK):
            scores = [self.index.scores(tokens) for tokens in self._tokens[start : start + _BLOCK]]
            yield start, np.stack(scores).astype(np.float32)

    def token_parts(self, query: int, example_ids: np.ndarray) -> TokenParts:
        """What each token adds to the scores of one query with some examples, as if at one checkpoint."""
        tokens, counts = np.unique(np.array(self._tokens[query], dtype=np.int64), return_counts=True)
        parts = np.zeros((len(example_ids), len(tokens)))
        for column, (token, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
            parts[:, column] = count * self.index.scores([token])[example_ids]
        by_example = [{int(tokens[at]): float(row[at]) for at in row.nonzero()[0]} for row in parts]
        return TokenParts(example_ids, tokens, parts[None], by_example)
