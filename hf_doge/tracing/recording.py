"""
Recording at a checkpoint: the gradient rows of all examples at one state of the weights.

Rows are those of each example alone, in evaluation mode and the precision of the weights, of the model's own loss (or
`loss_fn`): whatever the batch, accumulation, autocast, label smoothing and dropout of training.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_doge.artifacts.influence import IndexWriter
from hf_doge.functional.tracin_we import scale_by_second_moment
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.batches import SequentialBatches, preserved_random_state
from hf_doge.tracing.examples import Examples, describe_examples, padding_collator, prune_columns
from hf_doge.tracing.fingerprints import dataset_fingerprint, model_fingerprint, tokenizer_fingerprint, unwrap_model
from hf_doge.tracing.limits import num_classes, num_positions
from hf_doge.tracing.settings import RecordingSettings, text_tokenizer
from hf_doge.tracing.weights import describe_checkpoint, load_model, stored_path

SECOND_MOMENT_EPS = 1e-8


def open_writer(
    folder: str | os.PathLike,
    *,
    model: nn.Module,
    dataset: Any,
    tokenizer: Any | None,
    settings: RecordingSettings,
    metadata: Mapping[str, Any] | None = None,
    sign_of_life: Callable[[], None] = lambda: None,
) -> IndexWriter:
    """
    Open an index for a model and a dataset, new or to be continued, with its examples written.

    Args:
        folder (`str` or `os.PathLike`): Of the index.
        model (`nn.Module`): With input embeddings.
        dataset (`Dataset` or [`Examples`]): Tokenised examples; their readable columns are kept.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): What turned text into these tokens; a processor will do.
        settings ([`RecordingSettings`]): How rows are made and stored.
        metadata (`Mapping`, *optional*): Anything else worth knowing, in terms of JSON.
        sign_of_life (`Callable`): Called every now and then.

    Raises:
        ValueError: if the model has no input embeddings, an example cannot be recorded, or the folder holds an index of
            another dataset, model or settings; the message says which.
    """
    model = unwrap_model(model)
    matrix = input_embedding_matrix(model)
    if not isinstance(dataset, Examples):
        dataset = Examples(dataset, dataset)
    if len(dataset) == 0:
        raise ValueError("The dataset to record must have examples, but it is empty. Pass one that is not.")
    table = describe_examples(
        dataset,
        vocabulary_size=len(matrix),
        num_positions=num_positions(model),
        num_classes=num_classes(model) if settings.loss_fn is None else None,
        sign_of_life=sign_of_life,
    )
    writer = IndexWriter(
        folder,
        width=matrix.shape[1],
        vocabulary_size=len(matrix),
        num_examples=len(dataset),
        dtype=settings.dtype,
        projection_width=settings.projection_width,
        projection_seed=settings.projection_seed,
        max_segment_bytes=settings.max_segment_bytes,
        settings={
            **settings.to_manifest(tokenizer),
            "virtual": not matrix.requires_grad,
            "tokenizer": _describe_tokenizer(tokenizer),
            "dataset": {
                "fingerprint": dataset_fingerprint(table.column("content_hash").to_pylist()),
                "num_rows": len(dataset),
            },
            "metadata": dict(metadata or {}),
        },
    )
    try:
        writer.write_examples(table)
    except BaseException:
        writer.close()
        raise
    return writer


def _describe_tokenizer(processing_class: Any | None) -> dict[str, Any] | None:
    tokenizer = text_tokenizer(processing_class)
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return {
        "name": getattr(tokenizer, "name_or_path", None) or None,
        "vocabulary_size": len(tokenizer),
        "fingerprint": tokenizer_fingerprint(tokenizer),
    }


def make_recorder(model: nn.Module, settings: RecordingSettings, tokenizer: Any | None) -> EmbeddingGradientRecorder:
    """The recorder that [`record_checkpoint`] uses. One for all checkpoints of a training checks and warns once."""
    return EmbeddingGradientRecorder(unwrap_model(model), **settings.recorder_options(tokenizer))


def record_checkpoint(
    writer: IndexWriter,
    recorder: EmbeddingGradientRecorder,
    batches: SequentialBatches,
    *,
    name: str,
    step: int,
    epoch: float | None,
    learning_rate: float,
    path: str,
    revision: str | None = None,
    second_moments: Tensor | None = None,
    progress: bool = True,
    sign_of_life: Callable[[], None] = lambda: None,
) -> None:
    """
    Record all examples at the current weights; where an earlier recording of the same weights ended, if there is one.

    The model, its mode and gradients and all random numbers are afterwards as before. Interrupted, the segments that are
    whole stay on disk, and the same call continues after them.

    Args:
        writer (`IndexWriter`): From [`open_writer`].
        recorder ([`EmbeddingGradientRecorder`]): From [`make_recorder`].
        batches ([`SequentialBatches`]): Of all examples.
        name (`str`), step (`int`), epoch (`float`, *optional*), path (`str`), revision (`str`, *optional*): Of the checkpoint.
        learning_rate (`float`): The one that made the step that led here.
        second_moments (`torch.Tensor` of shape `(vocabulary_size, width)`, *optional*):
            Adam's bias-corrected `v` of the embedding matrix; rows are divided by `sqrt(v) + eps`.
        progress (`bool`): Whether to show a progress bar.
        sign_of_life (`Callable`): Called after each batch.

    Raises:
        ValueError: if the embeddings were resized since the index was opened, or an example cannot be recorded.
    """
    model = recorder.model
    require_same_embeddings(writer, model)
    facts = {"step": step, "epoch": epoch, "learning_rate": learning_rate, "path": path, "revision": revision}
    checkpoint = writer.checkpoint(
        name, **facts, model_class=type(model).__name__, fingerprint=model_fingerprint(model)
    )
    bar = tqdm(
        total=len(batches),
        initial=checkpoint.num_done,
        desc=f"Recording {name}",
        unit=" examples",
        leave=False,
        disable=not progress,
    )
    with checkpoint, bar, preserved_random_state(), full_precision(model), recorder:
        for start, batch in batches.starting_at(checkpoint.num_done) if checkpoint.num_done < len(batches) else ():
            rows = _after(recorder.record(batch), checkpoint.num_done - start)
            if second_moments is not None:
                metric = second_moments[rows.tokens].to(rows.rows.dtype)
                rows.rows = scale_by_second_moment(rows.rows, metric, eps=SECOND_MOMENT_EPS, sides="one")
            checkpoint.add(rows)
            bar.update(len(rows))
            sign_of_life()
        checkpoint.finish()


def _after(rows: TokenRows, num_skipped: int) -> TokenRows:
    """Without the first examples, which are on disk already."""
    if num_skipped <= 0:
        return rows
    first = int(rows.offsets[num_skipped])
    return TokenRows(rows.offsets[num_skipped:] - first, rows.tokens[first:], rows.rows[first:], rows.virtual)


def require_same_embeddings(writer: IndexWriter, model: nn.Module) -> None:
    """
    Raises:
        ValueError: if the embedding matrix has another shape than that of the index.
    """
    expected = (writer.config["vocabulary_size"], writer.config["width"])
    shape = tuple(input_embedding_matrix(model).shape)
    if shape != expected:
        raise ValueError(
            f"All checkpoints of an index must have one shape of embeddings, {expected} here, but `{type(model).__name__}`"
            f" has {shape}. Embeddings that were resized in between need an index of their own: another folder."
        )


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """The model without the autocast that accelerate puts around its forward: as a query's search will load it."""
    original, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is None or wrapped is None:
        yield
        return
    try:
        model.forward = original
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.forward = wrapped


