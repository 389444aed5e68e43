"""What a DoGE run has learned so far, as it goes into a checkpoint and comes back, and what `Trainer.log` shows of it."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hf_doge.artifacts.record import Trajectory
from hf_doge.artifacts.score_noise import estimate_score_noise
from hf_doge.checks import show
from hf_doge.entries import (
    COUNT,
    FLAG,
    NAMES,
    NUMBER,
    OBJECT,
    Kind,
    find_misfit,
    kind_like,
    list_of,
    shares_of,
    vector_of,
)
from hf_doge.functional.doge import update_running_mean
from hf_doge.training.saved_entries import damaged, read_entries
from hf_doge.training.score_noise import ScoreNoise

STATE_FILE = "doge_state.json"
TRAJECTORY_FILE = "doge_trajectory.parquet"
FORMAT_VERSION = 1
_NOISE_UPDATES = 100  # that the noise of a score is told from
_DESCRIPTION = Kind(
    "null or a description of the run",
    lambda value: value is None or (isinstance(value, dict) and isinstance(value.get("training"), dict)),
)
_OPTIONAL = ("seconds", "described", "unlogged", "labels_are_shifted", "score_noise")  # not of every run or version
_KINDS = {
    **dict.fromkeys(("num_updates", "num_averaged", "num_trajectory_points"), COUNT),
    **dict.fromkeys(("nonfinite_steps", "nonfinite_in_a_row"), COUNT),
    **{"domain_order": NAMES, "domains": OBJECT, "unlogged": OBJECT, "score_noise": OBJECT},
    **{"seconds": NUMBER, "labels_are_shifted": FLAG, "described": _DESCRIPTION},
}


@dataclass
class TrajectoryPoint:
    """One weight update."""

    step: int
    learning_rate: float
    weights: Tensor
    scores: Tensor
    losses: Tensor
    mu: float | None = None


@dataclass
class LearningState:
    """
    Weights, their mean and trajectory, and what each domain has contributed. Vectors have shape `(num_domains,)`.

    Attributes:
        names (`tuple[str, ...]`): The training domains, in the order of all vectors.
        weights (`torch.Tensor`, float64): Weights in force.
        mean (`torch.Tensor`, float64): Mean of the weights after every update past the burn-in.
        num_updates (`int`): Updates so far.
        num_averaged (`int`): Updates in `mean`.
        num_examples (`torch.Tensor`, int64): Examples consumed.
        num_tokens (`torch.Tensor`, int64): Labels consumed.
        nonfinite_steps (`int`): Steps in which some domain's loss or gradient was not finite.
        nonfinite_in_a_row (`int`): How many of these ended in the step just taken.
        seconds (`float`): Wall clock seconds of training, of this run and those it resumed, up to its last step.
        points (`list[TrajectoryPoint]`): The recorded updates.
        described (`dict` or `None`): What the artifact says of the run that learned all this.
        labels_are_shifted (`bool` or `None`): What was found of the loss; see [`~hf_doge.training.domain_loss.DomainLoss.learn`].
        noise (`ScoreNoise` or `None`): What is kept of the noise of the scores, where an argument asks for it.
        unlogged (`dict`): What [`DomainMetrics`] keeps for the next logs, in plain values.
    """

    names: tuple[str, ...]
    weights: Tensor
    mean: Tensor
    num_examples: Tensor
    num_tokens: Tensor
    num_updates: int = 0
    num_averaged: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    seconds: float = 0.0
    points: list[TrajectoryPoint] = field(default_factory=list)
    described: dict[str, Any] | None = None
    labels_are_shifted: bool | None = None
    noise: ScoreNoise | None = None
    unlogged: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, names: tuple[str, ...], weights: Tensor, noise: ScoreNoise | None = None) -> "LearningState":
        """Before the first step; the mean of no update is the initial weights."""
        zeros = torch.zeros(len(names), dtype=torch.int64)
        return cls(names, weights.clone(), weights.clone(), num_examples=zeros, num_tokens=zeros.clone(), noise=noise)

    @property
    def has_settled(self) -> bool:
        """Whether nothing is left to learn, by the noise of the scores."""
        return self.noise is not None and self.noise.has_settled

    def update(
        self, weights: Tensor, scores: Tensor, *, rate: float, burn_in_steps: int, progress: float = 1.0
    ) -> None:
        """
        Take over the weights of one more update.

        Args:
            weights (`torch.Tensor` of shape `(num_domains,)`): Those after it, unless they are shrunk.
            scores (`torch.Tensor` of shape `(num_domains,)`): What made them; NaN where a domain had none.
            rate (`float`): What multiplied the scores in the logarithm of the weights.
            burn_in_steps (`int`): Updates left out of the mean.
            progress (`float`): Share of the run's updates that is done with this one.
        """
        if self.noise is not None:
            self.noise.take(scores, rate, progress=progress)
            weights = self.noise.shrink(weights)
        self.weights = weights
        self.num_updates += 1
        self.nonfinite_in_a_row = 0
        if self.num_updates <= burn_in_steps:
            self.mean = weights.clone()
            return
        if self.noise is not None and self.noise.weighs_mean:
            self.mean = self.mean + self.noise.share() * (weights - self.mean)
        else:
            self.mean = update_running_mean(self.mean, weights, self.num_averaged)
        self.num_averaged += 1

    def note_finiteness(self, nonfinite: bool, *, patience: int) -> None:
        """Count a step in which a domain's loss or gradient was not finite, and stop when they do not end."""
        self.nonfinite_steps += nonfinite
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if nonfinite else 0
        if self.nonfinite_in_a_row >= patience:
            raise FloatingPointError(
                f"Loss and gradient must be finite, but in the last {self.nonfinite_in_a_row} steps some domain's was "
                "not. The weights were left alone meanwhile. Look at `domain_loss/...` in the logs, lower the learning "
                "rate or clean the data of that domain (`max_nonfinite_steps` sets the patience)."
            )

    @property
    def trajectory(self) -> Trajectory | None:
        """The recorded updates as arrays, or `None` before the first."""
        if not self.points:
            return None
        return Trajectory(
            domains=self.names,
            steps=np.array([point.step for point in self.points], dtype=np.int64),
            learning_rates=np.array([point.learning_rate for point in self.points], dtype=np.float64),
            weights=torch.stack([point.weights for point in self.points]).numpy(),
            scores=torch.stack([point.scores for point in self.points]).numpy(),
            losses=torch.stack([point.losses for point in self.points]).numpy(),
            mus=None if self.points[0].mu is None else np.array([point.mu for point in self.points]),
        )

    def save(self, folder: Path, *, step: int, run: dict[str, Any]) -> None:
        """
        Write the state as readable files; the JSON comes last, so that its presence means all is there.

        Args:
            folder (`Path`): The checkpoint.
            step (`int`): Optimizer steps taken.
            run (`dict[str, Any]`): What a resumed run must share, in plain values.
        """
        import pyarrow.parquet as pq

        if (trajectory := self.trajectory) is not None:
            pq.write_table(trajectory.to_table(), folder / TRAJECTORY_FILE)
        state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "run": run,
            "num_processes": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
            "domains": {
                name: {
                    "weight": float(self.weights[i]),
                    "mean_weight": float(self.mean[i]),
                    "num_examples": int(self.num_examples[i]),
                    "num_tokens": int(self.num_tokens[i]),
                }
                for i, name in enumerate(self.names)
            },
            "domain_order": list(self.names),
            "num_updates": self.num_updates,
            "num_averaged": self.num_averaged,
            "num_trajectory_points": len(self.points),
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "seconds": self.seconds,
            "described": self.described,
            "unlogged": self.unlogged,
        }
        if self.labels_are_shifted is not None:
            state["labels_are_shifted"] = self.labels_are_shifted
        if self.noise is not None:
            state["score_noise"] = self.noise.state_dict()
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2))  # unsorted: the order of `described` is shown

    @classmethod
    def load(cls, folder: Path, names: tuple[str, ...], noise: ScoreNoise | None = None) -> "LearningState":
        """
        Read what [`LearningState.save`] wrote.

        Args:
            folder (`Path`): The checkpoint.
            names (`tuple[str, ...]`): The training domains.
            noise (`ScoreNoise`, *optional*): What takes up what is kept of the noise.

        Raises:
            `ValueError`: if the checkpoint was written for other domains, or is not whole.
        """
        state = read_entries(folder / STATE_FILE)
        if state.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / STATE_FILE} must have format version {FORMAT_VERSION}, but has {show(state.get('format_version'))}. "
                "Resume it with the hf_doge version that wrote it."
            )
        if misfit := find_misfit(state, _KINDS, optional=_OPTIONAL):
            raise damaged(folder / STATE_FILE, misfit)
        saved = state["domain_order"]
        if saved != list(names):
            missing, extra = sorted(set(saved) - set(names)), sorted(set(names) - set(saved))
            raise ValueError(
                f"The checkpoint {folder} must have been written for the domains {list(names)}, but was written for "
                f"{saved} (gone: {missing}, new: {extra}). Train on the same domains or start anew."
            )
        if misfit := _find_misfit_of_domains(state, names, noise):
            raise damaged(folder / STATE_FILE, misfit)
        points = []
        if state["num_trajectory_points"]:
            trajectory = _read_trajectory(folder / TRAJECTORY_FILE)
            points = _to_points(trajectory, names)
        if noise is not None:
            noise.load_state_dict(state.get("score_noise", {}))
        by_domain = [state["domains"][name] for name in names]
        return cls(
            names=names,
            weights=torch.tensor([d["weight"] for d in by_domain], dtype=torch.float64),
            mean=torch.tensor([d["mean_weight"] for d in by_domain], dtype=torch.float64),
            num_updates=state["num_updates"],
            num_averaged=state["num_averaged"],
            num_examples=torch.tensor([d["num_examples"] for d in by_domain]),
            num_tokens=torch.tensor([d["num_tokens"] for d in by_domain]),
            nonfinite_steps=state["nonfinite_steps"],
            nonfinite_in_a_row=state["nonfinite_in_a_row"],
            seconds=state.get("seconds", 0.0),
            points=points,
            described=state.get("described"),
            labels_are_shifted=state.get("labels_are_shifted"),
            noise=noise,
            unlogged=state.get("unlogged", {}),
        )


