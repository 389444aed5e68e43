"""Both artifacts on the Hub: what is pushed is what is read, with and without this package."""

import json
import re
from pathlib import Path

import pytest

from tests.hub.handle import HubServer, last_json, run_client
from tests.launch import REPOSITORY
from tests.tracing.influence_tools import sentences

SCRIPT = Path(__file__).with_name("hub_roundtrip_script.py")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "state") as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module")
def seen(hub, folder):
    return last_json(run_client(hub, SCRIPT, folder))


@pytest.mark.parametrize(
    "what",
    [
        *("weights_repeat_is_same_commit", "weights_head", "weights_tag", "weights_commit", "weights_offline"),
        "weights_cache_dir",
        *("trajectory_is_gone", "weights_table", "load weights", "load trajectory"),
        *("index_repeat_is_same_commit", "index_scores", "index_hits", "index_files"),
        *("load gradients", "load examples", "load checkpoints", "load offsets"),
        *("stream_scores", "stream_hits", "redacted_scores", "redacted_hits"),
    ],
)
def test_what_is_pushed_is_what_is_read(seen, what):
    assert seen[what] is True


def test_commits_have_the_message_that_was_given(seen, hub):
    assert hub.commits("doge/mixture")[0]["title"] == "Another mixture"
    assert [one["title"] for one in hub.commits("doge/influence")][:-1] == ["An index"]


def test_cards_are_valid_and_name_every_configuration(seen):
    assert seen["weights_card"] == [["n<1K"], ["weights"]]
    assert seen["index_card"][1] == ["gradients", "examples", "checkpoints", "offsets"]
    assert [Path(path).name for path in seen["glob"]] == ["train-00000-of-00001.parquet"] * 2


def test_a_pushed_index_has_its_models_and_a_reader_finds_them(seen, hub):
    assert seen["index_paths"] == ["models/checkpoint-3", "models/checkpoint-6"]
    files = hub.files("doge/influence")
    assert {path.rpartition("/")[2] for path in files if path.startswith("models/checkpoint-3/")} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not [path for path in files if path.endswith((".pt", ".pth", ".bin", ".pkl", "trainer_state.json"))]
    bare = hub.files("doge/influence-without-models")
    assert not [path for path in bare if path.startswith("models/")]
    assert [one["path"] for one in json.loads(bare["config.json"])["checkpoints"]] == [None, None]


def test_a_redacted_index_holds_no_training_text_anywhere(seen, hub):
    assert seen["redacted_columns"] == ["example_id", "label", "label_name"]
    texts = [row["text"] for row in sentences(24)]
    everything = b"".join(hub.files("doge/influence-redacted").values())
    plain = b"".join(hub.files("doge/influence").values())
    assert any(text.encode() in plain for text in texts), "the text would be found, were it there"
    for text in texts:
        for form in (text, text.lower(), " ".join(text.split()[:3])):
            assert form.encode() not in everything
            assert form.encode("utf-16-le") not in everything


@pytest.mark.parametrize("repo_id", ["doge/mixture", "doge/influence", "doge/influence-redacted"])
def test_no_file_holds_a_token_or_a_path_of_this_machine(seen, hub, folder, repo_id):
    secrets = [hub.token, str(Path.home()), str(folder), str(REPOSITORY)]
    files = hub.files(repo_id)
    assert {"README.md", ".gitattributes"} < set(files)
    for path, content in files.items():
        for secret in secrets:
            assert secret.encode() not in content, f"{path} holds {secret}"
        if path.endswith((".json", ".md")):
            assert not re.search(rb"[\"' (](/tmp|/root|/home|/work)/", content), path
