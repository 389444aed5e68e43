"""Which part of an answer is traced: all of it, a part, or a span of its characters."""

from typing import Any

from hf_doge.checks import show

ALL = "all"
Target = str | tuple[int, int]  # a part of an answer, or where one begins and ends


def targets_of(target: Any, count: int) -> list[Target | None] | None:
    """
    What each of some queries is traced for; `None` where that is all.

    Raises:
        ValueError: It is nothing that a target can be, or a list of another length.
    """
    if isinstance(target, list):
        found = [None if one == ALL else one for one in target]
    else:
        found = [None if target == ALL else target] * count
    if len(found) != count:
        raise ValueError(
            f"`target` must be one for all queries, or one for each of the {count}, but got {len(found)}."
        )
    for one in found:
        is_span = isinstance(one, tuple) and len(one) == 2 and all(type(place) is int for place in one)
        if not (one is None or (isinstance(one, str) and one) or (is_span and 0 <= one[0] < one[1])):
            raise ValueError(
                f"`target` must be 'all', a part of the answer, or `(start, stop)` in characters, `0 <= start < stop`, but got {show(one)}."
            )
    return None if all(one is None for one in found) else found


def find_span(target: Target, text: str, answer: str | None, position: int) -> tuple[int, int]:
    """Where the target stands in the text of all tokens with labels, of which the answer is a part, if it is known."""
    low, high = 0, len(text)
    at = -1 if answer is None else text.rfind(answer.strip())  # tokenizers drop spaces at the ends
    if answer is not None and at >= 0:
        low = at - (len(answer) - len(answer.lstrip()))
        high = low + len(answer)
    if isinstance(target, str):
        within = range(max(low, 0), high)
        found = [place for place in within if text.startswith(target, place) and place + len(target) <= max(high, 0)]
        if len(found) != 1:
            told = [place - low for place in found]
            where = f"stands there at the characters {told}: pass `(start, stop)`" if found else "is no part of it"
            raise ValueError(
                f"`target` must be one part of the answer, but {target!r:.80} of query {position}, whose answer is"
                f" {text[max(low, 0) : high]!r:.200}, {where}."
            )
        return found[0], found[0] + len(target)
    if answer is not None and at < 0:
        raise ValueError(
            f"Characters of a `target` must be those of the answer, but the tokenizer makes another text of that of query {position},"
            f" {text!r:.200}. Pass the part itself."
        )
    if target[1] > high - low:
        raise ValueError(
            f"`target` must lie within the answer, but that of query {position} has {high - low} characters and the target is {target}."
        )
    return low + target[0], low + target[1]
