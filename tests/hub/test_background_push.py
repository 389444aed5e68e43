"""An index is pushed while training goes on; what goes wrong with that stops no training, is told, and can be repeated."""

import json
import threading
import warnings

import pytest

from hf_doge.tracing.background_push import BackgroundPush
from hf_doge.tracing.callback import TracInWECallback
from tests.artifacts.influence_rows import random_rows, write_index
from tests.hub.handle import HubServer, last_json, run_client

TRAINING = """
import json, sys, warnings
from pathlib import Path
from tests.hub.hub_processes_script import record
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    try:
        record(Path(sys.argv[1]))
        error = None
    except Exception as problem:
        error = [type(problem).__name__, str(problem)]
print(json.dumps({"error": error, "told": [str(one.message) for one in caught if "not pushed" in str(one.message)]}))
"""


def test_requests_during_a_push_become_one_more_push():
    started, go_on, pushes = threading.Event(), threading.Event(), []

    def push():
        pushes.append(len(pushes))
        started.set()
        go_on.wait(10)

    background = BackgroundPush(push, advice="")
    background.request()
    started.wait(10)
    for _ in range(5):
        background.request()
    go_on.set()
    background.finish()
    assert pushes == [0, 1]


def test_a_push_that_failed_is_told_at_the_end_and_one_that_mended_it_is_not():
    outcomes = iter([OSError("the cable is cut"), None])

    def push():
        error = next(outcomes)
        if error is not None:
            raise error

    background = BackgroundPush(push, advice="Push it again.")
    background.request()
    with pytest.warns(UserWarning, match=r"not pushed: the cable is cut It is whole on disk. Push it again."):
        background.finish()
    background.request()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        background.finish()


def test_a_panic_of_native_code_is_told_too_and_nobody_waits_for_ever():
    class Panic(BaseException):
        pass

    def push():
        raise Panic("the chunk was poisoned")

    background = BackgroundPush(push, advice="Push it again.")
    background.request()
    with pytest.warns(UserWarning, match="not pushed: the chunk was poisoned"):
        background.finish()


def test_redaction_without_a_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`hub_index_id` is None"):
        TracInWECallback(tmp_path, redact_text=True)


def test_a_failing_push_never_stops_a_training_and_is_repeated_from_the_shell(tmp_path):
    with HubServer(tmp_path / "state") as hub:
        hub.fail("POST", "/commit/", times=None, status=403, message="The wind is against us")
        seen = last_json(run_client(hub, TRAINING, tmp_path / "client"))
        assert seen["error"] is None
        (told,) = seen["told"]
        assert "The wind is against us" in told
        assert (
            f"InfluenceIndex.from_pretrained({str(tmp_path / 'client' / 'index')!r}).push_to_hub('doge/traced')"
            in told
        )
        assert len(hub.commits("doge/traced")) == 1
        hub.clear_faults()
        push = "import sys\nfrom hf_doge.cli import main\nsys.exit(main(['push', *sys.argv[1:], '--tag', 'v1']))"
        result = run_client(hub, push, tmp_path / "client" / "index", "doge/traced", xet=True)
        assert hub.commits("doge/traced")[0]["id"] in result.stdout
        assert hub.repository("doge/traced")["refs"]["refs/tags/v1"] == hub.commits("doge/traced")[0]["id"]
        config = json.loads(hub.files("doge/traced")["config.json"])
        assert len(config["checkpoints"]) == 2


def test_a_token_that_may_not_push_is_told_before_the_training(tmp_path):
    with HubServer(tmp_path / "state") as hub:
        seen = last_json(run_client(hub, TRAINING, tmp_path / "client", token=hub.read_token))
        assert seen["error"][0] == "PermissionError"
        assert "may not push to the dataset repository 'doge/traced'" in seen["error"][1]
        assert not (tmp_path / "client" / "run" / "checkpoint-1").exists()


def test_that_texts_would_go_where_there_were_none_is_told_before_the_training(tmp_path):
    with HubServer(tmp_path / "state") as hub:
        folder = write_index(tmp_path / "index", random_rows(5))
        config = json.loads((folder / "config.json").read_text())
        hub.create("doge/traced")
        hub.commit("doge/traced", {"config.json": json.dumps({**config, "redacted": True})})
        seen = last_json(run_client(hub, TRAINING, tmp_path / "client"))
        assert seen["error"][0] == "PermissionError"
        assert "published without the texts" in seen["error"][1]
        assert not (tmp_path / "client" / "run" / "checkpoint-1").exists()
