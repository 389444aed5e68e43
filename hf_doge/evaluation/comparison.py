"""Was the mixture worth it? Runs of the same model on different mixtures, put side by side."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_doge._version import __version__
from hf_doge.artifacts.cards.html import escape_html
from hf_doge.artifacts.cards.text import escape
from hf_doge.artifacts.parquet import to_parquet
from hf_doge.checks import check_names
from hf_doge.evaluation.comparison_tables import Table, format_change, format_perplexity
from hf_doge.evaluation.intervals import Interval, t_interval
from hf_doge.files import write_atomically
from hf_doge.text import parse_json

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
        target_losses (`dict[str, dict[str, float]]`):
            Losses of the targets by another measure than the model as it is: `"calibrated"` (its logits divided by one
            temperature, fitted on train text of the target) or `"adapted_<steps>"` (after so many steps on that text).
        bytes_per_token (`dict[str, float]`): UTF-8 bytes of a validation token, by domain and target where known.
    """

    mixture: str
    seed: int
    weights: dict[str, float]
    losses: dict[str, float]
    epochs: dict[str, float]
    train_tokens: int
    target_losses: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MixtureRun":
        """The run in a dict that may hold more keys."""
        return cls(**{known.name: values[known.name] for known in fields(cls) if known.name in values})


