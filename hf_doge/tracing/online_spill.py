"""
Rows of the steps between two saves, summed by example and token; on disk what does not fit into memory.

Each process keeps segments of its own: `segment-00000.keys.npy`, ascending numbers `example_id * vocabulary_size +
token`, and `segment-00000.rows.npy` next to it, float32. A save begins by writing what memory still holds, so that it can be
made good if it fails.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_doge.gradients.token_rows import TokenRows

JOURNAL = "journal.json"

_MOST_KEPT = 0.75  # share of the memory; if adding up leaves more than that, it is written

Segment = tuple[np.ndarray, np.ndarray]  # ascending distinct keys (n,), and the row of each (n, width)


class RowSpill:
    """
    Takes rows of examples in any order, as often as they come.

    Args:
        folder (`Path`): Of this process alone. Emptied at the first write and by [`discard`].
        width (`int`), vocabulary_size (`int`): Of the embedding matrix.
        max_bytes (`int`): Rows held in memory, as float32, before they are written.
    """

    def __init__(self, folder: Path, *, width: int, vocabulary_size: int, max_bytes: int) -> None:
        self.folder = folder
        self._vocabulary_size = vocabulary_size
        # Filled and emptied in place, since fresh memory costs more than what is done with it.
        self._rows = torch.empty(max(1, max_bytes // (4 * width)), width)
        self._keys = torch.empty(len(self._rows), dtype=torch.int64)
        self._num_rows = self._num_segments = 0
        self._last: Segment | None = None

    def add(self, examples: Tensor, tokens: Tensor, rows: Tensor, *, factors: Tensor) -> None:
        """
        Add `factors (n,)` times `rows (n, width)` of the given `examples (n,)` and `tokens (n,)`, each pair as often as it
        comes.

        Raises:
            ValueError: if rows are not finite; noticed when a segment is written.
        """
        keys = examples * self._vocabulary_size + tokens
        while len(keys):
            free = slice(self._num_rows, min(self._num_rows + len(keys), len(self._keys)))
            num = free.stop - free.start
            self._keys[free] = keys[:num]
            torch.mul(rows[:num], factors[:num, None], out=self._rows[free])
            self._num_rows = free.stop
            keys, rows, factors = keys[num:], rows[num:], factors[num:]
            if self._num_rows == len(self._keys):
                self._make_room()

    def close(self, journal: dict[str, Any]) -> None:
        """Write what is left and then `journal`, which says that the segments are whole and what they hold."""
        if self._num_rows:
            self._write(*self._summed())
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{JOURNAL}.tmp"
        temporary.write_text(json.dumps({**journal, "num_segments": self._num_segments}), encoding="utf-8")
        temporary.replace(self.folder / JOURNAL)

    def read(self) -> list[Segment]:
        """All segments; the last one from memory, where it still is after [`close`]."""
        segments = read_segments(self.folder)
        return segments if self._last is None else [*segments[:-1], self._last]

    def discard(self) -> None:
        """Forget all rows, on disk too."""
        self._num_rows = self._num_segments = 0
        self._last = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_room(self) -> None:
        """Add up what can be; where examples come again and again (several epochs) nothing need be written."""
        keys, rows = self._summed()
        if len(keys) > _MOST_KEPT * len(self._keys):
            self._write(keys, rows)
            self._last = None  # the training goes on and may need the memory
        else:
            self._keys[: len(keys)], self._rows[: len(keys)] = keys, rows
            self._num_rows = len(keys)

    def _summed(self) -> tuple[Tensor, Tensor]:
        """The rows in memory by ascending key."""
        keys, rows = _sum_by_key([(self._keys[: self._num_rows], self._rows[: self._num_rows])])
        if not rows.sum().isfinite():  # one pass; whoever is not finite makes the sum so
            examples = keys[~rows.isfinite().all(dim=1)] // self._vocabulary_size
            raise ValueError(
                f"Gradients must be finite, but those of examples {examples.unique().tolist()[:8]} are not. Look at their "
                "loss, or train at a lower learning rate."
            )
        return keys, rows

    def _write(self, keys: Tensor, rows: Tensor) -> None:
        """One segment, which empties the memory."""
        self._num_rows = 0
        if self._num_segments == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        path = self.folder / f"segment-{self._num_segments:05d}"
        self._last = keys.numpy(), rows.numpy()
        for part, content in zip(("keys", "rows"), self._last, strict=True):
            np.save(path.with_suffix(f".{part}.npy"), content)
        self._num_segments += 1


def read_journal(folder: Path) -> dict[str, Any] | None:
    """What [`RowSpill.close`] wrote; None if the rows of the process are not whole."""
    try:
        return json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def read_segments(folder: Path) -> list[Segment]:
    """What a [`RowSpill`] that was closed holds, left on disk until it is touched; nothing where there is none."""
    journal = read_journal(folder) or {"num_segments": 0}
    return [
        tuple(
            np.load(folder / f"segment-{number:05d}.{part}.npy", mmap_mode="c", allow_pickle=False)
            for part in ("keys", "rows")
        )
        for number in range(journal["num_segments"])
    ]


def merged_rows(
    segments: Sequence[Segment],
    *,
    num_examples: int,
    vocabulary_size: int,
    width: int,
    max_bytes: int,
    first_example: int = 0,
    virtual: bool = False,
) -> Iterator[TokenRows]:
    """
    The rows of all processes, summed by example and token.

    Args:
        segments (`Sequence[Segment]`): Of all processes.
        num_examples (`int`), vocabulary_size (`int`), width (`int`): Of the index.
        max_bytes (`int`): Bound of the rows held at a time, unless one example has more.
        first_example (`int`): Where to begin.
        virtual (`bool`): Passed on to [`TokenRows`].

    Yields:
        [`TokenRows`] of the next examples in order of their id; none for an example that no step used.
    """
    # keys ascend, so where each example begins in a segment tells how many rows it has there
    borders = np.arange(first_example, num_examples + 1, dtype=np.int64) * vocabulary_size
    total = np.zeros(len(borders), dtype=np.int64)
    for keys, _ in segments:
        total += np.searchsorted(keys, borders)
    budget = max(1, max_bytes // (4 * width))
    begin, last = 0, len(borders) - 1
    while begin < last:
        end = int(np.searchsorted(total, total[begin] + budget, side="right")) - 1
        end = min(max(end, begin + 1), last)
        pieces = [(torch.empty(0, dtype=torch.int64), torch.empty(0, width))]
        for keys, rows in segments:
            piece = slice(*np.searchsorted(keys, borders[[begin, end]]))
            if piece.stop > piece.start:
                pieces.append((torch.from_numpy(keys[piece]), torch.from_numpy(rows[piece])))
        ids, sums = pieces[-1] if len(pieces) <= 2 else _sum_by_key(pieces)
        offsets = torch.searchsorted(ids, torch.from_numpy(borders[begin : end + 1]))
        yield TokenRows(offsets, ids % vocabulary_size, sums, virtual)
        begin = end


def _sum_by_key(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ascending distinct keys of all pieces, and the sum of the rows of each."""
    keys, slots = torch.unique(torch.cat([keys for keys, _ in pieces]), return_inverse=True)
    total = pieces[0][1].new_zeros(len(keys), pieces[0][1].shape[1])
    for (_, rows), places in zip(pieces, slots.split([len(keys) for keys, _ in pieces]), strict=True):
        total.index_add_(0, places, rows)
    return keys, total
