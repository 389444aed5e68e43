"""
What stepping the proxy with the weights of the step before (`lagged_update=True`) changes, against the paper's order.

    python -m benchmarks.lagged_update --data_dir ../shared/data/lm --output_dir outputs/lagged_update

The proxy of `benchmarks/universal.py` learns the weights of eight English domains twice from the same seed, once in either
order. Printed are both mean weights and, as the last line, `max_weight_difference` and `max_loss_difference` (over domains:
mean weights, and nats of the last tenth of the steps' losses), beside `max_weight_difference_seeds`, the same between two
seeds in the paper's order: what the luck of a seed changes.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.commands import flags, learn
from benchmarks.universal import DATA, PROXY
from hf_doge.artifacts.domain_weights import DomainWeights


def largest_difference(a: DomainWeights, b: DomainWeights) -> float:
    """Over the domains, of their mean weights."""
    return max(abs(a.mean[name] - b.mean[name]) for name in a.mean)


def last_losses(weights: DomainWeights) -> np.ndarray:
    """Mean loss of each domain over the last tenth of the trajectory, shape `(num_domains,)`."""
    losses = weights.trajectory.losses
    return np.nanmean(losses[-max(1, len(losses) // 10) :], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=300)
    args = parser.parse_args()
    if not list(args.data_dir.glob("*.train.jsonl.gz")):
        print(f"Skipped: {args.data_dir} has no *.train.jsonl.gz.")
        return
    words = ["--data_dir", str(args.data_dir), "--model_size", "micro", *DATA]
    words += flags({**PROXY, "max_steps": args.max_steps})
    exact = learn(args.output_dir / "exact", 1, *words)
    lagged = learn(args.output_dir / "lagged", 1, *words, "--lagged_update", "true")
    other_seed = learn(args.output_dir / "seed2", 2, *words)
    for name in exact.mean:
        print(
            f"{name:14} {exact.mean[name]:.5f} exact  {lagged.mean[name]:.5f} lagged  {other_seed.mean[name]:.5f} seed 2"
        )
    figures = {
        "max_weight_difference": round(largest_difference(exact, lagged), 6),
        "max_loss_difference": round(float(np.abs(last_losses(exact) - last_losses(lagged)).max()), 5),
        "max_weight_difference_seeds": round(largest_difference(exact, other_seed), 6),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
