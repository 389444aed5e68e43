"""
DoGE where data are short: domains repeat, some of them many times. With and without a cap on the epochs of a domain.

    python -m benchmarks.reproduce doge_data_restricted --data_dir ../shared/data --output_dir outputs/reproduce

Written before any run of this module at this scale; data and base runs were made three times longer, and seeds five instead of three, before the
first of them too, because `doge_universal` had shown that runs of 200 steps differ by their seed more than by their mixture:

- **Data (small).** The eight English domains, in alphabetical order cut to 12,288, 12,288, 49,152, 49,152, 98,304, 98,304, 196,608 and
  196,608 tokens: 712,704 in all. A base run takes 1,228,800: natural proportions repeat every domain 1.7 times, uniform the smallest 12.5
  times.
- **Arms.** uniform, natural, `paper_sum` and `official_mix` (as in `doge_universal`, same mu; the mix takes a quarter of the smallest
  domain from each), and uniform and both DoGE arms once more with `max_epochs_per_domain=4`, beyond which repetition is known to pay little.
- **Sizes (small).** BPE of 1,024 entries, blocks of 64; proxy and base of 2 layers of width 64 (163,136 parameters), 200 and 600 steps of
  32 blocks. Five seeds, each with weights of its own.
- **Measure.** As in `doge_universal`: change in average perplexity against uniform, 95 % t interval over seeds. An arm
  *helps* if the interval lies below 0. The same for capped against uncapped.

Last line: changes against uniform in percent by arm, `[mean, low, high]`; the change that the cap makes; epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.doge_universal import (
    OPTIONS,
    changes,
    round_figures,
    tabulate_perplexity,
    tabulate_weights,
)
from benchmarks.reproduce.language_models import (
    TextSettings,
    TrainingSettings,
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
from hf_doge.evaluation.intervals import t_interval

ARMS = ("uniform", "natural", "paper_sum", "official_mix")
CAPPED = {f"{arm}, capped": arm for arm in ("uniform", "paper_sum", "official_mix")}


@dataclass(frozen=True)
class Settings:
    """Sizes of one scale; `domain_tokens` in the alphabetical order of the domains."""

    text: TextSettings
    domain_tokens: tuple[int, ...]
    size: str
    base_size: str
    proxy: TrainingSettings
    base: TrainingSettings
    options: Mapping[str, Mapping[str, Any]]
    heldout_fraction: float
    max_epochs: float
    seeds: tuple[int, ...]


SCALES = {
    "tiny": Settings(
        text=TextSettings(300, 16, 1600, 320),
        domain_tokens=(64, 64, 128, 128, 256, 256, 512, 512),
        size="nano",
        base_size="nano",
        proxy=TrainingSettings(2, 8, 3e-3, 1),
        base=TrainingSettings(3, 8, 3e-3, 1),
        options=OPTIONS,
        heldout_fraction=0.25,
        max_epochs=1,
        seeds=(1,),
    ),
    "small": Settings(
        text=TextSettings(1024, 64, None, 32_768),
        domain_tokens=(12_288, 12_288, 49_152, 49_152, 98_304, 98_304, 196_608, 196_608),
        size="nano",
        base_size="nano",
        proxy=TrainingSettings(200, 32, 3e-3, 20),
        base=TrainingSettings(600, 32, 3e-3, 20),
        options=OPTIONS,
        heldout_fraction=0.25,
        max_epochs=4,
        seeds=(1, 2, 3, 4, 5),
    ),
    "gpu": Settings(
        text=TextSettings(16_384, 512),
        domain_tokens=(2**17, 2**17, 2**18, 2**18, 2**19, 2**19, 2**20, 2**20),
        size="82m",
        base_size="124m",
        proxy=TrainingSettings(2000, 32, 5e-4, 200, bf16=True),
        base=TrainingSettings(2000, 32, 5e-4, 200, bf16=True),
        options={
            "paper_sum": {"recipe": "paper", "mu": 0.05},
            "official_mix": {"recipe": "official", "mu": 0.01, "max_grad_norm": 5.0},
        },
        heldout_fraction=0.25,
        max_epochs=4,
        seeds=(1, 2, 3),
    ),
}


class Restricted:
    """The parts of the experiment, each computed once."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.settings = settings = SCALES[args.scale]
        self.data = load_text(args.data_dir / "lm", settings.text, args.output_dir.parent / "text")
        self.block_size = settings.text.block_size
        self.train: dict[str, Dataset] = {
            name: rows.select(range(min(len(rows), num_tokens // self.block_size)))
            for (name, rows), num_tokens in zip(self.data.train.items(), settings.domain_tokens, strict=True)
        }
        self.key = {"fingerprints": self.data.fingerprints, "domain_tokens": settings.domain_tokens}

    def learn(self, arm: str, seed: int) -> dict[str, Any]:
        """Weights that a DoGE arm learns with a seed."""
        settings, options = self.settings, self.settings.options[arm]
        train, target = self.train, None
        if arm.endswith("_mix"):
            train, target = carve_heldout_mix(self.train, settings.heldout_fraction)
        return self.args.store.get(
            f"proxy-{arm}-seed{seed}",
            {
                **self.key,
                "size": settings.size,
                "training": plain(settings.proxy),
                "options": options,
                "heldout_fraction": settings.heldout_fraction,
                "seed": seed,
            },
            lambda: learn_weights(
                new_model(settings.size, self.data, self.block_size, seed=seed),
                settings.proxy,
                options,
                train=train,
                target=target,
                seed=seed,
                folder=self.args.output_dir / "proxy" / f"{arm}-seed{seed}",
            ),
        )

    def base(self, arm: str, seed: int) -> dict[str, Any]:
        """A base model trained on an arm's mixture."""
        settings, mixture = self.settings, CAPPED.get(arm, arm)
        described = describe_text(self.train, self.block_size)
        if mixture in settings.options:
            weights = self.learn(mixture, seed)["mean"]
        else:
            weights = (DomainWeights.natural if mixture == "natural" else DomainWeights.uniform)(described).mean
        cap = settings.max_epochs if arm in CAPPED else None
        return self.args.store.get(
            f"base-{arm.replace(', ', '-')}-seed{seed}",
            {
                **self.key,
                "size": settings.base_size,
                "training": plain(settings.base),
                "weights": weights,
                "cap": cap,
                "seed": seed,
            },
            lambda: train_base(
                new_model(settings.base_size, self.data, self.block_size, seed=seed),
                settings.base,
                train=self.train,
                validation=self.data.validation,
                weights=weights,
                seed=seed,
                folder=self.args.output_dir / "base",
                max_epochs_per_domain=cap,
            ),
        )


def run(args: Arguments) -> Results:
    """Run all arms and tabulate them."""
    args.choose_stages(())
    restricted = Restricted(args)
    seeds = args.seeds or restricted.settings.seeds
    size, arms = restricted.settings.base_size, (*ARMS, *CAPPED)
    runs = {(size, arm, seed): restricted.base(arm, seed) for seed in seeds for arm in arms}
    cap_changes = {}
    for arm, uncapped in CAPPED.items():
        ratios = []
        for seed in seeds:
            capped, free = (summarize_losses(runs[size, name, seed]["losses"])["average"] for name in (arm, uncapped))
            ratios.append(100 * (capped / free - 1))
        interval = t_interval(ratios)
        cap_changes[uncapped] = [interval.mean, interval.low, interval.high]
    learned = {
        arm: [restricted.learn(arm, seed) for seed in seeds] for arm in restricted.settings.options if arm in ARMS
    }
    found = {arm: changes(runs, size, arm, seeds) for arm in arms if arm != "uniform"}
    epochs = {
        arm: {
            name: t_interval([runs[size, arm, seed]["epochs"][name] for seed in seeds]).mean
            for name in restricted.train
        }
        for arm in arms
    }
    return Results(
        tables={
            "perplexity": tabulate_perplexity(runs, {size: arms}, seeds),
            "weights": tabulate_weights(learned, tuple(restricted.train)),
            "epochs": tabulate_epochs(epochs),
        },
        figures=round_figures({"change_percent": found, "cap_change_percent": cap_changes, "epochs": epochs}),
        plot=lambda path: plot_changes({size: found}, path, yardstick="average perplexity"),
    )


def tabulate_epochs(epochs: Mapping[str, Mapping[str, float]]) -> Table:
    """How often each arm went through each domain."""
    names = list(next(iter(epochs.values())))
    return Table(
        title="Epochs: how often a base run went through each domain, mean over seeds.",
        header=["arm", *names],
        cells=[[arm, *[f"{found[name]:.2f}" for name in names]] for arm, found in epochs.items()],
        rows=[
            {"arm": arm, "domain": name, "epochs": value}
            for arm, found in epochs.items()
            for name, value in found.items()
        ],
    )
