"""
Downstream: the base models of `doge_universal` scored with lm-evaluation-harness, through its Python API.

    pip install 'hf-doge[few-shot]'
    python -m benchmarks.reproduce few_shot --data_dir ../shared/data --output_dir outputs/reproduce

Written before any run of this module:

- **Tasks.** One for each of the eight English domains, made of its validation text and written to `OUTPUT_DIR/few_shot/tasks`: 90 characters of a document,
  and which of four continuations of 45 characters is its own (the others come from other documents of the domain). Chance is 25 %. 64 questions a domain
  at this scale. Besides, by their names in the harness, the six tasks the paper reports: copa, sciq, logiqa, piqa, wic, winogrande; where their
  datasets cannot be reached they are left out and a note says so.
- **Shots.** The paper gives five examples. Models of blocks of 64 tokens have no room for them: 0 examples at the tiny and small scales, 5 at gpu.
- **Models.** The arms of the stages `core` and `arms` of `doge_universal` at the smaller size, five seeds; missing ones are trained.
- **Measure.** Accuracy; an arm *helps* if the 95 % t interval over seeds of the change in mean accuracy over the local tasks
  against uniform lies above 0. With 512 questions one standard error of one model is 2 points, so only large
  effects can show.

Last line: by arm the change in mean accuracy in points, `[mean, low, high]`, and the tasks that were left out.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.doge_universal import ARMS, Universal, format_change, round_figures
from benchmarks.reproduce.machine import describe_data
from benchmarks.reproduce.plots import plot_changes
from benchmarks.reproduce.report import Results, Table
from benchmarks.reproduce.store import PartStore
from hf_doge.data.domain_files import find_domain_files, read_documents
from hf_doge.evaluation.intervals import t_interval

PUBLIC_TASKS = ("copa", "sciq", "logiqa", "piqa", "wic", "winogrande")
CONTEXT_CHARS, CONTINUATION_CHARS, NUM_CHOICES = 90, 45, 4


@dataclass(frozen=True)
class Settings:
    """Sizes of one scale."""

    num_questions: int
    num_fewshot: int
    arms: tuple[str, ...]


SCALES = {
    "tiny": Settings(num_questions=4, num_fewshot=0, arms=("uniform", "natural")),
    "small": Settings(num_questions=64, num_fewshot=0, arms=ARMS),
    "gpu": Settings(num_questions=500, num_fewshot=5, arms=ARMS),
}


def run(args: Arguments) -> Results:
    """Score all models, or say what is missing."""
    args.choose_stages(())
    if importlib.util.find_spec("lm_eval") is None:
        note = "Skipped: few_shot needs lm-evaluation-harness. Install it: pip install 'hf-doge[few-shot]'."
        return Results(tables={}, figures={"skipped": note}, notes=[note])
    settings = SCALES[args.scale]
    folder = args.output_dir.parent / "doge_universal"
    store = PartStore(folder / "parts")
    store.belongs_to(scale=args.scale, data=describe_data(args.data_dir))
    universal = Universal(dataclasses.replace(args, name="doge_universal", output_dir=folder, store=store))
    seeds = args.seeds or universal.settings.seeds
    local = write_tasks(args.data_dir / "lm", args.output_dir / "tasks", settings)
    public, left_out = find_public_tasks()
    accuracy = {
        (arm, seed): score(args, universal, arm, seed, local, public) for seed in seeds for arm in settings.arms
    }
    names = [*local, *public]
    means = {key: float(np.mean([found[name] for name in local])) for key, found in accuracy.items()}
    changes = {}
    for arm in settings.arms:
        if arm != "uniform":
            interval = t_interval([100 * (means[arm, seed] - means["uniform", seed]) for seed in seeds])
            changes[arm] = {"accuracy": [interval.mean, interval.low, interval.high]}
    cells = [
        [
            arm,
            t_interval([100 * means[arm, seed] for seed in seeds]).format(1),
            format_change(changes[arm]["accuracy"] if arm in changes else None),
            *[f"{100 * t_interval([accuracy[arm, seed][name] for seed in seeds]).mean:.1f}" for name in names],
        ]
        for arm in settings.arms
    ]
    table = Table(
        title=(
            f"Accuracy in percent, {settings.num_fewshot} examples given, higher is better: mean [95 % t interval] over {len(seeds)} "
            f"seeds of the mean over the {len(local)} local tasks (chance: {100 / NUM_CHOICES:.0f}), its change against uniform in points, and "
            "each task."
        ),
        header=["arm", "local tasks", "change", *[name.removeprefix("local_") for name in names]],
        cells=cells,
        rows=[
            {"arm": arm, "seed": seed, "task": name, "accuracy": found[name]}
            for (arm, seed), found in accuracy.items()
            for name in names
        ],
    )
    notes = [f"Left out, because its data cannot be reached: {name} ({reason})." for name, reason in left_out.items()]
    return Results(
        tables={"accuracy": table},
        figures=round_figures({"change_points": changes, "left_out": sorted(left_out)}),
        plot=lambda path: plot_changes(
            {"local tasks": changes}, path, yardstick="accuracy", unit="points", better="right"
        ),
        notes=notes,
    )


def write_tasks(data_dir: Path, folder: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """Write the questions of each domain as JSONL, and give the harness's configuration of each task by name."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for domain, files in find_domain_files(data_dir).items():
        path = folder / f"{domain}.jsonl"
        questions = make_questions(list(read_documents(files["validation"])), settings.num_questions)
        path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
        tasks[f"local_{domain}"] = {
            "task": f"local_{domain}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",
            "num_fewshot": settings.num_fewshot,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    return tasks


def make_questions(documents: list[str], num_questions: int) -> list[dict[str, Any]]:
    """
    Which continuation is the document's own? The same documents always give the same questions.

    Raises:
        `ValueError`: with fewer long documents than there are choices.
    """
    length = CONTEXT_CHARS + CONTINUATION_CHARS
    documents = [" ".join(document.split()) for document in documents]
    documents = [document for document in documents if len(document) >= length]
    if len(documents) < NUM_CHOICES:
        raise ValueError(
            f"Questions need at least {NUM_CHOICES} documents of {length} characters, but got {len(documents)}. Add text."
        )
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(num_questions):
        chosen = rng.choice(len(documents), size=NUM_CHOICES, replace=False)
        cuts = [int(rng.integers(CONTEXT_CHARS, len(documents[i]) - CONTINUATION_CHARS + 1)) for i in chosen]
        pieces = [documents[i][cut : cut + CONTINUATION_CHARS] for i, cut in zip(chosen, cuts, strict=True)]
        order = rng.permutation(NUM_CHOICES)
        questions.append(
            {
                "context": documents[chosen[0]][cuts[0] - CONTEXT_CHARS : cuts[0]],
                "choices": [pieces[position] for position in order],
                "label": int(np.flatnonzero(order == 0)[0]),
            }
        )
    return questions


def find_public_tasks() -> tuple[list[str], dict[str, str]]:
    """The public tasks whose data can be reached, and the others with the reason."""
    from lm_eval.tasks import TaskManager

    found, left_out = [], {}
    manager = TaskManager()
    for name in PUBLIC_TASKS:
        try:
            manager.load(name)
        except OSError as error:  # what datasets and huggingface_hub raise without a connection
            left_out[name] = str(error).splitlines()[0]
        else:
            found.append(name)
    return found, left_out


def score(
    args: Arguments, universal: Universal, arm: str, seed: int, local: Mapping[str, dict], public: list[str]
) -> dict[str, float]:
    """Accuracy of one base model on each task."""
    size = universal.settings.base_sizes[0]
    base = universal.base(arm, seed, size=size)
    folder = universal.model_folder(arm, seed)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"The base model of {arm!r} with seed {seed} must be in {str(folder)!r}, but it is gone. Delete its part "
            f"base-{size}-{arm}-seed{seed}-*.json in {str(universal.args.store.folder)!r} to train it again."
        )
    settings = SCALES[args.scale]
    key = {"losses": base["losses"], "arm": arm, "seed": seed, "settings": dataclasses.asdict(settings)}
    return args.store.get(
        f"score-{arm}-seed{seed}", {**key, "public": public}, lambda: _score(folder, universal, local, public)
    )


def _score(folder: Path, universal: Universal, local: Mapping[str, dict], public: list[str]) -> dict[str, float]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    device = str(universal.args.device)
    model = HFLM(
        pretrained=model.to(device),
        tokenizer=universal.data.tokenizer,
        backend="causal",
        device=device,
        batch_size=64,
    )
    found = simple_evaluate(
        model=model,
        tasks=[*local.values(), *public],
        num_fewshot=SCALES[universal.args.scale].num_fewshot,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: float(entry["acc,none"]) for name, entry in found["results"].items()}
