"""
Case deletion: what becomes of a prediction when its strongest proponents or opponents are gone. Three sets, two architectures.

Decided before the first result was seen:

- Sets ag_news, toxicity_jigsaw, snli; the CNN of the paper's notebook and a transformer, both tiny and from scratch; 500
  training examples of at most 32 tokens, Adam, four checkpoints, the recipes of `hf_doge.evaluation.influence.experiment`.
- Test points in blocks of 5, from one permutation of the test examples; a round is one block of each of the six tables.
  Six rounds are planned at small scale. Should the clock stop it, whole rounds count and no others, whatever they show.
- k = 10 and 40 of 500. Scores are of seed 1's run; each block retrains under one seed of its own, never 1: a retraining costs
  the same whether it serves another seed or another point, and other points say more. With several blocks an interval over
  points holds the seeds' noise too; with one it does not. (First planned: two seeds for every point. Changed for time alone,
  when 53 of 382 retrainings of the first block were done and no probability had been looked at.)
- f is the probability of the class that the explained model predicts. AUC-DEL+ (without proponents, lower is better) and AUC-DEL-
  (without opponents, higher is better) are means over k; `less tracin_we` are differences on the same points.
- The paper's claim holds in a table if AUC-DEL+ of `tracin_we` is below that of each last-layer method with an interval of the
  paired difference that leaves 0 out, and the like for AUC-DEL-. Its explanation holds if the cancellation ratio of the
  embedding is the lowest of all layers. The rebuttal's claim holds if `tracin_middle` is better than `tracin_we` in that sense.
  The middle is fixed as the second of three convolutions, and the attention of the second of two layers.
- A cause looked for: `tracin_we_cosine` shows what the length of gradients does. `distinct` is how many different examples
  stand among the ten strongest proponents of five points, of 50 places: few if some examples are proponents of everything.

Added after the first round was seen, where cosine was the best of all without proponents: stages `cosine0`, `cosine1`, `cosine2`, the cosine
on the middle and on the last layer for the same points, which tell what cosine does from what the embedding does.

Changed after the first three rounds had been run and the first been read, upon a review:

- The fourth to sixth round were dropped for the stages below. All intervals are Student's t: over points in a table, over the six models (one for
  each table) in `all`. A bootstrap of five points, as there was before, is too narrow.
- Stages `peers0`, ...: scorers that meet TracIn-WE on equal terms, on the same points. `bm25_signed` knows the labels, as every gradient does:
  examples of another class count negative. `same_class` is at random among the examples of the explained class (opponents: of the others).
  `influence_last_all` sums over the four checkpoints, as TracIn does, and is damped by the mean of the Hessian's diagonal, where
  `influence_last` sees the last checkpoint, at which the learning rate is nearly 0, and is damped by a hundredth. `tracin_we_cosine_no_special` leaves
  out the tokens that stand in every example.
- Stages `adam0`, ...: why is `bm25_signed` so much better? Two causes that show on two tables of round 0, where they were looked for
  (ag_news with the transformer, toxicity with the CNN): the models are trained by Adam, which moves rare words as far as frequent ones, while a
  plain inner product goes by the length of the gradient; and four checkpoints that begin at the second epoch miss what is learned first.
  `tracin_we_all` takes all epochs and the initial weights; `tracin_we_adam` measures in Adam's metric, `<g, g' / (sqrt(v) + eps)>`, at the four
  checkpoints; `tracin_we_adam_all` is both; `tracin_we_adam_cosine_all` takes one v for each word and the cosine in that metric, and
  `tracin_last_adam_cosine_all` is the like on the last layer (one v for each entry). Rounds 1 and later test what round 0 suggested.
- Cancellation is given in a second form, `sum_i |g_i| / |sum_i g_i|` summed over the entries of both: with norms, sparse gradients that share no
  entry give sqrt(N) without anything being cancelled.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.layer_gradients import cancellation_by_entry, layer_gradients, weight_layers
from benchmarks.reproduce.report import Results, Table, new_figure
from benchmarks.reproduce.tracin_scorers import AdamCheckpoint, make_adam_scorer, make_experiment_scorer
from hf_doge.evaluation.influence.cancellation import cancellation_ratios
from hf_doge.evaluation.influence.case_deletion import case_deletion
from hf_doge.evaluation.influence.deletion_result import CaseDeletionResult
from hf_doge.evaluation.influence.experiment import RECIPES
from hf_doge.evaluation.influence.small_models import (
    Checkpoint,
    TrainingRecipe,
    make_classifier,
    predict_probabilities,
    to_batches,
    train_classifier,
)
from hf_doge.evaluation.influence.small_tasks import SPECIAL_TOKENS, SmallTask, load_small_task
from hf_doge.evaluation.intervals import Interval, t_interval
from hf_doge.functional.tracin_we import cancellation_ratio
from hf_doge.tracing.second_moments import second_moments_of

TASKS = ("ag_news", "toxicity_jigsaw", "snli")
ARCHITECTURES = ("cnn", "transformer")
MIDDLE_LAYERS = {"cnn": "convolutions.1", "transformer": "layers.1.attention"}
EXPLAINED_SEED = 1
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
# Of the stages that were added later.
COSINES = ("tracin_middle_cosine", "tracin_last_cosine")
PEERS = ("bm25_signed", "same_class", "influence_last_all", "tracin_we_cosine_no_special")
ADAM = (
    "tracin_we_all",
    "tracin_we_adam",
    "tracin_we_adam_all",
    "tracin_we_adam_cosine_all",
    "tracin_last_adam_cosine_all",
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
    num_blocks: int = 3


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
def train_explained(data_dir: Path, task_name: str, architecture: str, sizes: Sizes) -> Explained:
    """The run that is explained: that of the first seed."""
    task = load_small_task(
        data_dir, task_name, num_train=sizes.num_train, num_test=sizes.num_test, max_length=sizes.max_length
    )
    make_model = model_maker(task, architecture, sizes.width)
    recipe = RECIPES[architecture]
    model, checkpoints = train_classifier(make_model, task.train, recipe, seed=EXPLAINED_SEED, keep_checkpoints=True)
    return Explained(task, architecture, make_model, recipe, model, checkpoints)


@cache
def train_with_adam(data_dir: Path, task_name: str, architecture: str, sizes: Sizes) -> Sequence[AdamCheckpoint]:
    """The explained run once more, with its initial weights, every epoch, and what Adam knows at each."""
    explained = train_explained(data_dir, task_name, architecture, sizes)
    moments: list[dict[str, Tensor]] = []

    def read(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        (group,) = optimizer.param_groups
        found = {
            name: second_moments_of(state, group, kind="adam")
            for name, parameter in model.named_parameters()
            if (state := optimizer.state.get(parameter))
        }
        moments.append({name: each.average / each.correction for name, each in found.items()})

    recipe = replace(explained.recipe, checkpoint_epochs=tuple(range(explained.recipe.num_epochs + 1)))
    _, checkpoints = train_classifier(
        explained.make_model,
        explained.task.train,
        recipe,
        seed=EXPLAINED_SEED,
        keep_checkpoints=True,
        on_checkpoint=read,
    )
    moments[0] = moments[1]
    return [AdamCheckpoint(*checkpoint, found) for checkpoint, found in zip(checkpoints, moments, strict=True)]


def model_maker(task: SmallTask, architecture: str, width: int) -> partial:
    """Gives the initial classifier of a seed, as [`train_classifier`] asks for it."""
    longest = max(part["input_ids"].shape[1] for part in (task.train, task.test))
    return partial(_make_model, architecture, len(task.vocabulary), task.num_classes, width, longest)


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
    scores = {}
    for name in sizes.scorers:
        if name in ADAM:
            every = train_with_adam(data_dir, task_name, architecture, sizes)
            recorded = [every[epoch] for epoch in explained.recipe.checkpoint_epochs]
            scorer = make_adam_scorer(name, every, recorded)
        else:
            scorer = make_experiment_scorer(
                name,
                models,
                learning_rates,
                middle_layer=MIDDLE_LAYERS[architecture],
                special_token_ids=range(len(SPECIAL_TOKENS)),
                seed=block,
            )
        scores[name] = scorer.scores(to_batches(task.train), to_batches(queries))

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


def entries_part(data_dir: Path, task_name: str, architecture: str, sizes: Sizes) -> list:
    """Cancellation of every layer's weight at every checkpoint, entry by entry."""
    explained = train_explained(data_dir, task_name, architecture, sizes)
    batches = to_batches(explained.task.train)
    ratios: dict[str, list[float]] = {}
    for model, _ in explained.checkpoints:
        for layer, ratio in cancellation_by_entry(model, batches).items():
            ratios.setdefault(layer, []).append(ratio)
    return list(ratios.items())


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
    """All rounds, or those among `--stages` (`round0`, ...; `cosine0`, `peers0`, ... for the later scorers on the same points)."""
    sizes = SIZES[args.scale]
    seeds = args.seeds or tuple(range(2, 2 + sizes.num_blocks))
    rounds, cosines, peers, adams = (
        tuple(f"{name}{block}" for block in range(count))
        for name, count in (
            ("round", sizes.num_blocks),
            ("cosine", sizes.num_blocks),
            ("peers", sizes.num_blocks),
            ("adam", sizes.num_blocks),
        )
    )
    stages = args.choose_stages((*rounds, *cosines, *peers, *adams))
    blocks = [block for block, name in enumerate(rounds) if name in stages]
    data_dir = args.data_dir / "classification"
    pairs = [(task, architecture) for task in sizes.tasks for architecture in sizes.architectures]

    def finish(name: str, chosen: Sequence[int], sizes: Sizes, output_dir: Path) -> dict[tuple[str, str], list[dict]]:
        found: dict[tuple[str, str], list[dict]] = {pair: [] for pair in pairs}
        for block in chosen:
            seed = seeds[block % len(seeds)]
            for task, architecture in pairs:
                arguments = {
                    **_settings(sizes),
                    "task": task,
                    "architecture": architecture,
                    "block": block,
                    "seed": seed,
                }
                part = args.store.get(
                    f"{name}{block}-{task}-{architecture}",
                    arguments,
                    partial(deletion_part, data_dir, output_dir, task, architecture, block, sizes, seed),
                )
                found[task, architecture].append({**part, "block": block, "seed": seed})
        return found

    def finish_layers(name: str, compute: Callable) -> dict[tuple[str, str], Any]:
        return {
            (task, architecture): args.store.get(
                f"{name}-{task}-{architecture}",
                {**_settings(sizes), "task": task, "architecture": architecture},
                partial(compute, data_dir, task, architecture, sizes),
            )
            for task, architecture in pairs
        }

    parts = finish("block", blocks, sizes, args.output_dir)
    of_cosines = replace(sizes, scorers=COSINES)
    # All of them need the points of the same blocks: a difference is one on the same points.
    cosine_blocks = [block for block, name in enumerate(cosines) if name in stages and block in blocks]
    cosine_parts = finish("cosine", cosine_blocks, of_cosines, args.output_dir / "cosine")
    pooled = _pool_all(parts, sizes)
    shown = pooled
    for name, names, scorers in (("peers", peers, PEERS), ("adam", adams, ADAM)):
        later = [block for block, stage in enumerate(names) if stage in stages and block in blocks]
        of_later = replace(sizes, scorers=scorers)
        more = finish(name, later, of_later, args.output_dir / name)
        if later == blocks:
            shown = _join(shown, _pool_all(more, of_later))
            parts = {pair: _join_parts(found, more[pair]) for pair, found in parts.items()}
    sizes = replace(sizes, scorers=tuple(dict.fromkeys(scorer for scorer, _ in shown["all"].result.removed)))
    rows = [row for pair in pairs for part in parts[pair] for row in _records(*pair, part, sizes)]
    tables = {
        "auc_del": _auc_table(shown, sizes, rows),
        "less_tracin_we": _difference_table(shown, sizes),
        "proponents": _proponents_table(parts, sizes),
        "layers": _layers_table(finish_layers("layers", layers_part), finish_layers("entries", entries_part)),
    }
    if cosine_blocks:
        same_blocks = {
            pair: [part for part in found if part["block"] in cosine_blocks] for pair, found in parts.items()
        }
        tables["cosine"] = _cosine_table(_pool_all(same_blocks, sizes), _pool_all(cosine_parts, of_cosines))
    return Results(
        tables=tables,
        figures=_figures(shown, sizes),
        plot=partial(_plot, shown, sizes),
        notes=[f"{len(blocks)} round(s) of {sizes.points_per_block} test points in each of {len(pairs)} tables."],
    )


