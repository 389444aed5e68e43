"""The task all libraries get: a BERT classifier with random weights, training examples and two sets of queries."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY_SIZE = 30_522
EMBEDDING = "bert.embeddings.word_embeddings"
NUM_LABELS = 4
PADDING = 0


@dataclass
class Examples:
    """Padded examples: `input_ids` and `attention_mask` of shape `(N, num_positions)`, `labels` of shape `(N,)`."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, example: int) -> dict[str, Tensor]:
        return self.slice(example, example + 1, lambda part: part[0])

    def slice(self, start: int, end: int, change=lambda part: part) -> dict[str, Tensor]:
        """Examples `start` to `end` as a batch."""
        return {name: change(tensor[start:end]) for name, tensor in vars(self).items()}

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """All examples in order."""
        return (self.slice(start, start + batch_size) for start in range(0, len(self), batch_size))

    def head(self, count: int) -> "Examples":
        """The first examples only."""
        return Examples(**self.slice(0, count))


@dataclass
class Workload:
    """What `make_workload` wrote to `folder`."""

    folder: Path
    train: Examples
    queries: Examples
    second_queries: Examples

    @classmethod
    def load(cls, folder: Path) -> "Workload":
        """Read the examples; the model is read by [`model`]."""
        arrays = np.load(folder / "examples.npz")
        parts = {
            part: Examples(*(torch.from_numpy(arrays[f"{part}_{name}"]) for name in Examples.__annotations__))
            for part in ("train", "queries", "second_queries")
        }
        return cls(folder, **parts)

    def model(self) -> nn.Module:
        """A fresh copy of the model, in evaluation mode, all of its parameters requiring gradients."""
        return BertForSequenceClassification.from_pretrained(self.folder / "model").eval()

    def head(self, count: int) -> "Workload":
        """The first examples of each part."""
        return Workload(self.folder, self.train.head(count), self.queries.head(count), self.second_queries.head(count))


def random_examples(
    count: int, *, generator: np.random.Generator, length: int = 64, shortest: int | None = None
) -> Examples:
    """Examples of `shortest` (default: half the length) to `length` tokens with Zipf frequencies, padded right."""
    frequencies = 1 / np.arange(1, VOCABULARY_SIZE)
    input_ids = generator.choice(np.arange(1, VOCABULARY_SIZE), (count, length), p=frequencies / frequencies.sum())
    lengths = generator.integers(length // 2 if shortest is None else shortest, length + 1, count)
    mask = np.arange(length) < lengths[:, None]
    return Examples(
        input_ids=torch.from_numpy(np.where(mask, input_ids, PADDING)),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        labels=torch.from_numpy(generator.integers(0, NUM_LABELS, count)),
    )


def bert(*, width: int = 128, num_layers: int = 2, seed: int = 0) -> nn.Module:
    """A BERT classifier with random weights."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=max(width // 64, 1),
            num_labels=NUM_LABELS,
            pad_token_id=PADDING,
        )
    )


def make_workload(folder: Path, *, num_train: int, num_queries: int, length: int = 64, seed: int = 0) -> Workload:
    """Write model and examples to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    sizes = {"train": num_train, "queries": num_queries, "second_queries": num_queries}
    parts = {part: random_examples(size, generator=generator, length=length) for part, size in sizes.items()}
    arrays = {
        f"{part}_{name}": tensor.numpy() for part, examples in parts.items() for name, tensor in vars(examples).items()
    }
    np.savez(folder / "examples.npz", **arrays)
    bert(seed=seed).save_pretrained(folder / "model")
    (folder / "workload.json").write_text(json.dumps({**sizes, "length": length, "seed": seed}, indent=2))
    return Workload(folder, **parts)
