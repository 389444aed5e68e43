"""What is learned, as files."""

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.artifacts.trajectory import Trajectory

__all__ = ["DomainWeights", "Trajectory"]
