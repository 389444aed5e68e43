"""
Finding wrong labels: 10 or 20 % are flipped, the model learns them, and each score ranks the examples by suspicion.

Decided before the first result was seen:

- Sets ag_news, toxicity_jigsaw, snli; the two small architectures and recipes of `hf_doge.evaluation.influence.experiment`; 1,000
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

Added after these results had been read, upon a review (parts `peers-...`, which train the same models again): `influence_last` and `representer` summed
over the checkpoints as TracIn is (", all"; influence damped by the mean of the Hessian's diagonal), for the last checkpoint alone has next to no
learning rate left; and cancellation entry by entry, see `tracin_case_deletion`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.layer_gradients import cancellation_by_entry, layer_gradients, weight_layers
from benchmarks.reproduce.report import Results, Table, new_figure
from benchmarks.reproduce.tracin_case_deletion import MIDDLE_LAYERS, model_maker
from benchmarks.reproduce.tracin_scorers import OverCheckpointsScorer, influence_last_all
from hf_doge.evaluation.influence.experiment import RECIPES
from hf_doge.evaluation.influence.rank_metrics import area_under_roc, recall_at, spearman
from hf_doge.evaluation.influence.scorers import RepresenterScorer, make_scorer
from hf_doge.evaluation.influence.scorers.embedding import record_rows, sum_examples
from hf_doge.evaluation.influence.small_models import Checkpoint, predict_probabilities, to_batches, train_classifier
from hf_doge.evaluation.influence.small_tasks import SPECIAL_TOKENS, SmallTask, flip_labels, load_small_task
from hf_doge.evaluation.intervals import Interval, t_interval
from hf_doge.functional.tracin_we import cancellation_ratio

FRACTIONS = (0.1, 0.2, 0.3)

# Names in the tables; `middle` and `last` are layers of the model at hand.
METHODS = (
    *(f"self: {name}" for name in ("tracin_we", "tracin_we_topk", "middle", "last", "influence_last", "representer")),
    *(f"clean: {name}" for name in ("tracin_we", "tracin_we_topk", "middle", "last", "influence_last", "representer")),
    *(f"clean, cosine: {name}" for name in ("tracin_we", "middle", "last")),
    "clean: bm25_signed",
    *(f"{kind}: {name}, all" for kind in ("self", "clean") for name in ("influence_last", "representer")),
    "loss",
    "loss, mean",
    "random",
)
FORMS = {"norms": "cancellation", "entries": "by_entry"}  # of cancellation, and where a part has them
REFERENCES = ("self: tracin_we", "clean: tracin_we")


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


@dataclass(frozen=True)
class Mislabelled:
    """A model trained on flipped labels."""

    task: SmallTask
    train: dict[str, Tensor]
    flipped: np.ndarray
    model: nn.Module
    checkpoints: Sequence[Checkpoint]


def train_on_flipped(
    data_dir: Path, task_name: str, architecture: str, share: float, seed: int, sizes: Sizes
) -> Mislabelled:
    """Draw the examples of a seed, flip some labels, and train."""
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
    make_model = model_maker(task, architecture, sizes.width)
    model, checkpoints = train_classifier(make_model, train, RECIPES[architecture], seed=seed, keep_checkpoints=True)
    return Mislabelled(task, train, flipped, model, checkpoints)


def detection_part(data_dir: Path, task_name: str, architecture: str, share: float, seed: int, sizes: Sizes) -> dict:
    """One model trained on flipped labels: how well each suspicion finds them, and every layer's cancellation."""
    trained = train_on_flipped(data_dir, task_name, architecture, share, seed, sizes)
    task, train, flipped, model = trained.task, trained.train, trained.flipped, trained.model
    models, rates = zip(*trained.checkpoints, strict=True)
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
        "cancellation": list(cancellation.items()),  # pairs, for the store sorts by name
        "train_accuracy": float((predict_probabilities(model, train).argmax(dim=1) == train["labels"]).float().mean()),
        "clean_accuracy": float(
            (predict_probabilities(model, task.test).argmax(dim=1) == task.test["labels"]).float().mean()
        ),
    }


