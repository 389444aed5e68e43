"""
What `record="online"` adds to fine-tuning: a small BERT classifier and a small GPT-2, with and without, turn by turn.

    python -m benchmarks.online_overhead

Each turn is one whole `Trainer.train()` of three epochs that saves as the Trainer does if not told otherwise, every 500
steps and at the end; with the callback it includes the checks of the first batch, the rows of every step and the index
that is written at each save. Counted are CPU seconds of the process (the machine may be shared); the overhead is the
median over the rounds of `with / without - 1`. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from hf_doge.tracing.callback import TracInWECallback

WIDTH, LAYERS, HEADS = 128, 2, 2
NUM_EXAMPLES = {"bert": 2000, "gpt2": 300}  # a step of GPT-2 is ten times as long, for its 50,257 logits


def small_bert() -> nn.Module:
    """The issue's BERT: 2 layers, width 128, the vocabulary of bert-base-uncased."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30_522,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            num_labels=4,
        )
    )


def small_gpt2() -> nn.Module:
    """GPT-2 of the same size, with its own vocabulary and tied embeddings."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50_257, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=512, use_cache=False)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": small_bert, "gpt2": small_gpt2}


def make_dataset(name: str, *, num_examples: int, length: int) -> Dataset:
    """Texts of `length / 2 ... length` tokens of Zipf frequencies."""
    generator = torch.Generator().manual_seed(0)
    vocabulary_size = MODELS[name]().config.vocab_size
    frequencies = 1 / torch.arange(1, vocabulary_size - 999, dtype=torch.float64)
    sizes = torch.randint(length // 2, length + 1, (num_examples,), generator=generator).tolist()
    ids = [(1000 + torch.multinomial(frequencies, size, True, generator=generator)).tolist() for size in sizes]
    labels = ids if name == "gpt2" else torch.randint(4, (num_examples,), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def pad(features: list[dict]) -> dict[str, torch.Tensor]:
    """Padding to the longest of the batch."""
    ids = [torch.tensor(feature["input_ids"]) for feature in features]
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(line) for line in ids], batch_first=True),
    }
    if isinstance(features[0]["labels"], list):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    else:
        batch["labels"] = torch.tensor([feature["labels"] for feature in features])
    return batch


def cpu_seconds(
    name: str, dataset: Dataset, *, online: bool, epochs: int, batch_size: int, save_strategy: str
) -> float:
    """CPU seconds of one training from scratch."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            str(Path(folder) / "out"),
            per_device_train_batch_size=batch_size,
            num_train_epochs=epochs,
            learning_rate=1e-4,
            save_strategy=save_strategy,
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callbacks = [TracInWECallback(Path(folder) / "index", record="online")] if online else []
        trainer = Trainer(MODELS[name](), args, train_dataset=dataset, data_collator=pad, callbacks=callbacks)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--examples", type=int, help=f"Examples in the dataset. Default: {NUM_EXAMPLES}.")
    parser.add_argument("--length", type=int, default=64, help="Longest text, in tokens.")
    parser.add_argument("--batch-size", type=int, default=16, help="Examples in a batch.")
    parser.add_argument("--epochs", type=int, default=3, help="Epochs.")
    parser.add_argument("--save-strategy", choices=["steps", "epoch"], default="steps", help="When to save.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each kind.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="Which to train.")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    overheads = {}
    for name in options.models:
        dataset = make_dataset(name, num_examples=options.examples or NUM_EXAMPLES[name], length=options.length)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        settings = {option: vars(options)[option] for option in ("epochs", "batch_size", "save_strategy")}
        cpu_seconds(name, dataset.select(range(64)), online=True, **settings)  # imports and first allocations
        for turn in tqdm(range(options.rounds), desc=name):
            for online in (False, True) if turn % 2 == 0 else (True, False):
                seconds[online].append(cpu_seconds(name, dataset, online=online, **settings))
        ratios = [with_it / without for with_it, without in zip(seconds[True], seconds[False], strict=True)]
        overheads[name] = round(statistics.median(ratios) - 1, 4)
        plain, recorded = (" ".join(f"{value:.2f}" for value in seconds[online]) for online in (False, True))
        print(f"{name}: without {plain}; with {recorded} CPU seconds; overhead {overheads[name]:.1%}")
    print(json.dumps({"online_overhead": overheads}))


if __name__ == "__main__":
    main()
