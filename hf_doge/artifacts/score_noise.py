"""How far the weights of a run can be told apart, for the noise of the scores that made them."""

import math

import numpy as np

from hf_doge.artifacts.record import WeightsRecord

# Shapes: T = recorded updates, K = domains.

LEAST_UPDATES = 10  # that noise is told from
_NOTHING_LEFT = 0.05  # of the logarithm of a ratio of weights, after shrinkage
LEAST_VARIANCE = 1e-12  # of the logarithm of a weight, in a mean by inverse variance


def estimate_score_noise(scores: np.ndarray) -> np.ndarray:
    """
    Standard deviation of a step's score around what it is over many: that of the difference of two successive scores, over the root
    of 2 (von Neumann's estimator). That is the draw of the examples, and what the model's score does from one update to the next
    without remembering it, which is noise to a sum of scores as well; measured, up to twice the draw alone. Of the scores' distances
    from their mean over the domains, which move the weights, it tells the spread over whole runs within about 20 %
    (`benchmarks/RESULTS.md`, "What a run tells of the noise of its scores"). Nothing is assumed of the distribution of the gradients.

    Args:
        scores (`numpy.ndarray` of shape `(T, K)`): Of successive updates; NaN where a domain was absent.

    Returns:
        `numpy.ndarray` of shape `(K,)`; NaN for a domain without two scores in a row.
    """
    squares = np.square(np.diff(scores, axis=0))
    counts = np.isfinite(squares).sum(axis=0)
    sums = np.where(np.isfinite(squares), squares, 0.0).sum(axis=0)
    return np.sqrt(np.divide(sums, 2 * counts, out=np.full(scores.shape[1], np.nan), where=counts > 0))


def undecided_groups(weights: WeightsRecord) -> list[list[str]]:
    """
    Domains whose weights differ by less than the noise of the scores accounts for, heaviest first, two or more in a group: each from the
    heaviest of its group, and from that whose scores have the least noise, from which most are told apart.

    The noise of the difference of two scores moves the logarithm of the ratio of the two weights by `rate * noise / mu` from
    that update on, so that of the mean weights by the root of the sum of `(rate * noise * reach)^2`, where `reach` is the
    share of the mean that lies behind the update over `mu`: `(T - t) / T / mu` in the paper's. Two weights are told apart if their logarithms
    differ by two standard deviations. Shrunk weights count as far as the scores moved them before they were shrunk, unless less than 5 % of a weight is left of that: shrinkage
    asks of all domains at once whether they differ, this of two (Fisher's protected least significant difference). Nothing is said of fewer than ten
    recorded updates.
    """
    trajectory, rates, mus = weights.trajectory, update_rates(weights), mus_in_force(weights)
    if trajectory is None or rates is None or mus is None:
        return []
    reach = np.cumsum((_shares_of_mean(weights, rates, mus) / mus)[::-1])[::-1]
    columns = dict(zip(trajectory.domains, trajectory.scores.T, strict=True))
    means = _means(trajectory.scores)[:, 0]
    num_updates = updates_a_point(weights.recipe.get("arguments"))

    def noise_of(name: str, other: str | None = None) -> float:
        """How much noise a score's distance from that of another domain, or from the mean, has left in the logarithm of the mean weight."""
        distances = columns[name] - (means if other is None else columns[other])
        return math.sqrt(float(_variances(distances[:, None], rates * reach).sum()))

    def move_of(name: str) -> float:
        """How far the scores alone have moved the logarithm of the mean weight from those of the others."""
        return float(np.nansum((columns[name] - means) * rates * reach)) * math.sqrt(num_updates)

    def is_apart(name: str, heavier: str) -> bool:
        distance = math.log(weights.mean[heavier] / weights.mean[name])
        if weights.recipe.get("shrinkage") and distance > _NOTHING_LEFT:
            distance = max(distance, move_of(heavier) - move_of(name))
        return distance >= 2 * noise_of(name, heavier)

    groups: list[list[str]] = []
    quietest = ""
    for name in sorted(weights.names, key=lambda name: weights.mean[name], reverse=True):
        if weights.mean[name] == 0 or not np.isfinite(np.diff(columns[name])).any():
            continue
        if not groups or is_apart(name, groups[-1][0]) or is_apart(name, quietest):
            groups.append([])
            quietest = name
        groups[-1].append(name)
        quietest = min(quietest, name, key=noise_of)
    return [group for group in groups if len(group) > 1]


