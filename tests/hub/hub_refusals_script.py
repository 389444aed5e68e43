"""
A client of the Hub of the tests that asks for what cannot be: `python hub_refusals_script.py FOLDER`.

Prints for each attempt the class and the words of its error, or `null` if there was none.
"""

import json
import os
import resource
import sys
import warnings
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from hf_doge import DomainWeights, InfluenceIndex
from hf_doge.artifacts.domain_weights import weights_publication
from hf_doge.artifacts.hub.errors import Patience
from hf_doge.artifacts.hub.publication import Publication
from hf_doge.artifacts.hub.push import push_publication
from hf_doge.artifacts.hub.ranges import RangedFile
from hf_doge.cli.push import main as push_command
from hf_doge.files import sha256
from hf_doge.tracing.publication import prepare_index_push
from tests.artifacts.influence_rows import random_rows, write_index
from tests.artifacts.test_domain_weights import make_weights
from tests.hub.handle import HubControl
from tests.hub.tokens import BAD_TOKEN, OTHER_TOKEN, READ_TOKEN
from tests.hub.tokens import TOKEN as WRITE_TOKEN

WEIGHTS_FILE = "weights/train-00000-of-00001.parquet"
errors = {}


def attempt(name, action):
    try:
        action()
        errors[name] = None
    except Exception as error:
        errors[name] = [type(error).__name__, str(error)]


def push(repo_id="doge/refused", **options):
    return make_weights().push_to_hub(repo_id, **options)


def upload(repo_id, files, **options):
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True, **options)
    for path, content in files.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, repo_type="dataset")


def spoiled(folder, name, change):
    """Weights of which one file is another, pushed file by file."""
    make_weights(with_trajectory=False).save_pretrained(folder / name)
    files = {path: (folder / name / path).read_bytes() for path in ("domain_weights.json", WEIGHTS_FILE)}
    upload(f"doge/{name}", change(files))
    return lambda: DomainWeights.from_pretrained(f"doge/{name}")


def manifest(files, **changes):
    return {**files, "domain_weights.json": json.dumps(json.loads(files["domain_weights.json"]) | changes).encode()}


def pushing(folder):
    attempt("no token", lambda: push(token=False))
    attempt("unknown token", lambda: push(token=BAD_TOKEN))
    attempt("read-only token", lambda: push(token=READ_TOKEN))
    attempt("empty token", lambda: push(token=""))
    attempt("token with a line break", lambda: push(token=WRITE_TOKEN + "\n"))
    attempt("no name", lambda: push(None))
    attempt("branch of no name", lambda: push(revision=""))
    attempt("tag with a space", lambda: push(tag="v 1"))
    attempt("proposal to a branch", lambda: push(revision="wide", create_pr=True))
    attempt("not ours", lambda: push("stranger/refused"))
    attempt("bad name", lambda: push("doge/a name/of three parts"))
    attempt("a number for a name", lambda: push(5))
    attempt("name with controls", lambda: push("doge/x\x1b[2J"))
    attempt("branch like a commit", lambda: push(revision="a" * 40))
    attempt("tag like a commit", lambda: push(tag="0" * 40))
    attempt("model of no name", lambda: push(model_id="m](http://a.b"))
    attempt("tag of a proposal", lambda: push(tag="v1", create_pr=True))
    upload("doge/photos", {"cats.parquet": b"PAR1 cats PAR1"})
    attempt("something else", lambda: push("doge/photos"))
    index = write_index(folder / "index", random_rows(20))
    InfluenceIndex.from_pretrained(index, cache_dir=folder / "maps").push_to_hub("doge/index")
    texts_over_none(InfluenceIndex.from_pretrained(index, cache_dir=folder / "maps"))
    attempt("weights over an index", lambda: push("doge/index"))
    push("doge/weights", tag="v1")
    attempt(
        "index over weights",
        lambda: InfluenceIndex.from_pretrained(index, cache_dir=folder / "maps").push_to_hub("doge/weights"),
    )
    attempt("tag is taken", lambda: make_weights(seed=5).push_to_hub("doge/weights", tag="v1"))
    attempt("push to a tag", lambda: make_weights(seed=5).push_to_hub("doge/weights", revision="v1"))
    hub = HubControl(os.environ["HF_ENDPOINT"])
    hub.fail("POST", "/tag/", times=None, status=503)
    once = {"commit_message": "Upload", "patience": Patience(tries=0)}
    tagless = weights_publication(make_weights(), "doge/tagless")
    attempt("tag alone fails", lambda: push_publication(tagless, "doge/tagless", tag="v1", **once))
    hub.clear_faults()
    attempt("then tag", lambda: push("doge/tagless", tag="v1"))
    attempt("same tag, same content", lambda: push("doge/weights", tag="v1"))
    newer = manifest({"domain_weights.json": (b"{}")}, format_version="2.0")
    upload("doge/newer", newer)
    attempt("over a newer format", lambda: push("doge/newer"))
    leaking = DomainWeights({"a": 1.0}, metadata={"note": "my token is " + READ_TOKEN})
    attempt("a token inside", lambda: leaking.push_to_hub("doge/leak"))
    attempt("a token in the title", lambda: push(commit_message=f"by {READ_TOKEN}"))
    attempt("a token in the description", lambda: push(commit_description=f"by {READ_TOKEN}"))
    attempt("a token for a tag", lambda: push(tag=READ_TOKEN))
    attempt("a token for a branch", lambda: push(revision=READ_TOKEN))
    attempt("a token for a name", lambda: push(f"doge/{READ_TOKEN}"))
    attempt(
        "a path that leaves",
        lambda: Publication({"../m": b""}, manifest="../m", owned=bool, check_manifest=print),
    )
    attempt(
        "columns without redaction",
        lambda: InfluenceIndex.from_pretrained(index, cache_dir=folder / "maps").push_to_hub(
            "doge/index", keep_columns=["x"]
        ),
    )
    attempt(
        "unknown columns",
        lambda: InfluenceIndex.from_pretrained(index, cache_dir=folder / "maps").push_to_hub(
            "doge/index", redact_text=True, keep_columns=["nothing"]
        ),
    )


