"""What the scores of a run add up to, in nats, and whether `mu` left the weights room to follow them."""

import numpy as np
import pytest

from hf_doge.artifacts import DomainWeights, Trajectory
from hf_doge.artifacts.cards.weights import gains

NAMES = ("near", "half", "far")
SCORES = np.array([0.02, 0.01, 0.0]) + np.random.default_rng(0).normal(scale=1e-4, size=(20, 3))


def weights_of(scores=SCORES, *, mu=1.0, **recipe):
    """Weights that follow from their scores by the update, from uniform ones."""
    logits = np.nan_to_num(scores).cumsum(axis=0) / mu
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    trajectory = Trajectory(
        NAMES, np.arange(1, len(scores) + 1), np.full(len(scores), 0.5), weights, scores, np.ones_like(scores)
    )
    return DomainWeights(
        dict(zip(NAMES, weights.mean(axis=0).tolist(), strict=True)),
        last=dict(zip(NAMES, weights[-1].tolist(), strict=True)),
        trajectory=trajectory,
        recipe={"name": "doge_plus", "mu": mu, "score_metric": "optimizer", "reweight_steps": 1} | recipe,
    )


def test_a_gain_is_the_sum_of_the_scores_of_all_steps():
    assert gains(weights_of()) == pytest.approx(dict(zip(NAMES, SCORES.sum(axis=0), strict=True)))


def test_a_step_without_a_domain_adds_nothing_to_its_gain_and_a_domain_never_seen_has_none():
    scores = SCORES.copy()
    scores[::2, 1] = np.nan
    scores[:, 2] = np.nan
    assert gains(weights_of(scores)) == pytest.approx({"near": SCORES[:, 0].sum(), "half": SCORES[1::2, 1].sum()})


@pytest.mark.parametrize(
    "recipe",
    [
        {"score_metric": "gradient"},
        {"normalization": "cosine"},
        {"reweight_steps": 5},
        {"arguments": {"trajectory_steps": 2}},
    ],
)
def test_scores_that_are_not_all_or_not_nats_have_no_gains(recipe):
    weights = weights_of(**recipe)
    assert gains(weights) == {}
    assert "  nats" not in weights.summary()


def test_the_summary_tells_gains_and_that_mu_left_them_no_room():
    timid, bold = weights_of(mu=1.0), weights_of(mu=0.1)
    assert [line.split()[-1] for line in timid.summary().splitlines() if line.startswith(NAMES)] == [
        f"{total:.3f}" for total in SCORES.sum(axis=0)
    ]
    told = " ".join(timid.summary().split())
    assert "differ by 0.4, less than mu (1)" in told
    factor = timid.last["near"] / timid.last["far"]  # all that the update made of the scores
    assert f"a factor above {factor:.1f}:" in told
    assert "With `mu` at a quarter of that, 0.1, the weights follow the scores." in told
    assert "less than mu" in timid._repr_html_()
    assert "less than mu" not in bold.summary() + bold._repr_html_()


@pytest.mark.parametrize("every", [1, 2])
def test_whatever_the_scores_are_the_summary_tells_that_mu_left_the_weights_no_room(every):
    """As the paper's mu leaves them none at the learning rates of a fine-tuning."""
    timid = weights_of(name="paper", score_metric="gradient", arguments={"trajectory_steps": every})
    told = " ".join(timid.summary().split())
    moved = 0.5 * every * np.ptp(SCORES.sum(axis=0))
    assert f"The sums of the scores times the learning rate differ by {moved:.2g}, less than mu (1)" in told
    assert f"factor above {np.exp(moved):.1f}:" in told
    assert "less than mu" not in weights_of(mu=0.05, score_metric="gradient").summary()


def test_a_mu_that_followed_the_scores_is_not_advised_another():
    assert "less than mu" not in weights_of(min_spread=6.0).summary()


def test_a_run_that_tells_no_domains_apart_is_not_advised_a_smaller_mu():
    alike = np.random.default_rng(0).normal(loc=0.01, scale=0.01, size=(20, 3))
    assert "less than mu" not in weights_of(alike).summary()
