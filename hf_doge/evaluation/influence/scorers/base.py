"""What every scorer is, and what they share."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor, nn

# Padded batches in the order of the examples: `input_ids`, `attention_mask` and `labels`, as a model takes them.
Batches = Sequence[Mapping[str, Tensor]]


class Scorer(Protocol):
    """Says how much each training example pushed the model towards each query's label."""

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """
        Scores of every pair.

        Args:
            train (`Sequence[Mapping[str, torch.Tensor]]`): Padded batches of N training examples, in order.
            queries (`Sequence[Mapping[str, torch.Tensor]]`):
                Padded batches of Q queries. Their `labels` are the classes to be explained: the predicted ones ask
                why the model predicts what it does, the true ones what helped or hurt it.

        Returns:
            `numpy.ndarray` of shape `(Q, N)`, float64: large and positive for proponents, negative for opponents.
        """


def check_checkpoints(models: Sequence[nn.Module], learning_rates: Sequence[float]) -> None:
    """Raise a `ValueError` unless there is one learning rate per checkpoint, and at least one checkpoint."""
    if not models or len(models) != len(learning_rates):
        raise ValueError(
            f"There must be one learning rate for each of at least one checkpoint, but got {len(models)} model(s) and "
            f"{len(learning_rates)} learning rate(s)."
        )
    if any(rate < 0 for rate in learning_rates):
        raise ValueError(f"`learning_rates` must not be negative, but got {list(learning_rates)}.")
