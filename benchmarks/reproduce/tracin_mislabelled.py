"""
Finding wrong labels: 10 or 20 % are flipped, the model learns them, and each score ranks the examples by suspicion.

Decided before the first result was seen:

- Sets ag_news, toxicity_jigsaw, snli; the two small architectures and recipes of `hf_doge.tracing.influence_evaluation`; 1,000
  training examples of at most 32 tokens; four checkpoints. Seeds 1 to 5 each draw other examples, flips, initial weights and
  batches, so an interval over seeds (Student's t) holds all of it.
- Two ways to suspect, each with every scorer that has it: `self`, a large score of an example with itself (as TracIn's paper
  does), and `clean`, a small mean score on 200 test examples whose labels are clean (as the rebuttal does). Every layer is
  scored, plainly and, for `clean`, by cosine. `loss` is the loss at the end and `loss, mean` its mean over the checkpoints:
  what costs nothing and should be beaten. BM25 has no score with itself that knows of labels; `clean: bm25_signed` counts
  neighbours of another label negative. TracIn-WE-Syn is left out: with itself it is TracIn-WE, since exact matches come
  first, and on 200 examples it would cost more than all the rest.
- The number is the area under the detection curve: share of the flipped labels found, over the share inspected. Chance is
  0.5; the best possible is 0.95 with 10 % flipped and 0.9 with 20 %.
- The paper's claim holds if TracIn-WE has a larger area than the last layer with an interval of the paired difference (over
  seeds) that leaves 0 out; the rebuttal's if a middle layer has one than TracIn-WE; the explanation by cancellation if over
  the layers a larger cancellation ratio goes with a smaller area (Spearman, below 0).
- Causes looked for: the area at each checkpoint alone (is it the time?), cosine (is it the length of gradients?).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.reproduce.layer_gradients import layer_gradients, weight_layers
from benchmarks.reproduce.tracin_scorers import record_rows
from hf_doge.evaluation.influence.mislabelled import flip_labels
from hf_doge.evaluation.influence.rank_metrics import area_under_roc, recall_at
from hf_doge.functional.tracin_we import cancellation_ratio
from hf_doge.tracing.influence_evaluation import RECIPES
from hf_doge.tracing.scorers import SCORERS, make_scorer
from hf_doge.tracing.small_classifiers import make_classifier
from hf_doge.tracing.small_tasks import SPECIAL_TOKENS, load_small_task
from hf_doge.tracing.small_training import predict_probabilities, to_batches, train_classifier

FRACTIONS = (0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Sizes:
    """How large the experiment is."""

    tasks: tuple[str, ...] = ("ag_news", "toxicity_jigsaw", "snli")
    architectures: tuple[str, ...] = ("cnn", "transformer")
    shares: tuple[float, ...] = (0.1, 0.2)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    num_train: int = 1000
    num_clean: int = 200
    max_length: int = 32
    width: int = 32


SIZES = {
    "small": Sizes(),
    "gpu": Sizes(num_train=5000, num_clean=1000, max_length=128, width=128, seeds=tuple(range(1, 11))),
    "tiny": Sizes(tasks=("ag_news",), architectures=("cnn",), shares=(0.2,), seeds=(1, 2), num_train=60, num_clean=10),
}


def detection_part(data_dir: Path, task_name: str, architecture: str, share: float, seed: int, sizes: Sizes) -> dict:
    """One model trained on flipped labels: how well each suspicion finds them, and every layer's cancellation."""
    task = load_small_task(
        data_dir,
        task_name,
        num_train=sizes.num_train,
        num_test=sizes.num_clean,
        max_length=sizes.max_length,
        seed=seed,
    )
    labels, flipped = flip_labels(task.train["labels"].numpy(), share, num_classes=task.num_classes, seed=seed)
    train = {**task.train, "labels": torch.from_numpy(labels)}
    make_model = partial(
        _make_model,
        architecture,
        len(task.vocabulary),
        task.num_classes,
        sizes.width,
        max(part["input_ids"].shape[1] for part in (train, task.test)),
    )
    model, checkpoints = train_classifier(make_model, train, RECIPES[architecture], seed=seed, keep_checkpoints=True)
    models, rates = zip(*checkpoints, strict=True)
    at_checkpoints: dict[str, list[Tensor]] = {}
    cancellation: dict[str, list[float]] = {}
    for checkpoint in models:
        for name, values in _suspicions(checkpoint, train, task.test, cancellation).items():
            at_checkpoints.setdefault(name, []).append(values)
    suspicions = {
        name: sum(rate * part for rate, part in zip(rates, parts, strict=True)).numpy()
        for name, parts in at_checkpoints.items()
    }
    losses = torch.stack(at_checkpoints.pop("loss"))
    suspicions.update({"loss": losses[-1].numpy(), "loss, mean": losses.mean(dim=0).numpy()})
    for name in ("influence_last", "representer"):
        scorer = make_scorer(name, models, rates)
        suspicions[f"self: {name}"] = scorer.scores(to_batches(train), to_batches(train)).diagonal()
        suspicions[f"clean: {name}"] = -scorer.scores(to_batches(train), to_batches(task.test)).mean(axis=0)
    if "bm25_signed" in SCORERS:
        scorer = make_scorer("bm25_signed", models, rates, special_token_ids=range(len(SPECIAL_TOKENS)))
        suspicions["clean: bm25_signed"] = -scorer.scores(to_batches(train), to_batches(task.test)).mean(axis=0)
    suspicions["random"] = np.random.default_rng(seed).random(len(flipped))
    return {
        "areas": {name: detection_area(values, flipped) for name, values in suspicions.items()},
        "areas_at_checkpoints": {
            name: [detection_area(part.numpy(), flipped) for part in parts]
            for name, parts in {**at_checkpoints, "loss": list(losses)}.items()
        },
        "recalls": {
            name: [recall_at(values, flipped, fraction) for fraction in FRACTIONS]
            for name, values in suspicions.items()
        },
        "cancellation": cancellation,
        "train_accuracy": float((predict_probabilities(model, train).argmax(dim=1) == train["labels"]).float().mean()),
        "clean_accuracy": float(
            (predict_probabilities(model, task.test).argmax(dim=1) == task.test["labels"]).float().mean()
        ),
    }


