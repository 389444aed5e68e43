"""What every method should beat."""

import numpy as np

from hf_doge.tracing.scorers.base import Batches


class RandomScorer:
    """
    Scores drawn from a normal distribution: removing its proponents is removing examples at random.

    Args:
        seed (`int`): Of the draw.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        generator = np.random.default_rng(self.seed)
        shape = [sum(len(batch["input_ids"]) for batch in batches) for batches in (queries, train)]
        return generator.standard_normal(shape)
