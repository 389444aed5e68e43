"""
Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has spread over the processes. What becomes of their parameters and
gradients is in `vectors.py`.

All functions leave other models as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_doge.gradients.vectors import is_spread


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model or some part of it."""
    return bool(_sharded_modules(model))


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


def _sharded_modules(model: nn.Module) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
