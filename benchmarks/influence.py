"""
Speed and size of the influence index, beside captum, dattri, dattri-llm and kronfluence, in one run.

    python3 -m venv /tmp/venv-peers
    /tmp/venv-peers/bin/python -m pip install --no-deps -r benchmarks/constraints-peers.txt
    python -m benchmarks.influence --peers_python /tmp/venv-peers/bin/python --output_dir outputs/influence

Every library gets the same files: a 2-layer BERT classifier of width 128 with random weights, 500 training examples and
two sets of 50 queries, 32 to 64 tokens of Zipf frequencies, padded to 64. Each runs in a process of its own on one
thread, after a warm-up on two examples, and tells its CPU seconds, the least of five runs (slow ones are not asked again
after 15 seconds), and how far its memory rose in the first; of several rounds, turn by turn, the least counts. Model and examples are loaded before the clock starts, libraries' own files after.

- First queries: build and score. Ours is record, write the index (float16), open it, map it, score. Peers are restricted
  to the embedding matrix and must give the same scores; kronfluence has no embeddings and scores all linear layers. Each
  peer runs with the batch size that was fastest for it.
- Second queries: new ones, against what is on disk, opened anew in another process. Ours has its memory map, made by the first; with
  the map made anew it is `second_seconds_mapping_anew`. captum keeps nothing and does all again.
- Both are the paper's scores, which the peers give too. `default_over_paper` is what ours cost at the defaults for such a
  classifier, words and the last layer by cosine, over that, for the first and the second queries; rows of one checkpoint in both.

The last line is JSON. Ratios are the other's CPU seconds over ours, the better of dattri-llm's two routes. What cannot be
measured, such as a peer that is not installed, is null. A runner that fails says why, and is among `failed`; the others go
on.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks.peers.workload import make_workload

OURS = ("first", "first_float32", "first_default", "second", "second_default", "second_mapping_anew")
PEERS = {
    "captum": ("first", "second"),
    "dattri": ("first",),
    "dattri_llm": (
        "first_instance",
        "first_token",
        "store_instance",
        "store_token",
        "second_instance",
        "second_token",
    ),
    "kronfluence": ("first",),
}
SAME_SCORES = 1e-4  # of the largest score, against our float32 rows
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

Results = dict[str, dict[str, float]]


FAILED: list[str] = []  # what did not come to its end


def run(command: list[str], *, name: str, environment: dict[str, str] | None = None) -> str | None:
    """Standard output of a command; `None` if it failed, with the end of what it said on standard error printed."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode == 0:
        return done.stdout
    FAILED.append(name)
    print(f"{name} failed with exit code {done.returncode}: {' '.join(command)}\n{done.stderr[-3000:]}", flush=True)
    return None


def installed(python: str | None, library: str) -> bool:
    """Whether a peer can be had; says so if it cannot."""
    if python is not None and not subprocess.run([python, "-c", f"import {library}"], capture_output=True).returncode:
        return True
    print(f"Skipped {library}: install benchmarks/constraints-peers.txt and pass --peers_python.", flush=True)
    return False


def measure(folder: Path, peers_python: str | None, *, rounds: int) -> tuple[Results, dict[str, np.ndarray]]:
    """The least of each figure over the rounds, and the scores, by `library-route`."""
    runs = [(sys.executable, "hf_doge", route) for route in OURS]
    runs += [
        (peers_python, peer, route)
        for peer, routes in PEERS.items()
        if installed(peers_python, peer)
        for route in routes
    ]
    results: Results = {}
    for number in tqdm(range(rounds), desc="Rounds"):
        for python, library, route in tqdm(runs, leave=False):
            # The state is there for one route to continue from another.
            kind = next((kind for kind in ("_float32", "_default") if route.endswith(kind)), "")
            state = folder / f"round-{number}" / f"{library}{kind}"
            state.mkdir(parents=True, exist_ok=True)
            output = folder / "results" / f"{library}-{route}"
            command = [python, "-m", f"benchmarks.peers.run_{library}", route, "--data_dir", folder / "data"]
            command = [str(word) for word in (*command, "--state_dir", state, "--output", output)]
            if run(command, name=f"{output.name}, round {number}", environment=ONE_THREAD) is None:
                continue
            figures = json.loads(Path(f"{output}.json").read_text())
            kept = results.setdefault(output.name, figures)
            results[output.name] = {name: min(value, kept[name]) for name, value in figures.items()}
    scores = {path.stem: np.load(path) for path in (folder / "results").glob("*.npy") if path.stem in results}
    return results, scores


