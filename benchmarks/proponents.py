"""
Do the examples that TracIn-WE finds share the query's label? AG News, a small model trained from scratch.

    OMP_NUM_THREADS=1 python -m benchmarks.proponents --data_dir ../shared/data/classification --output_dir outputs/proponents

Over test queries with their true label: the share of the ten strongest proponents that have it (at least 80 %) and of the
ten strongest opponents (at most 20 %; a quarter of all examples have it). `--architecture cnn` is the shape of the paper's
notebook; `bert` fits so fast that a few examples of large loss hold most of the gradient and are proponents of everything,
which `cosine` mends. A run in a folder that holds a
finished one only searches. Ends with one line of JSON.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.small_tokenizer import train_wordpiece
from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.evaluation.influence.small_models import make_classifier

MAX_LENGTH = 96
LEARNING_RATES = {"cnn": 1e-3, "bert": 5e-4}
VARIANTS = {
    "": {},
    "_without_special_tokens": {"special_tokens": "drop"},
    "_cosine": {"cosine": True},
}


def load_split(data_dir: Path, name: str, split: str, limit: int) -> Dataset:
    """The first examples of a split."""
    dataset = load_dataset("json", data_files=str(data_dir / f"{name}.{split}.jsonl.gz"), split="train")
    return dataset.select(range(min(limit, len(dataset)))).select_columns(["text", "label"])


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, *, num_classes: int) -> nn.Module:
    """A new classifier."""
    if args.architecture == "cnn":
        return make_classifier("cnn", len(tokenizer), num_classes, width=args.width, seed=args.seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            num_labels=num_classes,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def record_training(
    train: Dataset, test: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Path, args: argparse.Namespace
) -> float:
    """Train while recording; the accuracy on the test split."""
    set_seed(args.seed)
    trainer = Trainer(
        make_model(args, tokenizer, num_classes=len(set(train["label"]))),
        TrainingArguments(
            args.output_dir / "run",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=LEARNING_RATES[args.architecture],
            save_strategy="epoch",
            logging_steps=50,
            report_to=[],
            seed=args.seed,
            dataloader_pin_memory=False,
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[TracInWECallback(folder, dataset=train, batch_size=64, recipe="paper")],
        compute_metrics=lambda output: {"accuracy": float((output[0].argmax(axis=1) == output[1]).mean())},
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def same_label_shares(hits: Dataset) -> dict[str, float]:
    """By kind, how often a hit has the label of its query."""
    table = hits.select_columns(["kind", "label", "query_label"]).to_pandas()
    return (table["label"] == table["query_label"]).groupby(table["kind"]).mean().to_dict()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--name", default="ag_news")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/proponents"))
    parser.add_argument("--architecture", choices=list(LEARNING_RATES), default="cnn")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num_train", type=int, default=4000)
    parser.add_argument("--num_queries", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train = load_split(args.data_dir, args.name, "train", args.num_train)
    test = load_split(args.data_dir, args.name, "test", 10**9)
    tokenizer_dir = args.output_dir / "tokenizer"  # kept: training one again can break ties in another way
    if not tokenizer_dir.exists():
        train_wordpiece(train["text"], vocab_size=8000).save_pretrained(tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    def tokenise(row: dict) -> dict:
        return tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH)

    train, test = train.map(tokenise), test.map(tokenise)
    folder, finished = args.output_dir / "index", args.output_dir / "accuracy.json"
    if not finished.exists():
        start = time.perf_counter()
        accuracy = record_training(train, test, tokenizer, folder, args)
        print(f"Trained and recorded in {time.perf_counter() - start:.0f} s, test accuracy {accuracy:.3f}")
        finished.write_text(json.dumps(accuracy))
    accuracy = json.loads(finished.read_text())

    model = make_model(args, tokenizer, num_classes=len(set(train["label"])))
    index = InfluenceIndex.from_pretrained(folder, processing_class=tokenizer, model=model)
    queries = test.shuffle(seed=args.seed).select(range(args.num_queries))
    result = {
        "architecture": args.architecture,
        "width": args.width,
        "epochs": args.epochs,
        "seed": args.seed,
        "accuracy": round(accuracy, 4),
        "num_train": len(train),
        "num_queries": len(queries),
    }
    for suffix, options in VARIANTS.items():
        start = time.perf_counter()
        hits = index.search(queries, top_k=10, **options)
        seconds = time.perf_counter() - start
        shares = same_label_shares(hits)
        special = float(np.mean(hits["special_token_share"]))
        print(f"search{suffix}: {seconds:.1f} s, special tokens hold {special:.0%} of the scores, {shares}")
        for kind in ("proponent", "opponent"):
            result[f"{kind}s_same_label{suffix}"] = round(shares[kind], 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
