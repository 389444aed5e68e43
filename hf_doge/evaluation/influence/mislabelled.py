"""Finding wrong labels: some are flipped on purpose, and a good suspicion ranks those first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_doge.evaluation.influence.rank_metrics import area_under_roc, recall_at

DEFAULT_FRACTIONS = (0.05, 0.1, 0.2, 0.3)


def flip_labels(labels: np.ndarray, share: float, *, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Give a share of the examples another class, drawn evenly from the others.

    Args:
        labels (`numpy.ndarray` of shape `(N,)`): Classes from 0 to `num_classes - 1`.
        share (`float`): Which share to flip, rounded to whole examples, at least one of each kind.
        num_classes (`int`): At least 2.
        seed (`int`): Of the draw.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: new labels `(N,)`, and which were flipped, `(N,)` of dtype bool.

    Raises:
        ValueError: if a label is no class, or the share leaves nothing flipped or nothing as it was.
    """
    labels = np.asarray(labels)
    if num_classes < 2 or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels must be classes from 0 to {num_classes - 1}, of at least two, but got {set(labels.tolist())}."
        )
    count = round(share * len(labels))
    if not 1 <= count < len(labels):
        raise ValueError(
            f"`share` must flip at least one of {len(labels)} labels and leave at least one, but {share} flips {count}."
        )
    generator = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[generator.choice(len(labels), size=count, replace=False)] = True
    flips = generator.integers(1, num_classes, size=len(labels))
    return np.where(flipped, (labels + flips) % num_classes, labels), flipped


@dataclass(frozen=True)
class MislabelledReport:
    """
    How well each ranking finds the flipped labels.

    Attributes:
        num_examples, num_flipped (`int`): Sizes.
        fractions (`tuple[float, ...]`): Shares of the examples that are inspected.
        recalls (`dict[str, tuple[float, ...]]`): By ranking, the share of flipped labels found at each fraction.
        areas (`dict[str, float]`): By ranking, the area under the ROC curve; 0.5 is chance.
    """

    num_examples: int
    num_flipped: int
    fractions: tuple[float, ...]
    recalls: dict[str, tuple[float, ...]]
    areas: dict[str, float]

    def to_markdown(self) -> str:
        """One line per ranking; `by chance` has what inspecting at random would find on average."""
        header = ["ranking", *(f"recall at {100 * fraction:g} %" for fraction in self.fractions), "AUC"]
        lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
        for name, recalls in {**self.recalls, "by chance": self.fractions}.items():
            cells = [f"{value:.3f}" for value in (*recalls, self.areas.get(name, 0.5))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return f"{self.num_flipped} of {self.num_examples} labels flipped.\n\n" + "\n".join(lines) + "\n"


def evaluate_mislabelled(
    suspicions: Mapping[str, np.ndarray],
    flipped: np.ndarray,
    *,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> MislabelledReport:
    """
    Compare rankings of suspicion, such as self-influence and the loss, with each other and with a random one.

    Args:
        suspicions (`Mapping[str, numpy.ndarray]`): By name, one number per example of a model trained on the flipped
            labels: high where the label is suspected.
        flipped (`numpy.ndarray` of shape `(N,)` and dtype bool): From [`flip_labels`].
        fractions (`Sequence[float]`): Shares of the examples to inspect, in (0, 1].
        seed (`int`): Of the ranking `"random"`, which is added.

    Returns:
        [`MislabelledReport`].

    Raises:
        ValueError: if shapes or fractions do not fit, or nothing is flipped.
    """
    rankings = {**suspicions, "random": np.random.default_rng(seed).random(len(flipped))}
    return MislabelledReport(
        num_examples=len(flipped),
        num_flipped=int(np.sum(flipped)),
        fractions=tuple(fractions),
        recalls={
            name: tuple(recall_at(values, flipped, fraction) for fraction in fractions)
            for name, values in rankings.items()
        },
        areas={name: area_under_roc(values, flipped) for name, values in rankings.items()},
    )
