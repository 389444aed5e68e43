"""
Learn how much of each kind of data to train on (DoGE), and trace predictions to training text (TracIn-WE).

Names are imported when they are first used, so that loading weights or sampling by them does not import transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_doge._version import __version__

if TYPE_CHECKING:
    from hf_doge.artifacts.domain_weights import DomainWeights
    from hf_doge.artifacts.record import Trajectory
    from hf_doge.data.domain_data import load_mixture
    from hf_doge.mixing.estimate import estimate_domain_weights
    from hf_doge.sampling.sampler import DomainWeightedSampler
    from hf_doge.sampling.streaming import interleave_domains
    from hf_doge.tracing.callback import TracInWECallback
    from hf_doge.tracing.index import InfluenceIndex
    from hf_doge.training.config import DoGEConfig
    from hf_doge.training.metrics_callback import DomainMetricsCallback
    from hf_doge.training.mixture import DomainWeightedMixin, DomainWeightedTrainer
    from hf_doge.training.sweep import sweep_domain_weights
    from hf_doge.training.trainer import DoGEMixin, DoGETrainer

_MODULES = {
    "DoGEConfig": "hf_doge.training.config",
    "DoGEMixin": "hf_doge.training.trainer",
    "DoGETrainer": "hf_doge.training.trainer",
    "DomainMetricsCallback": "hf_doge.training.metrics_callback",
    "DomainWeightedMixin": "hf_doge.training.mixture",
    "DomainWeightedSampler": "hf_doge.sampling.sampler",
    "DomainWeightedTrainer": "hf_doge.training.mixture",
    "DomainWeights": "hf_doge.artifacts.domain_weights",
    "InfluenceIndex": "hf_doge.tracing.index",
    "TracInWECallback": "hf_doge.tracing.callback",
    "Trajectory": "hf_doge.artifacts.record",
    "estimate_domain_weights": "hf_doge.mixing.estimate",
    "interleave_domains": "hf_doge.sampling.streaming",
    "load_mixture": "hf_doge.data.domain_data",
    "sweep_domain_weights": "hf_doge.training.sweep",
}

__all__ = [
    "DoGEConfig",
    "DoGEMixin",
    "DoGETrainer",
    "DomainMetricsCallback",
    "DomainWeightedMixin",
    "DomainWeightedSampler",
    "DomainWeightedTrainer",
    "DomainWeights",
    "InfluenceIndex",
    "TracInWECallback",
    "Trajectory",
    "__version__",
    "estimate_domain_weights",
    "interleave_domains",
    "load_mixture",
    "sweep_domain_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
