"""
The best mixture that small runs can find: mixtures to try, a law of the losses fitted to them, and its minimum.

As Olmix (https://huggingface.co/papers/2602.12237) does and RegMix (https://huggingface.co/papers/2407.01492) did before: the
loss on a target of a model trained on weights `a` is taken to be `c + exp(b . a)`, and the weights that are looked for minimise
a weighted sum of predicted losses plus `kl_penalty * KL(a || natural)`, under a cap on the epochs of each domain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_SHARE = 0.02  # of a domain in what mixtures are drawn around, so that each is tried
_RIDGE = 1e-3  # pulls coefficients that few runs determine together
_NUM_RESAMPLES = 200


@dataclass(frozen=True)
class LogLinearLaw:
    """
    The loss `c + exp(b . a)` of a model trained on weights `a`.

    Attributes:
        floor (`float`): `c`, at least 0, in nats.
        slopes (`np.ndarray` of shape `(num_domains,)`): `b`. Weights sum to 1, so there is no constant besides.
    """

    floor: float
    slopes: np.ndarray

    @classmethod
    def fit(cls, weights: np.ndarray, losses: np.ndarray, *, near: "LogLinearLaw | None" = None) -> "LogLinearLaw":
        """
        Least squares on the losses.

        Args:
            weights (`np.ndarray` of shape `(num_runs, num_domains)`): Each row sums to 1.
            losses (`np.ndarray` of shape `(num_runs,)`): Positive.
            near (`LogLinearLaw`, *optional*): Begin from this law alone, where the losses are nearly those it was fitted to.
        """
        from scipy.optimize import least_squares

        def residuals(parameters: np.ndarray) -> np.ndarray:
            floor, slopes = parameters[0], parameters[1:]
            spread = _RIDGE * (slopes - slopes.mean())
            return np.concatenate([floor + np.exp(weights @ slopes) - losses, spread])

        def jacobian(parameters: np.ndarray) -> np.ndarray:
            rows = np.exp(weights @ parameters[1:])[:, None] * weights
            num_domains = len(parameters) - 1
            spread = _RIDGE * (np.eye(num_domains) - 1 / num_domains)
            return np.block([[np.ones((len(losses), 1)), rows], [np.zeros((num_domains, 1)), spread]])

        least, starts = losses.min(), []
        if near is not None:
            starts.append(np.array([min(near.floor, 0.99 * least), *near.slopes]))
        for share in (0.0, 0.5, 0.9) if near is None else ():  # it is not convex in the floor: several beginnings
            slopes, *_ = np.linalg.lstsq(weights, np.log(losses - share * least), rcond=None)
            starts.append(np.array([share * least, *slopes]))
        infinite = np.full(weights.shape[1], np.inf)
        bounds = (np.array([-1e-9, *-infinite]), np.array([least, *infinite]))
        found = [least_squares(residuals, start, jacobian, bounds=bounds, max_nfev=200) for start in starts]
        best = min(found, key=lambda result: result.cost)
        return cls(max(float(best.x[0]), 0.0), best.x[1:])

    def predict(self, weights: np.ndarray) -> np.ndarray:
        """Losses for weights of shape `(..., num_domains)`."""
        return self.floor + np.exp(weights @ self.slopes)


@dataclass(frozen=True)
class SweepFit:
    """
    What a sweep found.

    Attributes:
        weights (`np.ndarray` of shape `(num_domains,)`): The optimum.
        predicted (`np.ndarray` of shape `(num_runs,)`): Objective of each run as the law has it, in nats.
        left_out (`np.ndarray` of shape `(num_runs,)`): The same by the law fitted without that run.
        observed (`np.ndarray` of shape `(num_runs,)`): Objective of each run as it was.
        rank_correlation (`float`): Spearman's, of `left_out` with `observed`: whether the law ranks mixtures it has not seen.
        change (`tuple[float, float, float]`):
            Predicted change of the objective from natural proportions to the optimum in nats, and the ends of its 95 %
            interval, by resampling the residuals of the fit.
    """

    weights: np.ndarray
    predicted: np.ndarray
    left_out: np.ndarray
    observed: np.ndarray
    rank_correlation: float
    change: tuple[float, float, float]


def design_mixtures(
    centers: Sequence[np.ndarray], num_mixtures: int, *, concentration: float = 1.0, seed: int = 0
) -> np.ndarray:
    """
    Mixtures to try: the centers themselves, then points that fill the simplex evenly around them in turn.

    The points of each center are a scrambled Sobol sequence brought to a Dirichlet distribution by its quantiles, so more
    mixtures begin with the same ones.

    Args:
        centers (`Sequence[np.ndarray]`): Weights of shape `(num_domains,)` each, such as natural proportions and an estimate.
        num_mixtures (`int`): How many mixtures in all, at least as many as centers.
        concentration (`float`): How near to the centers they stay: the parameters of each Dirichlet distribution sum to this
            times the number of domains. Positive; at 1 the points around equal parts are spread evenly over the simplex.
        seed (`int`): Of the scrambling.

    Returns:
        `np.ndarray` of shape `(num_mixtures, num_domains)`: rows that sum to 1.
    """
    from scipy.stats import gamma, qmc

    num_domains, num_drawn = len(centers[0]), num_mixtures - len(centers)
    power = max(0, num_drawn // len(centers)).bit_length()
    points = [  # a sequence for each center: every other point of one sequence would fill half of the simplex only
        qmc.Sobol(num_domains, scramble=True, rng=generator).random_base2(power)
        for generator in np.random.default_rng(seed).spawn(len(centers))
    ]
    rows = list(centers)
    for draw in range(num_drawn):
        turn, center = divmod(draw, len(centers))
        floor = min(MIN_SHARE, 1 / num_domains)
        mean = (1 - num_domains * floor) * centers[center] + floor
        quantiles = np.clip(points[center][turn], 1e-6, 1 - 1e-6)
        parts = gamma.ppf(quantiles, concentration * num_domains * mean)
        rows.append(parts / parts.sum())
    return np.array(rows)


def fit_sweep(
    weights: np.ndarray,
    losses: np.ndarray,
    *,
    natural: np.ndarray,
    importance: np.ndarray | None = None,
    kl_penalty: float = 0.01,
    max_weights: np.ndarray | None = None,
    seed: int = 0,
) -> SweepFit:
    """
    Fit the law of each loss to finished runs and find the weights that minimise their sum.

    Args:
        weights (`np.ndarray` of shape `(num_runs, num_domains)`): What each run was trained on.
        losses (`np.ndarray` of shape `(num_runs, num_losses)`): What it came to on each target or domain, in nats.
        natural (`np.ndarray` of shape `(num_domains,)`): What the penalty pulls to, positive.
        importance (`np.ndarray` of shape `(num_losses,)`, *optional*): Weights of the losses, summing to 1; equal by default.
        kl_penalty (`float`): Nats of objective that a nat of KL divergence from `natural` costs, at least 0.
        max_weights (`np.ndarray` of shape `(num_domains,)`, *optional*): No weight above these, which sum to at least 1.
        seed (`int`): Of the resampling behind the interval.

    Raises:
        ValueError: There are fewer runs than the law has coefficients, or a domain that no run contains.
    """
    from scipy.stats import spearmanr

    num_runs, num_domains = weights.shape
    if num_runs < num_domains + 2:
        raise ValueError(
            f"The law of {num_domains} domains has {num_domains + 1} coefficients, so it needs at least {num_domains + 2} runs, "
            f"but there are {num_runs}. Raise the number of mixtures."
        )
    unseen = np.flatnonzero(weights.max(axis=0) == 0)
    if len(unseen):
        raise ValueError(
            f"Every domain must be in some run, but domains {unseen.tolist()} are in none. Add mixtures of them."
        )
    importance = np.full(losses.shape[1], 1 / losses.shape[1]) if importance is None else importance
    ceiling = np.ones(num_domains) if max_weights is None else np.minimum(max_weights, 1.0)

    def laws_of(rows: np.ndarray, values: np.ndarray) -> list[LogLinearLaw]:
        return [LogLinearLaw.fit(rows, column, near=law) for column, law in zip(values.T, laws, strict=True)]

    def objective(laws: list[LogLinearLaw], rows: np.ndarray) -> np.ndarray:
        return sum(share * law.predict(rows) for share, law in zip(importance, laws, strict=True))

    laws = [LogLinearLaw.fit(weights, column) for column in losses.T]
    best = _minimise(laws, importance, natural, kl_penalty, ceiling, starts=weights)
    left_out = np.array(
        [
            objective(laws_of(np.delete(weights, run, axis=0), np.delete(losses, run, axis=0)), weights[run])
            for run in range(num_runs)
        ]
    )
    fitted = np.stack([law.predict(weights) for law in laws], axis=1)
    residuals = (losses - fitted) * np.sqrt(num_runs / max(num_runs - num_domains - 1, 1))
    generator = np.random.default_rng(seed)
    changes = []
    for _ in range(_NUM_RESAMPLES):
        resampled = fitted + residuals[generator.integers(num_runs, size=num_runs)]
        again = laws_of(weights, np.maximum(resampled, 1e-6))
        changes.append(objective(again, best) - objective(again, natural))
    low, high = np.quantile(changes, [0.025, 0.975])
    observed = losses @ importance
    correlation = spearmanr(left_out, observed).statistic
    return SweepFit(
        weights=best,
        predicted=fitted @ importance,
        left_out=left_out,
        observed=observed,
        rank_correlation=float(np.nan_to_num(correlation)),
        change=(float(objective(laws, best) - objective(laws, natural)), float(low), float(high)),
    )


def _minimise(
    laws: Sequence[LogLinearLaw],
    importance: np.ndarray,
    natural: np.ndarray,
    kl_penalty: float,
    ceiling: np.ndarray,
    *,
    starts: np.ndarray,
) -> np.ndarray:
    """The weights of least predicted objective. It is convex, so beginnings differ by rounding alone; the best counts."""
    from scipy.optimize import minimize

    def value(a: np.ndarray) -> float:
        a = np.maximum(a, 1e-12)
        predicted = sum(share * law.predict(a) for share, law in zip(importance, laws, strict=True))
        return float(predicted + kl_penalty * (a * np.log(a / natural)).sum())

    def gradient(a: np.ndarray) -> np.ndarray:
        a = np.maximum(a, 1e-12)
        slope = sum(share * np.exp(a @ law.slopes) * law.slopes for share, law in zip(importance, laws, strict=True))
        return slope + kl_penalty * (np.log(a / natural) + 1)

    found = []
    for start in (natural, np.full(len(natural), 1 / len(natural)), starts.mean(axis=0)):
        start = _below(start, ceiling)
        result = minimize(
            value,
            start,
            jac=gradient,
            method="SLSQP",
            bounds=[(0.0, top) for top in ceiling],
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones_like(a)},
            options={"maxiter": 500, "ftol": 1e-12},
        )
        found += [np.clip(result.x, 0.0, ceiling), start]
    best = min(found, key=lambda a: value(a / a.sum()))
    return best / best.sum()


def _below(weights: np.ndarray, ceiling: np.ndarray) -> np.ndarray:
    """Weights cut at a ceiling, what is cut off given to those with room."""
    weights = np.minimum(weights, ceiling)
    room = ceiling - weights
    return weights + room * (1 - weights.sum()) / room.sum() if room.sum() > 0 else weights
