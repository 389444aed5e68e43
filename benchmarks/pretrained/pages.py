"""
Two pages of the fine-tuned encoder to be read: the first three hits of ten queries, by the default and by the paper's recipe.

Uses the training and the index that `minilm` has left in the folder. Writes `new.html` and `old.html` as a user gets them, and
`blind.md`, where for each query the two come as A and B in an order drawn by the seed, which `order.json` tells: for a reader
who says of each whether its hits explain the prediction, and does not know which is which.
"""

import argparse
import json
import random
from typing import Any

import torch

from benchmarks.pretrained.figures import strongest
from benchmarks.pretrained.minilm import LENGTH, load_task
from benchmarks.pretrained.packaged_models import minilm
from hf_doge import InfluenceIndex

NUM_QUERIES, NUM_HITS, NUM_WORDS = 10, 3, 5


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Search by both, and write what is to be read."""
    trained = args.output_dir / f"minilm-{args.task}"
    folder = args.output_dir / f"pages-{args.task}"
    folder.mkdir(parents=True, exist_ok=True)
    num_train = args.num_train or 1000
    texts, _, names = load_task(args.data_dir, args.task, seed=args.seed)
    queries = [{"text": text} for text in texts[num_train : num_train + NUM_QUERIES]]
    index = InfluenceIndex.from_pretrained(trained / "late_default", cache_dir=trained / "maps")
    pages = {"new": index.search(queries, top_k=10), "old": index.search(queries, top_k=10, recipe="paper")}
    for name, hits in pages.items():
        index.to_html(hits, folder / f"{name}.html")

    model, tokenizer = minilm(args.output_dir / "minilm", num_labels=len(names))
    last = max((trained / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    model = type(model).from_pretrained(last).eval()
    encoded = tokenizer(
        [query["text"] for query in queries], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        predicted = model(**encoded).logits.argmax(dim=1).tolist()
    generator = random.Random(args.seed)
    orders = [generator.sample(sorted(pages), 2) for _ in queries]
    lines = []
    for position, (query, order) in enumerate(zip(queries, orders, strict=True)):
        lines.append(f"## {position + 1}. {query['text']}\n\nPredicted: {names[predicted[position]]}\n")
        for letter, name in zip("AB", order, strict=True):
            lines.append(f"{letter}:\n")
            lines += [f"- {line}" for line in described(index, pages[name], position, names)] + [""]
    (folder / "blind.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "order.json").write_text(json.dumps(orders), encoding="utf-8")
    print(f"Read {folder / 'blind.md'}, {folder / 'new.html'} and {folder / 'old.html'}.")
    return {"queries": len(queries), "folder": str(folder)}


def described(index: InfluenceIndex, hits: Any, position: int, names: list[str]) -> list[str]:
    """A line for each of a query's strongest proponents: its text, its class, and the words that carry most of its score."""
    chosen = [hit for hit in hits if hit["query"] == position and hit["kind"] == "proponent"][:NUM_HITS]
    rows = [index.examples[hit["example_id"]] for hit in chosen]
    return [
        f"{row['text']} ({names[row['label']]}); by {', '.join(word for word, _ in strongest(hit)[:NUM_WORDS])}"
        for row, hit in zip(rows, chosen, strict=True)
    ]
