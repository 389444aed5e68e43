"""TracIn-WE and its peers behind one interface, [`Scorer`], by the names that the command line and the tables use."""

from collections.abc import Callable, Sequence

from torch import nn

from hf_doge.evaluation.influence.scorers.base import Batches, Scorer
from hf_doge.evaluation.influence.scorers.baselines import BM25Scorer, RandomScorer
from hf_doge.evaluation.influence.scorers.embedding import TracInWEScorer
from hf_doge.evaluation.influence.scorers.last_layer import InfluenceLastScorer, RepresenterScorer, TracInLastScorer

__all__ = [
    "SCORERS",
    "BM25Scorer",
    "Batches",
    "InfluenceLastScorer",
    "RandomScorer",
    "RepresenterScorer",
    "Scorer",
    "TracInLastScorer",
    "TracInWEScorer",
    "make_scorer",
]

TOP_K = 10  # the paper's

_MAKERS: dict[str, Callable[[Sequence[nn.Module], Sequence[float], tuple[int, ...], int], Scorer]] = {
    "tracin_we": lambda models, rates, special, seed: TracInWEScorer(models, rates),
    "tracin_we_topk": lambda models, rates, special, seed: TracInWEScorer(models, rates, top_k=TOP_K),
    "tracin_we_no_special": lambda models, rates, special, seed: TracInWEScorer(models, rates, exclude_tokens=special),
    "tracin_last": lambda models, rates, special, seed: TracInLastScorer(models, rates),
    "tracin_last_bias": lambda models, rates, special, seed: TracInLastScorer(models, rates, bias=True),
    "influence_last": lambda models, rates, special, seed: InfluenceLastScorer(models[-1]),
    "representer": lambda models, rates, special, seed: RepresenterScorer(models[-1]),
    "bm25": lambda models, rates, special, seed: BM25Scorer(ignore_tokens=special),
    "bm25_signed": lambda models, rates, special, seed: BM25Scorer(ignore_tokens=special, signed=True),
    "random": lambda models, rates, special, seed: RandomScorer(seed=seed),
}
SCORERS = tuple(_MAKERS)


def make_scorer(
    name: str,
    models: Sequence[nn.Module],
    learning_rates: Sequence[float],
    *,
    special_token_ids: Sequence[int] = (),
    seed: int = 0,
) -> Scorer:
    """
    A scorer with its usual settings.

    Args:
        name (`str`): One of `SCORERS`. `influence_last` and `representer` look at the last checkpoint only.
        models (`Sequence[nn.Module]`): The model at each checkpoint.
        learning_rates (`Sequence[float]`): Learning rate in force at each.
        special_token_ids (`Sequence[int]`): What `tracin_we_no_special` and BM25 leave out.
        seed (`int`): Seeds the random scorer.

    Raises:
        ValueError: if the name is unknown.
        ImportError: if the scorer needs a library that is not installed.
    """
    if name not in _MAKERS:
        raise ValueError(f"A scorer must be one of {list(SCORERS)}, but got {name!r}.")
    return _MAKERS[name](models, learning_rates, tuple(special_token_ids), seed)
