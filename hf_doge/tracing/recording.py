"""
Recording at a checkpoint: the gradient rows of all examples at one state of the weights.

Rows are those of each example alone, in evaluation mode and the precision of the weights, of the model's own loss (or
`loss_fn`): whatever the batch, accumulation, autocast, label smoothing and dropout of training.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Protocol

from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerState, TrainingArguments

from hf_doge.artifacts.influence.checkpoint_writer import CheckpointWriter
from hf_doge.artifacts.influence.fitted_writer import FittedCheckpointWriter
from hf_doge.artifacts.influence.metric import metric_of
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.basis import fit_basis, sampled
from hf_doge.tracing.batches import SequentialBatches, preserved_random_state
from hf_doge.tracing.encoding import describe_encoding
from hf_doge.tracing.models import buffer_fingerprint, describe_dtypes, model_fingerprint, unwrap_model
from hf_doge.tracing.opening import SharedIndex
from hf_doge.tracing.processes import num_processes, process_index, run_on_all_processes, run_on_main_process
from hf_doge.tracing.second_moments import SecondMoments
from hf_doge.tracing.settings import RecordingSettings, text_tokenizer

Range = tuple[int, int]  # examples [first, last)


class Recording(Protocol):
    """
    What [`TracInWECallback`] asks of a recording. All processes call each method.

    What is told of a checkpoint are its `name`, `step`, `epoch`, `path` and the `learning_rate` of the step that led to it.
    """

    def start(
        self, *, model: nn.Module, train_dataloader: DataLoader, args: TrainingArguments, state: TrainerState
    ) -> None:
        """At the beginning of a training, or of a resumed one: open the index, and refuse what cannot be recorded."""

    def finish_interrupted(self, facts: Mapping[str, Any], *, model: nn.Module, state: TrainerState) -> None:
        """Finish the checkpoint that training resumes from, if its recording was interrupted or never begun."""

    def before_step(self) -> None:
        """The first forward of a step is next."""

    def before_optimizer_step(self, *, learning_rate: float, state: TrainerState) -> None:
        """The backward of a step is done, and it is about to be made with this learning rate."""

    def after_first_step(self, *, model: nn.Module) -> None:
        """The optimizer has made its first step."""

    def plan(self, facts: Mapping[str, Any]) -> None:
        """Note on disk what [`save`] is about to be called with, in case it does not come to its end."""

    def save(self, facts: Mapping[str, Any], *, model: nn.Module) -> None:
        """Record the checkpoint whose weights the model has."""

    def stop(self) -> None:
        """Let go of the index, and leave model and DataLoader as they were."""


def make_recorder(model: nn.Module, settings: RecordingSettings, tokenizer: Any | None) -> EmbeddingGradientRecorder:
    """The recorder that [`record_checkpoint`] uses. One for all checkpoints of a training checks and warns once."""
    model = unwrap_model(model)
    layers = settings.chosen_layers(model)
    return EmbeddingGradientRecorder(model, **settings.recorder_options(tokenizer), layers=layers)


def record_checkpoint(
    index: SharedIndex,
    recorder: EmbeddingGradientRecorder,
    batches: SequentialBatches,
    facts: Mapping[str, Any],
    *,
    second_moments: SecondMoments | None = None,
    progress: bool | tqdm = True,
) -> None:
    """
    Record all examples at the current weights; where an earlier recording of the same weights ended, if there is one.

    All processes call this, each with the whole dataset and the same weights. Each records some of the segments that are
    missing; when all are whole and their checksums right, the main one makes the checkpoint visible. The files are those
    that one process writes, to the byte, on the same kind of device and with the same `batches.batch_size`.

    The model, its mode and gradients and all random numbers are afterwards as before. Interrupted, the segments that are
    whole stay on disk, and the same call continues after them, on any number of processes.

    Args:
        index ([`SharedIndex`]): From [`open_shared_index`].
        recorder ([`EmbeddingGradientRecorder`]): From [`make_recorder`].
        batches ([`SequentialBatches`]): All examples.
        facts (`Mapping`):
            `name`, `step`, `epoch`, `path` of the checkpoint, the `learning_rate` of the step that led to it, and perhaps
            its `revision`, see [`IndexWriter.checkpoint`].
        second_moments ([`SecondMoments`], *optional*):
            Adam's `v` of the embedding matrix, where the index is in its metric: rows are divided by `sqrt(sqrt(v) + eps)`.
            An interrupted recording continues, and a whole one grows, with the same only.
        progress (`bool` or `tqdm`): Whether to show a progress bar, of the main process's share; or a bar of many checkpoints.

    Raises:
        ValueError: if the embeddings were resized since the index was opened, an example cannot be recorded, or
            processes have different weights.
        ProcessFailedError: if another process raised an error or was killed, see [`run_on_all_processes`].
    """
    share = CheckpointShare(index, recorder, second_moments)
    ranges = share.begin(facts)
    if index.writer.fits_basis:
        share.fit(batches)
    share.record(batches, ranges, progress=progress)
    share.publish()


class CheckpointShare:
    """What one process does for a checkpoint that all of them record. See [`record_checkpoint`] for the arguments."""

    def __init__(
        self, index: SharedIndex, recorder: EmbeddingGradientRecorder, second_moments: SecondMoments | None
    ) -> None:
        self._index = index
        self._recorder = recorder
        self._second_moments = second_moments
        self._facts: dict[str, Any] = {}
        self._one_sided = False  # of an index that an earlier version began
        self._writer: CheckpointWriter | None = None

    def begin(self, facts: Mapping[str, Any]) -> list[Range]:
        """Begin the checkpoint on the main process, or continue it. Returns the examples that this process is to record."""
        told = run_on_all_processes(lambda heartbeat: self._begin(facts))
        self._facts, self._one_sided = told[0]["facts"], told[0]["one_sided"]
        able = _able(told)
        shares = share_ranges([(first, last) for first, last in told[0]["missing"]], len(able))
        return shares[able.index(process_index())] if process_index() in able else []

    def fit(self, batches: SequentialBatches) -> None:
        """Of an index with `projection="pca"`: see on the main process that the checkpoint has its basis, for all of them."""
        run_on_main_process(lambda heartbeat: self._fit(batches, heartbeat))

    def record(self, batches: SequentialBatches, ranges: Sequence[Range], *, progress: bool | tqdm = True) -> None:
        """Record the examples of some ranges."""
        run_on_all_processes(lambda heartbeat: self._record(batches, ranges, progress, heartbeat))

    def publish(self) -> None:
        """Make the checkpoint visible, once all processes have recorded their ranges."""
        moments = None if self._one_sided else self._second_moments
        divisors = None if moments is None else moments.divisors
        publish = self._index.writer.publish
        run_on_main_process(lambda heartbeat: publish(self._writer, divisors=divisors, heartbeat=heartbeat))

    def _begin(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Which weights this process has; of the main one, what is to be recorded too."""
        model = self._recorder.model
        moments = None if self._second_moments is None else self._second_moments.fingerprint()
        weights = {"weights": model_fingerprint(model), "buffers": buffer_fingerprint(model), "moments": moments}
        if process_index() > 0:
            return weights
        entry = {
            "fingerprint": weights["weights"],
            "dtypes": describe_dtypes(model),
            "model_class": type(model).__name__,
        }
        writer, borders = self._index.writer, self._index.borders
        writer.require_embeddings(input_embedding_matrix(model), entry["model_class"])
        self._writer = writer.checkpoint(**facts, **entry, second_moments=moments, borders=borders)
        one_sided = moments is not None and metric_of(writer.config) == "one-sided"
        return {**weights, "facts": self._writer.facts, "missing": self._writer.missing(), "one_sided": one_sided}

    def _fit(self, batches: SequentialBatches, heartbeat: Callable[[], None]) -> None:
        assert isinstance(self._writer, FittedCheckpointWriter)
        if self._writer.basis is not None:  # of what was interrupted, or grows
            return
        asked = self._index.writer.config["projection"]
        # A copy: what the recorder learns of its first batch decides how rows are rounded.
        with preserved_random_state(), self._recorder.copy() as recorder:
            rows = (self._measured(recorder.record(batch)) for batch in sampled(batches, seed=asked["seed"]))
            basis = fit_basis(rows, width=asked["width"], heartbeat=heartbeat)
        self._writer.write_basis(basis)

    def _measured(self, rows: TokenRows) -> TokenRows:
        """Rows in the metric of the index."""
        moments = self._second_moments
        return rows if moments is None else moments.measure(rows, one_sided=self._one_sided)

    def _record(
        self, batches: SequentialBatches, ranges: Sequence[Range], progress: bool | tqdm, heartbeat: Callable[[], None]
    ) -> None:
        index, rank = self._index, process_index()
        if self._writer is None:
            self._writer = index.writer.checkpoint_part(self._facts, part=rank, borders=index.borders)
        count = sum(last - first for first, last in ranges)
        total = count if num_processes() > 1 else len(batches)
        name, hidden, rows_each = f"Recording {self._facts['name']}", not progress or rank > 0, 1.0
        shown: AbstractContextManager[tqdm]
        if isinstance(progress, bool):
            end, begin = total, total - count
            shown = tqdm(total=total, initial=begin, desc=name, unit=" examples", leave=False, disable=hidden)
        else:  # the bar of many checkpoints, of all examples whosever they are, stays open
            end, begin = progress.n + len(batches), progress.n + total - count
            rows_each = len(batches) / max(count, 1) if total == count else 1.0
            progress.set_description(name)
            shown = nullcontext(progress)
        done = 0
        with shown as bar, preserved_random_state(), self._recorder:
            for first, last in ranges:
                self._writer.begin(first, last)
                for start, batch in batches.between(first, last):
                    rows = self._recorder.record(batch)
                    # Other examples of the batch are on disk already, or another process's.
                    rows = rows.between(max(0, first - start), min(last - start, len(rows)))
                    if self._second_moments is not None:
                        rows = self._measured(rows)
                    self._writer.add(rows)
                    done += len(rows)
                    bar.update(begin + round(done * rows_each) - bar.n)
                    heartbeat()
            bar.update(end - bar.n)


