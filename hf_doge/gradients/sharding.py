"""
Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has spread over the processes: parameters are `DTensor`s, of which
every process holds a part, and so are their gradients, which are sums over the processes as soon as a backward is over.

All functions leave other models and tensors as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model or some part of it."""
    return bool(_sharded_modules(model))


def is_spread(tensor: Tensor) -> bool:
    """Whether a parameter or gradient is spread over the processes."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient, in the same memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def as_part_of(parameter: Tensor, part: Tensor) -> Tensor:
    """The gradient of a parameter, of which this process holds `part`; the other way round of [`own_part`]."""
    if not is_spread(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def num_own_elements(parameter: Tensor) -> int:
    """Most elements of a parameter that a process holds: the same number on all of them, also where parts are unequal."""
    if not is_spread(parameter):
        return parameter.numel()
    shape = list(parameter.shape)
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        if placement.is_shard():
            shape[placement.dim] = ceil(shape[placement.dim] / size)
    return prod(shape)


def is_counted_here(parameter: Tensor) -> bool:
    """
    Whether this process' part of a parameter goes into sums over all processes: of parts that several hold alike
    (`dp_replicate`), the first one's does.
    """
    if not is_spread(parameter):
        return True
    places = zip(parameter.device_mesh.get_coordinate(), parameter.placements, strict=True)
    return all(place == 0 for place, placement in places if placement.is_replicate())


def reshard(model: nn.Module) -> None:
    """
    Let the parameters of a sharded model be the parts again: after a forward without a backward some of them are still
    whole, and others than those that the optimizer knows.
    """
    for module in _sharded_modules(model):
        module.reshard()


def sum_every_backward(model: nn.Module) -> None:
    """Sum the gradients over the processes at the end of each backward, also inside of `accelerator.no_sync`."""
    for module in _sharded_modules(model):
        module.set_requires_gradient_sync(True, recurse=False)


@contextmanager
def without_gradient(model: nn.Module) -> Iterator[None]:
    """
    Let a backward through a sharded model add 0 to the gradients, whatever model and loss made of the inputs: 0 times what
    is not a number would not be 0.
    """

    def cut(module: nn.Module, _inputs: Any) -> None:
        for parameter in module.parameters():  # whole at the moment, as far as they are the module's own to gather
            if parameter.requires_grad and not is_spread(parameter):
                handles.append(parameter.register_hook(torch.zeros_like))

    handles = [module.register_forward_pre_hook(cut) for module in _sharded_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sharded_modules(model: nn.Module) -> list[nn.Module]:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
