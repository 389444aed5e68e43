"""
A sentence encoder, fine-tuned to tell six kinds of questions apart: which training questions does a prediction rest on?

MiniLM (6 layers, 22M parameters) with a new head, 1,000 questions of six sources (counselling, beer, coffee, neurology,
digestion, genetics; their first line alone), three epochs of AdamW at 5e-5, batches of 16, a checkpoint at each third of an
epoch. 100 held-out questions are traced for what the model predicts. By setting:

- `label`: the share of the ten strongest proponents whose label is the predicted one. A sixth by chance;
- `hubs`: the part of all places that the twelve most frequent examples hold. 0.012 if all came equally often;
- of the first ten queries' proponents, how many have a special token, or the end of a sentence, among their three strongest
  words, and which words are frequent among those.

`--task NAME` takes a set of classification instead, its texts cut to 48 tokens. Settings named `late_...` are of indices at
the ends of epochs, `early_...` at the thirds of the first epoch; what follows says how they are searched: as by default, by the
paper's recipe, by cosine with all tokens or without special ones, or not by cosine. Those called `late_default`, `projected` and `whole` have
rows of words and of the last layer (filling one row, projected to 19 numbers on both sides, and whole), whose scores are also put together by each rule of `parts`.
"""

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from benchmarks.pretrained.figures import hub_share, label_share, page_figures
from benchmarks.pretrained.packaged_models import minilm
from benchmarks.pretrained.parts import RULES, Parts
from hf_doge import InfluenceIndex
from hf_doge.evaluation.influence.scorers import BM25Scorer
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings

