"""What the noise of scores says while weights are learned: [`ScoreNoise`]; callbacks that stop by it, and that warn of it at the end."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_doge.artifacts.cards.weights import noise_notes
from hf_doge.artifacts.record import WeightsRecord
from hf_doge.artifacts.score_noise import LEAST_VARIANCE
from hf_doge.checks import LARGEST_RATE
from hf_doge.functional.doge import shrink_deviations
from hf_doge.training.config import DoGEConfig
from hf_doge.training.recipe import Recipe

logger = logging.getLogger(__name__)

QUIET = 2.0  # below which a window is undecided
LOUD = 3.0  # from which on it is decided, and those before it no longer count
WINDOWS = 2  # undecided ones after which nothing is left to learn
_SETTINGS = ("window", "weighs_mean", "shrinks", "mu", "min_spread", "initial_weights", "smoothing")


class ScoreNoise:
    """
    Carries from update to update how much noise has reached the weights, and whether scores still tell the domains apart, in
    a few numbers for each domain. Ours.

    Only differences between scores move weights, so each score counts as its distance `d_tj` from the mean over the domains at
    that update; its noise is told from successive differences, as in [`~hf_doge.artifacts.score_noise.estimate_score_noise`].

    *Nothing left to learn.* At the end of each window of n updates `z_j = mean_t d_tj / (noise_j / sqrt(n))` says how many
    standard errors the score of a domain is away from the others', and `F = mean_j z_j^2` is 1 on average if none is. A
    window with F below 2 is undecided, one with F from 3 on is decided, and one between leaves things as they are. Learning has
    settled after two undecided windows without a decided one between them, and stays so. With n = 100 a signal to noise ratio
    of a single score of .1 makes the expected F 2, one of .17 about 4.

    *Inverse variance.* The noise of the updates so far leaves the logarithm of a weight with the variance
    `V_t = sum_{s <= t} (rate_s noise_s / mu)^2`, whose terms are the squared differences over 2, averaged over the domains.
    The weights after update t count `1 / V_t` in the mean; those after the first, of which no noise is known, do not count.

    *Shrinkage.* The weights after an update are `alpha_0,j exp(s_j D_j)` over their sum, where `D_j = sum_t rate_t d_tj / mu` is how
    far the scores have moved the logarithm of a weight, and `s_j` the part of it that is more than noise: see
    [`~hf_doge.functional.doge.shrink_deviations`]. With all `s_j` 1 and all domains in every step that is the update of the
    paper. A domain that a step lacks has no `d_tj` there; its share changes as the shares of the others do.

    *Spread.* Nats that move the weights of a training from scratch leave those of a short fine-tuning where they are. So after the share
    `p` of the run's updates mu is at most `max_j |C_tj| / (p * min_spread)`, where `C_tj = sum_t rate_t g_tj` is the sum of a domain's scores
    `g_tj` so far, over the domains that start with a weight: what the largest would come to by the end, divided by `min_spread`. All that
    the scores have moved is divided by the mu of today, so that by the end the weight of the domain whose sum is the largest in size is,
    but for shrinkage, `exp(min_spread)` times that of one whose scores add up to nothing, or more, or as much less where that sum is
    negative. Domains that all do alike stay together, whatever the scale of their scores.

    Args:
        initial_weights (`torch.Tensor` of shape `(num_domains,)`): alpha_0.
        window (`int`): Updates of a window, at least 2.
        weighs_mean (`bool`): Whether the mean of the weights counts them by inverse variance.
        shrinks (`bool`): Whether the weights are shrunk.
        smoothing (`float`): Share of the uniform weights that is mixed into shrunk ones.
        mu (`float`): Bregman coefficient of the recipe.
        min_spread (`float`): By how much the logarithms of shrunk weights are to differ at least, 0 for a mu that stays.

    Attributes:
        boost (`float`): By how much mu is smaller than that of the recipe, at least 1.
        num_undecided (`int`): Undecided windows that count so far.
        statistic (`float`): F of the last whole window, NaN before.
    """

    def __init__(
        self,
        initial_weights: Tensor,
        *,
        window: int,
        weighs_mean: bool = False,
        shrinks: bool = False,
        smoothing: float = 0.0,
        mu: float = 1.0,
        min_spread: float = 0.0,
    ) -> None:
        self.initial_weights = initial_weights.double()
        self.window = window
        self.weighs_mean = weighs_mean
        self.shrinks = shrinks
        self.smoothing = smoothing
        self.mu = mu
        self.min_spread = min_spread
        self.boost = 1.0
        self.num_undecided = 0
        self.statistic = float("nan")
        self._last = torch.full_like(self.initial_weights, torch.nan)
        zeros = torch.zeros_like(self._last)
        self._totals, self._deviations, self._variances, self._moved, self._told = (zeros.clone() for _ in range(5))
        self._knows_noise = False
        self._log_variance = 0.0
        self._total_precision = 0.0
        self._open_window()

    def _open_window(self) -> None:
        zeros = torch.zeros_like(self._last)
        self._num_updates = 0
        self._sums, self._counts, self._squares, self._changes = (zeros.clone() for _ in range(4))

    @property
    def has_settled(self) -> bool:
        """Whether nothing is left to learn."""
        return self.num_undecided >= WINDOWS

    @property
    def mu_in_force(self) -> float | None:
        """What the scores are divided by after the latest update; `None` for the mu of the recipe throughout."""
        return self.mu / self.boost if self.min_spread else None

    def take(self, scores: Tensor, rate: float, *, progress: float = 1.0) -> None:
        """
        Note one more update.

        Args:
            scores (`torch.Tensor` of shape `(num_domains,)`): NaN for a domain without one.
            rate (`float`): What they are multiplied by in the logarithm of the weights, learning rate over mu.
            progress (`float`): Share of the run's updates that is done with this one, in (0, 1].
        """
        centred = scores.double() - scores.double().nanmean()
        variance = (centred - self._last).square() / 2
        known, there = variance.isfinite(), centred.isfinite()
        if known.any():
            self._knows_noise = True
            self._log_variance += rate**2 * float(variance[known].mean())
        self._totals += rate * torch.where(there, scores.double(), 0.0)
        self._deviations += rate * torch.where(there, centred, 0.0)
        self._variances += rate**2 * torch.where(known, variance, 0.0)
        self._moved += rate**2 * there  # the noise of all updates is as that of those of which it is told
        self._told += rate**2 * known
        self._squares += torch.where(known, variance, 0.0)
        self._changes += known
        self._sums += torch.where(there, centred, 0.0)
        self._counts += there
        self._last = centred
        largest = float(self._totals[self.initial_weights > 0].abs().max())
        self.boost = max(1.0, progress * self.min_spread / largest) if largest > 1 / LARGEST_RATE else 1.0
        self._num_updates += 1
        if self._num_updates >= self.window:
            self._close_window()

    def _close_window(self) -> None:
        there = (self._counts > 0) & (self._changes > 0)
        noise = (self._squares / self._changes)[there].clamp(min=torch.finfo(torch.float64).tiny)
        squares = self._sums[there].square() / (self._counts[there] * noise)  # of z
        self.statistic = float(squares.mean()) if len(squares) else float("nan")
        if not self.has_settled:
            self.num_undecided += self.statistic < QUIET
            if self.statistic >= LOUD:
                self.num_undecided = 0
        self._open_window()

    @classmethod
    def if_asked_for(cls, args: DoGEConfig, recipe: Recipe, initial_weights: Tensor) -> "ScoreNoise | None":
        """What the arguments and the recipe that they make need, `None` if they need nothing."""
        weighs_mean = recipe.mean_weighting == "inverse_variance"
        if not (weighs_mean or recipe.shrinkage or args.stop_when_undecided):
            return None
        return cls(
            initial_weights,
            window=args.undecided_window,
            weighs_mean=weighs_mean,
            shrinks=recipe.shrinkage,
            smoothing=recipe.smoothing,
            mu=recipe.mu,
            min_spread=recipe.min_spread,
        )

    def shrink(self, weights: Tensor) -> Tensor:
        """The weights after the update just taken, given those that it makes without shrinkage."""
        if not self.shrinks:
            return weights
        variances = self._variances * torch.where(self._told > 0, self._moved / self._told, 0.0)
        logits = self.initial_weights.log() + self.boost * shrink_deviations(self._deviations, variances)
        return (1 - self.smoothing) * logits.softmax(dim=0) + self.smoothing / len(weights)

    def share(self) -> float:
        """How much of the mean the weights after the update just taken make up, by the inverse of their variance."""
        precision = 1 / (self.boost**2 * self._log_variance + LEAST_VARIANCE) if self._knows_noise else 0.0
        self._total_precision += precision
        return precision / self._total_precision if self._total_precision else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, from which learning goes on as if it had not been interrupted."""
        values = {name.lstrip("_"): value for name, value in vars(self).items() if name not in _SETTINGS}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what [`state_dict`] gave."""
        for name in vars(self):
            if name.lstrip("_") in state:
                value = state[name.lstrip("_")]
                setattr(self, name, torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value)


class UndecidedCallback(TrainerCallback):
    """
    Ends the run of a proxy after the step in which its learning has settled, with a checkpoint if it makes any by steps, and
    an evaluation likewise. The scores are the same on all processes, so that all of them end it there.

    Args:
        has_settled (`Callable[[], bool]`): Whether it has.
    """

    def __init__(self, has_settled: Callable[[], bool]) -> None:
        self._has_settled = has_settled

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._has_settled():
            return
        logger.info(
            "Nothing is left to learn after step %d of %d: the scores no longer tell the domains apart.",
            state.global_step,
            state.max_steps,
        )
        control.should_training_stop = control.should_log = True
        control.should_save |= args.save_strategy == "steps"
        control.should_evaluate |= args.eval_strategy == "steps"


class AdviceCallback(TrainerCallback):
    """
    At the end of a training, warns of weights that say nothing, for the noise of their scores or for a mu that left them no room, and says
    what to change; where all domains count alike it is logged as information, for there equal parts are the usual finding. A run that stops
    before its last step, to be resumed later, is not told of, unless its learning has settled.

    Args:
        get_weights (`Callable[[], WeightsRecord]`): What has been learned.
    """

    def __init__(self, get_weights: Callable[[], WeightsRecord]) -> None:
        self._get_weights = get_weights

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        weights = self._get_weights()
        if state.global_step < state.max_steps and "settled_after_updates" not in weights.metadata["training"]:
            return
        undecided, advice = noise_notes(weights)
        if advice is not None:
            level = logging.INFO if weights.metadata["objective"] == "universal" else logging.WARNING
            logger.log(level, "The domain weights. %s", " ".join(filter(None, (undecided, advice))))
