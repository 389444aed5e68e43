"""
Unmodified clients against the Hub of the tests; run by test_hub_server.py, which asserts on what is printed.

Each function is one session of a user. It returns facts as JSON: what a call gave, or the class and text of its error.
"""

import json
import sys
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)

from hf_doge.artifacts.hub.errors import TransportError
from tests.hub.handle import BAD_TOKEN, OTHER_TOKEN, READ_TOKEN, HubControl, validate_card

REPO = "doge/mixture"
LARGE = bytes(range(256)) * 4096


def outcome(call, *arguments, **options):
    """The error that a call raises: its class, its status, its text."""
    try:
        call(*arguments, **options)
    except Exception as error:
        response = getattr(error, "response", None)
        status = response.status_code if response is not None else None
        return {"class": type(error).__name__, "status": status, "text": str(error)}
    return {"class": None}


def added(path, content):
    return CommitOperationAdd(path, content)


def push_and_read(api, hub, folder):
    """One user's way through all of the calls that move files."""
    facts = {"user": api.whoami()["name"], "url": str(api.create_repo(REPO, repo_type="dataset"))}
    facts["again"] = outcome(api.create_repo, REPO, repo_type="dataset")
    facts["exist_ok"] = str(api.create_repo(REPO, repo_type="dataset", exist_ok=True))
    upload = {"repo_id": REPO, "repo_type": "dataset"}
    first = api.upload_file(path_or_fileobj=b"one line\n", path_in_repo="notes.txt", **upload)
    hub.clear_log()
    operations = [added("data/large.bin", LARGE), added("data/small.json", b"{}"), added("data/old.txt", b"old")]
    second = api.create_commit(
        REPO, operations, repo_type="dataset", commit_message="Several", parent_commit=first.oid
    )
    facts["first"], facts["second"] = first.oid, second.oid
    facts["push"] = [request.name for request in hub.requests()]
    facts["uploaded"] = hub.bytes_received(server="storage")
    one = [added("late.txt", b"late")]
    stale = {"repo_type": "dataset", "commit_message": "Late", "parent_commit": first.oid}
    facts["stale"] = outcome(api.create_commit, REPO, one, **stale)

    hub.clear_log()
    third = api.create_commit(
        REPO,
        [CommitOperationDelete("data/old.txt"), added("data/copy.bin", LARGE)],
        repo_type="dataset",
        commit_message="Known content",
    )
    facts["uploaded_again"] = hub.bytes_received(server="storage")
    hub.clear_log()
    unchanged = api.upload_file(path_or_fileobj=LARGE, path_in_repo="data/copy.bin", **upload)
    facts["unchanged"] = [unchanged.oid == third.oid, len(hub.requests("POST", "/commit/"))]

    snapshot = Path(snapshot_download(REPO, repo_type="dataset"))
    facts["snapshot"] = {str(path.relative_to(snapshot)): path.stat().st_size for path in snapshot.rglob("*.*")}
    facts["same"] = (snapshot / "data/large.bin").read_bytes() == LARGE
    offline = snapshot_download(REPO, repo_type="dataset", revision=third.oid, local_files_only=True)
    facts["offline"] = Path(offline) == snapshot
    old = hf_hub_download(REPO, "data/old.txt", repo_type="dataset", revision=second.oid)
    facts["old"] = Path(old).read_text()
    metadata = get_hf_file_metadata(hf_hub_url(REPO, "data/large.bin", repo_type="dataset"))
    facts["metadata"] = [metadata.commit_hash == third.oid, metadata.size, metadata.etag]
    facts["tree"] = [[entry.path, type(entry).__name__] for entry in api.list_repo_tree(REPO, repo_type="dataset")]
    facts["paths"] = [
        one.path
        for one in api.get_paths_info(REPO, ["data", "data/large.bin", "no"], repo_type="dataset", expand=True)
    ]
    facts["commits"] = [commit.title for commit in api.list_repo_commits(REPO, repo_type="dataset")]

    system = HfFileSystem()
    facts["glob"] = sorted(system.glob(f"datasets/{REPO}/data/*.bin"))
    hub.clear_log()
    with system.open(f"datasets/{REPO}/data/large.bin", block_size=0) as stream:
        facts["streamed"] = stream.read(1000) == LARGE[:1000]
    with system.open(f"datasets/{REPO}/data/large.bin", cache_type="none") as file:
        file.seek(100_000)
        facts["piece"] = file.read(5000) == LARGE[100_000:105_000]
    ranged = hub.requests("GET", "/lfs/", server="storage")[-1]
    facts["ranged"] = [ranged.range, ranged.sent, ranged.authorization]
    facts["downloaded_to"] = str(hf_hub_download(REPO, "notes.txt", repo_type="dataset", local_dir=folder))
    return facts


