"""
How small an index of the fine-tuned sentence encoder of `minilm` can be, and what is lost.

Its 1,000 training questions are recorded exactly (float32) at the ends of the three epochs; those rows are written again in each
smaller form, by the writer and the fit of a recording. 100 held-out questions are traced for what the last model predicts. Scores
are compared with the exact ones, question by question: as sums of inner products, and by cosine (`cosine_...`). Bytes are those
of files, divided by examples and checkpoints: `row_bytes` of rows with their tokens and examples (`gradients`), `offset_bytes` of
what tells where they lie (int8 has none), `shared_bytes` of what does not grow with the number of rows (`basis`, `metric`).

Uses the checkpoints that `minilm` leaves in the output folder, or trains as it does. `--settings gradient` or `optimizer` has one
metric alone.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import set_seed

from benchmarks.fidelity import measure_fidelity, sample_of
from benchmarks.pretrained.minilm import LENGTH, NUM_QUERIES, batches, fine_tune, last_layer, load_task, record
from benchmarks.pretrained.packaged_models import minilm
from hf_doge.artifacts.influence import IndexReader, IndexWriter
from hf_doge.artifacts.influence.fitted_writer import FittedCheckpointWriter
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.basis import fit_basis

FORMS: dict[str, dict[str, Any]] = {
    "exact": {"dtype": "float32"},
    "float16": {},
    "int8": {"dtype": "int8"},
    **{f"random_{width}_int8": {"projection_width": width, "dtype": "int8"} for width in (32, 64)},
    **{
        f"pca_{width}_int8": {"projection": "pca", "projection_width": width, "dtype": "int8"}
        for width in (16, 32, 48, 64)
    },
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Record exactly, write again in each form; figures by metric and form."""
    folder = args.output_dir / f"minilm-{args.task}"
    texts, labels, names = load_task(args.data_dir, args.task, seed=args.seed)
    num_train = args.num_train or 1000
    set_seed(args.seed)
    model, tokenizer = minilm(args.output_dir / "minilm", num_labels=len(names))
    encoded = tokenizer(texts, truncation=True, max_length=LENGTH)
    dataset = Dataset.from_dict({"text": texts, "label": labels, **encoded}).select(range(num_train + NUM_QUERIES))
    train, test = dataset.select(range(num_train)), dataset.select(range(num_train, num_train + NUM_QUERIES))
    checkpoints = fine_tune(model, tokenizer, train, folder / "run", epochs=args.epochs or 3, seed=args.seed)[2::3]
    _, predicted, _ = last_layer(type(model).from_pretrained(checkpoints[-1]).eval(), tokenizer, test)
    queries = [gradients(type(model).from_pretrained(path), tokenizer, test, predicted) for path in checkpoints]
    figures: dict[str, Any] = {}
    for metric in args.settings or ("gradient", "optimizer"):
        options = {"metric": metric, "dtype": "float32"}
        exact = record(folder / f"compact_{metric}", checkpoints, train, tokenizer, options).reader
        rows = [joined(exact.example_rows(place, range(num_train))) for place in range(len(checkpoints))]
        asked = (
            [exact.metric(place).measured(one) for place, one in enumerate(queries)]
            if metric == "optimizer"
            else queries
        )
        truth: list[np.ndarray] = []
        for name, form in FORMS.items():
            with tempfile.TemporaryDirectory() as temporary:
                reader = exact if name == "exact" else written_again(Path(temporary) / "index", exact, rows, form)
                found = bytes_of(reader, exact)
                scores = [sums(reader, asked, cosine=cosine) for cosine in (False, True)]
            truth = truth or scores
            for kind, ours, theirs in zip(("", "cosine_"), scores, truth, strict=True):
                fidelity = measure_fidelity(name, theirs, ours, bytes_per_example=0)
                found[f"{kind}spearman"] = round(fidelity.spearman, 4)
                found[f"{kind}top10_overlap"] = round(fidelity.top_overlap, 3)
            figures[f"{metric}_{name}"] = found
            print(metric, name, found, flush=True)
    return figures


def gradients(model: Any, tokenizer: Any, dataset: Dataset, labels: np.ndarray) -> TokenRows:
    """The rows of questions with some labels at one checkpoint."""
    parts, start = [], 0
    with EmbeddingGradientRecorder(model, pad_token_id=tokenizer.pad_token_id) as recorder:
        for batch in batches(tokenizer, dataset):
            own = torch.from_numpy(labels[start : start + len(batch["input_ids"])])
            parts.append(recorder.record({**batch, "labels": own}))
            start += len(own)
    return TokenRows.join(parts)


def joined(examples: list[tuple[torch.Tensor, torch.Tensor]]) -> TokenRows:
    """Stored rows of examples as they were recorded."""
    lengths = torch.tensor([0, *(len(tokens) for tokens, _ in examples)])
    tokens, rows = (torch.cat(parts) for parts in zip(*examples, strict=True))
    return TokenRows(lengths.cumsum(0), tokens, rows, False)


def written_again(folder: Path, exact: IndexReader, rows: list[TokenRows], form: dict[str, Any]) -> IndexReader:
    """An index of the same rows in another form."""
    count = exact.num_examples
    writer = IndexWriter(folder, width=exact.width, vocabulary_size=exact.vocabulary_size, num_examples=count, **form)
    writer.write_examples(
        pa.table({"example_id": np.arange(count), "content_hash": [str(one) for one in range(count)]})
    )
    for entry, own in zip(exact.checkpoints, rows, strict=True):
        facts = {key: entry[key] for key in ("step", "epoch", "learning_rate", "path", "model_class", "fingerprint")}
        with writer.checkpoint(entry["name"], **facts) as recording:
            if isinstance(recording, FittedCheckpointWriter):
                recording.write_basis(fit_basis([sample_of(own)], width=form["projection_width"]))
            recording.add(own)
            writer.publish(recording)
    return IndexReader.open(folder, cache_dir=folder.with_name("maps"))


def sums(reader: IndexReader, queries: list[TokenRows], *, cosine: bool) -> np.ndarray:
    """TracIn-WE of all pairs, each checkpoint perhaps divided by the lengths of both gradients."""
    total = np.zeros((len(queries[0]), reader.num_examples))
    for place, rows in enumerate(queries):
        scores = reader.scores(place, rows).astype(np.float64)
        if cosine:
            projected = TokenRows(rows.offsets, rows.tokens, reader.project(place, rows.rows), False)
            squares = projected.squared_norms().numpy()[:, None] * reader.self_influence(place)
            scores /= np.sqrt(squares).clip(1e-30)
        total += reader.checkpoints[place]["learning_rate"] * scores
    return total


def bytes_of(reader: IndexReader, exact: IndexReader) -> dict[str, Any]:
    """Bytes of files for each example and checkpoint; the metric has those of the recording."""
    parts = reader.num_examples * len(reader.checkpoints)

    def size(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*.parquet")) / parts

    rows = sum(file["num_rows"] for entry in reader.config["checkpoints"] for file in entry["files"])
    return {
        "rows": round(rows / parts, 2),
        "row_bytes": round(size(reader.folder / "gradients")),
        "offset_bytes": round(size(reader.folder / "offsets")),
        "shared_bytes": round(size(reader.folder / "basis") + size(exact.folder / "metric")),
    }
