"""
DoGE, out of domain: do weights learned for a domain that no model is trained on lower its perplexity?

    python -m benchmarks.reproduce doge_out_of_domain --data_dir ../shared/data --output_dir outputs/reproduce

Written before any run of this module at this scale, but for what is said under "Changed":

- **Targets.** Catalan (sources en nl fr de es it) and Dutch (sources en fr de es it ca), then each of the eight English domains with
  the other seven as sources. The target gives gradients from at most 100,000 tokens of its train split and trains no model.
- **Arms.** The base model on uniform, on natural (by tokens), on the learned weights, and on the *nearest* source alone: the one whose
  token frequencies have the smallest Kullback-Leibler divergence from the target's (add-one smoothing; from the same
  100,000 target tokens). One BPE for each folder, trained on all of its domains, as in the paper's Wiki40b runs.
- **Sizes (small).** BPE of 1,024 entries, blocks of 64. Proxy: 2 layers of width 64 (163,136 parameters), 200 steps of 3 blocks of
  each source and 6 of the target, the authors' recipe at mu 0.01 (what `benchmarks/RESULTS.md` settled on for Catalan; not tuned here).
  Base: the same shape, 600 steps of 16 blocks (614,400 tokens). Three seeds, each with weights of its own (english: two, for its interval is
  over the eight targets, and time was short).
- **Changed.** Base runs first had 200 steps, and the stage `languages` was run and read so. At that length a model is little better than a table of
  token frequencies, and such a table, mixed by the learned weights, gains as much for Catalan as the model did. So base runs were made three
  times longer before the stage `english` was run, `languages` was run again, and the change in the perplexity of the tables is given beside
  that of the models (`unigram`). Added then too, for the languages: the arm *heaviest*, the source that the learned weights favour, alone
  (for Dutch that is German, where the nearest by token frequencies is English).
- **Measure.** Perplexity on 32,768 tokens of the target's validation split. The method *helps* on a target if the 95 % t interval over
  seeds of the change against uniform lies below 0; over all targets of a folder, if the interval over *targets* (three or more) of the log ratio, mean
  over seeds, does.

Last line: by target and arm the change against uniform in percent, `[mean, low, high]`, the means over targets, the
nearest source, and the learned weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.doge_universal import format_change, round_figures
from benchmarks.reproduce.language_models import (
    TextSettings,
    TrainingSettings,
    describe_text,
    learn_weights,
    load_text,
    new_model,
    plain,
    train_base,
)
from benchmarks.reproduce.plots import plot_changes
from benchmarks.reproduce.report import Results, Table
from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.data.domain_data import DomainData
from hf_doge.evaluation.intervals import Interval, t_interval

STAGES = ("languages", "english")
FOLDERS = {"languages": "multilingual", "english": "lm"}
LANGUAGE_TARGETS = ("ca", "nl")
ARMS = {
    "languages": ("uniform", "natural", "learned", "nearest", "heaviest"),
    "english": ("uniform", "natural", "learned", "nearest"),
}


@dataclass(frozen=True)
class Settings:
    """Sizes of one scale. `proxy.batch_size` counts the blocks of one source."""

    text: TextSettings
    size: str
    base_size: str
    proxy: TrainingSettings
    target_blocks: int
    max_target_tokens: int
    base: TrainingSettings
    options: Mapping[str, Any]
    seeds: dict[str, tuple[int, ...]]


SCALES = {
    "tiny": Settings(
        text=TextSettings(300, 16, 800, 160),
        size="nano",
        base_size="nano",
        proxy=TrainingSettings(2, 1, 3e-3, 1),
        target_blocks=2,
        max_target_tokens=160,
        base=TrainingSettings(2, 4, 3e-3, 1),
        options={"recipe": "official", "mu": 0.01},
        seeds={"languages": (1,), "english": (1,)},
    ),
    "small": Settings(
        text=TextSettings(1024, 64, None, 32_768),
        size="nano",
        base_size="nano",
        proxy=TrainingSettings(200, 3, 3e-3, 20),
        target_blocks=6,
        max_target_tokens=100_000,
        base=TrainingSettings(600, 16, 3e-3, 20),
        options={"recipe": "official", "mu": 0.01},
        seeds={"languages": (1, 2, 3), "english": (1, 2)},
    ),
    "gpu": Settings(
        text=TextSettings(16_384, 512),
        size="82m",
        base_size="124m",
        proxy=TrainingSettings(10_000, 16, 5e-4, 500, bf16=True),
        target_blocks=16,
        max_target_tokens=50_000_000,
        base=TrainingSettings(10_000, 128, 5e-4, 500, bf16=True),
        options={"recipe": "official", "mu": 0.05, "max_grad_norm": 1.0},
        seeds={"languages": (1, 2, 3), "english": (1, 2, 3)},
    ),
}


def run(args: Arguments) -> Results:
    """Run the stages asked for and tabulate them."""
    settings = SCALES[args.scale]
    stages = args.choose_stages(STAGES)
    losses: dict[tuple[str, str, int], float] = {}
    learned: dict[tuple[str, int], dict[str, float]] = {}
    nearest: dict[str, str] = {}
    targets_of: dict[str, list[str]] = {}
    seeds_of: dict[str, tuple[int, ...]] = {}
    unigram: dict[tuple[str, str, int], float] = {}
    for stage in stages:
        data = load_text(args.data_dir / FOLDERS[stage], settings.text, args.output_dir.parent / "text")
        names = tuple(data.train)
        targets = [name for name in names if stage == "english" or name in LANGUAGE_TARGETS]
        if stage == "languages" and args.scale == "tiny":
            targets = targets or [names[0]]  # the generated text of the tests has no languages
        targets_of[stage] = targets
        for target in targets:
            nearest[target] = find_nearest(data, target, settings.max_target_tokens)
        frequencies = {name: token_frequencies(rows, len(data.tokenizer)) for name, rows in data.train.items()}
        seeds = args.seeds or settings.seeds[stage]
        seeds_of |= dict.fromkeys(targets, seeds)
        for seed in seeds:
            for target in targets:
                learned[target, seed] = learn_for(args, data, target, seed)["mean"]
                for arm in ARMS[stage]:
                    weights = weights_of(arm, data, target, nearest[target], learned[target, seed], settings)
                    losses[target, arm, seed] = train_on(args, data, target, arm, weights, seed)
                    unigram[target, arm, seed] = unigram_loss(weights, frequencies, data.validation[target])
    targets = list(nearest)
    means = {f"mean of {len(group)} ({stage})": group for stage, group in targets_of.items() if len(group) > 2}
    by_arm, by_arm_unigram = (
        {
            arm: {
                target: change(found, target, arm, seeds_of[target])
                for target in targets
                if (target, arm, seeds_of[target][0]) in found
            }
            | {
                name: mean_change(found, group, arm, seeds_of)
                for name, group in means.items()
                if (group[0], arm, seeds_of[group[0]][0]) in found
            }
            for arm in dict.fromkeys(arm for stage in stages for arm in ARMS[stage])
            if arm != "uniform"
        }
        for found in (losses, unigram)
    )
    figures = {
        "change_percent": by_arm,
        "unigram_change_percent": by_arm_unigram,
        "nearest": nearest,
        "weights": {
            target: {
                name: t_interval([learned[target, seed][name] for seed in seeds_of[target]]).mean
                for name in learned[target, seeds_of[target][0]]
            }
            for target in targets
        },
    }
    plotted = {
        arm: {target: {"perplexity": entry} for target, entry in found.items()} for arm, found in by_arm.items()
    }
    return Results(
        tables={
            "perplexity": tabulate_perplexity(losses, targets, by_arm, nearest, seeds_of),
            "unigram": tabulate_unigram(by_arm_unigram, [*targets, *means]),
            "weights": tabulate_weights(learned, targets, seeds_of),
        },
        figures=round_figures(figures),
        plot=lambda path: plot_changes(plotted, path, yardstick="perplexity of the target"),
        notes=[] if set(stages) == set(STAGES) else [f"Stages not run: {sorted(set(STAGES) - set(stages))}."],
    )


def sources_of(data: DomainData, target: str) -> dict[str, Dataset]:
    """All domains but the target."""
    return {name: rows for name, rows in data.train.items() if name != target}


def target_rows(rows: Dataset, max_tokens: int) -> Dataset:
    """The first blocks of a domain, of at most so many tokens."""
    return rows.select(range(min(len(rows), max(1, max_tokens // len(rows[0]["input_ids"])))))


def find_nearest(data: DomainData, target: str, max_tokens: int) -> str:
    """The source whose token frequencies are nearest to the target's, by Kullback-Leibler divergence."""
    size = len(data.tokenizer)
    of_target = token_frequencies(target_rows(data.train[target], max_tokens), size)
    divergence = {
        name: float((of_target * np.log(of_target / token_frequencies(rows, size))).sum())
        for name, rows in sources_of(data, target).items()
    }
    return min(divergence, key=divergence.get)


