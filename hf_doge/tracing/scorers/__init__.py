"""TracIn-WE and its peers behind one interface: `scorer.scores(train, queries) -> (Q, N)`, positive = proponent."""

from hf_doge.tracing.scorers.base import Batches, Scorer
from hf_doge.tracing.scorers.baselines import RandomScorer
from hf_doge.tracing.scorers.embedding import TracInWEScorer
from hf_doge.tracing.scorers.last_layer import InfluenceLastScorer, RepresenterScorer, TracInLastScorer
from hf_doge.tracing.scorers.lexical import BM25Scorer
from hf_doge.tracing.scorers.registry import SCORERS, make_scorer

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
