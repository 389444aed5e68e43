"""A push ends with one new commit and the right bytes, or with a clear error and nothing changed: at every request, for every fault."""

import json
import time
from pathlib import Path

import huggingface_hub
import pytest

from tests.hub.handle import HubServer, last_json, run_client

SCRIPT = Path(__file__).with_name("push_faults_script.py")

# The requests of a push, as method and pattern.
REQUESTS = {
    "look for the repository": ("GET", "/api/datasets/{repo}$", {}),
    "make the repository": ("POST", "/api/repos/create", {"first": True}),
    "read the head": ("GET", "/api/datasets/{repo}$", {"nth": 2}),
    "read the tree": ("GET", "{repo}/tree/", {}),
    "ask for the manifest": ("HEAD", "{repo}/resolve/.*/artifact.json", {}),
    "read the manifest": ("GET", "{repo}/resolve/.*/artifact.json", {}),
    "read the card": ("GET", "{repo}/resolve/.*/README.md", {}),
    "ask how to upload": ("POST", "{repo}/preupload/", {}),
    "ask where to upload": ("POST", "{repo}.git/info/lfs/objects/batch", {}),
    "upload": ("PUT", "/lfs/{large}", {}),
    "verify the upload": ("POST", "{repo}.git/info/lfs/objects/verify", {}),
    "commit": ("POST", "{repo}/commit/", {}),
}
FAULTS = {
    "503": {"status": 503},
    "429, Retry-After 1 s": {"status": 429, "retry_after": 1},
    "cut before": {"cut": "before"},
    "cut in the body": {"cut": "body"},
    "answer lost": {"lost_reply": True},
}
# Those of a push with a tag that come before and after its commit.
TAG_REQUESTS = {
    "look for the tag": ("GET", "{repo}/refs", {}),
    "look for the tag after the commit": ("GET", "{repo}/refs", {"nth": 2}),
    "make the tag": ("POST", "{repo}/tag/", {}),
}
AFTER_THE_COMMIT = ["look for the tag after the commit", "make the tag"]
OF_THE_STORE = ["upload"]
EXTRA = [
    *((request, "404", {"status": 404}) for request in [*REQUESTS, *TAG_REQUESTS]),
    *((request, "403", {"status": 403}) for request in [*REQUESTS, *TAG_REQUESTS]),
    *((request, "503 for good", {"status": 503, "times": 5}) for request in TAG_REQUESTS),
    ("make the tag", "answer lost to the last try", {"lost_reply": True, "tries": 0}),
    ("commit", "412, somebody else was quicker", {"other_commit": {}}),
    ("commit", "409", {"status": 409}),
    ("commit", "503 for good", {"status": 503, "times": 4}),
    ("commit", "answer lost to the last try", {"lost_reply": True, "tries": 0}),
    ("commit", "500, three times", {"status": 500, "times": 3}),
    ("commit", "answer lost, three times", {"lost_reply": True, "times": 3}),
    ("commit", "400", {"status": 400}),
    ("commit", "Retry-After 1 h", {"status": 429, "retry_after": 3600}),
    ("upload", "403 for good", {"status": 403, "times": 4}),
    ("read the tree", "401", {"status": 401}),
]
# By xet, which brings the chunks of files to a store of their own; its client tries again by itself.
XET_REQUESTS = {
    "ask for the store": ("GET", "{repo}/xet-write-token/"),
    "upload chunks": ("POST", "/v1/xorbs/"),
    "register the files": ("POST", "/v1/shards"),
    "commit": ("POST", "{repo}/commit/"),
}
XET_CASES = [
    (request, name, FAULTS[name])
    for request, names in (
        ("ask for the store", ["503", "cut before"]),
        ("upload chunks", ["503", "cut in the body", "answer lost"]),
        ("register the files", ["503", "answer lost"]),
        ("commit", ["503", "answer lost"]),
    )
    for name in names
    # huggingface_hub 1 remembers the answer of the push before
    if request != "ask for the store" or not huggingface_hub.__version__.startswith("1.")
]
FAILS = {
    "503 for good": "PushError",
    "403 for good": "PushError",
    "Retry-After 1 h": "PushError",
    "403": "PermissionError",
    "401": "PermissionError",
    "404": "FileNotFoundError",
    "400": "ValueError",
}


def scenario(request, fault):
    method, pattern, more = (REQUESTS | TAG_REQUESTS)[request]
    first = more.get("first", False)
    nth = {"nth": more["nth"]} if "nth" in more else {}
    return {"method": method, "pattern": pattern, "first": first, "alone": first, "tag": request in TAG_REQUESTS} | {
        "fault": {**nth, **fault}
    }


def xet_scenario(request, fault):
    method, pattern = XET_REQUESTS[request]
    return {
        "method": method,
        "pattern": pattern,
        "first": False,
        "alone": "{repo}" not in pattern,
        "tag": False,
        "fault": fault,
    }


CASES = [(request, name, fault) for request in [*REQUESTS, *TAG_REQUESTS] for name, fault in FAULTS.items()] + EXTRA


