"""What the parts of a writer know of its index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Heartbeat = Callable[[], None]  # called every now and then, so that other processes know of a long work


class OpenIndex(Protocol):
    """What the writer of a checkpoint knows of its index, see [`IndexWriter`] for what each means."""

    folder: Path
    config: dict[str, Any]
    first_example: int
    num_examples: int
    max_segment_bytes: int
    example_dtype: str  # the integers that example ids are stored as
    projection: Tensor | None
    fits_basis: bool

    def require_open(self) -> None:
        """Raises a `ValueError` if the index can no longer be written."""
