"""Writing the gradient rows of one checkpoint, segment by segment, so that an interruption costs one segment at most."""

import logging
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_doge.artifacts.files import sha256, sync_folder
from hf_doge.artifacts.influence.manifest import GRADIENTS, example_dtype, file_sha256, to_json, write_atomically
from hf_doge.artifacts.influence.segments import encode_segment
from hf_doge.artifacts.readers import parse_json

if TYPE_CHECKING:
    from hf_doge.artifacts.influence.writer import IndexWriter
    from hf_doge.gradients.token_rows import TokenRows

logger = logging.getLogger(__name__)

JOURNAL = "journal.json"
PARTIAL = ".partial"


class CheckpointWriter(AbstractContextManager):
    """
    Takes the rows of all examples at one checkpoint, in order of `example_id`. Made by [`IndexWriter.checkpoint`].

    What was interrupted continues after its last whole segment, at example `num_done`. Leaving the context without
    [`~CheckpointWriter.finish`] keeps the segments written so far and shows no checkpoint.

    Attributes:
        num_done (`int`): Examples `[0, num_done)` are on disk, or will be with the next segment.
    """

    def __init__(self, index: "IndexWriter", facts: dict[str, Any], *, position: int) -> None:
        self._index = index
        self._config = index.config
        self._facts = {**facts, "position": position}
        self._final = index.folder / GRADIENTS / facts["name"]
        self._partial = self._final.with_name(self._final.name + PARTIAL)
        self._segments: list[dict[str, Any]] = self._continue()
        self._capacity = max(1, index.max_segment_bytes // (4 * self._config["stored_width"]))
        self._closed = False
        self._clear()
        self.num_done = self._flushed

    @property
    def _flushed(self) -> int:
        return sum(segment["num_examples"] for segment in self._segments)

    def _continue(self) -> list[dict[str, Any]]:
        """The whole segments of an interrupted writing of the same checkpoint; what else lies there is removed."""
        if self._final.exists() and not self._partial.exists():  # interrupted between the last two steps of finish()
            self._final.rename(self._partial)
        journal = self._partial / JOURNAL
        kept: list[dict[str, Any]] = []
        if journal.is_file():
            with suppress(ValueError, KeyError, TypeError):  # a damaged journal is as good as none
                written = parse_json(journal.read_bytes(), source=str(journal))
                if written["checkpoint"] == self._facts:
                    kept = _whole(self._partial, written["segments"])
            if not kept:
                logger.info("Starting %s anew: what is there is of other weights, or damaged.", self._partial)
        self._partial.mkdir(parents=True, exist_ok=True)
        names = {Path(segment["path"]).name for segment in kept} | {JOURNAL}
        for path in self._partial.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return kept

    def add(self, token_rows: "TokenRows") -> None:
        """
        Add the next `len(token_rows)` examples.

        Raises:
            ValueError: Rows of another width, not finite, or more than there are examples; tokens out of the vocabulary or
                not merged. Nothing of this call is kept then.
            OSError: The disk is full. What was on it stays; free some space and continue by a new
                [`IndexWriter.checkpoint`].
        """
        self._require_open()
        lengths, tokens, rows = self._checked(token_rows)
        start = first = 0
        while first < len(lengths):
            # A segment ends with the example that fills it, however the examples came in batches.
            filled = np.cumsum(lengths[first:]) + self._num_rows >= self._capacity
            full = bool(filled.any())
            last = first + int(filled.argmax()) + 1 if full else len(lengths)
            end = start + int(lengths[first:last].sum())
            self._buffer.append((lengths[first:last], tokens[start:end], rows[start:end]))
            self._num_rows += end - start
            self._num_buffered += last - first
            if full:
                self._flush()
            first, start = last, end
        self.num_done = self._flushed + self._num_buffered

    def finish(self) -> None:
        """
        Make the checkpoint visible.

        Raises:
            ValueError: Not all examples were added.
        """
        self._require_open()
        if self.num_done != self._config["num_examples"]:
            raise ValueError(
                f"A checkpoint must hold all {self._config['num_examples']} examples, but {self.num_done} were added to"
                f" {self._facts['name']!r}. Add the others before `finish`."
            )
        if self._num_rows or not self._segments:
            self._flush()
        elif self._num_buffered:  # examples without rows need no file, which `datasets` would stumble over
            self._segments[-1] = {
                **self._segments[-1],
                "num_examples": self._segments[-1]["num_examples"] + self._num_buffered,
            }
        self._closed = True
        sync_folder(self._partial)
        self._partial.rename(self._final)
        sync_folder(self._final.parent)
        facts = {key: value for key, value in self._facts.items() if key != "position"}
        self._index._register({**facts, "files": self._segments}, position=self._facts["position"])
        (self._final / JOURNAL).unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        self._clear()

    def _clear(self) -> None:
        self._buffer: list[tuple[np.ndarray, np.ndarray, Tensor]] = []
        self._num_rows = self._num_buffered = 0

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError(
                f"Checkpoint {self._facts['name']!r} is closed. Continue it by a new `IndexWriter.checkpoint`."
            )
        self._index.require_open()

    def _checked(self, token_rows: "TokenRows") -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Lengths, tokens, and rows as float32 of the stored width."""
        num_examples = self._config["num_examples"]
        if self.num_done + len(token_rows) > num_examples:
            raise ValueError(
                f"The index was opened for {num_examples} examples, but {self.num_done + len(token_rows)} were added to"
                f" {self._facts['name']!r}."
            )
        check_token_rows(token_rows, width=self._config["width"], vocabulary_size=self._config["vocabulary_size"])
        lengths = token_rows.offsets.diff().cpu().numpy()
        rows = self._index.project(token_rows.rows.detach().cpu()).float()
        finite = torch.isfinite(rows).all(dim=1)
        if not finite.all():
            entry = int((~finite).nonzero()[0])
            example = self.num_done + int(np.searchsorted(np.cumsum(lengths), entry, side="right"))
            raise ValueError(
                f"Gradient rows must be finite in float32, but those of example {example} are not. Look at its loss."
            )
        return lengths, token_rows.tokens.cpu().numpy(), rows

    def _flush(self) -> None:
        """Write what is buffered as one segment, then the journal that makes it count."""
        lengths, tokens, rows = zip(*self._buffer, strict=True)
        lengths, tokens, rows = np.concatenate(lengths), np.concatenate(tokens), torch.cat(rows)
        first = self._flushed
        ids = np.arange(first, first + len(lengths), dtype=example_dtype(self._config))
        name = f"segment-{len(self._segments):05d}.parquet"
        facts = {"checkpoint": self._facts["name"], "first_example": first}
        try:
            content, scale = encode_segment(
                tokens,
                ids.repeat(lengths),
                rows,
                dtype=self._config["dtype"],
                checkpoint=self._facts["position"],
                facts=facts,
            )
            write_atomically(self._partial / name, content)
            segment = {
                "path": f"{GRADIENTS}/{self._final.name}/{name}",
                "sha256": sha256(content),
                "num_rows": len(tokens),
                "first_example": first,
                "num_examples": len(lengths),
                "scale": scale,
            }
            segments = [*self._segments, segment]
            write_atomically(self._partial / JOURNAL, to_json({"checkpoint": self._facts, "segments": segments}))
        except BaseException:
            self._closed = True
            raise
        self._segments = segments
        self._clear()


def check_token_rows(token_rows: "TokenRows", *, width: int, vocabulary_size: int) -> None:
    """
    Raises:
        ValueError: Rows of another width, tokens out of the vocabulary, or tokens of an example not distinct and ascending.
    """
    if token_rows.rows.ndim != 2 or token_rows.rows.shape[1] != width:
        raise ValueError(
            f"Gradient rows must have the width of the index, {width}, but their shape is"
            f" {tuple(token_rows.rows.shape)}. They are of another model."
        )
    tokens = token_rows.tokens
    if len(tokens) == 0:
        return
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary_size:
        raise ValueError(
            f"Tokens must be in [0, {vocabulary_size}), the vocabulary of the index, but they go from"
            f" {int(tokens.min())} to {int(tokens.max())}. Use the tokenizer that the index was made with."
        )
    ascending = tokens.diff() > 0
    borders = token_rows.offsets[1:-1]
    borders = borders[(borders > 0) & (borders < len(tokens))]
    ascending[borders - 1] = True
    if not ascending.all():
        raise ValueError(
            "The tokens of an example must be distinct and ascending, but they are not. Merge repeated tokens with"
            " `token_gradient_rows` first."
        )


def _whole(folder: Path, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The leading segments whose files are what the journal says."""
    for number, segment in enumerate(segments):
        path = folder / Path(segment["path"]).name
        if not path.is_file() or file_sha256(path) != segment["sha256"]:
            return segments[:number]
    return segments
