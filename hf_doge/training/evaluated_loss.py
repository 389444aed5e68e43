"""Losses of an evaluation that are means over the labels that are predicted, with older transformers too."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

from hf_doge.gradients.example_losses import IGNORE_INDEX
from hf_doge.training.domain_loss import are_labels_shifted

if TYPE_CHECKING:
    _Trainer = Trainer  # whose method the mixin overrides, as type checkers must know
else:
    _Trainer = object


class EvaluatedLossMixin(_Trainer):
    """
    Evaluates a causal language model by the mean loss of the labels that it predicts.

    The Trainer of transformers before 5.10 divides by a count that has the first label of each row in it, which no position
    predicts: by a thirty-second part too much in rows of 32 tokens, and by half in rows of two labels.
    """

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """As the Trainer's."""
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.ndim != 2 or not self._counts_first_labels():
            return super().prediction_step(model, inputs, *args, **kwargs)
        counted = labels.clone()
        counted[:, 0] = IGNORE_INDEX
        loss, logits, found = super().prediction_step(model, {**inputs, "labels": counted}, *args, **kwargs)
        if isinstance(found, Tensor):
            found[:, 0] = labels[:, 0]  # for `compute_metrics`
        return loss, logits, found

    def _counts_first_labels(self) -> bool:
        """Whether it is an older Trainer that divides a loss of ours that leaves them out."""
        is_own = type(self).compute_loss is Trainer.compute_loss and self.compute_loss_func is None
        counts = self.model_accepts_loss_kwargs and not hasattr(self, "_loss_shifts_labels")
        return is_own and counts and are_labels_shifted(self.model)
