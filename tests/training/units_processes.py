"""
A thousand steps on rows whose lengths differ tenfold, by shares of tokens: what the tests of units run, on one process or two.
"""

import sys

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from hf_doge.training.mixture import DomainWeightedTrainer
from tests.training.metrics_processes import arguments, logs_of, run_plan
from tests.training.mixture_processes import SaveAt

WEIGHTS = {"short": 0.5, "long": 0.3, "mixed": 0.2}
THEN = {"short": 0.2, "long": 0.2, "mixed": 0.6}


class Smallest(torch.nn.Module):
    """A model that reads tokens and learns next to nothing, fast."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, labels):
        return {"loss": (self.slope * input_ids[:, 0].float() - 1).square().mean() / 1000}


def pad(features):
    """Padding to the longest; all tokens count."""
    ids = [torch.tensor(feature["input_ids"]) for feature in features]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
    }


def domains():
    """Of 10 tokens, of 100, and of anything between."""
    generator = np.random.default_rng(0)
    lengths = {
        "short": generator.integers(8, 13, 300),
        "long": generator.integers(80, 121, 200),
        "mixed": generator.integers(10, 101, 100),
    }
    return {name: Dataset.from_dict({"input_ids": [[1] * n for n in found]}) for name, found in lengths.items()}


def train(folder, *, num_processes=1, streamed=False, weights=WEIGHTS, resume=None, save_at=(), **options):
    """What was logged at the end of each half."""
    data = domains()
    if streamed:
        data = {name: one.to_iterable_dataset() for name, one in data.items()}
    settings = {"max_steps": 1000, "logging_steps": 500, "gradient_accumulation_steps": 1, "disable_tqdm": True}
    settings |= {"accelerator_config": {"dispatch_batches": False}, **options}
    args = arguments(folder, num_processes=num_processes, **settings)
    trainer = DomainWeightedTrainer(
        Smallest(), args, train_dataset=data, domain_weights=weights, unit="tokens", data_collator=pad
    )
    trainer.add_callback(SaveAt(save_at))
    trainer.train(resume_from_checkpoint=resume)
    return logs_of(trainer)


if __name__ == "__main__":
    run_plan(train, sys.argv[1])
