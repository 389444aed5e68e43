"""What every test shares: no network, one thread, a tiny tokenizer."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

from tests.tiny import tiny_tokenizer

torch.set_num_threads(1)


def pytest_collection_finish():
    """
    Keep the garbage collector away from what the imports made.

    A Trainer collects garbage at the end of each training; going through the half a million objects of the libraries took
    a third of the time of a short training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer():
    """Thirty-two one-letter words, with padding, mask and end."""
    return tiny_tokenizer()
