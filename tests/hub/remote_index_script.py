"""
Run against the Hub of the tests, by tests/hub/test_remote_index.py: indices are pushed, then read in parts.

Prints what was seen as one line of JSON.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi

from hf_doge.artifacts import parquet
from hf_doge.artifacts.hub.errors import Patience
from hf_doge.artifacts.influence import IndexReader, segments
from hf_doge.artifacts.influence import remote as remote_module
from hf_doge.artifacts.influence.remote import RemoteIndexReader
from hf_doge.functional.synonyms import synonym_neighbours
from tests.artifacts.influence_rows import (
    NUM_EXAMPLES,
    VOCABULARY_SIZE,
    WIDTH,
    batches,
    equal_rows,
    grow_index,
    open_writer,
    random_rows,
    some,
    write_checkpoint,
    write_index,
)
from tests.hub import HubControl

WORK = Path(sys.argv[1])
hub = HubControl(os.environ["HF_ENDPOINT"])
api = HfApi()
segments.ROW_GROUP_SIZE = 16  # so that a token's rows lie in several groups
checkpoints = [random_rows(NUM_EXAMPLES, seed=0), random_rows(NUM_EXAMPLES, seed=1, size=1e-9)]
queries = random_rows(6, seed=2)


def push(name: str, folder: Path) -> str:
    api.create_repo(f"doge/{name}", repo_type="dataset", exist_ok=True)
    api.upload_folder(repo_id=f"doge/{name}", repo_type="dataset", folder_path=folder, ignore_patterns=["*.lock"])
    return f"doge/{name}"


def read() -> list:
    """The requests for parts of files."""
    return [one for one in hub.requests("GET") if one.range is not None]


def error_of(action: Callable) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def same_numbers(dtype: str, **options) -> dict:
    """Scores, searches, words and synonyms of both readers, compared."""
    folder = write_index(WORK / f"index-{dtype}", *(some(rows, 0, 30) for rows in checkpoints), dtype=dtype, **options)
    grow_index(folder, *checkpoints, dtype=dtype, **options)
    name = push(f"index-{dtype}", folder)
    local = IndexReader.open(folder, cache_dir=WORK / "local")
    remote = RemoteIndexReader.open(name, cache_dir=WORK / f"remote-{dtype}")
    same = {}
    for checkpoint in range(2):
        same[f"scores {checkpoint}"] = np.array_equal(
            local.scores(checkpoint, queries), remote.scores(checkpoint, queries)
        )
        tokens, rows = queries[1]
        rows = local.project(checkpoint, rows)
        pairs = [one.word_scores(checkpoint, tokens, rows, range(NUM_EXAMPLES)) for one in (local, remote)]
        same[f"words {checkpoint}"] = np.array_equal(*pairs) and bool(pairs[0].any())
        found = synonym_neighbours(tokens, torch.randn(VOCABULARY_SIZE, 4), threshold=0.3)
        near = {
            token: (ids.numpy(), cosines.numpy()) for token, (ids, cosines) in zip(tokens.tolist(), found, strict=True)
        }
        matches = [
            [
                (position, token, ids.tolist(), parts.tolist())
                for position, token, ids, parts in one.synonym_scores(checkpoint, tokens, rows, near)
            ]
            for one in (local, remote)
        ]
        same[f"synonyms {checkpoint}"] = matches[0] == matches[1] and len(matches[0]) > 0
    same["search"] = np.array_equal(*(one.scores(0, queries, exclude_tokens=[3]) for one in (local, remote)))
    same["examples"] = local.examples.to_dict() == remote.examples.to_dict()
    return same


def refusals() -> dict:
    folder = write_index(WORK / "index-int8", checkpoints[0], dtype="int8")
    name = push("index-int8", folder)
    remote = RemoteIndexReader.open("doge/index-float16", cache_dir=WORK / "remote-float16")
    return {
        "int8": error_of(lambda: RemoteIndexReader.open(name)),
        "self_influence": error_of(lambda: remote.self_influence(0)),
        "example_rows": error_of(lambda: remote.example_rows(0, [1])),
        "nowhere": error_of(lambda: RemoteIndexReader.open("doge/nowhere")),
        "nothing": error_of(lambda: RemoteIndexReader.open("doge/index-float16", revision="no-branch")),
        "checkpoint": error_of(lambda: remote.scores(2, queries)),
    }


def reading() -> dict:
    """How much is read, and what a second query, another process and a newer commit change."""
    cache = WORK / "counted"
    hub.clear_log()
    remote = RemoteIndexReader.open("doge/index-float16", cache_dir=cache)
    first = remote.scores(0, next(batches(queries, 1)))
    once = read()
    remote.scores(0, next(batches(queries, 1)))
    again = len(read())
    fresh = RemoteIndexReader.open("doge/index-float16", cache_dir=cache)
    same = np.array_equal(first, fresh.scores(0, next(batches(queries, 1))))
    another = len(read())
    folder = write_index(WORK / "newer", random_rows(NUM_EXAMPLES, seed=7))
    push("index-float16", folder)
    other = queries
    late = remote.scores(0, other)
    old = IndexReader.open(WORK / "index-float16", cache_dir=WORK / "local").scores(0, other)
    newer = RemoteIndexReader.open("doge/index-float16", cache_dir=cache).scores(0, other)
    log = hub.requests()
    storage = [one for one in log if one.server == "storage"]
    return {
        "first": len(once),
        "first bytes": sum(one.sent for one in once if one.status == 206),
        "index bytes": sum(path.stat().st_size for path in (WORK / "index-float16/gradients").rglob("*.parquet")),
        "again": again - len(once),
        "another": another - again,
        "same": same,
        "keeps its commit": np.array_equal(late, old),
        "sees the newer": not np.array_equal(newer, old),
        "tokens to the storage": sum(one.authorization for one in storage),
        "requests to the storage": len(storage),
        "heads": len([one for one in log if one.method == "HEAD" and "gradients/" in one.path]),
    }


def faults() -> dict:
    seen = {}
    ways = {
        "503": {"status": 503},
        "429": {"status": 429, "retry_after": 1},
        "cut before": {"cut": "before"},
        "cut in the body": {"cut": "body"},
        "address expired": {"status": 403},
        "all": {"status": 503, "times": None, "nth": 3},
    }
    expected = IndexReader.open(WORK / "newer", cache_dir=WORK / "local").scores(0, queries)
    for way, fault in ways.items():
        remote = RemoteIndexReader.open(
            "doge/index-float16", cache_dir=WORK / f"faults-{way}", patience=Patience(first_wait=0.01)
        )
        remote.build_map(0)
        number = hub.fail("GET", "", server="storage", **fault)
        seen[way] = error_of(lambda remote=remote: np.testing.assert_array_equal(remote.scores(0, queries), expected))
        seen[f"{way} hits"] = hub.hits(number)
        hub.clear_faults()
        if way == "all":
            before = len(read())
            seen["after all"] = error_of(
                lambda remote=remote: np.testing.assert_array_equal(remote.scores(0, queries), expected)
            )
            seen["requests after all"] = len(read()) - before
    return seen


def damaged_cache() -> dict:
    """Rows that a power cut took from the cache are read again."""
    cache = WORK / "faults-503"
    for rows in cache.glob("*-remote/rows.bin"):
        size = rows.stat().st_size
        rows.write_bytes(bytes(size))
    expected = IndexReader.open(WORK / "newer", cache_dir=WORK / "local").scores(0, queries)
    before = len(read())
    remote = RemoteIndexReader.open("doge/index-float16", cache_dir=cache)
    same = np.array_equal(remote.scores(0, queries), expected)
    seen = {"same": same, "read again": len(read()) > before}
    some_tokens = some(queries, 0, 1)
    remote = RemoteIndexReader.open("doge/index-float16", cache_dir=WORK / "deleted")
    remote.scores(0, some_tokens)
    for place in (WORK / "deleted").glob("*-remote"):
        shutil.rmtree(place)  # as whoever makes room for another map does, an hour later
    seen["deleted"] = error_of(lambda: remote.scores(0, queries))
    seen["same after that"] = seen["deleted"] == "none" and np.array_equal(remote.scores(0, queries), expected)
    return seen


def manipulated() -> dict:
    """Files that are what config.json says, but no gradients of these examples."""

    def of(change: Callable[[Path, dict], None], *, sha256: str | None = None) -> str:
        folder = WORK / "manipulated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(WORK / "newer", folder)
        config = json.loads((folder / "config.json").read_text())
        file = config["checkpoints"][0]["files"][0]
        change(folder, file)
        for kind in ("", "offsets_"):
            file[f"{kind}sha256"] = hashlib.sha256((folder / file[f"{kind}path"]).read_bytes()).hexdigest()
        file["sha256"] = sha256 or file["sha256"]
        (folder / "config.json").write_text(json.dumps(config))
        name = push("manipulated", folder)
        remote = RemoteIndexReader.open(name, cache_dir=WORK / "manipulated-cache")
        return error_of(lambda: remote.scores(0, random_rows(30, seed=3)))

    def bytes_at(column: str, content: bytes) -> Callable[[Path, dict], None]:
        def change(folder: Path, file: dict) -> None:
            run = pq.read_table(folder / file["offsets_path"], use_threads=False).to_pylist()[0]
            path = folder / file["path"]
            whole = bytearray(path.read_bytes())
            whole[run[column] : run[column] + len(content)] = content
            path.write_bytes(whole)

        return change

    def offsets(**changes) -> Callable[[Path, dict], None]:
        def change(folder: Path, file: dict) -> None:
            table = pq.read_table(folder / file["offsets_path"], use_threads=False)
            for name, edit in changes.items():
                values = table[name].to_numpy().copy()
                edit(values)
                position = table.column_names.index(name)
                table = table.set_column(position, name, pa.array(values, table.schema.field(name).type))
            pq.write_table(table, folder / file["offsets_path"])

        return change

    def shifted(values: np.ndarray) -> None:
        values += 10**6

    def swapped(values: np.ndarray) -> None:
        values[[0, -1]] = values[[-1, 0]]

    return {
        "NaN": of(bytes_at("grad_byte", np.full(WIDTH, np.nan, np.float16).tobytes())),
        "example out of range": of(bytes_at("example_byte", np.array([10**6], np.int32).tobytes())),
        "offsets beyond the file": of(offsets(grad_byte=shifted)),
        "offsets not ascending": of(offsets(grad_byte=swapped)),
        "tokens not ascending": of(offsets(token_id=swapped)),
        "another file": of(lambda folder, file: None, sha256="0" * 64),
    }


def many_examples() -> dict:
    """The examples of an index with more of them than are worth fetching at once: those of hits alone."""
    texts = [np.random.default_rng(number).bytes(600).hex() for number in range(2020)]
    parquet._GROUP_ROWS = 64
    folder = WORK / "many"
    writer = open_writer(folder, examples=False, num_examples=2020)
    writer.write_examples(pa.table({"example_id": range(2020), "text": texts}))
    rows = random_rows(2020, seed=4)
    write_checkpoint(writer, rows)
    name = push("many", folder)
    local = IndexReader.open(folder, cache_dir=WORK / "local")
    remote_module._FEW_BYTES = 1000
    seen = {}
    try:
        for attempt in ("first", "again", "damaged"):
            hub.clear_log()
            remote = RemoteIndexReader.open(name, cache_dir=WORK / "many-cache")
            same = [
                remote.examples_of(ids).to_dict() == local.examples_of(ids).to_dict()
                for ids in ([2019, 3, 3, 1500], [], [4])
            ]
            same.append(np.array_equal(remote.scores(0, queries), local.scores(0, queries)))
            sent = sum(one.sent for one in read() if one.server == "storage")
            path = next((WORK / "many-cache").glob("examples-*.parquet"))
            seen[attempt] = {"same": all(same), "whole": len(hub.requests("GET", "examples/")), "sent": sent}
            if attempt == "again":
                path.write_bytes(bytes(path.stat().st_size))

        def fetch(number: int) -> None:
            remote = RemoteIndexReader.open(name, cache_dir=WORK / "many-at-once")
            begin.wait()
            assert remote.examples_of([2019, number]).to_dict() == local.examples_of([2019, number]).to_dict()

        begin = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            seen["at once"] = error_of(lambda: list(pool.map(fetch, [3, 3, 1500, 1500])))
        seen["size"] = (folder / "examples/train-00000-of-00001.parquet").stat().st_size
        seen["all"] = remote.examples.to_dict() == local.examples.to_dict()
    finally:
        remote_module._FEW_BYTES = 4 * 2**20
    return seen


def growth() -> dict:
    """What is uploaded when an index that was pushed has got 1 % more examples."""
    from hf_doge.tracing.publication import push_index_folder

    options = {"width": 64, "vocabulary_size": 400, "max_segment_bytes": 2**22}
    rows = equal_rows(2020, num_tokens=25, width=64, vocabulary_size=400)
    folder = write_index(WORK / "growing", some(rows, 0, 2000), **options)
    sent = []
    for _ in range(2):
        hub.clear_log()
        push_index_folder(folder, "doge/growing")
        sent.append(hub.bytes_received(method="PUT") + hub.bytes_received("/commit/"))
        if len(sent) == 1:
            grow_index(folder, rows, **options)
    remote = RemoteIndexReader.open("doge/growing", cache_dir=WORK / "growing-cache")
    asked = some(rows, 2010, 2011)
    return {
        "sent": sent,
        "finds the new": int(remote.scores(0, asked).argmax()),
        "numbers": np.array_equal(
            remote.scores(0, asked), IndexReader.open(folder, cache_dir=WORK / "local").scores(0, asked)
        ),
    }


def whole_journey() -> dict:
    """A trained and pushed index with its models, opened twice: downloaded, and read in parts."""
    from hf_doge import InfluenceIndex
    from hf_doge.cli.view import Viewer
    from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer

    tokenizer = wordpiece_tokenizer()
    data = tokenised(sentences(24), tokenizer)
    push(
        "trained",
        train(WORK / "trained", classifier(tokenizer), tokenizer, data, save_weights=True, metric="optimizer"),
    )
    shutil.rmtree(WORK / "trained")
    hub.clear_log()
    index = InfluenceIndex.from_pretrained("doge/trained", streaming=True, cache_dir=WORK / "streamed")
    at_opening = len(hub.requests("GET", "models/"))
    asked = ["The runner is winning a match.", "Stocks of a rocket fund"]
    options = {"recipe": "paper"}  # cosine, the default for classifiers, needs all rows
    hits = index.search(asked, top_k=5, **options)
    whole_files = [one.path for one in hub.requests("GET", "gradients/") if one.range is None]
    downloaded = InfluenceIndex.from_pretrained("doge/trained", cache_dir=WORK / "downloaded")
    return {
        "models at opening": at_opening,
        "hits": hits.to_list() == downloaded.search(asked, top_k=5, **options).to_list() and len(hits) > 10,
        "synonyms": index.search(asked, kernel="synonym", synonym_threshold=0.0, **options).to_list()
        == downloaded.search(asked, kernel="synonym", synonym_threshold=0.0, **options).to_list(),
        "domains": index.domain_influence(asked, "label", **options).to_list()
        == downloaded.domain_influence(asked, "label", **options).to_list(),
        "viewer": Viewer(index).trace(asked[0])[0] == index.show(index.search(asked[:1], top_k=5)).html,
        "viewer's labels": Viewer(index).suspicious(),
        "whole files": whole_files,
        "cosine": error_of(lambda: index.search(asked, cosine=True)),
        "self_influence": error_of(index.self_influence),
        "save_pretrained": error_of(lambda: index.save_pretrained(WORK / "copy")),
        "local_files_only": error_of(
            lambda: InfluenceIndex.from_pretrained("doge/trained", streaming=True, local_files_only=True)
        ),
        "a folder": type(InfluenceIndex.from_pretrained(WORK / "newer", streaming=True).reader).__name__,
    }


PARTS = {
    "float16": lambda: same_numbers("float16"),
    "float32": lambda: same_numbers("float32", projection_width=3),
    "refusals": refusals,
    "reading": reading,
    "faults": faults,
    "damaged": damaged_cache,
    "manipulated": manipulated,
    "growth": growth,
    "many examples": many_examples,
    "journey": whole_journey,
}
print(json.dumps({name: part() for name, part in PARTS.items()}))
