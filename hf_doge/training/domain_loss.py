"""The mean loss of a domain over a whole step, whatever loss the model or `compute_loss_func` defines."""

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_doge.gradients.sharding import is_sharded, reshard, without_gradient
from hf_doge.gradients.vectors import Reduction
from hf_doge.training.loss_law import LossLaw
from hf_doge.training.loss_trials import has_first_label, unnoticed
from hf_doge.training.packing import EXAMPLE_LENGTHS
from hf_doge.training.step_gradients import DomainSlice, MicroBatch

_SHIFT_TRIALS = 8  # steps whose first labels may fail to tell
_PREDICT_IN_PLACE = {"XLMWithLMHeadModel", "XLNetLMHeadModel"}  # of the causal models whose name tells no loss
_CAUSAL_MODELS = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()} - _PREDICT_IN_PLACE


class DomainLoss:
    """
    What one slice adds to its domain's mean loss, so that the slices of a step add up to it, and its gradient.

    A loss is either divided by `num_items_in_batch`, as the Trainer passes it to causal language models, or a mean
    over the slice's own labels. Which of the two is not guessed but tried on the first step, by [`learn`]: doubling
    `num_items_in_batch` halves the former and leaves the latter alone. Anything else is refused.

    Args:
        trainer (`Trainer`): Its model and loss are read at every call.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.device = trainer.args.device
        self.num_calls = 0
        self._is_divided: bool | None = None
        self.found_shift: bool | None = None  # what [`learn`] found of `labels_are_shifted`
        self._num_shift_trials = _SHIFT_TRIALS
        self.is_settled = False  # whether all processes know what [`learn`] finds out
        self._process_scale = _process_scale(trainer)
        self._reduction = Reduction()

    @cached_property
    def labels_are_shifted(self) -> bool:
        """
        See [`count_items`]; by the class of the model until [`learn`] has tried. Asked for in a step, since a search makes the
        model of a trial after its trainer begins.
        """
        return are_labels_shifted(self.trainer.model)

    @cached_property
    def is_sharded(self) -> bool:
        """Asked for in a step, since FSDP shards the model when training starts."""
        return is_sharded(self.trainer.model)

    @property
    def uses_collectives(self) -> bool:
        """
        Whether the loss may exchange data with the other processes, as that of trl's SFTTrainer does to gather its metrics,
        and any loss of a sharded model to gather its parameters: then all of them must call it equally often, whatever
        examples they have.
        """
        if not self._reduction.is_needed:
            return False
        return type(self.trainer).compute_loss is not Trainer.compute_loss or is_sharded(self.trainer.model)

    def __call__(self, piece: DomainSlice, num_items: int) -> Tensor:
        """
        Args:
            piece (`DomainSlice`): The domain's part of one micro-batch.
            num_items (`int`): Labels of the domain in the whole step, `>= piece.num_items`.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        is_divided = self._is_divided
        if is_divided is None:  # what the Trainer takes for granted, until a slice can tell
            is_divided = self.trainer.model_accepts_loss_kwargs or self.trainer.compute_loss_func is not None
        loss = self._compute(piece, num_items)
        self.num_calls += 1
        return loss if is_divided else loss * (piece.num_items / num_items)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of what this process has of a sum over all of them to `.grad`; FSDP adds the mean."""
        scale = self._reduction.num_processes if self.is_sharded else 1
        self.trainer.accelerator.backward(loss * scale)

    def call_for_nothing(self, piece: DomainSlice) -> None:
        """Take part in what the other processes do, and add nothing: of a sharded model, by a dummy backward."""
        if self.is_sharded:
            with without_gradient(self.trainer.model):
                self.backward(0.0 * self(piece, 1))
        else:
            with torch.no_grad(), self.unnoticed():
                self(piece, 1)

    def unnoticed(self) -> AbstractContextManager[None]:
        """Inside, what trl's trainers note of every loss is not noted."""
        return unnoticed(self.trainer)

    def learn(self, batches: list[MicroBatch]) -> None:
        """
        Find out whether the loss leaves out the first label of a row, what it is divided by, and that it is a sum or a mean
        over labels; see [`LossLaw`]. With a loss that uses collectives, on all processes or on none.

        Args:
            batches (`list[MicroBatch]`): Train examples of this process; their labels are counted again if need be.

        Raises:
            `ValueError`: if it is neither.
        """
        with unnoticed(self.trainer):
            self._try(batches)

    def _try(self, batches: list[MicroBatch]) -> None:
        if self._num_shift_trials:
            self._learn_shift(batches)
        labelled = [batch for batch in batches if batch.items.any()]
        is_ready, is_learned = bool(labelled), self._is_divided is not None
        if self.uses_collectives:
            is_ready, is_learned = (not lack for lack in self._max([not is_ready, not is_learned]))
        if is_ready and not is_learned:
            self._learn(self._law(labelled))
        self.is_settled = not self._max([self._is_divided is None])[0] and not self._num_shift_trials

    def _learn_shift(self, batches: list[MicroBatch]) -> None:
        """
        Try whether first labels count, where some process has any, and take over what is found where no process has found the
        contrary; then count again. What cannot tell is tried a few times.
        """
        firsts = [has_first_label(batch.inputs) for batch in batches]
        has_first, has_rows, lacks = self._max(
            [any(first.any() for first in firsts), any(map(len, firsts)), not batches]
        )
        if not has_rows and not lacks:  # but one label for each example
            self._num_shift_trials = 0
        if not has_first or (lacks and self.uses_collectives):
            return
        found = self._law(batches).finds_shift() if batches else None
        reshard(self.trainer.model)
        is_shifted, is_not = self._max([found is True, found is False])
        self._num_shift_trials = 0 if is_shifted or is_not else self._num_shift_trials - 1
        if is_shifted != is_not:
            self.take_shift(bool(is_shifted))
        for batch in batches:
            batch.count_labels(labels_are_shifted=self.labels_are_shifted)

    def take_shift(self, is_shifted: bool) -> None:
        """What was found, now or in the run that is resumed."""
        self.labels_are_shifted = self.found_shift = is_shifted
        self._num_shift_trials = 0

    def _max(self, values: list[bool]) -> list[int]:
        """Over the processes."""
        return self._reduction.max(torch.tensor(values, dtype=torch.int64, device=self.device)).tolist()

    def _law(self, batches: list[MicroBatch]) -> LossLaw:
        args = self.trainer.args
        return LossLaw(
            self.trainer.model,
            self._compute,
            batches,
            labels_are_shifted=self.labels_are_shifted,
            device=self.device,
            is_half=(self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest")
            or (args.bf16 and self.is_sharded),
        )

    def _learn(self, law: LossLaw) -> None:
        if self._process_scale > 1:  # by the Trainer's own loss, but perhaps not by one that overrides it
            self._process_scale = 1
            ratio = law.compare(self._compute_alone)
            self._process_scale = _process_scale(self.trainer) if ratio is None or abs(ratio - 1) > 0.1 else 1
        law.check(makes_same_calls=self.uses_collectives)
        self._is_divided = law.is_divided
        reshard(self.trainer.model)  # which ran forward only

    def _compute(self, piece: DomainSlice, num_items: int) -> Tensor:
        trainer = self.trainer
        count = torch.tensor(num_items, device=self.device)
        inputs = {name: value for name, value in piece.inputs.items() if name != EXAMPLE_LENGTHS}
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
        return loss / self._process_scale

    def _compute_alone(self, piece: DomainSlice, num_items: int) -> Tensor:
        """As [`_compute`], where the Trainer is told not to scale a loss for the mean over the processes."""
        args = self.trainer.args
        averages, args.average_tokens_across_devices = args.average_tokens_across_devices, False
        try:
            return self._compute(piece, num_items)
        finally:
            args.average_tokens_across_devices = averages


def are_labels_shifted(model: Any) -> bool:
    """Whether the model's loss predicts each label from the position before, by its class."""
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_type = getattr(model, "loss_type", None)
    if loss_type is not None:
        return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    return any(cls.__name__ in _CAUSAL_MODELS for cls in type(model).__mro__)


def _process_scale(trainer: Trainer) -> int:
    """What the Trainer multiplies a divided loss with, so that a mean over processes comes out as a sum."""
    takes_items = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    return trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices and takes_items else 1