def texts_over_none(index):
    """A repository that holds an index without its texts."""
    name = "doge/without-texts"
    index.push_to_hub(name, redact_text=True, tag="v1")
    head = HfApi().repo_info(name, repo_type="dataset").sha
    for way, options in {"": {}, " on a branch": {"revision": "other"}, " as a proposal": {"create_pr": True}}.items():
        attempt(f"texts over none{way}", partial(index.push_to_hub, name, **options))
    folder = str(index.reader.folder)
    attempt("texts over none from the shell", lambda: push_command([folder, name, "--tag", "v2"]))
    attempt("texts over none in training", lambda: prepare_index_push(name, token=None, private=None))
    attempt("no texts over none", lambda: prepare_index_push(name, redact_text=True, token=None, private=None))
    attempt("no texts over none again", lambda: index.push_to_hub(name, redact_text=True, tag="v1"))
    assert HfApi().repo_info(name, repo_type="dataset").sha == head
    attempt("texts over none, said", lambda: push_command([folder, name, "--publish_text"]))
    assert HfApi().repo_info(name, repo_type="dataset").sha != head


def deleted(folder):
    """A repository that is gone, or that a token no longer opens, and of which files are in the cache."""
    push("doge/gone")
    DomainWeights.from_pretrained("doge/gone")
    HfApi().delete_repo("doge/gone", repo_type="dataset")
    push("doge/closed", private=True)
    DomainWeights.from_pretrained("doge/closed")
    for name, options in {"gone": {}, "closed": {"token": BAD_TOKEN}}.items():
        read = partial(DomainWeights.from_pretrained, f"doge/{name}", **options)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            attempt(f"{name} is read", lambda read=read: read().mean == make_weights().mean or 1 / 0)
        (one,) = told
        errors[f"{name} is told"] = [type(one.message).__name__, str(one.message)]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            attempt(f"{name} is read offline", partial(read, local_files_only=True))
        errors[f"{name} is told offline"] = ["warned", str(told[0].message)] if told else None
        attempt(f"{name} is fetched again", partial(read, force_download=True))


