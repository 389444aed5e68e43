"""
Case deletion: what becomes of a prediction when its strongest proponents or opponents are gone. Three sets, two architectures.

Decided before the first result was seen:

- Sets ag_news, toxicity_jigsaw, snli; the CNN of the paper's notebook and a transformer, both tiny and from scratch; 500
  training examples of at most 32 tokens, Adam, four checkpoints, the recipes of `hf_doge.tracing.influence_evaluation`.
- Test points in blocks of 5, from one permutation of the test examples; a round is one block of each of the six tables.
  Six rounds are planned at small scale. Should the clock stop it, whole rounds count and no others, whatever they show.
- k = 10 and 40 of 500. Scores are of seed 1's run; each block retrains under one seed of its own, never 1: a retraining costs
  the same whether it serves another seed or another point, and other points say more. With several blocks an interval over
  points holds the seeds' noise too; with one it does not. (First planned: two seeds for every point. Changed for time alone,
  when 53 of 382 retrainings of the first block were done and no probability had been looked at.)
- f is the probability of the class that seed 1's model predicts. AUC-DEL+ (without proponents, lower is better) and AUC-DEL-
  (without opponents, higher is better) are means over k; intervals are 95 % bootstrap over points; `less tracin_we` are
  differences on the same points.
- The paper's claim holds in a table if AUC-DEL+ of `tracin_we` is below that of each last-layer method with an interval of the
  paired difference that leaves 0 out, and the like for AUC-DEL-. Its explanation holds if the cancellation ratio of the
  embedding is the lowest of all layers. The rebuttal's claim holds if `tracin_middle` is better than `tracin_we` in that sense.
  The middle is fixed as the second of three convolutions, and the attention of the second of two layers.
- A cause looked for: `tracin_we_cosine` shows what the length of gradients does. `distinct` is how many different examples
  stand among the ten strongest proponents of five points, of 50 places: few if some examples are proponents of everything.

Added after the first round was seen, where cosine was the best of all without proponents: stages `cosine0`, ..., the cosine on
the middle and on the last layer for the same points, which tell what cosine does from what the embedding does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.intervals import t_interval
from benchmarks.reproduce.layer_gradients import layer_gradients, weight_layers
from benchmarks.reproduce.report import Results, Table, new_figure
from benchmarks.reproduce.tracin_scorers import make_experiment_scorer
from hf_doge.evaluation.influence.bootstrap import bootstrap_interval
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
COSINES = ("tracin_middle_cosine", "tracin_last_cosine")  # of the stages that were added later


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
        scorers=("tracin_we", "tracin_we_syn", "tracin_we_cosine", "tracin_middle", "tracin_last", "random"),
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
        journal_path=output_dir / "retrainings" / f"{name}.retrainings.jsonl",
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
    }


def layers_part(data_dir: Path, task_name: str, architecture: str, sizes: Sizes) -> dict:
    """Cancellation ratio of every layer at every checkpoint over the training examples, and test accuracy."""
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
    return {
        "cancellation": list(ratios.items()),  # pairs, for the store sorts by name and these are from input to output
        "accuracy": float(
            (predict_probabilities(explained.model, test).argmax(dim=1) == test["labels"]).float().mean()
        ),
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


def run(args: Arguments) -> Results:
    """All rounds, or those among `--stages` (`round0`, `round1`, ...; `cosine0`, ... for the later scorers on the same points)."""
    sizes = SIZES[args.scale]
    seeds = args.seeds or tuple(range(2, 2 + sizes.num_blocks))
    rounds = tuple(f"round{block}" for block in range(sizes.num_blocks))
    cosines = tuple(f"cosine{block}" for block in range(sizes.num_blocks))
    stages = args.choose_stages((*rounds, *cosines))
    blocks = [block for block, name in enumerate(rounds) if name in stages]
    data_dir = args.data_dir / "classification"
    pairs = [(task, architecture) for task in sizes.tasks for architecture in sizes.architectures]

    def finish(name: str, chosen: Sequence[int], sizes: Sizes, output_dir: Path) -> dict[tuple[str, str], list[dict]]:
        found: dict[tuple[str, str], list[dict]] = {pair: [] for pair in pairs}
        for block in chosen:
            seed = seeds[block % len(seeds)]
            for task, architecture in pairs:
                part = args.store.get(
                    f"{name}{block}-{task}-{architecture}",
                    {**_settings(sizes), "task": task, "architecture": architecture, "block": block, "seed": seed},
                    partial(deletion_part, data_dir, output_dir, task, architecture, block, sizes, seed),
                )
                found[task, architecture].append({**part, "block": block, "seed": seed})
        return found

    parts = finish("block", blocks, sizes, args.output_dir)
    of_cosines = replace(sizes, scorers=COSINES)
    # Both need the points of the same blocks: a difference is one on the same points.
    later = [block for block in blocks if cosines[block] in stages]
    cosine_parts = finish("cosine", later, of_cosines, args.output_dir / "cosine")
    layers = {
        (task, architecture): args.store.get(
            f"layers-{task}-{architecture}",
            {**_settings(sizes), "task": task, "architecture": architecture},
            partial(layers_part, data_dir, task, architecture, sizes),
        )
        for task, architecture in pairs
    }
    pooled = _pool_all(parts, sizes)
    rows = [row for pair in pairs for part in parts[pair] for row in _records(*pair, part, sizes)]
    tables = {
        "auc_del": _auc_table(pooled, sizes, rows),
        "less_tracin_we": _difference_table(pooled, sizes),
        "proponents": _proponents_table(parts, sizes),
        "layers": _layers_table(layers),
    }
    if later:
        same_blocks = {pair: [part for part in found if part["block"] in later] for pair, found in parts.items()}
        tables["cosine"] = _cosine_table(_pool_all(same_blocks, sizes), _pool_all(cosine_parts, of_cosines))
    return Results(
        tables=tables,
        figures=_figures(pooled, sizes),
        plot=partial(_plot, pooled, sizes),
        notes=[f"{len(blocks)} round(s) of {sizes.points_per_block} test points in each of {len(pairs)} tables."],
    )


def _settings(sizes: Sizes) -> dict:
    """What a part's result depends on besides its table, block and seed."""
    return {key: value for key, value in asdict(sizes).items() if key not in ("num_blocks", "tasks", "architectures")}


