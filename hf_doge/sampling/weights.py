"""Weights as users give them, checked and turned into shares by domain position."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_doge.checks import read_ratio, show

logger = logging.getLogger(__name__)


def to_shares(weights: Any, names: Sequence[str]) -> np.ndarray:
    """
    Read domain weights in any accepted form as shares that sum to 1.

    Args:
        weights (mapping of name to number, object whose `mean` is one, or sequence of numbers in the order of `names`):
            Finite, `>= 0`, not all zero. A mapping names each domain of `names` and no other.
        names (sequence of `str`): The domains of the data.

    Returns:
        `np.ndarray` of `float64` and shape `(num_domains,)`.

    Raises:
        `ValueError`: naming the domains at fault.
    """
    if not isinstance(weights, Mapping) and isinstance(getattr(weights, "mean", None), Mapping):
        weights = weights.mean
    if callable(getattr(weights, "items", None)):  # a mapping, or a pandas Series, whose order may be another
        given = list(weights.items())
        weights = {str(name): weight for name, weight in given}
        if len(weights) < len(given):
            raise ValueError(f"Every domain must have one weight, but got {show(given)}. Name each domain once.")
        unknown = sorted(str(name) for name in weights.keys() - set(names))
        if unknown:
            raise ValueError(
                f"Weights must name domains of the data, but got weights for {unknown}. The domains are "
                f"{list(names)}. Drop or rename the others."
            )
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(
                f"Every domain of the data needs a weight, but {missing} have none. Set their weight, 0 to leave them out."
            )
        weights = [weights[name] for name in names]
    shape = getattr(weights, "shape", None)
    flat = (
        isinstance(weights, Iterable) and not isinstance(weights, str | bytes) and (shape is None or len(shape) == 1)
    )
    weights = list(weights) if flat else []
    if len(weights) != len(names):
        got = f"weights of shape {(len(weights),) if flat else tuple(shape or ())}"
        raise ValueError(
            f"There must be one weight for each of the {len(names)} domains, but got {got}. Give a dict from domain name to "
            "weight."
        )
    read = [read_ratio(weight) for weight in weights]
    refused = {name: weight for name, weight, value in zip(names, weights, read, strict=True) if value is None}
    if refused:
        raise ValueError(f"Weights must be numbers, finite and not negative, but got {show(refused)}.")
    values = np.array(read, dtype=np.float64)
    if not values.any():
        raise ValueError(f"At least one weight must be positive, but the weights of {list(names)} are all 0.")
    values /= values.max()  # so that the sum of huge numbers is finite
    return values / values.sum()


def refuse_empty_domains(shares: np.ndarray, sizes: np.ndarray, names: Sequence[str]) -> None:
    """Raise if a domain is to be drawn from but has no rows."""
    empty = [name for name, share, size in zip(names, shares, sizes, strict=True) if share > 0 and size == 0]
    if empty:
        raise ValueError(f"Domains {empty} have positive weight but no example. Drop them or set their weight to 0.")


def cap_shares(shares: np.ndarray, budgets: np.ndarray, num_draws: int, names: Sequence[str]) -> np.ndarray:
    """
    Lower the shares of domains that would be drawn too often, and give the excess to the others in proportion.

    Args:
        shares (`np.ndarray` of shape `(num_domains,)`): Shares that sum to 1.
        budgets (`np.ndarray` of shape `(num_domains,)`): Draws each domain may have at most, `>= 0`.
        num_draws (`int`): Draws to share out.
        names (sequence of `str`): The domains, for the log and the error.

    Returns:
        `np.ndarray` of shape `(num_domains,)`: shares that sum to 1, none above `budgets / num_draws`. What changed
        is logged.

    Raises:
        `ValueError`: if the budgets of the domains with positive share do not add up to `num_draws`.
    """
    reachable = np.floor(budgets[shares > 0]).sum()
    if reachable < num_draws:
        raise ValueError(
            f"`max_epochs_per_domain` must leave room for {num_draws} draws, but it allows {int(reachable)} from the "
            "domains with positive weight. Raise it, draw fewer samples, or give weight to more domains."
        )
    limits = budgets / num_draws
    capped = np.zeros(len(shares), dtype=bool)
    result = shares
    while (over := ~capped & (result > limits)).any():
        capped |= over
        free = np.where(capped, 0.0, shares)
        left = 1 - limits[capped].sum()
        result = np.where(capped, limits, free * (left / free.sum() if free.any() else 0.0))
    for name, before, after in zip(names, shares, result, strict=True):
        if after < before:
            logger.info(
                f"Domain {name!r}: weight lowered from {before:.6g} to {after:.6g} by `max_epochs_per_domain`."
            )
        elif after > before:
            logger.info(f"Domain {name!r}: weight raised from {before:.6g} to {after:.6g} in exchange.")
    return result / result.sum()
