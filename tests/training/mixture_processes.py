"""
What the tests of DomainWeightedTrainer on several processes run in each process: trainings that note their rows.

As a script under `accelerate launch` it runs the plan in a JSON file, a list of functions of this module and their
arguments, and writes what each process has to tell.
"""

import json
import logging
import os
import sys
from functools import cache
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset, concatenate_datasets
from packaging.version import Version
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.sampling.streaming import interleave_domains, warn_that_all_processes_read_everything
from hf_doge.training.global_batch import examples_per_step, loader_lead
from hf_doge.training.mixture import DomainWeightedMixin, DomainWeightedTrainer

SIZES = {"wiki": 11, "code": 7, "arxiv": 5}  # 23 rows: an epoch is filled up to whole batches
WEIGHTS = {"wiki": 0.5, "code": 0.3, "arxiv": 0.2}
BATCH_SIZE = 4  # of all processes together
LAG = 48  # draws from a step's first to those that its weights take effect at: more than 4 workers fetch ahead


CANNOT_RESUME = "don't know how to restore data location"


def skip_if_it_could_not_resume(told):
    """transformers 5.0 cannot read a checkpoint back to the device of one of several processes on the CPU, `cpu:0`."""
    if CANNOT_RESUME in (told[0]["error"] or ""):
        pytest.skip(told[0]["error"])


SPLITS_STREAMS = Version(accelerate.__version__) >= Version("1.14")


class Line(torch.nn.Module):
    """The smallest model that a Trainer trains."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, row, labels):
        return {"loss": (self.slope * row - labels).square().mean() / 1000}


class SaveAt(TrainerCallback):
    """Saves a checkpoint after each of some steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


class NotingTrainer(DomainWeightedTrainer):
    """Keeps the row numbers of every micro-batch that reaches the training step, and how far the loader is ahead."""

    changes_weights = False

    def training_step(self, model, inputs, *args, **kwargs):
        step_begins = len(self.micro_batches) % self.args.gradient_accumulation_steps == 0
        self.micro_batches.append(inputs["row"].tolist())
        done = self.state.global_step * examples_per_step(self.args)
        self.leads.append(self.domain_sampler.next_draw - done)
        if self.changes_weights and step_begins:
            self.domain_sampler.set_weights(weights_of_step(self.state.global_step), first_draw=done + LAG)
        return super().training_step(model, inputs, *args, **kwargs)


def weights_of_step(step):
    """Weights that a step of the training comes to, and that take effect `LAG` draws after its first."""
    return {"wiki": 1 + step % 5, "code": 1 + step % 3, "arxiv": 1 + step % 2}


def domains(scale=1):
    """Row numbers count through all domains, so that they are what the sampler yields."""
    starts = {"wiki": 0, "code": 11 * scale, "arxiv": 18 * scale}
    return {name: numbered_rows(start, start + scale * SIZES[name]) for name, start in starts.items()}


@cache
def numbered_rows(start, stop):
    return Dataset.from_dict({"row": list(range(start, stop)), "labels": [1.0] * (stop - start)})


def arguments(folder, *, num_processes, split_batches=False, **options):
    """Arguments for the same global batch on any number of processes."""
    batch_size = BATCH_SIZE if split_batches else BATCH_SIZE // num_processes
    accelerator = {"split_batches": split_batches}
    for name in ("even_batches", "dispatch_batches", "use_seedable_sampler"):
        if name in options:
            accelerator[name] = options.pop(name)
    defaults = {
        "per_device_train_batch_size": batch_size,
        "use_cpu": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), accelerator_config=accelerator, **{**defaults, **options})


