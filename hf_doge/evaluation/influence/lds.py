"""
The linear datamodelling score (LDS; Park et al. 2023, TRAK, https://huggingface.co/papers/2303.14186).

    g(x', S) = sum_{i in S} score(x', i)                         what the scores say of a model trained on S alone
    LDS(x')  = Spearman over subsets S of (g(x', S), f(x'; trained on S))

The subsets are random parts of the training set. f is a number that grows with the class or text that the scores explain:
its margin, its log-probability, or minus its loss. 1 is perfect, 0 is what random scores have.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_doge.checks import check_count, check_number, check_seed, show
from hf_doge.evaluation.influence.case_deletion import check_scores
from hf_doge.evaluation.influence.journal import RetrainingJournal, SubsetKey
from hf_doge.evaluation.influence.lds_result import LDSResult

OutputFunction = Callable[[int], float]
TrainFunction = Callable[[tuple[int, ...], int], OutputFunction]

JOURNAL = "retrainings.jsonl"


def linear_datamodelling_score(
    scores: Mapping[str, np.ndarray],
    train_fn: TrainFunction,
    *,
    num_subsets: int = 50,
    alpha: float = 0.5,
    seeds: Sequence[int] = (1,),
    subset_seed: int = 0,
    strata: Sequence[Any] | None = None,
    output_dir: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> LDSResult:
    """
    Train on random subsets, and see how well the sums of scores rank what becomes of each test point.

    The retrainings do not depend on the scores: with a folder an interrupted evaluation continues, further scorers cost
    nothing, further subsets and seeds only what is new.

    Args:
        scores (`Mapping[str, numpy.ndarray]`):
            For each scorer an array of shape `(num_points, num_examples)`, positive for proponents: what
            `InfluenceIndex.scores` and every scorer of `scorers` return.
        train_fn (`Callable`):
            As in [`case_deletion`]: `train_fn(removed, seed)` trains from scratch without the examples at these positions
            and returns a function from a test point's position to f. It must grow with what the scores explain: pass
            minus the loss. Equal arguments must give equal results.
        num_subsets (`int`): At least 2; with few the correlations are coarse, their standard error is `1 / sqrt(num_subsets)`.
        alpha (`float`): Part of the training set that each subset has, between 0 and 1; rounded to whole examples.
        seeds (`Sequence[int]`):
            Distinct seeds of the retrainings; f is the mean over them. With two or more the result says how far they
            agree, which bounds what any scorer can reach.
        subset_seed (`int`): Seeds the subsets. The first ones are the same however many there are.
        strata (`Sequence`, *optional*):
            The group of each training example, such as its label: every subset then has the part `alpha` of each group. So what
            a scorer finds beyond the class is measured: the number of examples of a class explains nothing any more.
        output_dir (`str` or `Path`, *optional*): Folder of finished retrainings, made when it does not exist.
        identity (`Mapping`, *optional*):
            Plain values that must be equal for two evaluations to share a folder: data, model, recipe, points, f.

    Returns:
        [`LDSResult`].

    Raises:
        ValueError: if shapes, `alpha` or seeds do not fit, a score or output is no number, the outputs of a test point are
            all equal, or the folder is of another evaluation.
    """
    num_points, num_examples = check_scores(scores)
    seeds = _check_seeds(seeds)
    kept = draw_subsets(num_examples, num_subsets, alpha=alpha, seed=subset_seed, strata=strata)
    journal = RetrainingJournal(
        None if output_dir is None else Path(output_dir) / JOURNAL,
        identity={
            **(identity or {}),
            "evaluation": "linear datamodelling score",
            "num_points": num_points,
            "num_examples": num_examples,
        },
        key_type=SubsetKey,
        values="outputs",
    )
    plan = {
        SubsetKey(subset, seed): tuple(np.flatnonzero(~row).tolist())
        for seed in seeds
        for subset, row in enumerate(kept)
    }
    measured = journal.measure(plan, partial(retrain, train_fn, num_points))
    outputs = np.array([[measured[SubsetKey(subset, seed)] for seed in seeds] for subset in range(len(kept))])
    return LDSResult(
        kept=kept,
        seeds=seeds,
        outputs=outputs.transpose(2, 0, 1),
        group_scores={
            name: _group_scores(np.asarray(matrix, dtype=np.float64), kept) for name, matrix in scores.items()
        },
    )


def draw_subsets(
    num_examples: int, num_subsets: int, *, alpha: float = 0.5, seed: int = 0, strata: Sequence[Any] | None = None
) -> np.ndarray:
    """
    Random subsets, drawn without replacement, of which each example is in the part `alpha` in the mean.

    Args:
        num_examples (`int`): N, at least 2.
        num_subsets (`int`): M, at least 2.
        alpha (`float`): Part of the examples in each, between 0 and 1.
        seed (`int`): Seeds the draw. Subset m is the same for every M > m.
        strata (`Sequence`, *optional*):
            The group of each example, of which `alpha` is drawn each. Where that is no whole number, chance rounds it up or
            down, so that a group of one example is in as many subsets as any.

    Returns:
        `numpy.ndarray` of shape `(M, N)` and dtype bool: which examples each subset has. All have `alpha` of the N, rounded to
        whole examples; with strata rounded up or down.

    Raises:
        ValueError: if a number is out of range, or `alpha` leaves no example in or none out.
    """
    num_examples = check_count("num_examples", num_examples, least=2)
    num_subsets = check_count("num_subsets", num_subsets, least=2)
    alpha = check_number("alpha", alpha, above=0, below=1)
    seed = check_seed("subset_seed", seed, least=0)
    if strata is not None and np.shape(strata) != (num_examples,):
        raise ValueError(
            f"`strata` must have one group for each of the {num_examples} examples, but got {show(strata)}."
        )
    try:
        groups = np.unique(np.zeros(num_examples) if strata is None else strata, return_inverse=True)[1]
    except TypeError as error:
        kinds = sorted({type(group).__name__ for group in strata or ()})
        raise ValueError(
            f"`strata` must have groups of one kind, all texts or all numbers, but got {kinds}."
        ) from error
    parts = alpha * np.bincount(groups) if strata is not None else np.array([float(round(alpha * num_examples))])
    whole = round(float(parts.sum()), 9)
    if not 1 <= whole <= num_examples - 1:
        raise ValueError(
            f"`alpha` must leave at least one of the {num_examples} examples in and one out, but {alpha:g} keeps {whole:g}."
        )
    kept = np.zeros((num_subsets, num_examples), dtype=bool)
    for subset, row in enumerate(kept):
        generator = np.random.default_rng([seed, subset])
        order = generator.permutation(num_examples)
        for group, size in enumerate(_round_at_random(parts, generator)):
            row[order[groups[order] == group][:size]] = True
    return kept


def _round_at_random(parts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each part rounded up or down, so that it is itself in the mean and the sum is rounded too (systematic sampling)."""
    order = generator.permutation(len(parts))
    sums = np.round(np.cumsum((parts % 1)[order]), 9) + generator.random()
    more = np.diff(np.floor(sums), prepend=0)
    sizes = np.floor(parts)
    sizes[order] += more
    return sizes.astype(int)


