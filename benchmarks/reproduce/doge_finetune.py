"""
DoGE in fine-tuning: several labelled sources, one target of which only a few hundred examples are known.

    python -m benchmarks.reproduce doge_finetune --data_dir ../shared/data --output_dir outputs/reproduce

Written before any run of this module:

- **Task.** Yes-or-no instructions; only the answer is scored. Sources: hate_davidson (offensive?), sst2 (positive?), ag_news (sports?),
  snli (follows?), each balanced between yes and no. Target: toxicity_jigsaw (offensive?), asked as hate_davidson is. 512 labelled
  examples of the target give gradients and train no model.
- **Model (small).** 2 layers of width 64 (163,136 parameters), pre-trained here for 400 steps of 32 blocks of 64 tokens on the eight English
  domains in equal parts; every arm and seed starts from it.
- **Arms.** uniform; natural (by examples); *nearest* (hate_davidson alone, by its question); *two-stage* (a copy of the model learns
  the weights in 200 steps, then the model is tuned on them); *online* (the model is tuned while the weights that draw its examples are
  learned, every 5 steps). Both learn by the authors' recipe. 200 steps of 32 examples each; the extra examples of online and the
  first stage of two-stage come on top. Three seeds (order of the data and choice of examples).
- **mu.** By one rule on seed 0, which is not reported, and from the weights alone: heaviest source between .4 and .7 (uniform: .25) in the mean. See
  `OPTIONS`.
- **Stages.** `core`: the five arms above. `batches`, added after the first results, in which the learned weights were another source's in every seed: both
  ways with more examples behind each gradient, two-stage with 32 of each source (8 in `core`) and 128 of the target (8), online, whose training
  batch is the base run's, with 128 of the target. mu as before. Is it the noise of the score?
- **Measure.** Loss of the answer on 1,600 balanced test questions of the target, and accuracy. An arm *helps* if the 95 %
  t interval over seeds of its change in loss against uniform lies below 0.

Last line: by arm the change in target loss (nats) and in accuracy (points) against uniform, `[mean, low, high]`, and learned weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.doge_universal import format_change, round_figures
from benchmarks.reproduce.finetune_tasks import collate_questions, evaluate_answers, load_questions
from benchmarks.reproduce.language_models import (
    TextSettings,
    TrainingSettings,
    load_text,
    new_model,
    plain,
    train_base,
    train_silently,
)
from benchmarks.reproduce.plots import plot_changes
from benchmarks.reproduce.report import Results, Table
from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.evaluation.intervals import t_interval
from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.trainer import DoGETrainer

SOURCES = ("hate_davidson", "sst2", "ag_news", "snli")
TARGET = "toxicity_jigsaw"
NEAREST = "hate_davidson"
STAGES = ("core", "batches")
LARGER_BATCHES = {"two-stage, large batches": "two-stage", "online, large target batch": "online"}
BATCH_FACTOR = 4
ARMS = {
    "core": ("uniform", "natural", "nearest", "two-stage", "online"),
    "batches": tuple(LARGER_BATCHES),
}
OPTIONS = {
    "two-stage": {"recipe": "official", "mu": 0.01},
    "online": {"recipe": "official", "mu": 0.002, "mode": "online", "reweight_steps": 5},
}


@dataclass(frozen=True)
class Settings:
    """Sizes of one scale."""

    text: TextSettings
    size: str
    pretraining: TrainingSettings
    tuning: TrainingSettings
    num_source: int
    num_target: int
    num_test: int
    length: int
    seeds: tuple[int, ...]


SCALES = {
    "tiny": Settings(
        text=TextSettings(300, 16, 1600, 320),
        size="nano",
        pretraining=TrainingSettings(1, 8, 3e-3, 1),
        tuning=TrainingSettings(3, 8, 1e-3, 1),
        num_source=16,
        num_target=8,
        num_test=8,
        length=24,
        seeds=(1,),
    ),
    "small": Settings(
        text=TextSettings(1024, 64, None, 32_768),
        size="nano",
        pretraining=TrainingSettings(400, 32, 3e-3, 20),
        tuning=TrainingSettings(200, 32, 2e-3, 20),
        num_source=6000,
        num_target=512,
        num_test=1600,
        length=64,
        seeds=(1, 2, 3),
    ),
    "gpu": Settings(
        text=TextSettings(16_384, 512),
        size="82m",
        pretraining=TrainingSettings(10_000, 128, 5e-4, 500, bf16=True),
        tuning=TrainingSettings(500, 64, 5e-5, 50, bf16=True),
        num_source=6000,
        num_target=512,
        num_test=1600,
        length=128,
        seeds=(1, 2, 3),
    ),
}


def options_of(arm: str, tuning: TrainingSettings) -> dict[str, Any] | None:
    """What an arm that learns gives to `DoGEConfig`; `None` for the others."""
    if arm not in LARGER_BATCHES:
        return OPTIONS.get(arm)
    larger = BATCH_FACTOR * tuning.batch_size
    options = {**OPTIONS[LARGER_BATCHES[arm]], "per_device_target_batch_size": larger}
    return options if options.get("mode") == "online" else {**options, "per_device_train_batch_size": larger}


class FineTuning:
    """The parts of the experiment."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.settings = settings = SCALES[args.scale]
        self.data = load_text(args.data_dir / "lm", settings.text, args.output_dir.parent / "text")
        self.base_folder = args.output_dir / "pretrained"
        self.key = {"fingerprints": self.data.fingerprints, "size": settings.size}

    def pretrain(self) -> None:
        """The model that every arm starts from."""
        settings, data = self.settings, self.data
        self.args.store.get(
            "pretraining",
            {**self.key, "training": plain(settings.pretraining)},
            lambda: train_base(
                new_model(settings.size, data, settings.text.block_size, seed=0),
                settings.pretraining,
                train=data.train,
                validation=data.validation,
                weights=DomainWeights.uniform(list(data.train)).mean,
                seed=0,
                folder=self.base_folder,
                saves_model=True,
            ),
        )

    def questions(self, name: str, split: str, num_examples: int, seed: int) -> Any:
        """Questions of one set."""
        return load_questions(
            self.args.data_dir / "classification",
            name,
            split,
            self.data.tokenizer,
            num_examples=num_examples,
            length=self.settings.length,
            seed=seed,
        )

    def tune(self, arm: str, seed: int) -> dict[str, Any]:
        """Tune with one arm and seed: answer `loss` and `accuracy` on the target, and the `weights` of the sources."""
        settings = self.settings
        key = {**self.key, "pretraining": plain(settings.pretraining), "tuning": plain(settings.tuning)}
        sizes = {"source": settings.num_source, "target": settings.num_target, "test": settings.num_test}
        key |= {
            "arm": arm,
            "options": options_of(arm, settings.tuning),
            "sizes": sizes,
            "length": settings.length,
            "seed": seed,
        }
        return self.args.store.get(f"tuned-{_file_name(arm)}-seed{seed}", key, lambda: self._tune(arm, seed))

    def _tune(self, arm: str, seed: int) -> dict[str, Any]:
        settings = self.settings
        train = {name: self.questions(name, "train", settings.num_source, seed) for name in SOURCES}
        target = {TARGET: self.questions(TARGET, "train", settings.num_target, seed)}
        test = self.questions(TARGET, "test", settings.num_test, 0)
        folder = self.args.output_dir / "tuned" / f"{_file_name(arm)}-seed{seed}"
        options = options_of(arm, settings.tuning)
        if options is not None:
            model, weights = self._learn(options, train, target, seed, folder)
        elif arm == "nearest":
            weights = {name: float(name == NEAREST) for name in SOURCES}
        else:
            counts = {name: len(rows) if arm == "natural" else 1 for name, rows in train.items()}
            weights = DomainWeights.from_mapping(counts).mean
        if options is None or options.get("mode") != "online":
            model = self._tune_on(weights, train, seed, folder)
        return {**evaluate_answers(model, test, self.data.tokenizer), "weights": weights}

    def _learn(
        self, options: Mapping[str, Any], train: Mapping, target: Mapping, seed: int, folder: Path
    ) -> tuple[PreTrainedModel, dict[str, float]]:
        """The model that learned the weights, and the weights, which are saved as an artifact too."""
        set_seed(seed)
        arguments = {"recipe": "paper", **self.settings.tuning.to_arguments(), **options}
        trainer = DoGETrainer(
            AutoModelForCausalLM.from_pretrained(self.base_folder),
            DoGEConfig(output_dir=str(folder), seed=seed, **arguments),
            train_dataset=dict(train),
            target_dataset=dict(target),
            data_collator=collate_questions,
        )
        train_silently(trainer)
        trainer.domain_weights.save_pretrained(folder / "domain_weights")
        return trainer.model, trainer.domain_weights.mean

    def _tune_on(self, weights: Mapping[str, float], train: Mapping, seed: int, folder: Path) -> PreTrainedModel:
        set_seed(seed)
        trainer = DomainWeightedTrainer(
            AutoModelForCausalLM.from_pretrained(self.base_folder),
            TrainingArguments(output_dir=str(folder), seed=seed, **self.settings.tuning.to_arguments()),
            train_dataset=dict(train),
            domain_weights=dict(weights),
            data_collator=collate_questions,
        )
        train_silently(trainer)
        return trainer.model


