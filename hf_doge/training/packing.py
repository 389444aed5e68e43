"""
Texts that are packed: several in one row of the data, by trl, and all examples of a batch end to end in one line, by a collator
that does not pad (`padding_free`, `DataCollatorWithFlattening`). Which domain a token is of stays known.

Shapes: B = examples of a batch (rows of the data, of one text or several), N = tokens of a line.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer

from hf_doge.sampling.lengths import IGNORED_LABEL

EXAMPLE_LENGTHS = "example_lengths"  # tokens of each example of a line, `(B,)`; the model does not take them

if TYPE_CHECKING:
    _Trainer = Trainer  # whose methods a mixin overrides, as type checkers must know
else:
    _Trainer = object


class LengthsCollator:
    """Calls a collator that lays the examples end to end, and hands on beside its batch how long each of them is."""

    def __init__(self, collator: Callable[[list], Any]) -> None:
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # not there yet while a worker unpickles
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate a list of examples."""
        batch = self.collator(features)
        return {**batch, **lengths_in_line(features, batch)}


def with_lengths(collator: Any) -> Any:
    """The collator, or one that calls it and hands on the lengths of the examples if it lays them end to end."""
    inner = getattr(collator, "collator", collator)
    is_flat = getattr(inner, "padding_free", False) or isinstance(inner, DataCollatorWithFlattening)
    return LengthsCollator(collator) if is_flat else collator


def lengths_in_line(features: list[Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tokens of each example, as an entry of a batch, where they lie end to end in one line; else nothing."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1 or "attention_mask" in batch:
        return {}
    lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
    return {EXAMPLE_LENGTHS: lengths} if "position_ids" in batch and lengths.sum() <= ids.numel() else {}


def without_lengths(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model takes."""
    return {name: value for name, value in inputs.items() if name != EXAMPLE_LENGTHS}


def owners_in_line(owners: Tensor, lengths: Tensor, num_tokens: int, *, nobody: int) -> Tensor:
    """Whose each token is, shape `(num_tokens,)`, from whose each example is, shape `(B,)`; `nobody` for padding at the end."""
    lengths = lengths.to(owners.device)
    rest = (num_tokens - lengths.sum()).unsqueeze(0)
    owners = torch.cat([owners, owners.new_tensor([nobody])])
    return torch.repeat_interleave(owners, torch.cat([lengths, rest]), output_size=num_tokens)


def pick_from_line(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """
    Some of the examples of a line, as a line: what the collator would have made of them.

    Args:
        inputs (`Mapping[str, Any]`): With [`EXAMPLE_LENGTHS`] and `position_ids` of shape `(1, N)`.
        rows (`torch.Tensor` of shape `(num_picked,)`): Which, in which order.
    """
    lengths, num_tokens = inputs[EXAMPLE_LENGTHS].cpu(), inputs["position_ids"].shape[1]
    starts = lengths.cumsum(0) - lengths
    places = torch.cat([torch.arange(starts[row], starts[row] + lengths[row]) for row in rows.tolist()])
    picked = {
        name: value[:, places.to(value.device)]
        if torch.is_tensor(value) and value.shape[:2] == (1, num_tokens)
        else value
        for name, value in inputs.items()
    }
    picked[EXAMPLE_LENGTHS] = lengths[rows]
    return {**picked, **_bounds(picked)}


def text_starts(position_ids: Tensor) -> Tensor:
    """Where in a line, shape `(1, N)`, a text begins: bool of shape `(N,)`."""
    positions = position_ids.flatten()
    return torch.cat([positions.new_ones(1, dtype=torch.bool), positions[1:] != positions[:-1] + 1])


def check_line(inputs: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a text of a line would be predicted from the text before it."""
    labels = inputs.get("labels")
    if labels is not None and bool(labels.flatten()[text_starts(inputs["position_ids"])][1:].ne(-100).any()):
        raise ValueError(
            "The first token of each text of a line must have the label -100, since it is not to be predicted from the text "
            "before, but some have another. Use a data collator that sets it, as trl's with `padding_free=True` does."
        )


def _bounds(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch tells of where its texts begin, for attention kernels, made again from its `position_ids`."""
    starts = text_starts(inputs["position_ids"])
    first = starts.nonzero().flatten()
    bounds = torch.cat([first, first.new_tensor([len(starts)])])
    longest, order = int(bounds.diff().max()), starts.cumsum(0)[None] - 1
    made = {f"cu_seq_lens_{side}": bounds for side in "qk"} | {"seq_idx": order}
    found = {name: value.to(inputs[name]) for name, value in made.items() if name in inputs}
    return found | {f"max_length_{side}": longest for side in "qk" if f"max_length_{side}" in inputs}


def _has_masked_labels(rows: Dataset) -> bool:
    """Whether rows are tokenised and some of their tokens have no loss."""
    if "labels" not in rows.column_names:
        return False
    batches = rows.with_format("arrow").select_columns("labels").iter(batch_size=1000)
    return any(pc.any(pc.equal(pc.list_flatten(batch["labels"]), IGNORED_LABEL)).as_py() for batch in batches)


class PackingMixin(_Trainer):
    """Lets trl's SFTTrainer pack each domain by itself, so that a packed row is of one domain."""

    _domain_column: str

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As trl's SFTTrainer prepares data, domain by domain where it packs: packing drops all other columns."""
        prepare: Callable = super()._prepare_dataset  # type: ignore[misc]
        packs = signature(prepare).bind(dataset, *args, **kwargs).arguments.get("packing", False)
        column = self._domain_column
        if not packs or not isinstance(dataset, Dataset) or column not in dataset.column_names:
            return prepare(dataset, *args, **kwargs)
        labels = np.array(dataset.with_format(None).select_columns(column)[:][column], dtype=object)
        packed: list[Dataset] = []
        for label in dict.fromkeys(labels):
            rows = dataset.select(np.flatnonzero(labels == label)).remove_columns(column)
            part = prepare(rows, *args, **kwargs)
            if "labels" not in part.column_names and _has_masked_labels(rows):
                raise ValueError(
                    "Tokens without a loss must stay without one, but the trainer drops the `labels` of what it packs, as trl "
                    "0.26 does. Update trl, or leave `packing` out."
                )
            packed.append(part.add_column(column, [label] * len(part), feature=dataset.features[column]))
        return concatenate_datasets(packed)