def _settings(sizes: Sizes) -> dict:
    """What a part's result depends on besides its table, block and seed."""
    return {key: value for key, value in asdict(sizes).items() if key not in ("num_blocks", "tasks", "architectures")}


@dataclass(frozen=True)
class Pooled:
    """
    What several blocks found, and what its intervals take as independent.

    Attributes:
        result (`CaseDeletionResult`): Of all points.
        units (`numpy.ndarray` of shape `(points,)`): In a table each point is one; over all tables each table, and so each model.
    """

    result: CaseDeletionResult
    units: np.ndarray

    def auc(self, scorer: str, sign: str) -> np.ndarray:
        """AUC-DEL of each point."""
        return self.result.auc(scorer, sign)

    def interval(self, values: np.ndarray) -> Interval:
        """Mean over units of a value per point, in percentage points, with its 95 % interval by Student's t."""
        return t_interval([100 * float(values[self.units == unit].mean()) for unit in np.unique(self.units)])

    def format(self, values: np.ndarray, *, starred: bool = False) -> str:
        """As a cell; with a star where 0 is outside."""
        interval = self.interval(values)
        return interval.format(1, signed=True) + (" *" if starred and interval.excludes_zero else "")


def _pool_all(parts: dict[tuple[str, str], list[dict]], sizes: Sizes) -> dict[str, Pooled]:
    """Each table by name, and `all` of them."""
    pooled = {}
    for pair, found in parts.items():
        result = pool(found, sizes)
        pooled[", ".join(pair)] = Pooled(result, np.arange(len(result.full)))
    found = list(parts.values())
    units = [number for number, blocks in enumerate(found) for part in blocks for _ in part["full"]]
    return {**pooled, "all": Pooled(pool([part for blocks in found for part in blocks], sizes), np.array(units))}