def branches_and_requests(api, hub):
    """Branch, tag, pull request."""
    api.create_branch(REPO, branch="wide", repo_type="dataset")
    facts = {"branch_again": outcome(api.create_branch, REPO, branch="wide", repo_type="dataset")}
    api.create_branch(REPO, branch="wide", repo_type="dataset", exist_ok=True)
    api.upload_file(
        path_or_fileobj=b"w", path_in_repo="wide/w.txt", repo_id=REPO, repo_type="dataset", revision="wide"
    )
    api.create_tag(REPO, tag="v1/a", repo_type="dataset", tag_message="first", revision="wide")
    facts["tag_again"] = outcome(api.create_tag, REPO, tag="v1/a", repo_type="dataset")
    facts["at_tag"] = api.list_repo_files(REPO, repo_type="dataset", revision="v1/a")
    stranger = HfApi(token=OTHER_TOKEN)
    operation = [added("theirs.bin", b"\0theirs")]
    proposed = {"repo_type": "dataset", "commit_message": "Please"}
    facts["stranger"] = outcome(stranger.create_commit, REPO, operation, **proposed)
    request = stranger.create_commit(REPO, operation, create_pr=True, **proposed)
    facts["pr"] = [request.pr_num, request.pr_revision]
    api.upload_file(
        path_or_fileobj=b"m", path_in_repo="m.txt", repo_id=REPO, repo_type="dataset", revision=request.pr_revision
    )
    refs = api.list_repo_refs(REPO, repo_type="dataset", include_pull_requests=True)
    groups = (refs.branches, refs.tags, refs.pull_requests)
    facts["refs"] = [[ref.name for ref in group] for group in groups]
    api.merge_pull_request(REPO, 1, repo_type="dataset")
    facts["merged"] = api.get_discussion_details(REPO, 1, repo_type="dataset").status
    facts["after_merge"] = api.list_repo_files(REPO, repo_type="dataset")
    api.delete_tag(REPO, tag="v1/a", repo_type="dataset")
    api.delete_branch(REPO, branch="wide", repo_type="dataset")
    facts["refs_left"] = list(hub.repository(REPO)["refs"])
    return facts


