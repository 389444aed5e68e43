"""
The gradient of a module's own parameters, domain by domain, where no formula for the module is known: one local
vector-Jacobian product of that module alone for each domain.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_doge.gradients.domain_gradients import DomainGradients, Segments


class LocalProduct(torch.autograd.Function):
    """The output of a module as it is; its backward differentiates the module alone, once for each domain."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: "ModuleCall", *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return output.clone()  # a view would forbid the model to change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        ctx.call.differentiate(tensors, grad)
        return grad, None, *(None for _ in tensors)


class ModuleCall:
    """One call of a module whose parameters are differentiated by running it again, domain by domain."""

    def __init__(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: Mapping[str, Any],
        segments: Segments,
        stores: Mapping[str, DomainGradients],
        quietly: Callable[[], AbstractContextManager],
        *,
        dim: int,
    ) -> None:
        """
        `quietly` makes a context in which the module can run without being caught again; examples lie along the dimension `dim`,
        which is 1 in a line, where each token is one.
        """
        self.dim = dim
        self.module, self.segments, self.stores, self._quietly = module, segments, stores, quietly
        self._names = list(kwargs)
        values = [*args, *kwargs.values()]
        self._is_tensor = [torch.is_tensor(value) for value in values]
        # tensors are autograd's to keep
        self._others = [None if torch.is_tensor(value) else value for value in values]
        device_type = next(module.parameters()).device.type
        self._autocast: dict[str, Any] = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }

    def differentiate(self, tensors: tuple[Tensor, ...], grad: Tensor) -> None:
        """Give the gradient of each domain to the stores; `grad` has the shape of the module's output."""
        segments, num_rows = self.segments, grad.shape[self.dim]
        parameters = {name: p.detach().requires_grad_() for name, p in self.module.named_parameters(recurse=False)}
        # what a module counts in its buffers is not to be counted again
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        wanted = [parameters[name] for name in self.stores]
        sums: dict[str, list[Tensor]] = {name: [] for name in self.stores}
        for _, start, stop in segments.bounds(num_rows // segments.num_examples):
            with self._quietly(), torch.enable_grad(), torch.autocast(**self._autocast):
                output = torch.func.functional_call(
                    self.module, {**parameters, **buffers}, *self._arguments(tensors, num_rows, start, stop)
                )
            given = grad.narrow(self.dim, start, stop - start).to(output.dtype)
            found = torch.autograd.grad(output, wanted, given, materialize_grads=True)
            for name, gradient in zip(self.stores, found, strict=True):
                sums[name].append(gradient)
        for name, store in self.stores.items():
            store.add_sums(torch.stack(sums[name]), segments)

    def _arguments(self, tensors: tuple[Tensor, ...], num_rows: int, start: int, stop: int) -> tuple[tuple, dict]:
        """Those of the call, cut to some rows."""
        left = iter(tensors)
        values = []
        for is_tensor, other in zip(self._is_tensor, self._others, strict=True):
            value: Any = next(left).detach() if is_tensor else other
            if is_tensor and value.dim() > self.dim and value.shape[self.dim] == num_rows:
                value = value.narrow(self.dim, start, stop - start)
            values.append(value)
        num_positional = len(values) - len(self._names)
        return tuple(values[:num_positional]), dict(zip(self._names, values[num_positional:], strict=True))
