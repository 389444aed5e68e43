"""The Hub of the tests is one: unmodified clients work against it, it refuses what the real one refuses, faults happen."""

import hashlib
import http.client
import json
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest

from tests.hub import HubServer, last_json, run_client, start_client
from tests.hub.store import git_oid

SCRIPT = Path(__file__).parent / "hub_client_script.py"
REPO = "doge/mixture"


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Clients at work, each against a Hub of its own; all at once, for they wait a lot."""
    running = {}
    for name in ("hub", "datasets", "xet"):
        folder = tmp_path_factory.mktemp(name)
        # small pages, so that listings have several
        hub = HubServer(folder / "state", page_size=3).start()
        client = start_client(hub, SCRIPT, name, hub.url, folder, xet=name == "xet", home=folder / "home")
        running[name] = hub, client, folder
    yield running
    for hub, client, _ in running.values():
        client.kill()
        client.communicate()
        hub.stop()


def facts_of(session):
    """What a client found, when it is done."""
    _, client, _ = session
    output, errors = client.communicate(timeout=120)
    assert client.returncode == 0, errors[-6000:]
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def facts(sessions):
    """What the calls of huggingface_hub gave."""
    return facts_of(sessions["hub"])


@pytest.fixture(scope="module")
def plain_hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("plain") / "state") as hub:
        yield hub


@pytest.fixture
def hub(plain_hub):
    plain_hub.reset()
    return plain_hub


HUB_ASKS_FOR_THE_TRANSFER = huggingface_hub.__version__.startswith("1.")  # xet or git-lfs


def ask(hub, method, target, body=None, *, token="", headers=None):
    """One plain request: status, headers, body."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=20)
    given = {"Authorization": f"Bearer {token or hub.token}", **(headers or {})}
    try:
        connection.request(method, target, body, given)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def error_of(fact, *, status, text, name="HfHubHTTPError"):
    assert (fact["class"], fact["status"]) == (name, status), fact
    assert text in fact["text"]


# huggingface_hub


def test_a_repository_is_created_once(facts):
    push = facts["push"]
    assert push["user"] == "doge"
    assert push["url"] == push["exist_ok"]
    assert push["url"].endswith("/datasets/doge/mixture")
    error_of(push["again"], status=409, text="You already created this dataset repo")


def test_a_push_is_preupload_storage_and_one_commit(facts):
    repository = f"/api/datasets/{REPO}"
    assert facts["push"]["push"] == [
        f"POST {repository}/preupload/main",
        f"POST /datasets/{REPO}.git/info/lfs/objects/batch",
        "PUT /lfs/{sha256}",
        f"POST /datasets/{REPO}.git/info/lfs/objects/verify",
        f"POST {repository}/commit/main",
    ]
    assert facts["push"]["uploaded"] == 2**20


def test_a_commit_on_another_parent_is_refused(facts):
    error_of(facts["push"]["stale"], status=412, text="A commit has happened since")


def test_known_content_is_not_uploaded_and_no_change_makes_no_commit(facts):
    assert facts["push"]["uploaded_again"] == 0
    assert facts["push"]["unchanged"] == [True, 0]


def test_files_are_read_as_they_were_pushed(facts):
    push = facts["push"]
    large = {"data/large.bin": 2**20, "data/copy.bin": 2**20}
    push["snapshot"].pop(".gitattributes")
    assert push["snapshot"] == {"notes.txt": 9, "data/small.json": 2, **large}
    assert push["same"]
    assert push["offline"]
    assert push["old"] == "old"
    assert Path(push["downloaded_to"]).read_text() == "one line\n"
    digest = hashlib.sha256(bytes(range(256)) * 4096).hexdigest()
    assert push["metadata"] == [True, 2**20, digest]