def weight_noise(weights: WeightsRecord) -> np.ndarray | None:
    """
    Standard deviation of the logarithm of each recorded weight, for the noise of the scores up to it.

    Only the distance of a score from the mean of the scores under the weights moves a weight, so the noise is that distance's.

    Returns:
        `numpy.ndarray` of shape `(T, K)`, in the order of the trajectory; `None` where it is not known: without a trajectory,
        with fewer than ten recorded updates or without `mu` in the recipe.
    """
    trajectory, rates, mus = weights.trajectory, update_rates(weights), mus_in_force(weights)
    if trajectory is None or rates is None or mus is None or not np.isfinite(np.diff(trajectory.scores, axis=0)).any():
        return None
    is_known = np.isfinite(trajectory.scores)
    shares = np.where(is_known, trajectory.weights, 0.0)
    total = shares.sum(axis=1, keepdims=True)
    means = np.where(is_known, shares * trajectory.scores, 0.0).sum(axis=1, keepdims=True) / np.where(total, total, 1)
    return np.sqrt(np.cumsum(_variances(trajectory.scores - means, rates), axis=0)) / mus[:, None]


def update_rates(weights: WeightsRecord) -> np.ndarray | None:
    """
    What the noise of one score at each recorded update is multiplied by, up to the next recorded update: the rate times the root of the
    number of updates that it stands for. `None` with fewer than ten recorded updates.
    """
    trajectory, recipe = weights.trajectory, weights.recipe
    if trajectory is None or len(trajectory.steps) < LEAST_UPDATES:
        return None
    is_measured = recipe.get("score_metric") == "optimizer"  # the learning rate is in such scores
    rates = np.ones(len(trajectory.steps)) if is_measured else trajectory.learning_rates
    return rates * math.sqrt(updates_a_point(recipe.get("arguments")))


def mus_in_force(weights: WeightsRecord) -> np.ndarray | None:
    """The mu by which all scores up to each recorded update are divided, shape `(T,)`; `None` where it is not known."""
    trajectory, mu = weights.trajectory, weights.recipe.get("mu")
    if trajectory is None or trajectory.mus is not None:
        return None if trajectory is None else trajectory.mus
    return np.full(len(trajectory.steps), mu) if isinstance(mu, int | float) and mu > 0 else None


def score_sums(weights: WeightsRecord) -> dict[str, float]:
    """
    Sum of the scores of each domain times what the update multiplies them by, the learning rate but with `score_metric="optimizer"`: over
    mu, how far they move the logarithm of its weight. Without domains that have none; empty for fewer than ten recorded updates.
    """
    trajectory, rates = weights.trajectory, update_rates(weights)
    if trajectory is None or rates is None:
        return {}
    moved = trajectory.scores * rates[:, None] * math.sqrt(updates_a_point(weights.recipe.get("arguments")))
    columns = ((name, column[np.isfinite(column)]) for name, column in zip(trajectory.domains, moved.T, strict=True))
    return {name: float(column.sum()) for name, column in columns if len(column)}


def updates_a_point(arguments: object) -> int:
    """How many updates each recorded one stands for, by the arguments of a recipe."""
    every = arguments.get("trajectory_steps", 1) if isinstance(arguments, dict) else 1
    return every if isinstance(every, int) and every > 0 else 1


def _shares_of_mean(weights: WeightsRecord, rates: np.ndarray, mus: np.ndarray) -> np.ndarray:
    """How much of the mean the weights after each recorded update make up."""
    assert weights.trajectory is not None
    scores, recipe = weights.trajectory.scores, weights.recipe
    shares = np.ones(len(rates))
    if recipe.get("mean_weighting") == "inverse_variance":
        added = _variances(scores - _means(scores), rates).mean(axis=1)
        added[0] = 0.0  # no noise of the first update is known
        shares = 1 / (np.cumsum(added) / mus**2 + LEAST_VARIANCE)
        shares[0] = 0.0
    burn_in = recipe.get("burn_in_steps")
    first = burn_in // updates_a_point(recipe.get("arguments")) if isinstance(burn_in, int) and burn_in > 0 else 0
    shares[: min(first, len(shares) - 1)] = 0
    return shares / shares.sum()


def _means(scores: np.ndarray) -> np.ndarray:
    """Mean score of each update over the domains that have one, 0 where none has: shape `(T, 1)`."""
    known = np.isfinite(scores)
    return np.where(known, scores, 0.0).sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)


def _variances(values: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """
    Variance that each update adds to the logarithm, from half the squared difference to the value before: shape `(T, n)`. The
    first counts as the second; where a value is missing nothing moves, and after a gap the mean of the column is taken.
    """
    squares = np.square(np.diff(values, axis=0)) / 2
    squares = np.concatenate([squares[:1], squares])
    known = np.isfinite(squares)
    means = np.where(known, squares, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    squares = np.where(known, squares, means)
    return np.where(np.isfinite(values), squares, 0.0) * np.square(rates)[:, None]
