"""
Models whose forward returns log-probabilities of the labels instead of logits, as what trl's SFTTrainer (1.0 and newer)
puts in place of a model's forward does when called with `fused_lm_head=True`.

Such a forward reads the weight of the output layer without calling the layer, so a gradient of that weight cannot be told
apart by domain. [`ask_for_logits`] therefore lets the model make its logits as it was written to, and reads the same
log-probabilities off them.

Shapes: B = examples of a micro-batch, T = their length, V = size of the vocabulary.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_doge.gradients.example_losses import IGNORE_INDEX, logits_of

FUSED = "fused_lm_head"  # the argument of the forward that asks for log-probabilities
_COPIES = 4  # of the logits that are there at once: themselves, their logarithms, probabilities and gradient


class WholeLogitsError(Exception):
    """The logits of a micro-batch cannot be made, or are too large."""


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, if the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        layer = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # of models that have no such layer
        return None
    return layer if isinstance(layer, nn.Module) else None


def ask_for_logits(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], *, memory_budget: float
) -> tuple[tuple, dict[str, Any]] | None:
    """
    A forward pre-hook: a forward that is asked for log-probabilities makes them from the logits of the model's own forward, if
    the output layer is trained. One that is not trained stays fused: it has no gradient to tell apart.

    Args:
        model (`nn.Module`), args (`tuple`), kwargs (`Mapping[str, Any]`): What is called, and with what.
        memory_budget (`float`): Bytes that the logits and what comes of them may take.

    Raises:
        `WholeLogitsError`: if they take more, or there are no labels; by the forward, if they do not come one for each label.
    """
    layer = output_layer(model)
    is_trained = layer is not None and any(parameter.requires_grad for parameter in layer.parameters())
    if not (kwargs.get(FUSED) and is_trained and torch.is_grad_enabled()):
        return None
    assert layer is not None
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or kwargs.get("shift_labels") is not None:
        raise WholeLogitsError("its labels are none, or shifted already")
    needed = _COPIES * 4 * labels.numel() * max(len(parameter) for parameter in layer.parameters())
    if needed > memory_budget:
        raise WholeLogitsError(
            f"the logits of a micro-batch, whole, take {needed / 2**30:.3g} GiB of the `gradient_memory_budget` of "
            f"{memory_budget / 2**30:.3g} GiB"
        )

    def read_log_probs(_: nn.Module, args: tuple, outputs: Any) -> Any:
        handle.remove()
        return None if outputs is None else _log_probs(outputs, labels)  # None where the forward failed

    handle = model.register_forward_hook(read_log_probs, prepend=True, always_call=True)  # before those who look at it
    return args, {name: value for name, value in kwargs.items() if name not in (FUSED, "labels")}


def _log_probs(outputs: Any, labels: Tensor) -> SimpleNamespace:
    """What the fused head returns, from logits of shape `(B, T, V)`: each predicts the label after it."""
    logits = logits_of(outputs)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape or labels.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        raise WholeLogitsError(f"its logits are of shape {shape} for labels of shape {tuple(labels.shape)}")
    expected = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(logits.device)
    counts = expected.ne(IGNORE_INDEX)
    logs = logits.float().log_softmax(dim=-1)
    picked = logs.gather(-1, expected.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # for the logs of the trainer
        entropy = -torch.linalg.vecdot(logs.exp(), logs)
        is_top1 = logits.argmax(dim=-1).eq(expected)
    read = {"log_probs": picked, "entropy": entropy, "is_top1": is_top1}
    found = {name: value.masked_fill(~counts, 0)[:, :-1] for name, value in read.items()}
    return SimpleNamespace(**found, label_mask=counts[:, :-1], aux_loss=getattr(outputs, "aux_loss", None))