def share_ranges(ranges: Sequence[Range], num_shares: int) -> list[list[Range]]:
    """
    As many ranges in a row for each process, those that touch joined to one. The first processes have no fewer than others.

    Args:
        ranges (`Sequence[tuple[int, int]]`): About equally long to record, as segments are.
        num_shares (`int`): Number of processes.
    """
    stops = [-(-len(ranges) * share // num_shares) for share in range(num_shares + 1)]
    return [_joined(ranges[start:stop]) for start, stop in pairwise(stops)]


def _joined(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for first, last in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return joined


def _able(told: Sequence[Mapping[str, Any]]) -> list[int]:
    """The processes that have what makes the same rows as on the main one: its weights, buffers and moments."""
    different = [rank for rank, own in enumerate(told) if own["weights"] != told[0]["weights"]]
    if different:
        raise ValueError(
            f"All processes must have the same weights to record them, but those of processes {different} differ from the"
            " main one's. Train with DistributedDataParallel, or load the same checkpoint on all."
        )
    # DDP sends buffers (batch norm's means) from the main process at the next forward; until then theirs may differ.
    return [
        rank
        for rank, own in enumerate(told)
        if (own["buffers"], own["moments"]) == (told[0]["buffers"], told[0]["moments"])
    ]


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
        with recorder:
            recorder.record(few.collate(0, seed=few.seed))
            recorder.ask_all_labels()
        # What later examples have may be what makes them depend on each other. They are looked at by a copy, for what the
        # recorder learns of the first batch decides how rows are rounded.
        last = (len(few) - 1) // few.batch_size * few.batch_size
        with recorder.copy() as other:
            for batch in (*few.some(2 * few.batch_size), few.collate(last, seed=few.seed)):
                other.look_at(batch)
    return random


def encoding_of(
    batches: SequentialBatches,
    tokenizer: Any | None,
    args: Any | None = None,
    *,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """For config.json: how the examples were made, as some of them show or as is `known`, so that queries are made alike."""
    with preserved_random_state():
        seen = describe_encoding(batches.some(256), text_tokenizer(tokenizer), args)
    return {"encoding": {**seen, **(known or {})}}
