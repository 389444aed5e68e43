"""
Layers that hand over their weight gradient domain by domain: what autograd would add up over the batch is caught one step
before, inside the very same backward.

Inside a module that owns a trainable parameter, each torch function that takes the parameter is replaced by one of the
functions below. It computes the same output, passes the same gradient on to its input, and gives the gradient of the
parameter to a [`DomainGradients`] instead of to autograd. A use that none of them knows is left to `local_product.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_doge.gradients.domain_gradients import DomainGradients, Segments
from hf_doge.gradients.local_product import LocalProduct, ModuleCall


class HiddenBatchError(Exception):
    """A module does not let one tell which example a gradient comes from."""


class _Recipient:
    """Where the parameter gradients of one call go: the store of each parameter, and who is who in the batch."""

    def __init__(self, segments: Segments, rows_per_example: AbstractSet[int], *, in_line: bool) -> None:
        self.segments = segments
        self.in_line = in_line
        self._rows_per_example = rows_per_example

    def shows_batch(self, rows: Tensor) -> bool:
        """Whether a tensor `(B, ..., D)`, or `(B * length, D)`, of a line `(1, B, ..., D)`, holds the examples in their order."""
        num_examples = self.segments.num_examples
        if rows.dim() > 2:
            return rows.shape[:2] == (1, num_examples) if self.in_line else len(rows) == num_examples
        per_example, rest = divmod(len(rows), num_examples)
        return rest == 0 and per_example in self._rows_per_example


class _Linear(torch.autograd.Function):
    """`x @ weight^T + bias`; with `transposed`, `x @ weight + bias` (GPT-2's Conv1D)."""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, recipient, weight_store, bias_store):
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.recipient = transposed, recipient
        ctx.weight_store, ctx.bias_store = weight_store, bias_store
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if transposed:
            return torch.addmm(bias, x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        segments = ctx.recipient.segments
        grad_rows = grad.reshape(-1, grad.shape[-1])
        if ctx.weight_store is not None:
            rows = x.reshape(-1, x.shape[-1])
            left, right = (rows, grad_rows) if ctx.transposed else (grad_rows, rows)
            ctx.weight_store.add_product(left, right, segments)
        if ctx.bias_store is not None:
            ctx.bias_store.add_rows(grad_rows, segments)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(grad.dtype)
            grad_x = grad @ (weight.t() if ctx.transposed else weight)
        return grad_x, None, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """`weight[ids]`; ids without a batch of their own (positions) are read once for every example."""

    @staticmethod
    def forward(ctx, ids, weight, padding_idx, recipient, store):
        output = F.embedding(ids, weight)
        if ids.shape[0] == 1 < recipient.segments.num_examples and not recipient.in_line:
            ids = ids.expand(recipient.segments.num_examples, *ids.shape[1:])
            output = output.expand(recipient.segments.num_examples, *output.shape[1:])
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.recipient, ctx.store = padding_idx, recipient, store
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        rows, flat_ids = grad.reshape(-1, grad.shape[-1]), ids.reshape(-1)
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((flat_ids == ctx.padding_idx).unsqueeze(1), 0)
        ctx.store.add_lookups(flat_ids, rows, ctx.recipient.segments)
        return None, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation over the last dimension."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, recipient, weight_store, bias_store):
        shape = (x.shape[-1],)
        output, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.recipient, ctx.weight_store, ctx.bias_store = recipient, weight_store, bias_store
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, scale = ctx.saved_tensors
        width, segments = x.shape[-1], ctx.recipient.segments
        grad = grad.contiguous()
        if ctx.weight_store is not None:
            normalized = (x - mean) * scale
            ctx.weight_store.add_rows((grad * normalized).reshape(-1, width), segments)
        if ctx.bias_store is not None:
            ctx.bias_store.add_rows(grad.reshape(-1, width), segments)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad, x, (width,), mean, scale, weight, bias, [ctx.needs_input_grad[0], False, False]
        )[0]
        return grad_x, None, None, None, None, None, None


class _Scale(torch.autograd.Function):
    """`weight * x`, as RMSNorm ends with: `weight (D,)`, `x (..., D)`."""

    @staticmethod
    def forward(ctx, x, weight, recipient, store):
        ctx.save_for_backward(x, weight)
        ctx.recipient, ctx.store = recipient, store
        return weight * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        width = x.shape[-1]
        ctx.store.add_rows((grad * x).reshape(-1, width), ctx.recipient.segments)
        grad_x = (grad * weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


class SegmentedBackward(AbstractContextManager):
    """
    While the context is open, backwards through the model leave the gradients of its trainable parameters in `stores`,
    domain by domain, and `.grad` alone.

    Call [`start`] before each forward. Works with non-reentrant gradient checkpointing, whose second forward runs through
    the same modules.

    Args:
        model (`nn.Module`): The model itself, not its DDP wrapper.
        stores (`Mapping[nn.Parameter, DomainGradients]`): Of each trainable parameter.
    """

    def __init__(self, model: nn.Module, stores: Mapping[nn.Parameter, DomainGradients]) -> None:
        self.stores = stores
        self._names = {
            module: name
            for name, module in model.named_modules()
            if any(parameter in stores for parameter in module.parameters(recurse=False))
        }
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._open_calls: list[_OpenCall | None] = []
        self._recipient: _Recipient | None = None
        self._is_running_again = False

    def start(self, segments: Segments, rows_per_example: AbstractSet[int], *, in_line: bool = False) -> None:
        """
        Announce the micro-batch that comes next.

        Args:
            segments ([`Segments`]): Its examples by domain.
            rows_per_example (`set[int]`): How many rows an example may have in a layer: 1, and the lengths of its sequences.
            in_line (`bool`): See [`~hf_doge.gradients.alignment.MixedBatch`].
        """
        self._recipient = _Recipient(segments, rows_per_example, in_line=in_line)

    def __enter__(self) -> "SegmentedBackward":
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._open, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._close, with_kwargs=True, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._recipient = None

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._is_running_again or self._recipient is None or not torch.is_grad_enabled():
            self._open_calls.append(None)
            return
        call = _OpenCall(self.stores, self._recipient, f"the module {self._names[module]!r} ({type(module).__name__})")
        self._open_calls.append(call)
        call.__enter__()

    def _close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = self._open_calls.pop()
        if call is None:
            return None
        call.__exit__(None, None, None)
        if not call.left_over:
            return None
        return self._differentiate_locally(module, args, kwargs, output, call)

    def _differentiate_locally(
        self, module: nn.Module, args: tuple, kwargs: dict, output: Any, call: "_OpenCall"
    ) -> Any:
        own = dict(module.named_parameters(recurse=False))
        if not call.left_over <= set(own.values()):
            raise HiddenBatchError(f"{call.name} uses a parameter of another module")
        if call.left_over & call.caught:
            raise HiddenBatchError(f"{call.name} uses one parameter in several ways")
        if call.is_random:
            raise HiddenBatchError(f"{call.name} draws random numbers beside its parameters")
        if not torch.is_tensor(output) or output.dim() == 0:
            raise HiddenBatchError(f"{call.name} does not return one tensor")
        call.require_batch(output)
        stores = {name: self.stores[parameter] for name, parameter in own.items() if parameter in call.left_over}
        dim = 1 if self._recipient.in_line else 0
        again = ModuleCall(module, args, kwargs, self._recipient.segments, stores, self._quietly, dim=dim)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        return LocalProduct.apply(output, again, *filter(torch.is_tensor, (*args, *kwargs.values())))

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """With our own hooks asleep: a module that runs again is not to be caught again."""
        self._is_running_again = True
        try:
            yield
        finally:
            self._is_running_again = False


class _OpenCall(TorchFunctionMode):
    """Sees each torch function that a module calls, and takes over those on its trainable parameters."""

    def __init__(self, stores: Mapping[nn.Parameter, DomainGradients], recipient: _Recipient, name: str) -> None:
        super().__init__()
        self.stores = stores
        self.recipient = recipient
        self.name = name
        self.caught: set[nn.Parameter] = set()
        self.left_over: set[nn.Parameter] = set()
        self.is_random = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.is_random = self.is_random or _draws_numbers(func, args, kwargs)
        used = {
            value for value in (*args, *kwargs.values()) if isinstance(value, nn.Parameter) and value in self.stores
        }
        # gradients are off inside the functions above, around which another module's call may be open
        if not used or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            output = handler(self, *args, **kwargs)
            if output is not NotImplemented:
                self.caught |= used
                return output
        if isinstance(func, type(Tensor.shape.__get__)) or func in _HARMLESS:
            return func(*args, **kwargs)
        self.left_over |= used
        args = tuple(value.detach() if isinstance(value, nn.Parameter) else value for value in args)
        kwargs = {k: value.detach() if isinstance(value, nn.Parameter) else value for k, value in kwargs.items()}
        return func(*args, **kwargs)

    def store(self, parameter: Tensor | None) -> DomainGradients | None:
        """Of a trainable parameter; `None` for any other tensor."""
        return self.stores.get(parameter) if isinstance(parameter, nn.Parameter) else None

    def require_batch(self, rows: Tensor) -> None:
        """As [`_Recipient.shows_batch`], with the module named."""
        if not self.recipient.shows_batch(rows):
            raise HiddenBatchError(
                f"{self.name} works on a tensor of shape {tuple(rows.shape)}, which does not show the "
                f"{self.recipient.segments.num_examples} examples of the batch one by one"
            )

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if input.dim() < 2 or input in self.stores:
            return NotImplemented
        self.require_batch(input)
        return _Linear.apply(
            _autocast(input), weight, bias, False, self.recipient, self.store(weight), self.store(bias)
        )

    def addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if mat1 in self.stores or input.dim() != 1 or (beta, alpha) != (1, 1):
            return NotImplemented
        self.require_batch(mat1)
        return _Linear.apply(_autocast(mat1), mat2, input, True, self.recipient, self.store(mat2), self.store(input))

    def embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if max_norm is not None or scale_grad_by_freq or input.dim() == 0:
            return NotImplemented
        if padding_idx is not None and padding_idx < 0:
            padding_idx += len(weight)
        if input.shape[0] != 1 or self.recipient.in_line:  # one set of positions serves all examples
            self.require_batch(input.unsqueeze(-1))
        return _Embedding.apply(input, weight, padding_idx, self.recipient, self.store(weight))

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        if tuple(normalized_shape) != (input.shape[-1],):
            return NotImplemented
        if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            input = input.float()  # as autocast does there
        self.require_batch(input)
        return _LayerNorm.apply(input, weight, bias, eps, self.recipient, self.store(weight), self.store(bias))

    def mul(self, input: Any, other: Any) -> Tensor:
        weight, x = (input, other) if isinstance(input, nn.Parameter) else (other, input)
        if isinstance(x, nn.Parameter) or not torch.is_tensor(x) or weight.dim() != 1 or x.dim() < 2:
            return NotImplemented
        if x.shape[-1] != len(weight):
            return NotImplemented
        self.require_batch(x)
        return _Scale.apply(x, weight, self.recipient, self.store(weight))


def _autocast(x: Tensor) -> Tensor:
    """In the dtype that a matrix product takes under the autocast in force; autograd sees the cast."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _draws_numbers(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    if func is F.scaled_dot_product_attention:
        return kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0
    if func in _RANDOM_IN_TRAINING:
        return kwargs["training"] and kwargs.get("p", 1.0) > 0
    return func in _RANDOM


_HANDLERS = {
    F.linear: _OpenCall.linear,
    torch.addmm: _OpenCall.addmm,
    F.embedding: _OpenCall.embedding,
    F.layer_norm: _OpenCall.layer_norm,
    torch.mul: _OpenCall.mul,
    Tensor.mul: _OpenCall.mul,
    Tensor.__mul__: _OpenCall.mul,
    Tensor.__rmul__: _OpenCall.mul,
}
_RANDOM = {
    F.gumbel_softmax,
    *(
        getattr(torch, name)
        for name in (
            "bernoulli", "dropout", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like",
            "randn", "randn_like", "randperm", "rrelu",
        )
    ),
    *(
        getattr(Tensor, name)
        for name in (
            "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_",
            "random_", "uniform_",
        )
    ),
}  # fmt: skip
_RANDOM_IN_TRAINING = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.rrelu,
}
_HARMLESS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, torch.is_floating_point}
