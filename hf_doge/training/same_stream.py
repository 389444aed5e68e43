"""Do all processes draw from one and the same stream? Asked once, before the first step."""

from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

_MOST_NAMED = 5  # domains named in the error


def refuse_different_streams(fingerprint: str, settings: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    """
    Raise on every process if they do not all draw alike. A collective: every process has to call it.

    A rank keeps its part of a stream that it believes all others to have as well, so other weights, seeds or rows on
    one of them would lose some examples and train others twice, without a word.

    Args:
        fingerprint (`str`): Digest of everything the stream depends on.
        settings (mapping): What to name in the error, if it differs.
        weights (mapping of `str` to `float`): Likewise, by domain.

    Raises:
        `RuntimeError`: naming what differs, with the values of each rank.
    """
    if PartialState().num_processes == 1 or len(set(gather_object([fingerprint]))) == 1:
        return
    told = gather_object([{**settings, **{f"the weight of {name!r}": weight for name, weight in weights.items()}}])
    names = dict.fromkeys(name for one in told for name in one)
    differing = [name for name in names if any(one.get(name) != told[0].get(name) for one in told)]
    by_rank = "; ".join(
        f"{name} is " + ", ".join(f"{one.get(name)!r} on rank {rank}" for rank, one in enumerate(told))
        for name in differing[:_MOST_NAMED]
    )
    raise RuntimeError(
        "All processes must draw by the same weights from the same rows, but "
        f"{by_rank or 'the rows of the domains lie in different places'}. Read weights and data from one place that no "
        "other job writes to, in the same order on every process."
    )