def run(args: Arguments) -> Results:
    """Run all arms and tabulate them."""
    stages = args.choose_stages(STAGES)
    tuning = FineTuning(args)
    tuning.pretrain()
    seeds = args.seeds or tuning.settings.seeds
    arms = [*ARMS["core"], *(ARMS["batches"] if "batches" in stages else ())]  # all are compared with `core`
    runs = {(arm, seed): tuning.tune(arm, seed) for seed in seeds for arm in arms}

    def change(arm: str, measure: str, factor: float) -> list[float | None]:
        interval = t_interval([factor * (runs[arm, seed][measure] - runs["uniform", seed][measure]) for seed in seeds])
        return [interval.mean, interval.low, interval.high]

    compared = [arm for arm in arms if arm != "uniform"]
    found = {arm: {"loss": change(arm, "loss", 1), "accuracy": change(arm, "accuracy", 100)} for arm in compared}
    weights = {
        arm: {name: t_interval([runs[arm, seed]["weights"][name] for seed in seeds]) for name in SOURCES}
        for arm in arms
    }
    cells = [
        [
            arm,
            t_interval([runs[arm, seed]["loss"] for seed in seeds]).format(4),
            "" if arm == "uniform" else _format_loss_change(found[arm]["loss"]),
            t_interval([100 * runs[arm, seed]["accuracy"] for seed in seeds]).format(1),
            "" if arm == "uniform" else format_change(found[arm]["accuracy"]),
            *[f"{weights[arm][name].mean:.3f}" for name in SOURCES],
        ]
        for arm in arms
    ]
    table = Table(
        title=(
            f"Answer loss (nats, lower is better) and accuracy (%) on {TARGET}, which is not trained on: mean [95 % t interval] "
            f"over {len(seeds)} seeds, and changes against uniform, seed against seed (bold: the interval excludes 0). Then "
            "the weights of the sources (of online: their mean over the run)."
        ),
        header=["arm", "loss", "change", "accuracy", "change", *SOURCES],
        cells=cells,
        rows=[
            {
                "arm": arm,
                "seed": seed,
                "loss": runs[arm, seed]["loss"],
                "accuracy": runs[arm, seed]["accuracy"],
                **{f"weight_{name}": runs[arm, seed]["weights"][name] for name in SOURCES},
            }
            for arm in arms
            for seed in seeds
        ],
    )
    figures = {"change": found, "weights": {a: {n: i.mean for n, i in of.items()} for a, of in weights.items()}}
    return Results(
        tables={"target": table},
        figures=round_figures(figures),
        plot=lambda path: plot_changes({"target": found}, path, yardstick="loss of the target's answers", unit="nats"),
    )


def _file_name(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "-")


def _format_loss_change(change: list[float | None]) -> str:
    mean, low, high = change
    if low is None or high is None:
        return f"{mean:+.4f} (one seed)"
    text = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
