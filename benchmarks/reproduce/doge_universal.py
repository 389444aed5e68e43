"""
DoGE, universal generalization: do weights learned for all of eight English domains serve all of them?

    python -m benchmarks.reproduce doge_universal --data_dir ../shared/data --output_dir outputs/reproduce

What was decided when:

- **Arms.** uniform; natural (by tokens); random (Dirichlet(1), another one each seed); DoGE by the paper's recipe with the sum of
  the step's own domains as target (`paper_sum`) and with a held-out mix (`paper_mix`); DoGE as the authors' code has it
  (`official_mix`; that recipe refuses the sum target); DoReMi as published (`doremi`, see `doremi.py`).
- **Sizes (small).** BPE of 1,024 entries, blocks of 64 tokens. Proxy: 2 layers of width 64 (163,136 parameters), 200
  steps of 32 blocks. Base: the same shape and 2 layers of width 128 (520,832 parameters), 600 steps of 32 blocks (1,228,800 tokens,
  less than the smallest domain holds). Validation: 32,768 tokens a domain. Five seeds; each learns its own weights.
- **Changed after the first results.** Base runs first had 200 steps. All seven arms of seed 1 were seen at that length: uniform and natural, nearly the
  same mixture, differed by 0.13 nats, and the uniform runs of seeds 1, 3 and 5 by 0.24: at 200 steps a run is on its way off the level of
  token frequencies, and where on that way decides more than its mixture. So base runs were made three times longer, for all arms alike.
  Everything else stood before any run.
- **mu.** 0.05 for `paper_sum`, the class default of the authors. For the other two by one rule, on seed 0, which is not
  reported, and without any evaluation: the largest mean weight about three times the smallest, as `paper_sum` has it. That
  is 0.002 for `paper_mix` and 0.003 for `official_mix`: three times faster than what 0.05 / 8 and 0.01 gave (ratios of
  1.4 and 1.2).
- **Measure.** Perplexity per domain; average (the paper's), geometric mean and worst domain. An arm *helps* if the 95 % t interval over
  seeds of its change in average perplexity against uniform (same seed, same initial model) lies below 0, *harms* if above.
- **Stages.** `core`: uniform, `paper_sum` and `official_mix` at the smaller base. `arms`: the other four. `size`: four arms at the larger base (three seeds, for want of time). `variants`: the weights
  that `paper_sum` learns with each domain's gradient clipped to norm 1, by cosine, and without the self term (three seeds): which of them takes
  its bias away? `causes`: base models on these. `stability`: the weights with a larger proxy and other mu (three seeds).
- **Added after five seeds of all arms had been read.** `fresh`: of ten arms the cosine variant and DoReMi had the lowest averages, both undecided. They and
  uniform are run once more with eight seeds that nobody has looked at (6 to 13), by the same rule, in a table of their own.

Learned weights are saved as artifacts in `OUTPUT_DIR/doge_universal/proxy/<arm>-<size>-seed<seed>/domain_weights`, base
models of the smaller size in `OUTPUT_DIR/doge_universal/models` (for `few_shot`).

Last line: change in average, geometric-mean and worst-domain perplexity against uniform in percent, `[mean, low, high]`, by base size
and arm; the learned weights; the cost of learning.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.doremi import learn_doremi_weights
from benchmarks.reproduce.language_models import (
    TextSettings,
    TrainingSettings,
    count_parameters,
    describe_text,
    learn_weights,
    load_text,
    new_model,
    plain,
    summarize_losses,
    train_base,
)
from benchmarks.reproduce.plots import plot_changes
from benchmarks.reproduce.report import Results, Table
from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.cli.learn import carve_heldout_mix
from hf_doge.data.domain_data import DomainData
from hf_doge.evaluation.intervals import t_interval

STAGES = ("core", "variants", "arms", "size", "causes", "stability", "fresh")
CORE_ARMS = ("uniform", "paper_sum", "official_mix")
OTHER_ARMS = ("natural", "random", "paper_mix", "doremi")
ARMS = (*CORE_ARMS, *OTHER_ARMS)
LARGER_ARMS = ("uniform", "paper_sum", "official_mix", "doremi")
FRESH_ARMS = ("uniform", "paper_sum_cosine", "doremi")
CAUSES = {
    "paper_sum_clipped": {"domain_max_grad_norm": 1.0},
    "paper_sum_cosine": {"normalization": "cosine", "mu": 0.02},
    "paper_sum_no_self": {"self_term": False},
}


@dataclass(frozen=True)
class Settings:
    """Sizes of one scale."""

    text: TextSettings
    proxy_size: str
    larger_proxy_size: str
    base_sizes: tuple[str, str]
    proxy: TrainingSettings
    base: TrainingSettings
    options: Mapping[str, Mapping[str, Any]]
    heldout_fraction: float
    seeds: tuple[int, ...]
    stability_seeds: tuple[int, ...]
    fresh_seeds: tuple[int, ...]
    larger_seeds: tuple[int, ...]


OPTIONS = {
    "paper_sum": {"recipe": "paper", "mu": 0.05},
    "paper_mix": {"recipe": "paper", "mu": 0.002},
    "official_mix": {"recipe": "official", "mu": 0.003},
}
PAPER_TRAINING = {"batch_size": 128, "learning_rate": 5e-4, "warmup_steps": 500, "bf16": True}
SCALES = {
    "tiny": Settings(
        text=TextSettings(300, 16, 1600, 320),
        proxy_size="nano",
        larger_proxy_size="nano",
        base_sizes=("nano", "nano"),
        proxy=TrainingSettings(2, 8, 3e-3, 1),
        base=TrainingSettings(2, 8, 3e-3, 1),
        options=OPTIONS,
        heldout_fraction=0.1,
        seeds=(1,),
        stability_seeds=(1,),
        fresh_seeds=(2,),
        larger_seeds=(1,),
    ),
    "small": Settings(
        text=TextSettings(1024, 64, None, 32_768),
        proxy_size="nano",
        larger_proxy_size="micro",
        base_sizes=("nano", "micro"),
        proxy=TrainingSettings(200, 32, 3e-3, 20),
        base=TrainingSettings(600, 32, 3e-3, 20),
        options=OPTIONS,
        heldout_fraction=0.05,
        seeds=(1, 2, 3, 4, 5),
        stability_seeds=(1, 2, 3),
        fresh_seeds=(6, 7, 8, 9, 10, 11, 12, 13),
        larger_seeds=(1, 2, 3),
    ),
    "gpu": Settings(  # the paper's shapes and steps; its data are far larger
        text=TextSettings(16_384, 512),
        proxy_size="82m",
        larger_proxy_size="124m",
        base_sizes=("124m", "210m"),
        proxy=TrainingSettings(10_000, **PAPER_TRAINING),
        base=TrainingSettings(10_000, **PAPER_TRAINING),
        options={
            "paper_sum": {"recipe": "paper", "mu": 0.05},
            "paper_mix": {"recipe": "paper", "mu": 0.05 / 8},
            "official_mix": {"recipe": "official", "mu": 0.01, "max_grad_norm": 5.0},
        },
        heldout_fraction=0.05,
        seeds=(1, 2, 3, 4, 5),
        stability_seeds=(1, 2, 3),
        fresh_seeds=(6, 7, 8, 9, 10, 11, 12, 13),
        larger_seeds=(1, 2, 3, 4, 5),
    ),
}


class Universal:
    """The parts of the experiment, each computed once."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.settings = SCALES[args.scale]
        self.data: DomainData = load_text(args.data_dir / "lm", self.settings.text, args.output_dir.parent / "text")
        self.kept, self.mix = carve_heldout_mix(self.data.train, self.settings.heldout_fraction)
        self.names = tuple(self.data.train)
        self.block_size = self.settings.text.block_size
        self.key = {"fingerprints": self.data.fingerprints}

    def proxy(
        self, arm: str, seed: int, *, size: str | None = None, changes: Mapping[str, Any] | None = None, name: str = ""
    ) -> dict[str, Any]:
        """Weights that a DoGE arm learns with a seed; `changes` to its arguments get a `name`."""
        settings, size = self.settings, size or self.settings.proxy_size
        options = {**settings.options[arm], **(changes or {})}
        uses_mix = arm.endswith("_mix")
        train: Mapping[str, Dataset] = self.kept if uses_mix else self.data.train
        label = f"{name or arm}-{size}-seed{seed}"
        key = {**self.key, "size": size, "training": plain(settings.proxy), "options": options, "seed": seed}
        return self.args.store.get(
            f"proxy-{label}",
            {**key, "heldout_fraction": settings.heldout_fraction if uses_mix else None},
            lambda: learn_weights(
                new_model(size, self.data, self.block_size, seed=seed),
                settings.proxy,
                options,
                train=train,
                target=self.mix if uses_mix else None,
                seed=seed,
                folder=self.args.output_dir / "proxy" / label,
            ),
        )

    def doremi(self, seed: int) -> dict[str, Any]:
        """DoReMi's weights; its reference is trained as its proxy is, on uniform."""
        settings, size = self.settings, self.settings.proxy_size
        reference = self.args.output_dir / "models" / f"reference-seed{seed}"
        self._train(
            f"reference-{size}-seed{seed}", "uniform", seed, size=size, training=settings.proxy, folder=reference
        )
        key = {**self.key, "size": size, "training": plain(settings.proxy), "reference": plain(settings.proxy)}
        return self.args.store.get(
            f"proxy-doremi-{size}-seed{seed}",
            {**key, "seed": seed},
            lambda: learn_doremi_weights(
                new_model(size, self.data, self.block_size, seed=seed),
                AutoModelForCausalLM.from_pretrained(reference),
                settings.proxy,
                train=self.data.train,
                seed=seed,
                folder=self.args.output_dir / "proxy" / f"doremi-seed{seed}",
            ),
        )

    def weights(self, arm: str, seed: int) -> dict[str, float]:
        """What an arm draws by."""
        if arm == "uniform":
            return DomainWeights.uniform(self.names).mean
        if arm == "natural":
            return DomainWeights.natural(describe_text(self.data.train, self.block_size)).mean
        if arm == "random":
            draw = np.random.default_rng(seed).dirichlet(np.ones(len(self.names)))
            return dict(zip(self.names, draw.tolist(), strict=True))
        if arm == "doremi":
            return self.doremi(seed)["mean"]
        if arm in CAUSES:
            return self.proxy("paper_sum", seed, changes=CAUSES[arm], name=arm)["mean"]
        return self.proxy(arm, seed)["mean"]

    def model_folder(self, arm: str, seed: int) -> Path:
        """Where a base model of the smaller size is."""
        return self.args.output_dir / "models" / f"{arm}-seed{seed}"

    def base(self, arm: str, seed: int, *, size: str) -> dict[str, Any]:
        """A base model trained on an arm's mixture: losses by domain, and more."""
        settings = self.settings
        folder = self.model_folder(arm, seed) if size == settings.base_sizes[0] else None
        return self._train(
            f"base-{size}-{arm}-seed{seed}", arm, seed, size=size, training=settings.base, folder=folder
        )

    def _train(
        self, part: str, arm: str, seed: int, *, size: str, training: TrainingSettings, folder: Path | None
    ) -> dict[str, Any]:
        """Train one model on an arm's mixture; it is saved where a folder is given."""
        weights = self.weights(arm, seed)
        key = {**self.key, "size": size, "training": plain(training), "weights": weights, "seed": seed}
        return self.args.store.get(
            part,
            key,
            lambda: train_base(
                new_model(size, self.data, self.block_size, seed=seed),
                training,
                train=self.data.train,
                validation=self.data.validation,
                weights=weights,
                seed=seed,
                folder=folder or self.args.output_dir / "base",
                saves_model=folder is not None,
            ),
        )


