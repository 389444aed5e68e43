"""
Case deletion, the evaluation of the TracIn-WE paper (https://huggingface.co/papers/2202.11844).

    DEL+(x', k) = E_seeds[f(x'; trained without the k strongest proponents) - f(x'; trained with all)]
    DEL-(x', k) = the same without the k strongest opponents
    AUC-DEL     = mean over a list of k

f is the probability of a class at x', best the one that is explained by the scores: whose label the queries had. A good
scorer has DEL+ far below 0 and DEL- far above.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_doge.evaluation.influence.deletion_result import CaseDeletionResult
from hf_doge.evaluation.influence.journal import RetrainingJournal, RetrainingKey

SIGNS = ("+", "-")
FULL = "(nothing removed)"  # stands in the journal where a scorer's name would

ProbabilityFunction = Callable[[int], float]
TrainFunction = Callable[[tuple[int, ...], int], ProbabilityFunction]


def strongest(scores: np.ndarray, k: int, sign: str) -> tuple[int, ...]:
    """
    The `k` strongest proponents (`"+"`) or opponents (`"-"`) among scores of shape `(N,)`, in ascending order.

    Of equal scores the earlier example is taken.
    """
    order = np.argsort(-scores if sign == "+" else scores, kind="stable")
    return tuple(sorted(order[:k].tolist()))


def case_deletion(
    scores: Mapping[str, np.ndarray],
    train_fn: TrainFunction,
    *,
    ks: Sequence[int],
    seeds: Sequence[int],
    noise_seeds: Sequence[int] | None = None,
    journal_path: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> CaseDeletionResult:
    """
    Retrain without each scorer's proponents and opponents of each test point, and see what becomes of it.

    A removed set is retrained once per seed, whichever scorers, points and signs ask for it. With a journal an
    interrupted evaluation continues, and more scorers, values of k or seeds cost only what is new. Next to the scorers
    stands the noise of retraining: all data under `noise_seeds` against all data under `seeds`.

    Args:
        scores (`Mapping[str, numpy.ndarray]`):
            For each scorer an array of shape `(num_points, num_examples)`, positive for proponents.
        train_fn (`Callable`):
            `train_fn(removed, seed)` trains from scratch without the examples at these positions and returns a
            function from a test point's position to f. Equal arguments must give equal results. The less else differs
            between removed sets under one seed, the less noise there is.
        ks (`Sequence[int]`): How many to remove, ascending, from 1 to less than `num_examples`.
        seeds (`Sequence[int]`): Distinct seeds of the retrainings.
        noise_seeds (`Sequence[int]`, *optional*): As many more, by default those that follow the largest of `seeds`.
        journal_path (`str` or `Path`, *optional*): JSONL file of finished retrainings.
        identity (`Mapping`, *optional*):
            Plain values that must be equal for two evaluations to share a journal: data, model, recipe, points.

    Returns:
        [`CaseDeletionResult`].

    Raises:
        ValueError: if shapes, `ks` or seeds do not fit, a score or probability is no number, or the journal is of
            another evaluation.
    """
    num_points, num_examples = check_scores(scores)
    ks, seeds = tuple(ks), tuple(seeds)
    noise_seeds = (
        tuple(max(seeds, default=0) + 1 + i for i in range(len(seeds))) if noise_seeds is None else noise_seeds
    )
    _check_plan(ks, seeds, tuple(noise_seeds), num_examples)
    plan = _plan(scores, ks, seeds, tuple(noise_seeds))
    journal = RetrainingJournal(
        None if journal_path is None else Path(journal_path),
        identity={**(identity or {}), "num_points": num_points, "num_examples": num_examples},
    )
    measured = journal.measure(plan, partial(_retrain, train_fn, num_points))

    def probability(key: RetrainingKey) -> float:
        return measured[key][key.point]

    return CaseDeletionResult(
        ks=ks,
        seeds=seeds,
        full=_full(probability, num_points, seeds),
        full_noise=_full(probability, num_points, noise_seeds),
        removed={
            (scorer, sign): np.array(
                [
                    [[probability(RetrainingKey(scorer, point, sign, k, seed)) for seed in seeds] for k in ks]
                    for point in range(num_points)
                ]
            )
            for scorer in scores
            for sign in SIGNS
        },
        num_retrainings=len({(removed, key.seed) for key, removed in plan.items()}),
    )


def _plan(
    scores: Mapping[str, np.ndarray], ks: tuple[int, ...], seeds: tuple[int, ...], noise_seeds: tuple[int, ...]
) -> dict[RetrainingKey, tuple[int, ...]]:
    """What is removed for which purpose. Points come first, so that what an interrupted run leaves is of all scorers."""
    num_points = len(next(iter(scores.values())))
    plan: dict[RetrainingKey, tuple[int, ...]] = {
        RetrainingKey(FULL, point, "+", 0, seed): () for seed in (*seeds, *noise_seeds) for point in range(num_points)
    }
    for point in range(num_points):
        for scorer, matrix in scores.items():
            for sign in SIGNS:
                for k in ks:
                    removed = strongest(matrix[point], k, sign)
                    plan.update({RetrainingKey(scorer, point, sign, k, seed): removed for seed in seeds})
    return plan


def _full(probability: Callable[[RetrainingKey], float], num_points: int, seeds: Sequence[int]) -> np.ndarray:
    """Trained with all, shape `(Q, S)`."""
    return np.array(
        [[probability(RetrainingKey(FULL, point, "+", 0, seed)) for seed in seeds] for point in range(num_points)]
    )


def _retrain(train_fn: TrainFunction, num_points: int, removed: tuple[int, ...], seed: int) -> list[float]:
    function = train_fn(removed, seed)
    probabilities = [float(function(point)) for point in range(num_points)]
    if not all(0 <= value <= 1 for value in probabilities):
        raise ValueError(
            f"`train_fn` must return a function that gives probabilities from 0 to 1, but without {len(removed)} "
            f"example(s) and with seed {seed} it gave {probabilities}. Check that training does not diverge."
        )
    return probabilities


def check_scores(scores: Mapping[str, np.ndarray]) -> tuple[int, int]:
    shapes = {scorer: np.shape(matrix) for scorer, matrix in scores.items()}
    shape = next(iter(shapes.values()), ())
    if len(set(shapes.values())) != 1 or len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"`scores` must map each scorer to an array of one shape (num_points, num_examples), but got {shapes}."
        )
    for scorer, matrix in scores.items():
        if not np.isfinite(matrix).all():
            raise ValueError(f"Scores must be finite numbers, but {scorer!r} has others. Check its gradients.")
        if scorer == FULL:
            raise ValueError(f"A scorer must not be called {FULL!r}: the journal has that name for itself.")
    return shape


def _check_plan(ks: tuple[int, ...], seeds: tuple[int, ...], noise_seeds: tuple[int, ...], num_examples: int) -> None:
    if not ks or list(ks) != sorted(set(ks)) or ks[0] < 1 or ks[-1] >= num_examples:
        raise ValueError(
            f"`ks` must be ascending, from 1 to less than the {num_examples} training examples, but got {list(ks)}."
        )
    every = (*seeds, *noise_seeds)
    if not seeds or len(noise_seeds) != len(seeds) or len(set(every)) != len(every):
        raise ValueError(
            f"`seeds` and `noise_seeds` must be as many, at least one each, and all different, but got {list(seeds)} "
            f"and {list(noise_seeds)}."
        )
