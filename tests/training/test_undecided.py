"""Learning that ends when scores no longer tell the domains apart, and the mean of the weights by the noise that reached them."""

import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_doge import DomainWeights
from hf_doge.training.config import DoGEConfig
from hf_doge.training.learning_state import STATE_FILE
from hf_doge.training.score_noise import ScoreNoise
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_llama
from tests.tiny import language_model_rows, three_domains

OPTIONS = {
    "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "report_to": "none",
    "save_strategy": "steps", "save_steps": 7, "use_cpu": True, "disable_tqdm": True, "recipe": "doge_plus",
    "stop_when_undecided": True, "undecided_window": 6, "max_steps": 60, "logging_steps": 1,
}  # fmt: skip


def uniform(num_domains):
    return torch.full((num_domains,), 1 / num_domains)


def twins():
    rows = [Dataset.from_dict(language_model_rows(64, low=1, high=31, seed=seed)) for seed in range(2)]
    return dict(zip(("twin", "other twin"), rows, strict=True))


def learn(folder, domains, *, resume=None, model=None, **options):
    args = DoGEConfig(str(folder), **{**OPTIONS, **options})
    trainer = DoGETrainer(model or tiny_llama(), args, train_dataset=domains)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def statistic(scores):
    """F of one window by its definition; the first change of a later window is from the window before."""
    centred = scores - np.nanmean(scores, axis=1, keepdims=True)
    noise = np.sqrt(np.nanmean(np.diff(centred, axis=0) ** 2, axis=0) / 2)
    counts = np.isfinite(centred[-6:]).sum(axis=0)
    return np.mean((np.nanmean(centred[-6:], axis=0) / (noise / counts**0.5)) ** 2)


def feed(noise, scores, rate=1.0):
    for one in torch.as_tensor(scores):
        noise.take(one, rate)
    return noise


@pytest.mark.parametrize("absent", [False, True])
def test_a_window_is_told_by_how_many_standard_errors_the_scores_are_apart(absent):
    scores = np.random.default_rng(0).normal(size=(12, 4)) + np.array([0.0, 0.1, 0.2, 0.5])
    scores[2, 1] = np.nan if absent else scores[2, 1]
    noise = ScoreNoise(uniform(4), window=6)
    assert feed(noise, scores[:6]).statistic == pytest.approx(statistic(scores[:6]))
    assert feed(noise, scores[6:]).statistic == pytest.approx(statistic(scores[5:]))


def test_of_domains_alike_the_statistic_is_one_on_average_and_a_signal_adds_its_square():
    draw = np.random.default_rng(2)
    for snr in (0.0, 0.2):
        signal = snr * np.array([1, -1, 1, -1, 1, -1])
        found = [
            feed(ScoreNoise(uniform(6), window=100), draw.normal(size=(100, 6)) + signal).statistic for _ in range(80)
        ]
        assert np.mean(found) == pytest.approx((1 + 100 * snr**2 * 6 / 5) * 1.0, rel=0.15)


def windows(*signals, window=20):
    """Scores of two domains over some windows each; the same draws, whose own statistic is below 2."""
    draw = np.random.default_rng(1).normal(size=(window, 2))
    draw -= draw.mean(axis=0)
    return [draw + np.array([[signal, 0.0]]) for signal in signals]


@pytest.mark.parametrize(
    ("signals", "has_settled"),
    [
        ([0, 0], True),
        ([0], False),
        ([0, 5, 0], False),
        ([0, 5, 0, 0], True),
        ([5, 5, 5, 5], False),
        ([0, 0, 5, 5], True),
    ],
)
def test_learning_settles_after_two_undecided_windows_without_a_decided_one_between_for_good(signals, has_settled):
    noise = ScoreNoise(uniform(2), window=20)
    for scores in windows(*signals):
        feed(noise, scores)
    assert noise.has_settled is has_settled


def test_between_the_two_thresholds_a_window_changes_nothing():
    noise = ScoreNoise(uniform(2), window=20)
    f_of_one = feed(ScoreNoise(uniform(2), window=20), windows(1.0)[0]).statistic
    between = (2.5 / f_of_one) ** 0.5  # F is proportional to the square of the signal
    for signal, undecided in ((0, 1), (between, 1), (between, 1), (0, 2)):
        feed(noise, windows(signal)[0])
        assert noise.num_undecided == undecided


def test_a_proxy_stops_where_domains_are_alike_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_doge"):
        trainer = learn(tmp_path, twins())
    step = trainer.state.global_step
    assert step < 60
    assert step % 6 == 0
    assert trainer.has_settled
    assert f"Nothing is left to learn after step {step} of 60" in caplog.text
    logs = [log for log in trainer.state.log_history if "undecided_windows" in log]
    assert logs[-1]["undecided_windows"] == 2
    scores = trainer.domain_weights.trajectory.scores
    assert logs[-1]["domain_score_f"] == pytest.approx(statistic(scores[-7:]), rel=1e-6)
    assert (tmp_path / f"checkpoint-{step}").is_dir()
    saved = DomainWeights.from_pretrained(tmp_path / f"checkpoint-{step}" / "domain_weights")
    assert f"Learning stopped after {step} updates" in " ".join(saved.summary().split())


