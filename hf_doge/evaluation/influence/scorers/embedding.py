"""TracIn on the word embeddings, exactly, with everything in memory: for evaluations of some thousand examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_doge.evaluation.influence.scorers.base import Batches, check_checkpoints
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.token_rows import TokenRows


class TracInWEScorer:
    """
    TracIn-WE, `sum_c eta_c sum_w <g_w(x), g_w(x')>`, and with `top_k` TracIn-WE-Topk.

    Args:
        models (`Sequence[nn.Module]`): The model at each checkpoint.
        learning_rates (`Sequence[float]`): Learning rate in force at each.
        top_k (`int`, *optional*): Keep this many tokens of largest norm of each example; the paper has 10.
        top_k_unit (`str`): `"position"` or `"token"`, see [`top_k_rows`].
        exclude_tokens (`Sequence[int]`): Token ids that do not count, such as special ones. The paper counts all.

    Raises:
        ValueError: unless there is one learning rate per model.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        learning_rates: Sequence[float],
        *,
        top_k: int | None = None,
        top_k_unit: str = "position",
        exclude_tokens: Sequence[int] = (),
    ) -> None:
        check_checkpoints(models, learning_rates)
        self.models = models
        self.learning_rates = learning_rates
        self.top_k = top_k
        self.top_k_unit = top_k_unit
        self.exclude_tokens = torch.tensor(list(exclude_tokens), dtype=torch.long)

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        total = torch.zeros(())
        for model, learning_rate in zip(self.models, self.learning_rates, strict=True):
            train_rows, query_rows = self._record(model, train), self._record(model, queries)
            total = total + learning_rate * pair_scores(query_rows, train_rows)
        return total.double().numpy()

    def self_influence(self, train: Batches) -> np.ndarray:
        """Score of each training example with itself, shape `(N,)`, `>= 0`; a wrong label makes it large."""
        total = torch.zeros(())
        for model, learning_rate in zip(self.models, self.learning_rates, strict=True):
            rows = self._record(model, train)
            total = total + learning_rate * sum_examples(rows.rows.square().sum(dim=1), rows)
        return total.double().numpy()

    def _record(self, model: nn.Module, batches: Batches) -> TokenRows:
        recorded = record_rows(model, batches, top_k=self.top_k, top_k_unit=self.top_k_unit)
        recorded.rows[torch.isin(recorded.tokens, self.exclude_tokens)] = 0
        return recorded


def record_rows(model: nn.Module, batches: Batches, **options: Any) -> TokenRows:
    """Gradient rows of all examples of all batches as one sequence on the CPU; options of [`EmbeddingGradientRecorder`]."""
    with EmbeddingGradientRecorder(model, **options) as recorder:
        parts = [recorder.record(batch) for batch in batches]
    lengths = torch.cat([part.offsets.diff() for part in parts]).cpu()
    tokens, rows = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("tokens", "rows"))
    return TokenRows(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), tokens, rows, parts[0].virtual)


def pair_scores(queries: TokenRows, train: TokenRows) -> Tensor:
    """
    TracIn-WE of every pair at one checkpoint, learning rate left out, shape `(Q, N)`.

    One query at a time is spread over the vocabulary, so that each training row finds its partner by its token.
    """
    vocabulary_size = 1 + max(int(part.tokens.max()) if len(part.tokens) else 0 for part in (queries, train))
    spread = train.rows.new_zeros(vocabulary_size, train.rows.shape[1])
    scores = train.rows.new_empty(len(queries), len(train))
    for position, (tokens, rows) in enumerate(queries):
        spread[tokens] = rows
        scores[position] = sum_examples((train.rows * spread[train.tokens]).sum(dim=1), train)
        spread[tokens] = 0
    return scores


def sum_examples(entries: Tensor, rows: TokenRows) -> Tensor:
    """Sum one number per row over the rows of each example."""
    examples = torch.arange(len(rows)).repeat_interleave(rows.offsets.diff())
    return entries.new_zeros(len(rows)).index_add_(0, examples, entries)
