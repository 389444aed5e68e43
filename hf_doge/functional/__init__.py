"""
The formulas of both papers as pure functions of tensors.

Where the package computes the same for all examples at once, the function here is the definition; the tests hold the two
equal (`tests/functional/test_definitions.py`).
"""

from hf_doge.functional.doge import (
    clamp_scores,
    clip_scale,
    generalization_scores,
    independent_scores,
    normalize_scores,
    shrink_deviations,
    update_domain_weights,
    update_running_mean,
)
from hf_doge.functional.layers import (
    layer_gradients,
    projection_matrix,
)
from hf_doge.functional.mixture_weights import (
    fit_mixture_weights,
)
from hf_doge.functional.synonyms import (
    synonym_neighbours,
    synonym_score,
    synonym_scores,
    synonym_similarity,
)
from hf_doge.functional.tracin_we import (
    batch_token_gradient_rows,
    batch_top_k_rows,
    cancellation_ratio,
    cosine_scores,
    last_layer_score,
    scale_by_second_moment,
    self_influence,
    sum_checkpoints,
    tied_score,
    token_gradient_rows,
    top_k_rows,
    tracin_we_score,
    tracin_we_token_scores,
)

__all__ = [
    "batch_token_gradient_rows",
    "batch_top_k_rows",
    "cancellation_ratio",
    "clamp_scores",
    "clip_scale",
    "cosine_scores",
    "fit_mixture_weights",
    "generalization_scores",
    "independent_scores",
    "last_layer_score",
    "layer_gradients",
    "normalize_scores",
    "projection_matrix",
    "scale_by_second_moment",
    "self_influence",
    "shrink_deviations",
    "sum_checkpoints",
    "synonym_neighbours",
    "synonym_score",
    "synonym_scores",
    "synonym_similarity",
    "tied_score",
    "token_gradient_rows",
    "top_k_rows",
    "tracin_we_score",
    "tracin_we_token_scores",
    "update_domain_weights",
    "update_running_mean",
]