def test_where_domains_differ_and_without_the_option_learning_goes_on(tmp_path):
    other = Dataset.from_dict(language_model_rows(64, low=1, high=4, seed=2))
    apart = learn(tmp_path / "apart", {**twins(), "other": other}, per_device_train_batch_size=18, max_steps=24)
    assert (apart.state.global_step, apart.has_settled) == (24, False)
    assert "Learning stopped" not in apart.domain_weights.summary()
    alike = learn(tmp_path / "alike", twins(), stop_when_undecided=False)
    assert (alike.state.global_step, alike.has_settled) == (60, False)


def test_a_resumed_run_stops_at_the_same_step_and_one_that_has_stopped_makes_no_other(tmp_path):
    whole = learn(tmp_path, twins())
    step = whole.state.global_step
    resumed = learn(tmp_path, twins(), resume=str(tmp_path / "checkpoint-7"))
    assert resumed.state.global_step == step
    assert resumed.domain_weights.trajectory == whole.domain_weights.trajectory
    again = learn(tmp_path, twins(), resume=str(tmp_path / f"checkpoint-{step}"))
    assert again.state.global_step == step
    assert again.domain_weights.mean == whole.domain_weights.mean
    assert again.has_settled


def test_online_the_weights_stay_and_the_training_goes_on(tmp_path):
    trainer = learn(tmp_path, twins(), mode="online", save_strategy="no", max_steps=50)
    trajectory = trainer.domain_weights.trajectory
    assert trainer.state.global_step == 50
    assert len(trajectory.steps) % 6 == 0
    assert len(trajectory.steps) < 50
    assert trainer.domain_weights.last == dict(zip(trajectory.domains, trajectory.weights[-1].tolist(), strict=True))


def test_the_mean_by_inverse_variance_counts_weights_by_the_noise_that_reached_them(tmp_path):
    options = {"stop_when_undecided": False, "mean_weighting": "inverse_variance", "max_steps": 9, "burn_in_steps": 2}
    trainer = learn(tmp_path, three_domains(16), model=tiny_llama(num_layers=2), **options)
    weights = trainer.domain_weights
    centred = weights.trajectory.scores - weights.trajectory.scores.mean(axis=1, keepdims=True)
    variances = np.cumsum((np.diff(centred, axis=0) ** 2 / 2).mean(axis=1)) / weights.recipe["mu"] ** 2  # of 1, 2, ...
    expected = np.average(weights.trajectory.weights[2:], axis=0, weights=1 / (variances[1:] + 1e-12))
    np.testing.assert_allclose(list(weights.mean.values()), expected, rtol=1e-9)
    assert weights.recipe["mean_weighting"] == "inverse_variance"
    assert abs(expected - weights.trajectory.weights[2:].mean(axis=0)).max() > 1e-5
    resume = {"model": tiny_llama(num_layers=2), "resume": str(tmp_path / "checkpoint-7")}
    resumed = learn(tmp_path, three_domains(16), **resume, **options)
    assert resumed.domain_weights.mean == weights.mean
    with pytest.raises(ValueError, match="'mean_weighting': 'inverse_variance'"):
        learn(
            tmp_path,
            three_domains(16),
            resume=str(tmp_path / "checkpoint-7"),
            **{**options, "mean_weighting": "steps"},
        )


def test_without_noise_the_mean_by_inverse_variance_is_the_plain_one_but_for_the_first():
    noise, shares = ScoreNoise(uniform(2), window=5, weighs_mean=True), []
    for _ in range(4):
        noise.take(torch.tensor([1.0, 2.0]), 0.1)
        shares.append(noise.share())
    assert shares == pytest.approx([1, 1, 1 / 2, 1 / 3])


def test_a_checkpoint_of_the_paper_holds_nothing_new(tmp_path):
    options = {"recipe": "paper", "stop_when_undecided": False, "max_steps": 7}
    learn(tmp_path, three_domains(16), **options)
    state = json.loads((tmp_path / "checkpoint-7" / STATE_FILE).read_text())
    assert "score_noise" not in state
    assert not {"mean_weighting", "score_metric"} & state["run"]["recipe"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mean_weighting": "noise"},
            r"`mean_weighting` must be one of \['steps', 'inverse_variance'\], but got 'noise'",
        ),
        ({"undecided_window": 1}, "`undecided_window` must be"),
        ({"stop_when_undecided": "maybe"}, "`stop_when_undecided` must be"),
    ],
)
def test_what_an_option_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DoGEConfig(str(tmp_path), **options)
