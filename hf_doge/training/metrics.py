"""What `Trainer.log` shows of each domain."""

import numpy as np
import torch
from torch import Tensor

from hf_doge.training.learning_state import LearningState


class DomainMetrics:
    """Gathers losses, scores and times between two logs. Vectors have shape `(num_domains,)`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._clear()

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
        if state.nonfinite_steps:
            metrics["nonfinite_domain_steps"] = state.nonfinite_steps
        self._clear()
        return metrics


def _mean_without_nan(steps: list[Tensor], num_domains: int) -> list[float]:
    if not steps:
        return [float("nan")] * num_domains
    return torch.stack(steps).nanmean(dim=0).tolist()