class DomainMetrics:
    """
    Gathers losses, scores and times of each domain between two logs. Vectors have shape `(num_domains,)`.

    Args:
        names (`tuple[str, ...]`): The training domains.
        unlogged (`Mapping[str, list]`): What [`state_dict`] of the run that is resumed gave; nothing for a new one.
    """

    def __init__(
        self, names: tuple[str, ...], unlogged: Mapping[str, list[list[float]]] = MappingProxyType({})
    ) -> None:
        self.names = names
        kept = {
            name: [torch.tensor(values, dtype=torch.float64) for values in rows] for name, rows in unlogged.items()
        }
        self._last_scores = deque(kept.get("last_scores", ()), maxlen=_NOISE_UPDATES + 1)
        self._clear()
        self._losses.extend(kept.get("losses", ()))
        self._scores.extend(kept.get("scores", ()))

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What is kept for the next logs, but for times."""
        kept = {"last_scores": self._last_scores, "losses": self._losses, "scores": self._scores}
        return {name: [row.tolist() for row in rows] for name, rows in kept.items()}

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._step_seconds = 0.0
        self._training_seconds = 0.0

    def record(self, *, losses: Tensor, scores: Tensor | None = None) -> None:
        """Note one step's losses and, if the weights were to be updated, scores; NaN where a domain was absent."""
        self._losses.append(losses)
        if scores is not None:
            self._scores.append(scores)
            self._last_scores.append(scores)

    def record_time(self, *, step_seconds: float, training_seconds: float) -> None:
        """Note how long one step took, and how much of it training alone would have taken."""
        self._step_seconds += step_seconds
        self._training_seconds += training_seconds

    def collect(self, state: LearningState, sizes: np.ndarray | None) -> dict[str, float]:
        """
        The metrics since the last call, and the totals.

        Args:
            state (`LearningState`): What has been learned so far.
            sizes (`np.ndarray` of shape `(num_domains,)` or `None`): Examples that each domain has, where that is known.
        """
        by_domain = {
            "domain_weight": state.weights.tolist(),
            "domain_loss": _mean_without_nan(self._losses, len(self.names)),
            "domain_score": _mean_without_nan(self._scores, len(self.names)),
            "domain_tokens": state.num_tokens.tolist(),
        }
        if len(self._last_scores) > 1:
            noises = estimate_score_noise(torch.stack(list(self._last_scores)).numpy())
            by_domain["domain_score_noise"] = noises.tolist()
            by_domain["domain_score_snr"] = (np.array(by_domain["domain_score"]) / np.maximum(noises, 1e-300)).tolist()
        if sizes is not None:
            by_domain["domain_epochs"] = (state.num_examples.numpy() / sizes).tolist()
        metrics = {
            f"{kind}/{name}": value
            for kind, values in by_domain.items()
            for name, value in zip(self.names, values, strict=True)
            if value == value  # an absent domain has no loss to show
        }
        metrics["domain_weight_entropy"] = float(torch.special.entr(state.weights).sum())
        metrics["alignment_time_share"] = 1 - self._training_seconds / max(self._step_seconds, 1e-9)
        if state.noise is not None and state.noise.statistic == state.noise.statistic:
            metrics |= {"domain_score_f": state.noise.statistic, "undecided_windows": state.noise.num_undecided}
        if state.noise is not None and state.noise.mu_in_force is not None:
            metrics["domain_mu"] = state.noise.mu_in_force
        if state.nonfinite_steps:
            metrics["nonfinite_domain_steps"] = state.nonfinite_steps
        self._clear()
        return metrics