def peers_part(data_dir: Path, task_name: str, architecture: str, share: float, seed: int, sizes: Sizes) -> dict:
    """The same model: the last layer's other scores over all checkpoints, and every layer's cancellation entry by entry."""
    trained = train_on_flipped(data_dir, task_name, architecture, share, seed, sizes)
    batches, clean_batches = to_batches(trained.train), to_batches(trained.task.test)
    models, rates = zip(*trained.checkpoints, strict=True)
    scorers = {
        "influence_last": influence_last_all(models, rates),
        "representer": OverCheckpointsScorer([RepresenterScorer(model) for model in models], rates),
    }
    suspicions = {}
    for name, scorer in scorers.items():
        suspicions[f"self: {name}, all"] = scorer.scores(batches, batches).diagonal()
        suspicions[f"clean: {name}, all"] = -scorer.scores(batches, clean_batches).mean(axis=0)
    cancellation: dict[str, list[float]] = {}
    for model in models:
        for layer, ratio in cancellation_by_entry(model, batches).items():
            cancellation.setdefault("tracin_we" if layer == "embedding" else layer, []).append(ratio)
    return {
        "areas": {name: detection_area(values, trained.flipped) for name, values in suspicions.items()},
        "recalls": {
            name: [recall_at(values, trained.flipped, fraction) for fraction in FRACTIONS]
            for name, values in suspicions.items()
        },
        "cancellation": list(cancellation.items()),
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
        squares, clean_squares = (sum_examples(part.rows.square().sum(dim=1), part) for part in (rows, clean_rows))
        net = zeros.index_add(0, clean_rows.tokens, clean_rows.rows)
        found[f"self: {name}"] = squares.double()
        found[f"clean: {name}"] = -sum_examples((rows.rows * net[rows.tokens]).sum(dim=1), rows).double()
        if name == "tracin_we":
            lengths = clean_squares.sqrt().clamp(min=1e-30).repeat_interleave(clean_rows.offsets.diff())
            net = zeros.index_add(0, clean_rows.tokens, clean_rows.rows / lengths[:, None])
            products = sum_examples((rows.rows * net[rows.tokens]).sum(dim=1), rows)
            found["clean, cosine: tracin_we"] = (-products / squares.sqrt().clamp(min=1e-30)).double()
            total = zeros.double().index_add(0, rows.tokens, rows.rows.double())
            cancellation.setdefault("tracin_we", []).append(float(squares.double().sqrt().sum() / total.norm()))
    return found


def detection_area(suspicion: np.ndarray, flipped: np.ndarray) -> float:
    """Area under share found over share inspected, most suspected first: a line away from the area under the ROC curve."""
    share = float(flipped.mean())
    return share / 2 + (1 - share) * area_under_roc(suspicion, flipped)


def run(args: Arguments) -> Results:
    """Everything, seed by seed, so that what a stopped run has is of all tables."""
    sizes = SIZES[args.scale]
    seeds = args.seeds or sizes.seeds
    tables = [
        (task, architecture, share)
        for share in sizes.shares
        for task in sizes.tasks
        for architecture in sizes.architectures
    ]
    settings = {name: value for name, value in asdict(sizes).items() if name.startswith(("num_", "max_", "width"))}
    parts: dict[tuple[str, str, float], list[dict]] = {table: [] for table in tables}
    for seed in seeds:
        for task, architecture, share in tables:
            part, peers = (
                args.store.get(
                    f"{prefix}{task}-{architecture}-{round(100 * share)}-seed{seed}",
                    {**settings, "task": task, "architecture": architecture, "share": share, "seed": seed},
                    partial(compute, args.data_dir / "classification", task, architecture, share, seed, sizes),
                )
                for prefix, compute in (("", detection_part), ("peers-", peers_part))
            )
            joined = {what: {**part[what], **peers[what]} for what in ("areas", "recalls")}
            parts[task, architecture, share].append({**part, **joined, "by_entry": peers["cancellation"]})
    rows = [
        {
            "task": task,
            "architecture": architecture,
            "share": share,
            "seed": seed,
            "method": method,
            "area": area,
            **{
                f"recall_at_{round(100 * f)}": value
                for f, value in zip(FRACTIONS, part["recalls"][method], strict=True)
            },
        }
        for (task, architecture, share), found in parts.items()
        for seed, part in zip(seeds, found, strict=True)
        for method, area in part["areas"].items()
    ]
    return Results(
        tables={
            "areas": _area_table(parts, rows),
            "differences": _difference_table(parts),
            "layers": _layer_table(parts),
            "checkpoints": _checkpoint_table(parts),
        },
        figures={
            "mean_area": {method: _rounded(_mean_over_tables(parts, method)) for method in METHODS},
            "spearman_cancellation_area": {
                f"{kind}, {form}": _rounded(_layer_correlation(parts, kind, form))
                for kind in ("self", "clean", "clean, cosine")
                for form in FORMS
            },
        },
        plot=partial(_plot, parts),
    )


def _area(part: dict, architecture: str, method: str) -> float:
    """The area of a method of the tables."""
    return part["areas"][_resolve(architecture, method)]


def _resolve(architecture: str, method: str) -> str:
    """The name among a part's areas of a method of the tables."""
    return method.replace(": middle", f": {MIDDLE_LAYERS[architecture]}").replace(": last", ": classifier")


def _by_seed(parts: Mapping[tuple[str, str, float], list[dict]], method: str) -> np.ndarray:
    """Area of each table and seed, `(num_tables, num_seeds)`."""
    return np.array(
        [[_area(part, architecture, method) for part in found] for (_, architecture, _), found in parts.items()]
    )


def _mean_over_tables(parts: Mapping[tuple[str, str, float], list[dict]], method: str) -> Interval:
    return t_interval(_by_seed(parts, method).mean(axis=0))


def _area_table(parts: Mapping[tuple[str, str, float], list[dict]], rows: list[dict]) -> Table:
    cells = [
        [
            method,
            *(t_interval(values).format(3) for values in _by_seed(parts, method)),
            _mean_over_tables(parts, method).format(3),
        ]
        for method in METHODS
    ]
    return Table(
        "Area under the detection curve (higher is better; chance 0.5), mean and 95 % interval over seeds (Student's t). "
        "`mean` is over all tables, its interval over seeds too.",
        ["method", *_table_names(parts), "mean"],
        cells,
        rows,
    )


def _table_names(parts: Mapping[tuple[str, str, float], list[dict]]) -> list[str]:
    return [f"{task}, {architecture}, {100 * share:.0f} %" for task, architecture, share in parts]


def _difference_table(parts: Mapping[tuple[str, str, float], list[dict]]) -> Table:
    cells, rows = [], []
    for method in METHODS:
        line = [method]
        for reference in REFERENCES:
            differences = _by_seed(parts, method) - _by_seed(parts, reference)
            overall = t_interval(differences.mean(axis=0))
            intervals = [t_interval(values) for values in differences]
            better = sum(interval.excludes_zero and interval.mean > 0 for interval in intervals)
            worse = sum(interval.excludes_zero and interval.mean < 0 for interval in intervals)
            line += [overall.format(3, signed=True) + (" *" if overall.excludes_zero else ""), f"{better} : {worse}"]
            rows += [
                {
                    "method": method,
                    "reference": reference,
                    "table": name,
                    "mean": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                }
                for name, interval in zip(["mean", *_table_names(parts)], [overall, *intervals], strict=True)
            ]
        cells.append(line)
    header = ["method"]
    for reference in REFERENCES:
        header += [f"less `{reference}`", "better : worse"]
    return Table(
        "Area less that of TracIn-WE on the same models, mean over tables with its 95 % interval over seeds (Student's t; * where "
        "0 is outside), and in how many tables the method is better or worse with an interval that leaves 0 out. Nothing is "
        "corrected for the number of comparisons.",
        header,
        cells,
        rows,
    )


def _layers_of(part: dict, form: str) -> list[tuple[str, float]]:
    """The layers from input to output with their cancellation ratio, its logarithm averaged over the checkpoints."""
    layers = {layer: float(np.exp(np.log(ratios).mean())) for layer, ratios in part[FORMS[form]]}
    return [("tracin_we", layers.pop("tracin_we")), *layers.items()]


def _layer_correlation(parts: Mapping[tuple[str, str, float], list[dict]], kind: str, form: str) -> Interval:
    """Spearman over the layers of each model between cancellation and area; mean over tables, interval over seeds."""
    found = []
    for models in parts.values():
        line = []
        for part in models:
            layers = _layers_of(part, form)
            areas = [part["areas"][f"{kind}: {layer}"] for layer, _ in layers]
            line.append(float(spearman(np.array([ratio for _, ratio in layers]), np.array(areas))))
        found.append(line)
    return t_interval(np.array(found).mean(axis=0))


def _layer_table(parts: Mapping[tuple[str, str, float], list[dict]]) -> Table:
    kinds = ("self", "clean", "clean, cosine")
    rows = [
        {
            "task": task,
            "architecture": architecture,
            "share": share,
            "model": position,
            "layer": layer,
            "cancellation": ratio,
            "cancellation_by_entry": dict(_layers_of(part, "entries"))[layer],
            **{kind.replace(", ", "_"): part["areas"][f"{kind}: {layer}"] for kind in kinds},
        }
        for (task, architecture, share), models in parts.items()
        for position, part in enumerate(models)
        for layer, ratio in _layers_of(part, "norms")
    ]
    cells = []
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        for layer in dict.fromkeys(row["layer"] for row in rows if row["architecture"] == architecture):
            chosen = [row for row in rows if (row["architecture"], row["layer"]) == (architecture, layer)]
            cells.append([architecture, layer])
            for name, digits in (
                ("cancellation", 1),
                ("cancellation_by_entry", 1),
                *((kind.replace(", ", "_"), 3) for kind in kinds),
            ):
                by_model: dict[int, list[float]] = {}
                for row in chosen:
                    by_model.setdefault(row["model"], []).append(row[name])
                cells[-1].append(t_interval([float(np.mean(values)) for values in by_model.values()]).format(digits))
    return Table(
        "Every layer from input to output: cancellation as a ratio of norms and entry by entry (geometric mean over checkpoints), and area "
        "under the detection curve, mean over sets and shares with the 95 % interval over seeds (Student's t).",
        ["architecture", "layer", "cancellation", "entry by entry", *kinds],
        cells,
        rows,
    )


def _checkpoint_table(parts: Mapping[tuple[str, str, float], list[dict]]) -> Table:
    chosen = [method for method in METHODS if _is_of_checkpoints(method)]
    rows = [
        {
            "task": task,
            "architecture": architecture,
            "share": share,
            "model": position,
            "method": method,
            "checkpoint": number,
            "area": area,
        }
        for (task, architecture, share), models in parts.items()
        for position, part in enumerate(models)
        for method in chosen
        for number, area in enumerate(part["areas_at_checkpoints"][_resolve(architecture, method)], start=1)
    ]
    num_checkpoints = max(row["checkpoint"] for row in rows)
    cells = []
    for method in chosen:
        line = [method]
        for number in range(1, num_checkpoints + 1):
            by_model: dict[int, list[float]] = {}
            for row in rows:
                if (row["method"], row["checkpoint"]) == (method, number):
                    by_model.setdefault(row["model"], []).append(row["area"])
            line.append(t_interval([float(np.mean(values)) for values in by_model.values()]).format(3))
        cells.append([*line, _mean_over_tables(parts, method).format(3)])
    return Table(
        "Area under the detection curve from one checkpoint alone, and from all of them weighted by the learning rate (`loss`: "
        "the last); mean over all tables with the 95 % interval over seeds (Student's t).",
        ["method", *(f"checkpoint {number}" for number in range(1, num_checkpoints + 1)), "all"],
        cells,
        rows,
    )


def _is_of_checkpoints(method: str) -> bool:
    return method == "loss" or method.split(": ")[-1] in ("tracin_we", "tracin_we_topk", "middle", "last")


def _rounded(interval: Interval) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in (interval.mean, interval.low, interval.high)]