def test_listings_have_pages(facts):
    push = facts["push"]
    assert push["tree"] == [[".gitattributes", "RepoFile"], ["data", "RepoFolder"], ["notes.txt", "RepoFile"]]
    assert push["paths"] == ["data", "data/large.bin"]
    # more than the three entries of a page
    assert push["commits"] == ["Known content", "Several", "Upload notes.txt with huggingface_hub", "initial commit"]


def test_the_file_system_globs_and_reads_ranges_and_the_storage_sees_no_token(facts):
    push = facts["push"]
    assert push["glob"] == [f"datasets/{REPO}/data/{name}.bin" for name in ("copy", "large")]
    assert push["streamed"]
    assert push["piece"]
    assert push["ranged"] == ["bytes=100000-104999", 5000, False]


def test_branches_tags_and_pull_requests(facts):
    branches = facts["branches"]
    error_of(branches["branch_again"], status=409, text="Reference already exists")
    error_of(branches["tag_again"], status=409, text="Tag reference exists already")
    assert "wide/w.txt" in branches["at_tag"]
    error_of(branches["stranger"], status=403, text="create_pr=1")
    assert branches["pr"] == [1, "refs/pr/1"]
    assert branches["refs"] == [["main", "wide"], ["v1/a"], ["1"]]
    assert branches["merged"] == "merged"
    assert {"theirs.bin", "m.txt"} < set(branches["after_merge"])
    assert branches["refs_left"] == ["refs/heads/main", "refs/pr/1"]


def test_cards_are_parsed_and_refused(facts):
    cards = facts["cards"]
    assert cards["pretty_name"] == cards["info"]["pretty_name"] == "yes: 1e3"
    assert cards["tags"] == ["doge", "license:mit", "size_categories:n<1K"]
    assert cards["found"] == [REPO]
    for fact in (cards["invalid"], cards["pushed_invalid"]):
        error_of(fact, status=None, text="not-a-license", name="ValueError")
    error_of(cards["no_yaml"], status=None, text="YAML Metadata Error", name="ValueError")


def test_rights_are_those_of_the_hub(facts):
    rights = facts["rights"]
    assert rights["reader_reads"] == rights["public_now"] == [".gitattributes", "s.txt"]
    error_of(rights["reader_writes"], status=403, text="you must use a write token")
    error_of(rights["reader_creates"], status=403, text="You don't have the rights to create")
    error_of(rights["stranger_creates"], status=403, text='namespace "doge"')
    error_of(rights["nobody_writes"], status=401, text="Invalid username or password")
    error_of(rights["bad_token"], status=401, text="Invalid user token")
    error_of(rights["bad_token_reads"], status=401, text="Invalid credentials in Authorization header")
    missing = {"name": "RepositoryNotFoundError", "text": "Repository Not Found"}
    for name in ("stranger_reads_private", "other_type", "no_repository", "deleted"):
        error_of(rights[name], status=404, **missing)
    error_of(rights["nobody_reads_private"], status=401, **missing)
    error_of(rights["no_revision"], status=404, text="Invalid rev id: none", name="RevisionNotFoundError")
    error_of(rights["no_file"], status=404, text="Entry Not Found", name="RemoteEntryNotFoundError")
    error_of(rights["gated"], status=403, text="is restricted", name="GatedRepoError")
    assert rights["organization"].endswith("/datasets/doge-lab/shared")


def test_clients_meet_the_faults(facts):
    faults = facts["faults"]
    error_of(faults["commit_503"], status=503, text="Injected fault")
    error_of(faults["commit_cut"], status=None, text="reset", name="ReadError")
    error_of(faults["commit_lost"], status=None, text="reset", name="ReadError")
    assert faults["after_lost"] == faults["before_lost"] + 1
    error_of(faults["commit_race"], status=412, text="A commit has happened since")
    assert faults["download_completed"]


# datasets and transformers


