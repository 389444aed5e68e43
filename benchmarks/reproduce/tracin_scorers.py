"""Scorers that only the experiments have: a layer in the middle, cosine, synonyms. The others are in `hf_doge`."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.reproduce.layer_gradients import layer_gradients
from hf_doge.functional.synonyms import synonym_score, synonym_similarity
from hf_doge.functional.tracin_we import cosine_scores
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.scorers import SCORERS, Batches, Scorer, make_scorer
from hf_doge.tracing.scorers.embedding import TracInWEScorer


class TracInLayerScorer:
    """
    TracIn on the weight of one layer, `sum_c eta_c <dloss(x)/dW, dloss(x')/dW>`.

    Args:
        models (`Sequence[nn.Module]`): The model at each checkpoint.
        learning_rates (`Sequence[float]`): Learning rate in force at each.
        layer (`str`): Name of an `nn.Linear` or `nn.Conv1d` module.
        cosine (`bool`): Whether the product at each checkpoint is divided by the norms of both gradients.
    """

    def __init__(
        self, models: Sequence[nn.Module], learning_rates: Sequence[float], *, layer: str, cosine: bool = False
    ) -> None:
        self.checkpoints = list(zip(models, learning_rates, strict=True))
        self.layer = layer
        self.cosine = cosine

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        total = 0
        for model, learning_rate in self.checkpoints:
            ours, theirs = (layer_gradients(model, part, [self.layer])[self.layer] for part in (train, queries))
            if self.cosine:
                ours, theirs = (torch.nn.functional.normalize(part, dim=1) for part in (ours, theirs))
            total = total + learning_rate * (theirs @ ours.T).double()
        return total.numpy()


class CosineTracInWEScorer:
    """
    TracIn-WE freed from the length of both gradients, as `InfluenceIndex.search(cosine=True)` has it: cosines per checkpoint.

    Args:
        models (`Sequence[nn.Module]`): The model at each checkpoint.
        learning_rates (`Sequence[float]`): Learning rate in force at each.
    """

    def __init__(self, models: Sequence[nn.Module], learning_rates: Sequence[float]) -> None:
        self.checkpoints = [TracInWEScorer([m], [rate]) for m, rate in zip(models, learning_rates, strict=True)]

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        total = 0
        for scorer in self.checkpoints:
            (rate,) = scorer.learning_rates
            plain, ours, theirs = (
                torch.from_numpy(values) / rate
                for values in (
                    scorer.scores(train, queries),
                    scorer.self_influence(train),
                    scorer.self_influence(queries),
                )
            )
            total = total + rate * cosine_scores(plain, theirs, ours)
        return total.numpy()


class TracInWESynScorer:
    """
    TracIn-WE-Syn: a word without a partner in the other text is matched with its nearest synonym there.

    Args:
        models (`Sequence[nn.Module]`): The model at each checkpoint, whose own embeddings tell synonyms.
        learning_rates (`Sequence[float]`): Learning rate in force at each.
        threshold (`float`): Smallest cosine of a synonym.
    """

    def __init__(
        self, models: Sequence[nn.Module], learning_rates: Sequence[float], *, threshold: float = 0.5
    ) -> None:
        self.checkpoints = list(zip(models, learning_rates, strict=True))
        self.threshold = threshold

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        total = 0
        for model, learning_rate in self.checkpoints:
            ours, theirs = record_rows(model, train), record_rows(model, queries)
            embeddings = model.get_input_embeddings().weight.detach().cpu()
            similarity = partial(synonym_similarity, embeddings=embeddings, threshold=self.threshold)
            at_checkpoint = [
                [synonym_score(rows, others, similarity(tokens, words)).item() for words, others in ours]
                for tokens, rows in theirs
            ]
            total = total + learning_rate * np.array(at_checkpoint)
        return total


def record_rows(model: nn.Module, batches: Batches, **options) -> TokenRows:
    """Embedding gradient rows of all examples of all batches as one sequence; options of the recorder."""
    with EmbeddingGradientRecorder(model, **options) as recorder:
        parts = [recorder.record(batch) for batch in batches]
    lengths = torch.cat([part.offsets.diff() for part in parts]).cpu()
    tokens, rows = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("tokens", "rows"))
    return TokenRows(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), tokens, rows, parts[0].virtual)


def make_experiment_scorer(
    name: str,
    models: Sequence[nn.Module],
    learning_rates: Sequence[float],
    *,
    middle_layer: str,
    special_token_ids: Sequence[int],
    seed: int,
) -> Scorer:
    """A scorer of `hf_doge` by its name there, or one of this module: `tracin_we_syn`, `tracin_middle`, `..._cosine`."""
    if name in SCORERS:
        return make_scorer(name, models, learning_rates, special_token_ids=special_token_ids, seed=seed)
    return {
        "tracin_we_cosine": lambda: CosineTracInWEScorer(models, learning_rates),
        "tracin_we_syn": lambda: TracInWESynScorer(models, learning_rates),
        "tracin_middle": lambda: TracInLayerScorer(models, learning_rates, layer=middle_layer),
        "tracin_middle_cosine": lambda: TracInLayerScorer(models, learning_rates, layer=middle_layer, cosine=True),
        "tracin_last_cosine": lambda: TracInLayerScorer(models, learning_rates, layer="classifier", cosine=True),
    }[name]()
