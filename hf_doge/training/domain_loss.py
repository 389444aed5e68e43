"""The mean loss of a domain over a whole step, whatever loss the model or `compute_loss_func` defines."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_doge.training.step_gradients import DomainSlice


class DomainLoss:
    """
    What one slice adds to its domain's mean loss, so that the slices of a step add up to it.

    A loss is either divided by `num_items_in_batch`, as the Trainer passes it to causal language models, or a mean
    over the slice's own labels. Which of the two is not guessed but tried on the first slice, by [`learn`]: doubling
    `num_items_in_batch` halves the former and leaves the latter alone. Anything else (an auxiliary loss, say) is refused.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.labels_are_shifted = _are_labels_shifted(trainer.model)
        self._is_divided: bool | None = None

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

    def learn(self, model: nn.Module, piece: DomainSlice) -> None:
        """
        Find out on a slice what the loss is divided by.

        Raises:
            `ValueError`: if it is neither divided by `num_items_in_batch` nor a mean over the labels.
        """
        found = self._probe(model, piece)
        self._is_divided = self._is_divided if found is None else found

    def _compute(self, model: nn.Module, piece: DomainSlice, num_items: int) -> Tensor:
        trainer = self.trainer
        count = torch.tensor(num_items, device=trainer.args.device)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(piece.inputs), num_items_in_batch=count)
        return loss / self._process_scale

    @property
    def _process_scale(self) -> int:
        """What the Trainer multiplies a divided loss with, so that a mean over processes comes out as a sum."""
        trainer = self.trainer
        takes_items = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        averages = trainer.args.average_tokens_across_devices and takes_items
        return trainer.accelerator.num_processes if averages else 1

    def _probe(self, model: nn.Module, piece: DomainSlice) -> bool | None:
        """Whether the loss divides by `num_items_in_batch`; `None` if this slice cannot tell."""
        devices = [] if self.trainer.args.device.type == "cpu" else [self.trainer.args.device]
        with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type=self.trainer.args.device.type):
            model.eval()
            once, twice = (self._compute(model, piece, factor * piece.num_items).item() for factor in (1, 2))
            model.train()
        if once == 0 or not isfinite(once):
            return None
        ratio = twice / once
        for is_divided, expected in ((True, 0.5), (False, 1.0)):
            if abs(ratio - expected) < 0.02:
                return is_divided
        raise ValueError(
            "The loss must be divided by `num_items_in_batch` or be a mean over the labels, so that it can be averaged "
            f"over a domain, but doubling `num_items_in_batch` changed it from {once:.6g} to {twice:.6g}. Switch off "
            "auxiliary losses (`output_router_logits`, ...) or make `compute_loss_func` do one of the two."
        )


def _are_labels_shifted(model: Any) -> bool:
    """Whether the model's loss predicts each label from the position before."""
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "loss_type", None) == "ForCausalLM" and not is_encoder_decoder