def run(args: Arguments) -> Results:
    """Run the stages asked for and tabulate them."""
    stages = args.choose_stages(STAGES)
    universal = Universal(args)
    settings = universal.settings
    seeds = args.seeds or settings.seeds
    smaller, larger = settings.base_sizes
    at_smaller = (
        *(CORE_ARMS if {"core", "arms", "causes"} & set(stages) else ()),  # the others are compared with these
        *(OTHER_ARMS if "arms" in stages else ()),
        *(CAUSES if "causes" in stages else ()),
    )
    # By the ending of their tables: base size, arms and seeds.
    studies = {
        "": (smaller, at_smaller, seeds),
        "_larger": (larger, LARGER_ARMS if "size" in stages else (), args.seeds or settings.larger_seeds),
        "_fresh": (smaller, FRESH_ARMS if "fresh" in stages else (), settings.fresh_seeds),
    }
    tables, figures = {}, {"change_percent": {}}
    for ending, (size, arms, its_seeds) in studies.items():
        if arms:
            runs = {(size, arm, seed): universal.base(arm, seed, size=size) for seed in its_seeds for arm in arms}
            tables[f"perplexity{ending}"] = tabulate_perplexity(runs, {size: arms}, its_seeds)
            tables[f"domains{ending}"] = tabulate_domains(runs, {size: arms}, its_seeds)
            figures["change_percent"][f"{size}{ending.replace('_', ', ')}"] = {
                arm: changes(runs, size, arm, its_seeds) for arm in arms if arm != "uniform"
            }
    by_variant = {
        arm: [universal.doremi(seed) if arm == "doremi" else _proxy_of(universal, arm, seed) for seed in seeds]
        for arm in at_smaller
        if arm not in ("uniform", "natural", "random")
    }
    if "variants" in stages:
        for arm in CAUSES:
            by_variant.setdefault(arm, [_proxy_of(universal, arm, seed) for seed in settings.stability_seeds])
    if "stability" in stages:
        by_variant |= stability_variants(universal, settings.stability_seeds)
    if by_variant:
        tables["weights"] = tabulate_weights(by_variant, universal.names)
        tables["scores"] = tabulate_scores(by_variant, universal.names)
        figures["weights"] = {
            name: {domain: t_interval([r["mean"][domain] for r in found]).mean for domain in universal.names}
            for name, found in by_variant.items()
        }
    tables["cost"], figures["cost_share"] = tabulate_cost(universal)
    plotted = figures.get("change_percent")
    return Results(
        tables=tables,
        figures=round_figures(figures),
        plot=None if not plotted else lambda path: plot_changes(plotted, path, yardstick="average perplexity"),
        notes=[] if set(stages) == set(STAGES) else [f"Stages not run: {sorted(set(STAGES) - set(stages))}."],
    )


