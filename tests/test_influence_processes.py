"""Two processes of `accelerate launch` search one index, and record one by the command: the answers of one process."""

import json

import numpy as np
import pytest

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence import IndexReader
from hf_doge.cli import main
from tests.influence_tools import TOPICS, classifier, sentences, tokenised, train, wordpiece_tokenizer
from tests.launch import launch

TEXTS = ["The runner is winning a match.", "Stocks of a rocket fund", "New moon"]
SEARCH = ["--query", *TEXTS, "--top_k=2", "--json"]

SCRIPT = """
import contextlib
import io
import runpy
import sys
from pathlib import Path

import numpy as np
from accelerate import PartialState

from hf_doge import InfluenceIndex
from tests.test_influence_processes import SEARCH, TEXTS, index_flags


def command(*argv):
    sys.argv = ["hf_doge", *map(str, argv)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_module("hf_doge", run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 0, stop.code
    return said.getvalue()


folder = Path(sys.argv[1])
said = command("index", *index_flags(folder), "--output_dir", folder / "by-two")
said += "---" + command("search", "--index", folder / "by-two", *SEARCH, "--html", folder / "page.html")
rank = PartialState().process_index
(folder / f"said-{rank}.txt").write_text(said)
index = InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps-of-two")
found = {"scores": index.scores(TEXTS), "cosine": index.scores(TEXTS[:1], cosine=True)}
for name, table in {"hits": index.search(TEXTS, top_k=3), "self": index.self_influence()}.items():
    found |= {f"{name}_ids": table["example_id"][:], f"{name}_scores": table["score"][:]}
try:
    index.scores([{"text": "moon"}, {"text": "goal", "label": "weather"}])
except (ValueError, RuntimeError) as error:
    found["error"] = f"{type(error).__name__}: {error}"
np.savez(folder / f"found-{rank}.npz", **found)
"""


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
