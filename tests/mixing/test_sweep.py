"""Sweeps: mixtures to try, the law fitted to what becomes of them, and its optimum."""

import json
import logging
import statistics

import numpy as np
import pytest

from hf_doge import DomainWeights
from hf_doge.cli import main
from hf_doge.evaluation.comparison import Comparison
from hf_doge.mixing.sweep import LogLinearLaw, design_mixtures, fit_sweep
from tests.cli.test_cli import write_data

NATURAL = np.array([0.5, 0.3, 0.15, 0.05])
UNIFORM = np.full(4, 0.25)
LAWS = (
    LogLinearLaw(2.0, np.array([0.9, 0.1, 0.3, 0.5])),
    LogLinearLaw(1.0, np.array([0.2, 0.8, 0.6, 0.7])),
)


def runs_by_law(num_mixtures=12, *, noise=0.0, seed=0):
    weights = design_mixtures([NATURAL, UNIFORM], num_mixtures, seed=seed)
    losses = np.stack([law.predict(weights) for law in LAWS], axis=1)
    return weights, losses + noise * np.random.default_rng(seed).normal(size=losses.shape)


def test_a_design_begins_with_its_centers_and_fills_the_simplex_around_them():
    design = design_mixtures([NATURAL, UNIFORM], 64, seed=3)
    np.testing.assert_array_equal(design[:2], [NATURAL, UNIFORM])
    np.testing.assert_allclose(design.sum(axis=1), 1)
    assert (design >= 0).all()
    assert np.abs(design[2::2].mean(axis=0) - NATURAL).max() < 0.06
    assert np.abs(design[3::2].mean(axis=0) - UNIFORM).max() < 0.06
    near = design_mixtures([UNIFORM], 64, concentration=50, seed=3)
    assert np.abs(near - UNIFORM).max() < np.abs(design[3::2] - UNIFORM).max() / 2
    np.testing.assert_array_equal(design, design_mixtures([NATURAL, UNIFORM], 64, seed=3))
    assert not np.array_equal(design, design_mixtures([NATURAL, UNIFORM], 64, seed=4))


def test_the_law_is_found_again_where_it_holds():
    weights, losses = runs_by_law(20)
    law = LogLinearLaw.fit(weights, losses[:, 0])
    new = design_mixtures([UNIFORM], 40, seed=9)
    np.testing.assert_allclose(law.predict(new), LAWS[0].predict(new), atol=2e-3)


def test_the_optimum_is_the_best_on_a_grid_and_predicts_its_gain():
    weights, losses = runs_by_law(24)
    fit = fit_sweep(weights, losses, natural=NATURAL, kl_penalty=0.05)

    def objective(a):
        divergence = (a * np.log(np.maximum(a, 1e-12) / NATURAL)).sum(axis=-1)
        return sum(law.predict(a) for law in LAWS) / 2 + 0.05 * divergence

    grid = np.random.default_rng(0).dirichlet(np.ones(4), size=20_000)
    assert fit.weights.sum() == pytest.approx(1)
    assert objective(fit.weights) <= objective(grid).min() + 2e-3
    true_change = sum(law.predict(fit.weights) - law.predict(NATURAL) for law in LAWS) / 2
    assert fit.change[0] == pytest.approx(true_change, abs=5e-3)
    assert fit.rank_correlation > 0.95


def test_the_interval_of_the_gain_widens_with_the_noise_and_the_correlation_falls():
    quiet, loud = (
        fit_sweep(*runs_by_law(16, noise=noise, seed=1), natural=NATURAL, kl_penalty=0.05) for noise in (0.002, 0.2)
    )
    assert loud.change[2] - loud.change[1] > 3 * (quiet.change[2] - quiet.change[1])
    assert loud.rank_correlation < quiet.rank_correlation


def test_a_cap_holds_and_a_strong_penalty_keeps_natural_proportions():
    weights, losses = runs_by_law(16)
    capped = fit_sweep(weights, losses, natural=NATURAL, max_weights=np.array([0.3, 0.3, 0.3, 0.3])).weights
    assert capped.max() <= 0.3 + 1e-9
    kept = fit_sweep(weights, losses, natural=NATURAL, kl_penalty=1e3).weights
    np.testing.assert_allclose(kept, NATURAL, atol=1e-3)


