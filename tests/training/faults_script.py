"""Learns domain weights on two processes and breaks as it is told; see test_learning_faults.py."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer
from tests.launch import end_process_group
from tests.tiny import three_domains, tiny_gpt2

STEPS = 6
RANK = int(os.environ.get("RANK", "0"))


class Beginning(TrainerCallback):
    """The step that a training began at."""

    step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


class FaultyTrainer(DoGETrainer):
    """
    A trainer with a fault: `{"kind": ..., "rank": ..., "step": ...}`, the step counted from 1.

    Kinds: `step` (killed between the forward passes of a step), `hang` (stopped there, neither dead nor alive), `term`
    (SIGTERM there, to this process), `term_all` (SIGTERM there, to the launcher, which passes it on), `checkpoint`
    (killed with half of the optimizer on disk), `random_state` (killed before it wrote its random state).
    """

    def __init__(self, *args, fault=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.fault, self.beginning = fault or {}, Beginning()
        self.add_callback(self.beginning)

    def is_at(self, *kinds, step):
        return self.fault.get("kind") in kinds and self.fault["rank"] == RANK and step == self.fault["step"]

    def die(self, signal_number=signal.SIGKILL):
        Path(self.args.output_dir, "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal_number)

    def compute_loss(self, *args, **kwargs):
        step = self.state.global_step + 1
        if self.is_at("step", step=step):
            self.die()
        if self.is_at("hang", step=step):
            self.die(signal.SIGSTOP)
        if self.is_at("term", "term_all", step=step):
            everyone = self.fault["kind"] == "term_all"
            os.kill(int(os.environ["LAUNCHER_PID"]) if everyone else os.getpid(), signal.SIGTERM)
            time.sleep(0.5 if everyone else 0.0)  # until it has come back
            self.fault = {}
        return super().compute_loss(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_at("checkpoint", step=self.state.global_step):
            optimizer = Path(output_dir, "optimizer.pt")
            optimizer.write_bytes(optimizer.read_bytes()[:-100])
            self.die()

    def _save_rng_state(self, output_dir):
        if self.is_at("random_state", step=self.state.global_step):
            self.die()
        super()._save_rng_state(output_dir)


def make_trainer(folder, *, fault=None, **options):
    """Dropout, AdamW, a schedule and micro-batches: whatever a checkpoint can lack shows in the result."""
    defaults = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "mu": 0.1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_backend": "gloo",
        "enable_jit_checkpoint": True,
    }
    args = DoGEConfig(str(folder), **{**defaults, **options})
    trainer = FaultyTrainer(tiny_gpt2(dropout=0.2), args, train_dataset=three_domains(16), fault=fault)
    return trainer


def main(folder, resume=False, fault=None, outcome="outcome", **options):
    """Learn into a folder; every process notes what came out and where it began."""
    trainer = make_trainer(folder, fault=fault, **options)
    trainer.train(resume_from_checkpoint=resume)
    note(trainer, Path(folder) / f"{outcome}-{RANK}.pt")


def note(trainer, path):
    learned = trainer.domain_weights
    torch.save(
        {
            "step": trainer.state.global_step,
            "weights": torch.from_numpy(learned.trajectory.weights),
            "scores": torch.from_numpy(learned.trajectory.scores),
            "mean": torch.tensor(list(learned.mean.values())),
            "parameters": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
            "began_at": trainer.beginning.step,
        },
        path,
    )


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        main(**job)
    end_process_group()
