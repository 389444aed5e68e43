"""Weights that change at given parts of a training (annealing mixtures): `[(0, weights), (0.8, other_weights)]`."""

import math
from itertools import pairwise
from typing import Any

from hf_doge.checks import read_ratio, show

_EXACT = 6  # digits of a step's number: 0.7 of 10 steps is 7 of them, whatever 0.7 is in binary


def read_phases(weights: Any) -> list[tuple[float, Any]]:
    """
    Phases as users give them: a list of pairs, the part of the training at which a phase begins and its weights.

    Args:
        weights (list of `(fraction, weights)`, or weights): Fractions in [0, 1), the first 0, increasing. Anything else than a
            list of pairs is one phase.

    Returns:
        `list[tuple[float, Any]]`: fractions and weights, at least one; the weights unread.

    Raises:
        `ValueError`: if the fractions are not such.
    """
    if not is_phased(weights):
        return [(0.0, weights)]
    odd = [one for one in weights if len(one) != 2]
    if odd:
        raise ValueError(
            f"Phases must be pairs, the part of the training at which one begins and its weights, but got {show(odd[0])}. Write "
            "`[(0, weights), (0.8, other_weights)]`."
        )
    fractions = [_read_fraction(given) for given, _ in weights]
    if fractions[0] != 0:
        raise ValueError(
            f"The first phase must begin at 0, but begins at {fractions[0]:g}, and nothing is said of what is before. Put "
            "`(0, weights)` first."
        )
    if any(later <= earlier for earlier, later in pairwise(fractions)):
        raise ValueError(
            f"Phases must be in the order in which they begin, each later than the one before, but begin at {fractions}. Sort "
            "them."
        )
    return [(fraction, one) for fraction, (_, one) in zip(fractions, weights, strict=True)]


def _read_fraction(given: Any) -> float:
    fraction = read_ratio(given)
    if fraction is None or fraction >= 1:
        raise ValueError(
            f"A phase must begin at a part of the training that is at least 0 and below 1, but got {show(given)}. Write 0.8 for "
            "one that begins after 80 % of the steps."
        )
    return fraction


def is_phased(weights: Any) -> bool:
    """Whether these are phases rather than weights: a list of lists or tuples."""
    is_list = isinstance(weights, (list, tuple)) and len(weights) > 0
    return is_list and all(isinstance(one, (list, tuple)) for one in weights)


def first_draw_of(fraction: float, *, num_planned: int, step_size: int = 1) -> int:
    """
    The first draw of a phase, that of the first step of which at least the fraction of all steps lies before.

    Args:
        fraction (`float`): Part of the training before it.
        num_planned (`int`): Draws of the whole training.
        step_size (`int`): Draws of a training step.
    """
    num_steps = -(-num_planned // step_size)
    return math.ceil(round(fraction * num_steps, _EXACT)) * step_size