def _find_misfit_of_domains(state: Mapping[str, Any], names: tuple[str, ...], noise: ScoreNoise | None) -> str | None:
    """What is no number of these domains, in words, or `None`."""
    of_domain = {"weight": NUMBER, "mean_weight": NUMBER, "num_examples": COUNT, "num_tokens": COUNT}
    for name in names:
        if misfit := find_misfit(state["domains"].get(name), of_domain, whose=f"for the domain {name!r} its"):
            return misfit
    for kind in ("weight", "mean_weight"):
        weights = {name: state["domains"][name][kind] for name in names}
        if misfit := find_misfit({kind: weights}, {kind: shares_of(names)}):
            return misfit
    unlogged = state.get("unlogged", {})
    misfit = find_misfit(unlogged, dict.fromkeys(unlogged, list_of(vector_of(len(names)))), whose="in `unlogged` its")
    if misfit is None and noise is not None:
        kinds = {name: kind_like(value) for name, value in noise.state_dict().items()}
        misfit = find_misfit(state.get("score_noise", {}), kinds, optional=kinds, whose="in `score_noise` its")
    return misfit


def _read_trajectory(path: Path) -> Trajectory:
    from hf_doge.artifacts.parquet import read_parquet

    try:
        table = read_parquet(path, str(path))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} must hold the trajectory up to the checkpoint, but it is missing, altered or cut off. Resume from "
            "an earlier checkpoint."
        ) from error
    return Trajectory.from_table(table)


def _to_points(trajectory: Trajectory, names: tuple[str, ...]) -> list[TrajectoryPoint]:
    order = [list(trajectory.domains).index(name) for name in names]
    weights, scores, losses = (
        torch.from_numpy(np.ascontiguousarray(values[:, order]))
        for values in (trajectory.weights, trajectory.scores, trajectory.losses)
    )
    mus = [None] * len(trajectory.steps) if trajectory.mus is None else trajectory.mus.tolist()
    return [
        TrajectoryPoint(int(step), float(rate), weights[t], scores[t], losses[t], mus[t])
        for t, (step, rate) in enumerate(zip(trajectory.steps, trajectory.learning_rates, strict=True))
    ]


def _mean_without_nan(steps: list[Tensor], num_domains: int) -> list[float]:
    if not steps:
        return [float("nan")] * num_domains
    return torch.stack(steps).nanmean(dim=0).tolist()
