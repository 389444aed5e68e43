"""Orders and ranks of arrays of small integers, such as one domain per draw."""

import numpy as np


def stable_order(values: np.ndarray, limit: int) -> np.ndarray:
    """Stable argsort of integers in `[0, limit)`."""
    narrow = values.astype(np.uint16) if limit <= 2**16 else values  # numpy sorts 16-bit integers in linear time
    return np.argsort(narrow, kind="stable")


def ranks_among_equals(values: np.ndarray, num_values: int) -> np.ndarray:
    """For each element, how many elements before it are equal to it; elements are integers in `[0, num_values)`."""
    order = stable_order(values, num_values)
    counts = np.bincount(values, minlength=num_values)
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks
