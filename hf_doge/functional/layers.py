"""Gradients of linear layers, and random projections that keep their inner products right in the mean."""

import math

import torch
from torch import Tensor


def layer_gradients(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """
    Gradient of the weight of a linear layer, for each example of a batch: `G = sum_t delta_t x_t^T`.

    What is projected before is projected after: with `inputs @ P_in` and `output_grads @ P_out` it is `P_out^T G P_in`, and the
    whole gradient is never in memory. [`LayerUses`] makes all rows of a batch so.

    Args:
        inputs (`torch.Tensor` of shape `(batch_size, num_positions, d_in)`): What the layer read.
        output_grads (`torch.Tensor` of shape `(batch_size, num_positions, d_out)`): Gradient of what it returned.

    Returns:
        `torch.Tensor` of shape `(batch_size, d_out, d_in)`.
    """
    return output_grads.transpose(1, 2) @ inputs  # (B, d_out, T) @ (B, T, d_in)


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
