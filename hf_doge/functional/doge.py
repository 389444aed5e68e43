"""
Domain reweighting with generalization estimation (DoGE), https://huggingface.co/papers/2310.15393.

Shapes: K = training domains, M = target domains, P = flattened parameters.

One step of the paper's Algorithm 1 (universal) and 2 (out-of-domain) is three of these functions in a row:

    scores  = generalization_scores(train_grads, target_grads)              # W_j = <g_j, sum_m G_m>
    weights = update_domain_weights(weights, scores, learning_rate=lr, mu=mu)
    mean    = update_running_mean(mean, weights, num_updates)

The authors' code also clips each domain's gradient, divides the scores by the mean gradient norm and clips them; those
are `clip_scale`, `normalize_scores` and `clamp_scores`, each an option of its own here.

`mu` means three different things in the authors' repositories, so a value cannot be carried from one to another:

1. the paper, and `update_domain_weights` here: the step is `learning_rate * score / mu`, on unnormalised scores;
2. their DoGE code: the same step, on scores divided by the mean train-gradient norm and clipped to [0, 5];
3. their later GRAPE code: the step is `mu * score`, without a learning rate, so a *larger* mu is faster.
"""

import torch
from torch import Tensor

from hf_doge.checks import check_choice, check_count, check_number, check_shape

NORMALIZATIONS = ("none", "mean_norm", "cosine")


def generalization_scores(train_grads: Tensor, target_grads: Tensor, target_weights: Tensor | None = None) -> Tensor:
    """
    Estimate how much a step on each training domain lowers the summed loss of the target domains.

    `W_j = <g_j, sum_m v_m G_m>`, the generalization estimation of the paper, with `v_m = 1` there. In the universal
    setting the targets are the training domains themselves (`target_grads = train_grads`), self term included.

    Args:
        train_grads (`torch.Tensor` of shape `(num_train_domains, num_params)`):
            Gradient of the mean token loss of each training domain.
        target_grads (`torch.Tensor` of shape `(num_target_domains, num_params)`):
            Same, for each target domain.
        target_weights (`torch.Tensor` of shape `(num_target_domains,)`, *optional*):
            How much each target counts. Ours: the paper weighs all targets 1.

    This is the definition; `gradients/` finds the same numbers in one or a few backward passes, with no gradient of a
    domain held whole (the alignments).

    Returns:
        `torch.Tensor` of shape `(num_train_domains,)`: one inner product per training domain.
    """
    check_shape("train_grads", train_grads, (None, None))
    check_shape("target_grads", target_grads, (None, train_grads.shape[1]))
    if target_weights is not None:
        check_shape("target_weights", target_weights, (len(target_grads),))
    if target_weights is None:
        target_grad = target_grads.sum(dim=0)
    else:
        target_grad = target_weights @ target_grads
    return train_grads @ target_grad  # (K, P) @ (P,) -> (K,)


def independent_scores(products: Tensor) -> Tensor:
    """
    Generalization scores in the universal setting, without the noise of a domain's own examples. Ours.

    Each domain's examples of a step are split in two halves with mean gradients `a_j` and `b_j`, and `G_A = sum_j a_j`,
    `G_B = sum_j b_j`. Then `W_j = (<a_j, G_B> + <b_j, G_A>) / 2` compares no example with itself, so that it is unbiased for the
    inner product of the expected gradients, while the paper's self term adds the squared length of the noise in `g_j`.

    Args:
        products (`torch.Tensor` of shape `(num_train_domains, 2, 2)`):
            `<gradient of half h of domain j, sum of the halves i>` at `[j, h, i]`.

    Returns:
        `torch.Tensor` of shape `(num_train_domains,)`.
    """
    check_shape("products", products, (None, 2, 2))
    return (products[:, 0, 1] + products[:, 1, 0]) / 2


def clip_scale(norms: Tensor, max_norm: float) -> Tensor:
    """
    The factor that clips a gradient of each given norm to `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        norms (`torch.Tensor`): Gradient norms, any shape, `>= 0`.
        max_norm (`float`): Largest norm allowed, `> 0`.

    Returns:
        `torch.Tensor` of the shape of `norms`: `min(1, max_norm / (norm + 1e-6))`.
    """
    return (max_norm / (norms + 1e-6)).clamp(max=1.0)


def normalize_scores(scores: Tensor, train_norms: Tensor, target_norm: Tensor, *, normalization: str) -> Tensor:
    """
    Take gradient length out of the scores. Not in the paper, whose scores are the plain inner products (`"none"`).

    Args:
        scores (`torch.Tensor` of shape `(num_train_domains,)`):
            Inner products from [`generalization_scores`].
        train_norms (`torch.Tensor` of shape `(num_train_domains,)`):
            Norm of each training domain's gradient.
        target_norm (`torch.Tensor` of shape `()`):
            Norm of the summed target gradient.
        normalization (`str`):
            `"none"`, `"mean_norm"` (divide by the mean of `train_norms` plus 1e-6, as the authors' code does: the score
            stays linear in the target gradient), or `"cosine"` (divide each score by both norms: values in [-1, 1]).

    Returns:
        `torch.Tensor` of shape `(num_train_domains,)`.
    """
    if normalization == "none":
        return scores
    check_choice("normalization", normalization, NORMALIZATIONS)
    if normalization == "mean_norm":
        return scores / (train_norms.mean() + 1e-6)
    norms = train_norms * target_norm
    return torch.where(norms > 0, scores / norms, torch.zeros_like(scores))  # no direction, no alignment


