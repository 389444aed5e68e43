"""
What the tests of DomainWeightedTrainer on several processes run in each process: trainings that note their rows.

As a script under `accelerate launch` it runs the plan in a JSON file, a list of `train` arguments, and writes what each
process has to tell.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.training.mixture import DomainWeightedTrainer

SIZES = {"wiki": 11, "code": 7, "arxiv": 5}  # 23 rows: an epoch is filled up to whole batches
WEIGHTS = {"wiki": 0.5, "code": 0.3, "arxiv": 0.2}
BATCH_SIZE = 4  # of all processes together


class Line(torch.nn.Module):
    """The smallest model that a Trainer trains."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, row, labels):
        return {"loss": (self.slope * row - labels).square().mean() / 1000}


class NotingTrainer(DomainWeightedTrainer):
    """Keeps the row numbers of every micro-batch that reaches the training step."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.micro_batches.append(inputs["row"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def domains():
    """Row numbers count through all domains, so that they are what the sampler yields."""
    starts = {"wiki": 0, "code": 11, "arxiv": 18}
    return {
        name: Dataset.from_dict({"row": list(range(start, start + SIZES[name])), "labels": [1.0] * SIZES[name]})
        for name, start in starts.items()
    }


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


def train(folder, *, num_processes, resume=None, weights=WEIGHTS, trainer_options=None, **options):
    """One training: the rows by micro-batch, the logged epochs of the domains, and the error that ended it, if any."""
    told = {"micro_batches": [], "domain_epochs": [], "error": None}
    try:
        args = arguments(folder, num_processes=num_processes, **options)
        trainer = NotingTrainer(
            Line(), args, train_dataset=domains(), domain_weights=weights, **(trainer_options or {})
        )
        trainer.micro_batches = told["micro_batches"]
        trainer.train(resume_from_checkpoint=resume)
    except (ValueError, RuntimeError) as error:
        told["error"] = str(error)
        return told
    told["num_samples"] = trainer.domain_sampler.num_samples
    told["effective_weights"] = trainer.domain_sampler.effective_weights
    told["domain_epochs"] = [
        {name.partition("/")[2]: value for name, value in entry.items() if name.startswith("domain_epochs/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return told


def expected_rows(start, stop, **options):
    """Draws `[start, stop)` of the one stream, without any loader."""
    return DomainWeightedSampler(SIZES, WEIGHTS, seed=3, num_samples=24, **options).indices(start, stop).tolist()


def interleave(told):
    """The rows of all processes as one stream: micro-batch by micro-batch, and by rank inside each."""
    return [row for batches in zip(*(one["micro_batches"] for one in told), strict=True) for b in batches for row in b]


def main(plan_path):
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for entry in json.loads(Path(plan_path).read_text()):
        name = entry.pop("name")
        told = train(num_processes=num_processes, **entry)
        Path(plan_path).with_name(f"{name}-{rank}.json").write_text(json.dumps(told))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
