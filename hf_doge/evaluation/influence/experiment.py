"""Case deletion of a small task with a small classifier, from data to table: what the command and the benchmark run."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hf_doge.artifacts.cards.text import escape
from hf_doge.evaluation.influence.cancellation import cancellation_ratios
from hf_doge.evaluation.influence.case_deletion import ProbabilityFunction, case_deletion
from hf_doge.evaluation.influence.deletion_result import CaseDeletionResult
from hf_doge.evaluation.influence.scorers import make_scorer
from hf_doge.evaluation.influence.small_models import (
    TrainingRecipe,
    make_classifier,
    predict_probabilities,
    to_batches,
    train_classifier,
)
from hf_doge.evaluation.influence.small_tasks import SPECIAL_TOKENS, SmallTask
from hf_doge.files import write_atomically

# Chosen by test accuracy, by how little twenty examples removed at random change, and by time (half a second on one core).
# A first recipe with a constant learning rate was given up after a trial with scorers (AG News, CNN, 4 points, 1 seed): it
# trained one seed to chance, and random removals moved probabilities by tens of points.
RECIPES = {
    "cnn": TrainingRecipe(learning_rate=5e-3),
    "transformer": TrainingRecipe(learning_rate=2e-3),
}
CLASSES = ("predicted", "true")


@dataclass(frozen=True)
class InfluenceEvaluation:
    """
    What one evaluation found.

    Attributes:
        result (`CaseDeletionResult`): Probabilities after every retraining.
        cancellation (`list[dict]`): [`cancellation_ratios`] of the training examples at each checkpoint.
        label_agreement (`dict[str, dict[str, float]]`):
            By scorer, the share of the ten strongest `proponents` and `opponents` whose label is the explained class.
        accuracy (`list[float]`): Test accuracy under each seed with nothing removed; `majority` is the largest class.
        majority (`float`): Share of the largest class of the test examples.
        points (`list[int]`): Positions of the test points among the test examples.
    """

    result: CaseDeletionResult
    cancellation: list[dict[str, float]]
    label_agreement: dict[str, dict[str, float]]
    accuracy: list[float]
    majority: float
    points: list[int]

    def save(self, save_directory: str | Path) -> None:
        """Write the result, with the rest next to it in the JSON and under the table."""
        rest = {name: value for name, value in vars(self).items() if name != "result"}
        self.result.save(save_directory, extra=rest)
        write_atomically(Path(save_directory) / "case_deletion.md", self.to_markdown().encode())

    def to_markdown(self) -> str:
        """The table of AUC-DEL, label agreement, accuracy and cancellation ratios."""
        lines = [
            "| scorer | ten proponents of the explained class | ten opponents of it |",
            "|---|---:|---:|",
            *(
                f"| {escape(scorer)} | {100 * shares['proponents']:.0f} % | {100 * shares['opponents']:.0f} % |"
                for scorer, shares in self.label_agreement.items()
            ),
            "",
            f"Test accuracy {', '.join(f'{value:.3f}' for value in self.accuracy)} by seed; largest class "
            f"{self.majority:.3f}.",
            "",
            "Cancellation ratio at each checkpoint, over the training examples:",
            "",
            "| checkpoint | embedding | last weight | last bias |",
            "|---|---:|---:|---:|",
            *(
                f"| {position} | {ratios['embedding']:.2f} | {ratios['last_weight']:.2f} | {ratios['last_bias']:.2f} |"
                for position, ratios in enumerate(self.cancellation, start=1)
            ),
        ]
        return self.result.to_markdown() + "\n" + "\n".join(lines) + "\n"


def evaluate_small_task(
    task: SmallTask,
    architecture: str,
    *,
    scorers: Sequence[str],
    ks: Sequence[int],
    num_points: int = 10,
    num_seeds: int = 3,
    explain: str = "predicted",
    width: int = 32,
    recipe: TrainingRecipe | None = None,
    point_seed: int = 0,
    journal_path: str | Path | None = None,
) -> InfluenceEvaluation:
    """
    Score the training examples at the checkpoints of the first seed's run, then delete and retrain.

    Args:
        task (`SmallTask`): Tokenised examples.
        architecture (`str`): `"cnn"` or `"transformer"`.
        scorers (`Sequence[str]`): Names among `SCORERS`.
        ks (`Sequence[int]`): How many examples to remove.
        num_points (`int`): How many test points, drawn at random from the test examples.
        num_seeds (`int`): Retraining seeds 1, 2, ...; as many further ones measure the noise of retraining.
        explain (`str`):
            Which class's probability is followed, and whose loss the scores are of: the one that the first seed's model
            `"predicted"`, or the `"true"` one.
        width (`int`): Width of the embedding.
        recipe (`TrainingRecipe`, *optional*): How to train, by default that of `RECIPES`.
        point_seed (`int`): Seeds the draw of the points and the random scorer.
        journal_path (`str` or `Path`, *optional*): See [`case_deletion`].

    Raises:
        ValueError: if an option is unknown or does not fit the task.
        ImportError: if a scorer needs a library that is not installed.
    """
    if explain not in CLASSES:
        raise ValueError(f"`explain` must be one of {list(CLASSES)}, but got {explain!r}.")
    num_test = len(task.test["labels"])
    if not 1 <= num_points <= num_test or num_seeds < 1:
        raise ValueError(
            f"`num_points` must be from 1 to the {num_test} test examples and `num_seeds` at least 1, but got "
            f"{num_points} and {num_seeds}."
        )
    max_length = max(task.train["input_ids"].shape[1], task.test["input_ids"].shape[1])

    def make_model(seed: int) -> nn.Module:
        sizes = {"width": width, "max_length": max_length, "seed": seed}
        return make_classifier(architecture, len(task.vocabulary), task.num_classes, **sizes)

    recipe = recipe or RECIPES.get(architecture) or TrainingRecipe()
    trained, checkpoints = train_classifier(make_model, task.train, recipe, seed=1, keep_checkpoints=True)
    points = np.random.default_rng(point_seed).choice(num_test, size=num_points, replace=False)
    queries = {name: values[points] for name, values in task.test.items()}
    if explain == "predicted":
        queries["labels"] = predict_probabilities(trained, queries).argmax(dim=1)
    models, learning_rates = zip(*checkpoints, strict=True)
    special = range(len(SPECIAL_TOKENS))
    scores = {
        name: make_scorer(name, models, learning_rates, special_token_ids=special, seed=point_seed).scores(
            to_batches(task.train), to_batches(queries)
        )
        for name in scorers
    }
    seeds = range(1, num_seeds + 1)
    result = case_deletion(
        scores,
        partial(_train, make_model, task.train, recipe, queries),
        ks=ks,
        seeds=seeds,
        journal_path=journal_path,
        identity={
            "architecture": architecture,
            "width": width,
            "recipe": asdict(recipe),
            "explain": explain,
            "points": points.tolist(),
            "train_digest": _digest(task.train),
            "queries_digest": _digest(queries),
        },
    )
    return InfluenceEvaluation(
        result=result,
        cancellation=[cancellation_ratios(model, to_batches(task.train)) for model in models],
        label_agreement={
            name: _label_agreement(matrix, task.train["labels"].numpy(), queries["labels"].numpy())
            for name, matrix in scores.items()
        },
        accuracy=[_accuracy(train_classifier(make_model, task.train, recipe, seed=seed)[0], task) for seed in seeds],
        majority=float(task.test["labels"].bincount().max() / num_test),
        points=points.tolist(),
    )


def _train(
    make_model: Callable[[int], nn.Module],
    train: dict[str, Tensor],
    recipe: TrainingRecipe,
    queries: dict[str, Tensor],
    removed: tuple[int, ...],
    seed: int,
) -> ProbabilityFunction:
    """Retrain, and give the probability of each point's explained class."""
    model, _ = train_classifier(make_model, train, recipe, seed=seed, removed=removed)
    probabilities = predict_probabilities(model, queries).gather(1, queries["labels"][:, None]).squeeze(1).tolist()
    return lambda point: probabilities[point]


def _accuracy(model: nn.Module, task: SmallTask) -> float:
    return float((predict_probabilities(model, task.test).argmax(dim=1) == task.test["labels"]).float().mean())


def _label_agreement(scores: np.ndarray, labels: np.ndarray, explained: np.ndarray) -> dict[str, float]:
    order = np.argsort(-scores, axis=1, kind="stable")
    return {
        "proponents": float((labels[order[:, :10]] == explained[:, None]).mean()),
        "opponents": float((labels[order[:, -10:]] == explained[:, None]).mean()),
    }


def _digest(data: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(data[name].to(torch.int64).numpy().tobytes() for name in sorted(data))).hexdigest()
