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
                    recorder.record(batch).on_cpu().without(drop_token_ids)
                    for batch in batches(queries, model, batch_size=batch_size)
                ]
        return TokenRows.join(parts)

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
