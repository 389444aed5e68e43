"""
A client of the Hub of the tests that pushes into trouble: `python push_faults_script.py SCENARIOS.json [--stories]`.

Each scenario has a repository of its own, which holds a first artifact; its fault meets the push of a second one. If that
push fails it is made again. Prints what came of each; and of some stories, in which somebody else is at it too.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE

from hf_doge.artifacts.hub.errors import Patience
from hf_doge.artifacts.hub.publication import Publication
from hf_doge.artifacts.hub.push import push_publication
from tests.hub.handle import HubControl

PATIENCE = Patience(tries=3, first_wait=0.05)
LARGE_BYTES = 200_000


def large_content(version, name):
    return b"PAR1" + f"{name} {version}".encode().ljust(LARGE_BYTES, b"\0") + b"PAR1"


@dataclass
class Written:
    """A card of a version, above the notes of a person."""

    version: int
    keeps_notes: bool = False

    def merged_with(self, existing):
        if not self.keeps_notes:
            return f"---\nlicense: mit\n---\nVersion {self.version}\n"
        kept = "" if existing is None else existing.rpartition("---\n")[2]
        return f"---\nlicense: mit\nversion: {self.version}\n---\n{kept}"


def make_publication(version, name, card=None):
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
        card=card or Written(version),
    )


def expected_files(version, name):
    publication = make_publication(version, name)
    return {**publication.files, "README.md": publication.card.merged_with(None).encode()}


def holds(hub, repo_id, version, name):
    files = hub.files(repo_id) if hub.repository(repo_id) else {}
    ours = {path: content for path, content in files.items() if path not in (".gitattributes", "OTHER.md")}
    return ours == expected_files(version, name)


def run(hub, number, scenario):
    name = f"scenario-{number}"
    repo_id = f"doge/{name}"
    push = partial(push_publication, commit_message="Upload", patience=PATIENCE)
    first, tag = push, {"tag": "v2"} if scenario["tag"] else {}
    fault = {**scenario["fault"]}
    push = partial(push, patience=replace(PATIENCE, tries=fault.pop("tries", PATIENCE.tries)), **tag)
    if not scenario["first"]:
        first(make_publication(1, name), repo_id)
    num_before = len(hub.commits(repo_id)) if not scenario["first"] else 0
    pattern = scenario["pattern"].format(
        repo=f"doge/{name}", large=sha256(large_content(2, name)).hexdigest(), name=name
    )
    if "other_commit" in fault:
        fault["other_commit"] = {"repo_id": repo_id, "files": {"OTHER.md": "by somebody else"}}
    number = hub.fail(scenario["method"], pattern, **fault)
    outcome = {"error": None, "untouched": None}
    try:
        commit = push(make_publication(2, name), repo_id)
        outcome["is_head"] = commit.oid == hub.commits(repo_id)[0]["id"]
    except Exception as error:
        outcome["error"], outcome["message"] = type(error).__name__, str(error)
        outcome["committed"] = holds(hub, repo_id, 2, name)
        if not scenario["first"]:
            outcome["untouched"] = holds(hub, repo_id, 1, name) and len(hub.commits(repo_id)) == num_before
        push(make_publication(2, name), repo_id)
    by_us = [commit for commit in hub.commits(repo_id) if commit["title"] == "Upload"]
    outcome |= {
        "hits": hub.hits(number),
        "new_commits": len(by_us) - (0 if scenario["first"] else 1),
        "right": holds(hub, repo_id, 2, name),
        "is_tagged": not tag or hub.repository(repo_id)["refs"].get("refs/tags/v2") == hub.commits(repo_id)[0]["id"],
        "others_kept": "other_commit" not in fault or "OTHER.md" in hub.files(repo_id),
    }
    again = push(make_publication(2, name), repo_id)
    outcome["repeat_commits"] = len([one for one in hub.commits(repo_id) if one["title"] == "Upload"]) - len(by_us)
    outcome["repeat_is_head"] = again.oid == hub.commits(repo_id)[0]["id"]
    return outcome


def tag_meanwhile(hub, name, *, moment, target):
    """Somebody else makes the tag of a push: `"before"` or `"after"` it looked, on a commit `"before"` or `"ours"`."""
    repo_id, api = f"doge/{name}", HfApi()
    push = partial(push_publication, commit_message="Upload", patience=PATIENCE)
    push(make_publication(1, name), repo_id)
    before = hub.commits(repo_id)[0]["id"]
    method, pattern, nth = {"before": ("GET", "/refs", 2), "after": ("POST", "/tag/", 1)}[moment]
    fault = hub.fail(method, f"doge/{name}{pattern}", nth=nth, hold="before")
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(push, make_publication(2, name), repo_id, tag="v2")
        hub.wait_for(lambda: hub.hits(fault))
        made = before if target == "before" else hub.commits(repo_id)[0]["id"]
        api.create_tag(repo_id, repo_type="dataset", tag="v2", revision=made)
        hub.release(fault)
        outcome = ended(pushed.result)
    outcome["tag stays"] = hub.repository(repo_id)["refs"]["refs/tags/v2"] == made
    outcome["committed"] = holds(hub, repo_id, 2, name)
    return outcome


def tag_again(hub, name):
    """The same content with the same tag, after somebody has changed another file; and other content with that tag."""
    repo_id = f"doge/{name}"
    push = partial(push_publication, commit_message="Upload", patience=PATIENCE)
    tagged = push(make_publication(2, name), repo_id, tag="v2").oid
    hub.commit(repo_id, {"OTHER.md": "by somebody else"})
    same = ended(lambda: push(make_publication(2, name), repo_id, tag="v2"))
    other = ended(lambda: push(make_publication(3, name), repo_id, tag="v2"))
    push(make_publication(3, name), repo_id)
    back = ended(lambda: push(make_publication(2, name), repo_id, tag="v2"))
    refs = hub.repository(repo_id)["refs"]
    return {"same": same, "other": other, "back": back, "tag stays": refs["refs/tags/v2"] == tagged}


def tag_on_a_branch(hub, name):
    """A push to a branch of its own, with a tag."""
    repo_id = f"doge/{name}"
    push = partial(push_publication, commit_message="Upload", patience=PATIENCE)
    push(make_publication(1, name), repo_id)
    made = push(make_publication(2, name), repo_id, revision="draft", tag="v2").oid
    return {"made": made, "refs": hub.repository(repo_id)["refs"]}


def ended(action):
    try:
        action()
        return {"error": None}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def edit_meanwhile(hub, name):
    """Somebody edits the card between our look at the head and our commit."""
    repo_id = f"doge/{name}"
    push = partial(push_publication, commit_message="Upload", patience=PATIENCE)
    push(make_publication(1, name, card=Written(1, keeps_notes=True)), repo_id)
    hub.fail(
        "POST",
        f"doge/{name}/commit/",
        other_commit={"repo_id": repo_id, "files": {"README.md": "---\nlicense: mit\n---\nNotes of a person\n"}},
    )
    push(make_publication(2, name, card=Written(2, keeps_notes=True)), repo_id)
    parents = [commit["parent"] for commit in hub.commits(repo_id)]
    ids = [commit["id"] for commit in hub.commits(repo_id)]
    return {"card": hub.files(repo_id)["README.md"].decode(), "line": parents[:-1] == ids[1:]}


STORIES = {
    **{
        f"a tag made {moment} we look, {target}": partial(tag_meanwhile, moment=moment, target=target)
        for moment in ("before", "after")
        for target in ("before", "ours")
    },
    "a tag again": tag_again,
    "a tag on a branch": tag_on_a_branch,
    "an edit meanwhile": edit_meanwhile,
}


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
        begun = {
            name: pool.submit(story, hub, f"story-{number}")
            for number, (name, story) in enumerate(STORIES.items() if "--stories" in sys.argv else ())
        }
        stories = {name: story.result() for name, story in begun.items()}
    stories["cached"] = sorted(path.name for path in Path(HF_HUB_CACHE).glob("*--*"))
    print(json.dumps({"outcomes": [outcomes[number] for number in range(len(scenarios))], "stories": stories}))


if __name__ == "__main__":
    main()
