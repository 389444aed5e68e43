"""
Trainings that log their domains, on one process or several: what the tests of these logs run.

As a script in a process group it runs the plan in a JSON file, and the first process writes what was logged.
"""

import json
import os
import sys
from pathlib import Path

from datasets import concatenate_datasets
from transformers import Trainer, TrainingArguments

from hf_doge.training.metrics_callback import DomainMetricsCallback
from hf_doge.training.mixture import DomainWeightedTrainer
from tests.launch import end_process_group
from tests.one_layer import tiny_llama
from tests.tiny import three_domains
from tests.training.mixture_processes import CANNOT_RESUME, SaveAt, skip_if_it_could_not_resume

WEIGHTS = {"arxiv": 0.5, "books": 0.2, "code": 0.3}
BATCH_SIZE = 4  # of all processes together


def arguments(folder, cls=TrainingArguments, *, num_processes=1, **options):
    defaults = {
        "per_device_train_batch_size": BATCH_SIZE // num_processes,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 2,
        "use_cpu": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.01,
    }
    return cls(str(folder), **{**defaults, **options})


def labelled(num_examples=8, **options):
    """One data set of all domains, with a column that names them."""
    return concatenate_datasets(
        [
            data.add_column("domain", [name] * num_examples)
            for name, data in three_domains(num_examples, **options).items()
        ]
    )


def make_trainer(kind, args):
    """A trainer whose batches hold rows with different numbers of labels."""
    if kind == "callback":
        trainer = Trainer(tiny_llama(), args, train_dataset=labelled(masked=0.3))
        trainer.add_callback(DomainMetricsCallback(trainer))
        return trainer
    data = three_domains(8, masked=0.3)
    if kind == "streams":
        data = {name: one.to_iterable_dataset() for name, one in data.items()}
    return DomainWeightedTrainer(tiny_llama(), args, train_dataset=data, domain_weights=WEIGHTS)


def logs_of(trainer):
    """What was logged of domains, by step."""
    found = {}
    for entry in trainer.state.log_history:
        of_domains = {name: value for name, value in entry.items() if name.startswith("domain_")}
        found.setdefault(entry["step"], {}).update(of_domains)
    return {step: entry for step, entry in found.items() if entry}


def train(folder, *, kind, num_processes=1, save_at=(), resume=None, **options):
    trainer = make_trainer(kind, arguments(folder, num_processes=num_processes, **options))
    trainer.add_callback(SaveAt(save_at))
    if kind == "callback":  # which must be last to know of what others ask for
        trainer.add_callback(trainer.pop_callback(DomainMetricsCallback))
    trainer.train(resume_from_checkpoint=resume)
    return logs_of(trainer)


def read_told(folder, name):
    """What a training of a plan told, by step."""
    told = json.loads((folder / f"{name}.json").read_text())
    skip_if_it_could_not_resume([{"error": None, **told}])
    return {int(step): entry for step, entry in told.items()}


def run_plan(train, plan_path):
    """Run the trainings that a JSON file lists; the first process writes what each tells, beside it: see `read_told`."""
    for entry in json.loads(Path(plan_path).read_text()):
        name = entry.pop("name")
        try:
            told = train(num_processes=int(os.environ["WORLD_SIZE"]), **entry)
        except RuntimeError as error:
            if CANNOT_RESUME not in str(error) or entry.get("resume") is None:
                raise
            told = {"error": str(error)}
        if os.environ["RANK"] == "0":
            Path(plan_path).with_name(f"{name}.json").write_text(json.dumps(told))
    end_process_group()


if __name__ == "__main__":
    run_plan(train, sys.argv[1])