def _pool_all(parts: dict[tuple[str, str], list[dict]], sizes: Sizes) -> dict[str, CaseDeletionResult]:
    """Each table by name, and `all` of them."""
    pooled = {", ".join(pair): pool(found, sizes) for pair, found in parts.items()}
    return {**pooled, "all": pool([part for found in parts.values() for part in found], sizes)}


def _records(task: str, architecture: str, part: dict, sizes: Sizes) -> list[dict]:
    """One row per retraining and its test point: the change of the probability."""
    return [
        {
            "task": task,
            "architecture": architecture,
            "block": part["block"],
            "seed": part["seed"],
            "point": point,
            "scorer": scorer,
            "sign": sign,
            "k": k,
            "full": part["full"][point][0],
            "change": of_point[position][0] - part["full"][point][0],
        }
        for scorer, sign, values in part["removed"]
        for point, of_point in enumerate(values)
        for position, k in enumerate(sizes.ks)
    ]


def percent(values: np.ndarray) -> str:
    """Mean in percentage points with the 95 % bootstrap interval over points."""
    low, high = bootstrap_interval(values)
    return f"{100 * values.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _auc_table(pooled: dict[str, CaseDeletionResult], sizes: Sizes, rows: list[dict]) -> Table:
    cells = [
        [f"DEL{sign}", scorer, *(percent(result.auc(scorer, sign)) for result in pooled.values())]
        for sign in "+-"
        for scorer in sizes.scorers
    ]
    cells.append(["", "retraining noise", *(percent(result.noise()) for result in pooled.values())])
    return Table(
        "AUC-DEL in percentage points, mean over test points and k, with 95 % bootstrap intervals over points. Without "
        "proponents (DEL+) lower is better, without opponents (DEL-) higher. `all` pools the points of all tables; retraining "
        "noise is another seed with nothing removed.",
        ["", "scorer", *pooled],
        cells,
        rows,
    )