def _suspicions(
    model: nn.Module, train: Mapping[str, Tensor], clean: Mapping[str, Tensor], cancellation: dict[str, list[float]]
) -> dict[str, Tensor]:
    """Suspicion of each training example at one checkpoint, by method; cancellation ratios are added to theirs."""
    found = {}
    probabilities = predict_probabilities(model, train)
    found["loss"] = -probabilities.gather(1, train["labels"][:, None]).squeeze(1).clamp(min=1e-12).log().double()
    batches, clean_batches = to_batches(train), to_batches(clean)
    layers = weight_layers(model)
    ours, theirs = layer_gradients(model, batches, layers), layer_gradients(model, clean_batches, layers)
    for layer in layers:
        norms, clean_norms = ours[layer].norm(dim=1), theirs[layer].norm(dim=1)
        found[f"self: {layer}"] = norms.square().double()
        found[f"clean: {layer}"] = -(ours[layer] @ theirs[layer].mean(dim=0)).double()
        directions = theirs[layer] / clean_norms.clamp(min=1e-30)[:, None]
        found[f"clean, cosine: {layer}"] = (-(ours[layer] @ directions.mean(dim=0)) / norms.clamp(min=1e-30)).double()
        cancellation.setdefault(layer, []).append(float(cancellation_ratio(ours[layer].double())))
    for name, options in {"tracin_we": {}, "tracin_we_topk": {"top_k": 10}}.items():
        rows, clean_rows = record_rows(model, batches, **options), record_rows(model, clean_batches, **options)
        zeros = rows.rows.new_zeros(model.get_input_embeddings().weight.shape)
        squares, clean_squares = _sum_rows(rows.rows.square(), rows), _sum_rows(clean_rows.rows.square(), clean_rows)
        net = zeros.index_add(0, clean_rows.tokens, clean_rows.rows)
        found[f"self: {name}"] = squares.double()
        found[f"clean: {name}"] = -_sum_rows(rows.rows * net[rows.tokens], rows).double()
        if name == "tracin_we":
            lengths = clean_squares.sqrt().clamp(min=1e-30).repeat_interleave(clean_rows.offsets.diff())
            net = zeros.index_add(0, clean_rows.tokens, clean_rows.rows / lengths[:, None])
            products = _sum_rows(rows.rows * net[rows.tokens], rows)
            found["clean, cosine: tracin_we"] = (-products / squares.sqrt().clamp(min=1e-30)).double()
            total = zeros.double().index_add(0, rows.tokens, rows.rows.double())
            cancellation.setdefault("tracin_we", []).append(float(squares.double().sqrt().sum() / total.norm()))
    return found


def _sum_rows(values: Tensor, rows) -> Tensor:
    """Sum over the rows and the width of each example, shape `(N,)`."""
    examples = torch.arange(len(rows)).repeat_interleave(rows.offsets.diff())
    return values.new_zeros(len(rows)).index_add_(0, examples, values.sum(dim=1))


def detection_area(suspicion: np.ndarray, flipped: np.ndarray) -> float:
    """Area under share found over share inspected, most suspected first: a line away from the area under the ROC curve."""
    share = float(flipped.mean())
    return share / 2 + (1 - share) * area_under_roc(suspicion, flipped)


def _make_model(
    architecture: str, vocabulary_size: int, num_classes: int, width: int, max_length: int, seed: int
) -> nn.Module:
    return make_classifier(architecture, vocabulary_size, num_classes, width=width, max_length=max_length, seed=seed)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation of a few values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])