def test_datasets_and_models_are_pushed_and_loaded(sessions):
    facts = facts_of(sessions["datasets"])
    assert facts["weights"] == {"domain": ["a", "b"], "weight": [0.25, 0.75]}
    assert (facts["trajectory"], facts["trajectory_before"]) == (1, 100)
    assert facts["streamed"] == [{"domain": "a", "weight": 0.25}, {"domain": "b", "weight": 0.75}]
    assert facts["model"]
    assert facts["model_commits"] == ["Upload LlamaForCausalLM", "initial commit"]
    assert not facts["storage_saw_a_token"]


# xet, by an unmodified hf_xet


@pytest.fixture(scope="module")
def xet_facts(sessions):
    return facts_of(sessions["xet"])


def test_xet_uploads_xorbs_and_a_shard(xet_facts):
    steps = [name for name, status in xet_facts["push"] if status == 200]
    if HUB_ASKS_FOR_THE_TRANSFER:
        assert steps.pop(1) == "POST /datasets/doge/xet.git/info/lfs/objects/batch"
    assert steps == [
        "POST /api/datasets/doge/xet/preupload/main",
        "GET /api/datasets/doge/xet/xet-write-token/main",
        "POST /v1/xorbs/default/{sha256}",
        "POST /v1/shards",
        "POST /api/datasets/doge/xet/commit/main",
    ]
    # noise as it is, the text next to nothing
    assert 1_500_000 < xet_facts["uploaded"] < 1_500_000 + 800_000
    assert not xet_facts["hub_token_went_to_storage"]
    assert xet_facts["uploaded_of_change"] < 400_000


def test_xet_gives_back_what_was_pushed_also_through_faults(xet_facts):
    assert xet_facts["same"] == {"noise.bin": True, "walk.bin": True, "text.bin": True}
    assert xet_facts["download_faults"] == ["status=503", "cut=body"]
    assert xet_facts["plain_downloads"] == 0
    assert xet_facts["old"]
    assert xet_facts["by_http"]


def test_xet_retries_and_refuses(xet_facts):
    assert xet_facts["retried"] == [1, 1, True]
    error_of(xet_facts["refused"], status=None, text="403 Forbidden", name="ConnectionError")
    error_of(xet_facts["reader"], status=403, text="you must use a write token")
    uploads = [f"Upload {name}.bin with huggingface_hub" for name in ("retried", "noise")]
    assert xet_facts["commits"] == [*uploads, "First", "initial commit"]


@pytest.mark.usefixtures("xet_facts")
def test_xet_knows_a_content_from_another_machine(sessions, tmp_path):
    hub, _, _ = sessions["xet"]
    client = run_client(hub, SCRIPT, "other_machine", hub.url, tmp_path, xet=True, home=tmp_path / "home")
    facts = last_json(client)
    assert facts["same"]
    assert facts["uploaded"] < 150_000, "two chunks have changed since"


# Faults, one by one


def commit_body(path="a.txt", content="YQ==", **header):
    lines = [
        {"key": "header", "value": {"summary": "s", **header}},
        {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}},
    ]
    return "\n".join(map(json.dumps, lines)).encode()


COMMIT = f"/api/datasets/{REPO}/commit/main"


@pytest.fixture
def repository(hub):
    hub.create(REPO)
    hub.clear_log()
    return hub


def test_a_status_is_answered_in_place_and_nothing_is_done(repository):
    hub = repository
    fault = hub.fail("POST", "/commit/", nth=2, times=2, status=429, retry_after=2, code="Busy", message="Slow down")
    seen = [ask(hub, "POST", COMMIT, commit_body(f"{number}.txt")) for number in range(4)]
    assert [status for status, _, _ in seen] == [200, 429, 429, 200]
    assert (seen[1][1]["Retry-After"], seen[1][1]["X-Error-Code"]) == ("2", "Busy")
    assert json.loads(seen[1][2])["error"] == "Slow down"
    assert hub.hits(fault) == 2
    assert {"0.txt", "3.txt"} == hub.files(REPO).keys() - {".gitattributes"}
    assert [one.fault for one in hub.requests()] == [None, "status=429", "status=429", None]


