"""The token ids of a dataset or a stream, a few rows at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hf_doge.sampling.lengths import IGNORED_LABEL, is_list

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

ROWS_AT_A_TIME = 1_000

# Token ids of some rows one after the other, and whether each is the first of its row and counts: three arrays of one length.
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


def iterate_tokens(
    dataset: "Dataset | IterableDataset",
    name: str,
    *,
    processing_class: Callable[..., Mapping] | None = None,
    text_column: str = "text",
    only_labels: bool = False,
) -> Iterator[Tokens]:
    """
    Read the token ids of a dataset or stream.

    Args:
        dataset (`Dataset` or `IterableDataset`): With a column `input_ids`, or one of text.
        name (`str`): What to call it in errors.
        processing_class (`Callable`, *optional*): The tokenizer; it tokenises the texts of a dataset without `input_ids`.
        text_column (`str`): Where the texts are.
        only_labels (`bool`): Count only tokens whose label is not -100, where a column `labels` has one for each token.

    Yields:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: token ids, `int64`; whether a token is the first of its row; whether
            it counts. All of shape `(num_tokens,)`. Padding (`attention_mask` 0) is left out.

    Raises:
        ValueError: There are no tokens to read; names the dataset and the columns that it has.
    """
    for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_A_TIME):
        if "input_ids" in table.column_names:
            yield _read_rows(table, name, only_labels)
        elif text_column in table.column_names and processing_class is not None:
            texts = table.column(text_column).to_pylist()
            # `verbose=False`: a document longer than the model's context is no mistake here.
            rows = processing_class(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            lengths = np.array([len(row) for row in rows["input_ids"]])
            ids = np.fromiter((token for row in rows["input_ids"] for token in row), np.int64, count=lengths.sum())
            yield ids, _first_of_rows(lengths), np.ones(len(ids), dtype=bool)
        else:
            raise ValueError(
                f"{name} must have a column 'input_ids', or {text_column!r} and a `processing_class` to tokenise it, but "
                f"its columns are {table.column_names}. Tokenise it, or pass `processing_class` and `text_column`."
            )


def _read_rows(table: pa.Table, name: str, only_labels: bool) -> Tokens:
    ids, lengths = _flatten(table.column("input_ids"), name)
    masks = {}
    for column, ignored in (("attention_mask", 0), ("labels", IGNORED_LABEL)):
        masks[column] = np.ones(len(ids), dtype=bool)
        if column == "labels" and (not only_labels or not _are_of_tokens(table)):
            continue
        if column in table.column_names:
            values, others = _flatten(table.column(column), name)
            if not np.array_equal(others, lengths):
                raise ValueError(f"{name} must have as many {column!r} as 'input_ids' in every row, but it does not.")
            masks[column] = values != ignored
    kept = masks["attention_mask"]
    rows = np.repeat(np.arange(len(lengths)), lengths)[kept]
    return ids[kept], _first_of_rows(np.bincount(rows, minlength=len(lengths))), masks["labels"][kept]


def _are_of_tokens(table: pa.Table) -> bool:
    """Whether labels are of tokens, not of whole texts as a classifier's are, one number a row."""
    return "labels" in table.column_names and is_list(table.schema.field("labels").type)


def _flatten(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all rows one after the other, `int64`, and how many each row has."""
    kind = column.type
    if not is_list(kind):
        raise ValueError(f"{name} must hold lists of token ids, but a column is {kind}. Tokenise it.")
    if column.null_count or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{name} must hold a list of whole numbers in every row, but a column is {kind} or has none.")
    lengths = pa.compute.list_value_length(column).to_numpy()
    flat = pa.compute.list_flatten(column).to_numpy()
    return flat.astype(np.int64, copy=False), lengths


def _first_of_rows(lengths: np.ndarray) -> np.ndarray:
    first = np.zeros(int(lengths.sum()), dtype=bool)
    starts = np.cumsum(lengths) - lengths
    first[starts[lengths > 0]] = True
    return first
