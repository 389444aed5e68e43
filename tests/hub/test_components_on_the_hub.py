"""An index whose checkpoints have a basis each goes to the Hub and comes back as any other does."""

from pathlib import Path

import pytest

from tests.hub import HubServer, last_json, run_client

SCRIPT = Path(__file__).with_name("components_script.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components")
    with HubServer(folder / "hub") as hub:
        return last_json(run_client(hub, SCRIPT, folder / "work", timeout=300))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_index_of_principal_components_answers_from_the_hub_as_from_the_disk(seen, dtype):
    assert seen[f"largest {dtype}"] > 0
    assert seen[f"fetched {dtype}"]


def test_an_index_of_principal_components_is_read_in_parts(seen):
    assert seen["streamed"]
    assert seen["words"]


def test_an_index_of_principal_components_that_did_not_change_is_not_pushed_again(seen):
    assert seen["pushed again"]