def clamp_scores(scores: Tensor, *, score_min: float | None = None, score_max: float | None = None) -> Tensor:
    """
    Bound the scores from below and above; `None` leaves that side open. The authors' code uses [0, 5], so that a
    domain whose gradient opposes the target is never lowered by its own score, only not raised. The paper has no bound.
    """
    if score_min is None and score_max is None:
        return scores
    largest = torch.finfo(scores.dtype).max
    score_min, score_max = (
        None if bound is None else float(check_number(name, bound, finite=False))
        for name, bound in (("score_min", score_min), ("score_max", score_max))
    )
    for name, bound in (("score_min", score_min), ("score_max", score_max)):
        if bound is not None and largest < abs(bound) < torch.inf:
            raise ValueError(f"`{name}` must be at most {largest:g} or infinite, but got {bound:g}.")
    if score_min is not None and score_max is not None and score_min > score_max:
        raise ValueError(f"`score_min` must not exceed `score_max`, but got {score_min} > {score_max}.")
    return scores.clamp(min=score_min, max=score_max)


def update_domain_weights(
    weights: Tensor,
    scores: Tensor,
    *,
    learning_rate: float,
    mu: float,
    smoothing: float = 0.0,
    present: Tensor | None = None,
) -> Tensor:
    """
    One mirror-descent step of the domain weights on the simplex.

    `alpha_t = argmin_alpha -eta_t <W, alpha> + mu KL(alpha || alpha_{t-1})`, that is
    `alpha_t,j` proportional to `alpha_{t-1},j * exp(eta_t W_j / mu)` (the paper's update).

    Two departures from the paper, both off by default: `smoothing` mixes the result with the uniform weights, as the
    authors' code can; a domain that is not `present` keeps its share exactly, and the others divide the rest.

    Args:
        weights (`torch.Tensor` of shape `(num_train_domains,)`):
            Current weights, `>= 0`, summing to 1. A weight of 0 stays 0 unless `smoothing` is positive.
        scores (`torch.Tensor` of shape `(num_train_domains,)`):
            Generalization estimation of each domain. Entries of absent domains are not read.
        learning_rate (`float`): The model's own learning rate at this step, `eta_t`, `>= 0`.
        mu (`float`): Bregman coefficient, `> 0`. Smaller means faster weights.
        smoothing (`float`): Share of the uniform weights mixed in, in [0, 1].
        present (`torch.Tensor` of shape `(num_train_domains,)` and dtype bool, *optional*):
            Which domains had a token in this step; all of them when `None`.

    Returns:
        `torch.Tensor` of shape `(num_train_domains,)` and dtype float64, summing to 1.
    """
    learning_rate = check_number("learning_rate", learning_rate, least=0)
    mu = check_number("mu", mu, above=0)
    smoothing = check_number("smoothing", smoothing, least=0, most=1)
    check_shape("scores", scores, tuple(weights.shape))
    weights = weights.double()
    present = torch.ones_like(weights, dtype=torch.bool) if present is None else present.bool()
    if not present.any():
        return weights
    updated = weights.clone()
    mass = weights[present].sum()
    logits = weights[present].log() + learning_rate / mu * scores.double()[present]
    shares = torch.softmax(logits, dim=0) if mass > 0 else torch.zeros_like(logits)
    updated[present] = mass * ((1 - smoothing) * shares + smoothing / len(shares))
    if not updated.isfinite().all():
        raise ValueError(
            f"`scores` times `learning_rate` / `mu` must be finite, but with {learning_rate} / {mu} some are not. Lower the"
            " learning rate or raise `mu`."
        )
    return updated


def shrink_deviations(deviations: Tensor, variances: Tensor) -> Tensor:
    """
    What of the deviations of the weights' logarithms is more than noise, shrunk as James and Stein (1961) do, with twice the
    noise, and domain by domain as in empirical Bayes (Efron & Morris, 1973). Ours.

    `s_j D_j` with `s_j = tau^2 / (tau^2 + 2 V_j)` and `tau^2 = max(0, mean_j (D_j^2 - 2 V_j))`, for a noise of the variance `V_j`;
    of equal noise `s = max(0, 1 - 2 / F)` with `F = mean_j D_j^2 / V`. Nothing is left where F is below 2, as chance alone makes
    it for 8 domains in 19 of 20 runs and for 2 or 3 in 17 of 20; where noise is small beside the deviations, they stay.

    Args:
        deviations (`torch.Tensor` of shape `(num_train_domains,)`): D, around a mean of 0.
        variances (`torch.Tensor` of shape `(num_train_domains,)`): V, `>= 0`. A domain whose variance is 0 is one of which nothing is known: it stays, and does not count for `tau`.

    Returns:
        `torch.Tensor` of shape `(num_train_domains,)`.
    """
    check_shape("deviations", deviations, (None,))
    check_shape("variances", variances, tuple(deviations.shape))
    noise = 2 * variances
    known = noise > 0
    between = (deviations.square() - noise)[known].sum().clamp(min=0) / known.sum().clamp(min=1)
    return torch.where(known, deviations * between / (between + noise), 0.0)


def update_running_mean(mean: Tensor, weights: Tensor, num_updates: int) -> Tensor:
    """
    Arithmetic mean of the weights after one more update; the paper returns the mean of alpha_1 ... alpha_T.

    Args:
        mean (`torch.Tensor` of shape `(num_train_domains,)`): Mean of the updates so far, not read when there was none.
        weights (`torch.Tensor` of shape `(num_train_domains,)`): Weights after the latest update.
        num_updates (`int`): Updates in `mean` so far, `>= 0`; the initial weights alpha_0 do not count.
    """
    if check_count("num_updates", num_updates, least=0) == 0:
        return weights.clone()
    check_shape("mean", mean, tuple(weights.shape))
    return mean + (weights - mean) / (num_updates + 1)