def reading(folder):
    attempt("nothing there", lambda: DomainWeights.from_pretrained("doge/nothing"))
    HfApi().create_repo("doge/model-only")
    attempt("a model", lambda: DomainWeights.from_pretrained("doge/model-only"))
    push("doge/private", private=True)
    attempt("private", lambda: DomainWeights.from_pretrained("doge/private", token=OTHER_TOKEN))
    attempt("unknown revision", lambda: DomainWeights.from_pretrained("doge/weights", revision="v9"))
    attempt("token with a line break reads", lambda: DomainWeights.from_pretrained("doge/private", token=" hf_a\n"))
    attempt("revision that leads elsewhere", lambda: DomainWeights.from_pretrained("doge/weights", revision=".."))
    DomainWeights.from_pretrained("doge/weights")
    attempt(
        "unknown token fetches again",
        lambda: DomainWeights.from_pretrained("doge/weights", token=BAD_TOKEN, force_download=True),
    )
    deleted(folder)
    attempt("unknown token reads", lambda: DomainWeights.from_pretrained("doge/private", token=BAD_TOKEN))
    attempt("an index read as weights", lambda: DomainWeights.from_pretrained("doge/index"))
    attempt("weights read as an index", lambda: InfluenceIndex.from_pretrained("doge/weights"))
    attempt("newer format", spoiled(folder, "newer-one", lambda files: manifest(files, format_version="2.0")))
    attempt("altered", spoiled(folder, "altered", lambda files: {**files, WEIGHTS_FILE: files[WEIGHTS_FILE] + b" "}))
    attempt(
        "missing file", spoiled(folder, "missing", lambda files: {"domain_weights.json": files["domain_weights.json"]})
    )
    attempt(
        "weights off the simplex",
        spoiled(folder, "simplex", lambda files: manifest(files, mean={"wiki": 0.5, "web": 0.4, "code": 0.4})),
    )
    attempt("unknown keys", spoiled(folder, "unknown-keys", lambda files: manifest(files, colour="red")))
    config = json.loads((folder / "index" / "config.json").read_text())
    config["checkpoints"][0]["files"][0]["path"] = "../../secret.parquet"
    files = {
        path.relative_to(folder / "index").as_posix(): path.read_bytes()
        for path in (folder / "index").rglob("*")
        if path.is_file() and path.suffix in (".json", ".parquet")
    }
    upload("doge/escaping", files | {"config.json": json.dumps(config).encode()})
    attempt("config leaves the folder", lambda: InfluenceIndex.from_pretrained("doge/escaping"))
    nan = "trajectory"
    make_weights().save_pretrained(folder / nan)
    table = pq.read_table(folder / nan / "trajectory" / "train-00000-of-00001.parquet")
    weights = table.column("weight").to_numpy().copy()
    weights[0] = float("nan")
    position = table.column_names.index("weight")
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(position, "weight", pa.array(weights)), sink)
    content = sink.getvalue().to_pybytes()
    written = json.loads((folder / nan / "domain_weights.json").read_text())
    written["files"]["trajectory/train-00000-of-00001.parquet"] = sha256(content)
    upload(
        "doge/nan",
        {
            "domain_weights.json": json.dumps(written).encode(),
            WEIGHTS_FILE: (folder / nan / WEIGHTS_FILE).read_bytes(),
            "trajectory/train-00000-of-00001.parquet": content,
        },
    )
    attempt("NaN in the trajectory", lambda: DomainWeights.from_pretrained("doge/nan"))
    hub = HubControl(os.environ["HF_ENDPOINT"])
    for status in (403, 404):
        number = hub.fail("GET", "", server="storage", status=status)
        attempt(f"address expired, {status}", partial(fetch_anew, folder / f"expired-{status}"))
        errors[f"address expired, {status}, hits"] = None if hub.hits(number) == 1 else ["", "the fault was not met"]
    for method, request in READING:
        number = hub.fail(method, f"weights.*/{request}/", server="hub", status=404, times=None)
        attempt(f"404 to {method} {request}", partial(fetch_anew, folder / f"{method}-{request}"))
        if not hub.hits(number):
            errors[f"404 to {method} {request}"] = ["", "the fault was not met"]
        hub.clear_faults()
    commit = HfApi().repo_info("doge/weights", repo_type="dataset").sha
    hub.fail("HEAD", "weights.*/resolve/", server="hub", status=403, times=None)
    attempt("403 to a part of a file", lambda: RangedFile("doge/weights", WEIGHTS_FILE, commit=commit).read(0, 4))
    hub.clear_faults()


READING = [("GET", "revision"), ("GET", "tree"), ("HEAD", "resolve"), ("GET", "resolve")]


def fetch_anew(cache_dir):
    return DomainWeights.from_pretrained("doge/weights", cache_dir=cache_dir)


def full_disk(folder):
    """No file may be longer than 2,000 bytes: what a full disk does, to a process that may not fill one."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        attempt("full disk", lambda: DomainWeights.from_pretrained("doge/weights", cache_dir=folder / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    attempt("after it", lambda: DomainWeights.from_pretrained("doge/weights", cache_dir=folder / "cache"))


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    here = Path(sys.argv[1])
    pushing(here)
    reading(here)
    full_disk(here)
    print(json.dumps(errors))