def _join(pooled: dict[str, Pooled], more: dict[str, Pooled]) -> dict[str, Pooled]:
    """Further scorers on the same points."""
    joined = {}
    for name, found in pooled.items():
        assert np.array_equal(found.result.full, more[name].result.full), "other points, or another model"
        result = replace(found.result, removed={**found.result.removed, **more[name].result.removed})
        joined[name] = Pooled(result, found.units)
    return joined


def _join_parts(parts: list[dict], more: list[dict]) -> list[dict]:
    """The same of the blocks of one table."""
    return [
        {
            **part,
            "removed": [*part["removed"], *further["removed"]],
            **{what: {**part[what], **further[what]} for what in ("same_label", "distinct")},
        }
        for part, further in zip(parts, more, strict=True)
    ]


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


def _auc_table(pooled: dict[str, Pooled], sizes: Sizes, rows: list[dict]) -> Table:
    cells = [
        [f"DEL{sign}", scorer, *(found.format(found.auc(scorer, sign)) for found in pooled.values())]
        for sign in "+-"
        for scorer in sizes.scorers
    ]
    cells.append(["", "retraining noise", *(found.format(found.result.noise()) for found in pooled.values())])
    return Table(
        "AUC-DEL in percentage points, mean over test points and k. Without proponents (DEL+) lower is better, without opponents (DEL-) "
        "higher. Intervals are 95 %, Student's t, over points in a table and over models in `all`; retraining noise is another seed "
        "with nothing removed.",
        ["", "scorer", *pooled],
        cells,
        rows,
    )


