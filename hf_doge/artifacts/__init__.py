"""What is learned, as files."""

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.artifacts.record import Trajectory

__all__ = ["DomainWeights", "Trajectory"]
