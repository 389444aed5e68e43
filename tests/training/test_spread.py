"""A `mu` that follows the nats of the run: towards a target, the weights of a short fine-tuning move as far as those of a long one."""

import numpy as np
import pytest
import torch

from hf_doge import DomainWeights
from hf_doge.training.config import DoGEConfig
from hf_doge.training.score_noise import ScoreNoise
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_llama
from tests.tiny import three_domains
from tests.training.test_shrinkage import weights_by_definition
from tests.training.test_undecided import OPTIONS, uniform

SHORT = {**OPTIONS, "stop_when_undecided": False, "max_steps": 14, "learning_rate": 1e-4}


def learn(folder, *, resume=None, **options):
    args = DoGEConfig(str(folder), **{**SHORT, **options})
    target = three_domains(12)["code"]
    trainer = DoGETrainer(tiny_llama(), args, train_dataset=three_domains(16), target_dataset=target)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def mus_by_definition(scores, mu, min_spread):
    """Those of each step, from all scores so far."""
    found = []
    for number in range(1, len(scores) + 1):
        largest = np.abs(np.nansum(scores[:number], axis=0)).max()
        found.append(min(mu, largest / (number / len(scores)) / min_spread))
    return np.array(found)


def spread_by_definition(scores, mus):
    initial = np.ones(scores.shape[1]) / scores.shape[1]
    return np.array([weights_by_definition(scores[: n + 1], mu, initial)[-1] for n, mu in enumerate(mus)])


def run_of(scores, *, min_spread, rate=1.0):
    """The weights after each update of scores that are given."""
    noise, found = ScoreNoise(uniform(scores.shape[1]), window=100, shrinks=True, min_spread=min_spread), []
    for number, one in enumerate(torch.as_tensor(scores), start=1):
        noise.take(one, rate, progress=number / len(scores))
        found.append(noise.shrink(uniform(scores.shape[1])))
    return torch.stack(found).numpy()


def short_scores(num_steps=40):
    """Of a kin, a half-kin and two that do nothing, in nats, with the noise of a step."""
    draw = np.random.default_rng(0)
    return np.array([0.01, 0.005, 0.0, 0.0]) + draw.normal(scale=0.003, size=(num_steps, 4))


def test_weights_follow_the_definition_and_a_resumed_run_its_twin(tmp_path):
    weights = learn(tmp_path).domain_weights
    trajectory, recipe = weights.trajectory, weights.recipe
    assert (recipe["mu"], recipe["min_spread"]) == (1.0, 6.0)
    np.testing.assert_allclose(trajectory.mus, mus_by_definition(trajectory.scores, 1.0, 6.0), rtol=1e-9)
    assert trajectory.mus.max() < 0.5  # the run is short
    expected = spread_by_definition(trajectory.scores, trajectory.mus)
    np.testing.assert_allclose(trajectory.weights, expected, rtol=1e-9)
    np.testing.assert_allclose(list(weights.mean.values()), expected.mean(axis=0), rtol=1e-9)
    resumed = learn(tmp_path, resume=str(tmp_path / "checkpoint-7"))
    assert resumed.domain_weights.mean == weights.mean
    assert resumed.domain_weights.trajectory == trajectory
    assert resumed.state.log_history[-2]["domain_mu"] == trajectory.mus[-1]


def test_a_run_of_many_nats_is_to_the_bit_what_it_is_at_a_fixed_mu(tmp_path):
    fixed = learn(tmp_path / "fixed", mu=1e-7).domain_weights
    spread = learn(tmp_path / "spread", mu=1e-7, min_spread=6.0).domain_weights
    assert "min_spread" not in fixed.recipe
    assert spread.mean == fixed.mean
    np.testing.assert_array_equal(spread.trajectory.weights, fixed.trajectory.weights)
    np.testing.assert_array_equal(spread.trajectory.mus, 1e-7)


def test_the_scale_of_the_scores_changes_nothing_while_they_are_small():
    scores = short_scores()
    found = run_of(scores, min_spread=6.0)
    for scale in (1e-6, 0.1, 2.0):  # at 2 the largest adds up to .8
        np.testing.assert_allclose(run_of(scores * scale, min_spread=6.0), found, rtol=1e-9)
    timid = run_of(scores, min_spread=0.0)
    assert timid[-1].max() / timid[-1].min() < 1.7


def test_the_largest_ends_so_far_above_one_that_does_nothing_and_twins_stay_together():
    scores = short_scores() * np.array([1.0, 1.0, 1e-4, 1e-4])
    last = run_of(scores, min_spread=5.0)[-1]
    assert np.log(last[0] / last[2]) == pytest.approx(5.0, rel=0.1)  # less what shrinkage takes
    alike = 0.01 + np.random.default_rng(1).normal(scale=1e-5, size=(40, 4))
    np.testing.assert_allclose(run_of(alike, min_spread=6.0)[-1], 0.25, atol=2e-3)


def test_noise_alone_moves_the_weights_no_farther_than_it_does_at_a_mu_of_its_size():
    """Over many runs: the deviation that shrinkage leaves is a small part of what it leaves of a signal."""
    draw, farthest = np.random.default_rng(0), []
    for _ in range(60):
        last = run_of(draw.normal(scale=0.003, size=(100, 8)), min_spread=6.0)[-1]
        farthest.append(np.abs(np.log(8 * last)).max())
    assert np.median(farthest) < 1e-9
    assert np.mean(np.array(farthest) > 1.0) < 0.15


