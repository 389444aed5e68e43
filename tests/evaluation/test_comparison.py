import dataclasses
import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_doge.evaluation.comparison import Comparison, MixtureRun


def make_run(mixture, seed, perplexities, *, weights=None, epochs=None, train_tokens=1000):
    return MixtureRun(
        mixture=mixture,
        seed=seed,
        weights=weights or {"code": 0.5, "prose": 0.5},
        losses={name: math.log(value) for name, value in perplexities.items()},
        epochs=epochs or {"code": 1.0, "prose": 2.0},
        train_tokens=train_tokens,
    )


@pytest.fixture
def runs():
    return [
        make_run("uniform", 1, {"code": 10.0, "prose": 40.0, "ca": 100.0}),
        make_run("learned", 1, {"code": 9.0, "prose": 36.0, "ca": 80.0}, weights={"code": 0.2, "prose": 0.8}),
        make_run("uniform", 2, {"code": 12.0, "prose": 48.0, "ca": 110.0}),
        make_run("learned", 2, {"code": 25.0, "prose": 25.0, "ca": 90.0}, weights={"code": 0.2, "prose": 0.8}),
    ]


def test_rows_equal_hand_computed_values(runs):
    summary = Comparison(runs).summary()
    uniform, learned = summary["uniform"], summary["learned"]
    assert uniform["code"] == pytest.approx({"mean": 11.0, "std": math.sqrt(2)})
    assert uniform["average"] == pytest.approx({"mean": 27.5, "std": 5 / math.sqrt(2)})  # 25 and 30
    assert uniform["geometric mean"] == pytest.approx({"mean": 22.0, "std": 4 / math.sqrt(2)})  # 20 and 24
    assert uniform["worst domain"] == pytest.approx({"mean": 44.0, "std": 8 / math.sqrt(2)})
    assert learned["average"] == pytest.approx({"mean": 23.75, "std": 2.5 / math.sqrt(2)})  # 22.5 and 25
    assert learned["geometric mean"] == pytest.approx({"mean": 21.5, "std": 7 / math.sqrt(2)})  # 18 and 25


def test_a_target_is_in_no_average(runs):
    comparison = Comparison(runs)
    assert comparison.domains == ("code", "prose")
    assert comparison.targets == ("ca",)
    assert comparison.summary()["uniform"]["worst domain"]["mean"] == pytest.approx(44.0)
    assert comparison.summary()["uniform"]["ca"]["mean"] == pytest.approx(105.0)


def paired(change, *, seeds=5, noise=0.0, target_losses=None):
    """Runs whose perplexities differ by a factor, up to a noise that is another one in each seed."""
    runs = []
    for seed in range(seeds):
        level = 40.0 * (1 + seed)  # seeds differ by more than mixtures do
        for mixture, factor in (("uniform", 1.0), ("learned", change * math.exp(noise * (-1) ** seed))):
            run = make_run(mixture, seed, {"code": 10.0 * factor, "prose": 40.0 * factor, "ca": level * factor})
            losses = {name: {"ca": run.losses["ca"] + shift(mixture)} for name, shift in (target_losses or {}).items()}
            runs.append(dataclasses.replace(run, target_losses=losses))
    return runs


def test_a_paired_change_is_the_mean_of_the_seeds_log_ratios_with_students_interval():
    ratios = np.log([0.9, 0.8, 0.95])
    runs = [make_run("uniform", seed, {"code": 10.0 * seed, "prose": 40.0}) for seed in (1, 2, 3)]
    runs += [
        make_run("learned", seed, {"code": 10.0 * seed * math.exp(ratio), "prose": 40.0})
        for seed, ratio in zip((1, 2, 3), ratios, strict=True)
    ]
    change = Comparison(runs).paired_changes("learned", "uniform")["code"]
    half = 4.303 * ratios.std(ddof=1) / math.sqrt(3)
    assert change.mean == pytest.approx(100 * (math.exp(ratios.mean()) - 1))
    assert change.low == pytest.approx(100 * (math.exp(ratios.mean() - half) - 1))
    assert change.high == pytest.approx(100 * (math.exp(ratios.mean() + half) - 1))


def test_pairing_sees_a_small_change_under_a_large_spread_of_seeds():
    comparison = Comparison(paired(0.98, noise=0.005))
    assert comparison.summary()["uniform"]["ca"]["std"] > 50
    assert "better." in comparison.verdict("learned", "uniform").splitlines()[0]
    assert "NOT better: worse" in comparison.verdict("uniform", "learned")


def test_a_difference_within_the_noise_is_undecided_and_says_what_could_have_been_detected():
    verdict = Comparison(paired(1.0, noise=0.02)).verdict("learned", "uniform")
    assert re.search(r"undecided: 5 seeds could have detected [23]\.\d %", verdict)
    table = Comparison(paired(1.0, noise=0.02)).to_markdown()
    assert re.search(r"paired by seed.*5 seeds could have detected [23]\.\d %", table)


def test_one_seed_decides_nothing():
    runs = [make_run(name, 1, {"code": 10.0, "prose": 40.0}) for name in ("uniform", "learned")]
    assert "one seed decides nothing" in Comparison(runs).verdict("learned", "uniform")


