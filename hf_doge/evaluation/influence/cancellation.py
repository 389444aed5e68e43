"""The paper's cancellation ratio of the first and the last layer of a classifier, on the same examples."""

import torch
from torch import Tensor, nn

from hf_doge.evaluation.influence.scorers.base import Batches
from hf_doge.evaluation.influence.scorers.last_layer import last_layer_factors
from hf_doge.functional.tracin_we import cancellation_ratio
from hf_doge.gradients.embedding import EmbeddingGradientRecorder


def cancellation_ratios(model: nn.Module, batches: Batches, *, last_layer: str | None = None) -> dict[str, float]:
    """
    `sum_i ||g_i|| / ||sum_i g_i||` of the embedding, of the last layer's weight and of its bias, in one pass.

    Compare layers on the same examples only: the ratio grows with their number and falls with sparsity, and it has no
    bound where training has converged. So numerator and denominator come along.

    Args:
        model (`nn.Module`): A classifier.
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Padded batches with `labels`.
        last_layer (`str`, *optional*): See [`last_layer_factors`].

    Returns:
        `dict[str, float]`: `embedding`, `last_weight`, `last_bias`, and for each `..._sum_of_norms`, `..._norm_of_sum`.
    """
    factors = last_layer_factors(model, batches, last_layer=last_layer)
    weight_grads = factors.deltas[:, :, None] * factors.inputs[:, None, :]  # (N, C, D)
    norms, net = _embedding_norms(model, batches)
    ratios = {"embedding": float(norms.sum() / net.norm())}
    ratios["embedding_sum_of_norms"], ratios["embedding_norm_of_sum"] = float(norms.sum()), float(net.norm())
    for name, grads in (("last_weight", weight_grads), ("last_bias", factors.deltas)):
        ratios[name] = float(cancellation_ratio(grads))
        ratios[f"{name}_sum_of_norms"] = float(grads.flatten(1).norm(dim=1).sum())
        ratios[f"{name}_norm_of_sum"] = float(grads.sum(dim=0).norm())
    return ratios


def _embedding_norms(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Norm of each example's embedding gradient, `(N,)`, and their sum `(V, D)`: never all of them in memory."""
    norms = []
    net = torch.zeros(())
    with EmbeddingGradientRecorder(model) as recorder:
        for batch in batches:
            rows = recorder.record(batch)
            squares = rows.rows.double().square().sum(dim=1)
            norms += [part.sum().sqrt() for part in squares.split(rows.offsets.diff().tolist())]
            zeros = recorder.matrix.new_zeros(recorder.matrix.shape, dtype=squares.dtype)
            net = net + zeros.detach().index_add_(0, rows.tokens, rows.rows.double())
    return squares.new_tensor(norms), net
