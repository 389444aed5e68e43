"""
How much a query reads of an index that stays on the Hub: 2 million rows of width 64, float16, exact search.

    python -m benchmarks.remote_search                        # 20,000 examples of 100 tokens; 1 GB of disk for the run
    python -m benchmarks.remote_search --zipf_shift 2.7       # words as frequent as in English; 0: by Zipf's law itself

The Hub is that of the tests, a process of its own on this machine, which counts the bytes that it sends. Each query is
asked with empty caches, so that what is counted is everything: config.json, offsets, examples and rows. Then it is asked
again. Answers are compared with those of the local index, number by number.

A query reads 132 bytes for each row of one of its tokens (64 numbers and an example id), so what it reads depends on how
frequent its words are: the probability of the word of rank r is proportional to 1 / (r + shift). With the default, 60 words
match about 100,000 rows; with less, more. `rare` are 60 words drawn alike, `without_frequent` leaves the 20 most frequent
words out of account (`exclude_tokens`).

Prints one line of JSON. Bytes are in MB (10 ** 6); `most_mb` is the largest of all queries of a kind.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hf_doge.artifacts.influence import IndexReader, IndexWriter
from hf_doge.gradients.token_rows import TokenRows
from tests.hub import HubControl, HubServer, last_json, run_client

VOCABULARY_SIZE = 50_000
WIDTH = 64
TOKENS_PER_EXAMPLE = 100
QUERY_TOKENS = 60
BAR_MB = 20.0
REPOSITORY = "doge/remote-search"
KINDS = ("zipf", "without_frequent", "rare")
NUM_FREQUENT = 20


def build(folder: Path, *, num_examples: int, shift: float) -> None:
    """An index of random rows, and all distinct tokens of an example drawn by Zipf's law."""
    writer = IndexWriter(folder, width=WIDTH, vocabulary_size=VOCABULARY_SIZE, num_examples=num_examples)
    writer.write_examples(pa.table({"example_id": np.arange(num_examples)}))
    facts = {"epoch": 1.0, "learning_rate": 1.0, "path": "none", "model_class": "none", "fingerprint": "none"}
    generator = np.random.default_rng(0)
    with writer.checkpoint("checkpoint-1", step=1, **facts) as checkpoint:
        for start in range(0, num_examples, 1000):
            count = min(1000, num_examples - start)
            keys = _distinct_tokens(count, generator, shift=shift)
            checkpoint.add(_rows(keys, count, generator))
        writer.publish(checkpoint)


def _distinct_tokens(num_examples: int, generator: np.random.Generator, *, shift: float) -> np.ndarray:
    """The first `TOKENS_PER_EXAMPLE` distinct words of each text, as `example * VOCABULARY_SIZE + word`, ascending."""
    draws = _words((num_examples, 3 * TOKENS_PER_EXAMPLE), generator, shift=shift)
    owners = np.arange(num_examples).repeat(draws.shape[1])
    keys, first = np.unique(owners * VOCABULARY_SIZE + draws.ravel(), return_index=True)
    drawn = keys[np.argsort(first)]
    owners = drawn // VOCABULARY_SIZE
    return np.sort(drawn[np.arange(len(drawn)) - np.searchsorted(owners, owners) < TOKENS_PER_EXAMPLE])


def _words(shape: tuple[int, ...], generator: np.random.Generator, *, shift: float) -> np.ndarray:
    cumulative = np.cumsum(1 / (np.arange(1, VOCABULARY_SIZE + 1) + shift))
    return np.searchsorted(cumulative, generator.random(shape) * cumulative[-1]).clip(max=VOCABULARY_SIZE - 1)


def _rows(keys: np.ndarray, num_examples: int, generator: np.random.Generator) -> TokenRows:
    offsets = np.searchsorted(keys, np.arange(num_examples + 1) * VOCABULARY_SIZE)
    values = generator.standard_normal((len(keys), WIDTH), dtype=np.float32)
    tokens = torch.from_numpy(keys % VOCABULARY_SIZE)
    return TokenRows(torch.from_numpy(offsets), tokens, torch.from_numpy(values), virtual=False)


