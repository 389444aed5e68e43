import json
import math

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


def test_verdict_says_better_only_where_every_seed_is(runs):
    verdict = Comparison(runs).verdict("learned", "uniform").splitlines()
    assert len(verdict) == 4
    assert "ca (target, not trained on): 85.00 against 105.00 (-19.0 %), better in every seed" in verdict[0]
    assert "average: 23.75 against 27.50 (-13.6 %), better in every seed" in verdict[1]
    assert "geometric mean: 21.50 against 22.00 (-2.3 %), no consistent difference: better in 1 of 2" in verdict[2]
    assert "lower on 1 of 2 training domains" in verdict[3]


def test_verdict_says_not_better_where_every_seed_is_worse(runs):
    assert "NOT better: worse in every seed" in Comparison(runs).verdict("uniform", "learned")


def test_equal_mixtures_are_not_called_better():
    runs = [make_run(name, 1, {"code": 10.0, "prose": 40.0}) for name in ("uniform", "learned")]
    assert "better in 0 of 1 seeds" in Comparison(runs).verdict("learned", "uniform")


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
