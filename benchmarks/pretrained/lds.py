"""
Which scorer tells what a fine-tuned encoder would have become without some of its examples? By retraining.

MiniLM with a new head, 240 questions of six sources (see `minilm`), three epochs of AdamW at 1e-4, batches of 16, no dropout.
30 held-out questions are traced for what the model predicts. By scorer:

- `lds`: the linear datamodelling score over random halves of the training set, mean over the 30 points, and its 95 % interval;
  `lds_balanced`: over halves that have half of each class, so that the number of examples of a class explains nothing.
  The output is the margin of the predicted class. A retraining's initial weights and batches depend on its seed alone; a removed
  example leaves its place empty;
- `removed`: of the first points (`--deletion_points`), the change of the predicted class's probability, in points, when the 10
  or 20 strongest proponents are removed, and its difference from the removal of as many random examples of the predicted class
  (one draw a class) on the same points;
- `epochs`: CPU time of recording and scoring, in epochs of the fine-tuning, measured in the same run.

Scorers named `late_...` look at the ends of the three epochs, `early_...` at the thirds of the first; `default` is what an
index does today (all tokens count, by cosine), `dropped` leaves special tokens and ends of sentences out of the sum, `paper` is `recipe="paper"`; `last_layer` is TracIn at the ends of the epochs. Scores of indices with words
and the last layer, put together by each rule of `parts`, are named `projected_...` (the layer projected to 19 numbers on both sides,
as `layers=` does), `row_...` and `rows_...` (projected to as many as one row and two rows hold) and `whole_...`; `alone_...` are of
indices of the layer alone. Those that know the classes stand below: `same_label` is 1 for examples of the predicted class, `class_...` a score among them and 0 elsewhere (of
`class_random` drawn evenly), `signed_...` a score among them and minus it elsewhere. Finished retrainings, indices and scores
are kept in the output folder, so that the command continues.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import set_seed

from benchmarks.pretrained.minilm import LENGTH, fine_tune, load_task, record, sentence_embeddings
from benchmarks.pretrained.packaged_models import minilm
from benchmarks.pretrained.parts import RULES, Parts
from hf_doge import InfluenceIndex
from hf_doge.evaluation.influence.case_deletion import FULL, strongest
from hf_doge.evaluation.influence.journal import RetrainingJournal, RetrainingKey
from hf_doge.evaluation.influence.lds import class_margins, linear_datamodelling_score, retrain
from hf_doge.evaluation.influence.scorers import BM25Scorer, TracInLastScorer
from hf_doge.evaluation.influence.small_models import TrainingRecipe, to_batches, train_classifier
from hf_doge.evaluation.intervals import bootstrap_interval

NUM_TRAIN, NUM_POINTS, EPOCHS, LEARNING_RATE = 240, 30, 3, 1e-4
WIDTH = 384  # of the encoder: a side of a layer that is no longer stays whole
KS = (10, 20)
NUM_DRAWS = 1
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("gradient", {"recipe": "paper"}),
    "default": ("gradient", {}),
    "dropped": ("gradient", {"special_tokens": "drop", "sentence_ends": "drop"}),
    "dropped_no_cosine": ("gradient", {"cosine": False, "special_tokens": "drop", "sentence_ends": "drop"}),
    "metric": ("optimizer", {"cosine": False, "special_tokens": "drop", "sentence_ends": "drop"}),
    "metric_cosine": ("optimizer", {"cosine": True, "special_tokens": "drop", "sentence_ends": "drop"}),
}
# Recordings of the ends of the epochs: layers, and how many rows the last layer takes, at most as many as there are classes.
LAYERS: dict[str, tuple[list[str], int | None]] = {
    "projected": (["embedding", "classifier"], None),
    "row": (["embedding", "classifier"], 1),
    "rows": (["embedding", "classifier"], 2),
    "whole": (["embedding", "classifier"], WIDTH),
    "alone": (["classifier"], None),
    "alone_whole": (["classifier"], WIDTH),
}
REMOVED = ("late_paper", "late_default", "sentence_embedding")


class Trimmed(nn.Module):
    """
    The same model, quicker to train: it reads no column that is padding in the whole batch, and has no words but `used` ones.

    Adam without weight decay never moves the others, so what is trained is the same.
    """

    def __init__(self, model: nn.Module, used: Tensor) -> None:
        super().__init__()
        self.model = model
        words = model.get_input_embeddings()
        self.register_buffer("places", torch.zeros(len(words.weight), dtype=torch.long))
        self.places[used] = torch.arange(len(used))
        model.set_input_embeddings(nn.Embedding.from_pretrained(words.weight.detach()[used], freeze=False))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """As that of the model."""
        width = int(attention_mask.sum(dim=1).max())
        return self.model(input_ids=self.places[input_ids[:, :width]], attention_mask=attention_mask[:, :width])


class Trial:
    """Data and model of the trial, and what was predicted."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = args.output_dir / f"lds-{args.task}"
        self.num_train = args.num_train or NUM_TRAIN
        self.epochs = args.epochs or EPOCHS
        texts, labels, names = load_task(args.data_dir, args.task, seed=args.seed)
        self.num_labels = len(names)
        number = self.num_train + NUM_POINTS
        self.texts, self.labels = texts[:number], np.asarray(labels[:number])
        set_seed(args.seed)
        model, self.tokenizer = minilm(args.output_dir / "minilm", num_labels=self.num_labels)
        options = {"truncation": True, "max_length": LENGTH}
        encoded = self.tokenizer(self.texts, **options)
        self.dataset = Dataset.from_dict({"text": self.texts, "label": self.labels, **encoded})
        self.train_set = self.dataset.select(range(self.num_train))
        self.checkpoints = fine_tune(
            without_dropout(model),
            self.tokenizer,
            self.train_set,
            self.folder / "run",
            epochs=self.epochs,
            seed=args.seed,
            learning_rate=LEARNING_RATE,
        )
        padded = self.tokenizer(self.texts, padding=True, return_tensors="pt", **options)
        tensors = {name: padded[name] for name in ("input_ids", "attention_mask")}
        self.train = {name: rows[: self.num_train] for name, rows in tensors.items()}
        self.train["labels"] = torch.tensor(self.labels[: self.num_train])
        self.points = {name: rows[self.num_train :] for name, rows in tensors.items()}
        self.last = type(model).from_pretrained(self.checkpoints[-1]).eval()
        with torch.no_grad():
            self.points["labels"] = self.last(**self.points).logits.argmax(dim=1)
        self.own = self.labels[: self.num_train]
        self.predicted = self.points["labels"].numpy()

    def make_model(self, seed: int) -> nn.Module:
        """A pretrained model whose head depends on the seed."""
        torch.manual_seed(seed)
        model = without_dropout(minilm(self.args.output_dir / "minilm", num_labels=self.num_labels)[0])
        return Trimmed(model, torch.cat([self.train["input_ids"], self.points["input_ids"]]).unique())

    def train_fn(self, removed: tuple[int, ...], seed: int) -> Callable[[int], float]:
        """Margins of the predicted classes after a retraining."""
        recipe = TrainingRecipe(self.epochs, 16, LEARNING_RATE, "adam", (self.epochs,))
        model, _ = train_classifier(self.make_model, self.train, recipe, seed=seed, removed=removed)
        with torch.no_grad():
            inputs = {name: rows for name, rows in self.points.items() if name != "labels"}
            margins = class_margins(model(**inputs).logits.double(), self.points["labels"])
        return margins.tolist().__getitem__

    def identity(self) -> dict[str, Any]:
        """What retrainings must share."""
        rows = [*self.train.values(), *self.points.values()]
        digest = hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows)).hexdigest()
        return {"data": digest, "epochs": self.epochs, "learning_rate": LEARNING_RATE, "model": "all-MiniLM-L6-v2"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune, score, retrain on halves, remove; figures by scorer."""
    trial = Trial(args)
    accuracy = round(float((trial.predicted == trial.labels[trial.num_train :]).mean()), 3)
    print(f"{accuracy=}, points of each class: {np.bincount(trial.predicted, minlength=trial.num_labels)}", flush=True)
    scores, costs = all_scores(trial)
    scores |= (known := controls(trial, scores))
    costs |= dict.fromkeys(known.keys() - costs.keys(), 0.0)
    figures: dict[str, Any] = {name: {"epochs": costs[name]} for name in scores}
    agreements = {}
    for kind, number, strata, control in (
        ("lds", args.num_subsets, None, "same_label"),
        ("lds_balanced", args.balanced_subsets, trial.own, "class_random"),
    ):
        result = linear_datamodelling_score(
            scores,
            trial.train_fn,
            num_subsets=number,
            seeds=range(1, args.retraining_seeds + 1),
            strata=strata,
            output_dir=trial.folder / "lds",
            identity=trial.identity(),
        )
        result.save(trial.folder / kind)
        print(result.to_markdown(), flush=True)
        agreements[kind] = None if len(result.seeds) == 1 else round(float(result.agreement().mean()), 3)
        for name, values in result.summary().items():
            figures[name][kind] = rounded(values)
        for reference in (control, "late_default"):
            for name, values in result.differences(reference).items():
                figures[name][f"{kind}_less_{reference}"] = rounded(values)
    if args.deletion_points:
        for name, change in removals(trial, scores).items():
            figures.setdefault(name, {})["removed"] = change
    for name, values in figures.items():
        print(name, values, flush=True)
    return {"accuracy": accuracy, "agreement": agreements, **figures}


def all_scores(trial: Trial) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores `(NUM_POINTS, num_train)` by scorer, and their cost in epochs of the fine-tuning."""
    files = trial.folder / "scores.npz", trial.folder / "costs.json"
    costs: dict[str, float] = json.loads(files[1].read_text()) if files[1].is_file() else {}
    scores: dict[str, np.ndarray] = dict(np.load(files[0])) if files[0].is_file() else {}
    epoch = seconds_of_an_epoch(trial)
    train, points = to_batches(trial.train), to_batches(trial.points)

    def note(name: str, score: Callable[[], np.ndarray], *, before: float = 0.0) -> None:
        if name in scores:
            return
        start = time.process_time()
        scores[name] = np.asarray(score(), dtype=np.float64)
        costs[name] = round((time.process_time() - start + before) / epoch, 2)

    queries = [
        {"text": text, "label": int(label)}
        for text, label in zip(trial.texts[trial.num_train :], trial.predicted, strict=True)
    ]
    spread = {"late": trial.checkpoints[2::3], "early": trial.checkpoints[:3]}

    def recorded(name: str, chosen: Sequence[Path], options: dict[str, Any]) -> tuple[InfluenceIndex, float]:
        start = time.process_time()
        index = record(trial.folder / name, chosen, trial.train_set, trial.tokenizer, options)
        index.scores(queries[:1])  # makes the memory maps
        return index, time.process_time() - start

    for when, chosen in spread.items():
        searches = {
            name: search
            for name, search in SEARCHES.items()
            if trial.args.settings is None or f"{when}_{name}" in trial.args.settings
        }
        metrics = dict.fromkeys(metric for metric, _ in searches.values())
        indices = {
            metric: recorded(f"{when}_{metric}", chosen, {"metric": metric, "layers": "embedding"})
            for metric in metrics
        }
        for name, (metric, options) in searches.items():
            index, seconds = indices[metric]
            note(
                f"{when}_{name}", lambda index=index, options=options: index.scores(queries, **options), before=seconds
            )
    for name, (layers, num_rows) in LAYERS.items():
        dim = None if num_rows is None else min(WIDTH, num_rows * WIDTH // trial.num_labels)
        index, seconds = recorded(name, spread["late"], {"layers": layers, "projection_dim": dim})
        rates = [checkpoint["learning_rate"] for checkpoint in index.config["checkpoints"]]
        if "embedding" not in layers:
            for suffix, cosine in (("sum", False), ("cosine", True)):
                note(
                    f"{name}_{suffix}",
                    lambda index=index, cosine=cosine: index.scores(queries, cosine=cosine),
                    before=seconds,
                )
            continue
        start = time.process_time()
        parts = Parts.of(index, queries)
        seconds += time.process_time() - start
        for rule in RULES:
            note(f"{name}_{rule}", lambda parts=parts, rule=rule: parts.scores(rule), before=seconds)
    models = [type(trial.last).from_pretrained(path).eval() for path in spread["late"]]
    note("last_layer", lambda: TracInLastScorer(models, rates).scores(train, points))
    ignored = tuple(trial.tokenizer.all_special_ids)
    note("bm25", lambda: BM25Scorer(ignore_tokens=ignored).scores(train, points))
    embedding, _ = minilm(trial.args.output_dir / "minilm", num_labels=trial.num_labels)

    def nearest() -> np.ndarray:
        rows = nn.functional.normalize(sentence_embeddings(embedding, trial.tokenizer, trial.dataset))
        return (rows[trial.num_train :] @ rows[: trial.num_train].T).numpy()

    note("sentence_embedding", nearest)
    np.savez(files[0], **scores)
    files[1].write_text(json.dumps(costs))
    return scores, costs


def controls(trial: Trial, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Chance, and what knows the classes: 1 or a score within the predicted one and 0 elsewhere, or minus the score there."""
    same = (trial.own[None] == trial.predicted[:, None]).astype(float)
    distance = 1 + scores["sentence_embedding"]
    return {
        "random": np.random.default_rng(0).standard_normal(same.shape),
        "same_label": same,
        "class_random": same * np.random.default_rng(0).uniform(size=same.shape),
        "class_bm25": same * scores["bm25"],
        "class_sentence_embedding": same * distance,
        "class_late_default": same * scores["late_default"],
        "signed_bm25": (2 * same - 1) * scores["bm25"],
        "signed_sentence_embedding": (2 * same - 1) * distance,
    }


def removals(trial: Trial, scores: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Change of the predicted class's probability by scorer and k, alone and less that of the class's random examples."""
    number, seed = trial.args.deletion_points, 1
    journal = RetrainingJournal(
        trial.folder / "removed.jsonl", identity={**trial.identity(), "evaluation": "removal"}, values="margins"
    )
    generator = np.random.default_rng(0)
    draws = [
        [generator.permutation(np.flatnonzero(trial.own == label)) for label in range(trial.num_labels)]
        for _ in range(NUM_DRAWS)
    ]
    plan = {RetrainingKey(FULL, 0, "+", 0, seed): ()}
    for point in range(number):
        for k in KS:
            plan |= {
                RetrainingKey(name, point, "+", k, seed): strongest(scores[name][point], k, "+") for name in REMOVED
            }
            plan |= {
                RetrainingKey(f"class_random_{draw}", point, "+", k, seed): tuple(
                    sorted(of_class[trial.predicted[point]][:k].tolist())
                )
                for draw, of_class in enumerate(draws)
            }
    measured = journal.measure(plan, lambda removed, seed: retrain(trial.train_fn, NUM_POINTS, removed, seed))

    def probability(name: str, place: int, k: int, point: int) -> float:
        return float(1 / (1 + np.exp(-measured[RetrainingKey(name, place, "+", k, seed)][point])))

    full = np.array([probability(FULL, 0, 0, point) for point in range(number)])
    changes = {
        name: {k: np.array([probability(name, point, k, point) for point in range(number)]) - full for k in KS}
        for name in REMOVED
    }
    changes["class_random"] = {
        k: np.mean(
            [
                [probability(f"class_random_{draw}", point, k, point) for point in range(number)]
                for draw in range(NUM_DRAWS)
            ],
            axis=0,
        )
        - full
        for k in KS
    }
    figures: dict[str, dict[str, Any]] = {"nothing removed": {"probability": round(float(full.mean()), 3)}}
    for name, by_k in changes.items():
        figures[name] = {}
        for k, change in by_k.items():
            less = change - changes["class_random"][k]
            figures[name][str(k)] = {
                "change": points_and_interval(change),
                "less_class_random": points_and_interval(less),
            }
    return figures


def points_and_interval(values: np.ndarray) -> list[float]:
    """Mean and 95 % interval over the test points, in percentage points."""
    return [round(100 * float(value), 1) for value in (values.mean(), *bootstrap_interval(values))]


def rounded(values: Mapping[str, Any] | None) -> list[float] | None:
    """Mean and 95 % interval, short."""
    return None if values is None else [round(float(value), 3) for value in (values["mean"], *values["interval"])]


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, which then trains without chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def seconds_of_an_epoch(trial: Trial) -> float:
    """CPU time of an epoch of the retrainings."""
    recipe = TrainingRecipe(1, 16, LEARNING_RATE, "adam", (1,))
    model = trial.make_model(1)
    start = time.process_time()
    train_classifier(lambda seed: model, trial.train, recipe, seed=1)
    return time.process_time() - start
