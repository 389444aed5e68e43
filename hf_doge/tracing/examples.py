"""The training examples as the index shows them: one row each, with an id, a checksum and what a person can read."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator

from hf_doge.sampling.lengths import is_list
from hf_doge.tracing.batches import column_names
from hf_doge.tracing.models import content_hash

IGNORE_INDEX = -100
LABEL_COLUMNS = ("labels", "label", "label_ids")  # what transformers' collators make `labels` of

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Examples:
    """
    Training examples twice: as they are collated, and as a person reads them.

    Attributes:
        recorded (`Dataset`): With `input_ids`, and no column that the collator cannot take.
        described (`Dataset`): The same examples in the same order, with columns to keep.
    """

    recorded: Any
    described: Any

    def __len__(self) -> int:
        return len(self.recorded)


def choose_examples(given: Any | None, loaded: Any) -> Examples:
    """
    What to record, and where to take the readable columns from.

    Args:
        given (`Dataset`, *optional*):
            What the user gave to the callback. With `input_ids` it is recorded itself; without, it says what the rows
            of `loaded` looked like before they were tokenised.
        loaded (`Dataset`): The dataset of the Trainer's dataloader, whose unused columns are gone already.

    Raises:
        ValueError: if neither has a length, or the two do not belong together.
        TypeError: if `given` is a dict of datasets.
    """
    if isinstance(given, Mapping):
        raise TypeError(
            f"`dataset` must be one dataset, but got a {type(given).__name__} of {list(given)}. Join its datasets in the order of the "
            "Trainer's: `dataset=datasets.concatenate_datasets(list(train.values()))`."
        )
    streaming = isinstance(loaded, torch.utils.data.IterableDataset) or not hasattr(loaded, "__getitem__")
    if given is None and streaming:
        raise ValueError(
            "The examples to record must have a known number and order, but the Trainer trains on a stream"
            f" ({type(loaded).__name__}). Pass `dataset=`: a tokenised dataset of known length, such as the part of the"
            " stream that you want to trace predictions to."
        )
    dataset = loaded if given is None else given
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(f"`dataset` must have a known length, but got a {type(dataset).__name__}. Materialise it.")
    if len(dataset) == 0:
        raise ValueError("The dataset to record must have examples, but it is empty. Pass one that is not.")
    if given is None or "input_ids" in column_names(given):
        return Examples(_prune(dataset, loaded), dataset)
    if streaming or len(given) != len(loaded):
        raise ValueError(
            "`dataset` must hold `input_ids`, or the same examples as the Trainer's dataset before it was tokenised, but"
            f" its columns are {list(column_names(given))} and it has {len(given)} rows"
            + ("." if streaming else f", not {len(loaded)}.")
            + " Pass the tokenised dataset, with the columns to keep."
        )
    return Examples(loaded, given)


def has_texts(dataset: Any) -> bool:
    """Whether a column of a dataset holds texts, names or what else a person reads."""
    if isinstance(dataset, Dataset):
        return any(_has_text(kind) for kind in _schema(dataset)[1])
    first = dataset[0]
    return not isinstance(first, Mapping) or any(isinstance(value, str) for value in first.values())


def prune_columns(dataset: Any, model: torch.nn.Module) -> Any:
    """Only the columns that the model takes, and labels under any of their names, as the Trainer prunes them."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    accepted = {*inspect.signature(inner.forward).parameters, *LABEL_COLUMNS}
    if isinstance(dataset, list):
        return [{name: item[name] for name in item if name in accepted} for item in dataset]
    if not isinstance(dataset, Dataset):
        return dataset
    return dataset.select_columns([name for name in dataset.column_names if name in accepted])