def class_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """
    `log(p / (1 - p))` of each label's probability p: TRAK's output of a classifier, which never saturates.

    Args:
        logits (`torch.Tensor` of shape `(N, num_classes)`): At least two classes.
        labels (`torch.Tensor` of shape `(N,)`): The class that is explained, such as the predicted one.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf).logsumexp(dim=1)
    return logits.gather(1, own).squeeze(1) - others


def train_with_trainer(
    make_trainer: Callable[[list[int], int], Any],
    measure: Callable[[nn.Module], Sequence[float]],
    *,
    num_examples: int,
) -> TrainFunction:
    """
    A `train_fn` for [`linear_datamodelling_score`] and [`case_deletion`] out of a factory of Trainers.

    Args:
        make_trainer (`Callable`):
            `make_trainer(kept, seed)` gives a new Trainer (anything with `train()` and `model`) of a new model, for the
            examples at the positions `kept`, in ascending order, such as
            `Trainer(make_model(seed), TrainingArguments(..., seed=seed), train_dataset=dataset.select(kept))`.
        measure (`Callable`): `measure(model)` gives the output of every test point; the model is in evaluation mode.
        num_examples (`int`): Length of the whole training set.
    """
    num_examples = check_count("num_examples", num_examples)

    def train_fn(removed: tuple[int, ...], seed: int) -> OutputFunction:
        gone = set(removed)
        trainer = make_trainer([place for place in range(num_examples) if place not in gone], seed)
        trainer.train()
        with torch.no_grad():
            outputs = [float(value) for value in measure(trainer.model.eval())]
        return outputs.__getitem__

    return train_fn


def retrain(train_fn: TrainFunction, num_points: int, removed: tuple[int, ...], seed: int) -> list[float]:
    """
    The outputs of all test points after one retraining.

    Raises:
        ValueError: if one is no finite number.
    """
    function = train_fn(removed, seed)
    outputs = [float(function(point)) for point in range(num_points)]
    if not np.isfinite(outputs).all():
        raise ValueError(
            f"`train_fn` must return a function that gives finite numbers, but without {len(removed)} example(s) and with "
            f"seed {seed} it gave {outputs}. Check that training does not diverge."
        )
    return outputs


def _check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    seeds = tuple(check_seed("seeds", seed) for seed in seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be different ones, at least one, but got {list(seeds)}.")
    return seeds


def _group_scores(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Sums over each subset, equal where they differ by rounding alone (of a constant, of parts that cancel): it would be ranked."""
    unit = 1e-12 * (np.abs(scores) @ kept.T).max(axis=1, keepdims=True)
    return np.round(scores @ kept.T / np.where(unit > 0, unit, 1)) * unit
