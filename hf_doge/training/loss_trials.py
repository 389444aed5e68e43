"""A model that is tried out: left as it was to the bit, its outputs made louder, the targets of its loss noted."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_doge.gradients.embedding_uses import full_precision
from hf_doge.gradients.fused_head import output_layer
from hf_doge.gradients.sharding import is_sharded
from hf_doge.gradients.vectors import is_spread

IGNORED = -100
_NOTED = ("_metrics", "_total_train_tokens")


class Targets(TorchFunctionMode):
    """Notes the targets of every cross-entropy, and among how many classes they are."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor, int]] = []
        self.special: list[int] = []  # classes that a loss treats otherwise
        self.ignores_another = False  # than -100

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            logits, target = (
                args[at] if len(args) > at else kwargs[name] for at, name in enumerate(("input", "target"))
            )
            weight: Any
            ignored: Any
            weight, ignored = (
                args[at] if len(args) > at else kwargs.get(name, default)
                for at, name, default in ((2, "weight", None), (4, "ignore_index", IGNORED))
            )
            if weight is not None:
                self.special += (weight != weight.median()).nonzero().flatten().tolist()
            if ignored != IGNORED:
                self.ignores_another = True
                self.special.append(ignored)
            if not target.is_floating_point():
                self._found.append((_counted(target), logits.shape[min(1, logits.dim() - 1)]))
        return func(*args, **kwargs)

    def num_classes(self, labels: Any) -> int:
        """Among how many classes these labels are, 0 if that was not seen."""
        return max((num for target, num in self._found if _is_part(target, labels)), default=0)

    def are(self, value: Any) -> bool:
        """Whether an input of the model is what was asked for."""
        return self.num_classes(value) > 0


def _counted(labels: Tensor) -> Tensor:
    return labels[labels != IGNORED].reshape(-1).cpu()


def _is_part(target: Tensor, labels: Any) -> bool:
    """Whether the targets are labels of a batch, and not what a loss made of them."""
    if not is_integer(labels, 1) or len(target) == 0:
        return False
    labels = _counted(labels)
    values, counts = target.unique(return_counts=True)
    return all((labels == value).sum() >= count for value, count in zip(values, counts, strict=True))


def is_integer(value: Any, least_dims: int) -> bool:
    return (
        torch.is_tensor(value) and value.dim() >= least_dims and not (value.is_floating_point() or value.is_complex())
    )


def has_first_label(inputs: Mapping[str, Any]) -> Tensor:
    """Of which examples a label of the first position counts, unless the loss leaves it out: bool of shape `(B,)` or empty."""
    labels: Any = inputs.get("labels")
    if "shift_labels" in inputs or not is_integer(labels, 2):
        return torch.zeros(0, dtype=torch.bool)
    return labels[:, 0].ne(IGNORED).reshape(len(labels), -1).any(dim=1).cpu()


def other_labels(labels: Any, *, can_tell: bool) -> list[dict[str, Tensor]]:
    """
    Inputs with other first labels, and with other last ones, along each axis but that of examples; as many that change nothing
    where these labels cannot tell, so that all processes make the same calls.
    """
    axes = range(1, labels.dim()) if is_integer(labels, 2) else range(1, 2)
    return [_other_label(labels, at, axis=axis) if can_tell else {} for axis in axes for at in (0, -1)]


def _other_label(labels: Tensor, at: int, *, axis: int) -> dict[str, Tensor]:
    """
    An input for labels of shape `(B, ...)` with another of their classes at the first place of each row along an axis (`at=0`),
    or at the last that has a label (`at=-1`); ignored ones stay.
    """
    along = labels.movedim(axis, -1)
    rows = along.reshape(-1, along.shape[-1]).clone()
    numbers = torch.arange(len(rows), device=rows.device)
    places = torch.zeros_like(numbers)
    if at == -1:
        places = rows.shape[1] - 1 - rows.ne(IGNORED).flip(1).int().argmax(dim=1)
    classes = rows[rows != IGNORED].unique()
    old = rows[numbers, places]
    if len(classes) > 1:
        others = classes[(torch.searchsorted(classes, old) + 1) % len(classes)]
    else:  # of which the loss knows one more than this, in all likelihood
        others = (old - 1).abs()
    rows[numbers, places] = torch.where(old == IGNORED, old, others)
    return {"labels": rows.reshape(along.shape).movedim(-1, axis).contiguous()}


