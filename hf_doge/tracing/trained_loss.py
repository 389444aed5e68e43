"""Whether what a Trainer differentiates is the loss that its model returns: seen at the first steps, as no name tells it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainingArguments

from hf_doge.gradients.example_losses import logits_of, loss_of
from hf_doge.tracing.models import unwrap_model

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
_MOST_LOGITS = 2**24  # of more, a second gradient could take memory that the training does not have
_FIRST_STEPS = 8  # are all looked at, and then those at powers of two
_FUSED = "fused_lm_head"  # with this, the model returns what trl adds up to the same loss

ADVICE = (
    " Recorded is the loss that the model returns, for examples and queries alike. To record what is trained, pass it as"
    " `loss_fn(outputs, batch)`, one loss per example."
)


class TrainedLoss:
    """
    Looks on while a model is trained, from [`watch`] to [`difference`]. What is computed does not change by a bit.

    The first step can hide what later ones show: where all labels of a batch are equal, weights of classes are none. So
    some more are looked at, ever fewer of them.

    Args:
        model (`nn.Module`): Of the Trainer.
        args (`TrainingArguments`): Where the model is run by other means than its own forward, nothing is seen.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        self._model = unwrap_model(model)
        self._is_seen = not (args.torch_compile or args.deepspeed or args.n_gpu > 1 or hasattr(args, "reweight_steps"))
        self._half_precision = args.fp16 or args.bf16
        self._runs: list[dict[str, Any]] = []  # of the model, up to the first backward of a step
        self._num_steps = 0
        self._was_run = False
        self._hook: RemovableHandle | None = None

    def watch(self) -> None:
        """Before the forward of a step."""
        if self._hook is None:
            self._hook = self._model.register_forward_hook(self._after_forward, with_kwargs=True)

    def close(self) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._runs = None, []

    def difference(self) -> str | None:
        """After the backward of a step: what is differentiated instead of the model's loss, if something else, in words."""
        runs = self._runs
        self.close()
        self._num_steps += 1
        if self._num_steps == 1 and self._is_seen and not self._was_run:
            return "What is trained is not computed by a run of the whole model, so its loss is another one."
        used = [run for run in runs if run["backward"]] or runs
        if len(used) > 1:
            return "The loss that is trained is made of several runs of the model."
        return self._difference(used[0]) if used else None

    def _difference(self, run: Mapping[str, Any]) -> str | None:
        if not run["has_loss"]:
            return "The model is trained without a loss of its own, by one that is computed from its outputs."
        if "loss_grad" not in run:
            return "The model returns a loss, but another one is trained, computed from its outputs."
        for expected, found in zip(run["expected"], run["found"], strict=True):
            tolerance = _HALF_TOLERANCE if self._half_precision else _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
            expected = run["loss_grad"].to(expected.dtype) * expected
            if found is not None and (found - expected).norm() > tolerance * expected.norm():
                return "The loss that is trained is that of the model and something more."
        return None

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], outputs: object) -> None:
        self._was_run = True
        if not (self._is_seen and module.training and torch.is_grad_enabled()) or kwargs.get(_FUSED):
            return
        number = self._num_steps + 1
        due = number <= _FIRST_STEPS or number & (number - 1) == 0
        begun = any(run["backward"] for run in self._runs)
        if not due or begun or len(self._runs) > 1:
            return
        found = loss_of(outputs)
        loss = found if isinstance(found, Tensor) and found.requires_grad else None
        run: dict[str, Any] = {"has_loss": loss is not None, "backward": False}
        self._runs.append(run)  # without the loss itself, whose graph is not to outlive the step
        watched = _watched(module, outputs)
        if loss is not None:
            grads = torch.autograd.grad(loss, watched, retain_graph=True, allow_unused=True) if watched else ()
            watched = [tensor for tensor, grad in zip(watched, grads, strict=True) if grad is not None]
            run["expected"] = [grad for grad in grads if grad is not None]
            loss.register_hook(lambda grad: run.update(loss_grad=grad.detach().clone(), backward=True))
        run["found"] = [None] * len(watched)
        for place, tensor in enumerate(watched):
            tensor.register_hook(partial(_note, run, place))


def _watched(module: nn.Module, outputs: object) -> list[Tensor]:
    """What else a loss may be computed from, the logits first, as far as another gradient of it takes little memory."""
    hidden = getattr(outputs, "hidden_states", None)
    # Checkpointed activations cannot be differentiated by.
    if not isinstance(hidden, tuple) or any(
        getattr(part, "gradient_checkpointing", False) for part in module.modules()
    ):
        hidden = ()
    watched, room = [], _MOST_LOGITS
    for tensor in (logits_of(outputs), *hidden[::-1]):
        if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.numel() <= room:
            room -= tensor.numel()
            watched.append(tensor)
    return watched


def _note(run: dict[str, Any], place: int, grad: Tensor) -> None:
    run["found"][place] = grad.detach().clone()
    run["backward"] = True
