"""Each reproduction runs at its tiny scale on generated text, and a second run takes the finished parts."""

import gzip
import importlib.util
import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.doremi import update_doremi_weights
from benchmarks.reproduce.store import PartStore
from hf_doge.evaluation.intervals import t_interval

# Name, further arguments, and the tables it must leave.
CASES = [
    (
        "doge_universal",
        ["--stages", "core", "arms", "fresh"],
        ["perplexity", "domains", "weights", "scores", "cost", "perplexity_fresh", "domains_fresh"],
    ),
    ("doge_out_of_domain", ["--stages", "languages"], ["perplexity", "unigram", "weights"]),
    ("doge_data_restricted", [], ["perplexity", "weights", "epochs"]),
    ("doge_finetune", [], ["target"]),
]
DOMAINS = ("arxiv_latex", "books", "code", "legal", "news", "qa", "web", "wikipedia")
LANGUAGES = ("ca", "es", "nl")
LABELS = {
    "hate_davidson": ("neither", "hate_speech"),
    "toxicity_jigsaw": ("non_toxic", "toxic"),
    "sst2": ("negative", "positive"),
    "ag_news": ("World", "Sports"),
    "snli": ("entailment", "neutral"),
}


def write_records(path, records):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def make_text(rng, prefix, num_words):
    return " ".join(prefix[:2] + "".join(rng.choices("abcdefg", k=2)) for _ in range(num_words))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Folders as ../shared/data has them, of words that mean nothing."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for subfolder, names in (("lm", DOMAINS), ("multilingual", LANGUAGES)):
        (folder / subfolder).mkdir()
        for name in names:
            for split, count in (("train", 60), ("validation", 10)):
                records = [{"text": make_text(rng, name, 40)} for _ in range(count)]
                write_records(folder / subfolder / f"{name}.{split}.jsonl.gz", records)
    (folder / "classification").mkdir()
    for name, labels in LABELS.items():
        for split in ("train", "validation", "test"):
            records = []
            for number in range(60):
                label = number % 2
                text = make_text(rng, labels[label], 8)
                record = {"premise": text, "hypothesis": text} if name == "snli" else {"text": text}
                records.append({**record, "label": label, "label_name": labels[label]})
            write_records(folder / "classification" / f"{name}.{split}.jsonl.gz", records)
    return folder


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("reproduce")


@pytest.mark.parametrize(("name", "words", "tables"), CASES, ids=[case[0] for case in CASES])
def test_a_second_run_takes_the_finished_parts_and_gives_the_same_tables(
    name, words, tables, data_dir, output_dir, capsys
):
    results = output_dir / "results" / name
    argv = [name, "--data_dir", str(data_dir), "--output_dir", str(output_dir), "--scale", "tiny", *words]

    def read():
        markdown = {path.name: path.read_text() for path in results.glob("*.md")}
        rows = {path.name: pq.read_table(path).to_pylist() for path in results.glob("*.parquet")}
        return markdown, rows

    assert main(argv) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, run = read(), json.loads((results / "run.json").read_text())
    assert sorted(first[0]) == sorted(f"{table}.md" for table in tables)
    assert all(first[1].values())
    assert run["num_parts_computed_now"] == run["num_parts"] > 0
    assert (results / "plot.png").stat().st_size < 80_000

    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert read() == first
    assert json.loads((results / "run.json").read_text())["num_parts_computed_now"] == 0


def test_few_shot_without_the_harness_is_skipped_with_a_message(data_dir, output_dir, capsys):
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed here")
    assert main(["few_shot", "--data_dir", str(data_dir), "--output_dir", str(output_dir), "--scale", "tiny"]) == 0
    assert "pip install 'hf-doge[few-shot]'" in capsys.readouterr().out


def test_weights_are_tabulated_without_any_base_run(data_dir, output_dir, tmp_path):
    argv = ["doge_universal", "--data_dir", str(data_dir), "--output_dir", str(output_dir), "--scale", "tiny"]
    assert main([*argv, "--results_dir", str(tmp_path), "--stages", "variants"]) == 0
    assert "paper_sum_clipped" in (tmp_path / "doge_universal" / "weights.md").read_text()


def test_an_unknown_stage_is_refused(data_dir, output_dir):
    argv = ["doge_universal", "--data_dir", str(data_dir), "--output_dir", str(output_dir), "--scale", "tiny"]
    with pytest.raises(ValueError, match=r"`--stages` of doge_universal must be among"):
        main([*argv, "--stages", "cores"])


def test_a_part_with_other_arguments_is_computed_again(tmp_path):
    store = PartStore(tmp_path)
    assert store.get("part", {"seed": 1}, lambda: [1]) == [1]
    assert store.get("part", {"seed": 1}, lambda: [2]) == [1]
    assert store.get("part", {"seed": 2}, lambda: [3]) == [3]


def test_a_folder_belongs_to_one_scale_and_one_set_of_data(data_dir, output_dir, tmp_path):
    store = PartStore(tmp_path / "experiment" / "parts")
    store.belongs_to(scale="tiny", data="a")
    store.belongs_to(scale="tiny", data="a")
    with pytest.raises(ValueError, match="was made with data=a, but this run has data=b"):
        store.belongs_to(scale="tiny", data="b")
    argv = ["doge_universal", "--data_dir", str(data_dir), "--output_dir", str(tmp_path)]
    (tmp_path / "doge_universal").mkdir()
    (tmp_path / "doge_universal" / "about.json").write_text('{"scale": "small", "data": "x"}')
    with pytest.raises(ValueError, match="scale=small, but this run has scale=tiny"):
        main([*argv, "--scale", "tiny"])


def test_a_part_that_fails_leaves_nothing_behind(tmp_path):
    store = PartStore(tmp_path)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        store.get("part", {}, lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_t_interval_of_five_values_is_that_of_the_textbook():
    interval = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3
    assert interval.high - interval.mean == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    assert t_interval([1.0]).low is None


def test_t_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for count in (2, 5, 31, 32, 33, 200):
        values = np.random.default_rng(count).normal(size=count)
        expected = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
        assert t_interval(values).half_width == pytest.approx(expected, rel=5e-4)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        t_interval([])


def test_doremi_raises_the_domain_of_largest_excess_loss_and_keeps_the_simplex():
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    updated = update_doremi_weights(
        weights, torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64), step_size=1.0, smoothing=1e-3
    )
    assert updated.sum().item() == pytest.approx(1)
    assert updated.argmax().item() == 1
    exponentials = torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64).exp()
    torch.testing.assert_close(updated, 0.999 * exponentials / exponentials.sum() + 0.001 / 3)