def _proxy_of(universal: Universal, arm: str, seed: int) -> dict[str, Any]:
    if arm in CAUSES:
        return universal.proxy("paper_sum", seed, changes=CAUSES[arm], name=arm)
    return universal.proxy(arm, seed)


def stability_variants(universal: Universal, seeds: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
    """Weights with a larger proxy, and with mu half and twice as large, by name of the variant."""
    found = {}
    larger = universal.settings.larger_proxy_size
    for arm in ("paper_sum", "official_mix"):
        found[f"{arm}, {larger} proxy"] = [universal.proxy(arm, seed, size=larger) for seed in seeds]
        for factor in (0.5, 2.0):
            mu = universal.settings.options[arm]["mu"] * factor
            found[f"{arm}, mu {mu:g}"] = [
                universal.proxy(arm, seed, changes={"mu": mu}, name=f"{arm}-mu{mu:g}") for seed in seeds
            ]
    return found


def changes(runs: Mapping, size: str, arm: str, seeds: tuple[int, ...]) -> dict[str, list[float | None]]:
    """Change of each yardstick against uniform in percent, seed against seed: mean, low and high of the 95 % interval."""
    found = {}
    for yardstick in ("average", "geometric", "worst"):
        interval = t_interval(
            [
                100
                * (
                    summarize_losses(runs[size, arm, seed]["losses"])[yardstick]
                    / summarize_losses(runs[size, "uniform", seed]["losses"])[yardstick]
                    - 1
                )
                for seed in seeds
            ]
        )
        found[yardstick] = [interval.mean, interval.low, interval.high]
    return found


def tabulate_perplexity(runs: Mapping, arms_by_size: Mapping[str, tuple[str, ...]], seeds: tuple[int, ...]) -> Table:
    """One line per base size and arm: yardsticks and their change, then the domains."""
    names = list(next(iter(runs.values()))["losses"])
    cells, rows = [], []
    for size, arms in arms_by_size.items():
        for arm in arms:
            found = [summarize_losses(runs[size, arm, seed]["losses"]) for seed in seeds]
            change = changes(runs, size, arm, seeds) if arm != "uniform" else None
            cells.append(
                [
                    size,
                    arm,
                    t_interval([f["average"] for f in found]).format(1),
                    format_change(change and change["average"]),
                    format_change(change and change["geometric"]),
                    t_interval([f["worst"] for f in found]).format(1),
                    format_change(change and change["worst"]),
                    *[t_interval([math.exp(runs[size, arm, s]["losses"][n]) for s in seeds]).format(1) for n in names],
                ]
            )
            rows += [
                {
                    "base_size": size,
                    "arm": arm,
                    "seed": seed,
                    "domain": name,
                    "weight": runs[size, arm, seed]["weights"].get(name),
                    "loss": runs[size, arm, seed]["losses"][name],
                    "epochs": runs[size, arm, seed]["epochs"].get(name),
                    "train_tokens": runs[size, arm, seed]["train_tokens"],
                }
                for seed in seeds
                for name in names
            ]
    return Table(
        title=(
            f"Validation perplexity, lower is better: mean [95 % t interval] over {len(seeds)} seeds; changes against uniform "
            "in percent, seed against seed."
        ),
        header=["base", "arm", "average", "change", "geometric, change", "worst domain", "change", *names],
        cells=cells,
        rows=rows,
    )


def tabulate_domains(runs: Mapping, arms_by_size: Mapping[str, tuple[str, ...]], seeds: tuple[int, ...]) -> Table:
    """One line per base size and arm: the change of each domain's perplexity against uniform."""
    names = list(next(iter(runs.values()))["losses"])
    cells, rows = [], []
    for size, arms in arms_by_size.items():
        for arm in arms:
            if arm == "uniform":
                continue
            found = {
                name: [
                    100
                    * math.expm1(runs[size, arm, seed]["losses"][name] - runs[size, "uniform", seed]["losses"][name])
                    for seed in seeds
                ]
                for name in names
            }
            intervals = [t_interval(found[name]) for name in names]
            cells.append([size, arm, *[format_change([i.mean, i.low, i.high]) for i in intervals]])
            rows += [
                {"base_size": size, "arm": arm, "seed": seed, "domain": name, "change_percent": value}
                for name in names
                for seed, value in zip(seeds, found[name], strict=True)
            ]
    return Table(
        title=(
            f"Change of each domain's perplexity against uniform in percent, seed against seed: mean [95 % t interval] over "
            f"{len(seeds)} seeds (bold: the interval excludes 0)."
        ),
        header=["base", "arm", *names],
        cells=cells,
        rows=rows,
    )


def format_change(change: list[float | None] | None) -> str:
    """`+1.2 [+0.3, +2.1]`, bold where the interval excludes 0; nothing for the baseline itself."""
    if change is None:
        return ""
    mean, low, high = change
    if low is None or high is None:
        return f"{mean:+.1f} (one seed)"
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def tabulate_weights(by_variant: Mapping[str, list[dict[str, Any]]], names: tuple[str, ...]) -> Table:
    """One line per variant: mean weight of each domain over seeds, and how far seeds lie apart."""
    cells, rows = [], []
    for variant, found in by_variant.items():
        weights = np.array([[result["mean"][name] for name in names] for result in found])  # (S, K)
        spread = np.abs(weights - weights.mean(axis=0)).mean()
        cells.append([variant, str(len(found)), *[f"{value:.3f}" for value in weights.mean(axis=0)], f"{spread:.4f}"])
        rows += [
            {
                "variant": variant,
                "run": run,
                "domain": name,
                "mean": result["mean"][name],
                "last": result["last"][name],
            }
            for run, result in enumerate(found)
            for name in names
        ]
    return Table(
        title=(
            "Learned weights (mean of the trajectory), mean over seeds; `spread`: mean absolute distance of a seed's weight "
            "from the mean over seeds. Uniform is " + f"{1 / len(names):.3f}."
        ),
        header=["variant", "seeds", *names, "spread"],
        cells=cells,
        rows=rows,
    )


def tabulate_scores(by_variant: Mapping[str, list[dict[str, Any]]], names: tuple[str, ...]) -> Table:
    """One line per DoGE variant: where the heaviest domain's drift comes from."""
    cells, rows = [], []
    for variant, found in by_variant.items():
        if "drift" not in found[0]:
            continue
        mean = {name: float(np.mean([result["mean"][name] for result in found])) for name in names}
        heaviest = max(mean, key=mean.get)
        drift = t_interval([result["drift"][heaviest] for result in found])
        top = t_interval([result["top10_drift"][heaviest] for result in found])
        median = t_interval([result["score_median"][heaviest] for result in found])
        top_of_others, median_of_others = (
            t_interval([float(np.mean([v for n, v in result[what].items() if n != heaviest])) for result in found])
            for what in ("top10_drift", "score_median")
        )
        cells.append(
            [
                variant,
                heaviest,
                *(drift.format(), top.format(), top_of_others.format()),
                *(f"{median.mean:.3g}", f"{median_of_others.mean:.3g}"),
            ]
        )
        rows += [
            {
                "variant": variant,
                "run": run,
                "domain": name,
                "drift": result["drift"][name],
                "top10_drift": result["top10_drift"][name],
                "score_median": result["score_median"][name],
            }
            for run, result in enumerate(found)
            for name in names
        ]
    return Table(
        title=(
            "Where the heaviest domain's weight comes from: its gain in log weight over the mean domain; the part of it "
            "that its ten steps of largest score make, beside the mean of what the others' ten make (noise alone makes some); and its "
            "median score beside the mean of the others' medians."
        ),
        header=["variant", "heaviest", "gain, nats", "of it from 10 steps", "others'", "median score", "others'"],
        cells=cells,
        rows=rows,
    )


def tabulate_cost(universal: Universal) -> tuple[Table, dict[str, dict[str, float]]]:
    """
    Cost of learning as a share of one base run, counted in parameters x tokens x passes (a backward is two forwards).

    DoGE: a training of the proxy, and as much again per target token. DoReMi: reference, proxy, and a forward of the reference.
    """
    settings = universal.settings
    num_parameters = {
        size: count_parameters(new_model(size, universal.data, universal.block_size, seed=0))
        for size in {settings.proxy_size, *settings.base_sizes}
    }
    num_domains = len(universal.names)
    training = 3 * settings.proxy.steps * settings.proxy.batch_size
    target = 3 * settings.proxy.steps * math.ceil(settings.proxy.batch_size / num_domains)
    reference = training
    costs = {
        "DoGE, sum target": training,
        "DoGE, held-out mix": training + target,
        "DoReMi": reference + training + training / 3,
    }
    rows = [
        {
            "method": method,
            "base_size": size,
            "base_parameters": num_parameters[size],
            "share": cost
            * num_parameters[settings.proxy_size]
            / (3 * settings.base.steps * settings.base.batch_size * num_parameters[size]),
        }
        for method, cost in costs.items()
        for size in dict.fromkeys(settings.base_sizes)
    ]
    table = Table(
        title=(
            "Cost of learning the weights once as a share of one base run (parameters x tokens x passes; embeddings count), "
            f"proxy of {num_parameters[settings.proxy_size]:,} parameters."
        ),
        header=["method", "base", "parameters", "share"],
        cells=[[r["method"], r["base_size"], f"{r['base_parameters']:,}", f"{r['share']:.2f}"] for r in rows],
        rows=rows,
    )
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        shares.setdefault(row["method"], {})[row["base_size"]] = row["share"]
    return table, shares


def round_figures(value: Any) -> Any:
    """Figures of the last line, floats to four digits after the point."""
    if isinstance(value, dict):
        return {name: round_figures(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [round_figures(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value
