"""Learns domain weights from streams, on one process or under `accelerate launch`; see test_learning_streams.py."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset

from hf_doge.training.collator import DOMAIN_IDS
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_gpt2
from tests.tiny import language_model_rows, three_domains
from tests.training.learning_script import note

NAMES = ("arxiv", "books", "code")
STEPS = 6


class NotingTrainer(DoGETrainer):
    """Keeps what every micro-batch held when it reached the training step: domains, and first tokens."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.domains_seen.append(inputs[DOMAIN_IDS].tolist())
        self.tokens_seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def make_streams(num_shards=1):
    """Domains of 16 rows, the second of which is shuffled through a buffer; none is long enough for the training."""
    streams = {name: rows.to_iterable_dataset(num_shards=num_shards) for name, rows in three_domains(16).items()}
    return {**streams, "books": streams["books"].shuffle(seed=1, buffer_size=5)}


def make_trainer(
    folder, *, streams=None, num_shards=1, num_processes=1, with_target=True, dropout=0.0, accelerator=None, **options
):
    """A global batch of 12 by default, in three micro-batches on each process."""
    defaults = {
        "per_device_train_batch_size": 4 // num_processes,
        "gradient_accumulation_steps": 3,
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "mu": 0.1,
        "report_to": "none",
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        "accelerator_config": accelerator,
    }
    target = Dataset.from_dict(language_model_rows(20, low=5, high=30, seed=9)) if with_target else None
    trainer = NotingTrainer(
        tiny_gpt2(dropout=dropout),
        DoGEConfig(str(folder), **{**defaults, **options}),
        train_dataset=make_streams(num_shards) if streams is None else streams,
        target_dataset=target,
    )
    trainer.domains_seen, trainer.tokens_seen = [], []
    return trainer


def main(plan):
    """Train every entry of the plan, and write what each process has to tell beside the checkpoints."""
    for entry in plan:
        folder, resume = Path(entry.pop("folder")), entry.pop("resume", None)
        name = "resumed" if resume else "whole"
        trainer = make_trainer(folder, num_processes=2, **entry)
        trainer.train(resume_from_checkpoint=resume)
        rank = trainer.args.process_index
        note(trainer, folder / f"{name}-{rank}.pt")
        (folder / f"{name}-{rank}.json").write_text(json.dumps([trainer.domains_seen, trainer.tokens_seen]))
        torch.distributed.barrier()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
