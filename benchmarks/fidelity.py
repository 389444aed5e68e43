"""
What compressing an influence index costs: bytes per example against the exact scores.

    OMP_NUM_THREADS=1 python -m benchmarks.fidelity --data_dir ../shared/data/classification

A transformer of width 128 is trained on AG News; its training examples are recorded at four checkpoints, once exactly (float32)
and once in each compressed form; queries always have all their tokens and full precision. Bytes are those of the gradient
files, and of the bases that they are projected to. Top-k keeps whole positions, as in the paper's code, of training examples alone.

Prints a table. Last line: one JSON object by form: bytes_per_example, spearman, spearman_worst, top10_overlap.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hf_doge.artifacts.influence import IndexReader, IndexWriter
from hf_doge.artifacts.influence.fitted_writer import FittedCheckpointWriter
from hf_doge.evaluation.influence.rank_metrics import spearman, top_overlap
from hf_doge.evaluation.influence.scorers.base import Batches
from hf_doge.evaluation.influence.small_models import (
    Checkpoint,
    TrainingRecipe,
    make_classifier,
    to_batches,
    train_classifier,
)
from hf_doge.evaluation.influence.small_tasks import load_small_task
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.basis import NUM_SAMPLED, fit_basis

FORMS = {
    "exact (float32)": {"dtype": "float32"},
    "float16": {},
    "int8": {"dtype": "int8"},
    **{f"top-{k}, float16": {"top_k": k} for k in (5, 10, 20)},
    **{f"projected to {width}, float16": {"projection_width": width} for width in (32, 64, 128)},
    **{
        f"principal components to {width}, int8": {"projection": "pca", "projection_width": width, "dtype": "int8"}
        for width in (32, 64)
    },
}


@dataclass(frozen=True)
class Fidelity:
    """
    How near compressed scores are to exact ones.

    Attributes:
        name (`str`): The compression.
        bytes_per_example (`float`): On disk.
        spearman (`float`): Mean rank correlation over the queries that have an order on both sides.
        spearman_worst (`float`): The smallest.
        top_overlap (`float`): Mean share of the `k` strongest proponents that stay among the `k` strongest.
        bottom_overlap (`float`): The same for opponents.
        num_unordered (`int`): Queries whose scores are all equal on one side; the rank correlation leaves them out.
    """

    name: str
    bytes_per_example: float
    spearman: float
    spearman_worst: float
    top_overlap: float
    bottom_overlap: float
    num_unordered: int = 0


def measure_fidelity(
    name: str, exact: np.ndarray, compressed: np.ndarray, *, bytes_per_example: float, k: int = 10
) -> Fidelity:
    """
    Compare two score matrices of shape `(Q, N)`, query by query.

    Args:
        name (`str`): What the compression is called in the table.
        exact, compressed (`numpy.ndarray` of shape `(num_queries, num_examples)`): Scores.
        bytes_per_example (`float`): Size of the compressed index over the number of examples.
        k (`int`): How many proponents and opponents are compared, at most N.

    Raises:
        ValueError: if shapes differ, a score is no finite number, or no query has an order.
    """
    correlations = spearman(exact, compressed)
    ordered = correlations[~np.isnan(correlations)]
    if not len(ordered):
        raise ValueError(f"At least one query must have unequal scores, but {name!r} has none. Check its queries.")
    return Fidelity(
        name=name,
        bytes_per_example=bytes_per_example,
        spearman=float(ordered.mean()),
        spearman_worst=float(ordered.min()),
        top_overlap=float(top_overlap(exact, compressed, k).mean()),
        bottom_overlap=float(top_overlap(-np.asarray(exact), -np.asarray(compressed), k).mean()),
        num_unordered=len(correlations) - len(ordered),
    )


def fidelity_table(rows: Sequence[Fidelity], *, k: int = 10) -> str:
    """The rows as a Markdown table; `k` only names the columns."""
    lines = [
        f"| index | bytes per example | Spearman, mean | worst query | top-{k} overlap | bottom-{k} overlap |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.name} | {row.bytes_per_example:,.0f} | {row.spearman:.4f} | {row.spearman_worst:.4f} | "
        f"{row.top_overlap:.3f} | {row.bottom_overlap:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--task", default="ag_news")
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--num_queries", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not list(args.data_dir.glob(f"{args.task}.train.jsonl*")):
        print(f"Skipped: {args.data_dir} has no {args.task}.train.jsonl.gz.")
        return
    task = load_small_task(
        args.data_dir, args.task, num_train=args.num_train, num_test=args.num_queries, max_length=args.max_length
    )
    size = (len(task.vocabulary), task.num_classes)
    make_model = partial(_make_model, *size, args.width, args.max_length)
    recipe = TrainingRecipe(num_epochs=4, learning_rate=1e-3, checkpoint_epochs=(1, 2, 3, 4))
    _, checkpoints = train_classifier(make_model, task.train, recipe, seed=1, keep_checkpoints=True)
    train, queries = to_batches(task.train), to_batches(task.test)
    query_rows = [record(checkpoint, queries) for checkpoint in checkpoints]
    rows, exact = [], None
    with tempfile.TemporaryDirectory() as temporary:
        for name, form in FORMS.items():
            scores, num_bytes = build_and_score(Path(temporary) / name, form, checkpoints, train, query_rows, size[0])
            exact = scores if exact is None else exact
            rows.append(measure_fidelity(name, exact, scores, bytes_per_example=num_bytes / args.num_train))
    print(
        f"{args.num_train} examples, {args.num_queries} queries, {len(checkpoints)} checkpoints, width {args.width}.\n"
    )
    print(fidelity_table(rows))
    figures = {
        row.name: {
            "bytes_per_example": round(row.bytes_per_example),
            "spearman": round(row.spearman, 5),
            "spearman_worst": round(row.spearman_worst, 5),
            "top10_overlap": round(row.top_overlap, 4),
        }
        for row in rows
    }
    print(json.dumps(figures))


def build_and_score(
    folder: Path,
    form: dict[str, object],
    checkpoints: list[Checkpoint],
    train: Batches,
    query_rows: list[TokenRows],
    vocabulary_size: int,
) -> tuple[np.ndarray, int]:
    """Scores of all pairs from an index of this form, and the bytes of its gradients."""
    form = dict(form)
    top_k = form.pop("top_k", None)
    num_examples = sum(len(batch["labels"]) for batch in train)
    width = query_rows[0].rows.shape[1]
    writer = IndexWriter(folder, width=width, vocabulary_size=vocabulary_size, num_examples=num_examples, **form)
    writer.write_examples(
        pa.table({"example_id": np.arange(num_examples), "content_hash": [str(i) for i in range(num_examples)]})
    )
    for position, checkpoint in enumerate(checkpoints):
        facts = {
            "path": f"memory-{position}",
            "model_class": type(checkpoint.model).__name__,
            "fingerprint": str(position),
        }
        with writer.checkpoint(
            f"checkpoint-{position}", step=position, epoch=None, learning_rate=checkpoint.learning_rate, **facts
        ) as recording:
            rows = record(checkpoint, train, top_k=top_k)
            if isinstance(recording, FittedCheckpointWriter):
                recording.write_basis(fit_basis([sample_of(rows)], width=writer.config["stored_width"]))
            recording.add(rows)
            writer.publish(recording)
    reader = IndexReader.open(folder, cache_dir=folder.with_name(f"{folder.name}-cache"))
    scores = sum(
        checkpoint.learning_rate * reader.scores(position, query_rows[position]).astype(np.float64)
        for position, checkpoint in enumerate(checkpoints)
    )
    files = [path for table in ("gradients", "basis") for path in (folder / table).rglob("*.parquet")]
    return scores, sum(path.stat().st_size for path in files)


def sample_of(rows: TokenRows) -> TokenRows:
    """The rows of as many examples as a recording fits its basis to, drawn at random."""
    chosen = np.random.default_rng(0).choice(len(rows), min(len(rows), NUM_SAMPLED), replace=False)
    lengths = rows.offsets.diff().numpy()
    kept = torch.from_numpy(np.isin(np.arange(len(rows)).repeat(lengths), chosen))
    offsets = torch.from_numpy(np.concatenate([[0], lengths[np.sort(chosen)].cumsum()]))
    return TokenRows(offsets, rows.tokens[kept], rows.rows[kept], rows.virtual)


def record(checkpoint: Checkpoint, batches: Batches, *, top_k: int | None = None) -> TokenRows:
    """Rows of all examples at one checkpoint."""
    with EmbeddingGradientRecorder(checkpoint.model, top_k=top_k) as recorder:
        parts = [recorder.record(batch) for batch in batches]
    lengths = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return TokenRows(
        offsets, torch.cat([part.tokens for part in parts]), torch.cat([part.rows for part in parts]), False
    )


def _make_model(vocabulary_size: int, num_classes: int, width: int, max_length: int, seed: int) -> torch.nn.Module:
    return make_classifier("transformer", vocabulary_size, num_classes, width=width, max_length=max_length, seed=seed)


if __name__ == "__main__":
    main()
