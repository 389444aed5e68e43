"""The answer of a search as a `datasets.Dataset`: one row for each query and example, with the words in between."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from hf_doge.tracing.html import render_fragment
from hf_doge.tracing.queries import TEXT_FIELDS, Query
from hf_doge.tracing.scoring import TokenParts
from hf_doge.tracing.words import word_parts

KINDS = ("proponent", "opponent")
NOT_SHOWN = ("example_id", "content_hash")

HIT_FEATURES = Features(
    {
        "query": Value("int64"),
        "rank": Value("int64"),
        "kind": Value("string"),
        "example_id": Value("int64"),
        "score": Value("float64"),
        "checkpoint_scores": List(Value("float64")),
        "special_token_share": Value("float64"),
        "words": List(Value("string")),
        "word_scores": List(Value("float64")),
        "token_ids": List(Value("int64")),
        "token_scores": List(Value("float64")),
        "example_token_ids": List(Value("int64")),
        "example_token_scores": List(Value("float64")),
        "hidden_token_ids": List(Value("int64")),
        "query_label": Value("float64"),
        "query_text": Value("string"),
        "query_token_ids": List(Value("int64")),
        "query_target": Value("string"),
    }
)


class Hits(Dataset):
    """
    The answer of a search: a `datasets.Dataset` that a notebook shows with its words shaded. What some of its methods return
    (`select`, `sort`, `map`) is a plain `Dataset`; [`InfluenceIndex.show`] shows that.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    text_columns: Sequence[str] = ()

    @classmethod
    def of(cls, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, columns: Sequence[str]) -> "Hits":
        """The rows, the tokenizer that tells their words, and the columns that hold the texts of the examples."""
        hits = cls(rows.data, info=rows.info, split=rows.split, fingerprint=rows._fingerprint)
        hits.tokenizer, hits.text_columns = tokenizer, columns
        return hits

    def _repr_html_(self) -> str | None:
        """What a notebook shows; that of any data set where columns of a hit were removed."""
        return None if missing_columns(self) else render_fragment(self, self.tokenizer, self.text_columns)


def missing_columns(hits: Any) -> list[str]:
    """The columns of a hit that something lacks; all of them where it is no data set."""
    known = {*HIT_FEATURES} - {"query_target"}  # hits of earlier versions have none
    return sorted(known - set(getattr(hits, "column_names", None) or ()))


def query_hits(
    position: int,
    query: Query,
    parts: TokenParts,
    special_tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    hidden: AbstractSet[int] = frozenset(),
) -> Iterator[dict[str, Any]]:
    """The rows of one query: proponents from the strongest on, then opponents likewise; `hidden` tokens make no words."""
    labels = query.features.get("labels")
    label = labels.item() if labels is not None and labels.numel() == 1 else None
    scores = parts.parts.sum(axis=(0, 2))
    special = np.isin(parts.tokens, list(special_tokens))
    for sign, kind in zip((1, -1), KINDS, strict=True):
        signed = np.flatnonzero(sign * scores > 0)
        order = signed[np.lexsort((parts.example_ids[signed], -sign * scores[signed]))]
        for rank, row in enumerate(order, start=1):
            by_token = parts.parts[:, row].sum(axis=0)
            shared = np.flatnonzero(parts.parts[:, row].any(axis=0))
            token_scores = dict(zip(parts.tokens[shared].tolist(), by_token[shared].tolist(), strict=True))
            told = {token: part for token, part in token_scores.items() if token not in hidden}
            words, word_scores = word_parts(query.reading, told, tokenizer=tokenizer, names=parts.layer_names)
            magnitudes = np.abs(by_token)
            yield {
                "query": position,
                "rank": rank,
                "kind": kind,
                "example_id": int(parts.example_ids[row]),
                "score": float(scores[row]),
                "checkpoint_scores": parts.parts[:, row].sum(axis=1).tolist(),
                "special_token_share": float(magnitudes[special].sum() / magnitudes.sum()),
                "words": words,
                "word_scores": word_scores,
                "token_ids": list(token_scores),
                "token_scores": list(token_scores.values()),
                "example_token_ids": list(parts.by_example[row]),
                "example_token_scores": list(parts.by_example[row].values()),
                "hidden_token_ids": sorted({*token_scores, *parts.by_example[row]} & hidden),
                "query_label": label,
                "query_text": query.reading.text,
                "query_token_ids": query.reading.token_ids,
                "query_target": query.target,
            }


def make_hits(rows: Sequence[Mapping[str, Any]], examples: Dataset, tokenizer: PreTrainedTokenizerBase | None) -> Hits:
    """
    Hits, with whatever the index knows of their examples, one row for each hit, next to them.

    Examples of which the index keeps no text get the one that their tokens decode to.
    """
    kept = text_columns(examples.features)
    if tokenizer is not None and "input_ids" in examples.column_names and "text" not in examples.column_names:
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in examples["input_ids"]]
        examples = examples.add_column("text", texts, feature=Value("string"))
    columns = {name: [row[name] for row in rows] for name in HIT_FEATURES}
    return Hits.of(add_example_columns(Dataset.from_dict(columns, features=HIT_FEATURES), examples), tokenizer, kept)


def add_example_columns(rows: Dataset, examples: Dataset) -> Dataset:
    """Add the columns of as many examples to rows; where a name is taken, `example_` goes before it."""
    shown = examples.select_columns([name for name in examples.column_names if name not in NOT_SHOWN])
    if not shown.column_names:
        return rows
    names = {*rows.column_names, *shown.column_names}
    taken = {}
    for name in sorted(set(shown.column_names) & set(rows.column_names)):
        free = f"example_{name}"
        while free in names:
            free = f"example_{free}"
        taken[name] = free
        names.add(free)
    return concatenate_datasets([rows, shown.rename_columns(taken)], axis=1)


def text_columns(features: Features) -> list[str]:
    """Columns of the examples that hold what the model read."""
    strings = [name for name in features if getattr(features[name], "dtype", None) in ("string", "large_string")]
    for names in TEXT_FIELDS:
        if set(names) <= set(strings):
            return list(names)
    left = [name for name in strings if name != "content_hash" and not name.endswith(("_name", "source", "domain"))]
    return left if len(left) <= 2 else []
