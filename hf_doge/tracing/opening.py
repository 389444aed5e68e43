"""Opening an index to record to: by one process, or by all of them, each of which writes some of its segments."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import nn

from hf_doge.artifacts.influence import IndexWriter
from hf_doge.artifacts.influence.manifest import EXAMPLES_FILE, embedding_shape
from hf_doge.artifacts.influence.metric import continued_metric, continued_settings, is_decided
from hf_doge.artifacts.provenance import describe_dataset, describe_model, describe_process
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.layers import Virtual
from hf_doge.text import public_name
from hf_doge.tracing.batches import preserved_random_state
from hf_doge.tracing.examples import Examples, count_tokens, describe_examples
from hf_doge.tracing.limits import label_law, num_classes, num_positions
from hf_doge.tracing.models import (
    dataset_fingerprint,
    tokenizer_fingerprint,
    unwrap_model,
)
from hf_doge.tracing.processes import (
    process_index,
    require_shared_folder,
    run_on_all_processes,
    run_on_main_process,
)
from hf_doge.tracing.search_defaults import search_defaults
from hf_doge.tracing.settings import RecordingSettings, text_tokenizer


def open_writer(
    folder: str | os.PathLike,
    *,
    model: nn.Module,
    dataset: Any,
    tokenizer: Any | None,
    settings: RecordingSettings,
    metadata: Callable[[], Mapping[str, Any]] = dict,
    add_examples: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> IndexWriter:
    """
    Open an index for a model and a dataset, new or to be continued, with its examples written.

    Args:
        folder (`str` or `os.PathLike`): Of the index.
        model (`nn.Module`): With input embeddings.
        dataset (`Dataset` or [`Examples`]): Tokenised examples; their readable columns are kept.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): What turned text into these tokens; a processor will do.
        settings ([`RecordingSettings`]): How rows are made and stored.
        metadata (`Callable`): Returns anything else worth knowing, in terms of JSON, of examples that were checked.
        add_examples (`bool`): Whether the index is there, and is to have the examples behind its own in `dataset` as well.
        heartbeat (`Callable`): Called every now and then.

    Raises:
        ValueError: if the model has no input embeddings, an example cannot be recorded, or the folder holds an index of
            another dataset, model or settings; the message says which.
    """
    model, metric = unwrap_model(model), continued_metric(Path(folder), settings.metric)
    matrix, layers = input_embedding_matrix(model), settings.chosen_layers(model)
    frozen = Virtual.of(model, layers)
    if not isinstance(dataset, Examples):
        dataset = Examples(dataset, dataset)
    if len(dataset) == 0:
        raise ValueError("The dataset to record must have examples, but it is empty. Pass one that is not.")
    table = describe_examples(
        dataset,
        vocabulary_size=len(matrix),
        num_positions=num_positions(model),
        num_classes=num_classes(model) if settings.loss_fn is None else None,
        label_law=label_law(model) if settings.loss_fn is None else lambda labels, num_tokens: None,
        keep_ids=add_examples and _has_ids(Path(folder)),
        heartbeat=heartbeat,
    )
    writer = IndexWriter(
        folder,
        width=matrix.shape[1] if layers is None else layers.width,
        vocabulary_size=len(matrix) + (0 if layers is None else layers.num_rows),
        num_examples=len(dataset),
        dtype=settings.dtype,
        projection_width=settings.projection_width,
        projection_seed=settings.projection_seed,
        projection=settings.projection,
        max_segment_bytes=settings.max_segment_bytes,
        add_examples=add_examples,
        settings={
            **settings.to_manifest(tokenizer, vocabulary_size=len(matrix)),
            **continued_settings(Path(folder), metric),
            "virtual": frozen.is_all,
            "layers": None if layers is None else layers.to_dict(),
            "tokenizer": _describe_tokenizer(tokenizer),
            "dataset": {
                "fingerprint": dataset_fingerprint(table.column("content_hash").to_pylist()),
                "num_rows": len(dataset),
            },
            "metadata": {
                **describe_process(),
                "model": describe_model(model),
                "dataset": describe_dataset(dataset.described),
                **metadata(),
                "search": search_defaults(settings, model, tokenizer),
                **({"virtual_parts": list(frozen.parts)} if frozen.parts and not frozen.is_all else {}),
            },
        },
    )
    try:
        if not is_decided(writer.config) and writer.config["metric"] != metric:
            writer.decide_metric(metric)  # it was begun in another, and has no row yet
        writer.write_examples(table)
    except BaseException:
        writer.close()
        raise
    return writer


def _has_ids(folder: Path) -> bool:
    """Whether the examples of an index have their tokens, so that those that are added must have theirs."""
    path = folder / EXAMPLES_FILE
    return path.is_file() and "input_ids" in pq.read_schema(path).names


def _describe_tokenizer(processing_class: Any | None) -> dict[str, Any] | None:
    tokenizer: Any = text_tokenizer(processing_class)
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return {
        "name": public_name(getattr(tokenizer, "name_or_path", None)),
        "vocabulary_size": len(tokenizer),
        "fingerprint": tokenizer_fingerprint(tokenizer),
    }


@dataclass
class SharedIndex:
    """
    An index that all processes record to, each some segments of every checkpoint.

    Attributes:
        writer (`IndexWriter`): On the main process from [`open_writer`]; on the others it writes segments only.
        borders (`list[int]`): The examples that segments begin with, the same however many processes there are.
    """

    writer: IndexWriter
    borders: list[int]

    def has_whole(self, name: str) -> bool:
        """Whether a checkpoint is whole, as the main process knows; all processes ask."""
        return run_on_main_process(lambda heartbeat: self.writer.has_whole(name))

    def close(self) -> None:
        """Let others write the index; of the processes, the main one alone keeps them from it."""
        self.writer.close()


def open_shared_index(
    folder: str | os.PathLike,
    *,
    model: nn.Module,
    dataset: Examples,
    tokenizer: Any | None,
    settings: RecordingSettings,
    metadata: Callable[[], Mapping[str, Any]] = dict,
    seed: int = 0,
    add_examples: bool = False,
) -> SharedIndex:
    """
    [`open_writer`] for all processes, each of which calls this: the main one opens the index, the others join.

    Args:
        folder, model, dataset, tokenizer, settings, metadata: See [`open_writer`].
        seed (`int`): Of what a dataset draws while its tokens are counted.
        add_examples (`bool`): See [`open_writer`].

    Raises:
        BlockingIOError: Somebody else is writing the index.
        ValueError: As [`open_writer`]; or a process has another dataset or does not see the folder. It names itself.
        ProcessFailedError: Another process raised an error.
    """
    writer: IndexWriter | None = None

    def open_on_main(heartbeat: Callable[[], None]) -> tuple[list[int], list[Any]]:
        nonlocal writer
        writer = open_writer(
            folder,
            model=model,
            dataset=dataset,
            tokenizer=tokenizer,
            settings=settings,
            metadata=metadata,
            add_examples=add_examples,
            heartbeat=heartbeat,
        )
        with preserved_random_state(seed):
            num_tokens = count_tokens(dataset.recorded, heartbeat=heartbeat)
        num_rows = expected_rows(num_tokens, settings, writer.config)
        capacity = settings.max_segment_bytes // (4 * writer.config["stored_width"])
        first = writer.first_example
        borders = [first + border for border in plan_borders(num_rows[first:], max(1, capacity))]
        return borders, _some_examples(dataset.recorded, seed)

    def join(heartbeat: Callable[[], None]) -> None:
        nonlocal writer
        if process_index() > 0:
            found = _some_examples(dataset.recorded, seed)
            if found != expected:
                raise ValueError(
                    f"All processes must record the same dataset, but that of process {process_index()} differs from the"
                    f" main one's: it has {found[0]} examples, not {expected[0]}, or other tokens. Give each process the"
                    " whole dataset; recording shares it out."
                )
            writer = IndexWriter.join(
                folder,
                max_segment_bytes=settings.max_segment_bytes,
                num_examples=len(dataset) if add_examples else None,
            )

    try:
        borders, expected = run_on_main_process(open_on_main)
        require_shared_folder(folder)
        run_on_all_processes(join)
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    assert writer is not None  # one of the two has opened it
    return SharedIndex(writer, borders)


def _some_examples(dataset: Any, seed: int) -> list[Any]:
    """How many there are, and a checksum of a few."""
    positions = sorted({0, len(dataset) // 2, len(dataset) - 1})
    digest = hashlib.sha256()
    with preserved_random_state(seed):
        for position in positions:
            digest.update(np.asarray(dataset[position]["input_ids"], dtype=np.int64).tobytes())
    return [len(dataset), digest.hexdigest()]


def expected_rows(num_tokens: np.ndarray, settings: RecordingSettings, config: Mapping[str, Any]) -> np.ndarray:
    """
    How many gradient rows each example will have, as far as its tokens tell.

    Args:
        num_tokens (`numpy.ndarray` of shape `(num_examples,)`): Distinct tokens of each example.
        settings ([`RecordingSettings`]):
            The output part of a tied matrix has a row for each word of the vocabulary, unless only own rows are kept.
        config (`Mapping`): The content of config.json. Layers that have rows have as many for each example.
    """
    sparse, words, layers = settings.tied not in ("output", "full"), embedding_shape(config)[0], config.get("layers")
    rows = num_tokens if sparse else np.full_like(num_tokens, words)
    if layers is not None and not layers["embedding"]:
        rows = np.zeros_like(num_tokens)
    rows = rows if settings.top_k_tokens is None else np.minimum(rows, settings.top_k_tokens)
    return rows + (config["vocabulary_size"] - words)


def plan_borders(num_rows: np.ndarray, capacity: int) -> list[int]:
    """
    The examples that segments are to begin with, all but the first: each ends with the example that fills it.

    Args:
        num_rows (`numpy.ndarray` of shape `(num_examples,)`): From [`expected_rows`].
        capacity (`int`): Rows that fill a segment.
    """
    totals = np.cumsum(num_rows, dtype=np.int64)
    borders: list[int] = []
    filled = 0
    while True:
        border = int(np.searchsorted(totals, filled + capacity)) + 1
        if border >= len(totals):
            return borders
        borders.append(border)
        filled = int(totals[border - 1])
