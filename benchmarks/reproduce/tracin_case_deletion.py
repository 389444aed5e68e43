"""
Case deletion: what becomes of a prediction when its strongest proponents or opponents are gone. Three sets, two architectures.

Decided before the first result was seen:

- Sets ag_news, toxicity_jigsaw, snli; the CNN of the paper's notebook and a transformer, both tiny and from scratch; 500
  training examples of at most 32 tokens, Adam, four checkpoints, the recipes of `hf_doge.tracing.influence_evaluation`.
- Test points in blocks of 5, from one permutation of the test examples; a round is one block of each of the six tables.
  Six rounds are planned at small scale. Should the clock stop it, whole rounds count and no others, whatever they show.
- k = 10 and 40 of 500. Scores are of seed 1's run; each block retrains under one seed of its own, never 1: a retraining costs
  the same whether it serves another seed or another point, and other points say more. So an interval over points holds the
  seeds' noise too. (First planned: two seeds for every point. Changed for time alone, when 53 of 382 retrainings of the first
  block were done and no probability had been looked at.)
- f is the probability of the class that seed 1's model predicts. AUC-DEL+ (without proponents, lower is better) and AUC-DEL-
  (without opponents, higher is better) are means over k; intervals are 95 % bootstrap over points; `less tracin_we` are
  differences on the same points.
- The paper's claim holds in a table if AUC-DEL+ of `tracin_we` is below that of each last-layer method with an interval of the
  paired difference that leaves 0 out, and the like for AUC-DEL-. Its explanation holds if the cancellation ratio of the
  embedding is the lowest of all layers. The rebuttal's claim holds if `tracin_middle` is better than `tracin_we` in that sense.
  The middle is fixed as the second of three convolutions, and the attention of the second of two layers.
- A cause looked for: `tracin_we_cosine` shows what the length of gradients does. `distinct` is how many different examples
  stand among the ten strongest proponents of five points, of 50 places: few if some examples are proponents of everything.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.reproduce.layer_gradients import layer_gradients, weight_layers
from benchmarks.reproduce.tracin_scorers import make_experiment_scorer
from hf_doge.evaluation.influence.case_deletion import case_deletion
from hf_doge.evaluation.influence.deletion_result import CaseDeletionResult
from hf_doge.functional.tracin_we import cancellation_ratio
from hf_doge.tracing.cancellation import cancellation_ratios
from hf_doge.tracing.influence_evaluation import RECIPES
from hf_doge.tracing.small_classifiers import make_classifier
from hf_doge.tracing.small_tasks import SPECIAL_TOKENS, SmallTask, load_small_task
from hf_doge.tracing.small_training import (
    Checkpoint,
    TrainingRecipe,
    predict_probabilities,
    to_batches,
    train_classifier,
)

TASKS = ("ag_news", "toxicity_jigsaw", "snli")
ARCHITECTURES = ("cnn", "transformer")
MIDDLE_LAYERS = {"cnn": "convolutions.1", "transformer": "layers.1.attention"}
SCORERS = (
    "tracin_we",
    "tracin_we_topk",
    "tracin_we_syn",
    "tracin_we_cosine",
    "tracin_middle",
    "tracin_last",
    "influence_last",
    "representer",
    "bm25",
    "random",
)


@dataclass(frozen=True)
class Sizes:
    """How large the experiment is; `gpu` has the paper's shapes as far as the data go."""

    tasks: tuple[str, ...] = TASKS
    architectures: tuple[str, ...] = ARCHITECTURES
    scorers: tuple[str, ...] = SCORERS
    num_train: int = 500
    num_test: int = 400
    max_length: int = 32
    width: int = 32
    ks: tuple[int, ...] = (10, 40)
    points_per_block: int = 5
    num_blocks: int = 6


SIZES = {
    "small": Sizes(),
    "gpu": Sizes(
        num_train=5000, max_length=128, width=128, ks=tuple(range(10, 101, 10)), points_per_block=20, num_blocks=1
    ),
    "tiny": Sizes(
        tasks=("ag_news",),
        architectures=("cnn",),
        scorers=("tracin_we", "tracin_we_syn", "tracin_middle", "random"),
        num_train=40,
        num_test=20,
        width=8,
        ks=(4,),
        points_per_block=2,
        num_blocks=1,
    ),
}


@dataclass(frozen=True)
class Explained:
    """A trained model of one table, its checkpoints, and how it trains."""

    task: SmallTask
    architecture: str
    make_model: partial
    recipe: TrainingRecipe
    model: nn.Module
    checkpoints: Sequence[Checkpoint]


@cache
def train_explained(data_dir: Path, task_name: str, architecture: str, sizes: Sizes, seed: int = 1) -> Explained:
    """The run that is explained: that of the first seed."""
    task = load_small_task(
        data_dir, task_name, num_train=sizes.num_train, num_test=sizes.num_test, max_length=sizes.max_length
    )
    make_model = partial(
        _make_model,
        architecture,
        len(task.vocabulary),
        task.num_classes,
        sizes.width,
        max(part["input_ids"].shape[1] for part in (task.train, task.test)),
    )
    recipe = RECIPES[architecture]
    model, checkpoints = train_classifier(make_model, task.train, recipe, seed=seed, keep_checkpoints=True)
    return Explained(task, architecture, make_model, recipe, model, checkpoints)


