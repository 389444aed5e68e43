"""Whether weights are shares of the examples or of the tokens, and what they come to where the two differ."""

import warnings
from typing import Any

import numpy as np
from transformers import Trainer

from hf_doge.sampling.domains import DomainIndex
from hf_doge.sampling.lengths import count_row_tokens
from hf_doge.sampling.phases import read_phases
from hf_doge.sampling.weights import to_shares
from hf_doge.training.domain_loss import are_labels_shifted

_EQUAL = 0.01  # of the mean length: below it rows count as equally long


def read_lengths(trainer: Trainer, unit: str) -> np.ndarray | None:
    """
    Tokens of each row of the train set that the loss counts, for weights in tokens; else `None`.

    Raises:
        `ValueError`: if the rows do not tell.
    """
    if unit != "tokens":
        return None
    return _count_tokens(trainer)


def warn_of_other_unit(trainer: Trainer, weights: Any, domains: DomainIndex, unit: str) -> None:
    """Weights that were learned in tokens are not what examples are drawn by where rows are not equally long."""
    last = read_phases(weights)[-1][1]
    if getattr(last, "unit", None) != "tokens" or unit == "tokens":
        return
    try:
        lengths = _count_tokens(trainer)
    except ValueError:  # nothing to count
        return
    sizes = domains.sizes
    totals = np.array([lengths[domains.rows(np.full(n, d), np.arange(n))].sum() for d, n in enumerate(sizes)])
    shares, means = to_shares(last, domains.names), totals / np.maximum(sizes, 1)
    drawn = means[shares > 0]
    if drawn.max() <= drawn.min() * (1 + _EQUAL):
        return
    tokens = shares * means / (shares * means).sum()
    most = int(np.abs(tokens - shares).argmax())
    warnings.warn(
        "The weights were learned as shares of tokens, but here they are shares of examples, which are not equally long: "
        f"{domains.names[most]!r} has weight {shares[most]:.3f} and comes to {tokens[most]:.3f} of the tokens. Pass "
        "`unit='tokens'`, or cut the rows to one length.",
        stacklevel=3,
    )


def _count_tokens(trainer: Trainer) -> np.ndarray:
    dataset: Any = trainer.train_dataset  # by now a `Dataset`, which transformers does not declare
    return count_row_tokens(dataset, shift=int(are_labels_shifted(trainer.model)))