def largest_differences(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """How far scores of the first queries are from ours with float32 rows, over the largest of all."""
    ours = scores.get("hf_doge-first_float32")
    if ours is None:
        return {}
    other = ("kronfluence-first", "hf_doge-first_default")  # scores of another kind
    names = [name for name in scores if "-first" in name and name not in other]
    return {name: float(f"{np.abs(scores[name] - ours).max() / np.abs(ours).max():.2g}") for name in names}


def ratio(results: Results, others: list[str], ours: str) -> float | None:
    """CPU seconds of the fastest of the others over ours."""
    found = [results[name]["cpu_seconds"] for name in others if name in results]
    return round(min(found) / results[ours]["cpu_seconds"], 2) if found and ours in results else None


def figure(results: Results, name: str, what: str, digits: int) -> float | None:
    """One figure of one run, if it came to its end."""
    return round(results[name][what], digits) if name in results else None


def other_script(name: str, *arguments: str, threads: int = 1) -> dict:
    """The JSON that another benchmark ends with; empty if it failed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    output = run(command, name=name, environment={"OMP_NUM_THREADS": str(threads)})
    return {} if output is None else json.loads(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="New, or of an earlier run.")
    parser.add_argument("--peers_python", help="Python of the peers' environment; without it they are skipped.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_train", type=int, default=500)
    parser.add_argument("--num_queries", type=int, default=50)
    parser.add_argument("--skip", nargs="+", choices=["recording", "online", "search"], default=[])
    args = parser.parse_args()
    folder = args.output_dir / f"{args.num_train}x{args.num_queries}-{os.getpid()}"
    make_workload(folder / "data", num_train=args.num_train, num_queries=args.num_queries)
    results, scores = measure(folder, args.peers_python, rounds=args.rounds)
    for name, figures in results.items():
        print(f"{name:32} {figures['cpu_seconds']:8.2f} CPU s {figures['extra_mib']:8.0f} MiB")
    differences = largest_differences(scores)
    print(f"Largest difference of scores from ours with float32 rows, over the largest score: {differences}")
    index = folder / "round-0" / "hf_doge" / "index"

    recording = {} if "recording" in args.skip else other_script("influence_recording")
    online = {} if "online" in args.skip else other_script("online_overhead").get("online_overhead", {})
    search = {} if "search" in args.skip else other_script("influence_search", threads=2)
    of_peers = [value for name, value in differences.items() if not name.startswith("hf_doge")]
    second_llm = ["dattri_llm-second_instance", "dattri_llm-second_token"]
    figures = {
        "recording_over_step": recording.get("recording_over_step"),
        "captum_over_ours": ratio(results, ["captum-first"], "hf_doge-first"),
        "dattri_over_ours": ratio(results, ["dattri-first"], "hf_doge-first"),
        "dattri_llm_over_ours": ratio(
            results, ["dattri_llm-first_instance", "dattri_llm-first_token"], "hf_doge-first"
        ),
        "kronfluence_over_ours": ratio(results, ["kronfluence-first"], "hf_doge-first"),
        "second_queries_captum_over_ours": ratio(results, ["captum-second"], "hf_doge-second"),
        "second_queries_dattri_llm_over_ours": ratio(results, second_llm, "hf_doge-second"),
        "default_over_paper": {
            name: ratio(results, [f"hf_doge-{name}_default"], f"hf_doge-{name}") for name in ("first", "second")
        },
        "bytes_500": sum(path.stat().st_size for path in index.rglob("*") if path.is_file()),
        "online_overhead": max(online.values(), default=None),
        "search_50k_ms": search.get("search_50k", {}).get("median_ms"),
        "search_1m_ms": search.get("search_1m", {}).get("median_ms"),
        "search_1m_rss_mb": search.get("search_1m", {}).get("extra_mb"),
        "recording_rss_ratio": recording.get("recording_rss_ratio"),
        "ours_cpu_seconds": figure(results, "hf_doge-first", "cpu_seconds", 3),
        "ours_extra_mib": figure(results, "hf_doge-first", "extra_mib", 1),
        "ours_second_cpu_seconds": figure(results, "hf_doge-second", "cpu_seconds", 3),
        "second_seconds_mapping_anew": figure(results, "hf_doge-second_mapping_anew", "cpu_seconds", 3),
        "same_scores": all(difference <= SAME_SCORES for difference in of_peers) if of_peers else None,
        "largest_differences": differences,
        "recording": recording,
        "online": online,
        "search": search,
        "failed": FAILED,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
