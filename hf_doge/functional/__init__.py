"""The formulas of both papers as pure functions of tensors."""

from hf_doge.functional.doge import (
    clamp_scores,
    clip_scale,
    generalization_scores,
    normalize_scores,
    update_domain_weights,
    update_running_mean,
)

__all__ = [
    "clamp_scores",
    "clip_scale",
    "generalization_scores",
    "normalize_scores",
    "update_domain_weights",
    "update_running_mean",
]
