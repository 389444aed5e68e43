"""An index with rows of layers goes to the Hub and comes back as any other does."""

from pathlib import Path

from tests.hub import HubServer, last_json, run_client

SCRIPT = Path(__file__).with_name("layers_script.py")


def test_an_index_with_layers_answers_from_the_hub_as_from_the_disk(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        seen = last_json(run_client(hub, SCRIPT, tmp_path / "work", timeout=300))
    assert seen["largest"] > 0
    assert seen["streamed"]
    assert seen["fetched"]
    assert "classifier" in seen["words"]