def _make_model(
    architecture: str, vocabulary_size: int, num_classes: int, width: int, max_length: int, seed: int
) -> nn.Module:
    return make_classifier(architecture, vocabulary_size, num_classes, width=width, max_length=max_length, seed=seed)


def deletion_part(
    data_dir: Path, output_dir: Path, task_name: str, architecture: str, block: int, sizes: Sizes, seed: int
) -> dict:
    """One block of test points of one table: every probability after every retraining, and what the scores look like."""
    start = time.perf_counter(), time.process_time()
    explained = train_explained(data_dir, task_name, architecture, sizes)
    task = explained.task
    order = np.random.default_rng(0).permutation(len(task.test["labels"]))
    points = order[block * sizes.points_per_block : (block + 1) * sizes.points_per_block]
    queries = {name: values[points] for name, values in task.test.items()}
    queries["labels"] = predict_probabilities(explained.model, queries).argmax(dim=1)
    models, learning_rates = zip(*explained.checkpoints, strict=True)
    scores = {
        name: make_experiment_scorer(
            name,
            models,
            learning_rates,
            middle_layer=MIDDLE_LAYERS[architecture],
            special_token_ids=range(len(SPECIAL_TOKENS)),
            seed=block,
        ).scores(to_batches(task.train), to_batches(queries))
        for name in sizes.scorers
    }

    def retrain(removed: tuple[int, ...], seed: int):
        model, _ = train_classifier(explained.make_model, task.train, explained.recipe, seed=seed, removed=removed)
        probabilities = predict_probabilities(model, queries).gather(1, queries["labels"][:, None]).squeeze(1).tolist()
        return lambda point: probabilities[point]

    name = f"{task_name}-{architecture}-{block}"
    result = case_deletion(
        scores,
        retrain,
        ks=sizes.ks,
        seeds=[seed],
        noise_seeds=[seed + 100],
        journal_path=output_dir / "tracin_case_deletion" / f"{name}.retrainings.jsonl",
        identity={
            "task": task_name,
            "architecture": architecture,
            "sizes": {key: value for key, value in asdict(sizes).items() if key not in ("num_blocks", "tasks")},
            "points": points.tolist(),
        },
    )
    labels = task.train["labels"].numpy()
    strongest = {name: np.argsort(-matrix, axis=1, kind="stable")[:, :10] for name, matrix in scores.items()}
    return {
        "full": result.full.tolist(),
        "full_noise": result.full_noise.tolist(),
        "removed": [[scorer, sign, values.tolist()] for (scorer, sign), values in result.removed.items()],
        "num_retrainings": result.num_retrainings,
        "same_label": {
            name: float((labels[top] == queries["labels"].numpy()[:, None]).mean()) for name, top in strongest.items()
        },
        "distinct": {name: len(np.unique(top)) for name, top in strongest.items()},
        "wall_seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
    }


def layers_part(data_dir: Path, task_name: str, architecture: str, sizes: Sizes, seeds: Sequence[int]) -> dict:
    """Cancellation ratio of every layer at every checkpoint over the training examples, and accuracy by seed."""
    explained = train_explained(data_dir, task_name, architecture, sizes)
    batches = to_batches(explained.task.train)
    ratios: dict[str, list[float]] = {}
    for model, _ in explained.checkpoints:
        ends = cancellation_ratios(model, batches)
        gradients = layer_gradients(model, batches, weight_layers(model))
        found = {
            "embedding": ends["embedding"],
            **{name: float(cancellation_ratio(values.double())) for name, values in gradients.items()},
            "classifier.bias": ends["last_bias"],
        }
        for name, ratio in found.items():
            ratios.setdefault(name, []).append(ratio)
    test = explained.task.test
    accuracy = []
    for seed in seeds:
        model = explained.model
        if seed != 1:
            model, _ = train_classifier(explained.make_model, explained.task.train, explained.recipe, seed=seed)
        accuracy.append(float((predict_probabilities(model, test).argmax(dim=1) == test["labels"]).float().mean()))
    return {
        "cancellation": ratios,
        "accuracy": accuracy,
        "majority": float(test["labels"].bincount().max() / len(test["labels"])),
    }


def pool(parts: Sequence[dict], sizes: Sizes) -> CaseDeletionResult:
    """The blocks of one table, or all tables, as one result over all of their points; each has one seed of its block."""
    removed: dict[tuple[str, str], list] = {}
    for part in parts:
        for scorer, sign, values in part["removed"]:
            removed.setdefault((scorer, sign), []).append(np.array(values))
    return CaseDeletionResult(
        ks=sizes.ks,
        seeds=(0,),
        full=np.concatenate([np.array(part["full"]) for part in parts]),
        full_noise=np.concatenate([np.array(part["full_noise"]) for part in parts]),
        removed={key: np.concatenate(values) for key, values in removed.items()},
        num_retrainings=sum(part["num_retrainings"] for part in parts),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--scale", default="small")
    parser.add_argument("--rounds", type=int, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = SIZES[args.scale]
    for block in args.rounds:
        for task in sizes.tasks:
            for architecture in sizes.architectures:
                part = deletion_part(args.data_dir, args.output_dir, task, architecture, block, sizes, 2 + block)
                print(
                    block,
                    task,
                    architecture,
                    json.dumps({k: v for k, v in part.items() if "seconds" in k or k.startswith("num")}),
                    flush=True,
                )
