"""Reading an influence index: exact scores of queries with all training examples, token by token. Knows no models."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_doge.artifacts.influence.basis import read_basis
from hf_doge.artifacts.influence.examples import check_number_of_examples, read_examples
from hf_doge.artifacts.influence.manifest import (
    MANIFEST,
    check_files,
    embedding_shape,
    fits_basis,
    read_config,
    recorded_checksums,
    require_checkpoints,
    warn_of_unknown,
)
from hf_doge.artifacts.influence.metric import CheckpointMetric, read_metric
from hf_doge.artifacts.influence.row_map import RowMap, default_cache_dir
from hf_doge.artifacts.influence.segment_reader import check_scales
from hf_doge.artifacts.influence.segments import recorded_projection
from hf_doge.artifacts.influence.synonym_search import Neighbours, synonym_matches
from hf_doge.files import read_settled
from hf_doge.gradients.token_rows import TokenRows

if TYPE_CHECKING:
    from datasets import Dataset

Numbers = Tensor | np.ndarray

_BLOCK_ROWS = 1 << 15
_PIECE_BYTES = 1 << 20  # of float32: what is widened stays in the cache of one core until it is multiplied
_WORTH_A_THREAD = 1 << 21  # multiplications, about a millisecond


class IndexReader:
    """
    Search engine over one local folder. Open it by [`IndexReader.open`].

    Attributes:
        folder (`Path`), config (`dict`): The index, and the content of its config.json.
        num_examples, width, stored_width, vocabulary_size (`int`), embedding_shape (`tuple[int, int]`).
        checkpoints (`list[dict]`): Name, step, epoch, learning rate, path, revision, model class, fingerprint of each.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, cache_dir: Path) -> None:
        self.folder = folder
        self.config = config
        self.is_whole = True  # here, see [`~IndexReader.require_whole`]
        self.num_examples: int = config["num_examples"]
        self.width: int = config["width"]
        self.stored_width: int = config["stored_width"]
        self.vocabulary_size: int = config["vocabulary_size"]
        self.embedding_shape = embedding_shape(config)
        told = [{key: one for key, one in entry.items() if key != "files"} for entry in config["checkpoints"]]
        self.checkpoints, self._cache_dir = told, cache_dir
        self._maps: dict[int, RowMap] = {}
        self._metrics: dict[int, CheckpointMetric] = {}
        self._examples: Dataset | None = None
        self._projection, self._is_fitted = recorded_projection(config), fits_basis(config)
        self._bases: dict[int, Tensor] = {}

    @classmethod
    def open(
        cls, folder: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None, verify: bool = True
    ) -> "IndexReader":
        """
        Open an index.

        Args:
            folder (`str` or `os.PathLike`): As written by [`IndexWriter`].
            cache_dir (`str` or `os.PathLike`, *optional*): Of the memory maps, as large as the rows; `$HF_HOME/hf_doge` if left out.
            verify (`bool`): Check the sha256 of every file. That they are there is always checked, and rows when maps are made.

        Raises:
            FileNotFoundError: A file is missing. Names it.
            ValueError: No checkpoint is whole yet, a file was altered or cut short (named), or config.json cannot be read.
        """
        folder = Path(folder)

        def read() -> dict[str, Any]:
            config = read_config(folder)
            require_checkpoints(config, str(folder))
            check_files(folder, recorded_checksums(config), verify=verify)
            if verify:
                check_number_of_examples(folder, config)
                check_scales(folder, config)
            return config

        config = read_settled(folder, MANIFEST, read)
        warn_of_unknown(config)
        return cls(folder, config, cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir))

    @property
    def examples(self) -> "Dataset":
        """What is known of the training examples, row `i` being example `i`."""
        if self._examples is None:
            from datasets import Dataset  # only here: searching needs none, and importing it takes a second

            self._examples = Dataset(read_examples(self.folder, self.config))
        return self._examples

    def examples_of(self, ids: Iterable[int]) -> "Dataset":
        """What is known of some examples: one row for each of `ids`, in their order."""
        from datasets import Dataset, DatasetInfo

        ids = check_integers("Examples", ids, self.num_examples).tolist()
        return Dataset(self.examples.with_format("arrow")[ids], info=DatasetInfo(features=self.examples.features))

    def build_map(self, checkpoint: int) -> None:
        """Make the memory map of a checkpoint now, if it is not there, and not when it is first needed."""
        self._map(checkpoint, None)

    def fetch_model(self, checkpoint: int) -> None:
        """See that the model of a checkpoint is here, if the index holds it."""

    def metric(self, checkpoint: int) -> CheckpointMetric:
        """What queries are divided by at a checkpoint, of an index in the optimizer's metric."""
        if checkpoint not in self._metrics:
            held = np.flatnonzero(np.diff(self._map(checkpoint, np.zeros(0, np.int64)).offsets))
            self._metrics[checkpoint] = read_metric(self.folder, self.config, checkpoint, held=held)
        return self._metrics[checkpoint]

    def require_whole(self, what: str) -> None:
        """
        Raises:
            ValueError: `what` needs all of the index, and it is not all here.
        """

    def basis(self, checkpoint: int) -> Tensor:
        """The principal components that rows are projected to at a checkpoint, `(width, stored_width)`."""
        if checkpoint not in self._bases:
            self._bases[checkpoint] = read_basis(self.folder, self.config, checkpoint)
        return self._bases[checkpoint]

    def project(self, checkpoint: int, rows: Tensor | np.ndarray) -> Tensor:
        """The projection of a checkpoint, `(n, width) -> (n, stored_width)`; `rows` themselves without one."""
        rows, matrix = torch.as_tensor(rows), self.basis(checkpoint) if self._is_fitted else self._projection
        return rows if matrix is None else rows @ matrix.to(rows.dtype)

    def scores(self, checkpoint: int, queries: TokenRows, *, exclude_tokens: Iterable[int] = ()) -> np.ndarray:
        """
        Inner products of the queries' gradients with those of all training examples, at one checkpoint.

        The learning rate is left out. Positive: the training example is a proponent of the query.

        Args:
            checkpoint (`int`): Its position in `checkpoints`.
            queries (`TokenRows`): Rows of the queries at this checkpoint, of width `width`. One without tokens scores 0. In
                the optimizer's metric they must be [`~CheckpointMetric.measured`] by [`~IndexReader.metric`].
            exclude_tokens (`Iterable[int]`): Tokens that do not count.

        Returns:
            `numpy.ndarray` of shape `(num_queries, num_examples)` and dtype float32.

        Raises:
            ValueError: Rows of another width or tokens out of the vocabulary.
        """
        queries.check(width=self.width, vocabulary_size=self.vocabulary_size)
        owners = np.arange(len(queries)).repeat(queries.offsets.diff().cpu().numpy())
        rows, tokens = self.project(checkpoint, queries.rows.detach().cpu()).float(), queries.tokens.cpu().numpy()
        if excluded := list(exclude_tokens):
            counted = np.flatnonzero(~np.isin(tokens, excluded))
            tokens, rows, owners = tokens[counted], rows[torch.from_numpy(counted)], owners[counted]
        row_map = self._map(checkpoint, np.unique(tokens))
        scales = self._example_scales(checkpoint) if self.config["dtype"] == "float16" else None
        scores = np.zeros((len(queries), self.num_examples), dtype=np.float32)
        _add_scores(scores, row_map, _plan(row_map, tokens, rows, owners), scales)
        return scores

    def self_influence(self, checkpoint: int, *, exclude_tokens: Iterable[int] = ()) -> np.ndarray:
        """The squared norm of each training example's gradient at one checkpoint, `(num_examples,)` float64."""
        row_map, squares = self._map(checkpoint, None), np.zeros(self.num_examples)
        excluded = np.isin(np.arange(self.vocabulary_size), list(exclude_tokens))
        for start in range(0, len(row_map.rows), _BLOCK_ROWS):
            piece = slice(start, start + _BLOCK_ROWS)
            values = self._decoded(checkpoint, row_map, piece).double().square().sum(dim=1).numpy()
            if excluded.any():
                tokens = np.searchsorted(row_map.offsets, np.arange(start, start + len(values)), side="right") - 1
                values[excluded[tokens]] = 0
            squares += np.bincount(row_map.examples[piece], weights=values, minlength=self.num_examples)
        return squares

    def example_rows(self, checkpoint: int, example_ids: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
        """
        The stored gradients of some training examples.

        Returns:
            `list`: for each its `tokens (W,)`, ascending, and `rows (W, stored_width)` in float32.
        """
        ids = check_integers("Examples", example_ids, self.num_examples)
        row_map = self._map(checkpoint, None)
        places = np.flatnonzero(np.isin(row_map.examples, ids))
        places = places[np.argsort(row_map.examples[places], kind="stable")]
        owners = row_map.examples[places]
        tokens = np.searchsorted(row_map.offsets, places, side="right") - 1
        rows = self._decoded(checkpoint, row_map, places)
        starts, ends = np.searchsorted(owners, ids), np.searchsorted(owners, ids, side="right")
        return [
            (torch.from_numpy(tokens[start:end].copy()), rows[start:end].clone())
            for start, end in zip(starts, ends, strict=True)
        ]

    def word_scores(
        self, checkpoint: int, query_tokens: Numbers, query_rows: Numbers, example_ids: Iterable[int]
    ) -> np.ndarray:
        """
        How much each token of one query carries of its scores with some examples; the sum over tokens is the score.

        Args:
            checkpoint (`int`): Its position in `checkpoints`.
            query_tokens (`(W,)`): Distinct tokens.
            query_rows (`(W, stored_width)`): Their rows, after [`~IndexReader.project`].
            example_ids (`Iterable[int]`): The examples.

        Returns:
            `numpy.ndarray` of shape `(num_examples_asked, W)` and dtype float32; 0 where the example lacks the token.
        """
        ids = check_integers("Examples", example_ids, self.num_examples)
        tokens = check_integers("Tokens", query_tokens, self.vocabulary_size)
        rows = torch.as_tensor(query_rows).float()
        if tuple(rows.shape) != (expected := (len(tokens), self.stored_width)):
            raise ValueError(f"`query_rows` must have shape {expected}, but got {tuple(rows.shape)}.")
        row_map = self._map(checkpoint, tokens)
        parts = np.zeros((len(ids), len(tokens)), dtype=np.float32)
        for column, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            start, end = row_map.offsets[token : token + 2]
            owners = row_map.examples[start:end]
            found = np.searchsorted(owners, ids)
            shared = np.flatnonzero(found < len(owners))
            shared = shared[owners[found[shared]] == ids[shared]]
            parts[shared, column] = (self._decoded(checkpoint, row_map, start + found[shared]) @ row).numpy()
        return parts

    def synonym_scores(
        self,
        checkpoint: int,
        query_tokens: Numbers,
        query_rows: Numbers,
        neighbours: Neighbours,
        *,
        exclude_tokens: Iterable[int] = (),
        only: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """
        What TracIn-WE-Syn adds to the scores of one query at one checkpoint: see [`synonym_similarity`]. Exact.

        Args:
            checkpoint, query_tokens, query_rows: As of [`~IndexReader.word_scores`], tokens ascending. In the optimizer's
                metric plain gradients `(W, width)`: each is measured as the token that it is matched with.
            neighbours ([`Neighbours`]): Synonyms of each query token and their cosines, from [`synonym_neighbours`].
            exclude_tokens (`Iterable[int]`): Tokens of examples that do not count.
            only (`Iterable[int]`, *optional*): Ids of examples; all if left out.

        Yields:
            `tuple`: position of a query token, the token that it is matched with in some examples, the ids of these `(n,)`,
            and the part of their scores that this match carries `(n,)` in float32.
        """
        tokens = check_integers("Tokens", query_tokens, self.vocabulary_size)
        rows = torch.as_tensor(query_rows).float()
        ids = None if only is None else check_integers("Examples", only, self.num_examples)
        excluded = np.asarray(list(exclude_tokens), dtype=np.int64)
        synonyms = [np.setdiff1d(neighbours[token][0], excluded) for token in tokens.tolist()]
        row_map = self._map(checkpoint, np.unique(np.concatenate([tokens, *synonyms])))
        for position, token, places in synonym_matches(row_map, tokens, neighbours, excluded=excluded, only=ids):
            row = rows[position]
            if self.config.get("metric") == "optimizer":
                row = self.project(checkpoint, row / self.metric(checkpoint).divisor(token))
            for start in range(0, len(places), _BLOCK_ROWS):
                piece = places[start : start + _BLOCK_ROWS]
                parts = (self._decoded(checkpoint, row_map, piece) @ row).numpy()
                yield position, token, row_map.examples[piece], parts

    def _map(self, checkpoint: int, tokens: np.ndarray | None) -> RowMap:
        """The rows of a checkpoint: at least those of some tokens, or all."""
        self._check_checkpoint(checkpoint)
        if checkpoint not in self._maps:
            self._maps[checkpoint] = RowMap.open(self.folder, self.config, checkpoint, cache_dir=self._cache_dir)
        return self._maps[checkpoint]

    def _check_checkpoint(self, checkpoint: int) -> None:
        if not 0 <= checkpoint < len(self.checkpoints):
            raise ValueError(f"`checkpoint` must be in [0, {len(self.checkpoints)}), but got {checkpoint}.")

    def _example_scales(self, checkpoint: int) -> np.ndarray:
        """What each example's stored rows are to be divided by, `(num_examples,)`."""
        scales = np.ones(self.num_examples, dtype=np.float32)
        for file in self.config["checkpoints"][checkpoint]["files"]:
            scales[file["first_example"] : file["first_example"] + file["num_examples"]] = file["scale"]
        return scales

    def _decoded(self, checkpoint: int, row_map: RowMap, places: slice | np.ndarray) -> Tensor:
        """The rows at some places of the map, in float32."""
        by_row, examples = row_map.scales, row_map.examples[places]
        scales = self._example_scales(checkpoint)[examples] if by_row is None else by_row[places]
        return torch.from_numpy(row_map.rows[places]).float() / torch.from_numpy(scales)[:, None]


@dataclass
class _Postings:
    """All examples that hold one token, and all queries that do."""

    start: int
    end: int
    query_rows: Tensor  # (num_holding, stored_width)
    owners: list[int]


def _add_scores(scores: np.ndarray, row_map: RowMap, plan: list[_Postings], example_scales: np.ndarray | None) -> None:
    """
    Add to `scores (num_queries, num_examples)` the inner products of all pairs of rows of the same token.

    Rows are widened to float32 in small pieces, so products and sums are those of the stored numbers in float32. Work
    is shared by as many threads as torch has, each with a range of examples of its own. `example_scales` are powers of
    two that the rows of each example are to be divided by.
    """
    work = sum((postings.end - postings.start) * postings.query_rows.numel() for postings in plan)
    num_threads = max(1, min(torch.get_num_threads(), work // _WORTH_A_THREAD, scores.shape[1]))
    borders = np.linspace(0, scores.shape[1], num_threads + 1).astype(np.int64).tolist()

    def add(first: int, last: int) -> None:
        part = scores[:, first:last]
        scales = None if example_scales is None else example_scales[first:last]
        if scales is not None:  # exact, as they are powers of two
            part *= scales
        _add_range(torch.from_numpy(part), row_map, plan, first, last)
        if scales is not None:
            part /= scales

    with _one_thread():
        if num_threads == 1:
            add(0, scores.shape[1])
        else:
            with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(add, borders[:-1], borders[1:]))


def _plan(row_map: RowMap, tokens: np.ndarray, rows: Tensor, owners: np.ndarray) -> list[_Postings]:
    """The postings of queries with some tokens, their rows and whose they are, `(num_entries,)` each, token by token."""
    order = np.argsort(tokens, kind="stable")
    distinct, starts = np.unique(tokens[order], return_index=True)
    plan = []
    for token, entries in zip(distinct, np.split(order, starts[1:]), strict=False):
        start, end = row_map.offsets[token : token + 2].tolist()
        if start < end:
            plan.append(_Postings(start, end, rows[torch.from_numpy(entries)], owners[entries].tolist()))
    return plan


def _add_range(scores: Tensor, row_map: RowMap, plan: list[_Postings], first: int, last: int) -> None:
    """Add to `scores` those of examples `[first, last)`."""
    width = row_map.rows.shape[1]
    piece_rows = max(64, _PIECE_BYTES // (4 * width))
    widened = torch.empty(piece_rows, width)
    for postings in plan:
        start, end = postings.start, postings.end
        if (first, last) != (0, row_map.num_examples):  # examples ascend within a token
            start, end = start + np.searchsorted(row_map.examples[start:end], [first, last])
        for begin in range(start, end, piece_rows):
            piece = slice(begin, min(begin + piece_rows, end))
            stored = row_map.row_tensor[piece]
            rows = stored if stored.dtype == torch.float32 else widened[: len(stored)].copy_(stored)
            examples = row_map.example_tensor[piece]
            examples = examples - first if first else examples
            if len(postings.owners) == 1:
                products = torch.mv(rows, postings.query_rows[0])[None]
            else:
                products = postings.query_rows @ rows.T  # (Q, D) @ (D, n) -> (Q, n)
            if row_map.scales is not None:
                products /= torch.from_numpy(row_map.scales[piece])
            for owner, values in zip(postings.owners, products, strict=True):
                scores[owner].index_add_(0, examples, values)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Teams of OpenMP threads cost more than pieces of this size, far more on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def check_integers(what: str, values: Iterable[int], end: int) -> np.ndarray:
    """Whole numbers in [0, end), as int64."""
    values = np.asarray(values if isinstance(values, (np.ndarray, Tensor)) else list(values), dtype=np.int64)
    if len(values) and not 0 <= values.min() <= values.max() < end:
        raise ValueError(f"{what} must be in [0, {end}), but go from {values.min()} to {values.max()}.")
    return values