def test_a_verdict_on_a_target_rests_on_the_longest_adaptation():
    measures = {
        "calibrated": lambda mixture: 0.0,
        "adapted_25": lambda mixture: 0.0,
        "adapted_100": lambda mixture: -0.2 if mixture == "learned" else 0.0,
    }
    comparison = Comparison(paired(1.02, noise=0.01, target_losses=measures))
    assert comparison.measures == ("calibrated", "adapted_25", "adapted_100")
    first, second = comparison.verdict("learned", "uniform").splitlines()
    assert first.startswith("- learned against uniform, ca after 100 steps on it: -16.")
    assert first.endswith("better.")
    assert "ca (target, not trained on) +2.2" in second
    assert "ca at its own temperature +2.2" in second


def test_bits_per_byte_compare_tokenizers(tmp_path):
    runs = [
        dataclasses.replace(run, bytes_per_token={"code": 2.0, "prose": 4.0, "ca": 1.0})
        for run in paired(0.5, seeds=2)
    ]
    comparison = Comparison(runs)
    assert comparison.bits_per_byte()["uniform"]["prose"] == pytest.approx(math.log2(40) / 4)
    assert "Bits per byte" in comparison.to_markdown()
    comparison.save(tmp_path)
    assert Comparison.load(tmp_path).runs == runs


def test_a_comparison_saved_before_there_were_measures_still_loads(runs, tmp_path):
    Comparison(runs).save(tmp_path)
    contents = json.loads((tmp_path / "comparison.json").read_text())
    for run in contents["runs"]:
        del run["target_losses"], run["bytes_per_token"]
    (tmp_path / "comparison.json").write_text(json.dumps(contents))
    assert Comparison.load(tmp_path).runs == runs


def test_table_has_all_rows_bold_minimum_and_verdict(runs):
    lines = Comparison(runs).to_markdown().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert "**23.75 ± 1.77**" in rows["average"]
    assert "27.50 ± 3.54" in rows["average"]
    assert "**27.50" not in rows["average"]
    assert {"code", "prose", "ca (target, not trained on)", "geometric mean", "worst domain"} <= set(rows)
    assert "0.8000, 2.00" in rows["prose"]
    assert any(line.startswith("- learned against uniform") for line in lines)
    assert any("From 2 seed(s)" in line for line in lines)


def test_one_seed_has_no_spread():
    comparison = Comparison([make_run("uniform", 7, {"code": 10.0, "prose": 40.0})])
    assert comparison.summary()["uniform"]["code"]["std"] is None
    assert "±" not in comparison.to_markdown().split("Weight of each")[0]


def test_saved_comparison_loads_equal_and_its_parquet_has_one_row_per_run_and_domain(runs, tmp_path):
    comparison = Comparison(runs)
    comparison.save(tmp_path)
    assert Comparison.load(tmp_path).summary() == comparison.summary()
    assert (tmp_path / "comparison.md").read_text() == comparison.to_markdown()
    table = pq.read_table(tmp_path / "comparison.parquet").to_pylist()
    assert len(table) == 4 * 3
    target_row = next(row for row in table if row["domain"] == "ca")
    assert target_row["is_target"]
    assert target_row["weight"] is None
    np.testing.assert_allclose([row["perplexity"] for row in table], [np.exp(row["loss"]) for row in table])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".parquet"]
    assert "hf_doge_version" in json.loads((tmp_path / "comparison.json").read_text())


def test_epochs_are_averaged_over_seeds(runs):
    more = make_run("uniform", 3, {"code": 1.0, "prose": 1.0, "ca": 1.0}, epochs={"code": 4.0, "prose": 2.0})
    comparison = Comparison([runs[0], more])
    assert comparison.epochs("uniform") == {"code": 2.5, "prose": 2.0}


@pytest.mark.parametrize("method", ["perplexities", "row_losses", "epochs", "weights"])
def test_a_mixture_that_is_none_is_refused_by_name(runs, method):
    with pytest.raises(ValueError, match=r"`mixture` must be one of .* but got 'other'"):
        getattr(Comparison(runs), method)("other")


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="at least one finished run"):
        Comparison([])


def test_a_missing_run_is_refused_by_name(runs):
    with pytest.raises(ValueError, match=r"missing are \[\('learned', 2\)\]"):
        Comparison(runs[:3])


def test_a_repeated_run_is_refused_by_name(runs):
    with pytest.raises(ValueError, match=r"repeated are \[\('uniform', 1\)\]"):
        Comparison([*runs, runs[0]])


def test_runs_of_other_domains_are_refused(runs):
    other = make_run("learned", 1, {"code": 10.0, "web": 40.0, "ca": 1.0}, weights={"code": 0.5, "web": 0.5})
    with pytest.raises(ValueError, match="of the same domains, but 'learned' with seed 1"):
        Comparison([runs[0], other])


def test_runs_of_another_length_are_refused(runs):
    longer = make_run("learned", 1, {"code": 9.0, "prose": 9.0, "ca": 9.0}, train_tokens=2000)
    with pytest.raises(ValueError, match="same number of tokens, but 'learned' with seed 1 took 2000"):
        Comparison([runs[0], longer])
