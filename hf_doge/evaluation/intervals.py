"""95 % intervals over seeds. (Over test points there is `hf_doge.evaluation.influence.bootstrap`.)"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the last one the normal's is near enough.
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

    @property
    def half_width(self) -> float | None:
        """The smallest mean that would exclude 0, given how the values scatter; `None` for a single value."""
        return None if self.low is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


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
    quantile = _T_QUANTILES[len(values) - 2] if len(values) - 2 < len(_T_QUANTILES) else 1.96
    half = quantile * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half, len(values))
