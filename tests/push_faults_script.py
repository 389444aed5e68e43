"""
A client of the Hub of the tests that pushes into trouble: `python push_faults_script.py SCENARIOS.json`.

Each scenario has a repository of its own, which holds a first artifact; its fault meets the push of a second one. If that
push fails it is made again. Prints what came of each.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

from hf_doge.artifacts.hub.publication import Publication
from hf_doge.artifacts.hub.push import push_publication
from hf_doge.artifacts.hub.retries import Patience
from tests.hub.handle import HubControl

PATIENCE = Patience(tries=3, first_wait=0.05)
LARGE_BYTES = 200_000


def large_content(version, name):
    return b"PAR1" + f"{name} {version}".encode().ljust(LARGE_BYTES, b"\0") + b"PAR1"


def make_publication(version, name):
    files = {
        "artifact.json": json.dumps({"version": version}).encode(),
        "rows/part.parquet": large_content(version, name),
        f"rows/{version}.txt": b"only of this version",
    }
    return Publication(
        files,
        manifest="artifact.json",
        owned=lambda path: path.startswith("rows/"),
        check_manifest=lambda content: None,
        card=lambda existing: f"---\nlicense: mit\n---\nVersion {version}\n",
    )


def expected_files(version, name):
    publication = make_publication(version, name)
    return {**publication.files, "README.md": publication.card(None).encode()}


def holds(hub, repo_id, version, name):
    files = hub.files(repo_id)
    ours = {path: content for path, content in files.items() if path not in (".gitattributes", "OTHER.md")}
    return ours == expected_files(version, name)


def run(hub, number, scenario):
    name = f"scenario-{number}"
    repo_id = f"doge/{name}"
    push = partial(push_publication, commit_message="Upload", patience=PATIENCE)
    if not scenario["first"]:
        push(make_publication(1, name), repo_id)
    num_before = len(hub.commits(repo_id)) if not scenario["first"] else 0
    pattern = scenario["pattern"].format(
        repo=f"doge/{name}", large=sha256(large_content(2, name)).hexdigest(), name=name
    )
    fault = {**scenario["fault"]}
    if "other_commit" in fault:
        fault["other_commit"] = {"repo_id": repo_id, "files": {"OTHER.md": "by somebody else"}}
    number = hub.fail(scenario["method"], pattern, **fault)
    outcome = {"error": None, "untouched": None}
    try:
        commit = push(make_publication(2, name), repo_id)
        outcome["is_head"] = commit.oid == hub.commits(repo_id)[0]["id"]
    except Exception as error:
        outcome["error"], outcome["message"] = type(error).__name__, str(error)
        if not scenario["first"]:
            outcome["untouched"] = holds(hub, repo_id, 1, name) and len(hub.commits(repo_id)) == num_before
        push(make_publication(2, name), repo_id)
    by_us = [commit for commit in hub.commits(repo_id) if commit["title"] == "Upload"]
    outcome |= {
        "hits": hub.hits(number),
        "new_commits": len(by_us) - (0 if scenario["first"] else 1),
        "right": holds(hub, repo_id, 2, name),
        "others_kept": "other_commit" not in fault or "OTHER.md" in hub.files(repo_id),
    }
    again = push(make_publication(2, name), repo_id)
    outcome["repeat_commits"] = len([one for one in hub.commits(repo_id) if one["title"] == "Upload"]) - len(by_us)
    outcome["repeat_is_head"] = again.oid == hub.commits(repo_id)[0]["id"]
    return outcome


def main():
    hub = HubControl(os.environ["HF_ENDPOINT"])
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    outcomes = {}
    # Whose requests do not tell the repository come one after the other.
    for number, scenario in enumerate(scenarios):
        if scenario["alone"]:
            outcomes[number] = run(hub, number, scenario)
    with ThreadPoolExecutor(32) as pool:
        left = [number for number in range(len(scenarios)) if number not in outcomes]
        outcomes |= zip(left, pool.map(lambda number: run(hub, number, scenarios[number]), left), strict=True)
    print(json.dumps([outcomes[number] for number in range(len(scenarios))]))


if __name__ == "__main__":
    main()
