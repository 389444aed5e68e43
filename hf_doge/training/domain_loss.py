"""The mean loss of a domain over a whole step, whatever loss the model or `compute_loss_func` defines."""

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_doge.gradients.sharding import is_sharded
from hf_doge.training.loss_law import LossLaw
from hf_doge.training.step_gradients import DomainSlice, MicroBatch


class DomainLoss:
    """
    What one slice adds to its domain's mean loss, so that the slices of a step add up to it.

    A loss is either divided by `num_items_in_batch`, as the Trainer passes it to causal language models, or a mean
    over the slice's own labels. Which of the two is not guessed but tried on the first step, by [`learn`]: doubling
    `num_items_in_batch` halves the former and leaves the latter alone. Anything else is refused.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._is_divided: bool | None = None
        self._process_scale = _process_scale(trainer)

    @cached_property
    def labels_are_shifted(self) -> bool:
        """See [`count_items`]; asked for in a step, since a search makes the model of a trial after its trainer begins."""
        return _are_labels_shifted(self.trainer.model)

    def __call__(self, model: nn.Module, piece: DomainSlice, num_items: int) -> Tensor:
        """
        Args:
            model (`torch.nn.Module`): The model as the Trainer wraps it.
            piece (`DomainSlice`): The domain's part of one micro-batch.
            num_items (`int`): Labels of the domain in the whole step, `>= piece.num_items`.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        is_divided = self._is_divided
        if is_divided is None:  # what the Trainer takes for granted, until a slice can tell
            is_divided = self.trainer.model_accepts_loss_kwargs or self.trainer.compute_loss_func is not None
        loss = self._compute(model, piece, num_items)
        return loss if is_divided else loss * (piece.num_items / num_items)

    @property
    def is_learned(self) -> bool:
        """Whether [`learn`] has found out."""
        return self._is_divided is not None

    def learn(self, model: nn.Module, batches: list[MicroBatch], *, makes_same_calls: bool) -> None:
        """
        Find out what the loss is divided by, and that it is a sum or a mean over labels; see [`LossLaw`].

        Args:
            model (`torch.nn.Module`): As in [`__call__`].
            batches (`list[MicroBatch]`): With a label each.
            makes_same_calls (`bool`): Whether all processes must call the loss equally often.

        Raises:
            `ValueError`: if it is neither.
        """
        args = self.trainer.args
        law = LossLaw(
            model,
            partial(self._compute, model),
            batches,
            labels_are_shifted=self.labels_are_shifted,
            device=args.device,
            is_half=(args.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest")
            or (args.bf16 and is_sharded(model)),
        )
        if self._process_scale > 1:  # by the Trainer's own loss, but perhaps not by one that overrides it
            self._process_scale = 1
            ratio = law.compare(partial(self._compute_alone, model))
            self._process_scale = _process_scale(self.trainer) if ratio is None or abs(ratio - 1) > 0.1 else 1
        law.check(makes_same_calls=makes_same_calls)
        self._is_divided = law.is_divided

    def _compute(self, model: nn.Module, piece: DomainSlice, num_items: int) -> Tensor:
        trainer = self.trainer
        count = torch.tensor(num_items, device=trainer.args.device)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(piece.inputs), num_items_in_batch=count)
        return loss / self._process_scale

    def _compute_alone(self, model: nn.Module, piece: DomainSlice, num_items: int) -> Tensor:
        """As [`_compute`], where the Trainer is told not to scale a loss for the mean over the processes."""
        args = self.trainer.args
        averages, args.average_tokens_across_devices = args.average_tokens_across_devices, False
        try:
            return self._compute(model, piece, num_items)
        finally:
            args.average_tokens_across_devices = averages


def _are_labels_shifted(model: Any) -> bool:
    """Whether the model's loss predicts each label from the position before."""
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "loss_type", None) == "ForCausalLM" and not is_encoder_decoder


def _process_scale(trainer: Trainer) -> int:
    """What the Trainer multiplies a divided loss with, so that a mean over processes comes out as a sum."""
    takes_items = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    return trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices and takes_items else 1