SOURCES = {
    "counsel-chat": "counselling",
    "beer_tentrr": "beer",
    "Coffee-Search-Engine": "coffee",
    "6_NINDS_QA": "neurology",
    "5_NIDDK_QA": "digestion",
    "3_GHR_QA": "genetics",
}
LENGTH = 48
NUM_QUERIES = 100
RECORDINGS: dict[str, dict[str, Any]] = {
    "plain": {"metric": "gradient", "layers": "embedding"},
    "metric": {"metric": "optimizer", "layers": "embedding"},
    "default": {},
    "projected": {"layers": ["embedding", "classifier"]},
    "whole": {"layers": ["embedding", "classifier"], "projection_dim": 384},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "": {},
    "_paper": {"recipe": "paper"},
    "_all_tokens": {"cosine": True, "special_tokens": "count", "sentence_ends": "count"},
    "_no_special": {"cosine": True, "special_tokens": "drop", "sentence_ends": "count"},
    "_dropped": {"special_tokens": "drop", "sentence_ends": "drop"},
    "_no_norms": {"cosine": False},
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune once, record by each setting, search; figures by setting."""
    folder = args.output_dir / f"minilm-{args.task}"
    texts, labels, names = load_task(args.data_dir, args.task, seed=args.seed)
    num_train = args.num_train or 1000
    set_seed(args.seed)
    model, tokenizer = minilm(args.output_dir / "minilm", num_labels=len(names))
    encoded = tokenizer(texts, truncation=True, max_length=LENGTH)
    dataset = Dataset.from_dict({"text": texts, "label": labels, **encoded}).select(range(num_train + NUM_QUERIES))
    train, test = dataset.select(range(num_train)), dataset.select(range(num_train, num_train + NUM_QUERIES))
    checkpoints = fine_tune(model, tokenizer, train, folder / "run", epochs=args.epochs or 3, seed=args.seed)
    last = type(model).from_pretrained(checkpoints[-1]).eval()
    features, predicted, differences = last_layer(last, tokenizer, dataset)
    figures: dict[str, Any] = {
        "accuracy": round(float((predicted[num_train:] == labels[num_train : num_train + NUM_QUERIES]).mean()), 3)
    }
    queries, answers = test.select_columns(["text"]).to_list(), predicted[num_train:]
    own = np.asarray(labels[:num_train])

    def note(name: str, scores: np.ndarray, **more: Any) -> None:
        figures[name] = {"label": round(label_share(scores, own, answers), 3), "hubs": round(hub_share(scores), 3)}
        figures[name] |= more
        print(name, figures[name], flush=True)

    bm25 = BM25Scorer(ignore_tokens=tuple(tokenizer.all_special_ids))
    note("bm25", bm25.scores(batches(tokenizer, train), batches(tokenizer, test)))
    pretrained, _ = minilm(args.output_dir / "minilm", num_labels=len(names))
    base = nn.functional.normalize(sentence_embeddings(pretrained, tokenizer, dataset))
    note("sentence_embedding", (base[num_train:] @ base[:num_train].T).numpy())
    products = (features @ features.T) * (differences @ differences.T)
    note("last_layer", products[num_train:, :num_train].numpy())
    spread = {"late": checkpoints[2::3], "early": checkpoints[:3]}
    for when, chosen in spread.items():
        for recording, options in RECORDINGS.items():
            if args.settings is not None and f"{when}_{recording}" not in args.settings:
                continue
            index = record(folder / f"{when}_{recording}", chosen, train, tokenizer, options)
            if index.config["layers"] is not None:
                parts = Parts.of(index, queries)
                for rule in RULES:
                    note(f"{when}_{recording}_{rule}", parts.scores(rule))
            for suffix, search in SEARCHES.items():
                try:
                    scores = index.scores(queries, **search)
                except ValueError as error:
                    print(f"{when}_{recording}{suffix}: {error}")
                    continue
                hits = index.search(queries[:10], top_k=10, **search)
                note(f"{when}_{recording}{suffix}", scores, **page_figures(hits, tokenizer.all_special_tokens))
                index.to_html(hits, folder / f"{when}_{recording}{suffix}.html")
    return figures


def load_task(data_dir: Path, task: str, *, seed: int) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts in an order drawn by the seed, the number of each one's class, and the names of the classes."""
    records: list[tuple[str, str]] = []
    if task == "questions":
        for split in ("train", "validation"):
            for record in read(data_dir / "lm" / f"qa.{split}.jsonl.gz"):
                name = next((name for part, name in SOURCES.items() if part in record["source"]), None)
                first = record["text"].removeprefix("Question: ").split("\n")[0]
                if name is not None and record["text"].startswith("Question: ") and 10 <= len(first) <= 200:
                    records.append((first, name))
        records = balanced(sorted(set(records)), per_class=190, seed=seed)
    else:
        rows = read(data_dir / "classification" / f"{task}.train.jsonl.gz")
        records = balanced([(row["text"], str(row["label_name"])) for row in rows], per_class=400, seed=seed)
    names = sorted({name for _, name in records})
    return [text for text, _ in records], np.asarray([names.index(name) for _, name in records]), names


def balanced(records: Sequence[tuple[str, str]], *, per_class: int, seed: int) -> list[tuple[str, str]]:
    """At most so many of each class, shuffled."""
    generator = np.random.default_rng(seed)
    kept: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    for place in generator.permutation(len(records)):
        name = records[place][1]
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= per_class:
            kept.append(records[place])
    return kept


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fine_tune(
    model: Any,
    tokenizer: Any,
    train: Dataset,
    folder: Path,
    *,
    epochs: int,
    seed: int,
    learning_rate: float = 5e-5,
) -> list[Path]:
    """The checkpoints of a training, one at each third of an epoch; those of an earlier run if they are there."""
    steps = -(-len(train) // 16)
    places = sorted({round(steps * third / 3) for third in range(1, 3 * epochs + 1)})
    checkpoints = [folder / f"checkpoint-{step}" for step in places]
    if all((path / "model.safetensors").is_file() for path in checkpoints):
        return checkpoints
    args = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        save_strategy="steps",
        save_steps=1 / (3 * epochs),
        logging_steps=1,
        report_to=[],
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        model, args, DataCollatorWithPadding(tokenizer), train.remove_columns("text"), processing_class=tokenizer
    ).train()
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def record(
    folder: Path, checkpoints: Sequence[Path], train: Dataset, tokenizer: Any, options: dict[str, Any]
) -> InfluenceIndex:
    """The index of some checkpoints, recorded now or before."""
    record_dataset(
        folder,
        checkpoints,
        train,
        tokenizer=tokenizer,
        settings=RecordingSettings(**options),
        batch_size=32,
        progress=False,
    )
    return InfluenceIndex.from_pretrained(folder, cache_dir=folder.parent / "maps")


@torch.no_grad()
def last_layer(model: Any, tokenizer: Any, dataset: Dataset) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Inputs of the last layer, predicted classes, and `softmax - onehot` (of the own label in training, of the predicted else)."""
    inputs: list[torch.Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits = torch.cat([model(**batch).logits for batch in batches(tokenizer, dataset)])
    handle.remove()
    predicted = logits.argmax(dim=1)
    labels = torch.tensor(dataset["label"])
    one_hot = nn.functional.one_hot(labels, logits.shape[1])
    one_hot[-NUM_QUERIES:] = nn.functional.one_hot(predicted[-NUM_QUERIES:], logits.shape[1])
    return torch.cat(inputs), predicted.numpy(), logits.softmax(dim=1) - one_hot


@torch.no_grad()
def sentence_embeddings(model: Any, tokenizer: Any, dataset: Dataset) -> torch.Tensor:
    """The mean of the last hidden states, as the model was made for, before any fine-tuning."""
    found = []
    for batch in batches(tokenizer, dataset):
        hidden, mask = model.bert.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(found)


def batches(tokenizer: Any, dataset: Dataset) -> list[dict[str, torch.Tensor]]:
    """What the model is fed, in order."""
    texts = dataset["text"][:]
    few = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    return [
        dict(tokenizer(some, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")) for some in few
    ]
