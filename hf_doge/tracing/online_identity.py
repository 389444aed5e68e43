"""
Which examples a batch holds: their positions in the dataset ride in the batch itself.

The position of an example and its content come out of one read of the dataset, so no sampler, shard, prefetching worker
or skipped batch can part them, and equal examples stay apart. What is swapped are two attributes of the train
DataLoader, which the Trainer makes for each training; the dataset, the collator and the sampler stay as they are.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

EXAMPLE_IDS = "hf_doge_example_ids"  # the key of a batch under which they ride

# Per process that collates: enough to see a collator that sorts.
_NUM_CHECKED_BATCHES = 16
_NUM_CHECKED_LINES = 8


class IdentifiedDataset(Dataset):
    """A view of a dataset whose examples come as `(example_id, example)`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> object:
        if name == "dataset":  # not there yet while a worker unpickles
            raise AttributeError(name)
        return getattr(self.dataset, name)  # `set_epoch` and the like

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, example_id: int) -> tuple[int, object]:
        return range(len(self))[int(example_id)], self.dataset[example_id]

    def __getitems__(self, example_ids: Sequence[int]) -> list[tuple[int, object]]:
        if hasattr(self.dataset, "__getitems__"):
            examples = self.dataset.__getitems__(example_ids)
        else:
            examples = [self.dataset[example_id] for example_id in example_ids]
        positions = range(len(self))
        return [(positions[int(i)], example) for i, example in zip(example_ids, examples, strict=True)]


class IdentifyingCollator:
    """
    Collates examples of an [`IdentifiedDataset`] and adds their ids to the batch.

    Raises:
        ValueError: if the batch is no mapping, has not one line per example, or has them in another order.
    """

    def __init__(self, collate_fn: Callable[[list], object]) -> None:
        self.collate_fn = collate_fn
        self._num_checked = 0

    def __call__(self, identified: list[tuple[int, object]]) -> MutableMapping[str, Any]:
        example_ids = [example_id for example_id, _ in identified]
        examples = [example for _, example in identified]
        given = _input_ids(examples) if self._num_checked < _NUM_CHECKED_BATCHES else None
        batch = self.collate_fn(examples)
        if not isinstance(batch, MutableMapping) or not isinstance(batch.get("input_ids"), torch.Tensor):
            raise ValueError(
                "Batches must be mappings with a tensor of `input_ids`, but the data collator returns a "
                f"{type(batch).__name__}. Use a collator that does, or `record='checkpoint'`."
            )
        if len(batch["input_ids"]) != len(examples):
            raise ValueError(
                f"A batch must have one line per example, but {len(examples)} examples became `input_ids` of shape "
                f"{tuple(batch['input_ids'].shape)}. Turn off packing and padding-free collation."
            )
        if given is not None:
            self._num_checked += 1
            _check_order(given, batch)
        batch[EXAMPLE_IDS] = torch.tensor(example_ids)
        return batch


class IdentifiedBatches(AbstractContextManager):
    """
    Makes the batches of a DataLoader carry example ids while the context is open.

    Args:
        dataloader (`DataLoader`): The train DataLoader, as accelerate prepared it or plain. Not yet iterated.

    Raises:
        ValueError: if it does not read single examples by their position.
    """

    def __init__(self, dataloader: DataLoader) -> None:
        while hasattr(dataloader, "base_dataloader"):  # below accelerate's adapter
            dataloader = dataloader.base_dataloader
        self._dataloader = dataloader
        dataset = getattr(self._dataloader, "dataset", None)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                "`record='online'` needs a train dataset with a length and examples by position, but got "
                f"{type(dataset).__name__}. Use a map-style dataset, or `record='checkpoint'`."
            )
        if getattr(self._dataloader, "batch_sampler", None) is None:
            raise ValueError(
                "`record='online'` needs a train DataLoader that collates single examples, but it has no batch "
                "sampler. Give it a `batch_size`."
            )
        self.dataset = dataset

    def __enter__(self) -> "IdentifiedBatches":
        # DataLoader guards `dataset` against assignment, which would leave a sampler of another length. Ours has the same.
        attributes = vars(self._dataloader)
        self._originals = {name: attributes[name] for name in ("dataset", "collate_fn")}
        attributes["dataset"] = IdentifiedDataset(attributes["dataset"])
        attributes["collate_fn"] = IdentifyingCollator(attributes["collate_fn"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        vars(self._dataloader).update(self._originals)


def _input_ids(examples: list) -> list[list[int]] | None:
    """The tokens of each example before collation, which may change them in place; None where there are none to compare."""
    if not all(isinstance(example, Mapping) and "input_ids" in example for example in examples):
        return None
    given = [example["input_ids"] for example in examples]
    given = [ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in given]
    return None if any(ids and isinstance(ids[0], list) for ids in given) else given  # several choices each


def _check_order(given: list[list[int]], batch: Mapping[str, Any]) -> None:
    """Refuse a line that is less like its own example than like another, which it holds whole."""
    for position, line in enumerate(batch["input_ids"][:_NUM_CHECKED_LINES].flatten(start_dim=1).tolist()):
        if _holds(line, given[position]):
            continue
        own = _likeness(line, given[position])
        if any(_holds(line, tokens) and _likeness(line, tokens) > own for tokens in given):
            raise ValueError(
                f"The data collator must keep the order of examples, but line {position} of a batch holds another "
                "example than was given there. Do not sort inside the collator (`train_sampling_strategy` can)."
            )


def _holds(line: list[int], tokens: list[int]) -> bool:
    """Whether the tokens stand at either end of the line, the rest being padding."""
    return line[: len(tokens)] == tokens or line[len(line) - len(tokens) :] == tokens


def _likeness(line: list[int], tokens: list[int]) -> float:
    return len(set(line) & set(tokens)) / max(len(set(line) | set(tokens)), 1)
