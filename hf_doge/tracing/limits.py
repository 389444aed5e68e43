"""What a model can take: how many positions, which classes. Beyond it a GPU's process ends without a word."""

from collections.abc import Callable

import numpy as np
from torch import nn

from hf_doge.gradients.example_losses import IGNORE_INDEX

_FRACTIONS = ("regression", "multi_label_classification")
_BY_TOKEN = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")

_POSITION_TABLES = ("position_embeddings", ".wpe")


def num_positions(model: nn.Module) -> int | None:
    """How many tokens the model's table of learned positions has room for; `None` without such a table."""
    rooms = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(_POSITION_TABLES):
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from its padding on
            rooms.append(module.num_embeddings - first)
    return min(rooms, default=None)


def num_classes(model: nn.Module) -> int | None:
    """Of how many classes a text has one; `None` where its label is anything else, or the model's class is unknown."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(inner, "config", None)
    if not type(inner).__name__.endswith("ForSequenceClassification"):
        return None
    if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
        return None
    return config.num_labels if config.num_labels > 1 else None


def takes_padding(model: nn.Module) -> bool:
    """Whether several texts may be padded to one batch: a classifier that reads the last token must know the padding."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decides = type(inner).__name__.endswith("ForSequenceClassification")
    return not decides or getattr(inner.config, "pad_token_id", None) is not None


def wants_fractions(model: nn.Module) -> bool:
    """Whether a text has numbers for labels, which the loss wants as floats: those of a regression, or of several classes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(getattr(inner, "config", None), "problem_type", None)
    return type(inner).__name__.endswith("ForSequenceClassification") and kind in _FRACTIONS


def label_law(model: nn.Module) -> Callable[[np.ndarray, int], str | None]:
    """
    What the labels of one example of a model of transformers must be, as a function of `(labels, number of its tokens)`
    that says what is wrong with them. Labels of models that are not known pass.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, config = type(inner).__name__, getattr(inner, "config", None)
    by_token = name.endswith(_BY_TOKEN)
    writes = getattr(config, "is_encoder_decoder", False) and name.endswith("ForConditionalGeneration")
    kind = getattr(config, "problem_type", None) if name.endswith("ForSequenceClassification") else None
    size = (
        config.num_labels if name.endswith("ForTokenClassification") or kind else getattr(config, "vocab_size", None)
    )

    def wrong(labels: np.ndarray, num_tokens: int) -> str | None:
        if kind in _FRACTIONS:
            return None if labels.size == size else f"be {size} numbers ({kind}), but there are {labels.size}"
        if not (by_token or writes) or not isinstance(size, int):
            return None
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            return f"be one whole number for each token of a `{name}`, but are {labels.tolist()!r:.60}"
        if by_token and len(labels) != num_tokens:
            return f"be as many as its {num_tokens} tokens, but there are {len(labels)}"
        outside = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= size))]
        return f"be from 0 to {size - 1}, or {IGNORE_INDEX}, but hold {outside[0]}" if len(outside) else None

    return wrong
