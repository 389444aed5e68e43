"""
Trainings on texts that trl packs, on one process or several: what the tests of packing run.

As a script in a process group it runs the plan in a JSON file, and the first process writes what all of them tell.
"""

import sys
from dataclasses import dataclass

from accelerate.utils import gather_object
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedMixin
from hf_doge.training.packing import EXAMPLE_LENGTHS
from hf_doge.training.trainer import DoGEMixin
from tests.tiny import language_model_rows, tiny_llama, tiny_tokenizer
from tests.training.metrics_processes import WEIGHTS, arguments, logs_of, run_plan
from tests.training.mixture_processes import SaveAt

LENGTHS = (8, 6, 5, 5, 3, 3, 2, 7, 9)  # of the texts of a domain, which fill three rows of 16 tokens
LOW = {"arxiv": 1, "books": 9, "code": 19}

KINDS = {
    "bfd": {"packing": True, "max_length": 16},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding_free": {"padding_free": True, "max_length": None},
}
LEARNING = {
    "proxy": {"max_steps": 4, "mu": 0.1},
    "online": {"max_steps": 4, "mu": 1e-2, "mode": "online", "reweight_steps": 2, "sampler_lag_steps": 2},
}


def packable(*, masked=0.0, unlabelled_starts=False):
    """Three domains of texts of these lengths, over parts of the vocabulary of their own; none without a label that counts."""
    domains = {}
    for position, (name, low) in enumerate(LOW.items()):
        rows = language_model_rows(len(LENGTHS), low=low, high=low + 8, length=9, seed=position, masked=masked)
        cut = {key: [row[:n] for row, n in zip(values, LENGTHS, strict=True)] for key, values in rows.items()}
        for ids, labels in zip(cut["input_ids"], cut["labels"], strict=True):
            labels[1] = ids[1]
            if unlabelled_starts:
                labels[0] = -100
        domains[name] = Dataset.from_dict(cut)
    return domains


def targets():
    return Dataset.from_dict({"input_ids": [[20, 21, 22, 23, 24], [25, 24, 23], [22, 20, 24, 21]]})


def examples_of(inputs):
    """The tokens of each packed row of a batch."""
    ids = inputs["input_ids"]
    if EXAMPLE_LENGTHS in inputs:
        return [row.tolist() for row in ids[0].split(inputs[EXAMPLE_LENGTHS].tolist())]
    return [row[mask.bool()].tolist() for row, mask in zip(ids, inputs["attention_mask"], strict=True)]


class Noting:
    """Keeps the packed rows of each micro-batch, of all processes in the order of their ranks."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.micro_batches.append(gather_object(examples_of(inputs)))
        return super().training_step(model, inputs, *args, **kwargs)


class Weighted(Noting, DomainWeightedMixin, SFTTrainer):
    pass


class Learning(Noting, DoGEMixin, SFTTrainer):
    pass


@dataclass
class LearningConfig(DoGEConfig, SFTConfig):
    pass


def run(folder, *, kind, num_processes=1, learns=None, save_at=(), resume=None, **options):
    """What must not depend on the number of processes, nor on an interruption, of a training on packed texts."""
    defaults = {"bf16": False, "gradient_checkpointing": False, "optim": "sgd", "logging_steps": 1, "max_steps": 4}
    options = {**defaults, **KINDS[kind], **LEARNING.get(learns, {}), **options}
    args = arguments(folder, LearningConfig if learns else SFTConfig, num_processes=num_processes, **options)
    own = {"domain_weights": WEIGHTS} if learns is None else {"target_dataset": targets()}
    trainer = (Learning if learns else Weighted)(
        model=tiny_llama(), args=args, train_dataset=packable(masked=0.3), processing_class=tiny_tokenizer(), **own
    )
    trainer.micro_batches = []
    trainer.add_callback(SaveAt(save_at))
    trainer.train(resume_from_checkpoint=resume)
    told = {"rows": trainer.micro_batches, "logs": {str(step): logs for step, logs in logs_of(trainer).items()}}
    if learns:
        found = trainer.domain_weights.trajectory
        told |= {name: getattr(found, name).tolist() for name in ("weights", "scores", "losses")}
        told["is_plain"] = getattr(trainer._learner.alignment, "_is_plain", True)
    return told


if __name__ == "__main__":
    run_plan(run, sys.argv[1])
