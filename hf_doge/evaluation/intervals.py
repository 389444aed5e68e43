"""
Confidence intervals of means: over a few seeds by Student's t, over test points by a bootstrap.

Both are a few lines and need no library, so a comparison can be made without an extra; tests hold them equal to scipy's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hf_doge.checks import check_count, check_number, check_seed

_NORMAL = NormalDist()

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the last one its expansion is as exact.
_T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Interval:
    """
    A mean and its 95 % interval by Student's t: seeds are few, and a bootstrap over five of them is too narrow.

    Attributes:
        mean (`float`).
        low, high (`float` or `None`): `None` for a single value, of which no interval can be had.
        num_values (`int`).
    """

    mean: float
    low: float | None
    high: float | None
    num_values: int

    def format(self, digits: int = 2, *, signed: bool = False) -> str:
        """`mean [low, high]`, or the mean alone."""
        sign = "+" if signed else ""
        if self.low is None:
            return f"{self.mean:{sign}.{digits}f} (one value)"
        return f"{self.mean:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"

    def to_percent(self) -> "Interval":
        """Differences of logarithms, such as losses, as changes in percent."""
        low, high = (None if end is None else 100 * math.expm1(end) for end in (self.low, self.high))
        return Interval(100 * math.expm1(self.mean), low, high, self.num_values)

    @property
    def half_width(self) -> float | None:
        """The smallest mean that would exclude 0, given how the values scatter; `None` for a single value."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float]) -> Interval:
    """
    Mean of independent values, such as one per seed, and its 95 % interval.

    Raises:
        `ValueError`: without a value.
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("An interval needs at least one value, but got none.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    degrees = len(values) - 1
    quantile = _T_QUANTILES[degrees - 1] if degrees <= len(_T_QUANTILES) else _t_quantile(0.975, degrees)
    half = quantile * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """
    BCa bootstrap of the mean, widened for few points: where it would lie had other points been drawn.

    The percentiles are corrected for bias and skewness (Efron 1987, BCa) and moved outwards as Student's t is wider than
    the normal distribution (Hesterberg 2015), because the plain percentile bootstrap of few points is too narrow. The
    interval holds no noise of the seeds beyond what reaches the points.

    Args:
        values (`numpy.ndarray` of shape `(num_points,)`): One number per test point.
        confidence (`float`): Coverage, between 0 and 1.
        num_resamples (`int`): How many draws with replacement.
        seed (`int`): Seeds the draws.

    Returns:
        `tuple[float, float]`: lower and upper end; the value itself twice for a single point, or equal ones.

    Raises:
        ValueError: if `confidence` is not between 0 and 1.
    """
    confidence = check_number("confidence", confidence, above=0, below=1)
    num_resamples = check_count("num_resamples", num_resamples)
    generator = np.random.default_rng(check_seed("seed", seed, least=0))
    values = np.asarray(values, dtype=np.float64)
    if (values == values[0]).all():
        return float(values[0]), float(values[0])
    draws = generator.integers(len(values), size=(num_resamples, len(values)))
    means, mean = values[draws].mean(axis=1), values.mean()
    deviations = (values - mean) / np.abs(values - mean).max()
    widening = math.sqrt(len(values) / (len(values) - 1))
    outer = widening * _t_quantile((1 - confidence) / 2, len(values) - 1)
    tails = bca_tails(means, mean, deviations, (outer, -outer))
    low, high = np.quantile(means, tails)
    return float(low), float(high)


def bca_tails(
    means: np.ndarray, mean: float, deviations: np.ndarray, normal_quantiles: Sequence[float]
) -> list[float]:
    """
    Which shares of resampled means lie below the ends of a BCa interval.

    Args:
        means (`numpy.ndarray` of shape `(num_resamples,)`): Means of the resamples.
        mean (`float`): Mean of the sample.
        deviations (`numpy.ndarray` of shape `(num_points,)`): From the mean, in any unit; not all 0.
        normal_quantiles (`Sequence[float]`): Ends of the interval without corrections, in standard deviations.
    """
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    tails = []
    for quantile in normal_quantiles:
        shifted = bias + quantile
        room = 1 - acceleration * shifted
        tails.append(_NORMAL.cdf(bias + shifted / room) if room > 0 else float(shifted > 0))
    return tails


def _t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t by its expansion in 1 / degrees: to three digits from 4 degrees of freedom on."""
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
