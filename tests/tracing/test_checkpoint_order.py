"""Checkpoints are ordered by their steps: not by the place in a list, a folder, or by when they were recorded."""

import json
import logging
import shutil

import datasets
import duckdb
import numpy as np
import pytest
import torch

from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.index import InfluenceIndex
from hf_doge.tracing.saved_checkpoints import checkpoint_step, in_order_of_steps
from tests.artifacts.influence_rows import (
    NUM_EXAMPLES,
    dense_scores,
    open_writer,
    random_rows,
    some,
    write_checkpoint,
)
from tests.tracing.influence_tools import classifier, sentences, tokenised, wordpiece_tokenizer

ROWS = {step: random_rows(NUM_EXAMPLES, seed=step) for step in (12, 8, 4)}  # as they are recorded


def facts(step):
    return {"name": f"checkpoint-{step}", "step": step, "learning_rate": step / 100}


def written(folder, *, steps=tuple(ROWS)):
    writer = open_writer(folder, dtype="float32")
    for step in steps:
        write_checkpoint(writer, ROWS[step], **facts(step))
    return writer


def as_once(folder):
    """The index as a version wrote it that kept checkpoints in the order of their recording."""
    config = json.loads((folder / "config.json").read_text())
    entries = sorted(config["checkpoints"], key=lambda entry: entry.pop("number", entry["step"]))
    entries = [next(entry for entry in entries if entry["step"] == step) for step in ROWS]
    (folder / "config.json").write_text(json.dumps({**config, "checkpoints": entries}))


def assert_in_order(folder, tmp_path, steps=(4, 8, 12)):
    reader = IndexReader.open(folder, cache_dir=tmp_path / "maps")
    assert [one["step"] for one in reader.checkpoints] == list(steps)
    for place, step in enumerate(steps):
        expected = dense_scores(ROWS[4], ROWS[step])
        assert np.abs(reader.scores(place, ROWS[4]) - expected).max() <= 1e-6 * np.abs(expected).max()


def test_an_index_is_read_by_step_in_whatever_order_it_was_written(tmp_path):
    written(tmp_path / "index").close()
    assert_in_order(tmp_path / "index", tmp_path)
    table = datasets.load_dataset(str(tmp_path / "index"), "checkpoints", split="train", cache_dir=str(tmp_path / "c"))
    assert table["step"] == [4, 8, 12]
    assert table["checkpoint"] == [2, 1, 0]
    as_once(tmp_path / "index")
    assert_in_order(tmp_path / "index", tmp_path)


def test_what_was_written_in_order_is_the_same_to_the_byte(tmp_path):
    written(tmp_path / "index", steps=(4, 8, 12)).close()
    text = (tmp_path / "index" / "config.json").read_text()
    assert '"number"' not in text
    assert "file_row_number" in (tmp_path / "index" / "README.md").read_text()


def test_a_run_that_is_set_back_forgets_later_steps_only(tmp_path):
    writer = written(tmp_path / "index")
    writer.forget("checkpoint-8")
    write_checkpoint(writer, ROWS[8], **facts(8))
    assert_in_order(tmp_path / "index", tmp_path, (4, 8))


@pytest.mark.parametrize("old", [False, True])
def test_an_index_out_of_order_grows_and_its_card_adds_up(tmp_path, monkeypatch, old):
    writer = open_writer(tmp_path / "index", dtype="float32", num_examples=30)
    for step, rows in ROWS.items():
        write_checkpoint(writer, some(rows, 0, 30), **facts(step))
    writer.close()
    if old:
        as_once(tmp_path / "index")
    writer = open_writer(tmp_path / "index", dtype="float32", add_examples=True)
    for step in (8, 4, 12):
        write_checkpoint(writer, some(ROWS[step], 30, NUM_EXAMPLES), **facts(step))
    writer.close()
    assert_in_order(tmp_path / "index", tmp_path)
    card = (tmp_path / "index" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "index")
    query = card.split("```sql\n")[1].split("```")[0].replace("example_id = 0", "example_id = 1")
    found = dict(duckdb.sql(query.replace("LIMIT 10", "")).fetchall())
    expected = sum(step / 100 * dense_scores(some(ROWS[step], 1, 2), ROWS[step])[0] for step in ROWS)
    for example, score in found.items():
        assert score == pytest.approx(expected[example], rel=1e-4, abs=1e-12)
    assert len(found) > 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints 8 and 12, of which the first predicts class 0 and the last class 1."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), wordpiece_tokenizer()
    for step, favourite in ((8, 0), (12, 1)):
        model = classifier(tokenizer)
        torch.nn.init.constant_(model.classifier.bias[favourite : favourite + 1], 5.0)
        model.save_pretrained(folder / f"checkpoint-{step}")
        tokenizer.save_pretrained(folder / f"checkpoint-{step}")
    return folder, tokenizer


def record(folder, paths, tokenizer, **options):
    data = tokenised(sentences(6), tokenizer)
    options = {"tokenizer": tokenizer, "progress": False, "learning_rates": [0.1] * len(paths), **options}
    return record_dataset(folder, paths, data, **options)


@pytest.mark.parametrize("order", [["checkpoint-12", "checkpoint-8"], ["checkpoint-8", "checkpoint-12"]])
@pytest.mark.parametrize("later", [False, True])
def test_unlabelled_queries_are_traced_for_what_the_last_step_predicts(tmp_path, run, order, later):
    folder, tokenizer = run
    paths = [folder / name for name in order]
    for given in [paths[:1], paths[1:]] if later else [paths]:
        record(tmp_path / "index", given, tokenizer)
    index = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    assert [one["name"] for one in index.config["checkpoints"]] == ["checkpoint-8", "checkpoint-12"]
    assert index.search("the stadium", top_k=1)["query_label"][0] == 1


