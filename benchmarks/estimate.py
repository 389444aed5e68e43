"""
What the free estimate of domain weights costs: 8 domains of 2 million tokens each, as datasets and as streams.

    python -m benchmarks.estimate

Tokens are drawn from bigram chains: each domain prefers other successors, token frequencies are Zipf's over 32,000 entries, rows
have 512 tokens. The target is a known mixture of three of the domains (100,000 tokens). Each run is a process of its own;
seconds are CPU seconds of the estimate alone, memory is how far the peak of the process rose above what it held with the data
open. The baseline reads the same tokens and counts unigrams with NumPy, nothing else. The last line is JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_doge import estimate_domain_weights

VOCAB, ROW, TARGET = 32_000, 512, {"domain_0": 0.5, "domain_3": 0.3, "domain_6": 0.2}


def draw_tokens(generator: np.random.Generator, num_tokens: int, domain: int) -> np.ndarray:
    """Zipf tokens, half of which follow from the one before by the domain's own rule; shape `(num_rows, 512)`."""
    ranks = np.minimum(generator.zipf(1.2, size=num_tokens) - 1, VOCAB - 1)
    follows = np.flatnonzero(generator.random(num_tokens) < 0.5)[1:]
    ranks[follows] = (ranks[follows - 1] * (2 * domain + 3) + 17 * domain) % VOCAB
    return ranks[: num_tokens // ROW * ROW].reshape(-1, ROW).astype(np.int32)


def write_data(folder: Path, num_domains: int, num_tokens: int) -> None:
    """Domains and target as Arrow files."""
    generator = np.random.default_rng(0)
    for domain in range(num_domains):
        rows = draw_tokens(generator, num_tokens, domain)
        Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folder / f"domain_{domain}"))
    parts = [draw_tokens(generator, int(100_000 * share), int(name[-1])) for name, share in TARGET.items()]
    Dataset.from_dict({"input_ids": np.concatenate(parts)}).save_to_disk(str(folder / "target"))


def measure(folder: Path, kind: str) -> dict[str, float]:
    """One run in this process."""
    train = {path.name: Dataset.load_from_disk(str(path)) for path in sorted(folder.glob("domain_*"))}
    target = Dataset.load_from_disk(str(folder / "target"))
    if kind == "stream":
        train = {name: dataset.to_iterable_dataset(num_shards=4) for name, dataset in train.items()}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if kind == "baseline":
        for dataset in train.values():
            counts = np.zeros(VOCAB, dtype=np.int64)
            for table in dataset.with_format("arrow").iter(batch_size=1_000):
                flat = table.column("input_ids").combine_chunks().flatten().to_numpy()
                counts += np.bincount(flat, minlength=VOCAB)
        result = {}
    else:
        weights = estimate_domain_weights(train, target, disable_tqdm=True)
        result = {"error": max(abs(weights.mean[name] - TARGET.get(name, 0.0)) for name in weights.mean)}
    seconds = time.process_time() - start
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "mib": rise, **result}


def main() -> None:
    """Write the data, run each kind in a process of its own, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_domains", type=int, default=8)
    parser.add_argument("--num_tokens", type=int, default=2_000_000, help="Of each domain.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(Path(args.run[0]), args.run[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), args.num_domains, args.num_tokens)
        figures: dict[str, dict[str, float]] = {}
        for _ in range(args.rounds):
            for kind in ("baseline", "dataset", "stream"):
                command = [sys.executable, "-m", "benchmarks.estimate", "--run", name, kind]
                run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                best = figures.setdefault(kind, run)
                figures[kind] = {key: min(value, best[key]) for key, value in run.items()}
    for kind, run in figures.items():
        print(f"{kind:9}", {key: round(value, 4) for key, value in run.items()})
    base = figures["baseline"]["seconds"]
    print(
        json.dumps(
            {
                **{f"{kind}_seconds": round(run["seconds"], 2) for kind, run in figures.items()},
                **{
                    f"{kind}_over_baseline": round(figures[kind]["seconds"] / base, 1)
                    for kind in ("dataset", "stream")
                },
                **{f"{kind}_mib": round(run["mib"]) for kind, run in figures.items()},
                "largest_error_of_a_weight": round(figures["dataset"]["error"], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