def padding_collator(
    tokenizer: Any, *, pad_token_id: int | None = None, vocabulary_size: int | None = None
) -> Callable:
    """
    The Trainer's default; with a tokenizer it pads, labels of tokens too.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): One without a padding token pads with any other: masks tell.
        pad_token_id (`int`, *optional*): Of the model, for such a tokenizer.
        vocabulary_size (`int`, *optional*): How many tokens the model knows; a padding token beyond is none.
    """
    if not hasattr(tokenizer, "pad"):
        return default_data_collator
    known = range(len(tokenizer) if vocabulary_size is None else vocabulary_size)
    if getattr(tokenizer, "pad_token_id", 0) not in known:
        tokenizer = copy.deepcopy(tokenizer)
        candidates = (pad_token_id, tokenizer.eos_token_id, 0)
        padding = next(one for one in candidates if one in known)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return _PaddingCollator(tokenizer)


class _PaddingCollator:
    def __init__(self, tokenizer: Any) -> None:
        self._by_example = DataCollatorWithPadding(tokenizer)
        self._by_token = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, examples: list[dict[str, Any]]) -> Mapping[str, Any]:
        labels = np.asarray(examples[0].get("labels"))
        # Fractions are of the classes of an example, however many tokens it has.
        are_fractions = labels.dtype.kind == "f" and labels.size  # of no labels no kind is known
        return (self._by_token if labels.ndim and not are_fractions else self._by_example)(examples)


def _prune(dataset: Any, loaded: Any) -> Any:
    """Drop the columns that the Trainer dropped too: no collator could pad them."""
    if dataset is loaded or not (isinstance(dataset, Dataset) and isinstance(loaded, Dataset)):
        return dataset
    missing = sorted(set(loaded.column_names) - set(dataset.column_names))
    if missing:
        raise ValueError(
            f"`dataset` must have the columns that the Trainer feeds the model, but {missing} are missing. Tokenise it"
            " as the training dataset was."
        )
    return dataset.select_columns(loaded.column_names)


