"""Pushes from training: one commit however many processes there are, model and weights linked, training never stopped."""

import json

import pytest

from tests.hub.handle import HubServer, client_environment
from tests.launch import REPOSITORY, run_processes


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "state") as server:
        folder = tmp_path_factory.mktemp("client")
        environment = client_environment(server)
        kept = {name: environment[name] for name in environment if name.startswith("HF_") or "proxy" in name.lower()}
        server.fail("POST", "doge/direct/commit/", delay=1.5)  # so that others would read before it
        run_processes(
            REPOSITORY / "tests" / "hub" / "hub_processes_script.py", folder, **{"HF_HUB_OFFLINE": "0", **kept}
        )
        server.folder = folder
        yield server


def titles(hub, repo_id):
    return [commit["title"] for commit in hub.commits(repo_id)]


def test_two_processes_push_the_weights_in_one_commit(hub):
    assert titles(hub, "doge/direct")[:-1] == ["Upload domain weights, 2 domains"]


def test_every_process_reads_what_all_have_saved_and_pushed_when_its_own_call_returns(hub):
    assert {path.name for path in hub.folder.glob("read-*")} == {"read-0", "read-1"}
    assert (hub.folder / "alone" / "domain_weights.json").exists()
    assert len(titles(hub, "doge/alone")) == 2
    assert not [path for path in hub.folder.rglob(".*") if path.name.startswith((".hf_doge-", ".tmp"))]


def test_a_trainer_on_two_processes_pushes_model_and_weights_once_and_a_repeated_push_adds_nothing(hub):
    assert titles(hub, "doge/proxy-domain-weights")[:-1] == ["End of training"]
    weights = json.loads(hub.files("doge/proxy-domain-weights")["domain_weights.json"])
    assert sorted(weights["mean"]) == ["arxiv", "books"]
    assert "model.safetensors" in hub.files("doge/proxy", repo_type="model")


def test_the_cards_of_model_and_weights_name_each_other(hub):
    model_card = hub.files("doge/proxy", repo_type="model")["README.md"].decode()
    weights_card = hub.files("doge/proxy-domain-weights")["README.md"].decode()
    assert "datasets:\n- doge/proxy-domain-weights" in model_card
    assert model_card.count("## Domain weights") == 1
    assert "doge/proxy" in weights_card.replace("doge/proxy-domain-weights", "")


def test_a_callback_on_two_processes_pushes_each_checkpoint_at_most_once_and_all_in_the_end(hub):
    commits = titles(hub, "doge/traced")
    assert commits[0] == "Upload influence index, 2 checkpoints"
    assert len(commits) == len(set(commits)) <= 3
    assert hub.repository("doge/traced")["private"] is True
    config = json.loads(hub.files("doge/traced")["config.json"])
    assert [one["name"] for one in config["checkpoints"]] == ["checkpoint-1", "checkpoint-2"]
