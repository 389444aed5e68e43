"""
Whether what a Trainer differentiates is the loss that its model returns, of the batches that the collator makes: seen at
the first steps, as no name tells it.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import TrainingArguments

from hf_doge.gradients.example_losses import logits_of, loss_of
from hf_doge.tracing.even_weights import EvenWeights, count_labels
from hf_doge.tracing.models import unwrap_model
from hf_doge.tracing.trained_batches import TrainedBatches

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
_MOST_LOGITS = 2**24  # of more, a second gradient could take memory that the training does not have
_FIRST_STEPS = 8  # are all looked at, and then those at powers of two
_FUSED = "fused_lm_head"  # with this, the model returns what trl adds up to the same loss

ADVICE = (
    " Recorded is the loss that the model returns, for examples and queries alike. To record what is trained, pass it as"
    " `loss_fn(outputs, batch)`, one loss per example."
)
_INPUTS_ADVICE = " Recorded is what the collator makes. Let the dataset or the collator make what is trained, so that it is recorded too."


class TrainedLoss:
    """
    Looks on while a model is trained, from [`watch`] to [`difference`]. What is computed does not change by a bit.

    The first step can hide what later ones show: where all labels of a batch are equal, weights of classes are none. So
    some more are looked at, ever fewer of them.

    Args:
        model (`nn.Module`): Of the Trainer.
        args (`TrainingArguments`): Where the model is run by other means than its own forward, nothing is seen.
        dataloader (`DataLoader`): Of the training, not yet iterated.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, dataloader: DataLoader) -> None:
        self._model = unwrap_model(model)
        self._is_seen = not (args.torch_compile or args.deepspeed or args.n_gpu > 1 or hasattr(args, "reweight_steps"))
        self._half_precision = args.fp16 or args.bf16
        self._runs: list[dict[str, Any]] = []  # of the model, up to the first backward of a step
        self._num_steps = 0
        self._was_run = False
        self._hook: RemovableHandle | None = None
        self._weights = EvenWeights(loss_is_scaled=args.fp16)
        self._counts: list[Tensor] = []  # of labels, for each run in a step
        self._batches: TrainedBatches | None = None
        if self._is_seen and not getattr(args, "parallelism_config", None):  # which cuts examples in pieces
            num_kept = (args.gradient_accumulation_steps + 2) * args.world_size
            self._batches = TrainedBatches(dataloader, num_kept=num_kept)

    def watch(self) -> None:
        """Before the forward of a step."""
        if self._hook is None:
            self._hook = self._model.register_forward_hook(self._after_forward, with_kwargs=True)

    def close(self) -> None:
        """Leave the model and the DataLoader as they were."""
        self._forget_step()
        if self._batches is not None:
            self._batches.close()

    def _forget_step(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._runs, self._counts = None, [], []

    def difference(self) -> str | None:
        """After the backward of a step: what is trained instead of what is recorded, if something else, in words."""
        runs, counts = self._runs, self._counts
        self._forget_step()
        self._num_steps += 1
        if self._num_steps == 1 and self._is_seen and not self._was_run:
            return f"What is trained is not computed by a run of the whole model, so its loss is another one.{ADVICE}"
        used = [run for run in runs if run["backward"]] or runs
        if len(used) > 1:
            return f"The loss that is trained is made of several runs of the model.{ADVICE}"
        if not used:
            return None
        different = self._difference(used[0]) or self._uneven(used[0], counts)
        if different is not None:
            return f"{different}{ADVICE}"
        name = used[0]["other_input"]
        if name is None:
            return None
        return (
            f"The model is trained with other `{name}` than the collator makes: `compute_loss`, `training_step` or"
            f" `_prepare_inputs` change what they are given.{_INPUTS_ADVICE}"
        )

    def _uneven(self, run: Mapping[str, Any], counts: list[Tensor]) -> str | None:
        """Whether the model's loss counts more at some steps than at others, so that some examples do."""
        others = self._weights.others(run["loss_grad"], run["counts"], counts)
        if others is None:
            return None
        return (
            f"The loss of the model is multiplied by {others} at different steps, so examples do not weigh the same."
        )

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
        given = _by_name(module, args, kwargs)
        counts = count_labels(given.get("labels"))
        self._counts.append(counts)
        number = self._num_steps + 1
        due = number <= _FIRST_STEPS or number & (number - 1) == 0
        begun = any(run["backward"] for run in self._runs)
        if not due or begun or len(self._runs) > 1:
            return
        found = loss_of(outputs)
        loss = found if isinstance(found, Tensor) and found.requires_grad else None
        run: dict[str, Any] = {"has_loss": loss is not None, "backward": False, "counts": counts}
        run["other_input"] = None if self._batches is None else self._batches.other_input(given)
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


def _by_name(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was called with, by the names that its forward has for it."""
    names = inspect.signature(module.forward).parameters if args else ()
    return {**dict(zip(names, args, strict=False)), **kwargs}


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
