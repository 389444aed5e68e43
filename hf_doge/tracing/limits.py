"""What a model can take: which arguments, how many positions, which classes. Beyond it a GPU's process ends without a word."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from torch import nn

from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.example_losses import ANSWERS, IGNORE_INDEX
from hf_doge.gradients.layers import EMBEDDING

_USUAL_ARGUMENTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"}
_LONGEST = 1_000_000  # a tokenizer that knows no limit has a much larger one
_DECIDING = ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM")
_FRACTIONS = ("regression", "multi_label_classification")
_BY_TOKEN = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")

_POSITION_TABLES = ("position_embeddings", ".wpe")


@dataclass(frozen=True)
class ModelInputs:
    """
    What a query may be to one model.

    Attributes:
        names (`set[str]`): Arguments of its `forward`; of the model inside an adapter.
        num_positions, num_classes (`int`, *optional*): See the functions of these names.
        max_length (`int`, *optional*): How many tokens it reads at most, as far as it or the tokenizer knows.
        vocabulary_size (`int`): Rows of its input embeddings.
        pad_token_id (`int`): What fills a batch; it is masked.
        pads (`bool`): Whether several queries may be padded to one batch.
        continues_texts (`bool`): Whether it predicts each next token of what it reads, as far as its class tells.
    """

    names: set[str]
    num_positions: int | None
    num_classes: int | None
    max_length: int | None
    vocabulary_size: int
    pad_token_id: int
    pads: bool
    continues_texts: bool

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any | None) -> "ModelInputs":
        """Look at a model and its tokenizer."""
        inner = _inside(model)
        config, inner_config = getattr(model, "config", None), getattr(inner, "config", None)
        names = set(inspect.signature(inner.forward).parameters)
        if "input_ids" not in names:
            names |= _USUAL_ARGUMENTS  # a wrapper that passes on what it gets
        positions = num_positions(model)
        told = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
        lengths = (getattr(tokenizer, "model_max_length", None), positions, *told)
        longest = min(length or _LONGEST for length in lengths)
        whole: Any = model
        size = len(whole.get_input_embeddings().weight)
        pad_token_id = getattr(config, "pad_token_id", None) or 0
        # Where an answer is, models look for among padding as well.
        pads = "attention_mask" in names and takes_padding(model) and not names & set(ANSWERS)
        decides = type(inner).__name__.endswith(_DECIDING) or getattr(inner_config, "is_encoder_decoder", False)
        return cls(
            names=names,
            num_positions=positions,
            num_classes=num_classes(model),
            max_length=None if longest >= _LONGEST else longest,
            vocabulary_size=size,
            pad_token_id=pad_token_id if 0 <= pad_token_id < size else 0,
            pads=pads,
            continues_texts=not decides,
        )


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
    inner = _inside(model)
    config: Any = getattr(inner, "config", None)
    if not type(inner).__name__.endswith("ForSequenceClassification"):
        return None
    if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
        return None
    return config.num_labels if config.num_labels > 1 else None


def class_layer(model: nn.Module) -> str | None:
    """
    Name of the linear layer that gives the classes their logits: the last one with as many outputs as there are classes.

    `None` where [`num_classes`] knows none, there is no such layer, or nothing trains it itself: it is frozen, or has an adapter.
    """
    count, found = num_classes(model), None
    for name, module in model.named_modules() if count is not None else ():
        is_added = (
            ".original_module" in name or ".lora_" in name
        )  # by peft: the untrained copy, and the adapter of a layer
        if isinstance(module, nn.Linear) and module.out_features == count and not is_added:
            found = name
    return found if found is not None and model.get_parameter(f"{found}.weight").requires_grad else None


def default_layers(model: nn.Module, begun: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    The settings that `layers="auto"` stands for: words, and the last layer of a classifier that is trained with them; else words alone.

    The layer takes the room of one more word: of few classes all its outputs, and as many projections of its inputs as a row has left for
    each; of more classes than the root of the width that many projections of both.

    Args:
        model (`nn.Module`): Which is recorded.
        begun (`Mapping`, *optional*): The content of config.json of an index that is there, which keeps what it has.

    Returns:
        `dict`: `layers` and `projection_dim`, see [`RecordingSettings`].
    """
    words_alone = {"layers": None, "projection_dim": None}
    if begun is not None:
        recorded = begun.get("layers")
        if recorded is None:
            return words_alone
        names = [one["name"] for one in recorded["modules"]]
        kept = max(size for one in recorded["modules"] for size in one["kept"])
        return {"layers": [EMBEDDING, *names] if recorded["embedding"] else names, "projection_dim": kept}
    last, matrix = class_layer(model), input_embedding_matrix(model)
    if last is None or not matrix.requires_grad:
        return words_alone
    width, num_classes = matrix.shape[1], len(model.get_parameter(f"{last}.weight"))
    return {"layers": [EMBEDDING, last], "projection_dim": max(isqrt(width), width // num_classes)}


def takes_padding(model: nn.Module) -> bool:
    """Whether several texts may be padded to one batch: a classifier that reads the last token must know the padding."""
    inner = _inside(model)
    decides = type(inner).__name__.endswith("ForSequenceClassification")
    return not decides or getattr(inner.config, "pad_token_id", None) is not None


def wants_fractions(model: nn.Module) -> bool:
    """Whether a text has numbers for labels, which the loss wants as floats: those of a regression, or of several classes."""
    inner = _inside(model)
    kind = getattr(getattr(inner, "config", None), "problem_type", None)
    return type(inner).__name__.endswith("ForSequenceClassification") and kind in _FRACTIONS


def label_law(model: nn.Module) -> Callable[[np.ndarray, int], str | None]:
    """
    What the labels of one example of a model of transformers must be, as a function of `(labels, number of its tokens)`
    that says what is wrong with them. Labels of models that are not known pass.
    """
    inner = _inside(model)
    name: str = type(inner).__name__
    config: Any = inner.config if hasattr(inner, "config") else None
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


def _inside(model: nn.Module) -> Any:
    """The model inside an adapter, or itself."""
    found: Any = model
    return found.get_base_model() if hasattr(found, "get_base_model") else found
