"""How many tokens a row is trained on."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import datasets

IGNORED_LABEL = -100  # a label that no loss counts
COLUMNS = ("labels", "input_ids")  # the first of them that a row has tells
TEXTS = "seq_lengths"  # how long each text of a row is, where trl has packed several
MASKS = ("completion_mask", "assistant_masks")  # of the tokens that a collator leaves labels of


def count_row_tokens(dataset: "datasets.Dataset", *, shift: int = 0) -> np.ndarray:
    """
    Tokens that each row is trained on: its `labels` that count, or else its `input_ids`, read from the table as it is stored. Of
    rows that trl has packed, `seq_lengths` tell where texts begin.

    Args:
        dataset (`datasets.Dataset`): Tokenised, before it is padded by a collator.
        shift (`int`): 1 where the first token of a row is not predicted, as in causal models; else 0.

    Returns:
        `np.ndarray` of `int64` and shape `(num_rows,)`.

    Raises:
        `ValueError`: if the rows have neither, or go through a transform, whose rows may have other tokens.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            "Weights in tokens count the tokens of rows as they are stored, but the rows go through a transform. Apply it with "
            "`map` before, or set `unit='examples'`."
        )
    for name in COLUMNS:
        if name in dataset.column_names:
            _refuse_masks(name, dataset.column_names)
            table = dataset.with_format("arrow").data
            column = table.column(name)
            if is_list(column.type) and is_list(column.type.value_type):
                raise nested(name)
            if _holds_tokens(column.type):
                if TEXTS in dataset.column_names:
                    packed = pa.table({"tokens": column, "texts": table.column(TEXTS)}).to_batches()
                    parts = [_count_texts(rows["tokens"], rows["texts"], name == "labels", shift) for rows in packed]
                else:
                    parts = [_count(part, name == "labels", shift) for part in column.chunks]
                found = np.concatenate([*parts, np.zeros(0, np.int64)])
                order = dataset._indices
                return found if order is None else found[order.column(0).to_numpy()]
    raise lengthless(dataset.column_names)


def count_example_tokens(example: Mapping[str, Any]) -> int:
    """Tokens that an example of a stream is trained on, by the same rule; the first token counts."""
    for name in COLUMNS:
        tokens = example.get(name)
        if tokens is not None and np.ndim(tokens) > 1:
            raise nested(name)
        if tokens is not None and np.ndim(tokens) == 1:
            _refuse_masks(name, example)
            counted = np.asarray(tokens)
            return int((counted != IGNORED_LABEL).sum()) if name == "labels" else len(counted)
    raise lengthless(list(example))


def _refuse_masks(name: str, column_names: Iterable[str]) -> None:
    masks = [mask for mask in MASKS if mask in column_names]
    if name != "labels" and masks:
        raise ValueError(
            f"Weights in tokens count the tokens that are trained on, which `labels` tell, but rows have {masks} and no `labels`. "
            "Add `labels` that are -100 where a token is not trained on, or set `unit='examples'`."
        )


def lengthless(column_names: list[str] | None) -> ValueError:
    """The error of rows that tell no number of tokens."""
    return ValueError(
        "Weights in tokens need rows whose tokens can be counted, with a list of `labels` or `input_ids` in each, but the columns "
        f"are {column_names}. Tokenise the data before, or set `unit='examples'`."
    )


def nested(name: str) -> ValueError:
    """The error of rows that have several tokens at a position."""
    return ValueError(
        f"Weights in tokens need rows whose `{name}` are one list of tokens, but they are lists of lists. Set `unit='examples'`."
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether each row of a column of this type has a list, in whichever way Arrow keeps it."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _holds_tokens(kind: pa.DataType) -> bool:
    return is_list(kind) and pa.types.is_integer(kind.value_type)


def _count(rows: pa.Array, are_labels: bool, shift: int) -> np.ndarray:
    """Tokens of each row of a chunk."""
    lengths = pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not are_labels:
        return np.maximum(lengths - shift, 0)
    counted = pc.fill_null(pc.list_flatten(rows), IGNORED_LABEL).to_numpy(zero_copy_only=False) != IGNORED_LABEL
    ends = np.cumsum(lengths)
    starts = ends - lengths
    sums = np.append(0, np.cumsum(counted))
    first = np.minimum(starts + shift, ends)
    return sums[ends] - sums[first]


def _count_texts(rows: pa.Array, texts: pa.Array, are_labels: bool, shift: int) -> np.ndarray:
    """Tokens of each row of texts, shape `(num_rows,)`, each text counted by itself."""
    lengths = pc.list_flatten(texts).to_numpy(zero_copy_only=False)
    tokens = pa.LargeListArray.from_arrays(np.append(0, np.cumsum(lengths)), pc.list_flatten(rows))
    sums = np.append(0, np.cumsum(_count(tokens, are_labels, shift)))
    ends = np.cumsum(pc.list_value_length(texts).to_numpy(zero_copy_only=False))
    return np.diff(sums[np.append(0, ends)])
