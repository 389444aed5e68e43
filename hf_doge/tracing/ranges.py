"""Which examples go into which segment, and which process records them: the files are the same on any number of these."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hf_doge.tracing.settings import RecordingSettings

Range = tuple[int, int]  # examples [first, last)


def expected_rows(num_tokens: np.ndarray, settings: RecordingSettings, *, vocabulary_size: int) -> np.ndarray:
    """
    How many gradient rows each example will have, as far as its tokens tell.

    Args:
        num_tokens (`numpy.ndarray` of shape `(num_examples,)`): Distinct tokens of each example.
        settings ([`RecordingSettings`]):
            The output part of a tied matrix has a row for each word of the vocabulary, unless only own rows are kept.
        vocabulary_size (`int`): Number of rows of the embedding matrix.
    """
    sparse = settings.tied in ("input", "own")
    rows = num_tokens if sparse else np.full_like(num_tokens, vocabulary_size)
    return rows if settings.top_k_tokens is None else np.minimum(rows, settings.top_k_tokens)


def plan_borders(num_rows: np.ndarray, capacity: int) -> list[int]:
    """
    The examples that segments are to begin with, all but the first: each ends with the example that fills it.

    Args:
        num_rows (`numpy.ndarray` of shape `(num_examples,)`): From [`expected_rows`].
        capacity (`int`): Rows that fill a segment.
    """
    totals = np.cumsum(num_rows, dtype=np.int64)
    borders: list[int] = []
    filled = 0
    while True:
        border = int(np.searchsorted(totals, filled + capacity)) + 1
        if border >= len(totals):
            return borders
        borders.append(border)
        filled = int(totals[border - 1])


def share_ranges(ranges: Sequence[Range], num_shares: int) -> list[list[Range]]:
    """
    As many ranges in a row for each process, those that touch joined to one. The first processes have no fewer than others.

    Args:
        ranges (`Sequence[tuple[int, int]]`): About equally long to record, as segments are.
        num_shares (`int`): Number of processes.
    """
    stops = [-(-len(ranges) * share // num_shares) for share in range(num_shares + 1)]
    return [_joined(ranges[start:stop]) for start, stop in pairwise(stops)]


def _joined(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for first, last in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return joined
