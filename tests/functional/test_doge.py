"""The weight update against the golden facts of the paper's formulas and of the authors' code."""

import math

import pytest
import torch

from hf_doge.functional import (
    clamp_scores,
    clip_scale,
    generalization_scores,
    normalize_scores,
    update_domain_weights,
    update_running_mean,
)

GRADS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


def official_update(train_grads, target_grad, *, mu, smoothing=0.0, max_norm=None, learning_rate=5e-4):
    """The authors' recipe, put together from our functions."""
    if max_norm is not None:
        train_grads = train_grads * clip_scale(train_grads.norm(dim=1), max_norm)[:, None]
        target_grad = target_grad * clip_scale(target_grad.norm(), max_norm)
    scores = generalization_scores(train_grads, target_grad[None])
    scores = normalize_scores(scores, train_grads.norm(dim=1), target_grad.norm(), normalization="mean_norm")
    scores = clamp_scores(scores, score_min=0.0, score_max=5.0)
    weights = update_domain_weights(UNIFORM, scores, learning_rate=learning_rate, mu=mu, smoothing=smoothing)
    return weights, weights @ train_grads


def assert_weights(weights, expected, atol):
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def test_universal_update_has_the_papers_values():
    scores = generalization_scores(GRADS, GRADS)
    assert scores.tolist() == [0, 6, 3]
    assert_weights(update_domain_weights(UNIFORM, scores, learning_rate=0.1, mu=0.5), [0.1628, 0.5405, 0.2967], 5e-5)


def test_universal_update_without_self_term_has_the_papers_values():
    scores = generalization_scores(GRADS, GRADS) - GRADS.square().sum(dim=1)
    assert scores.tolist() == [-1, 2, 1]
    assert_weights(update_domain_weights(UNIFORM, scores, learning_rate=0.1, mu=0.5), [0.2318, 0.4224, 0.3458], 5e-5)


def test_out_of_domain_update_has_the_papers_values():
    scores = generalization_scores(GRADS, torch.tensor([[0.0, 1.0]]).double())
    assert scores.tolist() == [0, 2, 1]
    assert_weights(update_domain_weights(UNIFORM, scores, learning_rate=0.1, mu=0.5), [0.2693, 0.4018, 0.3289], 5e-5)


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ([0, 1], {"mu": 0.01}, [0.32207263, 0.34472236, 0.33320507]),
        ([0, 1], {"mu": 0.05}, [0.33107051, 0.33560130, 0.33332822]),
        ([0, 1], {"mu": 0.01, "smoothing": 0.1}, [0.32319868, 0.34358343, 0.33321789]),
        ([0, -1], {"mu": 0.01}, [1 / 3, 1 / 3, 1 / 3]),
        ([0, 100], {"mu": 0.01}, [0.28026509, 0.35986748, 0.35986748]),
        ([0, 100], {"mu": 0.01, "max_norm": 1.0}, [0.32391194, 0.34051925, 0.33556882]),
        ([0, 3], {"mu": 0.01}, [0.29998681, 0.36783159, 0.33218163]),
    ],
)
def test_official_update_equals_the_authors_function(target, options, expected):
    weights, _ = official_update(GRADS, torch.tensor(target, dtype=torch.float64), **options)
    assert_weights(weights, expected, 1e-7)


def test_the_new_weights_step_the_model():
    _, gradient = official_update(GRADS, torch.tensor([0.0, 1.0], dtype=torch.float64), mu=0.01)
    assert_weights(gradient, [-0.01113245, 1.02264977], 1e-7)
    _, gradient = official_update(GRADS, torch.tensor([0.0, 100.0], dtype=torch.float64), mu=0.01, max_norm=1.0)
    assert_weights(gradient, [0.08662881, 0.57780194], 1e-6)


def test_official_update_ignores_a_common_scale_of_the_train_gradients():
    target = torch.tensor([0.0, 1.0], dtype=torch.float64)
    once, _ = official_update(GRADS, target, mu=0.01)
    scaled, _ = official_update(1000 * GRADS, target, mu=0.01)
    torch.testing.assert_close(once, scaled, atol=1e-6, rtol=0)  # up to the 1e-6 in the denominator


def test_a_constant_score_gives_the_closed_form_over_a_schedule_and_its_mean():
    scores = torch.tensor([0.0, 6.0, 3.0], dtype=torch.float64)
    weights, mean = UNIFORM, UNIFORM
    for step, learning_rate in enumerate((0.1, 0.05, 0.02)):
        weights = update_domain_weights(weights, scores, learning_rate=learning_rate, mu=0.5)
        mean = update_running_mean(mean, weights, step)
    torch.testing.assert_close(weights, torch.softmax(scores * 0.17 / 0.5, dim=0), atol=1e-14, rtol=0)
    assert_weights(weights, [0.08723108, 0.67086015, 0.24190877], 1e-8)
    assert_weights(mean, [0.11839967, 0.6158615, 0.26573883], 1e-8)  # alpha_0 is not in it


def test_adding_a_constant_to_all_scores_changes_nothing():
    scores = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    once = update_domain_weights(UNIFORM, scores, learning_rate=0.1, mu=0.5)
    shifted = update_domain_weights(UNIFORM, scores + 7, learning_rate=0.1, mu=0.5)
    torch.testing.assert_close(once, shifted, atol=1e-14, rtol=0)