def token_frequencies(rows: Dataset, vocabulary_size: int) -> np.ndarray:
    """How often each token comes, add-one smoothed, shape `(V,)`; sums to 1."""
    counts = np.bincount(np.asarray(rows["input_ids"]).ravel(), minlength=vocabulary_size) + 1.0
    return counts / counts.sum()


def unigram_loss(weights: Mapping[str, float], frequencies: Mapping[str, np.ndarray], validation: Dataset) -> float:
    """Nats per token of a domain under the token frequencies of a mixture: what a model without any context gets."""
    mixture = sum(weight * frequencies[name] for name, weight in weights.items())
    return float(-np.log(mixture)[np.asarray(validation["input_ids"]).ravel()].mean())


def learn_for(args: Arguments, data: DomainData, target: str, seed: int) -> dict[str, Any]:
    """Weights of the sources for a target."""
    settings, sources = SCALES[args.scale], sources_of(data, target)
    proxy, target_blocks = settings.proxy, settings.target_blocks
    training = TrainingSettings(**{**plain(proxy), "batch_size": proxy.batch_size * len(sources)})
    options = {**settings.options, "per_device_target_batch_size": target_blocks}
    block_size = settings.text.block_size
    return args.store.get(
        f"proxy-{target}-seed{seed}",
        {
            "fingerprints": data.fingerprints,
            "target": target,
            "max_target_tokens": settings.max_target_tokens,
            "size": settings.size,
            "training": plain(training),
            "options": options,
            "seed": seed,
        },
        lambda: learn_weights(
            new_model(settings.size, data, block_size, seed=seed),
            training,
            options,
            train=sources,
            target={target: target_rows(data.train[target], settings.max_target_tokens)},
            seed=seed,
            folder=args.output_dir / "proxy" / f"{target}-seed{seed}",
        ),
    )


