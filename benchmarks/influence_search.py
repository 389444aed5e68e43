"""
How fast the influence index answers: exact search over random rows with Zipf token frequencies.

    python -m benchmarks.influence_search                     # both sizes; 1 GB and 3 GB of disk for the time of the run

Prints one line of JSON. `search_50k` and `search_1m` give the figures as dicts. Rows are random numbers, since the time
does not depend on them; which tokens examples and queries hold does matter, and both are drawn by Zipf's law.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hf_doge.artifacts.influence import IndexReader, IndexWriter
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.scoring import select_extremes

VOCABULARY_SIZE = 30_522
TOP_K = 10


def search_50k(folder: Path | None = None, *, num_queries: int = 20) -> dict[str, float]:
    """50,000 examples of about 33 distinct tokens, width 128."""
    return _search(folder, num_examples=50_000, num_draws=39, max_tokens=None, width=128, num_queries=num_queries)


def search_1m(folder: Path | None = None, *, num_queries: int = 20) -> dict[str, float]:
    """1,000,000 examples of 10 distinct tokens (a few have less), width 64."""
    return _search(folder, num_examples=1_000_000, num_draws=16, max_tokens=10, width=64, num_queries=num_queries)


def _search(
    folder: Path | None, *, num_examples: int, num_draws: int, max_tokens: int | None, width: int, num_queries: int
) -> dict[str, float]:
    """Build, open, and ask one query at a time. Sizes in MB (10 ** 6 bytes); CPU time is that of all threads."""
    shape = {"num_draws": num_draws, "max_tokens": max_tokens, "width": width}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        index, cache = Path(scratch) / "index", Path(scratch) / "cache"
        figures = _timed("write_s", lambda: _build(index, num_examples=num_examples, **shape))
        reader = IndexReader.open(index, cache_dir=cache)
        generator = np.random.default_rng(1)
        queries = [_random_rows(1, generator, **shape) for _ in range(num_queries)]
        figures |= _timed("map_s", lambda: _extremes(reader, queries[0]))
        reader = IndexReader.open(index, cache_dir=cache, verify=False)
        _extremes(reader, queries[0])
        before = _anonymous_mb()
        times, cpu_times = [], []
        for query in queries:
            start, cpu_start = time.perf_counter(), time.process_time()
            _extremes(reader, query)
            times.append(1000 * (time.perf_counter() - start))
            cpu_times.append(1000 * (time.process_time() - cpu_start))
        peak = _peak_anonymous_mb(lambda: [_extremes(reader, query) for query in queries[:5]])
        matched = [_num_matched(reader, query) for query in queries]
        return figures | {
            "num_rows": len(reader._map(0, None).rows),
            "tokens_per_example": round(len(reader._map(0, None).rows) / num_examples, 1),
            "matched_rows": statistics.median(matched),
            "median_ms": round(statistics.median(times), 1),
            "min_ms": round(min(times), 1),
            "max_ms": round(max(times), 1),
            "median_cpu_ms": round(statistics.median(cpu_times), 1),
            "extra_mb": round(peak - before, 1),
            "process_mb": round(peak, 1),
            "map_mb": round(sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e6, 1),
            "folder_mb": round(sum(file.stat().st_size for file in index.rglob("*") if file.is_file()) / 1e6, 1),
            "threads": torch.get_num_threads(),
        }


def _build(folder: Path, *, num_examples: int, width: int, **shape: int | None) -> None:
    writer = IndexWriter(folder, width=width, vocabulary_size=VOCABULARY_SIZE, num_examples=num_examples)
    writer.write_examples(pa.table({"example_id": np.arange(num_examples)}))
    facts = {"epoch": 1.0, "learning_rate": 1.0, "path": "none", "model_class": "none", "fingerprint": "none"}
    generator = np.random.default_rng(0)
    with writer.checkpoint("checkpoint-1", step=1, **facts) as checkpoint:
        for start in range(0, num_examples, 2000):
            checkpoint.add(_random_rows(min(2000, num_examples - start), generator, width=width, **shape))
        writer.publish(checkpoint)


def _random_rows(
    num_examples: int, generator: np.random.Generator, *, num_draws: int, max_tokens: int | None, width: int
) -> TokenRows:
    """Examples of `num_draws` words by Zipf's law, repeats merged, the first `max_tokens` drawn kept."""
    cumulative = np.cumsum(1 / np.arange(1, VOCABULARY_SIZE + 1))
    draws = np.searchsorted(cumulative, generator.random((num_examples, num_draws)) * cumulative[-1])
    examples = np.arange(num_examples).repeat(num_draws)
    keys, first = np.unique(examples * VOCABULARY_SIZE + draws.ravel(), return_index=True)
    if max_tokens is not None:
        drawn = keys[np.argsort(first)]  # example by example, in the order of drawing
        owners = drawn // VOCABULARY_SIZE
        ranks = np.arange(len(drawn)) - np.searchsorted(owners, owners)
        keys = np.sort(drawn[ranks < max_tokens])
    offsets = np.searchsorted(keys, np.arange(num_examples + 1) * VOCABULARY_SIZE)
    rows = generator.standard_normal((len(keys), width), dtype=np.float32)
    tokens = torch.from_numpy(keys % VOCABULARY_SIZE)
    return TokenRows(torch.from_numpy(offsets), tokens, torch.from_numpy(rows), virtual=False)


def _num_matched(reader: IndexReader, query: TokenRows) -> int:
    return int(np.diff(reader._map(0, None).offsets)[query.tokens.numpy()].sum())


def _extremes(reader: IndexReader, query: TokenRows) -> np.ndarray:
    """The strongest examples of one query at the only checkpoint."""
    return select_extremes(reader.scores(0, query)[0], TOP_K)


def _timed(name: str, function) -> dict[str, float]:
    start = time.perf_counter()
    function()
    return {name: round(time.perf_counter() - start, 5)}


def _anonymous_mb() -> float:
    """Resident memory that is no file's, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("This benchmark reads /proc/self/status, which is there on Linux only.")


def _peak_anonymous_mb(function) -> float:
    """The largest it gets while `function` runs, looked at every millisecond."""
    seen, done = [_anonymous_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(_anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the temporary indexes go")
    parser.add_argument("--sizes", nargs="+", choices=["50k", "1m"], default=["50k", "1m"])
    arguments = parser.parse_args()
    functions = {"50k": search_50k, "1m": search_1m}
    print(json.dumps({f"search_{size}": functions[size](arguments.folder) for size in arguments.sizes}))


if __name__ == "__main__":
    main()