def test_scaling_scores_and_mu_together_changes_nothing():
    scores = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    once = update_domain_weights(UNIFORM, scores, learning_rate=0.1, mu=0.5)
    scaled = update_domain_weights(UNIFORM, 3 * scores, learning_rate=0.1, mu=1.5)
    torch.testing.assert_close(once, scaled, atol=1e-14, rtol=0)


def test_permuting_the_domains_permutes_the_weights():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, generator=generator, dtype=torch.float64)
    weights = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), dim=0)
    order = torch.randperm(5, generator=generator)
    permuted = update_domain_weights(weights[order], scores[order], learning_rate=1.0, mu=1.0)
    direct = update_domain_weights(weights, scores, learning_rate=1.0, mu=1.0)
    torch.testing.assert_close(permuted, direct[order], atol=1e-15, rtol=0)


def test_a_learning_rate_of_zero_leaves_the_weights():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    scores = torch.tensor([9.0, -9.0, 0.0], dtype=torch.float64)
    updated = update_domain_weights(weights, scores, learning_rate=0.0, mu=0.01)
    torch.testing.assert_close(updated, weights, atol=1e-15, rtol=0)


def test_identical_domains_stay_uniform():
    grads = torch.ones(4, 3).double()
    weights = torch.full((4,), 0.25).double()
    for _ in range(100):
        weights = update_domain_weights(weights, generalization_scores(grads, grads), learning_rate=0.1, mu=0.01)
    torch.testing.assert_close(weights, torch.full((4,), 0.25).double(), atol=1e-12, rtol=0)


def test_a_target_that_copies_a_source_takes_all_the_weight():
    grads = torch.eye(3).double()
    weights = UNIFORM
    for _ in range(200):
        weights = update_domain_weights(weights, generalization_scores(grads, grads[1:2]), learning_rate=0.1, mu=0.5)
    assert weights[1] > 0.999


def test_an_absent_domain_keeps_its_share_and_its_stale_score_is_not_read():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    scores = torch.tensor([math.nan, 2.0, -1.0], dtype=torch.float64)
    present = torch.tensor([False, True, True])
    updated = update_domain_weights(weights, scores, learning_rate=0.1, mu=0.1, smoothing=0.3, present=present)
    assert updated[0] == weights[0]
    assert updated[1] > weights[1]
    assert float(updated.sum()) == pytest.approx(1, abs=1e-15)


def test_no_present_domain_changes_nothing():
    updated = update_domain_weights(
        UNIFORM, torch.full((3,), math.nan), learning_rate=1.0, mu=1.0, present=torch.zeros(3, dtype=torch.bool)
    )
    assert torch.equal(updated, UNIFORM)


def test_weights_stay_on_the_simplex_under_huge_scores():
    scores = torch.tensor([1e6, -1e6, 0.0]).double()
    weights = update_domain_weights(UNIFORM, scores, learning_rate=1.0, mu=1e-6)
    assert torch.isfinite(weights).all()
    assert weights.tolist() == [1, 0, 0]


def test_a_weight_of_zero_stays_zero_unless_smoothed():
    weights = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    scores = torch.tensor([100.0, 0.0, 0.0], dtype=torch.float64)
    assert update_domain_weights(weights, scores, learning_rate=1.0, mu=1.0)[0] == 0
    assert update_domain_weights(weights, scores, learning_rate=1.0, mu=1.0, smoothing=0.3)[0] == pytest.approx(0.1)


def test_smoothing_bounds_every_weight_from_below():
    scores = torch.tensor([100.0, 0.0, 0.0], dtype=torch.float64)
    weights = update_domain_weights(UNIFORM, scores, learning_rate=1.0, mu=1.0, smoothing=0.06)
    assert weights.min() >= 0.02 - 1e-15


def test_target_weights_weigh_the_targets():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    scores = generalization_scores(GRADS, targets, torch.tensor([2.0, 0.5], dtype=torch.float64))
    assert scores.tolist() == [2, 1, -1.5]


def test_cosine_scores_ignore_the_length_of_every_gradient():
    target = torch.tensor([[0.0, 3.0]]).double()
    scale = torch.tensor([5.0, 0.1, 2.0], dtype=torch.float64)[:, None]

    def cosine(grads):
        scores = generalization_scores(grads, target)
        return normalize_scores(scores, grads.norm(dim=1), target.norm(), normalization="cosine")

    torch.testing.assert_close(cosine(GRADS), torch.tensor([0.0, 1.0, 0.5**0.5]).double())
    torch.testing.assert_close(cosine(scale * GRADS), cosine(GRADS))


def test_a_zero_gradient_has_cosine_zero():
    scores = normalize_scores(torch.zeros(2), torch.tensor([0.0, 1.0]), torch.tensor(1.0), normalization="cosine")
    assert scores.tolist() == [0, 0]


def test_clip_scale_equals_clip_grad_norm():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for row in (GRADS * 3).float():
        parameter.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        torch.testing.assert_close(row * clip_scale(row.norm(), 1.0), parameter.grad)


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match=r"`normalization` must be one of .*'mean_norm'.* but got 'l2'"):
        normalize_scores(UNIFORM, UNIFORM, UNIFORM[0], normalization="l2")


def test_mu_of_zero_is_refused():
    with pytest.raises(ValueError, match="`mu` must be positive, but got 0"):
        update_domain_weights(UNIFORM, UNIFORM, learning_rate=0.1, mu=0)