def push_into_trouble(folder, cases, scenarios, *, xet):
    """Outcome by request and fault, after a table of them; and what came of the stories."""
    file = folder / "scenarios.json"
    file.write_text(json.dumps(scenarios))
    started = time.monotonic()
    with HubServer(folder / "hub") as hub:
        stories = [] if xet else ["--stories"]
        told = last_json(run_client(hub, SCRIPT, file, *stories, timeout=240, xet=xet))
    found = told["outcomes"]
    print(f"\n{len(cases)} pushes into trouble in {time.monotonic() - started:.0f} s{', by xet' if xet else ''}")
    print(f"{'request':<26}{'fault':<34}{'ended with':<18}{'commits':>8}{'hits':>6}")
    for (request, fault, _), outcome in zip(cases, found, strict=True):
        ended = outcome["error"] or "the commit"
        print(f"{request:<26}{fault:<34}{ended:<18}{outcome['new_commits']:>8}{outcome['hits']:>6}")
    return dict(zip([(request, fault) for request, fault, _ in cases], found, strict=True)), told["stories"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    scenarios = [scenario(request, fault) for request, _, fault in CASES]
    return push_into_trouble(tmp_path_factory.mktemp("faults"), CASES, scenarios, xet=False)


@pytest.fixture(scope="module")
def outcomes(told):
    return told[0]


@pytest.fixture(scope="module")
def stories(told):
    return told[1]


@pytest.fixture(scope="module")
def xet_outcomes(tmp_path_factory):
    scenarios = [xet_scenario(request, fault) for request, _, fault in XET_CASES]
    return push_into_trouble(tmp_path_factory.mktemp("xet"), XET_CASES, scenarios, xet=True)[0]


def check_outcome(outcome, request, fault):
    assert outcome["hits"] > 0, "the fault never met a request"
    assert outcome["right"], outcome
    assert outcome["new_commits"] == 1, outcome
    assert outcome["others_kept"], outcome
    assert outcome["is_tagged"], outcome
    assert outcome["repeat_commits"] == 0, outcome
    assert outcome["repeat_is_head"], outcome
    renewed = request in OF_THE_STORE and fault in ("403", "404")  # an address that the store signed has expired
    assert outcome["error"] == (None if renewed else FAILS.get(fault)), outcome
    if outcome["error"] is None:
        assert outcome["is_head"], outcome
    elif request in AFTER_THE_COMMIT:
        assert outcome["committed"], outcome
        assert "The artifact is there" in outcome["message"], outcome
        assert "tag 'v2'" in outcome["message"], outcome
        assert "as it was" not in outcome["message"], outcome
    else:
        assert outcome["untouched"] in (True, None), outcome
        assert "is there" not in outcome["message"], outcome
    if outcome["error"] == "FileNotFoundError":
        assert "doge/scenario-" in outcome["message"], outcome


@pytest.mark.parametrize(("request_name", "fault"), [case[:2] for case in CASES], ids=lambda part: part)
def test_a_push_commits_once_or_changes_nothing_and_then_completes(outcomes, request_name, fault):
    check_outcome(outcomes[request_name, fault], request_name, fault)


@pytest.mark.parametrize(("request_name", "fault"), [case[:2] for case in XET_CASES], ids=lambda part: part)
def test_a_push_by_xet_commits_once_or_changes_nothing_and_then_completes(xet_outcomes, request_name, fault):
    check_outcome(xet_outcomes[request_name, fault], request_name, fault)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_tag_that_somebody_else_makes_meanwhile_on_other_content_is_not_taken_for_ours(stories, moment):
    outcome = stories[f"a tag made {moment} we look, before"]
    assert outcome["error"] == "FileExistsError"
    assert "The artifact is there" in outcome["message"]
    assert outcome["committed"]
    assert outcome["tag stays"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_tag_that_somebody_else_makes_meanwhile_on_our_commit_is_ours(stories, moment):
    outcome = stories[f"a tag made {moment} we look, ours"]
    assert outcome["error"] is None
    assert outcome["tag stays"]


def test_the_same_content_may_have_the_same_tag_again_and_other_content_may_not(stories):
    story = stories["a tag again"]
    assert story["same"]["error"] is None
    assert story["back"]["error"] is None
    assert story["other"]["error"] == "FileExistsError"
    assert "Nothing was pushed" in story["other"]["message"]
    assert story["tag stays"]


def test_a_tag_is_on_the_commit_that_was_made_whatever_the_branch(stories):
    story = stories["a tag on a branch"]
    refs = story["refs"]
    assert refs["refs/tags/v2"] == refs["refs/heads/draft"] == story["made"]
    assert refs["refs/heads/main"] != story["made"]


def test_what_a_person_wrote_into_the_card_while_we_pushed_is_kept(stories):
    assert "Notes of a person" in stories["an edit meanwhile"]["card"]
    assert stories["an edit meanwhile"]["line"], "each commit must be made on the one before"


def test_a_push_leaves_nothing_in_the_cache(stories):
    assert stories["cached"] == []
