"""
Where a live model uses its embedding matrix.

[`EmbeddingUses`] watches the matrix itself, not one module: T5 and BART read it through several modules that share it,
a tied language model multiplies by it at the end, Gemma and BART scale what they read inside the embedding's own
forward, and LoRA wraps it. What it catches is the bare lookup, before any scale, so the gradient of a lookup, summed
by token, is the gradient of the matrix's rows; no weight has to require a gradient for that.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_doge.gradients.example_losses import IGNORE_INDEX


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
    whole: Any = model
    try:
        weight = whole.get_input_embeddings().weight
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


def has_tied_output(model: nn.Module) -> bool:
    """Whether the model says that its output layer is the embedding matrix."""
    whole: Any = model
    output = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(output, "weight", None) is input_embedding_matrix(model)


def require_seen(model: nn.Module, lookups: Sequence[Lookup], projections: Sequence[Projection], *, tied: str) -> None:
    """
    Raises:
        ValueError: Words have rows, and not all uses of the embedding matrix that count can be seen.
    """
    name, whole = type(model).__name__, cast(Any, model)
    if tied == "output" and not projections:
        raise ValueError(
            f"`tied='output'` needs an output layer that multiplies by the embedding matrix, but `{name}` has none. Use"
            " `tied='input'`."
        )
    if tied != "input" and not projections and has_tied_output(model):
        raise ValueError(
            f"`tied={tied!r}` needs to see the output layer multiply by the embedding matrix, but that of `{name}`, which is tied"
            " to it, does so in a way of its own (not by `F.linear` within a module that holds the matrix). Use `tied='input'`."
        )
    embeddings = whole.get_input_embeddings()
    if not lookups and any(hasattr(module, "trainable_tokens_delta") for module in embeddings.modules()):
        raise ValueError(
            f"The input embeddings must be trained as a whole or not at all, but of those of `{name}` only some tokens are"
            " (`trainable_token_indices` of PEFT), which are kept apart. Train all of them (`modules_to_save` with the name of"
            " the embedding layer), or none, or record layers without words: `layers='adapters'`."
        )


class Uses(AbstractContextManager):
    """What hooks collect while a model runs inside the context; behind it both are gone."""

    def __init__(self) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Forget what was collected, and with it the graph it belongs to."""


class EmbeddingUses(Uses):
    """
    Collects every use of the input embedding matrix while the model runs inside the context.

    Lookups (and projections, when asked for) gather in forward order until [`clear`] is called; under `torch.no_grad`
    nothing does. Works in training as in evaluation; what is read from a frozen matrix is made to require a gradient.

    Args:
        model (`nn.Module`): A model with `get_input_embeddings()`.
        lookups (`bool`): Whether to collect [`Lookup`]s.
        projections (`bool`): Whether to collect [`Projection`]s.

    Attributes:
        differentiable (`bool`): Whether what is looked up next is made to require a gradient.
    """

    def __init__(self, model: nn.Module, *, lookups: bool = True, projections: bool = False) -> None:
        super().__init__()
        self.matrix = input_embedding_matrix(model)
        self.differentiable = True
        self.lookups: list[Lookup] = []
        self.projections: list[Projection] = []
        self._mode = _MatrixMode(self, collect_lookups=lookups, collect_projections=projections)
        self._modules = [
            module
            for module in model.modules()
            if any(parameter is self.matrix for parameter in module.parameters(recurse=False))
        ]

    def __enter__(self) -> "EmbeddingUses":
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._open))
            self._handles.append(module.register_forward_hook(self._close, always_call=True))
        return self

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

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if len(args) < 2 or args[1] is not self.uses.matrix or not torch.is_grad_enabled():
            return result
        if func is F.embedding and self.collect_lookups:
            output = _requiring_grad(result) if self.uses.differentiable else result
            self.uses.lookups.append(Lookup(args[0], output, kwargs.get("padding_idx")))
        elif func is F.linear and self.collect_projections:
            output = _requiring_grad(result)
            self.uses.projections.append(Projection(args[0].detach(), output))
        else:
            return result
        return output.clone()  # the model may write into what it gets, which must not change what we differentiate


def _requiring_grad(result: Tensor) -> Tensor:
    return result if result.requires_grad else result.requires_grad_()


