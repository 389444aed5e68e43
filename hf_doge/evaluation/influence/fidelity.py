"""What a compressed index loses: its scores against the exact ones, beside the bytes it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_doge.evaluation.influence.rank_metrics import spearman, top_overlap


@dataclass(frozen=True)
class Fidelity:
    """
    How near compressed scores are to exact ones.

    Attributes:
        name (`str`): The compression.
        bytes_per_example (`float`): On disk.
        spearman (`float`): Mean rank correlation over the queries that have an order on both sides.
        spearman_worst (`float`): The smallest.
        top_overlap (`float`): Mean share of the `k` strongest proponents that stay among the `k` strongest.
        bottom_overlap (`float`): The same for opponents.
        num_unordered (`int`): Queries whose scores are all equal on one side; the rank correlation leaves them out.
    """

    name: str
    bytes_per_example: float
    spearman: float
    spearman_worst: float
    top_overlap: float
    bottom_overlap: float
    num_unordered: int = 0


def measure_fidelity(
    name: str, exact: np.ndarray, compressed: np.ndarray, *, bytes_per_example: float, k: int = 10
) -> Fidelity:
    """
    Compare two score matrices of shape `(Q, N)`, query by query.

    Args:
        name (`str`): What the compression is called in the table.
        exact, compressed (`numpy.ndarray` of shape `(num_queries, num_examples)`): Scores.
        bytes_per_example (`float`): Size of the compressed index over the number of examples.
        k (`int`): How many proponents and opponents are compared, at most N.

    Raises:
        ValueError: if shapes differ, a score is no finite number, or no query has an order.
    """
    correlations = spearman(exact, compressed)
    ordered = correlations[~np.isnan(correlations)]
    if not len(ordered):
        raise ValueError(f"At least one query must have unequal scores, but {name!r} has none. Check its queries.")
    return Fidelity(
        name=name,
        bytes_per_example=bytes_per_example,
        spearman=float(ordered.mean()),
        spearman_worst=float(ordered.min()),
        top_overlap=float(top_overlap(exact, compressed, k).mean()),
        bottom_overlap=float(top_overlap(-np.asarray(exact), -np.asarray(compressed), k).mean()),
        num_unordered=len(correlations) - len(ordered),
    )


def fidelity_table(rows: Sequence[Fidelity], *, k: int = 10) -> str:
    """The rows as a Markdown table; `k` only names the columns."""
    lines = [
        f"| index | bytes per example | Spearman, mean | worst query | top-{k} overlap | bottom-{k} overlap |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.name} | {row.bytes_per_example:,.0f} | {row.spearman:.4f} | {row.spearman_worst:.4f} | "
        f"{row.top_overlap:.3f} | {row.bottom_overlap:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