def train(
    folder,
    *,
    num_processes,
    resume=None,
    weights=WEIGHTS,
    scale=1,
    changes_weights=False,
    save_at=(),
    trainer_options=None,
    **options,
):
    """One training: the rows by micro-batch, the logged epochs of the domains, and the error that ended it, if any."""
    told = {"micro_batches": [], "leads": [], "error": None}
    try:
        args = arguments(folder, num_processes=num_processes, **options)
        trainer = NotingTrainer(
            Line(), args, train_dataset=domains(scale), domain_weights=weights, **(trainer_options or {})
        )
        trainer.add_callback(SaveAt(save_at))
        trainer.micro_batches, trainer.leads, trainer.changes_weights = (
            told["micro_batches"],
            told["leads"],
            changes_weights,
        )
        trainer.train(resume_from_checkpoint=resume)
    except (ValueError, RuntimeError) as error:
        told["error"] = str(error)
        return told
    told["num_samples"] = trainer.domain_sampler.num_samples
    told["loader_lead"] = loader_lead(args)
    told["effective_weights"] = trainer.domain_sampler.effective_weights
    told["domain_epochs"] = [
        {name.partition("/")[2]: value for name, value in entry.items() if name.startswith("domain_epochs/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return told


def train_apart(folder, *, num_processes, by_rank, **options):
    """A training of which each process is told something else."""
    return train(folder, num_processes=num_processes, **options, **by_rank[int(os.environ["RANK"])])


def streams(num_shards, scale=1):
    return {name: table.to_iterable_dataset(num_shards=num_shards) for name, table in domains(scale).items()}


class NotingPlainTrainer(Trainer):
    """The same notes from a Trainer that knows nothing of domains."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.micro_batches.append(inputs["row"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


class NotingStreamTrainer(DomainWeightedMixin, NotingPlainTrainer):
    """What a user's trainer would be."""


def train_on_streams(
    folder, *, num_processes, num_shards, scale=1, plain=False, resume=None, save_at=(), by_rank=None, **options
):
    """One training on streams: the rows by micro-batch, the warnings, and the error that ended it, if any."""
    told = {"micro_batches": [], "warnings": [], "error": None}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told["warnings"].append(record.getMessage())
    logging.getLogger("hf_doge").addHandler(handler)
    warn_that_all_processes_read_everything.cache_clear()
    weights = WEIGHTS if by_rank is None else by_rank[int(os.environ["RANK"])]
    try:
        args = arguments(folder, num_processes=num_processes, **options)
        if plain:
            mixed = interleave_domains(streams(num_shards, scale), weights, num_samples=1000)
            trainer = NotingPlainTrainer(Line(), args, train_dataset=mixed)
        else:
            trainer = NotingStreamTrainer(
                Line(), args, train_dataset=streams(num_shards, scale), domain_weights=weights
            )
        trainer.add_callback(SaveAt(save_at))
        trainer.micro_batches = told["micro_batches"]
        trainer.train(resume_from_checkpoint=resume)
    except (ValueError, RuntimeError) as error:
        told["error"] = str(error)
    logging.getLogger("hf_doge").removeHandler(handler)
    return told


def loop(folder, *, num_processes, split_batches=False, num_samples=24, seek=None, skip=None, **options):
    """Two epochs and a half of a loop without a Trainer; resumed at a draw by `seek`, or by accelerate's `skip`."""
    config = DataLoaderConfiguration(split_batches=split_batches, **options)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, seed=3, num_samples=num_samples)
    rows = concatenate_datasets(list(domains().values())).with_format("torch")
    batch_size = BATCH_SIZE if split_batches else BATCH_SIZE // num_processes
    loader = accelerator.prepare(DataLoader(rows, sampler=sampler, batch_size=batch_size))
    micro_batches = []
    if seek is not None:
        sampler.seek(seek)
        loader.set_epoch(sampler.epoch)
    elif skip is not None:
        loader.set_epoch(skip["epoch"])
        skipped = accelerator.skip_first_batches(loader, skip["batches"])
        sampler.set_epoch(skip["epoch"])
        micro_batches += [batch["row"].tolist() for batch in skipped]
        loader.set_epoch(skip["epoch"] + 1)
    while len(micro_batches) < 15:
        micro_batches += [batch["row"].tolist() for batch in loader]
    return {"micro_batches": micro_batches[:15], "error": None}


def expected_rows(start, stop, *, scale=1, weights=WEIGHTS, changes=(), **options):
    """Draws `[start, stop)` of the one stream, without any loader; `changes` are first draws and the weights there."""
    sizes = {name: size * scale for name, size in SIZES.items()}
    sampler = DomainWeightedSampler(sizes, weights, **{"seed": 3, "num_samples": 24, **options})
    for first_draw, changed in changes:
        sampler.set_weights(changed, first_draw=first_draw)
    return sampler.indices(start, stop).tolist()


def interleave(told):
    """The rows of all processes as one stream: micro-batch by micro-batch, and by rank inside each."""
    return [row for batches in zip(*(one["micro_batches"] for one in told), strict=True) for b in batches for row in b]


def main(plan_path):
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for entry in json.loads(Path(plan_path).read_text()):
        name, run = entry.pop("name"), globals()[entry.pop("run", "train")]
        told = run(num_processes=num_processes, **entry)
        Path(plan_path).with_name(f"{name}-{rank}.json").write_text(json.dumps(told))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