def test_a_fault_can_be_ordered_for_requests_like_one_that_was_seen(repository):
    hub = repository
    commit, digest = hub.commits(REPO)[0]["id"], "ab" * 32
    for target in (COMMIT, f"/api/datasets/{REPO}/revision/{commit}?blobs=true", f"/x/{digest}"):
        ask(hub, "GET", target)
    names = [one.name for one in hub.requests()]
    assert names == [f"GET {COMMIT}", f"GET /api/datasets/{REPO}/revision/{{commit}}", "GET /x/{sha256}"]
    for seen in hub.requests():
        hub.fail(seen.method, seen.pattern, status=418)
    for target in (COMMIT, f"/api/datasets/{REPO}/revision/{commit[::-1]}?blobs=true", f"/x/{digest[::-1]}"):
        assert ask(hub, "GET", target)[0] == 418
        assert ask(hub, "GET", f"{target.split('?')[0]}0")[0] != 418


@pytest.mark.parametrize("cut", ["before", "body"])
def test_a_connection_cut_in_the_request_does_nothing(repository, cut):
    hub = repository
    hub.fail("POST", "/commit/", cut=cut)
    with pytest.raises(ConnectionError, match=r"reset by peer|closed connection|Broken pipe"):
        ask(hub, "POST", COMMIT, commit_body())
    assert len(hub.commits(REPO)) == 1
    (request,) = hub.requests()
    assert (request.status, request.fault) == (None, f"cut={cut}")
    assert request.received == (len(commit_body()) // 2 if cut == "body" else 0)


@pytest.mark.parametrize("fault", [{"lost_reply": True}, {"cut": "reply"}], ids=str)
def test_a_lost_reply_is_of_a_request_that_was_done(repository, fault):
    hub = repository
    hub.fail("POST", "/commit/", **fault)
    with pytest.raises(
        (ConnectionError, http.client.IncompleteRead), match=r"reset by peer|closed connection|IncompleteRead"
    ):
        ask(hub, "POST", COMMIT, commit_body())
    assert len(hub.commits(REPO)) == 2
    assert hub.requests()[0].status == 200


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_cut_answer_ends_in_the_middle(repository, reset):
    hub = repository
    target = f"/datasets/{REPO}/resolve/main/.gitattributes"
    size = len(hub.files(REPO)[".gitattributes"])
    hub.fail("GET", "/resolve/", cut="body", reset=reset)
    error, message = (
        (ConnectionResetError, "reset by peer") if reset else (http.client.IncompleteRead, f"{size // 2} bytes")
    )
    with pytest.raises(error, match=message):
        ask(hub, "GET", target)
    assert hub.bytes_sent("/resolve/") == size // 2
    assert len(ask(hub, "GET", target)[2]) == size


def test_a_body_can_be_spoiled_and_an_answer_delayed(repository):
    hub = repository
    target = f"/datasets/{REPO}/resolve/main/.gitattributes"
    hub.fail("*", "/resolve/", corrupt=True, delay=0.2)
    start = time.monotonic()
    spoiled = ask(hub, "GET", target)[2]
    assert time.monotonic() - start >= 0.2
    assert bytes(255 - byte for byte in spoiled) == hub.files(REPO)[".gitattributes"]


def test_a_commit_can_come_between(repository):
    hub = repository
    parent = hub.commits(REPO)[0]["id"]
    hub.fail("POST", "/commit/", other_commit={"repo_id": REPO, "files": {"theirs.txt": "t", ".gitattributes": None}})
    assert ask(hub, "POST", COMMIT, commit_body(parentCommit=parent))[0] == 412
    assert hub.files(REPO) == {"theirs.txt": b"t"}


@pytest.mark.parametrize("hold", ["before", "after"])
def test_a_request_can_be_held(repository, hold):
    hub = repository
    fault = hub.fail("POST", "/commit/", hold=hold)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(hub, "POST", COMMIT, commit_body())[0]))
    thread.start()
    hub.wait_for(lambda: hub.hits(fault))
    if hold == "after":
        hub.wait_for(lambda: len(hub.commits(REPO)) == 2)
    assert len(hub.commits(REPO)) == (1 if hold == "before" else 2)
    assert answers == []
    hub.release(fault)
    thread.join()
    assert answers == [200]


