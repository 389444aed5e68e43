"""Whether what a Trainer differentiates is the loss that its model returns: seen at the first step, as no name tells it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_doge.gradients.example_losses import logits_of, loss_of
from hf_doge.tracing.fingerprints import unwrap_model

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
_MOST_LOGITS = 2**24  # of more, a second gradient could take memory that the training does not have
_FUSED = "fused_lm_head"  # with this, the model returns what trl adds up to the same loss

ADVICE = (
    " Recorded is the loss that the model returns, for examples and queries alike. To record what is trained, pass it as"
    " `loss_fn(outputs, batch)`, one loss per example."
)


class TrainedLoss:
    """
    Looks on while a model is trained, until [`close`]. What is computed does not change by a bit.

    Args:
        model (`nn.Module`): Of the Trainer.
        args (`TrainingArguments`): Where the model is run by other means than its own forward, nothing is seen.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        self._model = unwrap_model(model)
        self._is_seen = not (args.torch_compile or args.deepspeed or args.n_gpu > 1 or hasattr(args, "reweight_steps"))
        self._half_precision = args.fp16 or args.bf16
        self._found: list[dict[str, Any]] = []
        self._hook = self._model.register_forward_hook(self._after_forward, with_kwargs=True)

    def close(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        self._found.clear()

    def difference(self) -> str | None:
        """After a backward: what is differentiated instead of the model's loss, if it is something else, in words."""
        for found in self._found:
            if not found["has_loss"]:
                return "The model is trained without a loss of its own, by one that is computed from its outputs."
            if "loss_grad" not in found:
                return "The model returns a loss, but another one is trained, computed from its outputs."
            if "expected" in found:
                dtype = found["expected"].dtype
                tolerance = _HALF_TOLERANCE if self._half_precision else _TOLERANCE.get(dtype, _HALF_TOLERANCE)
                expected = found["loss_grad"].to(dtype) * found["expected"]
                if (found["logits_grad"] - expected).norm() > tolerance * expected.norm():
                    return "The loss that is trained is that of the model and something more."
        return None

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], outputs: object) -> None:
        if not (self._is_seen and module.training and torch.is_grad_enabled()) or self._found or kwargs.get(_FUSED):
            return
        loss, logits = loss_of(outputs), logits_of(outputs)
        found: dict[str, Any] = {"has_loss": isinstance(loss, Tensor) and loss.requires_grad}
        self._found.append(found)  # without the loss itself, whose graph is not to outlive the step
        if not found["has_loss"]:
            return
        loss.register_hook(lambda grad: found.update(loss_grad=grad.detach().clone()))
        if isinstance(logits, Tensor) and logits.requires_grad and logits.numel() <= _MOST_LOGITS:
            (expected,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
            if expected is not None:
                found["expected"] = expected
                found["logits_grad"] = torch.zeros_like(expected)
                logits.register_hook(lambda grad: found.update(logits_grad=grad.detach().clone()))