def _difference_table(pooled: dict[str, Pooled], sizes: Sizes) -> Table:
    reference = "tracin_we"
    cells, rows = [], []
    for sign in "+-":
        for scorer in sizes.scorers:
            if scorer == reference:
                continue
            line = [f"DEL{sign}", scorer]
            for name, found in pooled.items():
                values = found.auc(scorer, sign) - found.auc(reference, sign)
                line.append(found.format(values, starred=True))
                rows.append({"table": name, "sign": sign, "scorer": scorer, **_to_row(found, values)})
            cells.append(line)
    return Table(
        f"AUC-DEL less that of `{reference}` on the same points, percentage points; 95 % intervals by Student's t, over points in a "
        "table and over models in `all`; * where 0 is outside. In DEL+ above 0, in DEL- below 0: `tracin_we` is better. Nothing is "
        "corrected for the number of comparisons.",
        ["", "scorer", *pooled],
        cells,
        rows,
    )


def _to_row(found: Pooled, values: np.ndarray) -> dict:
    interval = found.interval(values)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "num_points": len(values)}


def _cosine_table(pooled: dict[str, Pooled], later: dict[str, Pooled]) -> Table:
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
            for table, found in pooled.items():
                values = found.auc(cosine, sign) if plain == "tracin_we" else later[table].auc(cosine, sign)
                changes = (values, values - found.auc(plain, sign), values - found.auc("tracin_we_cosine", sign))
                for line, change in zip(lines, changes, strict=True):
                    line.append(found.format(change, starred=True))
                    what = line[1].strip()
                    rows.append(
                        {"table": table, "sign": sign, "scorer": cosine, "what": what, **_to_row(found, change)}
                    )
            cells += lines if plain != "tracin_we" else lines[:2]
    return Table(
        "Cosine on three layers, in the rounds that have all three: AUC-DEL in percentage points, less that of the plain inner product on the "
        "same layer, and less that of cosine on the words, on the same points. 95 % intervals by Student's t, over points in a table and "
        "over models in `all`; * where 0 is outside. Added after the first round was seen.",
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


def _layers_table(layers: dict[tuple[str, str], dict], entries: dict[tuple[str, str], list]) -> Table:
    rows = [
        {
            "task": task,
            "architecture": architecture,
            "form": form,
            "layer": layer,
            "checkpoint": position,
            "cancellation": ratio,
        }
        for task, architecture in layers
        for form, found in (
            ("norms", layers[task, architecture]["cancellation"]),
            ("entries", entries[task, architecture]),
        )
        for layer, ratios in found
        for position, ratio in enumerate(ratios, start=1)
    ]
    cells = []
    for (task, architecture), part in layers.items():
        by_entry = dict(entries[task, architecture])
        for layer, ratios in part["cancellation"]:
            cells.append(
                [
                    f"{task}, {architecture}",
                    f"{part['accuracy']:.3f} ({part['majority']:.3f})",
                    layer,
                    *(f"{ratio:.1f}" for ratio in ratios),
                    *(f"{ratio:.1f}" for ratio in by_entry.get(layer, ())),
                    *("" for _ in ratios if layer not in by_entry),
                ]
            )
    checkpoints = range(1, 1 + max(row["checkpoint"] for row in rows))
    return Table(
        "Cancellation of each layer's weight over the training examples at each checkpoint of the explained run (seed 1), as a ratio of norms, "
        "`sum_i ||g_i|| / ||sum_i g_i||`, and entry by entry, `sum_i |g_i| / |sum_i g_i|` with both sums over all entries; and that "
        "run's test accuracy (largest class in brackets).",
        [
            *("table", "accuracy", "layer"),
            *(f"norms, checkpoint {position}" for position in checkpoints),
            *(f"entries, checkpoint {position}" for position in checkpoints),
        ],
        cells,
        rows,
    )


def _figures(pooled: dict[str, Pooled], sizes: Sizes) -> dict:
    """AUC-DEL over all models, by sign and scorer: mean and interval in percentage points."""
    found = pooled["all"]
    figures: dict = {
        "num_points": {name: len(of_table.units) for name, of_table in pooled.items()},
        "num_models": len(np.unique(found.units)),
    }
    for sign in "+-":
        figures[f"auc_del{sign}"] = {
            scorer: [
                None if value is None else round(value, 2) for value in (interval.mean, interval.low, interval.high)
            ]
            for scorer in sizes.scorers
            for interval in [found.interval(found.auc(scorer, sign))]
        }
    return figures


def _plot(pooled: dict[str, Pooled], sizes: Sizes, path: Path) -> None:
    """One line per scorer: the mean over models with its interval, and the mean of each table beside it."""
    figure = new_figure(10.0, 1.2 + 0.34 * len(sizes.scorers))
    panels = figure.subplots(1, 2, sharey=True)
    markers = ["o", "s", "^", "D", "v", "P"]
    tables = [name for name in pooled if name != "all"]
    for axes, sign in zip(panels, "+-", strict=True):
        for place, scorer in enumerate(reversed(sizes.scorers)):
            interval = pooled["all"].interval(pooled["all"].auc(scorer, sign))
            if interval.low is not None:
                axes.plot([interval.low, interval.high], [place, place], color="black", linewidth=2.2)
            axes.plot(interval.mean, place, "|", color="black", markersize=13, markeredgewidth=2)
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
