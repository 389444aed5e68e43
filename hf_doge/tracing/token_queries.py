"""Queries that are no plain texts: batches taken apart, tokens and ids that the model has, and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_doge.checks import show

LABEL_FIELDS = ("labels", "label", "label_ids")


def split_batch(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The queries of a batch; what is not one value per query goes to each."""
    ids = batch.get("input_ids")
    alone = isinstance(ids, Tensor | np.ndarray | Sequence) and len(ids) > 0 and np.ndim(ids[0]) == 0
    if batch.get("inputs_embeds") is not None or ids is None or alone:
        return [dict(batch)] if batch else []
    size = len(ids)
    return [
        {
            name: value[position] if _has_lines(value, size) else value
            for name, value in batch.items()
            if value is not None
        }
        for position in range(size)
    ]


def _has_lines(value: Any, size: int) -> bool:
    """Whether a value of a batch has one line per query."""
    return isinstance(value, Tensor | np.ndarray | Sequence) and np.ndim(value) > 0 and len(value) == size


def attended(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that a mask of their shape keeps, `(num_kept,)`; without such a mask all of them, as they are."""
    return ids if mask is None or mask.shape != ids.shape else ids[mask.bool()]


def without_left_padding(record: Mapping[str, Any]) -> dict[str, Any]:
    """
    A query of tokens without the positions before the first that its mask keeps: those of a text begin at 0, and a model
    that is given none counts them from the padding on.
    """
    ids, mask = record["input_ids"], record.get("attention_mask")
    if mask is None or ids.ndim != 1 or mask.shape != ids.shape:
        return dict(record)
    first = int(mask.nonzero()[0])
    return {
        name: value[first:] if isinstance(value, Tensor) and _is_by_position(name, value, ids) else value
        for name, value in record.items()
    }


def _is_by_position(name: str, value: Tensor, ids: Tensor) -> bool:
    """Whether there is one value for each token; labels that are fractions are one for each class."""
    return value.shape[:1] == ids.shape and not (name == "labels" and value.is_floating_point())


def check_tokens(records: Sequence[Mapping[str, Any]], vocabulary_size: int) -> list[dict[str, Any]]:
    """
    Returns:
        `list[dict]`: the queries, without padding on the left.

    Raises:
        ValueError: A query has no token, one out of the vocabulary, or a mask of another shape or of other numbers than 0 and
            1; or a decoder is given other positions than it has labels.
    """
    for position, record in enumerate(records):
        ids, mask = record["input_ids"], record.get("attention_mask")
        _check_mask("attention_mask", mask, ids, position, of="input_ids")
        masked = isinstance(mask, Tensor) and mask.numel() > 0 and not bool(mask.any())
        if masked or (isinstance(ids, Tensor) and ids.numel() == 0):
            raise ValueError(f"Every query must have tokens, but query {position} has none. Drop it.")
        _check_ids(ids, vocabulary_size, position)
        given, labels = record.get("decoder_input_ids"), record.get("labels")
        if given is not None:
            _check_ids(given, vocabulary_size, position)
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            if isinstance(given, Tensor) and given.ndim == 1 and given.shape != labels.shape:
                raise ValueError(
                    f"The `decoder_input_ids` of query {position} must be one for each of its {len(labels)} labels, but are "
                    f"{len(given)}. Leave them out, and the model makes them of the labels."
                )
            _check_mask("decoder_attention_mask", record.get("decoder_attention_mask"), labels, position, of="labels")
    return [without_left_padding(record) for record in records]


def _check_mask(name: str, mask: Any, ids: Any, position: int, *, of: str) -> None:
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor):
        return
    if mask.ndim == ids.ndim and mask.shape != ids.shape:
        raise ValueError(
            f"The `{name}` of query {position} must have the shape of its `{of}`, {tuple(ids.shape)}, "
            f"but its shape is {tuple(mask.shape)}."
        )
    if mask.ndim == 1 and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"The `{name}` of query {position} must hold 0 and 1 alone, but is {show(mask.tolist())}. Give 1 to each token"
            " that the model reads, and 0 to padding."
        )


def _check_ids(ids: Any, vocabulary_size: int, position: int) -> None:
    whole = isinstance(ids, Tensor) and ids.ndim > 0 and ids.dtype != torch.bool and not ids.is_floating_point()
    if not whole or (ids.numel() > 0 and not 0 <= ids.min() <= ids.max() < vocabulary_size):
        found = f"{ids.min().item()} to {ids.max().item()}" if isinstance(ids, Tensor) else f"{ids!r:.80}"
        raise ValueError(
            f"Tokens of queries must be whole numbers from 0 to {vocabulary_size - 1}, the vocabulary of the index, "
            f"but query {position} has {found}. Tokenise them with the tokenizer of the recorded model."
        )


def dataset_records(dataset: Dataset) -> list[dict[str, Any]]:
    """The rows of a dataset; of a tokenised one without its texts."""
    if "input_ids" in dataset.column_names:
        texts = ("string", "large_string")
        for_people = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", None) in texts]
        dataset = dataset.remove_columns([name for name in for_people if name not in LABEL_FIELDS])
    return dataset.with_format(None).to_list()


def label_tensor(label: Any) -> Tensor:
    """A label, or labels, of numbers."""
    try:
        return torch.as_tensor(str(label) if isinstance(label, complex) else label)  # torch would take that too
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"The label of a query must be a number, numbers or a name, but got {show(label)}."
        ) from error
