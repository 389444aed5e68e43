"""What the linear datamodelling score found, as numbers, table and file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_doge._version import __version__
from hf_doge.artifacts.cards.text import escape
from hf_doge.evaluation.influence.rank_metrics import spearman
from hf_doge.evaluation.intervals import bootstrap_interval
from hf_doge.files import write_atomically
from hf_doge.text import parse_json


@dataclass(frozen=True)
class LDSResult:
    """
    Outputs after every retraining, and what the scores said of them. Q = test points, M = subsets, S = seeds.

    Attributes:
        kept (`numpy.ndarray` of shape `(M, N)` and dtype bool): Which examples each subset has.
        seeds (`tuple[int, ...]`): Seeds of the retrainings.
        outputs (`numpy.ndarray` of shape `(Q, M, S)`): f of each test point, trained on each subset under each seed.
        group_scores (`dict[str, numpy.ndarray]`): By scorer, the sum of each subset's scores, shape `(Q, M)` each.

    Raises:
        ValueError: if a test point has the same output after every retraining.
    """

    kept: np.ndarray
    seeds: tuple[int, ...]
    outputs: np.ndarray
    group_scores: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        same = np.flatnonzero(np.ptp(self.outputs.mean(axis=2), axis=1) == 0)
        if len(same):
            raise ValueError(
                f"The outputs of each test point must differ between subsets, but those of {same.tolist()} are all equal. "
                "Take an output that does not saturate, such as a margin, or leave these points out."
            )

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers, in the order they were given."""
        return tuple(self.group_scores)

    def lds(self, scorer: str) -> np.ndarray:
        """
        Spearman's correlation for each test point, shape `(Q,)`; 0 where the scorer says the same of all subsets.

        Raises:
            ValueError: There is no such scorer.
        """
        if scorer not in self.group_scores:
            raise ValueError(f"`scorer` must be one of {list(self.scorers)}, but got {scorer!r}.")
        return np.nan_to_num(spearman(self.group_scores[scorer], self.outputs.mean(axis=2)))

    def agreement(self) -> np.ndarray | None:
        """
        How far the seeds agree: Spearman's correlation of one half of them with the other, for each test point, `(Q,)`.

        `None` for a single seed. Where it is low, outputs are mostly chance and no scorer can have a high LDS: more seeds
        or larger differences between subsets are needed.
        """
        half = len(self.seeds) // 2
        if not half:
            return None
        first, second = self.outputs[:, :, :half].mean(axis=2), self.outputs[:, :, half : 2 * half].mean(axis=2)
        return np.nan_to_num(spearman(first, second))

    def summary(self) -> dict[str, dict[str, Any]]:
        """By scorer: `mean` of the LDS over test points and its 95 % bootstrap `interval`, see [`bootstrap_interval`]."""
        return {scorer: _mean_and_interval(self.lds(scorer)) for scorer in self.scorers}

    def differences(self, reference: str) -> dict[str, dict[str, Any]]:
        """
        How each other scorer's LDS differs from `reference`'s on the same points; above 0 the scorer is better.

        Raises:
            ValueError: if `reference` is not among the scorers.
        """
        if reference not in self.scorers:
            raise ValueError(f"`reference` must be one of {list(self.scorers)}, but got {reference!r}.")
        return {
            scorer: _mean_and_interval(self.lds(scorer) - self.lds(reference))
            for scorer in self.scorers
            if scorer != reference
        }

    def to_markdown(self) -> str:
        """A table of the mean LDS of each scorer."""
        num_subsets, num_examples = self.kept.shape
        lines = [
            f"Linear datamodelling score, mean over {len(self.outputs)} test points; in brackets 95 % over points. "
            f"{num_subsets} subsets of {int(self.kept[0].sum())} of {num_examples} examples, {len(self.seeds)} seed(s).",
            "",
            "| scorer | LDS |",
            "|---|---:|",
            *(f"| {escape(scorer)} | {_format(values)} |" for scorer, values in self.summary().items()),
        ]
        agreement = self.agreement()
        if agreement is not None:
            lines += ["", f"Agreement of one half of the seeds with the other: {agreement.mean():+.3f}."]
        return "\n".join(lines) + "\n"

    def save(self, save_directory: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
        """
        Write `lds.json` (all outputs and sums of scores, and the summary) and `lds.md`.

        Args:
            save_directory (`str` or `Path`): Made when it does not exist.
            extra (`Mapping`, *optional*): More plain values for the JSON.
        """
        save_directory = Path(save_directory)
        save_directory.mkdir(parents=True, exist_ok=True)
        contents = {
            "hf_doge_version": __version__,
            "seeds": self.seeds,
            "kept": [np.flatnonzero(row).tolist() for row in self.kept],
            "num_examples": self.kept.shape[1],
            "outputs": self.outputs.tolist(),
            "group_scores": {scorer: values.tolist() for scorer, values in self.group_scores.items()},
            "summary": self.summary(),
            **(extra or {}),
        }
        write_atomically(save_directory / "lds.json", json.dumps(contents, indent=2).encode())
        write_atomically(save_directory / "lds.md", self.to_markdown().encode())

    @classmethod
    def load(cls, save_directory: str | Path) -> "LDSResult":
        """
        Read what [`~LDSResult.save`] wrote.

        Raises:
            ValueError: The file holds something else.
        """
        path = Path(save_directory) / "lds.json"
        contents = parse_json(path.read_bytes(), source=str(path))
        try:
            kept = np.zeros((len(contents["kept"]), contents["num_examples"]), dtype=bool)
            for row, places in zip(kept, contents["kept"], strict=True):
                row[places] = True
            return cls(
                kept=kept,
                seeds=tuple(contents["seeds"]),
                outputs=np.array(contents["outputs"]),
                group_scores={scorer: np.array(values) for scorer, values in contents["group_scores"].items()},
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{str(path)!r} must hold an LDS, but does not: {error!r:.200}.") from error


def _mean_and_interval(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "interval": list(bootstrap_interval(values))}


def _format(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{cell['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
