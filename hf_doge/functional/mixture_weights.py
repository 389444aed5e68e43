"""Maximum-likelihood weights of a mixture whose components are known, by expectation-maximisation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixtureFit:
    """
    What [`fit_mixture_weights`] found.

    Attributes:
        weights (`torch.Tensor` of shape `(num_components,)` and dtype float64): At least 0, summing to 1.
        log_likelihood (`float`): Mean log-likelihood of an observation under the mixture, in nats.
        gap (`float`): No other weights have a mean log-likelihood higher by more than this, in nats.
        num_iterations (`int`): Steps of expectation-maximisation that were taken.
    """

    weights: Tensor
    log_likelihood: float
    gap: float
    num_iterations: int


def fit_mixture_weights(
    likelihoods: Tensor, counts: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 10_000
) -> MixtureFit:
    """
    Find the weights `a` of known components that maximise `sum_n c_n log sum_j a_j p_j(x_n)`.

    Expectation-maximisation from equal weights: `a_j <- a_j * mean_n p_j(x_n) / sum_i a_i p_i(x_n)`. The factor is the
    gradient of the mean log-likelihood, which is concave, so its largest entry less 1 bounds what is left to gain; the
    steps end where that is at most `tolerance`.

    Args:
        likelihoods (`torch.Tensor` of shape `(num_observations, num_components)`):
            Probability of each distinct observation under each component, positive under at least one.
        counts (`torch.Tensor` of shape `(num_observations,)`): How often each was observed, at least 0, not all 0.
        tolerance (`float`): Bound of the gap in nats per observation, positive.
        max_iterations (`int`): Most steps, at least 1.
    """
    shares = counts.double() / counts.double().sum()
    likelihoods = likelihoods.double()
    weights = torch.full((likelihoods.shape[1],), 1 / likelihoods.shape[1], dtype=torch.float64)
    for iteration in range(max_iterations + 1):
        mixture = likelihoods @ weights
        gradient = (shares / mixture) @ likelihoods  # (N,) @ (N, K) -> (K,)
        gap = float(gradient.max() - 1)
        if gap <= tolerance or iteration == max_iterations:
            break
        weights = weights * gradient
        weights = weights / weights.sum()
    return MixtureFit(weights, float(shares @ mixture.log()), max(gap, 0.0), iteration)
