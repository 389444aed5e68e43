"""Weights that go only as far from the initial ones as the noise of the scores cannot account for."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_doge.functional.doge import shrink_deviations
from hf_doge.training.config import DoGEConfig
from hf_doge.training.learning_state import STATE_FILE
from hf_doge.training.score_noise import ScoreNoise
from tests.tiny import language_model_rows, three_domains
from tests.training.test_undecided import feed, learn, uniform

OPTIONS = {"stop_when_undecided": False, "max_steps": 14}


def weights_by_definition(scores, mu, initial):
    """Those after each update, from all scores so far."""
    centred = scores - np.nanmean(scores, axis=1, keepdims=True)
    found = []
    for number in range(1, len(scores) + 1):
        deviations = np.nansum(centred[:number], axis=0) / mu
        changes = np.diff(centred[:number], axis=0) ** 2 / 2
        variances = np.nansum(changes, axis=0) / mu**2
        told = np.isfinite(changes).sum(axis=0)
        variances *= np.isfinite(centred[:number]).sum(axis=0) / np.maximum(told, 1)
        known = variances > 0
        between = max(0.0, float(np.mean((deviations**2 - 2 * variances)[known]))) if known.any() else 0.0
        shares = np.divide(between, between + 2 * variances, out=np.zeros_like(variances), where=variances > 0)
        powers = initial * np.exp(shares * deviations)
        found.append(powers / powers.sum())
    return np.array(found)


@pytest.mark.parametrize("initial", [None, {"news": 0.5, "code": 0.3, "books": 0.2}])
def test_weights_follow_the_definition_and_a_resumed_run_its_twin(tmp_path, initial):
    domains = three_domains(16)
    start = dict(zip(domains, (initial or {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}).values(), strict=True))
    weights = learn(tmp_path, domains, **OPTIONS).domain_weights if initial is None else None
    if initial is not None:
        args = {**OPTIONS, "mu": 0.01}
        weights = learn_from(tmp_path, domains, start, **args).domain_weights
    assert weights.recipe["shrinkage"] is True
    order = [start[name] for name in weights.trajectory.domains]
    expected = weights_by_definition(weights.trajectory.scores, weights.recipe["mu"], np.array(order))
    np.testing.assert_allclose(weights.trajectory.weights, expected, rtol=1e-9)
    np.testing.assert_allclose(list(weights.mean.values()), expected.mean(axis=0), rtol=1e-9)
    if initial is None:
        resumed = learn(tmp_path, three_domains(16), resume=str(tmp_path / "checkpoint-7"), **OPTIONS)
        assert resumed.domain_weights.mean == weights.mean


def learn_from(folder, domains, start, **options):
    from hf_doge.training.trainer import DoGETrainer
    from tests.tiny import tiny_llama
    from tests.training.test_undecided import OPTIONS as USUAL

    args = DoGEConfig(str(folder), **{**USUAL, **options})
    trainer = DoGETrainer(tiny_llama(), args, train_dataset=domains, initial_weights=start)
    trainer.train()
    return trainer


def siblings():
    """Six domains of the same kind of text."""
    rows = [Dataset.from_dict(language_model_rows(64, low=1, high=31, seed=seed)) for seed in range(6)]
    return {f"sibling {number}": one for number, one in enumerate(rows)}


def test_of_domains_alike_little_is_learned_where_without_it_noise_moves_the_weights(tmp_path):
    found = {}
    for shrinkage in (True, False):
        options = {**OPTIONS, "max_steps": 40, "shrinkage": shrinkage, "mu": 0.07, "per_device_train_batch_size": 12}
        weights = [
            learn(
                tmp_path / f"{shrinkage}-{seed}", siblings(), seed=seed, save_strategy="no", **options
            ).domain_weights
            for seed in range(2)
        ]
        found[shrinkage] = np.mean([np.abs(np.log(6 * np.array(list(one.last.values())))).mean() for one in weights])
    assert found[False] > 0.2
    assert found[True] < found[False] / 3


def test_noise_alone_leaves_the_initial_weights_and_a_signal_stays():
    draw = np.random.default_rng(0)
    initial, signal = torch.tensor([0.4, 0.3, 0.2, 0.1]), np.array([0.3, -0.1, -0.1, -0.1])
    farthest, kept = [], []
    for _ in range(25):
        quiet = feed(ScoreNoise(initial, window=100, shrinks=True), draw.normal(size=(400, 4)), rate=0.1)
        farthest.append(float((quiet.shrink(uniform(4)) / initial).log().abs().max()))
        loud = feed(ScoreNoise(initial, window=100, shrinks=True), draw.normal(size=(400, 4)) + signal, rate=0.1)
        kept.append(float((loud.shrink(uniform(4)) / initial).log()[0] - (loud.shrink(uniform(4)) / initial).log()[1]))
    assert np.median(farthest) < 0.5  # without shrinkage about 2
    assert np.mean(kept) == pytest.approx(0.1 * 400 * 0.4 * (1 - 2 / 16), rel=0.1)


def test_of_equal_noise_the_share_that_stays_is_that_of_james_and_stein():
    deviations = torch.tensor([3.0, -1.0, -2.0], dtype=torch.float64)
    found = shrink_deviations(deviations, torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(found, deviations * (1 - 2 * 3 * 2.0 / 14.0))
    assert not shrink_deviations(deviations, torch.full((3,), 20.0, dtype=torch.float64)).any()
    assert not shrink_deviations(deviations, torch.zeros(3, dtype=torch.float64)).any()
    variances = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([3.0, -1.0, 0.0], dtype=torch.float64) * (1 - 2 * 2 * 1.0 / 10.0)
    torch.testing.assert_close(shrink_deviations(deviations, variances), expected)


def test_noise_alone_leaves_the_weights_of_domains_that_are_absent_half_the_time_too():
    draw, farthest = np.random.default_rng(1), []
    for _ in range(40):
        scores = np.where(draw.random(size=(400, 8)) < 0.5, np.nan, draw.normal(size=(400, 8)))
        quiet = feed(ScoreNoise(uniform(8), window=100, shrinks=True), scores, rate=0.1).shrink(uniform(8))
        farthest.append(float((quiet * 8).log().abs().max()))
    assert np.mean(np.array(farthest) > 1e-6) < 0.25  # with the noise of known updates alone 40 %


def test_an_absent_domain_keeps_its_ratio_to_the_mean_and_smoothing_is_mixed_in_after():
    noise = ScoreNoise(uniform(3), window=5, shrinks=True, smoothing=0.3)
    scores = np.array([[1.0, 2.0, 6.0], [1.5, 2.5, np.nan], [0.9, 2.2, 6.4], [1.0, 2.0, 6.0]])
    found = feed(noise, scores, rate=2.0).shrink(uniform(3))
    expected = 0.7 * weights_by_definition(scores, 0.5, np.ones(3) / 3)[-1] + 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_only_doge_plus_shrinks_unless_it_is_asked_for(tmp_path):
    assert DoGEConfig(str(tmp_path), recipe="doge_plus").get_recipe().shrinkage
    assert not DoGEConfig(str(tmp_path), recipe="doge_plus", shrinkage=False).get_recipe().shrinkage
    assert DoGEConfig(str(tmp_path), shrinkage=True).get_recipe().shrinkage
    assert "shrinkage" not in DoGEConfig(str(tmp_path), recipe="paper").get_recipe().to_dict()
    with pytest.raises(ValueError, match="`shrinkage` must be True or False, but got 'some'"):
        DoGEConfig(str(tmp_path), shrinkage="some")


def test_what_is_resumed_must_shrink_as_before(tmp_path):
    learn(tmp_path, three_domains(16), **{**OPTIONS, "max_steps": 7})
    assert "deviations" in json.loads((tmp_path / "checkpoint-7" / STATE_FILE).read_text())["score_noise"]
    with pytest.raises(ValueError, match="shrinkage"):
        learn(tmp_path, three_domains(16), resume=str(tmp_path / "checkpoint-7"), **{**OPTIONS, "shrinkage": False})