def test_scores_that_are_all_zero_leave_the_weights_alone():
    np.testing.assert_array_equal(run_of(np.zeros((5, 3)), min_spread=6.0), 1 / 3)


def test_only_the_default_towards_a_target_follows_the_nats(tmp_path):
    def spread(has_target=True, **options):
        return DoGEConfig(str(tmp_path), **options).get_recipe(has_target=has_target).min_spread

    assert spread() == spread(recipe="doge_plus") == 6.0
    assert spread(has_target=False) == spread(recipe="paper") == spread(recipe="official") == 0.0
    assert spread(recipe="doge_plus", mu=1.0) == spread(shrinkage=False) == spread(min_spread=0) == 0.0
    assert spread(recipe="doge_plus", mu=1.0, min_spread=3) == spread(has_target=False, min_spread=3) == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_spread": 6.0, "shrinkage": False}, "`shrinkage` must be True, but it is False"),
        ({"min_spread": 6.0, "recipe": "paper"}, r"`min_spread` \(6\) would spread the weights by noise too"),
        ({"min_spread": 6.0, "mu": 2.0}, r"False in the recipe 'paper'. .* give `recipe='doge_plus'`"),
        ({"min_spread": -1.0}, "`min_spread` must be"),
        ({"min_spread": float("nan")}, "`min_spread` must be"),
        ({"min_spread": True}, "`min_spread` must be"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DoGEConfig(str(tmp_path), **options)


@pytest.mark.parametrize(("max_steps", "reweight_steps"), [(20, 10), (14, 4)])
def test_the_last_update_divides_by_the_mu_of_the_whole_run_however_seldom_weights_are_updated(
    tmp_path, max_steps, reweight_steps
):
    options = {"save_strategy": "no", "max_steps": max_steps, "reweight_steps": reweight_steps}
    trajectory = learn(tmp_path, **options).domain_weights.trajectory
    np.testing.assert_allclose(trajectory.mus, mus_by_definition(trajectory.scores, 1.0, 6.0), rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"recipe": "paper"}])
def test_a_step_outside_of_a_training_is_the_whole_of_a_run(tmp_path, options):
    trainer = DoGETrainer(
        tiny_llama(),
        DoGEConfig(str(tmp_path), **{**SHORT, **options}),
        train_dataset=three_domains(16),
        target_dataset=three_domains(12)["code"],
    )
    trainer.create_optimizer_and_scheduler(1)
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert len(trainer.domain_weights.trajectory.steps) == 1


def test_a_domain_that_starts_without_weight_does_not_say_how_far_the_others_go():
    scores, initial = short_scores() * np.array([100.0, 1.0, 1e-4, 1e-4]), torch.tensor([0.0, 0.4, 0.3, 0.3])
    noise = ScoreNoise(initial, window=100, shrinks=True, min_spread=5.0)
    for number, one in enumerate(torch.as_tensor(scores), start=1):
        noise.take(one, 1.0, progress=number / len(scores))
    assert noise.boost == pytest.approx(5.0 / np.abs(scores[:, 1:].sum(axis=0)).max())
    assert noise.shrink(initial)[0] == 0


def test_a_run_of_another_length_is_another_run_where_mu_follows_its_nats(tmp_path):
    learn(tmp_path)  # at a constant rate
    with pytest.raises(ValueError, match=r"has {'max_steps': 14} and this run {'max_steps': 20}.*max_steps=14"):
        learn(tmp_path, resume=str(tmp_path / "checkpoint-7"), max_steps=20)
    learn(tmp_path / "fixed", mu=1e-7)
    longer = learn(tmp_path / "fixed", resume=str(tmp_path / "fixed" / "checkpoint-7"), mu=1e-7, max_steps=20)
    assert longer.state.global_step == 20


def test_the_logged_mu_is_the_one_in_force_also_where_few_updates_are_recorded(tmp_path):
    often = learn(tmp_path, save_strategy="no").domain_weights.trajectory
    seldom = learn(tmp_path, save_strategy="no", trajectory_steps=5)
    assert [log["domain_mu"] for log in seldom.state.log_history if "loss" in log] == often.mus.tolist()


def test_a_checkpoint_of_before_is_refused_with_the_arguments_that_resume_it(tmp_path):
    whole = learn(tmp_path, recipe="doge_plus", mu=1.0)  # what the default was
    with pytest.raises(ValueError, match=r"min_spread=0\.0"):
        learn(tmp_path, resume=str(tmp_path / "checkpoint-7"))
    resumed = learn(tmp_path, resume=str(tmp_path / "checkpoint-7"), recipe="doge_plus", min_spread=0.0)
    assert resumed.domain_weights.mean == whole.domain_weights.mean


def test_the_mu_of_each_step_is_in_the_artifact_and_the_summary_names_the_last(tmp_path):
    weights = learn(tmp_path, save_strategy="no").domain_weights
    weights.save_pretrained(tmp_path / "weights")
    loaded = DomainWeights.from_pretrained(tmp_path / "weights")
    assert loaded == weights
    np.testing.assert_array_equal(loaded.trajectory.mus, weights.trajectory.mus)
    assert f", mu {weights.trajectory.mus[-1]:.2g} in the end" in loaded.summary()
    assert "less than mu" not in loaded.summary()
