"""What every test shares: no network, one thread, a tiny tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    """Thirty-two one-letter words, with padding, mask and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<mask>", "<eos>", "<unk>"]
    vocab = {word: i for i, word in enumerate(specials + [f"w{i}" for i in range(28)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>", eos_token="<eos>", unk_token="<unk>"
    )
