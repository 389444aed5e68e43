"""The loss of every label of a training step, seen in the one forward that the step makes."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.gradients.example_losses import IGNORE_INDEX
from hf_doge.gradients.fused_head import output_layer
from hf_doge.gradients.token_losses import TokenLosses, UnsplittableLossError

# Shapes: B = examples of a micro-batch, R = rows (labels, ignored ones too), of one example next to each other.


@dataclass
class SeenLosses:
    """
    What was seen of one micro-batch, on its device and detached.

    Attributes:
        losses (`torch.Tensor` of shape `(R,)`, *optional*): Cross-entropy of each row, 0 where a label is ignored.
        counted (`torch.Tensor` of shape `(R,)`, bool, *optional*): Which rows have a label that counts.
        problem (`str`, *optional*): Why `losses`, or both, could not be seen.
    """

    losses: Tensor | None = None
    counted: Tensor | None = None
    problem: str | None = None


class LossWatch:
    """
    Looks on while a model computes its loss, and calls nothing by itself: no second forward, no second loss.

    Seen are a plain cross-entropy of torch, which is where the losses of transformers end (it is then computed label by
    label and added up as before, so that the gradients stay what they are to the bit), and log-probabilities of labels
    that the model returns, as trl's SFTTrainer (1.0 and newer) asks of its fused head. To cost little, it looks at calls
    of torch only from the model's output layer on, where the model names one.

    Args:
        model (`torch.nn.Module`): Without the wrappers of DDP and the like.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._mode: TokenLosses | None = None
        self._is_compiled = False
        self._open = ExitStack()

    @contextmanager
    def during(self, model: nn.Module) -> Iterator[None]:
        """
        Look on inside the context; [`seen`] tells of it.

        Args:
            model (`torch.nn.Module`): The same model as it is called, in its wrappers.
        """
        self.begin(model)
        handle = model.register_forward_hook(self.end_of_forward)
        try:
            yield
        finally:
            handle.remove()
            self.end()

    def begin(self, model: nn.Module) -> None:
        """Look on from here; [`end_of_forward`] must then be a forward hook of `model`."""
        self._mode, self._open = TokenLosses(), ExitStack()
        self._is_compiled = is_compiled(model)
        if self._is_compiled:
            return
        head = output_layer(self._model)
        if head is None:
            self._open.enter_context(self._mode)
        else:
            self._open.callback(head.register_forward_hook(self._from_here_on).remove)

    def end(self) -> None:
        """Look on no longer."""
        self._open.close()

    def _from_here_on(self, head: nn.Module, *_: Any) -> None:
        if not (head.training and torch.is_grad_enabled()):
            return  # a forward of someone who compares something first, inside whose own modes this one must not begin
        stack, self._open = self._open, ExitStack()
        stack.close()  # the hook, which has done its work
        assert self._mode is not None
        self._open.enter_context(self._mode)

    def end_of_forward(self, model: nn.Module, args: Any, outputs: Any) -> None:
        """Look at what the model returned; where its loss was in it, there is no more to see."""
        if self._mode is not None:
            self._mode.read(outputs)
            if self._mode.num_caught:
                self._open.close()

    def seen(self, inputs: Mapping[str, Any], *, labels_are_shifted: bool) -> SeenLosses:
        """
        What was seen since the last [`begin`]; then it is forgotten.

        Args:
            inputs (`Mapping`): The micro-batch, for its labels where no loss was seen.
            labels_are_shifted (`bool`): Whether the loss predicts each label from the position before.
        """
        mode, self._mode = self._mode, None
        labels = inputs.get("shift_labels", inputs.get("labels"))
        counted = None
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            if labels_are_shifted and "shift_labels" not in inputs and labels.dim() > 1:
                labels = labels[:, 1:]
            counted = labels.ne(IGNORE_INDEX).flatten()
        assert mode is not None
        try:
            return SeenLosses(mode.by_row.detach(), mode.counted)
        except UnsplittableLossError as error:
            problem = "the model is compiled, and what happens inside is not seen" if self._is_compiled else str(error)
            return SeenLosses(None, counted, problem)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs the model, below whatever wraps it: then nothing of torch is called that could be seen."""
    while True:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            return True
        inner = getattr(model, "module", None)  # of DDP
        if not isinstance(inner, nn.Module):
            return False
        model = inner
