"""Gradient rows of queries at every recorded checkpoint, made as the rows of the index were."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_doge.artifacts.influence.synonym_search import Neighbours
from hf_doge.functional.synonyms import synonym_neighbours
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.example_losses import LossFunction
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.models import LoadModel, load_checkpoint
from hf_doge.tracing.queries import Query, batches, make_queries
from hf_doge.tracing.settings import padding_token_id


@dataclass
class QueryRowMaker:
    """
    Loads the checkpoints of an index, one at a time, and records queries at each.

    Attributes:
        config (`dict`): Of the index: its settings apply to queries as they did to training examples.
        folder (`Path`): Of the index.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the model.
        model, load_model, token: See [`load_checkpoint`].
        loss_fn (`Callable`, *optional*): What the index was recorded with, if it was not the model's own loss.
        encoding ([`Encoding`], *optional*): How words become tokens and labels.
        synonym_threshold (`float`, *optional*): Look for synonyms of the queries' tokens, of at least this cosine.
        fetch_model (`Callable[[int], None]`): Called with the position of a checkpoint whose model is about to be loaded.
        synonyms (`list[Neighbours]`): What was found at each checkpoint, after [`~QueryRowMaker.record`].
    """

    config: Mapping[str, Any]
    folder: Path
    tokenizer: PreTrainedTokenizerBase | None = None
    model: nn.Module | None = None
    load_model: LoadModel | None = None
    loss_fn: LossFunction | None = None
    encoding: Encoding | None = None
    token: str | bool | None = None
    synonym_threshold: float | None = None
    fetch_model: Callable[[int], None] = lambda position: None
    synonyms: list[Neighbours] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        recorded = self.config.get("loss_fn")
        if (recorded is None) != (self.loss_fn is None):
            raise ValueError(
                f"Queries must be recorded with the loss of the index, which is {recorded or 'that of the model'}. "
                + ("Leave `loss_fn` out." if recorded is None else "Pass it as `loss_fn`.")
            )

    def record(
        self,
        records: Sequence[dict[str, Any]],
        *,
        batch_size: int,
        drop_token_ids: Sequence[int] = (),
        first_position: int = 0,
    ) -> tuple[list[Query], list[TokenRows]]:
        """
        Args:
            records (`Sequence[dict]`): From [`check_queries`].
            batch_size (`int`): How many at once.
            drop_token_ids (`Sequence[int]`): Tokens whose rows are left out after all is done (top-k too).
            first_position (`int`): What errors call the first query.

        Returns:
            `tuple[list[Query], list[TokenRows]]`: the queries, and their rows at each checkpoint.
        """
        checkpoints = self.config["checkpoints"]
        rows: list[TokenRows] = []
        queries: list[Query] | None = None
        for position, checkpoint in reversed(
            list(enumerate(checkpoints))
        ):  # what the last one predicts is the label of a query without one
            model = load_checkpoint(
                checkpoint,
                folder=self.folder,
                model=self.model,
                load_model=self.load_model,
                vocabulary_size=self.config["vocabulary_size"],
                token=self.token,
                fetch=partial(self.fetch_model, position),
            )
            self._check_embeddings(model, checkpoint["name"])
            verify = queries is None
            if queries is None:
                queries = make_queries(
                    records,
                    model,
                    self.tokenizer,
                    batch_size=batch_size,
                    first_position=first_position,
                    encoding=self.encoding,
                    check_kind=self.loss_fn is None,
                )
            rows.append(self._record_at(model, queries, batch_size, drop_token_ids, verify=verify))
            if self.synonym_threshold is not None:
                self.synonyms.insert(0, self._find_synonyms(model, rows[-1].tokens))
        return queries or [], rows[::-1]

    def _record_at(
        self,
        model: nn.Module,
        queries: Sequence[Query],
        batch_size: int,
        drop_token_ids: Sequence[int],
        *,
        verify: bool,
    ) -> TokenRows:
        recorder = EmbeddingGradientRecorder(model, **self._options(), verify=verify)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The input embeddings of the model are frozen"
            )  # said at recording
            with recorder:
                parts = [
                    without_tokens(on_cpu(recorder.record(batch)), drop_token_ids)
                    for batch in batches(queries, model, batch_size=batch_size)
                ]
        return join_rows(parts)

    def _find_synonyms(self, model: nn.Module, tokens: torch.Tensor) -> Neighbours:
        tokens, matrix = tokens.unique(), input_embedding_matrix(model).detach()
        found = synonym_neighbours(tokens.to(matrix.device), matrix, threshold=self.synonym_threshold)
        return {
            token: (ids.cpu().numpy(), cosines.cpu().numpy())
            for token, (ids, cosines) in zip(tokens.tolist(), found, strict=True)
        }

    def _options(self) -> dict[str, Any]:
        config = self.config
        dropped = config["special_token_ids"] if config.get("special_tokens") == "drop" else ()
        return {
            "loss_fn": self.loss_fn,
            "loss_reduction": config.get("loss_reduction") or "sum",
            "tied": config.get("tied") or "input",
            "top_k": config.get("top_k"),
            "top_k_unit": config.get("top_k_unit") or "position",
            "pad_token_id": padding_token_id(self.tokenizer),
            "drop_token_ids": dropped,
        }

    def _check_embeddings(self, model: nn.Module, name: str) -> None:
        shape = tuple(input_embedding_matrix(model).shape)
        expected = (self.config["vocabulary_size"], self.config["width"])
        if shape != expected:
            raise ValueError(
                f"The embeddings of checkpoint {name!r} must have the shape that the index has, {expected}, but theirs is "
                f"{shape}. Load the model without resizing its embeddings."
            )


def on_cpu(rows: TokenRows) -> TokenRows:
    """The same rows in main memory, as float32 (float64 stays)."""
    dtype = torch.float64 if rows.rows.dtype == torch.float64 else torch.float32
    return TokenRows(rows.offsets.cpu(), rows.tokens.cpu(), rows.rows.detach().to("cpu", dtype), rows.virtual)


def without_tokens(rows: TokenRows, token_ids: Sequence[int]) -> TokenRows:
    """The rows of all other tokens."""
    if len(token_ids) == 0:
        return rows
    kept = ~torch.isin(rows.tokens, torch.as_tensor(list(token_ids)))
    counts = torch.cat([torch.zeros(1, dtype=torch.long), kept.long().cumsum(dim=0)])
    return TokenRows(counts[rows.offsets], rows.tokens[kept], rows.rows[kept], rows.virtual)


def join_rows(parts: Sequence[TokenRows]) -> TokenRows:
    """The examples of several batches, one after the other."""
    lengths = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(dim=0)])
    tokens, rows = torch.cat([part.tokens for part in parts]), torch.cat([part.rows for part in parts])
    return TokenRows(offsets, tokens, rows, parts[0].virtual)


def slice_rows(rows: TokenRows, start: int, stop: int) -> TokenRows:
    """Examples `start` to `stop` alone."""
    first, last = int(rows.offsets[start]), int(rows.offsets[stop])
    return TokenRows(
        rows.offsets[start : stop + 1] - first, rows.tokens[first:last], rows.rows[first:last], rows.virtual
    )


def squared_norms(rows: TokenRows) -> torch.Tensor:
    """Self-influence of each example, `(num_examples,)`."""
    squares = rows.rows.double().square().sum(dim=1)
    owners = torch.arange(len(rows)).repeat_interleave(rows.offsets.diff())
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owners, squares)