def cards(api):
    """A card is validated, pushed and loaded."""
    data = DatasetCardData(license="mit", tags=["doge"], size_categories=["n<1K"], pretty_name="yes: 1e3")
    card = DatasetCard.from_template(data, template_str="---\n{{ card_data }}\n---\n\n# Mixture\n")
    validate_card(card)
    readme = {"path_in_repo": "README.md", "repo_id": REPO, "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=str(card).encode(), **readme)
    wrong = DatasetCard("---\nlicense: not-a-license\nsize_categories: [12]\n---\n")
    return {
        "pretty_name": DatasetCard.load(REPO).data.pretty_name,
        "info": api.dataset_info(REPO).card_data.to_dict(),
        "tags": api.dataset_info(REPO).tags,
        "found": [one.id for one in api.list_datasets(filter="doge")],
        "invalid": outcome(validate_card, wrong),
        "pushed_invalid": outcome(api.upload_file, path_or_fileobj=str(wrong).encode(), **readme),
        "no_yaml": outcome(api.upload_file, path_or_fileobj=b"---\na: [1\n---\n", **readme),
    }


def rights(api):
    """What readers, strangers and the nameless are told."""
    reader, stranger, nobody, bad = (HfApi(token=token) for token in (READ_TOKEN, OTHER_TOKEN, False, BAD_TOKEN))
    api.create_repo("doge/secret", repo_type="dataset", private=True)
    hidden = {"repo_id": "doge/secret", "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=b"s", path_in_repo="s.txt", **hidden)
    file = {"path_or_fileobj": b"x", "path_in_repo": "x.txt", "repo_type": "dataset"}
    facts = {
        "reader_reads": reader.list_repo_files(**hidden),
        "reader_writes": outcome(reader.upload_file, repo_id=REPO, **file),
        "reader_creates": outcome(reader.create_repo, "doge/more", repo_type="dataset"),
        "stranger_reads_private": outcome(stranger.dataset_info, "doge/secret"),
        "stranger_creates": outcome(stranger.create_repo, "doge/more", repo_type="dataset"),
        "nobody_reads_private": outcome(nobody.hf_hub_download, filename="s.txt", **hidden),
        "nobody_writes": outcome(nobody.upload_file, repo_id=REPO, **file),
        "bad_token": outcome(bad.whoami),
        "bad_token_reads": outcome(bad.dataset_info, REPO),
        "other_type": outcome(api.model_info, REPO),
        "no_repository": outcome(api.upload_file, repo_id="doge/none", **file),
        "no_revision": outcome(api.list_repo_files, REPO, repo_type="dataset", revision="none"),
        "no_file": outcome(api.hf_hub_download, REPO, "none", repo_type="dataset"),
        "bad_name": outcome(api.create_repo, "doge/a..git", repo_type="dataset"),
        "organization": str(api.create_repo("doge-lab/shared", repo_type="dataset")),
    }
    api.update_repo_settings("doge-lab/shared", repo_type="dataset", gated="auto")
    facts["gated"] = outcome(stranger.list_repo_files, "doge-lab/shared", repo_type="dataset")
    api.update_repo_settings("doge/secret", repo_type="dataset", private=False)
    facts["public_now"] = stranger.list_repo_files(**hidden)
    api.delete_repo("doge/secret", repo_type="dataset")
    facts["deleted"] = outcome(api.dataset_info, "doge/secret")
    return facts


def faults(api, hub):
    """Faults as a client meets them; those that it waits for cost a second each."""
    facts = {}
    upload = {"repo_id": REPO, "repo_type": "dataset"}
    hub.fail("POST", "/preupload/", status=429, retry_after=0)
    hub.fail("PUT", "/lfs/", status=503)
    api.upload_file(path_or_fileobj=b"\0retried", path_in_repo="retried.bin", **upload)
    hub.fail("POST", "/commit/", status=503)
    facts["commit_503"] = outcome(api.upload_file, path_or_fileobj=b"1", path_in_repo="f.txt", **upload)
    hub.fail("POST", "/commit/", cut="body")
    facts["commit_cut"] = outcome(api.upload_file, path_or_fileobj=b"2", path_in_repo="f.txt", **upload)
    facts["before_lost"] = len(hub.commits(REPO))
    hub.fail("POST", "/commit/", lost_reply=True)
    facts["commit_lost"] = outcome(api.upload_file, path_or_fileobj=b"3", path_in_repo="f.txt", **upload)
    facts["after_lost"] = len(hub.commits(REPO))
    hub.fail("POST", "/commit/", other_commit={"repo_id": REPO, "files": {"between.txt": "theirs"}})
    head = api.dataset_info(REPO).sha
    facts["commit_race"] = outcome(
        api.upload_file, path_or_fileobj=b"4", path_in_repo="f.txt", parent_commit=head, **upload
    )
    hub.fail("GET", "/lfs/", cut="body", reset=False)
    large = {"repo_id": REPO, "filename": "data/large.bin", "repo_type": "dataset", "force_download": True}
    try:
        cut = hf_hub_download(**large)
    except TransportError:  # huggingface_hub 1.3 leaves an answer that breaks off to its caller
        cut = hf_hub_download(**large)
    facts["download_completed"] = Path(cut).read_bytes() == LARGE
    hub.clear_faults()
    return facts


def hub_session(hub, folder):
    """Everything that needs huggingface_hub only."""
    api = HfApi()
    return {
        "push": push_and_read(api, hub, folder),
        "branches": branches_and_requests(api, hub),
        "cards": cards(api),
        "rights": rights(api),
        "faults": faults(api, hub),
    }


def datasets_session(hub, folder):
    """A dataset with configs is pushed and loaded, whole and streaming; then the model of the same user."""
    import torch
    from datasets import Dataset, load_dataset
    from transformers import AutoModelForCausalLM

    from tests.tiny import tiny_llama

    repo = "doge/tables"
    made = Dataset.from_dict({"domain": ["a", "b"], "weight": [0.25, 0.75]})
    made.push_to_hub(repo, config_name="weights", set_default=True)
    Dataset.from_dict({"step": list(range(100))}).push_to_hub(repo, config_name="trajectory")
    head = HfApi().dataset_info(repo).sha
    Dataset.from_dict({"step": [1]}).push_to_hub(repo, config_name="trajectory")
    facts = {
        "weights": load_dataset(repo, split="train").to_dict(),
        "trajectory": len(load_dataset(repo, "trajectory", split="train")),
        "trajectory_before": len(load_dataset(repo, "trajectory", split="train", revision=head)),
        "streamed": list(load_dataset(repo, "weights", split="train", streaming=True)),
    }
    model = tiny_llama()
    commit = model.push_to_hub("doge/model")
    hub.clear_log()
    loaded = AutoModelForCausalLM.from_pretrained("doge/model", revision=commit.oid)
    pairs = zip(model.parameters(), loaded.parameters(), strict=True)
    facts["model"] = all(torch.equal(one, other) for one, other in pairs)
    facts["model_commits"] = [one["title"] for one in hub.commits("doge/model", repo_type="model")]
    facts["storage_saw_a_token"] = any(one.authorization for one in hub.requests(server="storage"))
    return facts


def xet_session(hub, folder):
    """The same by xet: float32 (grouped by bytes), text (compressed) and noise; a change; faults."""
    import random

    import numpy as np

    api = HfApi()
    repo, kind = "doge/xet", {"repo_type": "dataset"}
    api.create_repo(repo, **kind)
    noise = random.Random(0).randbytes(1_500_001)
    walk = np.cumsum(np.random.default_rng(0).normal(size=200_000)).astype(np.float32).tobytes()
    files = {"noise.bin": noise, "walk.bin": walk, "text.bin": b"the same words again, " * 20_000}
    hub.clear_log()
    first = api.create_commit(
        repo, [added(name, content) for name, content in files.items()], commit_message="First", **kind
    )
    facts = {"push": [[one.name, one.status] for one in hub.requests()]}
    facts["uploaded"] = hub.bytes_received("/v1/xorbs/")
    facts["hub_token_went_to_storage"] = any(one.authorization for one in hub.requests(server="storage"))

    hub.clear_log()
    files["noise.bin"] = noise[:700_000] + b"inserted" + noise[700_000:]
    api.upload_file(path_or_fileobj=files["noise.bin"], path_in_repo="noise.bin", repo_id=repo, **kind)
    facts["uploaded_of_change"] = hub.bytes_received("/v1/xorbs/")

    hub.clear_log()
    hub.fail("GET", "^/xorbs/", status=503)
    hub.fail("GET", "^/xorbs/", cut="body", nth=2)
    snapshot = Path(snapshot_download(repo, **kind))
    facts["same"] = {name: (snapshot / name).read_bytes() == content for name, content in files.items()}
    facts["download_faults"] = [one.fault for one in hub.requests("GET", "^/xorbs/") if one.fault]
    facts["plain_downloads"] = len(hub.requests("GET", "^/lfs/"))
    old = hf_hub_download(repo, "noise.bin", revision=first.oid, **kind)
    facts["old"] = Path(old).read_bytes() == noise
    facts["by_http"] = HfFileSystem().cat_file(f"datasets/{repo}/walk.bin", start=1000, end=2000) == walk[1000:2000]

    fault = hub.fail("POST", "/v1/xorbs/", status=503)
    again = hub.fail("POST", "/v1/shards", lost_reply=True)
    data = random.Random(1).randbytes(100_000)
    api.upload_file(path_or_fileobj=data, path_in_repo="retried.bin", repo_id=repo, **kind)
    facts["retried"] = [hub.hits(fault), hub.hits(again), hub.files(repo)["retried.bin"] == data]
    hub.fail("POST", "/v1/xorbs/", status=403, times=None)
    data = random.Random(2).randbytes(100_000)
    upload = {"path_or_fileobj": data, "path_in_repo": "refused.bin", "repo_id": repo}
    facts["refused"] = outcome(api.upload_file, **upload, **kind)
    hub.clear_faults()
    facts["reader"] = outcome(HfApi(token=READ_TOKEN).upload_file, **upload, **kind)
    facts["commits"] = [one["title"] for one in hub.commits(repo)]
    return facts


def other_machine_session(hub, folder):
    """The content of `xet_session` again, from a machine that has nothing in its caches."""
    import random

    hub.clear_log()
    noise = random.Random(0).randbytes(1_500_001)
    HfApi().upload_file(path_or_fileobj=noise, path_in_repo="again.bin", repo_id="doge/xet", repo_type="dataset")
    return {"uploaded": hub.bytes_received("/v1/xorbs/"), "same": hub.files("doge/xet")["again.bin"] == noise}


if __name__ == "__main__":
    session, url, folder = sys.argv[1:]
    print(json.dumps(globals()[f"{session}_session"](HubControl(url), Path(folder))))
