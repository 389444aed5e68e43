"""Batches for recording: every example once, in order, without a trace in the user's random state or collator."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_doge.checks import check_count, check_function, check_seed
from hf_doge.sampling.collation import SeededCollator, differ, preserved, unseeded_copy

_PACKED_KEYS = ("seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "document_ids")


class SequentialBatches:
    """
    The examples of a dataset in order of their position, batch by batch.

    All random numbers that a dataset or collator draws (masking) come from `seed` and the position of the batch: the
    same at every checkpoint and after an interruption, as [`SeededCollator`] says.
    Iterate inside [`preserved_random_state`].

    Args:
        dataset (`Sequence`): Of known length, with items that `collator` takes.
        collator (`Callable`): `collator(list of items) -> batch`.
        batch_size (`int`): How many examples at once.
        seed (`int`): See above.
    """

    def __init__(self, dataset: Any, collator: Callable, *, batch_size: int, seed: int = 0) -> None:
        self.dataset = dataset
        self.collator = check_function("collator", collator)
        self._seeded_collator = SeededCollator(unseeded_copy(collator), seed=None)
        self.batch_size = check_count("batch_size", batch_size)
        self.seed = check_seed("seed", seed)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.dataset)

    def between(self, first: int, last: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """
        The position of the first example of each batch, and the batch: all that hold one of the examples `[first, last)`.

        They are the same whatever the range: it cuts none, and moves no random number.
        """
        for start in range(first - first % self.batch_size, last, self.batch_size):
            yield start, self.collate(start, seed=self.seed)

    def collate(self, start: int, *, seed: int) -> Mapping[str, Any]:
        """
        The batch that begins at example `start`.

        Raises:
            ValueError: if it is packed: then what it holds are not examples.
        """
        positions = list(range(start, min(start + self.batch_size, len(self))))
        return self._batch(positions, (seed * 1_000_003 + start) % 2**32)

    def some(self, count: int) -> Iterator[Mapping[str, Any]]:
        """Batches of a few examples from all over the dataset. Iterate inside [`preserved_random_state`]."""
        count = min(count, len(self))
        positions = [place * (len(self) - 1) // max(count - 1, 1) for place in range(count)]
        for start in range(0, len(positions), self.batch_size):
            yield self._batch(list(positions[start : start + self.batch_size]), self.seed % 2**32)

    def of(self, positions: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Batches of the examples at some positions. Iterate inside [`preserved_random_state`]."""
        for start in range(0, len(positions), self.batch_size):
            few = list(positions[start : start + self.batch_size])
            yield self._batch(few, (self.seed * 1_000_003 + few[0]) % 2**32)

    def _batch(self, positions: list[int], seed: int) -> Mapping[str, Any]:
        _seed_everything(seed)
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(positions) if fetch is not None else [self.dataset[position] for position in positions]
        batch = self._seeded_collator(items, seed)
        _refuse_packed(batch, num_examples=len(positions))
        return batch

    def are_random(self) -> bool:
        """Whether the first batch depends on the seed."""
        first, second = (self.collate(0, seed=seed) for seed in (self.seed, self.seed + 1))
        return differ(first, second)


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """
    Whatever is drawn inside, the user's random numbers (Python, NumPy, torch) go on as if nothing had been.

    Args:
        seed (`int`, *optional*): Where those inside begin.
    """
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        with preserved():
            if seed is not None:
                _seed_everything(seed % 2**32)
            yield
    finally:
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _refuse_packed(batch: Mapping[str, Any], *, num_examples: int) -> None:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The collator must return a dictionary that the model takes, but it returned a {type(batch).__name__}."
        )
    reason = _find_packing(batch, num_examples)
    if reason is not None:
        raise ValueError(
            f"Every line of a batch must be one example, but {reason}: several texts are packed into one line, where"
            " their gradients mix. Record with a dataset and collator without packing (`packing=False`,"
            " `padding_free=False`); the model may have been trained with it."
        )


def _find_packing(batch: Mapping[str, Any], num_examples: int) -> str | None:
    found = sorted(set(_PACKED_KEYS) & set(batch))
    if found:
        return f"the collator returns {found}"
    input_ids, mask, position_ids = (batch.get(key) for key in ("input_ids", "attention_mask", "position_ids"))
    if isinstance(input_ids, Tensor) and len(input_ids) != num_examples:
        return f"the collator makes {len(input_ids)} lines of {num_examples} examples"
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point() and (mask > 1).any():
        return "its `attention_mask` numbers documents"
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
        falls = position_ids[:, 1:] < position_ids[:, :-1]
        if isinstance(mask, Tensor) and mask.shape == position_ids.shape:
            falls &= mask[:, 1:].bool() & mask[:, :-1].bool()
        elif mask is not None:
            return None
        if falls.any():
            return "its `position_ids` start again within a line"
    return None


def column_names(dataset: Any) -> Sequence[str]:
    """Columns of a dataset; the keys of its first item where it has no columns."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        return names
    first = dataset[0]
    return list(first) if isinstance(first, Mapping) else []
