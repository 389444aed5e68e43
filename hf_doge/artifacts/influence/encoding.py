"""Gradient rows as they are stored: a shared random projection of the width, then float16, float32 or int8."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_doge.text import printable

_LARGEST_EXPONENT = 15  # rows are scaled to have their largest number in [2 ** 14, 2 ** 15); float16 ends at 2 ** 16
_LARGEST_SCALE = 64  # as a power of two; leaves room for sums of scaled products in float32


def projection_matrix(width: int, projected_width: int, seed: int) -> Tensor:
    """
    Random signs over the square root of the projected width: `E[<P x, P y>] = <x, y>`, with a standard deviation of at
    most `|x| |y| sqrt(2 / projected_width)`. Signs, unlike normal numbers, are the same on every machine.

    Returns:
        `torch.Tensor` of shape `(width, projected_width)` and dtype float64.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width, projected_width), generator=generator, dtype=torch.int64)
    return (signs * 2 - 1).double() / math.sqrt(projected_width)


def projection_sha256(matrix: Tensor) -> str:
    """Checksum of the signs."""
    return hashlib.sha256((matrix > 0).numpy().tobytes()).hexdigest()


def recorded_projection(config: Mapping[str, Any]) -> Tensor:
    """
    The projection that config.json tells of.

    Raises:
        ValueError: It cannot be drawn again.
    """
    asked = config["projection"]
    matrix = projection_matrix(config["width"], asked["width"], asked["seed"])
    if projection_sha256(matrix) != asked["sha256"]:
        raise ValueError(
            f"The projection of the index must be drawn again for queries, but torch {torch.__version__} draws another"
            f" than hf_doge {printable(config.get('hf_doge_version'))[:40]} did then. Use the torch it was made with."
        )
    return matrix


def encode_rows(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor | float]:
    """
    Rows of one segment to their stored form; `stored / scale` gives them back.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, stored_width)` and dtype float32): Finite.
        dtype (`str`): `"float32"`, `"float16"` (times a power of two, so that tiny gradients stay) or `"int8"`.

    Returns:
        `tuple`: the stored rows, and their scale: one number, or for int8 a float32 tensor of shape `(num_rows,)`.
    """
    if dtype == "float32":
        return rows, 1.0
    if dtype == "float16":
        largest = _largest(rows)
        exponent = _LARGEST_EXPONENT - math.frexp(largest)[1] if largest > 0 else 0
        scale = math.ldexp(1.0, min(exponent, _LARGEST_SCALE))
        return (rows * scale).half(), scale
    largest = torch.linalg.vector_norm(rows, ord=math.inf, dim=1)
    scales = torch.where(largest > 0, (127 / largest).clamp(max=2.0**_LARGEST_SCALE), 1.0)
    return (rows * scales[:, None]).round_().to(torch.int8), scales


def decode_rows(stored: Tensor, scale: Tensor | float) -> Tensor:
    """What [`encode_rows`] was given, as far as the dtype keeps it, in float32. `scale` may be of shape `(num_rows,)`."""
    return stored.float() / (scale[:, None] if isinstance(scale, Tensor) else scale)


def _largest(rows: Tensor) -> float:
    if rows.numel() == 0:
        return 0.0
    smallest, largest = rows.aminmax()
    return max(float(largest), -float(smallest))
