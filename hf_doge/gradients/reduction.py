"""Adding up over the processes of a group."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 2**23  # elements that travel together


class Reduction:
    """
    Sums over all processes, the same on each of them; with one process everything stays as it is.

    Every process must make the same calls with tensors of the same shapes and dtypes.
    """

    def __init__(self) -> None:
        self.num_processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

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
