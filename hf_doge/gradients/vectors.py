"""
A gradient as a list of tensors, one for each trainable parameter: read off the parameters, summed over the processes,
compared, and put back.

The parameters of a model that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded are `DTensor`s: every process holds a part.
So are their gradients, which are sums over the processes as soon as a backward is over.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BUCKET = 2**23  # elements that travel together

# One entry per trainable parameter, `None` where the loss does not reach it; of a sharded parameter, this process' part.
Gradient = list[Tensor | None]


class Reduction:
    """
    Sums over all processes, the same on each of them; with one process everything stays as it is.

    Every process must make the same calls with tensors of the same shapes and dtypes.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        is_group = dist.is_available() and dist.is_initialized()
        self.num_processes = dist.get_world_size() if is_group else 1
        self.process_index = dist.get_rank() if is_group else 0
        self.device = device  # where the backend wants small tensors to be

    @property
    def is_needed(self) -> bool:
        """Whether there is more than one process."""
        return self.num_processes > 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, several of them in one message."""
        if not self.is_needed:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            full = sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET
            if bucket and (full or tensor.dtype != bucket[0].dtype or tensor.device != bucket[0].device):
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            self._sum_bucket(bucket)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over the processes."""
        if self.is_needed:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of each entry of a small tensor over the processes."""
        if self.is_needed:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def _sum_bucket(self, tensors: list[Tensor]) -> None:
        if len(tensors) == 1 and tensors[0].is_contiguous():
            dist.all_reduce(tensors[0])
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


class Vectors:
    """
    The trainable parameters of a model, and what can be done with a gradient of them.

    Args:
        named_parameters (`Sequence[tuple[str, nn.Parameter]]`): The trainable parameters with their names, each once.
        scored_names (`set[str]`, *optional*): Parameters whose gradients are compared; all when `None`.
    """

    def __init__(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], scored_names: set[str] | None = None
    ) -> None:
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        self.device = self.parameters[0].device
        self.scored = [scored_names is None or name in scored_names for name in self.names]
        self.is_sharded = any(map(is_spread, self.parameters))
        self.reduction = Reduction()
        self._is_counted = [is_counted_here(parameter) for parameter in self.parameters]

    def take(self) -> Gradient:
        """Move the gradients off the parameters."""
        gradient = [None if parameter.grad is None else own_part(parameter.grad) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradient

    def put(self, gradient: Gradient) -> None:
        """Into `.grad` of the parameters."""
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = None if part is None else as_part_of(parameter, part)

    def sum_over_processes(self, gradient: Gradient) -> None:
        """In place; a parameter that some process reaches is one that all have a gradient of."""
        if self.is_sharded or not self.reduction.is_needed:
            return
        own = torch.tensor([part is not None for part in gradient], device=self.device)
        reached = self.reduction.sum(own.int())
        for position, is_reached in enumerate(reached.tolist()):
            if is_reached and gradient[position] is None:
                gradient[position] = torch.zeros_like(self.parameters[position])
        self.reduction.sum_([part for part in gradient if part is not None])

    def sum_numbers(self, numbers: Tensor) -> Tensor:
        """Sum a few numbers over the processes; they come and go on the CPU."""
        if not self.reduction.is_needed:
            return numbers
        return self.reduction.sum(numbers.to(self.device)).cpu()

    def are_finite(self) -> bool:
        """Whether the gradients on the parameters are finite on all processes."""
        norms = []
        for parameter in self.parameters:
            if parameter.grad is not None:
                dtype = torch.float32 if parameter.grad.dtype.itemsize < 4 else None
                norm = torch.linalg.vector_norm(own_part(parameter.grad), dtype=dtype)
                norms.append(norm.to(self.device).float())
        is_broken = bool(norms) and not torch.stack(norms).isfinite().all()
        return float(self.sum_numbers(torch.tensor(float(is_broken)))) == 0

    def inner_product(self, left: Gradient, right: Gradient, *, scored_only: bool = True) -> Tensor:
        """
        Inner product over the parameters, summed in float64: one flat float32 sum is off by 1e-3. Of sharded parameters,
        what the parts of this process add to it.
        """
        dtype = torch.float64 if self.device.type != "mps" else torch.float32  # MPS has no float64
        total = torch.zeros((), dtype=dtype, device=self.device)
        for a, b, scored, counted in zip(left, right, self.scored, self._is_counted, strict=True):
            if a is not None and b is not None and counted and (scored or not scored_only):
                total += (a.float() * b.float() if a.dtype.itemsize < 4 else a * b).sum(dtype=dtype).to(self.device)
        return total.cpu().double()

    def zeros(self) -> Gradient:
        """Nothing yet, for [`add`]."""
        return [None] * len(self.parameters)

    def add(self, total: Gradient, gradient: Gradient, *, scale: float) -> None:
        """`total += scale * gradient`; a scale of 0 adds nothing, not even NaN."""
        if scale == 0.0:
            return
        for position, part in enumerate(gradient):
            if part is None:
                continue
            own = total[position]
            if own is None:
                total[position] = part * scale
            else:
                own.add_(part, alpha=scale)


def is_spread(tensor: Tensor) -> "TypeGuard[DTensor]":
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
    placements: Sequence[Any] = parameter.placements
    for size, placement in zip(parameter.device_mesh.shape, placements, strict=True):
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
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None  # this process is in the mesh that holds its part
    places = zip(coordinate, parameter.placements, strict=True)
    return all(place == 0 for place, placement in places if placement.is_replicate())
