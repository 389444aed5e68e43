"""
What `record="online"` adds to fine-tuning: a small BERT classifier and a small GPT-2, with and without, turn by turn.

    python -m benchmarks.online_overhead

Both have 4 layers of width 256, as Google's "BERT-Mini", and batches of 16 texts of 32 to 64 tokens. Each turn is one
whole `Trainer.train()` of three epochs that saves as the Trainer does if not told otherwise, every 500 steps and at the
end; with the callback it includes the checks of the first batch, the rows of every step and the index that is written at
each save. Counted are CPU seconds of the process (the machine may be shared); the overhead is the median over the rounds
of `with / without - 1`. The last line is JSON.

The smaller the model, the larger the share of the rows, which grow with the width, and the compute with its square:
`--layers 2 --width 128 --examples 2000` is "BERT-Tiny", `--width 512` "BERT-Small". The checks of the first batch, about the
work of two steps, are part of every turn: the fewer the steps, the more they weigh.
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

NUM_EXAMPLES = {"bert": 640, "gpt2": 200}  # a step of GPT-2 is longer, for its 50,257 logits


def small_bert(layers: int, width: int) -> nn.Module:
    """A classifier with the vocabulary of bert-base-uncased."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30_522,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_labels=4,
        )
    )


def small_gpt2(layers: int, width: int) -> nn.Module:
    """A language model with the vocabulary of gpt2 and tied embeddings."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50_257, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=512, use_cache=False
        )
    )


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"bert": small_bert, "gpt2": small_gpt2}


def make_dataset(name: str, *, num_examples: int, length: int) -> Dataset:
    """Texts of `length / 2 ... length` tokens of Zipf frequencies."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, 29_000, dtype=torch.float64)
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
    model: nn.Module, dataset: Dataset, *, online: bool, epochs: int, batch_size: int, save_strategy: str
) -> float:
    """CPU seconds of one training."""
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
        trainer = Trainer(model, args, train_dataset=dataset, data_collator=pad, callbacks=callbacks)
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
    parser.add_argument("--rounds", type=int, default=3, help="Turns of each kind.")
    parser.add_argument("--layers", type=int, default=4, help="Layers of the models.")
    parser.add_argument("--width", type=int, default=256, help="Their width, a multiple of 64.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="Which to train.")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    overheads = {}
    for name in options.models:
        dataset = make_dataset(name, num_examples=options.examples or NUM_EXAMPLES[name], length=options.length)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        settings = {option: vars(options)[option] for option in ("epochs", "batch_size", "save_strategy")}

        def train(dataset: Dataset, *, online: bool, name: str = name, settings: dict = settings) -> float:
            torch.manual_seed(0)
            model = MODELS[name](options.layers, options.width)
            return cpu_seconds(model, dataset, online=online, **settings)

        train(dataset.select(range(64)), online=True)  # imports and first allocations
        for turn in tqdm(range(options.rounds), desc=name):
            for online in (False, True) if turn % 2 == 0 else (True, False):
                seconds[online].append(train(dataset, online=online))
        ratios = [with_it / without for with_it, without in zip(seconds[True], seconds[False], strict=True)]
        overheads[name] = round(statistics.median(ratios) - 1, 4)
        plain, recorded = (" ".join(f"{value:.2f}" for value in seconds[online]) for online in (False, True))
        print(f"{name}: without {plain}; with {recorded} CPU seconds; overhead {overheads[name]:.1%}")
    print(json.dumps({"online_overhead": overheads}))


if __name__ == "__main__":
    main()