# What is kept


def upload_link(hub, content):
    digest = hashlib.sha256(content).hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": digest, "size": len(content)}], "ref": {"name": "main"}}
    body = json.dumps(batch)
    (answer,) = json.loads(ask(hub, "POST", f"/datasets/{REPO}.git/info/lfs/objects/batch", body)[2])["objects"]
    return digest, answer["actions"]["upload"]["href"].removeprefix(hub.storage_url)


def put(hub, target, content):
    connection = http.client.HTTPConnection(hub.storage_url.removeprefix("http://"), timeout=20)
    connection.request("PUT", target, content)
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_storage_takes_signed_links_and_the_right_content_only(repository):
    hub = repository
    digest, target = upload_link(hub, b"\0content")
    assert put(hub, target.replace("Signature=", "Signature=0"), b"\0content") == 403
    assert put(hub, target, b"\0another") == 400
    pointer = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": digest, "size": 8}}
    header = {"key": "header", "value": {"summary": "s"}}
    body = "\n".join(map(json.dumps, (header, pointer)))
    assert ask(hub, "POST", COMMIT, body)[0] == 400
    assert put(hub, target, b"\0content") == 200
    assert hub.objects() == [digest]
    assert ask(hub, "POST", COMMIT, body)[0] == 200
    assert hub.files(REPO)["a.bin"] == b"\0content"


def test_a_commit_is_all_or_nothing(repository):
    hub = repository
    for bad in (
        commit_body("../out"),
        commit_body("a/.git/x"),
        commit_body(".gitattributes/x"),
        commit_body("b", "AA=="),
    ):
        assert ask(hub, "POST", COMMIT, commit_body("good.txt") + b"\n" + bad.splitlines()[1])[0] == 400
    assert len(hub.commits(REPO)) == 1
    assert hub.commits(REPO)[0]["files"].keys() == {".gitattributes"}


def test_a_killed_hub_comes_back_with_all_it_had(repository):
    hub = repository
    assert ask(hub, "POST", COMMIT, commit_body())[0] == 200
    digest, target = upload_link(hub, b"\0content")
    before = hub.commits(REPO), hub.repository(REPO)
    hub.restart()
    assert (hub.commits(REPO), hub.repository(REPO)) == before
    assert put(hub, target, b"\0content") == 200
    assert hub.objects() == [digest]
    oid = hub.commits(REPO)[0]["files"]["a.txt"]["oid"]
    assert oid == git_oid(b"a") == "2e65efe2a145dda7ee51d1741299f848e5bf752e"


def test_a_client_killed_in_a_request_leaves_nothing(repository):
    hub = repository
    held = hub.fail("POST", "/commit/", hold="before")
    request = f"u.Request({hub.url + COMMIT!r}, {commit_body()!r}, {{'Authorization': 'Bearer {hub.token}'}})"
    client = start_client(hub, f"import urllib.request as u; u.urlopen({request})")
    hub.wait_for(lambda: hub.hits(held))
    client.kill()
    client.communicate()
    hub.release(held)
    hub.wait_for(lambda: hub.requests()[0].seconds is not None)
    assert len(hub.commits(REPO)) == 1
    assert hub.requests()[0].user == "doge"


def test_a_client_reaches_nothing_else(hub):
    script = "import urllib.request as u; u.urlopen('http://example.com', timeout=5)"
    failed = run_client(hub, script, check=False)
    assert failed.returncode == 1
    assert "Connection refused" in failed.stderr
