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
    asked = [_plain(one) for one in target] if isinstance(target, list) else [_plain(target)] * count
    found = [None if one == ALL else one for one in asked]
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


def _plain(target: Any) -> Any:
    """A span in numbers or arrays of numpy or torch as a tuple of Python's."""
    if isinstance(target, tuple):
        return tuple(one.tolist() if hasattr(one, "tolist") else one for one in target)
    if isinstance(target, str) or not hasattr(target, "tolist"):
        return target
    values = target.tolist()
    return tuple(values) if isinstance(values, list) else values


def find_span(target: Target, text: str, answer: str | None, position: int) -> tuple[int, int]:
    """
    Where the target stands in what the answer's tokens decode to.

    Args:
        target (`str | tuple[int, int]`): A part of the answer, or where one begins and ends in its characters.
        text (`str`): The text of the answer's tokens; next to it there may be some characters of the tokens at its ends.
        answer (`str`, *optional*): As it was asked. `None`: it is the text.
        position (`int`): What errors call the query.

    Raises:
        ValueError: The answer does not hold the target, or not once, or the text not the answer.
    """
    answer = text if answer is None else answer
    start, stop = _find_part(target, answer, position)
    shown = answer.strip()  # tokenizers drop spaces at the ends
    at = text.find(shown)
    first = at - (len(answer) - len(answer.lstrip()))
    found = text[max(first + start, 0) : max(first + stop, 0)]
    is_there = at >= 0 and text.find(shown, at + 1) < 0 and found.strip() == answer[start:stop].strip()
    if not is_there or not shown:
        raise ValueError(
            f"`target` must be part of an answer that the model reads, but the answer of query {position}, {answer!r:.200}, is not"
            f" what its tokens say, {text!r:.200}: it was cut at the model's or the examples' length, or changed by the chat template"
            " or the tokenizer. Shorten the prompt, write the answer as the tokens say it, or ask with `input_ids` and `labels`."
        )
    return first + start, first + stop


def _find_part(target: Target, answer: str, position: int) -> tuple[int, int]:
    """Where the target stands in the answer."""
    if isinstance(target, str):
        found = [place for place in range(len(answer)) if answer.startswith(target, place)]
        if len(found) != 1:
            where = f"stands there at the characters {found}: pass `(start, stop)`" if found else "is no part of it"
            raise ValueError(
                f"`target` must be one part of the answer, but {target!r:.80} of query {position}, whose answer is {answer!r:.200},"
                f" {where}."
            )
        return found[0], found[0] + len(target)
    if target[1] > len(answer):
        raise ValueError(
            f"`target` must lie within the answer, but that of query {position} has {len(answer)} characters and the target is {target}."
        )
    return target