def _difference_table(pooled: dict[str, CaseDeletionResult], sizes: Sizes) -> Table:
    reference = "tracin_we"
    cells, rows = [], []
    for sign in "+-":
        for scorer in sizes.scorers:
            if scorer == reference:
                continue
            line = [f"DEL{sign}", scorer]
            differences = {
                name: result.auc(scorer, sign) - result.auc(reference, sign) for name, result in pooled.items()
            }
            for name, values in differences.items():
                low, high = bootstrap_interval(values)
                line.append(percent(values) + (" *" if low > 0 or high < 0 else ""))
                rows.append(
                    {
                        "table": name,
                        "sign": sign,
                        "scorer": scorer,
                        "mean": float(values.mean()),
                        "low": low,
                        "high": high,
                        "num_points": len(values),
                    }
                )
            means = [100 * float(values.mean()) for name, values in differences.items() if name != "all"]
            interval = t_interval(means)
            cells.append([*line, interval.format(1, signed=True) + (" *" if interval.excludes_zero else "")])
    return Table(
        f"AUC-DEL less that of `{reference}` on the same points, percentage points with 95 % bootstrap intervals over points; "
        "* where 0 is outside. In DEL+ above 0, in DEL- below 0: `tracin_we` is better. Nothing is corrected for the number "
        "of comparisons. Points of a table share their model; the last column takes the tables as the units (Student's t).",
        ["", "scorer", *pooled, "over tables"],
        cells,
        rows,
    )


def _cosine_table(pooled: dict[str, CaseDeletionResult], later: dict[str, CaseDeletionResult]) -> Table:
    """Plain and cosine on three layers, and the difference between the cosines."""
    names = {
        "tracin_we": "tracin_we_cosine",
        "tracin_middle": "tracin_middle_cosine",
        "tracin_last": "tracin_last_cosine",
    }
    cells, rows = [], []
    for sign in "+-":
        for plain, cosine in names.items():
            lines: list[list[str]] = [
                [f"DEL{sign}", name] for name in (cosine, f"  less {plain}", "  less tracin_we_cosine")
            ]
            for table, result in pooled.items():
                values = result.auc(cosine, sign) if plain == "tracin_we" else later[table].auc(cosine, sign)
                changes = (values, values - result.auc(plain, sign), values - result.auc("tracin_we_cosine", sign))
                for line, change in zip(lines, changes, strict=True):
                    low, high = bootstrap_interval(change)
                    line.append(percent(change) + (" *" if low > 0 or high < 0 else ""))
                    rows.append(
                        {
                            "table": table,
                            "sign": sign,
                            "scorer": cosine,
                            "what": line[1].strip(),
                            "mean": float(change.mean()),
                            "low": low,
                            "high": high,
                            "num_points": len(change),
                        }
                    )
            cells += lines if plain != "tracin_we" else lines[:2]
    return Table(
        "Cosine on three layers: AUC-DEL in percentage points with 95 % bootstrap intervals over points, less that of the plain inner "
        "product on the same layer, and less that of cosine on the words, on the same points; * where 0 is outside. Added after the "
        "first round was seen.",
        ["", "scorer", *pooled],
        cells,
        rows,
    )