def test_a_loss_that_counts_for_nothing_does_not_move_the_optimum():
    weights, losses = runs_by_law(16)
    first = fit_sweep(weights, losses, natural=NATURAL, importance=np.array([1.0, 0.0])).weights
    np.testing.assert_allclose(first, fit_sweep(weights, losses[:, :1], natural=NATURAL).weights, atol=1e-6)


def test_fewer_runs_than_coefficients_and_unseen_domains_are_refused():
    weights, losses = runs_by_law(16)
    with pytest.raises(ValueError, match="needs at least 6 runs, but there are 5"):
        fit_sweep(weights[:5], losses[:5], natural=NATURAL)
    without = weights.copy()
    without[:, 2] = 0
    with pytest.raises(ValueError, match=r"domains \[2\] are in none"):
        fit_sweep(without, losses, natural=NATURAL)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    flags = [
        *(f"--data_dir={write_data(folder / 'data')}", "--block_size=16", "--train_tokenizer_vocab=300"),
        *("--model_size=nano", "--per_device_train_batch_size=6", "--max_steps=2", "--use_cpu", "--disable_tqdm=true"),
        *(f"--output_dir={folder / 'out'}", "--target", "wiki", "--adapt_steps", "1"),
    ]
    assert main(["sweep", *flags, "--num_mixtures=5", "--jobs=2"]) == 0
    return folder, flags


def test_a_sweep_is_an_artifact_with_all_its_runs(swept):
    folder, _ = swept
    weights = DomainWeights.from_pretrained(folder / "out" / "domain_weights")
    assert set(weights.mean) == {"code", "prose"}
    assert weights.recipe["name"] == "sweep"
    assert weights.recipe["objective"] == ["wiki, adapted_1"]
    assert len(weights.metadata["sweep"]) == 5
    assert Comparison.load(folder / "out").measures == ("calibrated", "adapted_1")
    assert (folder / "out" / "sweep.png").stat().st_size > 0
    assert weights.metadata["sweep"][0]["weights"] == weights.natural_proportions
    kept = json.loads(next((folder / "out" / "runs").glob("*.json")).read_text())
    assert kept["target_losses"]["adapted_1"]["wiki"] > 0


def test_more_mixtures_train_only_what_is_new(swept, caplog, capsys):
    _, flags = swept
    with caplog.at_level(logging.INFO):
        assert main(["sweep", *flags, "--num_mixtures=6"]) == 0
    assert sum("is finished already" in message for message in caplog.messages) == 5
    assert "Rank correlation" in capsys.readouterr().out


def test_a_sweep_may_repeat_domains_as_often_as_the_training_it_is_for(swept, tmp_path):
    folder, flags = swept
    extra = ["--num_mixtures=5", f"--output_dir={tmp_path / 'out'}", "--match_repetition", "--full_tokens=768"]
    assert main(["sweep", *[flag for flag in flags if "output_dir" not in flag], *extra]) == 0
    weights = DomainWeights.from_pretrained(tmp_path / "out" / "domain_weights")
    assert (weights.recipe["full_tokens"], weights.recipe["match_repetition"]) == (768, True)
    whole = DomainWeights.from_pretrained(folder / "out" / "domain_weights")
    assert [one["num_rows"] for one in weights.domains.values()] == [one["num_rows"] for one in whole.domains.values()]
    often, seldom = (
        statistics.mean(row["epochs"] for row in Comparison.load(out).to_rows() if row["epochs"])
        for out in (tmp_path / "out", folder / "out")
    )
    assert 3.5 < often / seldom < 4.6  # a quarter of each domain is left


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--match_repetition"], "Set `--full_tokens`"),
        (["--num_mixtures=3"], "must have at least 4 mixtures"),
        (["--jobs=0"], "`--jobs` must be at least 1"),
        (["--num_mixtures=5", "--max_epochs_per_domain=0.001"], "must leave 192 tokens to train on"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(swept, capsys, extra, message):
    _, flags = swept
    assert main(["sweep", *flags, *extra]) == 2
    assert message in capsys.readouterr().err
