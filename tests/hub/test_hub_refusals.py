"""What cannot be pushed or read is refused at once, in words that say what to do, and nothing is lost by it."""

from pathlib import Path

import pytest
from huggingface_hub import _snapshot_download

from tests.hub.handle import HubServer, last_json, run_client

SCRIPT = Path(__file__).with_name("hub_refusals_script.py")
# Older versions read the names of a small repository's files from its description, and ask for no tree.
TREE = [] if hasattr(_snapshot_download, "LARGE_REPO_THRESHOLD") else [("GET", "tree")]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "state") as hub:
        errors = last_json(run_client(hub, SCRIPT, tmp_path_factory.mktemp("client")))
        errors["tokens that are told"] = [
            text for _, text in filter(None, errors.values()) if hub.read_token in text or hub.token in text
        ]
        yield errors


@pytest.mark.parametrize(
    ("attempt", "kind", "words"),
    [
        ("no token", "PermissionError", ["needs an access token", "hf auth login"]),
        ("unknown token", "PermissionError", ["does not know the access token", "hf auth login"]),
        ("read-only token", "PermissionError", ["may not push to", "*write* role"]),
        ("empty token", "ValueError", ["must be one word", "settings/tokens"]),
        ("token with a line break", "ValueError", ["must be one word", "line breaks"]),
        ("no name", "ValueError", ["named like 'user/name'", "None"]),
        ("branch of no name", "ValueError", ["`revision` must be a name that git allows", "''"]),
        ("tag with a space", "ValueError", ["`tag` must be a name that git allows", "'v 1'"]),
        ("proposal to a branch", "ValueError", ["made to `main`", "'wide'"]),
        ("push to a tag", "FileNotFoundError", ["`revision` must be a branch", "tags and commits"]),
        ("not ours", "PermissionError", ["may not push to", "'stranger/refused'", "a name of your own"]),
        ("bad name", "ValueError", ["named like 'user/name'", "'doge/a name/of three parts'"]),
        ("a number for a name", "ValueError", ["named like 'user/name'", "5"]),
        ("name with controls", "ValueError", ["named like 'user/name'", r"'doge/x\x1b[2J'", r"'doge/x\u001b[2J'"]),
        ("branch like a commit", "ValueError", ["`revision` must not look like a commit"]),
        ("tag like a commit", "ValueError", ["`tag` must not look like a commit"]),
        ("model of no name", "ValueError", ["`model_id` must be like 'user/name'"]),
        ("tag of a proposal", "ValueError", ["cannot be tagged before it is merged"]),
        ("something else", "FileExistsError", ["must be new or hold an artifact", "cats.parquet", "another name"]),
        ("weights over an index", "FileExistsError", ["no domain_weights.json", "config.json"]),
        ("index over weights", "FileExistsError", ["no config.json", "domain_weights.json"]),
        ("tag is taken", "FileExistsError", ["a tag 'v1' already", "Nothing was pushed"]),
        ("tag alone fails", "PushError", ["artifact is there, but without its tag 'v1'", "Push again"]),
        *(
            (
                f"texts over none{way}",
                "PermissionError",
                ["'doge/without-texts'", "without the texts", "`publish_text=True`"],
            )
            for way in ("", " on a branch", " as a proposal", " from the shell", " in training")
        ),
        ("over a newer format", "FileExistsError", ["format 2.0", "pip install -U hf-doge"]),
        ("a token inside", "ValueError", ["looks like an access token", "not pushed"]),
        (
            "a token in the title",
            "ValueError",
            ["`commit_message` must not hold an access token"],
        ),
        ("a token in the description", "ValueError", ["`commit_description` must not hold an access token"]),
        ("a token for a tag", "ValueError", ["`tag` must not hold an access token"]),
        ("a token for a branch", "ValueError", ["`revision` must not hold an access token"]),
        ("a token for a name", "ValueError", ["`repo_id` must not hold an access token"]),
        (
            "gone is fetched again",
            "FileNotFoundError",
            ["must be a folder or a dataset repository", "your token can see"],
        ),
        ("closed is fetched again", "PermissionError", ["does not know the access token"]),
        ("a path that leaves", "ValueError", ["must stay within the repository", "'../m'"]),
        ("columns without redaction", "ValueError", ["goes with `redact_text=True`"]),
        ("unknown columns", "ValueError", ["must be among ['example_id', 'text']", "'nothing'"]),
        ("nothing there", "FileNotFoundError", ["must be a folder or a dataset repository", "hf auth login"]),
        ("a model", "FileNotFoundError", ["A repository of a model is none"]),
        ("private", "FileNotFoundError", ["your token can see", "HF_TOKEN"]),
        ("unknown revision", "FileNotFoundError", ["no such branch, tag or commit", "v9"]),
        ("token with a line break reads", "ValueError", ["must be one word"]),
        ("revision that leads elsewhere", "ValueError", ["`revision` must be a name that git allows", "'..'"]),
        ("unknown token fetches again", "PermissionError", ["does not know the access token"]),
        ("unknown token reads", "PermissionError", ["does not know the access token"]),
        ("an index read as weights", "FileNotFoundError", ["must hold domain_weights.json"]),
        ("weights read as an index", "FileNotFoundError", ["must hold config.json"]),
        ("newer format", "ValueError", ["format 2.0", "pip install -U hf-doge"]),
        ("altered", "ValueError", ["altered or cut short", "sha256"]),
        ("missing file", "ValueError", ["is missing", "weights/train-00000-of-00001.parquet"]),
        ("weights off the simplex", "ValueError", ["must sum to 1"]),
        ("config leaves the folder", "ValueError", ["must lie in the folder", "../../secret.parquet"]),
        ("NaN in the trajectory", "ValueError", ["must be finite", "nan"]),
        *(
            (f"404 to {method} {request}", "FileNotFoundError", ["'doge/weights'"])
            for method, request in [("GET", "revision"), *TREE, ("HEAD", "resolve"), ("GET", "resolve")]
        ),
        ("403 to a part of a file", "PermissionError", ["'doge/weights'"]),
        ("full disk", "OSError", ["disk did not take all", "free some space"]),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(errors, attempt, kind, words):
    assert errors[attempt] is not None, "it went through"
    assert errors[attempt][0] == kind
    for part in words:
        assert part in errors[attempt][1]


@pytest.mark.parametrize(
    "attempt",
    [
        *("then tag", "same tag, same content", "unknown keys", "after it"),
        *("gone is read", "closed is read", "gone is read offline", "closed is read offline"),
        *("no texts over none", "no texts over none again", "texts over none, said"),
        *(f"address expired, {status}{part}" for status in (403, 404) for part in ("", ", hits")),
    ],
)
def test_what_can_be_is_done(errors, attempt):
    assert errors[attempt] is None


@pytest.mark.parametrize(
    ("name", "reason"), [("gone", "your token can see"), ("closed", "does not know the access token")]
)
def test_what_the_hub_refuses_is_read_from_the_cache_with_a_warning(errors, name, reason):
    kind, words = errors[f"{name} is told"]
    assert kind == "UserWarning"
    assert f"'doge/{name}' is read from the cache" in words
    assert reason in words
    assert errors[f"{name} is told offline"] is None


def test_no_message_repeats_a_token(errors):
    assert errors["tokens that are told"] == []