def _proponents_table(parts: dict[tuple[str, str], list[dict]], sizes: Sizes) -> Table:
    rows = [
        {
            "task": task,
            "architecture": architecture,
            "scorer": scorer,
            "same_label": float(np.mean([part["same_label"][scorer] for part in found])),
            "distinct": float(np.mean([part["distinct"][scorer] for part in found])),
        }
        for (task, architecture), found in parts.items()
        for scorer in sizes.scorers
    ]
    cells = [
        [scorer]
        + [f"{100 * row['same_label']:.0f} %, {row['distinct']:.0f}" for row in rows if row["scorer"] == scorer]
        for scorer in sizes.scorers
    ]
    return Table(
        "Ten strongest proponents: share with the explained class, and how many different examples hold the "
        f"{10 * sizes.points_per_block} places of the {sizes.points_per_block} points of a block (mean over blocks).",
        ["scorer", *(", ".join(pair) for pair in parts)],
        cells,
        rows,
    )


def _layers_table(layers: dict[tuple[str, str], dict]) -> Table:
    rows = [
        {"task": task, "architecture": architecture, "layer": layer, "checkpoint": position, "cancellation": ratio}
        for (task, architecture), part in layers.items()
        for layer, ratios in part["cancellation"]
        for position, ratio in enumerate(ratios, start=1)
    ]
    cells = [
        [f"{task}, {architecture}", f"{part['accuracy']:.3f} ({part['majority']:.3f})", layer]
        + [f"{ratio:.1f}" for ratio in ratios]
        for (task, architecture), part in layers.items()
        for layer, ratios in part["cancellation"]
    ]
    num_checkpoints = max(row["checkpoint"] for row in rows)
    return Table(
        "Cancellation ratio of each layer's weight over the training examples at each checkpoint of the explained run, and that "
        "run's test accuracy (largest class in brackets).",
        ["table", "accuracy", "layer", *(f"checkpoint {position}" for position in range(1, num_checkpoints + 1))],
        cells,
        rows,
    )


def _figures(pooled: dict[str, CaseDeletionResult], sizes: Sizes) -> dict:
    """AUC-DEL of all points together, by sign and scorer: mean and interval in percentage points."""
    figures: dict = {"num_points": {name: len(result.full) for name, result in pooled.items()}}
    for sign in "+-":
        figures[f"auc_del{sign}"] = {
            scorer: [
                round(100 * value, 2)
                for values in [pooled["all"].auc(scorer, sign)]
                for value in (values.mean(), *bootstrap_interval(values))
            ]
            for scorer in sizes.scorers
        }
    return figures


def _plot(pooled: dict[str, CaseDeletionResult], sizes: Sizes, path: Path) -> None:
    """One line per scorer: all points together with the interval, and the mean of each table beside it."""
    figure = new_figure(10.0, 1.2 + 0.34 * len(sizes.scorers))
    panels = figure.subplots(1, 2, sharey=True)
    markers = ["o", "s", "^", "D", "v", "P"]
    tables = [name for name in pooled if name != "all"]
    for axes, sign in zip(panels, "+-", strict=True):
        for place, scorer in enumerate(reversed(sizes.scorers)):
            values = pooled["all"].auc(scorer, sign)
            low, high = bootstrap_interval(values)
            axes.plot([100 * low, 100 * high], [place, place], color="black", linewidth=2.2)
            axes.plot(100 * values.mean(), place, "|", color="black", markersize=13, markeredgewidth=2)
            for table, marker in zip(tables, markers, strict=False):
                axes.plot(
                    100 * pooled[table].auc(scorer, sign).mean(),
                    place,
                    marker,
                    markersize=4.5,
                    color="#0072b2" if "cnn" in table else "#d55e00",
                    markerfacecolor="none",
                    label=table if place == 0 else None,
                )
        axes.axvline(0, color="grey", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(sizes.scorers)), list(reversed(sizes.scorers)))
        axes.set_xlabel("change of probability, percentage points")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title("without proponents (further left is better)", loc="left", fontsize="medium")
    panels[1].set_title("without opponents (further right is better)", loc="left", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(tables), frameon=False, fontsize="small")
    figure.savefig(path)
