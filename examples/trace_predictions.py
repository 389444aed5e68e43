"""
Trace the predictions of a text classifier to training examples and words (TracIn-WE, https://huggingface.co/papers/2202.11844).

    python examples/trace_predictions.py --data_dir data --name ag_news --output_dir traced

The folder holds `<name>.train.jsonl[.gz]` and `<name>.test.jsonl[.gz]`; every record has a field `text` and a whole number
`label` (and perhaps its name, `label_name`). A tokenizer and a small BERT are made from scratch, so nothing is downloaded.
The defaults take about two minutes on one CPU core. At the end it prints, for a few test texts, the training examples that
made the model say what it says (proponents) or nearly kept it from it (opponents), and writes the same as a web page.
"""

import argparse
from itertools import groupby
from pathlib import Path

from datasets import ClassLabel, Dataset, load_dataset
from tokenizers import BertWordPieceTokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_doge import InfluenceIndex, TracInWECallback

MAX_LENGTH = 64


def load_split(data_dir: Path, name: str, split: str) -> Dataset:
    files = sorted(data_dir.glob(f"{name}.{split}.jsonl*"))
    if not files:
        raise SystemExit(f"Nothing to do: {data_dir} holds no {name}.{split}.jsonl[.gz]. Give --data_dir and --name.")
    return load_dataset("json", data_files=str(files[0]), split="train")


def name_labels(dataset: Dataset) -> list[str]:
    if "label_name" not in dataset.column_names:
        return [str(label) for label in range(max(dataset["label"]) + 1)]
    return [name for _, name in sorted(set(zip(dataset["label"], dataset["label_name"], strict=True)))]


def train_tokenizer(texts: list[str], folder: Path) -> BertTokenizerFast:
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(texts, vocab_size=6000, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=MAX_LENGTH)


def print_hits(hits: Dataset, labels: list[str]) -> None:
    for _, rows in groupby(hits, key=lambda hit: hit["query"]):
        rows = list(rows)
        print(f"\n{rows[0]['query_text'][:110]}\n  predicted: {labels[int(rows[0]['query_label'])]}")
        for hit in rows:
            parts = zip(hit["words"][:6], hit["word_scores"], strict=False)
            words = ", ".join(f"{word} {part:+.2g}" for word, part in parts)
            print(
                f"  {hit['kind']} {hit['rank']}: {hit['score']:+.3g} [{hit['label_name']}] {hit['text'][:80]}\n      {words}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--name", default="ag_news")
    parser.add_argument("--output_dir", type=Path, default=Path("traced"))
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--num_queries", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    # Load.
    train, test = (load_split(args.data_dir, args.name, split) for split in ("train", "test"))
    train = train.select(range(min(args.num_train, len(train))))
    labels = name_labels(train)
    train = train.select_columns(["text", "label"]).cast_column("label", ClassLabel(names=labels))
    tokenizer = train_tokenizer(train["text"][:], args.output_dir / "tokenizer")
    train = train.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)

    # Train, with one callback more than usual.
    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            id2label=dict(enumerate(labels)),
            label2id={name: number for number, name in enumerate(labels)},
        )
    )
    index_dir = args.output_dir / "influence"
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output_dir / "run"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            save_strategy="epoch",  # recorded at every save; the paper's notebook takes 2 of 10 epochs
            logging_steps=50,
            report_to=[],
        ),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[TracInWECallback(index_dir, dataset=train)],
    )
    trainer.train()

    # Search: texts without a label are traced for what the model predicts.
    index = InfluenceIndex.from_pretrained(index_dir)
    texts = test.shuffle(seed=0).select(range(args.num_queries))["text"][:]
    hits = index.search(texts, top_k=3, cosine=True)  # cosine: no example wins by the size of its gradient alone
    print_hits(hits, labels)
    index.to_html(hits, args.output_dir / "hits.html")
    print(f"\nThe same with shaded words: {args.output_dir / 'hits.html'}")

    # Examples that push their own prediction most are often labelled wrongly.
    for row in index.self_influence().select(range(3)):
        print(f"suspicious: {row['score']:.3g} [{row['label_name']}] {row['text'][:100]}")


if __name__ == "__main__":
    main()