def _plot(parts: Mapping[tuple[str, str, float], list[dict]], path: Path) -> None:
    """One line per method: mean over tables with its interval, and each table's mean beside it."""
    figure = new_figure(7.5, 1.2 + 0.28 * len(METHODS))
    axes = figure.subplots()
    tasks = list(dict.fromkeys(task for task, _, _ in parts))
    for place, method in enumerate(reversed(METHODS)):
        interval = _mean_over_tables(parts, method)
        if interval.low is not None:
            axes.plot([interval.low, interval.high], [place, place], color="black", linewidth=2.2)
        axes.plot(interval.mean, place, "|", color="black", markersize=12, markeredgewidth=2)
        for (task, architecture, share), values in zip(parts, _by_seed(parts, method), strict=True):
            axes.plot(
                values.mean(),
                place,
                "os^"[tasks.index(task) % 3],
                markersize=4.5 if share > 0.15 else 3,
                color="#0072b2" if architecture == "cnn" else "#d55e00",
                markerfacecolor="none",
                label=f"{task}, {architecture}"
                if place == 0 and share == max(share for _, _, share in parts)
                else None,
            )
    axes.axvline(0.5, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(METHODS)), list(reversed(METHODS)))
    axes.set_xlabel("area under the detection curve (0.5: chance); small marks: fewer flipped")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path)