def describe_examples(
    examples: Examples,
    *,
    vocabulary_size: int,
    num_positions: int | None = None,
    num_classes: int | None = None,
    label_law: Callable[[np.ndarray, int], str | None] = lambda labels, num_tokens: None,
    keep_ids: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> pa.Table:
    """
    The `examples` table of an index.

    Columns: `example_id` (0, 1, ... in the order of the dataset), `content_hash` (of the token ids and labels without
    padding: equal for equal examples, which stay two examples), every described column that a person can read (text,
    numbers, the domain, the label and, for a `ClassLabel`, its name as `<column>_name`), and `input_ids` without padding
    where no column has texts of more than a word, as the name of a domain is, or `keep_ids`.

    Args:
        examples ([`Examples`]): All of them.
        vocabulary_size (`int`): Number of rows of the embedding matrix.
        num_positions (`int`, *optional*): How many tokens the model has room for, if that is limited.
        num_classes (`int`, *optional*): Of how many the label of an example must be one.
        label_law (`Callable`): What is wrong with the labels of an example of so many tokens, from [`label_law`].
        keep_ids (`bool`): Whether to have `input_ids` in any case.
        heartbeat (`Callable`): Called every now and then.

    Returns:
        `pyarrow.Table`: one row per example.

    Raises:
        ValueError: if an example has no token, no label that counts, too many tokens, or tokens or a label that the model
            does not know, or the dataset has an `example_id` of its own that differs.
    """
    columns = _readable_columns(examples.described)
    keep_ids = keep_ids or not any(_is_prose(column) for column in columns.values())
    columns |= _label_names(examples.described, columns)
    hashes, token_ids, silent = [], [], []
    for position, (ids, labels) in enumerate(_unpadded_examples(examples.recorded)):
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= vocabulary_size:
            raise ValueError(
                f"Example {position} must have tokens from 0 to {vocabulary_size - 1}, the rows of the embedding matrix,"
                f" but has {f'{ids.min()} to {ids.max()}' if len(ids) else 'none'}. Tokenise with the model's tokenizer,"
                " and drop empty texts."
            )
        if num_positions is not None and len(ids) > num_positions:
            raise ValueError(
                f"Example {position} must fit into the model, but it has {len(ids)} tokens and the model has positions for"
                f" {num_positions}. Tokenise with `truncation=True`, as for training."
            )
        fits = labels is None or _is_class(labels, num_classes) or _is_one_of_each(labels, num_classes)
        if num_classes is not None and labels is not None and not fits:
            raise ValueError(
                f"The label of example {position} must be a whole number from 0 to {num_classes - 1}, the classes of the"
                f" model, but got {labels.tolist()}."
            )
        wrong = None if labels is None or not labels.ndim else label_law(labels, len(ids))
        if wrong is not None:
            raise ValueError(f"The labels of example {position} must {wrong}. Label the examples as for training.")
        if labels is not None and labels.ndim and labels.dtype.kind in "iu" and (labels == IGNORE_INDEX).all():
            silent.append(position)
        hashes.append(content_hash(ids, *([] if labels is None else [labels])))
        if keep_ids:
            token_ids.append(pa.array(ids.astype(np.int32)))
        if position % _ROWS_AT_ONCE == 0:
            heartbeat()
    if silent:
        raise ValueError(
            f"Every example must have a label that counts, but examples {silent[:10]} ({len(silent)} in all) have none but"
            f" {IGNORE_INDEX}. Drop them, or pass a `dataset=` without them."
        )
    _check_own_ids(columns.pop("example_id", None), len(hashes))
    columns.pop("content_hash", None)
    table = {
        "example_id": pa.array(np.arange(len(hashes), dtype=np.int64)),
        "content_hash": pa.array(hashes),
        **columns,
    }
    if keep_ids:
        offsets = np.cumsum([0] + [len(ids) for ids in token_ids], dtype=np.int64)
        table["input_ids"] = pa.LargeListArray.from_arrays(offsets, pa.concat_arrays(token_ids))
    return pa.table(table)


def count_tokens(dataset: Any, *, heartbeat: Callable[[], None] = lambda: None) -> np.ndarray:
    """
    How many distinct tokens each example has.

    Args:
        dataset (`Dataset`): With `input_ids`.
        heartbeat (`Callable`): Called every now and then.

    Returns:
        `numpy.ndarray` of shape `(num_examples,)` and dtype int64.
    """
    counts = np.empty(len(dataset), dtype=np.int64)
    for position, (ids, _) in enumerate(_unpadded_examples(dataset)):
        counts[position] = len(set(ids.ravel().tolist()))
        if position % _ROWS_AT_ONCE == 0:
            heartbeat()
    return counts


def _is_one_of_each(labels: np.ndarray, num_classes: int | None) -> bool:
    """Whether labels are fractions, one for each class, which models take for several classes at once unless told."""
    return labels.dtype.kind == "f" and labels.shape == (num_classes,)


def _is_class(label: np.ndarray, num_classes: int | None) -> bool:
    return (
        num_classes is not None and label.size == 1 and label.dtype.kind in "biu" and 0 <= label.item() < num_classes
    )


def _check_own_ids(column: pa.ChunkedArray | None, num_examples: int) -> None:
    if column is None:
        return
    ids = column.to_pylist()
    repeated = sorted({example_id for example_id in ids if ids.count(example_id) > 1}) if len(ids) < 1000 else []
    if not repeated and len(set(ids)) < len(ids):
        seen: set = set()
        for example_id in ids:
            if example_id in seen:
                repeated.append(example_id)
            seen.add(example_id)
    if ids != list(range(num_examples)):
        raise ValueError(
            "`example_id` must be the position of the example, 0, 1, ..., but the dataset has a column of this name with "
            + (f"{repeated[:5]} more than once." if repeated else "other values.")
            + " Rename it, to `source_id` say: it is then kept next to ours."
        )


def _readable_columns(dataset: Any) -> dict[str, pa.ChunkedArray | pa.Array]:
    if not isinstance(dataset, Dataset):
        return _readable_items(dataset)
    names = [name for name, kind in zip(*_schema(dataset), strict=True) if _is_readable(kind)]
    if not names:
        return {}
    table = dataset.select_columns(names).with_format("arrow")[:]
    return {name: table.column(name) for name in names}


def _label_names(dataset: Any, columns: Mapping[str, pa.ChunkedArray]) -> dict[str, pa.Array]:
    """What the numbers of a `ClassLabel` are called."""
    features = dataset.features if isinstance(dataset, Dataset) else {}
    return {
        f"{name}_name": pa.array(
            [None if label is None or label < 0 else features[name].names[label] for label in column.to_pylist()],
            pa.string(),
        )
        for name, column in columns.items()
        if isinstance(features.get(name), ClassLabel) and f"{name}_name" not in columns
    }


def _schema(dataset: Dataset) -> tuple[list[str], list[pa.DataType]]:
    schema = dataset.features.arrow_schema
    return schema.names, schema.types


def _readable_items(dataset: Any) -> dict[str, pa.Array]:
    """The text and numbers among the items of a dataset that has no columns."""
    first = dataset[0]
    names = [key for key in first if isinstance(_plain(first[key]), str | int | float | bool)]
    items = [dataset[position] for position in range(len(dataset))] if names else []
    return {name: pa.array([_plain(item.get(name)) for item in items]) for name in names}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0 else value


def _is_readable(kind: pa.DataType) -> bool:
    number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return number or pa.types.is_temporal(kind) or _has_text(kind)


def _is_prose(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether a column holds texts, rather than names of one word."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return _has_text(column.type)
    return bool(pc.any(pc.match_substring_regex(column, r"\S\s+\S")).as_py())


def _has_text(kind: pa.DataType) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    if pa.types.is_struct(kind):
        return any(_has_text(field.type) for field in kind)
    if is_list(kind):
        return _has_text(kind.value_type)
    return False


def _unpadded_examples(dataset: Any) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Token ids and labels of each example, one after the other."""
    for item in _items(dataset):
        if item.get("input_ids") is None:
            raise ValueError(
                f"The examples must hold `input_ids`, but an example has {sorted(item)}. TracIn-WE needs to know which"
                " tokens were read: train on a tokenised dataset, and pass that (or the same rows with their text) as `dataset`."
            )
        ids = np.asarray(item["input_ids"])
        labels = next((np.asarray(item[name]) for name in LABEL_COLUMNS if item.get(name) is not None), None)
        mask = item.get("attention_mask")
        counted = np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
        if counted.shape != ids.shape:
            counted = np.ones(ids.shape, bool)
        if labels is not None and labels.ndim:
            if labels.shape == ids.shape:
                labels = labels[counted]
            elif labels.ndim == 1 and labels.dtype.kind in "iu":
                labels = _without_ignored_end(labels)
        yield ids[counted], labels


def _without_ignored_end(labels: np.ndarray) -> np.ndarray:
    labelled = np.flatnonzero(labels != IGNORE_INDEX)
    return labels[: labelled[-1] + 1] if len(labelled) else labels


def _items(dataset: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names and dataset.format["type"] != "custom":
        wanted = {"input_ids", "attention_mask", *LABEL_COLUMNS} & set(dataset.column_names)
        for table in dataset.select_columns(sorted(wanted)).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            columns = {name: _split(table.column(name)) for name in table.column_names}
            for row in range(table.num_rows):
                yield {name: values[row] for name, values in columns.items()}
    else:
        for position in range(len(dataset)):
            yield dataset[position]


def _split(column: pa.ChunkedArray) -> list:
    """One NumPy array or number per row."""
    array = column.combine_chunks()
    has_offsets = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if not has_offsets or pa.types.is_nested(array.type.value_type) or array.null_count:
        return array.to_pylist()
    return np.split(array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy())[1:-1]