def test_learning_rates_go_with_the_checkpoints_that_they_were_given_for(tmp_path, run):
    folder, tokenizer = run
    paths = [folder / "checkpoint-12", folder / "checkpoint-8"]
    writer = record(tmp_path / "index", paths, tokenizer, learning_rates=[0.12, 0.08])
    assert [entry["learning_rate"] for entry in writer.config["checkpoints"]] == [0.08, 0.12]


def test_a_checkpoint_counts_once_and_has_a_step(tmp_path, run, caplog):
    folder, tokenizer = run
    (tmp_path / "last").symlink_to(folder / "checkpoint-12")
    shutil.copytree(folder / "checkpoint-12", tmp_path / "best")
    for name, other in (("last", "checkpoint-12"), ("best-12", "checkpoint-12")):
        if name == "best-12":
            shutil.copytree(folder / "checkpoint-12", tmp_path / name)
        with pytest.raises(ValueError, match=f"counts once, but '{name}' and '{other}' are both"):
            record(tmp_path / "index", [folder / other, tmp_path / name], tokenizer)
    with pytest.raises(ValueError, match=r"that of .*best' is unknown"):
        record(tmp_path / "index", [folder / "checkpoint-8", tmp_path / "best"], tokenizer)
    (tmp_path / "best" / "trainer_state.json").write_text('{"global_step": 2')
    with pytest.raises(ValueError, match=r"trainer_state.json' must be JSON"):
        record(tmp_path / "index", [folder / "checkpoint-8", tmp_path / "best"], tokenizer)
    (tmp_path / "best" / "trainer_state.json").write_text('{"global_step": 2}')
    writer = record(tmp_path / "index", [folder / "checkpoint-8", tmp_path / "best"], tokenizer)
    assert writer.checkpoint_names == ["best", "checkpoint-8"]
    with pytest.raises(ValueError, match="counts once, but 'best-8' and 'checkpoint-8' are both of step 8"):
        record(tmp_path / "index", [shutil.copytree(folder / "checkpoint-8", tmp_path / "best-8")], tokenizer)
    with caplog.at_level(logging.WARNING):
        paths = [
            shutil.copytree(folder / f"checkpoint-{step}", tmp_path / name) for name, step in (("b", 8), ("a", 12))
        ]
        writer = record(tmp_path / "of no step", paths, tokenizer)
    assert writer.checkpoint_names == ["b", "a"]
    assert "steps of ['b', 'a'] are unknown" in caplog.text


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (("step_100", "step_12", "step_8"), "step_100"),
        (("epoch_10", "epoch_9"), "epoch_10"),
        (("ckpt8", "ckpt.12"), "ckpt.12"),
        (("checkpoint-12-loss-1.2", "checkpoint-8-loss-1.9"), "checkpoint-12-loss-1.2"),
        (("step-500-of-500", "step-100-of-500"), "step-500-of-500"),
        (("v1.10", "v1.9"), "v1.10"),
        (("100", "20"), "100"),
    ],
)
def test_names_of_other_trainers_tell_the_step_too(tmp_path, names, last):
    paths = [tmp_path / name for name in names]
    assert in_order_of_steps(paths, {})[-1] == names.index(last)


@pytest.mark.parametrize(
    "names",
    [
        ("2024-04-30", "2024-05-01"),
        ("checkpoint-2024-04-30", "checkpoint-2024-05-01"),
        ("a3f9", "b7c1"),
        ("checkpoint-10k", "checkpoint-9k"),
        ("epoch-1-step-50", "epoch-2-step-40"),
        ("loss-1.9", "loss-1.2"),
    ],
)
def test_digits_that_are_no_step_are_not_read_as_one(tmp_path, names):
    for given, recorded in ((names, {}), (names[:1], {names[1]: 0}), (names[:1], {"checkpoint-8": 8})):
        with pytest.raises(ValueError, match=rf"{names[0]}' is unknown.*no step. Call it 'checkpoint-' and its step"):
            in_order_of_steps([tmp_path / name for name in given], recorded)
    for step, name in enumerate(names, start=7):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert in_order_of_steps([tmp_path / name for name in reversed(names)], {}) == [1, 0]
    assert checkpoint_step(tmp_path / "2024-06-01") is None


@pytest.mark.parametrize(
    ("names", "recorded", "message"),
    [
        (["v2.1", "v1.9"], {}, r"some of .* count v1\., others v2\."),
        (["epoch-2", "checkpoint-9"], {}, "some of .* count epochs, others steps"),
        (["checkpoint-9"], {"epoch-2": 2}, "some of .* count epochs, others steps"),
        (["checkpoint-9"], {"final": 0}, r"\['final'\] of the index have none"),
    ],
)
def test_steps_and_what_is_none_are_not_put_in_one_order(tmp_path, names, recorded, message):
    with pytest.raises(ValueError, match=message):
        in_order_of_steps([tmp_path / name for name in names], recorded)


@pytest.mark.parametrize("step", ['"12"', "12.0", "true", "-3", "1e400", "9" * 30])
def test_a_state_without_a_step_that_can_be_is_refused_by_name(tmp_path, step):
    (tmp_path / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    with pytest.raises(ValueError, match=r"`global_step` in .*trainer_state.json' must be a step"):
        checkpoint_step(tmp_path)


def test_a_checkpoint_has_a_name_from_within(tmp_path, run, monkeypatch):
    folder, tokenizer = run
    monkeypatch.chdir(folder / "checkpoint-12")
    writer = record(tmp_path / "index", [".", "../checkpoint-8"], tokenizer)
    assert writer.checkpoint_names == ["checkpoint-8", "checkpoint-12"]