def judge_shift(changes: Sequence[float], labels: Tensor) -> bool | None:
    """
    Whether the labels of the first position are left out, by what other labels changed; `None` if that is not known.

    Args:
        changes (sequence of `float`): Of the loss, in multiples of its noise, by other first labels along each axis of the labels
            but that of examples, and by other last ones.
        labels (`torch.Tensor` of shape `(B, T, ...)`): As they were.

    Raises:
        `ValueError`: The first labels along an axis after the second are left out, which is not that of positions then.
    """
    found: list[bool | None] = []
    for first, last in zip(changes[::2], changes[1::2], strict=True):
        is_known = isfinite(first) and isfinite(last) and last >= 100
        found.append((True if first <= 1 else False if first > 100 else None) if is_known else None)
    for axis in range(2, labels.dim()):
        if found[axis - 1] and labels.select(axis, 0).ne(IGNORED).any():
            raise ValueError(
                f"`labels` must have their positions on axis 1, `(batch, positions, ...)`, but in these of shape {tuple(labels.shape)}"
                f" the loss leaves out the first along axis {axis}, as if that were of positions. Let the data collator return"
                f" `labels.movedim({axis}, 1)` and the model move them back, or return labels that are shifted already as"
                " `shift_labels`."
            )
    return found[0]


@contextmanager
def unnoticed(trainer: Any) -> Iterator[None]:
    """What trl's trainers note of every loss stays as it was."""
    kept = {name: deepcopy(getattr(trainer, name)) for name in _NOTED if hasattr(trainer, name)}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


def can_be_cast(model: nn.Module) -> bool:
    """Whether the model can run in float32, or does: not if that were much larger than what training takes anyway."""
    kernel = str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")
    halves = [parameter for parameter in model.parameters() if _is_half(parameter)]
    trained = sum(parameter.numel() for parameter in halves if parameter.requires_grad)
    if getattr(model, "is_quantized", False):
        return False
    fits = 2 * trained >= sum(parameter.numel() for parameter in halves) and not is_sharded(model)
    return not halves or ("flash" not in kernel and fits)


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _device_state(device: torch.device) -> Tensor:
    return torch.empty(0) if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def random_states(device: torch.device) -> tuple:
    numpy_state: Any = np.random.get_state()
    states = torch.random.get_rng_state(), _device_state(device)
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], *(state.numpy().tobytes() for state in states)


@contextmanager
def louder(model: nn.Module, factor: float) -> Iterator[None]:
    """
    The outputs of a model larger by a power of two, which can be taken back to the bit: one that has learned nothing has
    the same loss for all labels, of which every function is additive.
    """
    weight = None if factor == 1 else _output_weight(model)
    if weight is None or is_spread(weight) or not weight.is_floating_point():
        yield
        return
    weight.data.mul_(factor)
    try:
        yield
    finally:
        weight.data.div_(factor)


def _output_weight(model: nn.Module) -> Tensor | None:
    """That of the output layer, or the last matrix of a model that tells of none."""
    layer: Any = output_layer(model)
    if hasattr(layer, "weight"):
        return layer.weight
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2 and not is_spread(parameter)]
    return matrices[-1] if matrices else None


@contextmanager
def undisturbed(model: nn.Module, device: torch.device, *, casts: bool) -> Iterator[None]:
    """The model in float32 where it is in half precision and `casts`; afterwards as it was, to the bit."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    checkpointed: list[Any] = [
        module for module in modules if getattr(module, "gradient_checkpointing", False) is True
    ]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    tensors = chain(model.parameters(), (buffer for _, _, buffer, _ in buffers))
    halves = [(tensor, tensor.data) for tensor in tensors if casts and _is_half(tensor)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        try:
            for module in checkpointed:
                module.gradient_checkpointing = False  # which without gradients does nothing but warn
            for tensor, data in halves:
                tensor.data = data.float()
            with full_precision(model) if casts else nullcontext():
                yield
        finally:
            for tensor, data in halves:
                tensor.data = data
            for module, name, buffer, value in buffers:
                buffer.data.copy_(value)
                setattr(module, name, buffer)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for module in checkpointed:
                module.gradient_checkpointing = True
            random.setstate(python_state)
            np.random.set_state(numpy_state)
