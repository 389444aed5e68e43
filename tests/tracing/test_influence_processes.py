"""Two processes of `accelerate launch` search one index, and record one by the command: the answers of one process."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence import IndexReader
from hf_doge.cli import main
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings
from tests.launch import launch
from tests.tracing.influence_tools import TOPICS, classifier, sentences, tokenised, train, wordpiece_tokenizer

TEXTS = ["The runner is winning a match.", "Stocks of a rocket fund", "New moon"]
SYNONYMS = {"kernel": "synonym", "synonym_threshold": 0.2}
SEARCH = ["--query", *TEXTS, "--top_k=2", "--json"]

SCRIPT = """
import contextlib
import io
import runpy
import sys
from pathlib import Path

import numpy as np
from accelerate import PartialState
from filelock import FileLock
from transformers import AutoTokenizer

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence.lock import LOCK_FILE
from hf_doge.tracing.after_training import record_dataset
from tests.tracing.influence_tools import sentences, tokenised
from tests.launch import end_process_group
from tests.tracing.test_influence_processes import SEARCH, SYNONYMS, TEXTS, grow, index_flags


def command(*argv):
    sys.argv = ["hf_doge", *map(str, argv)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_module("hf_doge", run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 0, stop.code
    return said.getvalue()


def tell(name, work):
    try:
        work()
    except (ValueError, RuntimeError) as error:
        found[name] = f"{type(error).__name__}: {error}"


def require_free(index):
    # another process than the one that wrote it, while all of them still run
    if rank == 1:
        with FileLock(index / LOCK_FILE, timeout=20):
            pass


folder, found = Path(sys.argv[1]), {}
said = command("index", *index_flags(folder), "--output_dir", folder / "by-two")
rank = PartialState().process_index
require_free(folder / "by-two")
said += "---" + command("search", "--index", folder / "by-two", *SEARCH, "--html", folder / "page.html")
(folder / f"said-{rank}.txt").write_text(said)
index = InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps-of-two")
found |= {"scores": index.scores(TEXTS), "cosine": index.scores(TEXTS[:1], cosine=True)}
found["synonym"] = index.scores(TEXTS, **SYNONYMS)
tables = {"hits": index.search(TEXTS, top_k=3), "self": index.self_influence()}
tables["synonym_hits"] = index.search(TEXTS, top_k=3, **SYNONYMS)
for name, table in tables.items():
    found |= {f"{name}_ids": table["example_id"][:], f"{name}_scores": table["score"][:]}
tell("error", lambda: index.scores([{"text": "moon"}, {"text": "goal", "label": "weather"}]))
tell("wrong query", lambda: index.scores([{"text": "moon"}, {"text": "goal", "label": 7}]))
checkpoint = index.reader.checkpoints[0]["path"]
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
for name, row, wrong in (("wrong label", 5, {"label": -1}), ("wrong token", 0, {"text": "goal " * 40})):
    rows = sentences(8)
    rows[row] |= wrong
    data = tokenised(rows, tokenizer)
    again = {"tokenizer": tokenizer, "learning_rates": [0.1], "progress": False}
    tell(name, lambda: record_dataset(folder / "wrong", [checkpoint], data, **again))
good, other = tokenised(sentences(8), tokenizer), tokenised(sentences(9), tokenizer)
tell("other data", lambda: record_dataset(folder / "wrong", [checkpoint], good if rank == 0 else other, **again))
require_free(folder / "wrong")
grow(folder / "grown-by-two", checkpoint, tokenizer)
np.savez(folder / f"found-{rank}.npz", **found)
end_process_group()
"""


def grow(folder, checkpoint, tokenizer):
    """An index of 8 examples, then of 24."""
    options = {"tokenizer": tokenizer, "progress": False, "settings": RecordingSettings(max_segment_bytes=4000)}
    record_dataset(folder, [checkpoint], tokenised(sentences(8), tokenizer), learning_rates=[0.1], **options)
    record_dataset(folder, [checkpoint], tokenised(sentences(24), tokenizer), add_examples=True, **options)


def index_flags(folder):
    checkpoints = sorted((folder / "run").glob("checkpoint-*"))
    rates = ["--learning_rates", *(["0.1", "0.05"][: len(checkpoints)])]
    return ["--checkpoints", *checkpoints, "--data", folder / "train.jsonl", *rates]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with an index, what two processes found in it, and what they said."""
    folder = tmp_path_factory.mktemp("searched")
    tokenizer = wordpiece_tokenizer()
    train(folder, classifier(tokenizer), tokenizer, tokenised(sentences(24), tokenizer))
    named = [{**row, "label": TOPICS[row["label"]]} for row in sentences(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    (folder / "script.py").write_text(SCRIPT)
    launch(folder / "script.py", folder, HF_HOME=str(folder / "home"))
    return folder, [dict(np.load(folder / f"found-{rank}.npz")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def index(searched):
    return InfluenceIndex.from_pretrained(searched[0] / "index", cache_dir=searched[0] / "maps")


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_every_process_gets_all_scores_and_hits(searched, index):
    hits = index.search(TEXTS, top_k=3)
    for found in searched[1]:
        assert_close(found["scores"], index.scores(TEXTS))
        assert_close(found["cosine"], index.scores(TEXTS[:1], cosine=True))  # fewer queries than processes
        assert found["hits_ids"].tolist() == hits["example_id"][:]
        assert_close(found["hits_scores"], np.array(hits["score"][:]))


def test_synonyms_are_those_of_one_process(searched, index):
    hits = index.search(TEXTS, top_k=3, **SYNONYMS)
    assert not np.allclose(index.scores(TEXTS), index.scores(TEXTS, **SYNONYMS), rtol=1e-3)
    for found in searched[1]:
        assert_close(found["synonym"], index.scores(TEXTS, **SYNONYMS))
        assert found["synonym_hits_ids"].tolist() == hits["example_id"][:]
        assert_close(found["synonym_hits_scores"], np.array(hits["score"][:]))


def test_every_process_gets_the_self_influence_of_one_to_the_bit(searched, index):
    alone = index.self_influence()
    for found in searched[1]:
        assert found["self_ids"].tolist() == alone["example_id"][:]
        assert found["self_scores"].tolist() == alone["score"][:]


def test_a_failure_reaches_those_who_would_wait_and_names_the_process(searched):
    first, second = (str(found["error"]) for found in searched[1])
    assert second.startswith("ValueError: A label must be a number or one of the model's labels")
    assert first.startswith("ProcessFailedError: Process 1 (")
    assert second in first


def test_a_query_is_refused_by_its_position_among_all(searched):
    first, second = (str(found["wrong query"]) for found in searched[1])
    assert second.startswith("ValueError: The label of query 1 must be a whole number from 0 to 2")
    assert first.startswith("ProcessFailedError: Process 1 (")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("wrong label", "ValueError: The label of example 5 must be a whole number from 0 to 2"),
        ("wrong token", "ValueError: Example 0 must fit into the model"),
    ],
)
def test_an_example_is_refused_on_all_processes(searched, case, message):
    first, second = (str(found[case]) for found in searched[1])
    assert first.startswith(message)
    assert second.startswith("ProcessFailedError: Process 0 (")
    assert first in second


def test_processes_with_other_datasets_are_refused_and_let_go_of_the_index(searched):
    first, second = (str(found["other data"]) for found in searched[1])
    assert second.startswith("ValueError: All processes must record the same dataset")
    assert first.startswith("ProcessFailedError: Process 1 (")


def test_the_command_records_on_all_processes_what_one_records(searched, tmp_path, capsys):
    folder, _ = searched
    assert main(["index", *map(str, index_flags(folder)), "--output_dir", str(tmp_path / "by-one")]) == 0
    configs = [IndexReader.open(place).config for place in (folder / "by-two", tmp_path / "by-one")]
    assert configs[0]["checkpoints"] == configs[1]["checkpoints"]
    assert configs[0]["files"] == configs[1]["files"]
    assert len(configs[0]["checkpoints"]) == 2


def test_the_command_says_and_writes_things_once(searched, capsys):
    folder, _ = searched
    said = [(folder / f"said-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[1] == "---"
    recorded, found = said[0].split("---")
    assert recorded.startswith("Recorded 24 examples at 2 checkpoints")
    assert main(["search", "--index", str(folder / "by-two"), *SEARCH]) == 0
    alone = capsys.readouterr().out.splitlines()
    for one, other in zip(map(json.loads, found.splitlines()), map(json.loads, alone), strict=True):
        assert one["example_id"] == other["example_id"]
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    assert (folder / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_examples_added_by_two_processes_are_the_files_of_one(searched):
    folder, _ = searched
    checkpoint = sorted((folder / "run").glob("checkpoint-*"))[0]
    grow(folder / "grown-by-one", checkpoint, AutoTokenizer.from_pretrained(checkpoint))
    by_one, by_two = (
        {
            str(path.relative_to(folder / name)): path.read_bytes()
            for path in sorted((folder / name).rglob("*"))
            if path.is_file()
        }
        for name in ("grown-by-one", "grown-by-two")
    )
    assert list(by_one) == list(by_two)
    assert len([path for path in by_one if path.startswith("gradients/") and "/00000008/" in path]) > 2
    for path in by_one:
        if path not in ("config.json", "README.md"):  # which say when and how they were made
            assert by_one[path] == by_two[path], path