class Comparison:
    """
    Perplexities of several mixtures over the same seeds.

    A domain's perplexity is `exp` of its mean loss per token. The average is the arithmetic mean over training domains,
    as in the DoGE paper's tables; the geometric mean is `exp` of the mean loss, which no single domain dominates.
    Targets, which no model is trained on, have rows of their own and are in neither. A small model that has never seen a
    target is over-confident there, and the more so the nearer its mixture is, which hides what it has learned: so targets
    are also measured at the model's own temperature and after a few steps on them, where the runs tell.

    Mixtures are compared seed by seed. The runs of one seed share the initial parameters and the order of the documents in
    each domain, so their differences are much smaller than the spread over seeds.

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

    def _losses_of(self, mixture: str) -> np.ndarray:
        if mixture not in self._losses:
            raise ValueError(f"`mixture` must be one of {list(self.mixtures)}, but got {mixture!r}.")
        return self._losses[mixture]

    def perplexities(self, mixture: str) -> dict[str, np.ndarray]:
        """
        Perplexity of each domain and target, shape `(num_seeds,)` each, in the order of `seeds`.

        After the domains and targets come `"average"`, `"geometric mean"` and `"worst domain"`.
        """
        losses = self._losses_of(mixture)
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
                row: {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else None}
                for row, values in self.perplexities(mixture).items()
            }
            for mixture in self.mixtures
        }

    def bits_per_byte(self) -> dict[str, dict[str, float]]:
        """`[mixture][domain or target]`, mean over seeds, of those whose text's size in bytes every run tells."""
        known = [name for name in self.domains + self.targets if all(name in run.bytes_per_token for run in self.runs)]
        return {
            mixture: {
                name: float(np.mean([_bits_per_byte(run, name) for run in self.runs if run.mixture == mixture]))
                for name in known
            }
            for mixture in self.mixtures
        }

    def epochs(self, mixture: str) -> dict[str, float]:
        """How many times each training domain was gone through, mean over seeds."""
        self._losses_of(mixture)
        return self._means([run.epochs for run in self.runs if run.mixture == mixture])

    def weights(self, mixture: str) -> dict[str, float]:
        """Domain weights of a mixture, mean over seeds where each seed has its own."""
        self._losses_of(mixture)
        return self._means([run.weights for run in self.runs if run.mixture == mixture])

    def _means(self, values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: sum(one[name] for one in values) / len(values) for name in self.domains}

    @property
    def measures(self) -> tuple[str, ...]:
        """How targets are measured besides as they are, weakest first: `"calibrated"`, then `"adapted_<steps>"` by steps."""
        found = set.intersection(*(set(run.target_losses) for run in self.runs))
        return tuple(sorted(found, key=lambda measure: _steps_of(measure) or 0))

    def paired_changes(self, mixture: str, reference: str) -> dict[str, Interval]:
        """
        Change of perplexity from `reference` to `mixture` in percent, seed by seed, with a 95 % interval over seeds.

        Rows are the domains and targets, `"geometric mean"`, and `"<target>, <measure>"` for each of `measures`. The mean and
        the interval are of differences of log-perplexity, turned into percent at the end.
        """
        ours, theirs = self.row_losses(mixture), self.row_losses(reference)
        return {row: t_interval(ours[row] - theirs[row]).to_percent() for row in ours}

    def row_losses(self, mixture: str) -> dict[str, np.ndarray]:
        """Loss in nats a token by row of [`~Comparison.paired_changes`], shape `(num_seeds,)` each."""
        losses = self._losses_of(mixture)
        rows = dict(zip(self.domains + self.targets, losses.T, strict=True))
        rows["geometric mean"] = losses[:, : len(self.domains)].mean(axis=1)
        runs = {run.seed: run for run in self.runs if run.mixture == mixture}
        for target in self.targets:
            for measure in self.measures:
                rows[f"{target}, {measure}"] = np.array(
                    [runs[seed].target_losses[measure][target] for seed in self.seeds]
                )
        return rows

    @property
    def verdict_rows(self) -> tuple[str, ...]:
        """
        What a verdict rests on: each target by its strongest measure (adapted as long as was tried, else calibrated, else as
        it is), or the geometric mean of the training domains where there is no target.
        """
        if not self.targets:
            return ("geometric mean",)
        return tuple(f"{target}, {self.measures[-1]}" if self.measures else target for target in self.targets)

    def verdict(self, mixture: str, baseline: str) -> str:
        """Whether `mixture` beats `baseline`, seed against seed: one sentence for each of `verdict_rows`, then the others."""
        return "\n".join(f"- {sentence}" for sentence in self._sentences(mixture, baseline, escape))

    def _sentences(self, mixture: str, baseline: str, shown: Callable[[str], str]) -> list[str]:
        """What a verdict says, with every name as `shown` makes it."""
        names, changes = f"{shown(mixture)} against {shown(baseline)}", self.paired_changes(mixture, baseline)
        others = [
            f"{shown(self.row_label(row))} {format_change(change)} %"
            for row, change in changes.items()
            if row not in self.verdict_rows and row not in self.domains
        ]
        sentences = [
            f"{names}, {shown(self.row_label(row))}: {format_change(changes[row])} %, {_judge(changes[row])}."
            for row in self.verdict_rows
        ]
        better = sum(changes[name].mean < 0 for name in self.domains)
        told = "".join(f"; {other}" for other in others)
        return [*sentences, f"{names}, besides: lower on {better} of {len(self.domains)} training domains{told}."]

    def to_markdown(self) -> str:
        """
        Tables of perplexities, and of weights and epochs, one column per mixture; the lowest mean is bold.

        Under them stand the paired changes against `"uniform"` and `"natural"`, and the [`~Comparison.verdict`] on each
        mixture against them.
        """
        verdicts = [self.verdict(*pair) for pair in self._judged_pairs()]
        texts = [table.to_markdown() for table in self.tables()] + [
            f"{text}\n" for text in (*verdicts, *self._caution())
        ]
        return "\n".join(texts)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        tables = "".join(table.to_html() for table in self.tables())
        sentences = [one for pair in self._judged_pairs() for one in self._sentences(*pair, escape_html)]
        verdicts = "".join(f"<li>{sentence}</li>" for sentence in sentences)
        caution = "".join(f"<p>{escape_html(text)}</p>" for text in self._caution())
        return f"<div>{tables}{f'<ul>{verdicts}</ul>' if verdicts else ''}{caution}</div>"

    def _judged_pairs(self) -> list[tuple[str, str]]:
        return [
            (mixture, baseline)
            for mixture in self.mixtures
            for baseline in BASELINES
            if mixture not in BASELINES and baseline in self.mixtures
        ]

    def _caution(self) -> list[str]:
        few = self._judged_pairs() and len(self.seeds) < 3
        return [f"From {len(self.seeds)} seed(s) no interval means much. Run at least 5."] if few else []

    def tables(self) -> list[Table]:
        """Perplexities, paired changes against each baseline, bits per byte where known, and weights with epochs."""
        summary, sizes = self.summary(), self.bits_per_byte()
        rows = list(summary[self.mixtures[0]])
        lowest = {row: min(summary[mixture][row]["mean"] for mixture in self.mixtures) for row in rows}
        perplexities = {
            mixture: [
                format_perplexity(cell["mean"], cell["std"], is_bold=cell["mean"] == lowest[row])
                for row, cell in summary[mixture].items()
            ]
            for mixture in self.mixtures
        }
        alone = len(self.seeds) == 1
        seeds = f"seed {self.seeds[0]}" if alone else f"mean ± standard deviation over seeds {self.seeds}"
        title = f"Validation perplexity after {self.train_tokens:,} training tokens, {seeds}. Lower is better."
        tables = [Table(title, {"": list(map(self.row_label, rows)), **perplexities}), *self._paired_tables()]
        if known := list(sizes[self.mixtures[0]]):
            bits = {mixture: [f"{sizes[mixture][name]:.3f}" for name in known] for mixture in self.mixtures}
            title = "Bits per byte of text, which compare across tokenizers."
            tables.append(Table(title, {"": list(map(self.row_label, known)), **bits}))
        shares = {
            mixture: [f"{self.weights(mixture)[n]:.4f}, {self.epochs(mixture)[n]:.2f}" for n in self.domains]
            for mixture in self.mixtures
        }
        title = "Weight of each domain, and epochs: how many times it was gone through."
        return [*tables, Table(title, {"": self.domains, **shares})]

    def to_plot_rows(self) -> list[dict[str, Any]]:
        """One row per mixture and row of the table, as [`~hf_doge.plots.plot_comparison`] takes them."""
        return [
            {"mixture": mixture, "domain": self.row_label(row), **cell}
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
                "bits_per_byte": _bits_per_byte(run, name),
                **{f"loss_{measure}": run.target_losses[measure].get(name) for measure in self.measures},
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
            "runs": [asdict(run) for run in self.runs],
            "summary": self.summary(),
        }
        text = json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False)
        write_atomically(save_directory / "comparison.json", text.encode())
        write_atomically(save_directory / "comparison.md", self.to_markdown().encode())
        write_atomically(save_directory / "comparison.parquet", to_parquet(pa.Table.from_pylist(self.to_rows())))

    @classmethod
    def load(cls, save_directory: str | Path) -> "Comparison":
        """Read what [`~Comparison.save`] wrote."""
        path = Path(save_directory) / "comparison.json"
        contents = parse_json(path.read_bytes(), source=str(path))
        try:
            return cls(MixtureRun.from_dict(run) for run in contents["runs"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} must hold the runs of a comparison, but does not: {error!r:.200}."
            ) from error

    def _paired_tables(self) -> list[Table]:
        """For each baseline, what every other mixture changes, in percent with intervals."""
        tables = []
        for baseline in BASELINES:
            others = [mixture for mixture in self.mixtures if mixture != baseline]
            if baseline not in self.mixtures or not others:
                continue
            changes = {mixture: self.paired_changes(mixture, baseline) for mixture in others}
            cells = {mixture: list(map(format_change, found.values())) for mixture, found in changes.items()}
            widths = [found[row].half_width for found in changes.values() for row in self.verdict_rows]
            seen = f" {len(self.seeds)} seeds could have detected {max(widths):.1f} %." if None not in widths else ""
            title = (
                f"Change of perplexity against {baseline} in percent, paired by seed, with 95 % intervals. Below 0 is "
                f"better.{seen}"
            )
            tables.append(Table(title, {"": list(map(self.row_label, changes[others[0]])), **cells}))
        return tables

    def row_label(self, row: str) -> str:
        """What a row is called in tables."""
        target, comma, measure = row.rpartition(", ")
        if comma and measure in self.measures:
            steps = _steps_of(measure)
            return f"{target} at its own temperature" if steps is None else f"{target} after {steps} steps on it"
        return f"{row} (target, not trained on)" if row in self.targets else row


def _steps_of(measure: str) -> int | None:
    name, _, steps = measure.partition("_")
    return int(steps) if name == "adapted" else None


def _judge(change: Interval) -> str:
    if change.low is None:
        return "one seed decides nothing"
    if not change.excludes_zero:
        return f"undecided: {change.num_values} seeds could have detected {change.half_width:.1f} %"
    return "better" if change.high < 0 else "NOT better: worse"


def _bits_per_byte(run: MixtureRun, name: str) -> float | None:
    size = run.bytes_per_token.get(name)
    return None if size is None else run.losses[name] / math.log(2) / size