def weights_of(
    arm: str, data: DomainData, target: str, nearest: str, learned: Mapping[str, float], settings: Settings
) -> dict[str, float]:
    """What an arm draws by."""
    sources = sources_of(data, target)
    if arm == "learned":
        return dict(learned)
    if arm in ("nearest", "heaviest"):
        alone = nearest if arm == "nearest" else max(learned, key=lambda name: learned[name])
        return {name: float(name == alone) for name in sources}
    described = describe_text(sources, settings.text.block_size)
    return (DomainWeights.natural if arm == "natural" else DomainWeights.uniform)(described).mean


def train_on(
    args: Arguments, data: DomainData, target: str, arm: str, weights: Mapping[str, float], seed: int
) -> float:
    """Loss on the target's validation split of a base model trained on an arm's mixture, in nats per token."""
    settings = SCALES[args.scale]
    result = args.store.get(
        f"base-{target}-{arm}-seed{seed}",
        {
            "fingerprints": data.fingerprints,
            "target": target,
            "size": settings.base_size,
            "training": plain(settings.base),
            "weights": dict(weights),
            "seed": seed,
        },
        lambda: train_base(
            new_model(settings.base_size, data, settings.text.block_size, seed=seed),
            settings.base,
            train=sources_of(data, target),
            validation={target: data.validation[target]},
            weights=weights,
            seed=seed,
            folder=args.output_dir / "base",
        ),
    )
    return result["losses"][target]


