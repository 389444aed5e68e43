"""Confidence intervals over test points."""

import numpy as np

from hf_doge.checks import check_count, check_number, check_seed


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap of the mean: where it would lie had other points been drawn.

    With few points the interval is too narrow (ten points: by a tenth or more). It holds no noise of the seeds beyond
    what reaches the points.

    Args:
        values (`numpy.ndarray` of shape `(num_points,)`): One number per test point.
        confidence (`float`): Coverage, between 0 and 1.
        num_resamples (`int`): How many draws with replacement.
        seed (`int`): Of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end; the value itself twice for a single point.

    Raises:
        ValueError: if `confidence` is not between 0 and 1.
    """
    confidence = check_number("confidence", confidence, above=0, below=1)
    num_resamples = check_count("num_resamples", num_resamples)
    generator = np.random.default_rng(check_seed("seed", seed, least=0))
    draws = generator.integers(len(values), size=(num_resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
