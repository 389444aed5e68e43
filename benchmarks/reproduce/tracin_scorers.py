"""Scorers that only the experiments have: a layer in the middle, cosine, synonyms. The others are in `hf_doge`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.reproduce.layer_gradients import layer_gradients
from hf_doge.evaluation.influence.scorers import SCORERS, Batches, Scorer, make_scorer
from hf_doge.evaluation.influence.scorers.embedding import TracInWEScorer, pair_scores, record_rows, sum_examples
from hf_doge.evaluation.influence.scorers.last_layer import InfluenceLastScorer
from hf_doge.functional.synonyms import synonym_score, synonym_similarity
from hf_doge.functional.tracin_we import cosine_scores, scale_by_second_moment


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
        exclude_tokens (`Sequence[int]`): Token ids that do not count.
    """

    def __init__(
        self, models: Sequence[nn.Module], learning_rates: Sequence[float], *, exclude_tokens: Sequence[int] = ()
    ) -> None:
        self.checkpoints = [
            TracInWEScorer([model], [rate], exclude_tokens=exclude_tokens)
            for model, rate in zip(models, learning_rates, strict=True)
        ]

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


@dataclass(frozen=True)
class AdamCheckpoint:
    """
    A checkpoint of a training by Adam.

    Attributes:
        model (`nn.Module`), learning_rate (`float`): As ever.
        second_moments (`dict[str, torch.Tensor]`): Adam's bias-corrected `v` by name of the parameter. Before the first
            step there is none, and that of the next checkpoint stands here.
    """

    model: nn.Module
    learning_rate: float
    second_moments: dict[str, Tensor]


class AdamTracInScorer:
    """
    TracIn in the metric of Adam, `sum_c eta_c <g(x) / (sqrt(v_c) + eps), g(x')>`, on the word embeddings or on one layer.

    Args:
        checkpoints (`Sequence[AdamCheckpoint]`).
        layer (`str`, *optional*): Name of a linear layer; the word embeddings by default.
        cosine (`bool`): Whether the product at each checkpoint is divided by the norms of both gradients in that metric.
        by_row (`bool`): Whether all entries of a row (a word) share the mean of their `v`.
    """

    def __init__(
        self,
        checkpoints: Sequence[AdamCheckpoint],
        *,
        layer: str | None = None,
        cosine: bool = False,
        by_row: bool = False,
    ) -> None:
        self.checkpoints = checkpoints
        self.layer = layer
        self.cosine = cosine
        self.by_row = by_row

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        total = 0
        for checkpoint in self.checkpoints:
            score = self._layer_scores if self.layer else self._word_scores
            products, ours, theirs = score(checkpoint, train, queries)
            if self.cosine:
                products = products / (theirs[:, None] * ours[None]).clamp(min=1e-30)
            total = total + checkpoint.learning_rate * products
        return total.numpy()

    def _word_scores(
        self, checkpoint: AdamCheckpoint, train: Batches, queries: Batches
    ) -> tuple[Tensor, Tensor, Tensor]:
        moments = checkpoint.second_moments["embedding.weight"]
        if self.by_row:
            moments = moments.mean(dim=1, keepdim=True)
        ours, theirs = record_rows(checkpoint.model, train), record_rows(checkpoint.model, queries)
        norms = []
        for part in (ours, theirs):
            part.rows = scale_by_second_moment(part.rows, moments[part.tokens])
            norms.append(sum_examples(part.rows.double().square().sum(dim=1), part).sqrt())
        return pair_scores(theirs, ours).double(), *norms

    def _layer_scores(
        self, checkpoint: AdamCheckpoint, train: Batches, queries: Batches
    ) -> tuple[Tensor, Tensor, Tensor]:
        moments = checkpoint.second_moments[f"{self.layer}.weight"].flatten()
        ours, theirs = (
            scale_by_second_moment(layer_gradients(checkpoint.model, part, [self.layer])[self.layer], moments).double()
            for part in (train, queries)
        )
        return theirs @ ours.T, ours.norm(dim=1), theirs.norm(dim=1)


class OverCheckpointsScorer:
    """
    Scores at single checkpoints, summed as TracIn sums them: `sum_c eta_c s_c(x, x')`.

    Args:
        scorers (`Sequence[Scorer]`): One for each checkpoint.
        learning_rates (`Sequence[float]`): Learning rate in force at each.
    """

    def __init__(self, scorers: Sequence[Scorer], learning_rates: Sequence[float]) -> None:
        self.checkpoints = list(zip(scorers, learning_rates, strict=True))

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        return sum(rate * scorer.scores(train, queries) for scorer, rate in self.checkpoints)


def influence_last_all(models: Sequence[nn.Module], learning_rates: Sequence[float]) -> OverCheckpointsScorer:
    """Influence functions of the last layer over checkpoints, damped by the mean of the diagonal of the Hessian."""
    return OverCheckpointsScorer([InfluenceLastScorer(model, damping=1.0) for model in models], learning_rates)


class SameClassScorer:
    """
    At random among the examples of the query's class, those of other classes negative: what knowing the label alone is worth.

    Args:
        seed (`int`): Of the draw.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        ours, theirs = (torch.cat([batch["labels"] for batch in part]).numpy() for part in (train, queries))
        drawn = np.random.default_rng(self.seed).uniform(size=(len(theirs), len(ours)))
        return np.where(theirs[:, None] == ours[None], drawn, -drawn)


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
        "tracin_we_cosine_no_special": lambda: CosineTracInWEScorer(
            models, learning_rates, exclude_tokens=special_token_ids
        ),
        "influence_last_all": lambda: influence_last_all(models, learning_rates),
        "same_class": lambda: SameClassScorer(seed=seed),
        "tracin_we_syn": lambda: TracInWESynScorer(models, learning_rates),
        "tracin_middle": lambda: TracInLayerScorer(models, learning_rates, layer=middle_layer),
        "tracin_middle_cosine": lambda: TracInLayerScorer(models, learning_rates, layer=middle_layer, cosine=True),
        "tracin_last_cosine": lambda: TracInLayerScorer(models, learning_rates, layer="classifier", cosine=True),
    }[name]()


def make_adam_scorer(name: str, checkpoints: Sequence[AdamCheckpoint], recorded: Sequence[AdamCheckpoint]) -> Scorer:
    """
    A scorer that takes Adam or all epochs into account.

    Args:
        name (`str`): `tracin_we_all`: plain, at all epochs. `..._adam...`: in Adam's metric. `tracin_last...`: on the last layer.
        checkpoints (`Sequence[AdamCheckpoint]`): After every epoch, and before the first.
        recorded (`Sequence[AdamCheckpoint]`): Those that the other scorers have.
    """
    return {
        "tracin_we_all": lambda: TracInWEScorer(
            [checkpoint.model for checkpoint in checkpoints], [checkpoint.learning_rate for checkpoint in checkpoints]
        ),
        "tracin_we_adam": lambda: AdamTracInScorer(recorded),
        "tracin_we_adam_all": lambda: AdamTracInScorer(checkpoints),
        "tracin_we_adam_cosine_all": lambda: AdamTracInScorer(checkpoints, cosine=True, by_row=True),
        "tracin_last_adam_cosine_all": lambda: AdamTracInScorer(checkpoints, cosine=True, layer="classifier"),
    }[name]()