def make_query(kind: str, number: int, *, shift: float) -> TokenRows:
    """A text of `QUERY_TOKENS` words; those that repeat count once."""
    generator = np.random.default_rng([KINDS.index(kind) % 2, number])
    if kind == "rare":
        words = generator.integers(0, VOCABULARY_SIZE, QUERY_TOKENS)
    else:
        words = _words((QUERY_TOKENS,), generator, shift=shift)
    return _rows(np.unique(words), 1, generator)


def ask(work: Path, *, num_queries: int, shift: float) -> dict[str, dict[str, float]]:
    """As a client of the Hub, in a process with its settings: push the index, then query it remotely."""
    from huggingface_hub import constants

    from hf_doge.artifacts.influence.remote import RemoteIndexReader
    from hf_doge.tracing.publication import push_index_folder

    hub = HubControl(constants.ENDPOINT)
    push_index_folder(work / "index", REPOSITORY)
    local = IndexReader.open(work / "index", cache_dir=work / "local")
    figures = {}
    for kind in KINDS:
        excluded = range(NUM_FREQUENT) if kind == "without_frequent" else ()
        seen: dict[str, list[float]] = {name: [] for name in ("mb", "requests", "matched_rows", "again_mb", "seconds")}
        for number in range(num_queries):
            query = make_query(kind, number, shift=shift)
            hub.clear_log()
            start = time.perf_counter()
            reader = RemoteIndexReader.open(REPOSITORY, cache_dir=work / f"cache-{kind}-{number}")
            found = reader.scores(0, query, exclude_tokens=excluded)
            seen["seconds"].append(time.perf_counter() - start)
            seen["mb"].append(hub.bytes_sent() / 1e6)
            seen["requests"].append(len(hub.requests()))
            hub.clear_log()
            reader.scores(0, query, exclude_tokens=excluded)
            seen["again_mb"].append(hub.bytes_sent() / 1e6)
            if not np.array_equal(found, local.scores(0, query, exclude_tokens=excluded)):
                raise AssertionError(f"The remote search of query {number} ({kind}) is not the local one.")
            counted = np.setdiff1d(query.tokens.numpy(), list(excluded))
            seen["matched_rows"].append(float(np.diff(local._map(0, None).offsets)[counted].sum()))
        figures[kind] = {name: round(statistics.median(values), 3) for name, values in seen.items()}
        figures[kind] |= {"most_mb": round(max(seen["mb"]), 2)}
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_examples", type=int, default=20_000, help="Of 100 tokens each. Default: 20000.")
    parser.add_argument("--num_queries", type=int, default=7, help="Of each kind. Default: 7.")
    parser.add_argument("--zipf_shift", type=float, default=10.0, help="See above. Default: 10.")
    parser.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)  # the client's part
    args = parser.parse_args(argv)
    if args.work is not None:
        print(json.dumps(ask(args.work, num_queries=args.num_queries, shift=args.zipf_shift)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        build(work / "index", num_examples=args.num_examples, shift=args.zipf_shift)
        size = sum(path.stat().st_size for path in (work / "index").rglob("*.parquet")) / 1e6
        options = ["--work", work, "--num_queries", args.num_queries, "--zipf_shift", args.zipf_shift]
        with HubServer(work / "hub") as hub:
            figures = last_json(run_client(hub, Path(__file__), *options, timeout=1800))
    figures = {
        "num_rows": args.num_examples * TOKENS_PER_EXAMPLE,
        "width": WIDTH,
        "zipf_shift": args.zipf_shift,
        "index_mb": round(size, 1),
        **figures,
        "bar_mb": BAR_MB,
        "within_bar": figures["zipf"]["mb"] <= BAR_MB,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
