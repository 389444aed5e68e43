"""What every test shares: no network, one thread, a tiny tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

from tests.tiny import tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    """Thirty-two one-letter words, with padding, mask and end."""
    return tiny_tokenizer()
