"""What [`~hf_doge.sampling.sampler.DomainWeightedSampler.state_dict`] gave, as it is read again."""

from collections.abc import Sequence
from typing import Any

from hf_doge.entries import COUNT, OBJECT, Kind, counts_of, find_misfit, shares_of

_LIST = Kind("a list of at least one piece", lambda value: isinstance(value, list) and value != [])
_KINDS = {"domains": OBJECT, "epoch": COUNT, "position": COUNT, "schedule": _LIST}
_SETTINGS = ("seed", "draw", "num_samples")  # of a sampler, which are compared with its own


def find_misfit_of_state(state: Any, names: Sequence[str]) -> str | None:
    """
    What of a state is not as `state_dict` gives it, in words that follow "but"; `None` if all is.

    Args:
        state (`Any`): The state.
        names (sequence of `str`): The domains of the sampler. The weights in a state of others are left to who refuses that.
    """
    if misfit := find_misfit(state, _KINDS):
        return misfit
    if misfit := find_misfit(state, {"domains": counts_of(list(state["domains"]))}):
        return misfit
    missing = [name for name in _SETTINGS if name not in state]
    if missing:
        return f"its `{missing[0]}` is missing"
    return _find_misfit_of_pieces(state["schedule"], names) if list(state["domains"]) == list(names) else None


def _find_misfit_of_pieces(pieces: list[Any], names: Sequence[str]) -> str | None:
    """Each begins with a draw, the first with 0, and none before the one before it."""
    kinds = {"first_draw": COUNT, "weights": shares_of(names), "domain_counts": counts_of(names)}
    begins = 0
    for number, piece in enumerate(pieces):
        whose = f"in piece {number} of `schedule` its"
        if misfit := find_misfit(piece, kinds, whose=whose):
            return misfit
        if piece["first_draw"] < begins or (number == 0 and piece["first_draw"]):
            return f"{whose} `first_draw` is {piece['first_draw']} instead of {f'at least {begins}' if number else 0}"
        begins = piece["first_draw"]
    return None