def counted_positions(lookup: Lookup, batch: Mapping[str, Any], *, pad_token_id: int | None = None) -> Tensor:
    """
    Which positions of a lookup are not padding, by the masks of the batch, `padding_idx` and `pad_token_id`; of a decoder
    that predicts its `labels` those up to the last label.

    Args:
        lookup ([`Lookup`]): From a forward with `batch`.
        batch (`Mapping`): What the model was given.
        pad_token_id (`int`, *optional*): See [`EmbeddingGradientRecorder`].

    Returns:
        `torch.Tensor` of the shape of `lookup.token_ids`, dtype bool.
    """
    token_ids = lookup.token_ids
    counted = torch.ones_like(token_ids, dtype=torch.bool)
    for ids_name, mask_name in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        mask = batch.get(mask_name)
        if mask is not None and mask.numel() == token_ids.numel() and _same_ids(batch.get(ids_name), token_ids):
            counted &= mask.reshape(token_ids.shape).bool()
    if lookup.padding_idx is not None:
        counted &= token_ids != lookup.padding_idx
    if pad_token_id is not None:
        padding = token_ids == pad_token_id
        if not _same_ids(batch["input_ids"], token_ids):
            padding[..., 0] = False  # T5 starts its decoder with the padding token
        counted &= ~padding
    needed = _up_to_last_label(token_ids, batch)
    return counted if needed is None else counted & needed


def _up_to_last_label(token_ids: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """
    True at the positions that a decoder also reads of each example alone, where `labels` are not padded: without padding
    it never reads the last label. None if these ids are not those of a decoder with labels.
    """
    labels, given = batch.get("labels"), batch.get("decoder_input_ids")
    if not isinstance(labels, Tensor) or labels.shape != token_ids.shape or labels.is_floating_point():
        return None
    if _same_ids(batch["input_ids"], token_ids):
        return None
    labelled = labels != IGNORE_INDEX
    if given is None:
        differs = token_ids[..., 1:] != labels[..., :-1]  # a decoder reads a label one place after it predicts it
        decoder = not bool((labelled[..., :-1] & differs).any())
    else:
        decoder = _same_ids(given, token_ids)
    return labelled.flip(-1).cumsum(dim=-1).flip(-1) > 0 if decoder else None


def _same_ids(given: Tensor | None, token_ids: Tensor) -> bool:
    """Whether the lookup read these very ids, in any shape."""
    return (
        given is not None and given.numel() == token_ids.numel() and torch.equal(given.flatten(), token_ids.flatten())
    )


def join_by_example(parts: Sequence[Tensor], nothing: Tensor, input_ids: Tensor) -> Tensor:
    """All uses of the matrix in one forward side by side, one line per example; `nothing` where there is none."""
    batch_size, num_feature_axes = len(input_ids), nothing.ndim - 2
    lines = []
    for part in parts:
        positions = part.shape[: part.ndim - num_feature_axes]
        # several choices of one example may be lines of their own; a batch of one owns every position there is
        by_example = len(positions) > 1 and positions[0] in (batch_size, input_ids.shape[:-1].numel())
        if not by_example and batch_size > 1:
            raise ValueError(
                f"The embedding matrix must be used with one line per example, but a batch of {batch_size} used it "
                f"with shape {tuple(positions)}. Models that flatten, transpose or pack a batch cannot be recorded in "
                "batches: use batch size 1."
            )
        lines.append(part.reshape(batch_size, -1, *part.shape[len(positions) :]))
    return torch.cat(lines, dim=1) if lines else nothing


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """The model without the autocast that accelerate puts around its forward: as it computes on its own."""
    original, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is None or wrapped is None:
        yield
        return
    try:
        model.forward = original
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.forward = wrapped


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def same_problem_type(model: nn.Module) -> Iterator[None]:
    """Classifiers of transformers note in their configuration what they make of the first labels: that is training's to do."""
    configs: list[Any] = [
        module.config for module in model.modules() if hasattr(getattr(module, "config", None), "problem_type")
    ]
    kinds = [config.problem_type for config in configs]
    try:
        yield
    finally:
        for config, kind in zip(configs, kinds, strict=True):
            config.problem_type = kind


@contextmanager
def no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    requiring = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in requiring:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in requiring:
            parameter.requires_grad_(True)
