"""
The gradient of one parameter, domain by domain, as a backward of the mixed batch delivers it.

A layer's weight gradient is a sum over rows (tokens), so the rows of one domain give that domain's gradient. It is held
either *dense*, one gradient per domain, or as the *factors* it is a product of: the layer's inputs and the gradients of its
outputs. Dense takes `K x P` memory and the multiplications that a plain backward makes; factors grow with the tokens and
not with the domains, and cost one product more for each question that is asked of them.

Shapes: K = domains, R = rows of one micro-batch, those of a domain next to each other; a parameter is `(A, B)`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_BLOCK = 2**14  # elements summed in float32 before float64 takes over
_CACHE = 2**19  # elements that stay in a processor's cache between two uses


@dataclass(frozen=True)
class Segments:
    """
    Which examples of a micro-batch belong to which domain; those of a domain lie next to each other.

    Args:
        sizes (`tuple[int, ...]` of length K): Examples of each domain, 0 for none.
    """

    sizes: tuple[int, ...]

    @cached_property
    def num_examples(self) -> int:
        """Examples of the micro-batch, B."""
        return sum(self.sizes)

    @cached_property
    def present(self) -> list[int]:
        """The domains that have an example."""
        return [domain for domain, size in enumerate(self.sizes) if size > 0]

    @cached_property
    def uniform_size(self) -> int | None:
        """Examples per domain if all present ones have the same number."""
        sizes = {size for size in self.sizes if size > 0}
        return sizes.pop() if len(sizes) == 1 else None

    def bounds(self, rows_per_example: int) -> Iterator[tuple[int, int, int]]:
        """Domain, first row and end row of each present domain."""
        start = 0
        for domain in self.present:
            stop = start + self.sizes[domain] * rows_per_example
            yield domain, start, stop
            start = stop

    def row_domains(self, num_rows: int, device: torch.device) -> Tensor:
        """Domain of each row, int64 of shape `(num_rows,)`."""
        sizes = torch.tensor(self.sizes) * (num_rows // self.num_examples)
        return torch.repeat_interleave(torch.arange(len(self.sizes)), sizes).to(device)

    def sums(self, rows: Tensor) -> Tensor:
        """
        Sums of rows by domain.

        Args:
            rows (`torch.Tensor` of shape `(R, ...)`): `R` a multiple of `num_examples`.

        Returns:
            `torch.Tensor` of shape `(len(present), ...)`, in the order of `present`.
        """
        per_example = len(rows) // self.num_examples
        if self.uniform_size is not None:
            return rows.unflatten(0, (len(self.present), self.uniform_size * per_example)).sum(dim=1)
        return torch.stack([rows[start:stop].sum(dim=0) for _, start, stop in self.bounds(per_example)])


@dataclass(frozen=True)
class Product:
    """`left^T @ right` over the rows of one domain is its gradient: `left (R, A)`, `right (R, B)`."""

    left: Tensor
    right: Tensor
    segments: Segments

    def weighted(self, coefficients: Tensor) -> Tensor:
        rows = coefficients.to(self.left.dtype)[self.segments.row_domains(len(self.left), self.left.device)]
        left, right = self.left, self.right
        if left.shape[1] < right.shape[1]:  # the narrower side is scaled
            left = left * rows.unsqueeze(1)
        else:
            right = right * rows.unsqueeze(1)
        return left.t() @ right

    def inner_products(self, gradient: Tensor) -> Tensor:
        gradient = gradient.to(self.left.dtype)
        if self.left.shape[1] < self.right.shape[1]:
            return torch.linalg.vecdot(self.right @ gradient.t(), self.left)
        return torch.linalg.vecdot(self.left @ gradient, self.right)

    def of_domain(self, start: int, stop: int, shape: torch.Size) -> Tensor:
        return self.left[start:stop].t() @ self.right[start:stop]


@dataclass(frozen=True)
class Lookup:
    """Rows of a matrix that were read: `ids (R,)`, and the gradients of what was read, `grads (R, B)`."""

    ids: Tensor
    grads: Tensor
    segments: Segments
    num_rows: int

    def weighted(self, coefficients: Tensor) -> Tensor:
        rows = coefficients.to(self.grads.dtype)[self.segments.row_domains(len(self.ids), self.grads.device)]
        total = self.grads.new_zeros(self.num_rows, self.grads.shape[1])
        return total.index_add_(0, self.ids, self.grads * rows.unsqueeze(1))

    def inner_products(self, gradient: Tensor) -> Tensor:
        return (self.grads * gradient[self.ids].to(self.grads.dtype)).sum(dim=1)

    def of_domain(self, start: int, stop: int, shape: torch.Size) -> Tensor:
        total = self.grads.new_zeros(shape)
        return total.index_add_(0, self.ids[start:stop], self.grads[start:stop])


class DomainGradients:
    """
    One parameter's gradient of every domain, summed over all uses of the parameter and all micro-batches of a step.

    Args:
        shape (`torch.Size`): Of the parameter.
        dtype (`torch.dtype`), device (`torch.device`): Of the parameter.
        num_domains (`int`): K.
        keeps_dense (`bool`): Whether products are multiplied out at once, one matrix per domain.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, *, num_domains: int, keeps_dense: bool
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.num_domains = num_domains
        self.keeps_dense = keeps_dense
        self._memory: Tensor | None = None  # for `_dense`, kept from step to step: fresh memory is slow to come by
        self.clear()

    def clear(self) -> None:
        """Forget the gradients, ready for the next step."""
        self._dense: Tensor | None = None
        self._written = [False] * self.num_domains  # domains whose matrix in `_dense` holds numbers and not garbage
        self._factors: list[Product | Lookup] = []

    @classmethod
    def from_dense(cls, gradients: Mapping[int, Tensor], *, num_domains: int) -> "DomainGradients":
        """Of gradients that are known, by domain; at least one."""
        some = next(iter(gradients.values()))
        store = cls(some.shape, some.dtype, some.device, num_domains=num_domains, keeps_dense=True)
        store._get_dense()
        for domain, gradient in gradients.items():
            store._add_to_domain(domain, gradient)
        return store

    @property
    def is_empty(self) -> bool:
        """Whether the loss does not reach the parameter."""
        return self._dense is None and not self._factors

    def add_product(self, left: Tensor, right: Tensor, segments: Segments) -> None:
        """Add `left^T @ right` by domain: `left (R, A)`, `right (R, B)`."""
        if not self.keeps_dense:
            self._factors.append(Product(left.detach(), right.detach(), segments))
            return
        dense = self._get_dense()
        in_place = left.dtype == dense.dtype
        if in_place and segments.uniform_size and len(segments.present) == self.num_domains and not any(self._written):
            a, b = (side.unflatten(0, (self.num_domains, -1)) for side in (left, right))
            torch.bmm(a.transpose(1, 2), b, out=dense)
            self._written = [True] * self.num_domains
            return
        for domain, start, stop in segments.bounds(len(left) // segments.num_examples):
            a, b = left[start:stop].t(), right[start:stop]
            if not in_place:
                self._add_to_domain(domain, a @ b)
            elif self._written[domain]:
                dense[domain].addmm_(a, b)
            else:
                torch.mm(a, b, out=dense[domain])
                self._written[domain] = True

    def add_lookups(self, ids: Tensor, grads: Tensor, segments: Segments) -> None:
        """Add `grads (R, B)` to the rows `ids (R,)` by domain."""
        if self._dense is None or not self.keeps_dense:
            self._factors.append(Lookup(ids, grads.detach(), segments, self.shape[0]))
            return
        for domain, start, stop in segments.bounds(len(ids) // segments.num_examples):
            self._clear(domain)
            self._dense[domain].index_add_(0, ids[start:stop], grads[start:stop].to(self.dtype))

    def add_rows(self, rows: Tensor, segments: Segments) -> None:
        """Add the sum of `rows (R, *shape)` by domain."""
        self.add_sums(segments.sums(rows), segments)

    def add_sums(self, sums: Tensor, segments: Segments) -> None:
        """Add `sums (len(segments.present), *shape)`, the gradients of the domains present."""
        self._get_dense()
        for domain, gradient in zip(segments.present, sums, strict=True):
            self._add_to_domain(domain, gradient)

    def combine(self, coefficients: Tensor) -> Tensor:
        """
        `sum_j coefficients_j g_j`.

        Args:
            coefficients (`torch.Tensor` of shape `(K,)` or `(C, K)`): Factor of each domain, or several such.

        Returns:
            `torch.Tensor` of the shape (behind `C`, for several) and dtype of the parameter.
        """
        total: Tensor | None = None
        if self._dense is not None:
            dense = self._finished_dense()
            total = coefficients.to(self.device, self.dtype) @ dense.flatten(1)
            total = total.view(*coefficients.shape[:-1], *self.shape)
        for factor in self._factors:
            part = _for_each(factor.weighted, coefficients.to(self.device), num_dims=1).to(self.dtype)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def inner_products(self, gradient: Tensor) -> Tensor:
        """
        `<g_j, gradient>` for each domain, summed in float64 (one flat float32 sum is off by 1e-3).

        Args:
            gradient (`torch.Tensor` of the shape of the parameter, perhaps behind `C`).

        Returns:
            `torch.Tensor` of shape `(K,)` or `(K, C)` and dtype float64.
        """
        lead = gradient.shape[: gradient.dim() - len(self.shape)]
        total = self._zeros(*lead)
        if self._dense is not None:
            flat = gradient.reshape(*lead, -1)
            for block, stop in self._blocks():
                total += (block @ flat[..., stop - block.shape[1] : stop].t()).double()
        for factor in self._factors:
            rows = _for_each(factor.inner_products, gradient, num_dims=len(self.shape)).double()
            total[factor.segments.present] += factor.segments.sums(rows.t())
        return total

    def combine_and_compare(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """`total = combine(coefficients)` and `inner_products(total)`, where possible in one pass over the memory."""
        if self._factors:
            total = self.combine(coefficients)
            return total, self.inner_products(total)
        lead = coefficients.shape[:-1]
        products, total = self._zeros(*lead), torch.empty((*lead, *self.shape), dtype=self.dtype, device=self.device)
        coefficients, flat = coefficients.to(self.device, self.dtype), total.view(*lead, -1)
        for block, stop in self._blocks():
            part = coefficients.to(block.dtype) @ block
            products += (block @ part.t()).double()
            flat[..., stop - block.shape[1] : stop] = part
        return total, products

    def squared_norms(self) -> Tensor:
        """`||g_j||^2` for each domain, `torch.Tensor` of shape `(K,)` and dtype float64."""
        total = self._zeros()
        if not self._factors:
            for block, _ in self._blocks():
                total += torch.linalg.vector_norm(block, dim=1).double().square()
            return total
        for domain in range(self.num_domains):
            gradient = self.of_domain(domain)
            if gradient is not None:
                total[domain] = squared_norm(gradient)
        return total

    def of_domain(self, domain: int) -> Tensor | None:
        """The gradient of one domain, multiplied out; `None` if it has no row."""
        total = None
        if self._dense is not None and self._written[domain]:
            total = self._dense[domain].clone()
        for factor in self._factors:
            rows = factor.left if isinstance(factor, Product) else factor.ids
            for found, start, stop in factor.segments.bounds(len(rows) // factor.segments.num_examples):
                if found == domain:
                    part = factor.of_domain(start, stop, self.shape).to(self.dtype)
                    total = part if total is None else total.add_(part)
        return total

    def _zeros(self, *lead: int) -> Tensor:
        return torch.zeros(self.num_domains, *lead, dtype=torch.float64, device=self.device)

    def _get_dense(self) -> Tensor:
        if self._dense is None:
            if self._memory is None:
                self._memory = torch.empty((self.num_domains, *self.shape), dtype=self.dtype, device=self.device)
            self._dense = self._memory
        return self._dense

    def _finished_dense(self) -> Tensor:
        """With zeros for the domains that never came."""
        for domain in range(self.num_domains):
            self._clear(domain)
        assert self._dense is not None
        return self._dense

    def _clear(self, domain: int) -> None:
        if not self._written[domain]:
            assert self._dense is not None
            self._dense[domain].zero_()
            self._written[domain] = True

    def _add_to_domain(self, domain: int, gradient: Tensor) -> None:
        assert self._dense is not None
        if self._written[domain]:
            self._dense[domain].add_(gradient)
        else:
            self._dense[domain].copy_(gradient)
            self._written[domain] = True

    def _blocks(self) -> Iterator[tuple[Tensor, int]]:
        """The dense gradients `(K, P)` in pieces of columns, wide enough for speed, short enough for float32 sums."""
        flat = self._finished_dense().flatten(1)
        width = max(min(_BLOCK, _CACHE // self.num_domains), 2**8)
        for start in range(0, flat.shape[1], width):
            stop = min(start + width, flat.shape[1])
            block = flat[:, start:stop]
            yield block if block.dtype.itemsize >= 4 else block.float(), stop


def _for_each(function: Callable[[Tensor], Tensor], values: Tensor, *, num_dims: int) -> Tensor:
    """A function of tensors of so many dimensions, of one or of each of several."""
    return function(values) if values.dim() == num_dims else torch.stack([function(value) for value in values])


def squared_norm(gradient: Tensor) -> Tensor:
    """`||gradient||^2` in float64, summed block by block."""
    flat = gradient.flatten()
    flat = flat if flat.dtype.itemsize >= 4 else flat.float()
    return sum(torch.linalg.vector_norm(block).double().square() for block in flat.split(_BLOCK))
