"""
Where a live model uses its embedding matrix.

[`EmbeddingUses`] watches the matrix itself, not one module: T5 and BART read it through several modules that share it,
a tied language model multiplies by it at the end, Gemma and BART scale what they read inside the embedding's own
forward, and LoRA wraps it. What it catches is the bare lookup, before any scale, so the gradient of a lookup, summed
by token, is the gradient of the matrix's rows; no weight has to require a gradient for that.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class Lookup:
    """
    Rows read from the embedding matrix in one forward.

    Attributes:
        token_ids (`torch.Tensor` of shape `(...)`): The tokens that were looked up.
        output (`torch.Tensor` of shape `(..., width)`): Their rows; requires a gradient and is part of the graph.
        padding_idx (`int`, *optional*): The token whose row autograd never trains, as `nn.Embedding` has it.
    """

    token_ids: Tensor
    output: Tensor
    padding_idx: int | None


@dataclass
class Projection:
    """
    A product with the transposed embedding matrix, in a model whose output layer is tied to it.

    Attributes:
        inputs (`torch.Tensor` of shape `(..., width)`): What was multiplied, detached.
        output (`torch.Tensor` of shape `(..., vocabulary_size)`): The logits; require a gradient.
    """

    inputs: Tensor
    output: Tensor


def input_embedding_matrix(model: nn.Module) -> Tensor:
    """
    The matrix that `model.get_input_embeddings()` reads, of shape `(vocabulary_size, width)`.

    Raises:
        ValueError: if the model has no such method, or what it returns has no matrix.
    """
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"The model must have input embeddings, but `{type(model).__name__}.get_input_embeddings()` gives none. "
            "TracIn-WE traces through the embedding of token ids: use a model that reads them."
        ) from error
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(
            f"The input embeddings must hold one matrix, but those of `{type(model).__name__}` hold "
            f"{tuple(weight.shape) if isinstance(weight, Tensor) else weight!r}. Use a model that reads token ids."
        )
    return weight


class EmbeddingUses(AbstractContextManager):
    """
    Collects every use of the input embedding matrix while the model runs inside the context.

    Lookups (and projections, when asked for) gather in forward order until [`clear`] is called; under `torch.no_grad`
    nothing does. Works in training as in evaluation; what is read from a frozen matrix is made to require a gradient.

    Args:
        model (`nn.Module`): A model with `get_input_embeddings()`.
        lookups (`bool`): Whether to collect [`Lookup`]s.
        projections (`bool`): Whether to collect [`Projection`]s.
    """

    def __init__(self, model: nn.Module, *, lookups: bool = True, projections: bool = False) -> None:
        self.matrix = input_embedding_matrix(model)
        self.lookups: list[Lookup] = []
        self.projections: list[Projection] = []
        self._mode = _MatrixMode(self, collect_lookups=lookups, collect_projections=projections)
        self._modules = [
            module
            for module in model.modules()
            if any(parameter is self.matrix for parameter in module.parameters(recurse=False))
        ]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "EmbeddingUses":
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._open))
            self._handles.append(module.register_forward_hook(self._close, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.clear()

    def clear(self) -> None:
        """Forget what was collected, and with it the graph it belongs to."""
        self.lookups.clear()
        self.projections.clear()

    def _open(self, module: nn.Module, args: tuple) -> None:
        self._mode.__enter__()  # the mode is on only inside the modules that hold the matrix: nothing else slows down

    def _close(self, module: nn.Module, args: tuple, output: object) -> None:
        self._mode.__exit__(None, None, None)


class _MatrixMode(TorchFunctionMode):
    """Sees each call of a torch function; picks those on the matrix."""

    def __init__(self, uses: EmbeddingUses, *, collect_lookups: bool, collect_projections: bool) -> None:
        self.uses = uses
        self.collect_lookups = collect_lookups
        self.collect_projections = collect_projections

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if len(args) < 2 or args[1] is not self.uses.matrix or not torch.is_grad_enabled():
            return result
        if func is F.embedding and self.collect_lookups:
            output = _requiring_grad(result)
            self.uses.lookups.append(Lookup(args[0], output, kwargs.get("padding_idx")))
        elif func is F.linear and self.collect_projections:
            output = _requiring_grad(result)
            self.uses.projections.append(Projection(args[0].detach(), output))
        else:
            return result
        return output.clone()  # the model may write into what it gets, which must not change what we differentiate


def _requiring_grad(result: Tensor) -> Tensor:
    return result if result.requires_grad else result.requires_grad_()
