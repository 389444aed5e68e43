"""What case deletion found, as curves, table and file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_doge._version import __version__
from hf_doge.artifacts.cards.text import escape
from hf_doge.evaluation.intervals import bootstrap_interval
from hf_doge.files import write_atomically
from hf_doge.text import parse_json

NOISE = "retraining noise"


@dataclass(frozen=True)
class CaseDeletionResult:
    """
    Probabilities after every retraining. Q = test points, K = values of k, S = seeds.

    Attributes:
        ks (`tuple[int, ...]`): How many examples were removed.
        seeds (`tuple[int, ...]`): Seeds of the retrainings.
        full (`numpy.ndarray` of shape `(Q, S)`): f with nothing removed, under each seed.
        full_noise (`numpy.ndarray` of shape `(Q, S)`): The same under other seeds.
        removed (`dict[tuple[str, str], numpy.ndarray]`):
            f by scorer and sign (`"+"` without proponents, `"-"` without opponents), shape `(Q, K, S)` each.
        num_retrainings (`int`): How many different ones it took.
    """

    ks: tuple[int, ...]
    seeds: tuple[int, ...]
    full: np.ndarray
    full_noise: np.ndarray
    removed: dict[tuple[str, str], np.ndarray]
    num_retrainings: int

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers, in the order they were given."""
        return tuple(dict.fromkeys(scorer for scorer, _ in self.removed))

    def deletion(self, scorer: str, sign: str) -> np.ndarray:
        """
        DEL+ or DEL- of each test point and k, mean over the seeds: shape `(Q, K)`.

        Raises:
            ValueError: There is no such scorer, or `sign` is neither `"+"` nor `"-"`.
        """
        if (scorer, sign) not in self.removed:
            raise ValueError(
                f"`scorer` must be one of {list(self.scorers)} and `sign` '+' or '-', but got {scorer!r} and {sign!r}."
            )
        return (self.removed[scorer, sign] - self.full[:, None]).mean(axis=2)

    def auc(self, scorer: str, sign: str) -> np.ndarray:
        """AUC-DEL+ or AUC-DEL- of each test point, mean over k: shape `(Q,)`."""
        return self.deletion(scorer, sign).mean(axis=1)

    def noise(self) -> np.ndarray:
        """What other seeds alone do to each test point, mean over pairs of seeds: shape `(Q,)`. Its mean should be 0."""
        return (self.full_noise - self.full).mean(axis=1)

    def summary(self) -> dict[str, dict[str, Any]]:
        """
        AUC-DEL of each scorer and the noise of retraining, each with a 95 % bootstrap interval over test points.

        `[scorer]["auc_del+" | "auc_del-"]` has `mean`, `interval` and `by_k`; `[scorer]["spread"]` is DEL- less DEL+,
        which any shift that all removals share leaves alone. The noise has `mean`, `interval` and `std`, over points.
        """
        summary: dict[str, dict[str, Any]] = {}
        for scorer in self.scorers:
            summary[scorer] = {
                f"auc_del{sign}": {
                    **_mean_and_interval(self.auc(scorer, sign)),
                    "by_k": self.deletion(scorer, sign).mean(axis=0).tolist(),
                }
                for sign in ("+", "-")
            }
            summary[scorer]["spread"] = _mean_and_interval(self.auc(scorer, "-") - self.auc(scorer, "+"))
        noise = self.noise()
        summary[NOISE] = {**_mean_and_interval(noise), "std": float(noise.std())}
        return summary

    def differences(self, reference: str) -> dict[str, dict[str, dict[str, Any]]]:
        """
        How each other scorer's AUC-DEL differs from `reference`'s on the same points, with 95 % bootstrap intervals.

        `[scorer]["auc_del+" | "auc_del-"]`; above 0 in `auc_del+`, or below 0 in `auc_del-`, the reference is better.

        Raises:
            ValueError: if `reference` is not among the scorers.
        """
        if reference not in self.scorers:
            raise ValueError(f"`reference` must be one of {list(self.scorers)}, but got {reference!r}.")
        return {
            scorer: {
                f"auc_del{sign}": _mean_and_interval(self.auc(scorer, sign) - self.auc(reference, sign))
                for sign in ("+", "-")
            }
            for scorer in self.scorers
            if scorer != reference
        }

    def to_markdown(self) -> str:
        """A table of AUC-DEL+ (lower is better) and AUC-DEL- (higher is better), and the noise of retraining."""
        summary = self.summary()
        noise = summary.pop(NOISE)
        lines = [
            f"Change of the test points' probability in percentage points, mean over {len(self.full)} points, "
            f"{len(self.seeds)} seeds and k in {list(self.ks)}; in brackets 95 % over points. {self.num_retrainings:,} "
            "retrainings.",
            "",
            "| scorer | AUC-DEL+ (lower is better) | AUC-DEL- (higher is better) | DEL- less DEL+ |",
            "|---|---:|---:|---:|",
        ]
        for scorer, values in summary.items():
            cells = [_format(values[name]) for name in ("auc_del+", "auc_del-", "spread")]
            lines.append(f"| {escape(scorer)} | {' | '.join(cells)} |")
        lines += [
            "",
            f"Retraining noise: other seeds and nothing removed give {_format(noise)}, with a standard deviation of "
            f"{100 * noise['std']:.2f} over the points. Mean probability with nothing removed: {self.full.mean():.3f}.",
        ]
        return "\n".join(lines) + "\n"

    def to_plot_rows(self) -> list[dict[str, Any]]:
        """One row per scorer, sign and k, as [`~hf_doge.influence_plots.plot_case_deletion`] takes them."""
        rows = []
        for scorer in self.scorers:
            for sign in ("+", "-"):
                for k, values in zip(self.ks, self.deletion(scorer, sign).T, strict=True):
                    low, high = bootstrap_interval(values)
                    rows.append(
                        {
                            "scorer": scorer,
                            "sign": sign,
                            "k": k,
                            "mean": float(values.mean()),
                            "low": low,
                            "high": high,
                        }
                    )
        return rows

    def save(self, save_directory: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
        """
        Write `case_deletion.json` (all probabilities and the summary) and `case_deletion.md`.

        Args:
            save_directory (`str` or `Path`): Made when it does not exist.
            extra (`Mapping`, *optional*): More plain values for the JSON, such as cancellation ratios.
        """
        save_directory = Path(save_directory)
        save_directory.mkdir(parents=True, exist_ok=True)
        contents = {
            "hf_doge_version": __version__,
            "ks": self.ks,
            "seeds": self.seeds,
            "num_retrainings": self.num_retrainings,
            "full": self.full.tolist(),
            "full_noise": self.full_noise.tolist(),
            "removed": [
                {"scorer": scorer, "sign": sign, "probabilities": values.tolist()}
                for (scorer, sign), values in self.removed.items()
            ],
            "summary": self.summary(),
            **(extra or {}),
        }
        write_atomically(
            save_directory / "case_deletion.json", json.dumps(contents, indent=2, sort_keys=True).encode()
        )
        write_atomically(save_directory / "case_deletion.md", self.to_markdown().encode())

    @classmethod
    def load(cls, save_directory: str | Path) -> "CaseDeletionResult":
        """
        Read what [`~CaseDeletionResult.save`] wrote.

        Raises:
            ValueError: The file holds something else.
        """
        path = Path(save_directory) / "case_deletion.json"
        contents = parse_json(path.read_bytes(), source=str(path))
        try:
            return cls(
                ks=tuple(contents["ks"]),
                seeds=tuple(contents["seeds"]),
                full=np.array(contents["full"]),
                full_noise=np.array(contents["full_noise"]),
                removed={
                    (entry["scorer"], entry["sign"]): np.array(entry["probabilities"]) for entry in contents["removed"]
                },
                num_retrainings=contents["num_retrainings"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} must hold a case deletion, but does not: {error!r:.200}.") from error


def _mean_and_interval(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "interval": list(bootstrap_interval(values))}


def _format(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{100 * cell['mean']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
