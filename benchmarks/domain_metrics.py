"""
What the loss, tokens, share and epochs of each domain add to a training step: one trainer, with and without, step by step.

    python -m benchmarks.domain_metrics

A small Llama (`--layers 4 --width 256 --vocabulary 8000`) takes the same micro-batches of `--batch-size 4` texts of
`--length 64` tokens, by turns with what is logged and without; turns change places. Trainer and trl's SFTTrainer are
measured, both with `DomainWeightedMixin`. A turn is one `training_step`, forward and backward, without the optimizer; on the CPU
its CPU seconds, on a GPU the time until it is idle. Every tenth turn with them collects what is logged, as `logging_steps=10`
does. The overhead is the median over the turns of `with / without - 1`, the interval that of 90 % by the bootstrap over turns.
The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from hf_doge.training.mixture import DomainWeightedMixin, DomainWeightedTrainer

NUM_DOMAINS = 7
LOGGING_STEPS = 10


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama that knows nothing."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
            max_position_embeddings=options.length,
            use_cache=False,
        )
    )


def make_domains(options: argparse.Namespace) -> dict[str, Dataset]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (2 * options.batch_size, options.length)
    domains = {}
    for number in range(NUM_DOMAINS):
        ids = torch.randint(4, options.vocabulary, size, generator=generator).tolist()
        domains[f"domain{number}"] = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return domains


def make_trainer(kind: str, options: argparse.Namespace, folder: str) -> Trainer:
    """A trainer of either kind."""
    settings = {
        "per_device_train_batch_size": options.batch_size,
        "max_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": options.device == "cpu",
        "bf16": options.device != "cpu",
    }
    domains = make_domains(options)
    shared = {"train_dataset": domains, "domain_weights": dict.fromkeys(domains, 1.0)}
    if kind == "trainer":
        args = TrainingArguments(folder, **settings)
        return DomainWeightedTrainer(make_model(options), args, data_collator=default_data_collator, **shared)
    from trl import SFTConfig, SFTTrainer

    class SFTOnDomains(DomainWeightedMixin, SFTTrainer):
        """What a user would write."""

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(options.vocabulary)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    args = SFTConfig(folder, max_length=options.length, gradient_checkpointing=False, **settings)
    return SFTOnDomains(make_model(options), args, processing_class=tokenizer, **shared)


def prepare(trainer: Trainer) -> list[Callable[[], Any]]:
    """A training of one step, which prepares everything, and then one call for each micro-batch."""
    trainer.train()
    model = trainer.model
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(4), strict=False)]

    def step(batch: dict[str, Any]) -> Callable[[], Any]:
        num_items = (batch["labels"] != -100).sum()
        return lambda: (trainer.training_step(model, dict(batch), num_items), model.zero_grad())

    return [step(batch) for batch in batches]


def seconds(call: Callable[[], Any], device: str) -> float:
    """How long a call takes."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """The overhead for one kind of trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(kind, options, folder)
        calls, meter = prepare(trainer), trainer._domain_meter
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(options.turns + 4):
            call = calls[turn % len(calls)]
            for measures in (True, False) if turn % 2 else (False, True):
                trainer._domain_meter = meter if measures else None
                collects = measures and turn % LOGGING_STEPS == 0

                def run(call: Callable = call, collects: bool = collects) -> None:
                    call()
                    if collects:
                        meter.collect(trainer.get_domain_epochs())

                taken = seconds(run, options.device)
                if turn >= 4:  # first allocations
                    times[measures].append(taken)
        assert meter.problem is None
    ratios = np.array(times[True]) / np.array(times[False]) - 1
    draws = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.05, 0.95])
    return {
        "overhead": round(float(np.median(ratios)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "step_seconds": round(float(np.median(times[False])), 5),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="Layers of the model.")
    parser.add_argument("--width", type=int, default=256, help="Its width, a multiple of 64.")
    parser.add_argument("--vocabulary", type=int, default=8_000, help="Its vocabulary.")
    parser.add_argument("--length", type=int, default=64, help="Tokens of a text.")
    parser.add_argument("--batch-size", type=int, default=4, help="Texts of a micro-batch.")
    parser.add_argument("--turns", type=int, default=100, help="Steps of each kind.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Where; bfloat16 on a GPU.")
    parser.add_argument("--kinds", nargs="+", choices=["trainer", "sft"], default=["trainer", "sft"], help="Trainers.")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    for kind in options.kinds:
        found[kind] = measure(kind, options)
        one = found[kind]
        print(
            f"{kind}: a step of {one['step_seconds']} s; overhead {one['overhead']:.2%} ({one['low']:.2%} ... {one['high']:.2%})"
        )
    print(json.dumps({"domain_metrics": found}))


if __name__ == "__main__":
    main()