def change(losses: Mapping, target: str, arm: str, seeds: tuple[int, ...]) -> list[float | None]:
    """Change in perplexity against uniform in percent: mean, low and high of the 95 % interval over seeds."""
    return to_percent(t_interval([losses[target, arm, seed] - losses[target, "uniform", seed] for seed in seeds]))


def mean_change(
    losses: Mapping, targets: list[str], arm: str, seeds_of: Mapping[str, tuple[int, ...]]
) -> list[float | None]:
    """The same over targets, each by its mean over seeds: where it would lie for other targets of the kind."""
    ratios = [
        [losses[target, arm, seed] - losses[target, "uniform", seed] for seed in seeds_of[target]]
        for target in targets
    ]
    return to_percent(t_interval([math.fsum(found) / len(found) for found in ratios]))


def to_percent(interval: Interval) -> list[float | None]:
    """A log ratio and its interval as changes in percent."""
    return [
        None if value is None else 100 * math.expm1(value) for value in (interval.mean, interval.low, interval.high)
    ]


def tabulate_perplexity(
    losses: Mapping,
    targets: list[str],
    by_arm: Mapping,
    nearest: Mapping[str, str],
    seeds_of: Mapping[str, tuple[int, ...]],
) -> Table:
    """One line per target, and one for the mean."""
    cells = [
        [
            target,
            t_interval([math.exp(losses[target, "uniform", seed]) for seed in seeds_of[target]]).format(1),
            *[format_change(by_arm[arm].get(target)) for arm in by_arm],
            nearest[target],
        ]
        for target in targets
    ]
    names = [name for name in next(iter(by_arm.values())) if name not in targets]
    cells += [[name, "", *[format_change(by_arm[arm].get(name)) for arm in by_arm], ""] for name in names]
    rows = [
        {"target": target, "arm": arm, "seed": seed, "loss": loss, "perplexity": math.exp(loss)}
        for (target, arm, seed), loss in losses.items()
    ]
    return Table(
        title=(
            "Perplexity on a target that is not trained on, lower is better: uniform, mean [95 % t interval] over seeds, "
            "and the change against it in percent, seed against seed (bold: the interval excludes 0). Means: over targets, with the interval over targets."
        ),
        header=["target", "uniform", *[f"{arm}, change" for arm in by_arm], "nearest source"],
        cells=cells,
        rows=rows,
    )


def tabulate_unigram(by_arm: Mapping, names: list[str]) -> Table:
    """One line per target, and one for the mean: what mixing token frequencies alone does."""
    return Table(
        title=(
            "Change against uniform of the perplexity under a table of token frequencies, mixed as each arm mixes its sources, in percent: "
            "what of an arm's gain needs no model. Intervals as for the models; natural, nearest and uniform do not depend on the seed."
        ),
        header=["target", *[f"{arm}, change" for arm in by_arm]],
        cells=[[name, *[format_change(by_arm[arm].get(name)) for arm in by_arm]] for name in names],
        rows=[
            {"target": name, "arm": arm, "change_percent": found[name][0]}
            for arm, found in by_arm.items()
            for name in names
            if name in found
        ],
    )


def tabulate_weights(learned: Mapping, targets: list[str], seeds_of: Mapping[str, tuple[int, ...]]) -> Table:
    """One line per target: its sources, heaviest first."""
    cells, rows = [], []
    for target in targets:
        mean = {
            name: t_interval([learned[target, seed][name] for seed in seeds_of[target]])
            for name in learned[target, seeds_of[target][0]]
        }
        order = sorted(mean, key=lambda name: -mean[name].mean)
        cells.append([target, ", ".join(f"{name} {mean[name].format(3)}" for name in order)])
        rows += [
            {"target": target, "seed": seed, "source": name, "weight": learned[target, seed][name]}
            for seed in seeds_of[target]
            for name in order
        ]
    return Table(
        title="Learned weights of the sources, mean [95 % t interval] over seeds, heaviest first.",
        header=["target", "sources"],
        cells=cells,
        rows=rows,
    )