def check_first_batch(recorder: EmbeddingGradientRecorder, batches: SequentialBatches) -> bool:
    """
    Record a few examples and forget them, so that what cannot be recorded is refused before hours of training.

    Args:
        recorder ([`EmbeddingGradientRecorder`]): Learns of this batch what it would of the first one.
        batches ([`SequentialBatches`]): Of all examples.

    Returns:
        `bool`: whether dataset or collator draw random numbers.

    Raises:
        ValueError: if the batch cannot be recorded.
    """
    few = SequentialBatches(
        batches.dataset, batches.collator, batch_size=min(batches.batch_size, 8), seed=batches.seed
    )
    with preserved_random_state():
        random = few.are_random()
        with full_precision(recorder.model), recorder:
            recorder.record(few.collate(0, seed=few.seed))
    return random


def record_dataset(
    folder: str | os.PathLike,
    checkpoints: Sequence[str | os.PathLike],
    dataset: Any,
    *,
    collator: Callable | None = None,
    tokenizer: Any | None = None,
    settings: RecordingSettings | None = None,
    learning_rates: Sequence[float] | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> IndexWriter:
    """
    Record a dataset at checkpoints that a Trainer has saved before; those that the index has whole are left as they are.

    Args:
        folder (`str` or `os.PathLike`): Of the index, new or of the same dataset, model and settings.
        checkpoints (`Sequence`): Folders with a model or adapter of transformers, in the order of training.
        dataset (`Dataset` or [`Examples`]): Tokenised as for training, with labels; its readable columns are kept.
        collator (`Callable`, *optional*): What makes batches of examples, as in training; pads by the tokenizer if left out.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The one of the model.
        settings ([`RecordingSettings`], *optional*): Of `record="checkpoint"`, without `second_moment`.
        learning_rates (`Sequence[float]`, *optional*):
            In force at each checkpoint; else read from its `trainer_state.json`, if the Trainer logged at that very step.
        batch_size (`int`): How many examples at once; changes no row.
        device (`str` or `torch.device`, *optional*): Where to compute; a GPU if there is one.
        seed (`int`): Of whatever the collator draws.
        progress (`bool`): Whether to show progress bars.

    Returns:
        `IndexWriter`: of the index, closed; its `checkpoint_names` say what it holds.

    Raises:
        FileNotFoundError: if a checkpoint is no folder with a model.
        BlockingIOError: if another process is writing the index.
        ValueError: if a learning rate is unknown, the checkpoints' embeddings differ in shape, or an example cannot be
            recorded; what was recorded before stays.
    """
    settings = settings or RecordingSettings()
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(f"`checkpoints` must be a list of folders, but got {str(checkpoints)!r} alone.")
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    _require_after_training(settings, paths, learning_rates)
    facts = [
        describe_checkpoint(path, learning_rate=None if learning_rates is None else learning_rates[position])
        for position, path in enumerate(paths)
    ]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    writer = batches = None
    try:
        for path, fact in zip(paths, facts, strict=True):
            if writer is not None and fact["name"] in writer.checkpoint_names:
                continue
            model = load_model(path, device=device)
            recorder = make_recorder(model, settings, tokenizer)
            if writer is None:
                examples = (
                    dataset if isinstance(dataset, Examples) else Examples(prune_columns(dataset, model), dataset)
                )
                writer = open_writer(folder, model=model, dataset=examples, tokenizer=tokenizer, settings=settings)
                collator = collator or padding_collator(tokenizer)
                batches = SequentialBatches(examples.recorded, collator, batch_size=batch_size, seed=seed)
            require_same_embeddings(writer, model)
            if fact["name"] not in writer.checkpoint_names:
                record_checkpoint(
                    writer, recorder, batches, **fact, path=stored_path(path, writer.folder), progress=progress
                )
    finally:
        if writer is not None:
            writer.close()
    return writer


def _require_after_training(
    settings: RecordingSettings, paths: Sequence[Path], learning_rates: Sequence[float] | None
) -> None:
    if not paths:
        raise ValueError("`checkpoints` must name at least one folder with a model, but it is empty.")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"`checkpoints` must have names of their own, but their folders are called {names}.")
    if settings.record != "checkpoint" or settings.second_moment:
        raise ValueError(
            "Checkpoints can be recorded after training with `record='checkpoint'` and without `second_moment`: online rows"
            " and Adam's moments are there in training only. Use `TracInWECallback` for those."
        )
    if learning_rates is None:
        return
    given = list(learning_rates) if isinstance(learning_rates, Iterable) else [learning_rates]
    if len(given) != len(paths):
        raise ValueError(
            f"`learning_rates` must have one number for each checkpoint, but there are {len(given)} for {len(paths)}."
        )
    wrong = [rate for rate in given if not isinstance(rate, int | float) or not 0 <= rate < math.inf]
    if wrong:
        raise ValueError(f"`learning_rates` must be numbers of at least 0, but got {wrong[0]!r}.")
