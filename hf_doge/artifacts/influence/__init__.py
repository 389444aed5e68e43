"""Gradient rows of every training example on disk: written once, searched exactly."""

from hf_doge.artifacts.influence.checkpoint_writer import CheckpointWriter
from hf_doge.artifacts.influence.reader import IndexReader
from hf_doge.artifacts.influence.writer import IndexWriter

__all__ = ["CheckpointWriter", "IndexReader", "IndexWriter"]
