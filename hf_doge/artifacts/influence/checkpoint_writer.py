"""
Writing the gradient rows of one checkpoint, segment by segment, so that an interruption costs one segment at most.

Several processes may write segments of one checkpoint into the same folder, each those of other examples and with a
journal of its own, `journal.json` or `journal-<part>.json`; the one that finishes it takes them all together.
"""

import logging
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_doge.artifacts.influence.manifest import GRADIENTS, METRIC, OFFSETS, PARTIAL
from hf_doge.artifacts.influence.metric import Divisors, write_metric
from hf_doge.artifacts.influence.open_index import OpenIndex
from hf_doge.artifacts.influence.segments import encode_segment
from hf_doge.files import sha256, sync_folder, write_atomically, write_json
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.text import parse_json

logger = logging.getLogger(__name__)

JOURNAL, JOURNALS = "journal.json", "journal*.json"  # of the process that publishes; of all


class CheckpointWriter(AbstractContextManager):
    """
    Takes the rows of all examples at one checkpoint, in order of `example_id`. Made by [`IndexWriter.checkpoint`].

    What was interrupted continues after its last whole segment, at example `num_done`. Leaving the context before
    [`IndexWriter.publish`] keeps the segments written so far and shows no checkpoint.

    Several processes share the work so: one has the writer and asks it what is [`~CheckpointWriter.missing`]; the others
    have parts of it, from [`IndexWriter.checkpoint_part`]; each calls [`~CheckpointWriter.begin`] for its ranges and adds
    their rows. When all have done so, the one with the writer publishes it.

    Args:
        index ([`OpenIndex`]): Which it belongs to.
        facts (`dict`): What tells the checkpoint from others, its number as `position` among them.
        borders (`Sequence[int]`, *optional*): See [`IndexWriter.checkpoint`].
        part (`int`, *optional*): Which part of it this is, if another process has begun it.

    Attributes:
        num_done (`int`): The next example that is to be added. All before it are on disk, or will be with the next
            segment, unless it was set by [`~CheckpointWriter.begin`].
        facts (`dict`): What tells the checkpoint from others, for [`IndexWriter.checkpoint_part`].
    """

    def __init__(
        self,
        index: OpenIndex,
        facts: dict[str, Any],
        *,
        borders: Sequence[int] | None = None,
        part: int | None = None,
    ) -> None:
        self._index = index
        self._config = index.config
        self.facts = facts
        # Of an index that grows, only the examples that are new.
        self._start, self._stop = index.first_example, index.num_examples
        folder = facts["name"] if self._start == 0 else f"{facts['name']}/{self._start:08d}"
        self._gradients = Place(index.folder, f"{GRADIENTS}/{folder}")
        self._offsets = Place(index.folder, f"{OFFSETS}/{folder}")
        self._metric = Place(index.folder, f"{METRIC}/{folder}")
        self._metric_files: list[dict[str, Any]] | None = None
        self._borders = sorted({border for border in borders or () if self._start < border < self._stop})
        self._in_order = borders is None
        self._journal = self._gradients.partial / (JOURNAL if part is None else f"journal-{part:05d}.json")
        self._segments: list[dict[str, Any]] = self._continue() if part is None else []
        self._capacity = max(1, index.max_segment_bytes // (4 * self._config["stored_width"]))
        self._closed = False
        self._projection = index.projection
        self._clear()
        missing = self.missing()
        self._first, self._end = missing[0] if missing else (self._stop,) * 2
        self.num_done = self._first
        self._is_range = False  # what is added last is written by `finish`

    def missing(self) -> list[tuple[int, int]]:
        """The ranges `[first, last)` of examples that no segment holds yet, none of them across a border."""
        covered = [(segment["first_example"], segment["num_examples"]) for segment in self._segments]
        gaps, end = [], self._start
        for first, count in [*sorted(covered), (self._stop, 0)]:
            between = slice(bisect_right(self._borders, end), bisect_left(self._borders, first))
            cuts = [end, *self._borders[between], first]
            gaps += [(begin, stop) for begin, stop in pairwise(cuts) if begin < stop]
            end = first + count
        return gaps

    def begin(self, first: int, last: int) -> None:
        """
        The examples added next are `[first, last)`. A segment ends with `last` and at every border, filled or not.

        Args:
            first (`int`), last (`int`): One range of [`~CheckpointWriter.missing`], or several that follow each other.
        """
        self._require_open()
        if not self._start <= first < last <= self._stop:
            raise ValueError(
                f"A range must lie in [{self._start}, {self._stop}) and not be empty, but got [{first}, {last})."
            )
        if self._num_buffered:
            raise ValueError(f"The range before must be added to its end first, example {self._end}.")
        self._first = self.num_done = first
        self._end, self._is_range = last, True

    def _continue(self) -> list[dict[str, Any]]:
        """The whole segments of an interrupted writing of the same checkpoint; what else lies there is removed."""
        places = [self._gradients] if self._config["dtype"] == "int8" else [self._gradients, self._offsets]
        for place in places:
            place.reopen()
        kept = self._join([], self._gradients.partial.glob(JOURNALS))
        if kept:
            write_json(self._journal, {"checkpoint": self.facts, "segments": kept})
        names = {Path(segment["path"]).name for segment in kept if segment["path"] is not None}
        for place in places:
            place.remove_others(names | {JOURNAL} if kept and place is self._gradients else names)
        return kept

    def _join(
        self, own: Sequence[dict[str, Any]], journals: Iterable[Path], heartbeat: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """Own segments and those that journals tell of and whose files are whole, by ascending example, without overlap."""
        found = list(own)
        for journal in sorted(journals):
            segments: list[dict[str, Any]] = []
            with suppress(ValueError, KeyError, TypeError):  # a damaged journal is as good as none
                written = parse_json(journal.read_bytes(), source=str(journal))
                if written["checkpoint"] == self.facts:
                    segments = [segment for segment in written["segments"] if self._is_whole(segment, heartbeat)]
            if not segments:
                logger.info("%s is of other weights, or damaged: what it tells of is recorded again.", journal)
            found += segments
        kept, end = [], self._start
        for segment in sorted(found, key=lambda segment: segment["first_example"]):
            if segment["first_example"] == end or (segment["first_example"] > end and not self._in_order):
                kept.append(segment)
                end = segment["first_example"] + segment["num_examples"]
        return kept

    def add(self, token_rows: TokenRows) -> None:
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
            # A segment ends with the example that fills it, or at a border, however the examples came in batches.
            border = self._next_border() - self.num_done + first
            filled = np.cumsum(lengths[first:border]) + self._num_rows >= self._capacity
            full = bool(filled.any())
            last = first + int(filled.argmax()) + 1 if full else min(border, len(lengths))
            end = start + int(lengths[first:last].sum())
            self._buffer.append((lengths[first:last], tokens[start:end], rows[start:end]))
            self._num_rows += end - start
            self._num_buffered += last - first
            self.num_done += last - first
            if full or (last == border and (self._is_range or self.num_done < self._end)):
                self._flush()
            first, start = last, end

    def _next_border(self) -> int:
        """Where the segment that is being filled ends at the latest."""
        following = bisect_right(self._borders, self.num_done)
        border = self._borders[following] if following < len(self._borders) else self._end
        return min(border, self._end)

    def finish(
        self, *, divisors: Divisors | None = None, heartbeat: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """
        Close the writer when all parts are written. The files of others are read and checked.

        Args:
            divisors (`Callable`, *optional*): See [`IndexWriter.publish`].
            heartbeat (`Callable`): Called every now and then.

        Returns:
            `list[dict]`: the segments of all parts, by ascending example.

        Raises:
            ValueError: Not all examples were added, or a file of another process is not what it wrote.
        """
        self._require_open()
        others = set(self._gradients.partial.glob(JOURNALS)) - {self._journal}
        segments = self._join(self._segments, others, heartbeat)
        num_done = sum(segment["num_examples"] for segment in segments) + self._num_buffered
        if num_done != self._stop - self._start:
            raise ValueError(
                f"A checkpoint must hold all {self._stop - self._start} examples, but {num_done} were added to"
                f" {self.facts['name']!r}, and are whole. Add the others first."
            )
        if self._num_buffered:
            self._flush()
            segments.append(self._segments[-1])
        if divisors is not None:
            self._metric_files = self._write_metric(segments, divisors)
        self._closed = True
        return sorted(segments, key=lambda segment: segment["first_example"])

    def entry(self, before: Mapping[str, Any], segments: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What config.json says of the files of this checkpoint; `before` is what it says of the examples before."""
        files = _with_files([*before.get("files", ()), *segments]) or [self._write_nothing()]
        if self._metric_files is None:
            return {"files": files}
        return {"files": files, "metric": [*before.get("metric", ()), *self._metric_files]}

    def settle(self) -> None:
        """Give the finished files their places."""
        if self._metric_files:
            self._metric.settle()
        if self._config["dtype"] != "int8":
            self._offsets.settle()
        self._gradients.settle()

    def clean(self) -> None:
        """Remove what only an interruption would have needed."""
        for journal in self._gradients.final.glob(JOURNALS):
            journal.unlink()

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
                f"Checkpoint {self.facts['name']!r} is closed. Continue it by a new `IndexWriter.checkpoint`."
            )
        self._index.require_open()

    def _checked(self, token_rows: TokenRows) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Lengths, tokens, and rows as float32 of the stored width."""
        num_done = self.num_done + len(token_rows)
        if num_done > self._end:
            wanted = f"up to example {self._end}" if self._end < self._stop else f"for {self._end} examples"
            raise ValueError(f"The index was opened {wanted}, but {num_done} were added to {self.facts['name']!r}.")
        token_rows.check(width=self._config["width"], vocabulary_size=self._config["vocabulary_size"])
        lengths = token_rows.offsets.diff().cpu().numpy()
        rows, projection = token_rows.rows.detach().cpu(), self._projection
        rows = (rows if projection is None else rows @ projection.to(rows.dtype)).float()
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
        segment: dict[str, Any] = {
            "path": None,
            "sha256": None,
            "offsets_path": None,
            "offsets_sha256": None,
            "num_rows": len(tokens),
            "first_example": self._first,
            "num_examples": len(lengths),
            "scale": 1.0,
        }
        try:
            if len(tokens):  # else it needs no file, which `datasets` would stumble over
                segment |= self._write(lengths, tokens, rows)
            segments = [*self._segments, segment]
            write_json(self._journal, {"checkpoint": self.facts, "segments": segments})
        except BaseException:
            self._closed = True
            raise
        self._segments = segments
        self._first = self.num_done
        self._clear()

    def _write(self, lengths: np.ndarray, tokens: np.ndarray, rows: Tensor) -> dict[str, Any]:
        """The file of a segment, named by its first example, so that no two processes write the same."""
        ids = np.arange(self._first, self._first + len(lengths), dtype=self._index.example_dtype)
        name = f"segment-{self._first:08d}.parquet"
        encoded = encode_segment(
            tokens,
            ids.repeat(lengths),
            rows,
            dtype=self._config["dtype"],
            checkpoint=self.facts["position"],
            facts={"checkpoint": self.facts["name"], "first_example": self._first},
        )
        written: dict[str, Any] = {"scale": encoded.scale}
        kinds = {"": (self._gradients, encoded.content), "offsets_": (self._offsets, encoded.offsets)}
        for kind, (place, content) in kinds.items():
            written |= {f"{kind}path": None, f"{kind}sha256": None}
            if content is not None:
                write_atomically(place.partial / name, content)
                written |= {f"{kind}path": place.path_of(name), f"{kind}sha256": sha256(content)}
        return written

    def _write_metric(self, segments: Sequence[dict[str, Any]], divisors: Divisors) -> list[dict[str, Any]]:
        """The metric of the tokens of all segments, in one file, or in none where there is no token."""
        folder, number = self._gradients.partial, self.facts["position"]
        paths = [folder / Path(segment["path"]).name for segment in segments if segment["path"] is not None]
        written = write_metric(self._metric.partial, paths, divisors, config=self._config, checkpoint=number)
        return [] if written is None else [{**written, "path": self._metric.path_of(written["path"])}]

    def _is_whole(self, segment: dict[str, Any], heartbeat: Callable[[], None]) -> bool:
        """Whether the files of a segment are what the journal says."""
        heartbeat()
        return all(
            segment[f"{kind}path"] is None
            or _has_content(place.partial, segment[f"{kind}path"], segment[f"{kind}sha256"])
            for kind, place in (("", self._gradients), ("offsets_", self._offsets))
        )

    def _write_nothing(self) -> dict[str, Any]:
        """One file without rows, where no example has any: a checkpoint has one file at least."""
        self._first, num_examples = self._start, self._stop - self._start
        no_rows = torch.empty(0, self._config["stored_width"])
        written = self._write(np.zeros(num_examples, dtype=np.int64), np.zeros(0, dtype=np.int64), no_rows)
        return {**written, "num_rows": 0, "first_example": self._first, "num_examples": num_examples}


class Place:
    """A folder of the index that appears as a whole: until then it is called `*.partial`."""

    def __init__(self, index: Path, path: str) -> None:
        self._path = path
        self.final = index / path
        self.partial = self.final.with_name(self.final.name + PARTIAL)

    def path_of(self, name: str) -> str:
        """A file of it as the index will know it."""
        return f"{self._path}/{name}"

    def reopen(self) -> None:
        if self.final.exists() and not self.partial.exists():  # interrupted between the last steps of finish()
            self.final.rename(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)

    def remove_others(self, names: set[str]) -> None:
        for path in self.partial.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def settle(self) -> None:
        shutil.rmtree(self.final, ignore_errors=True)  # of a checkpoint that was forgotten
        self.partial.rename(self.final)
        sync_folder(self.final.parent)


def _has_content(folder: Path, recorded: str, checksum: str) -> bool:
    path = folder / Path(recorded).name
    return path.is_file() and sha256(path) == checksum


def _with_files(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Examples of segments without a file, as none of them has a row, counted to the segment before or the first one."""
    merged: list[dict[str, Any]] = []
    num_leading = 0
    for segment in segments:
        count = segment["num_examples"]
        if segment["path"] is not None:
            first = segment["first_example"] - num_leading
            merged.append({**segment, "first_example": first, "num_examples": count + num_leading})
            num_leading = 0
        elif merged:
            merged[-1] = {**merged[-1], "num_examples": merged[-1]["num_examples"] + count}
        else:
            num_leading += count
    return merged
