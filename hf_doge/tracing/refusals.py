"""What a search refuses: options that an index cannot answer, or that say nothing to its scorer."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.metric import metric_of
from hf_doge.checks import show


def refuse_nothing_left(reader: IndexReader) -> None:
    """Raise a `ValueError` where what was frozen cannot be dropped, as an index holds nothing else."""
    if reader.config["virtual"]:
        raise ValueError(
            "`virtual='drop'` leaves out what was frozen in training, but nothing in this index was trained, so nothing would be"
            " left. Leave it out, or record what is trained (`layers`)."
        )
    if reader.config.get("layers") is not None and not isinstance(
        reader.config["metadata"].get("virtual_parts"), list
    ):
        raise ValueError(
            "`virtual='drop'` leaves out what was frozen in training, but this index, of an earlier version, does not tell which "
            "of its parts were. Record it again, or leave `virtual` out, which counts all of it."
        )


def refuse_metric(what: str, reader: IndexReader) -> None:
    """Raise a `ValueError` if the rows of an index are divided by Adam's metric for queries that are not, as once."""
    if metric_of(reader.config) == "one-sided":
        raise ValueError(
            f"{what} needs the length of the training examples' gradients, but this index was recorded with "
            "`second_moment=True` of an earlier version: its rows are divided by all of Adam's metric, and it keeps none of "
            "it. Record the checkpoints again with `metric='optimizer'`, in another folder."
        )


def refuse_with_bm25(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if an option is given that is about gradients."""
    known = ("scorer", "next_tokens", "batch_size")
    others = [name for name, value in given.items() if name not in known and value not in (None, defaults[name])]
    if others:
        raise ValueError(
            f"`scorer='bm25'` compares the words of texts and knows no gradients, so it does not go with `{others[0]}="
            f"{show(given[others[0]])}`. Leave one of the two out."
        )


def several_texts(other: str, names: Sequence[str]) -> ValueError:
    """The error of a record that has another text that models read next to those in these fields."""
    return ValueError(
        f"A record must say in one place what the model reads, but it has both `{other}` and {' and '.join(map(repr, names))}."
        " Keep one of them, or call a pair `text` and `text_pair` and give a prompt a `completion`."
    )


def refuse_other_labels(given: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a record has two labels, of one kind and shape, that differ."""
    plain = {name: value for name, value in given.items() if isinstance(value, int | float | str | list)}
    for (one, first), (other, second) in combinations(plain.items(), 2):
        alike = isinstance(first, str) == isinstance(second, str)
        values = [np.asarray(value, dtype=object) for value in (first, second)]
        if alike and values[0].shape == values[1].shape and not np.array_equal(values[0], values[1]):
            raise ValueError(
                f"A record must have one label, but `{one}` is {show(given[one])} and `{other}` is {show(given[other])}. Keep"
                " the one that is to be traced."
            )


def refuse_other_loss(recorded: str | None, given: str | None) -> None:
    """
    Raise a `ValueError` where queries would have the model's loss and the index another one, or the other way round; warn where
    both are functions, of different names. What ran as a script has `__main__` for its module.
    """
    if (recorded is None) != (given is None):
        raise ValueError(
            f"Queries must be recorded with the loss of the index, which is {recorded or 'that of the model'}. "
            + ("Leave `loss_fn` out." if recorded is None else "Pass it as `loss_fn`.")
        )
    names = [str(name).removeprefix("__main__.") for name in (recorded, given)]
    if names[0] != names[1] and not any(one.endswith(f".{other}") for one, other in (names, names[::-1])):
        warnings.warn(
            f"The index was recorded with the loss {recorded}, but `loss_fn` is {given}. If they are not the same function, the"
            " scores compare gradients of two losses: pass the one of the recording.",
            stacklevel=4,
        )
