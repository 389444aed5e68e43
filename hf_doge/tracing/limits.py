"""What a model can take: how many positions, which classes. Beyond it a GPU's process ends without a word."""

from torch import nn

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
