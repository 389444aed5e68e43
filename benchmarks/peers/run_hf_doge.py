"""Ours: record to an index on disk, open it, score; and score new queries against the index that is there."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import nn

from benchmarks.peers.measure import main
from benchmarks.peers.workload import VOCABULARY_SIZE, Examples, Workload
from hf_doge.artifacts.influence import IndexReader, IndexWriter
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.layers import ChosenLayers
from hf_doge.tracing.settings import RecordingSettings

BATCH_SIZE = 125  # the recorder runs a batch in groups of similar length: the more to choose from, the less padding


def layers_of(model: nn.Module, *, default: bool) -> ChosenLayers | None:
    """None, for words alone as the paper has it, or what is recorded by default."""
    return RecordingSettings(recipe=None if default else "paper").resolved(model).chosen_layers(model)


def build(
    recorder: EmbeddingGradientRecorder, workload: Workload, folder: Path, *, dtype: str, layers: ChosenLayers | None
) -> None:
    """Record the training examples; the index is whole afterwards."""
    model = recorder.model
    writer = IndexWriter(
        folder,
        width=model.config.hidden_size,
        vocabulary_size=VOCABULARY_SIZE + (0 if layers is None else layers.num_rows),
        num_examples=len(workload.train),
        dtype=dtype,
    )
    writer.write_examples(
        pa.table({"example_id": np.arange(len(workload.train)), "label": workload.train.labels.numpy()})
    )
    checkpoint = writer.checkpoint(
        "step-1", step=1, epoch=1.0, learning_rate=1.0, path="model", model_class=type(model).__name__, fingerprint=""
    )
    with recorder, checkpoint:
        for batch in workload.train.batches(BATCH_SIZE):
            checkpoint.add(recorder.record(batch))
        writer.publish(checkpoint)


def search(
    recorder: EmbeddingGradientRecorder, queries: Examples, folder: Path, cache_dir: Path, *, cosine: bool
) -> np.ndarray:
    """Scores `(num_train, num_queries)` of the index in `folder`, opened again: inner products, or cosines."""
    reader = IndexReader.open(folder, cache_dir=cache_dir)
    with recorder:
        parts = [recorder.record(batch) for batch in queries.batches(BATCH_SIZE)]
    scores = np.concatenate([reader.scores(0, part) for part in parts])
    if cosine:
        of_queries = np.concatenate([part.squared_norms().numpy() for part in parts])
        scores /= np.sqrt(of_queries[:, None] * reader.self_influence(0))
    return scores.T


def first(
    model: nn.Module, workload: Workload, state_dir: Path, *, dtype: str = "float16", default: bool = False
) -> np.ndarray:
    """Build and score: record, write, map, search."""
    layers = layers_of(model, default=default)
    recorder = EmbeddingGradientRecorder(model, layers=layers)
    build(recorder, workload, state_dir / "index", dtype=dtype, layers=layers)
    return search(recorder, workload.queries, state_dir / "index", state_dir / "cache", cosine=default)


def second(model: nn.Module, workload: Workload, state_dir: Path, *, default: bool = False) -> np.ndarray:
    """New queries against the index and the memory map that [`first`] left."""
    recorder = EmbeddingGradientRecorder(model, layers=layers_of(model, default=default))
    queries = workload.second_queries
    return search(recorder, queries, state_dir / "index", state_dir / "cache", cosine=default)


def second_mapping_anew(model: nn.Module, workload: Workload, state_dir: Path) -> np.ndarray:
    """The same where there is an index but no map yet, as after a download."""
    recorder, queries = EmbeddingGradientRecorder(model), workload.second_queries
    with tempfile.TemporaryDirectory(dir=state_dir) as cache:
        return search(recorder, queries, state_dir / "index", Path(cache), cosine=False)


if __name__ == "__main__":
    main(
        {
            "first": first,
            "first_float32": partial(first, dtype="float32"),
            "first_default": partial(first, default=True),
            "second": second,
            "second_default": partial(second, default=True),
            "second_mapping_anew": second_mapping_anew,
        },
        needs={"second": "first", "second_default": "first_default", "second_mapping_anew": "first"},
    )
