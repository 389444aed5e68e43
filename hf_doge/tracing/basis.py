"""Which basis the rows of a checkpoint are projected to with `projection="pca"`: the principal components of a sample."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.batches import SequentialBatches

NUM_SAMPLED = 256  # examples
_LEAST_SHARE = 0.1  # of all examples, with which an index keeps the order of the others too
_SMALLEST = 1e-300  # a row without length stays so


def sampled(batches: SequentialBatches, *, seed: int) -> Iterator[Mapping[str, Any]]:
    """`NUM_SAMPLED` examples at random from all over the dataset, all where there are no more: the same at each checkpoint."""
    count = len(batches)
    positions = np.random.default_rng(seed % 2**64).choice(count, min(count, NUM_SAMPLED), replace=False)
    yield from batches.of(np.sort(positions).tolist())


def warn_of_few(config: Mapping[str, Any], num_examples: int) -> None:
    """
    Warn if an index is about to have many more examples than its principal components are made of: a sample of those that it
    had when a checkpoint was recorded, which they know best.

    Args:
        config (`Mapping`): The content of its config.json.
        num_examples (`int`): How many it will have.
    """
    least = min(max(config["stored_width"], ceil(_LEAST_SHARE * num_examples)), NUM_SAMPLED)
    had = {}
    for entry in config["checkpoints"]:
        # Files of examples that were added lie in a folder named by the first of them.
        added = [file["first_example"] for file in entry["files"] if file["path"].count("/") > 2]
        had[entry["name"]] = min([*added, config["num_examples"]])
    few = {name: count for name, count in had.items() if count < least}
    if few:
        warnings.warn(
            f"The principal components of {[*few]} were made of {min(few.values())} examples, and the index will have {num_examples}."
            " Scores of the others are less exact than theirs, and mostly smaller. Record them all again in another folder, or begin"
            f" an index with at least {least}.",
            stacklevel=3,
        )


def fit_basis(batches: Iterable[TokenRows], *, width: int, heartbeat: Callable[[], None] = lambda: None) -> Tensor:
    """
    The principal components of the directions of rows: with `R` the rows, each divided by its length, `R -> R B` loses least of
    all projections to `width` numbers.

    `B` are the eigenvectors of `R^T R` (not centred, as scores are inner products) with the largest eigenvalues. Rows that
    span no more than `width` dimensions lose nothing. Were lengths kept, the few examples of large loss would decide, and the
    order of all others be lost.

    Args:
        batches (`Iterable[TokenRows]`): Rows `(n, D)` of some examples, one batch after the other. One is held at a time.
        width (`int`): Number of components, at most `D`.
        heartbeat (`Callable`): Called after each batch.

    Returns:
        `torch.Tensor` of shape `(D, width)` and dtype float32: orthonormal columns, the one of the largest eigenvalue first.

    Raises:
        ValueError: A row is not finite.
    """
    products: Tensor | None = None
    for batch in batches:
        rows = normalize(batch.rows.detach().cpu().double(), eps=_SMALLEST)  # (n, D)
        own = rows.T @ rows
        products = own if products is None else products.add_(own)
        heartbeat()
    assert products is not None, "an index has an example"
    if not torch.isfinite(products).all():
        raise ValueError("Gradient rows must be finite, but those of some examples are not. Look at their losses.")
    _, vectors = torch.linalg.eigh(products)  # by ascending eigenvalue
    return vectors.flip(1)[:, :width].float()
