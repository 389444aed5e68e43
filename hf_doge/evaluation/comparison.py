"""Was the mixture worth it? Runs of the same model on different mixtures, put side by side."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_doge._version import __version__
from hf_doge.artifacts.cards.markdown import escape
from hf_doge.checks import check_names

BASELINES = ("uniform", "natural")


@dataclass(frozen=True)
class MixtureRun:
    """
    One model trained on one mixture with one seed, and how it fares on every domain.

    Attributes:
        mixture (`str`): Name of the mixture.
        seed (`int`): Seed of the model's initialisation and of the data order.
        weights (`dict[str, float]`): Domain weights trained with, by training domain. They sum to 1.
        losses (`dict[str, float]`): Mean validation loss per token, in nats, of every training domain and target.
        epochs (`dict[str, float]`): How many times the run went through each training domain.
        train_tokens (`int`): Tokens trained on, over all domains.
    """

    mixture: str
    seed: int
    weights: dict[str, float]
    losses: dict[str, float]
    epochs: dict[str, float]
    train_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MixtureRun":
        """The run in a dict that may hold more keys."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class Comparison:
    """
    Perplexities of several mixtures over the same seeds.

    A domain's perplexity is `exp` of its mean loss per token. The average is the arithmetic mean over training domains,
    as in the DoGE paper's tables; the geometric mean is `exp` of the mean loss, which no single domain dominates.
    Targets, which no model is trained on, have rows of their own and are in neither.

    Args:
        runs (`Iterable[MixtureRun]`):
            One run per mixture and seed. Mixtures and seeds keep the order in which they first appear.

    Raises:
        `ValueError`: if there is no run, if the runs are not of the same seeds, domains or number of tokens, or if a
            run is there twice.
    """

    def __init__(self, runs: Iterable[MixtureRun]) -> None:
        self.runs = list(runs)
        if not self.runs:
            raise ValueError(
                "A comparison needs at least one finished run, but got none. Run `hf-doge compare` first."
            )
        self.mixtures = tuple(dict.fromkeys(run.mixture for run in self.runs))
        self.seeds = tuple(dict.fromkeys(run.seed for run in self.runs))
        first = self.runs[0]
        self.domains = tuple(first.weights)
        self.targets = tuple(name for name in first.losses if name not in first.weights)
        self.train_tokens = first.train_tokens
        self._check()
        by_key = {(run.mixture, run.seed): run for run in self.runs}
        self._losses = {  # (S, K): seeds by domains, training domains first
            mixture: np.array(
                [[by_key[mixture, seed].losses[name] for name in self.domains + self.targets] for seed in self.seeds]
            )
            for mixture in self.mixtures
        }

    def _check(self) -> None:
        check_names(self.mixtures)
        check_names(self.domains + self.targets)
        keys = [(run.mixture, run.seed) for run in self.runs]
        expected = {(mixture, seed) for mixture in self.mixtures for seed in self.seeds}
        if len(set(keys)) != len(keys) or set(keys) != expected:
            missing = sorted(expected - set(keys))
            raise ValueError(
                f"Every mixture must have one run per seed {list(self.seeds)}, but missing are {missing} and repeated "
                f"are {sorted({key for key in keys if keys.count(key) > 1})}. Run `hf-doge compare` again to complete them."
            )
        for run in self.runs:
            if set(run.weights) != set(self.domains) or set(run.losses) != {*self.domains, *self.targets}:
                raise ValueError(
                    f"All runs must be of the same domains, but {run.mixture!r} with seed {run.seed} is of "
                    f"{sorted(run.losses)} and {self.runs[0].mixture!r} of {sorted(self.runs[0].losses)}. "
                    "Compare them in separate folders."
                )
            if run.train_tokens != self.train_tokens:
                raise ValueError(
                    f"All runs must train on the same number of tokens, but {run.mixture!r} with seed {run.seed} took "
                    f"{run.train_tokens} and {self.runs[0].mixture!r} took {self.train_tokens}. Train them again alike."
                )

    def perplexities(self, mixture: str) -> dict[str, np.ndarray]:
        """
        Perplexity of each domain and target, shape `(num_seeds,)` each, in the order of `seeds`.

        After the domains and targets come `"average"`, `"geometric mean"` and `"worst domain"`.
        """
        losses = self._losses[mixture]
        perplexities = np.exp(losses)
        trained, trained_losses = perplexities[:, : len(self.domains)], losses[:, : len(self.domains)]
        return {
            **dict(zip(self.domains + self.targets, perplexities.T, strict=True)),
            "average": trained.mean(axis=1),
            "geometric mean": np.exp(trained_losses.mean(axis=1)),
            "worst domain": trained.max(axis=1),
        }

    def summary(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Mean and standard deviation over seeds, `[mixture][row]["mean" | "std"]`; no deviation for a single seed."""
        return {
            mixture: {
                row: {
                    "mean": float(values.mean()),
                    "std": float(values.std(ddof=1)) if len(values) > 1 else None,
                }
                for row, values in self.perplexities(mixture).items()
            }
            for mixture in self.mixtures
        }

    def epochs(self, mixture: str) -> dict[str, float]:
        """How many times each training domain was gone through, mean over seeds."""
        runs = [run for run in self.runs if run.mixture == mixture]
        return {name: sum(run.epochs[name] for run in runs) / len(runs) for name in self.domains}

    def weights(self, mixture: str) -> dict[str, float]:
        """Domain weights of a mixture, mean over seeds where each seed has its own."""
        runs = [run for run in self.runs if run.mixture == mixture]
        return {name: sum(run.weights[name] for run in runs) / len(runs) for name in self.domains}

    def verdict(self, mixture: str, baseline: str) -> str:
        """
        One sentence per yardstick on whether `mixture` beats `baseline`, seed against seed.

        The yardsticks are the targets, where there are any, then the average and the geometric mean.
        """
        ours, theirs = self.perplexities(mixture), self.perplexities(baseline)
        names = f"{escape(mixture)} against {escape(baseline)}"
        lines = []
        for row in (*self.targets, "average", "geometric mean"):
            wins = int((ours[row] < theirs[row]).sum())
            change = 100 * (ours[row].mean() / theirs[row].mean() - 1)
            if wins == len(self.seeds):
                judgement = "better in every seed"
            elif (ours[row] > theirs[row]).all():
                judgement = "NOT better: worse in every seed"
            else:
                judgement = f"no consistent difference: better in {wins} of {len(self.seeds)} seeds"
            lines.append(
                f"{names}, {escape(self._row_label(row))}: {_format(ours[row].mean())} against "
                f"{_format(theirs[row].mean())} ({change:+.1f} %), {judgement}."
            )
        better = sum(ours[name].mean() < theirs[name].mean() for name in self.domains)
        lines.append(f"{names}: lower on {better} of {len(self.domains)} training domains.")
        return "\n".join(f"- {line}" for line in lines)

    def to_markdown(self) -> str:
        """
        Tables of perplexities, and of weights and epochs, one column per mixture; the lowest mean is bold.

        Under them stands the [`~Comparison.verdict`] on each mixture against `"uniform"` and `"natural"`.
        """
        summary = self.summary()
        rows = next(iter(summary.values()))
        perplexity_rows = []
        for row in rows:
            cells = [summary[mixture][row] for mixture in self.mixtures]
            lowest = min(cell["mean"] for cell in cells)
            perplexity_rows.append(
                [escape(self._row_label(row))]
                + [_format_cell(cell["mean"], cell["std"], is_bold=cell["mean"] == lowest) for cell in cells]
            )
        mixture_rows = [
            [escape(name)]
            + [f"{self.weights(mixture)[name]:.4f}, {self.epochs(mixture)[name]:.2f}" for mixture in self.mixtures]
            for name in self.domains
        ]
        verdicts = [
            self.verdict(mixture, baseline)
            for mixture in self.mixtures
            for baseline in BASELINES
            if mixture not in BASELINES and baseline in self.mixtures
        ]
        if verdicts and len(self.seeds) < 3:
            verdicts.append(f"From {len(self.seeds)} seed(s): a difference of the size of the spread is noise.")
        seeds = (
            f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"mean ± standard deviation over seeds {self.seeds}"
        )
        header = ["", *map(escape, self.mixtures)]
        return (
            f"Validation perplexity after {self.train_tokens:,} training tokens, {seeds}. Lower is better.\n\n"
            f"{_markdown_table(header, perplexity_rows)}\n\n"
            "Weight of each domain, and epochs: how many times it was gone through.\n\n"
            f"{_markdown_table(header, mixture_rows)}\n" + "".join(f"\n{verdict}\n" for verdict in verdicts)
        )

    def to_plot_rows(self) -> list[dict[str, Any]]:
        """One row per mixture and row of the table, as [`~hf_doge.plots.plot_comparison`] takes them."""
        return [
            {"mixture": mixture, "domain": self._row_label(row), **cell}
            for mixture, rows in self.summary().items()
            for row, cell in rows.items()
        ]

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per mixture, seed and domain; a target has neither weight nor epochs."""
        return [
            {
                "mixture": run.mixture,
                "seed": run.seed,
                "domain": name,
                "is_target": name in self.targets,
                "weight": run.weights.get(name),
                "epochs": run.epochs.get(name),
                "loss": run.losses[name],
                "perplexity": math.exp(run.losses[name]),
                "train_tokens": run.train_tokens,
            }
            for run in self.runs
            for name in self.domains + self.targets
        ]

    def save(self, save_directory: str | Path) -> None:
        """Write `comparison.md`, `comparison.parquet` (one row per mixture, seed and domain) and `comparison.json`."""
        save_directory = Path(save_directory)
        save_directory.mkdir(parents=True, exist_ok=True)
        contents = {
            "hf_doge_version": __version__,
            "seeds": list(self.seeds),
            "runs": [run.to_dict() for run in self.runs],
            "summary": self.summary(),
        }
        _write(save_directory / "comparison.json", json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False))
        _write(save_directory / "comparison.md", self.to_markdown())
        partial = save_directory / "comparison.parquet.partial"
        pq.write_table(pa.Table.from_pylist(self.to_rows()), partial)
        partial.replace(save_directory / "comparison.parquet")

    @classmethod
    def load(cls, save_directory: str | Path) -> "Comparison":
        """Read what [`~Comparison.save`] wrote."""
        contents = json.loads((Path(save_directory) / "comparison.json").read_text(encoding="utf-8"))
        return cls(MixtureRun.from_dict(run) for run in contents["runs"])

    def _row_label(self, row: str) -> str:
        return f"{row} (target, not trained on)" if row in self.targets else row


def _format(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.4g}"


def _format_cell(mean: float, std: float | None, *, is_bold: bool) -> str:
    text = _format(mean) if std is None else f"{_format(mean)} ± {_format(std)}"
    return f"**{text}**" if is_bold else text


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads as well before rendering: columns are padded, all but the first to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _write(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
