"""
How hard the recipe "doge_plus" goes by `mu`, on real text: the weights that `hf-doge learn` finds, over two seeds each.

    OMP_NUM_THREADS=1 python -m benchmarks.mu_in_nats universal one_kin catalan --data_dir ../shared/data --output_dir outputs/mu

Settings, model and training are those of `benchmarks/mixtures.py`. The criterion, fixed before the first run: of the values of
`mu`, the smallest (the fastest weights) for which

1. on `universal` no mean weight differs between the seeds by more than .01, and
2. on `one_kin` Spanish, the one source that is near, has at least twice the weight of each other source in every seed.

The last line is JSON: for each setting and `mu` the mean weights by seed, their entropies in nats, the largest difference
between seeds, and on a setting with a target the heaviest source's weight over that of the next. A finished run is kept.
"""

import argparse
import json
from pathlib import Path

from benchmarks.mixtures import SETTINGS, TRAINING, link_data, run
from hf_doge import DomainWeights

VALUES = (3.0, 10.0, 30.0, 100.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with `lm` and `multilingual`.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--mu", type=float, nargs="+", default=VALUES)
    parser.add_argument("--seeds", type=int, nargs="+", default=(101, 102))
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--model_size", default="nano")
    parser.add_argument("--recipe", default="doge_plus")
    args = parser.parse_args()
    if not (args.data_dir / "lm").is_dir():
        print(f"Skipped: {args.data_dir} has no folder `lm`.\n{json.dumps({'skipped': str(args.data_dir)})}")
        return
    print(json.dumps({name: {f"{mu:g}": look(name, mu, args) for mu in args.mu} for name in args.settings}))


def look(name: str, mu: float, args: argparse.Namespace) -> dict:
    """What one value finds in a setting, over the seeds."""
    names, target, _ = SETTINGS[name]
    data = link_data(args.data_dir, args.output_dir / name / "data", names)
    found = []
    for seed in args.seeds:
        folder = args.output_dir / name / f"{args.recipe}-mu{mu:g}-seed{seed}"
        flags = [f"--data_dir={data}", *TRAINING, f"--max_steps={args.max_steps}", f"--model_size={args.model_size}"]
        flags += [f"--recipe={args.recipe}", f"--mu={mu}", f"--seed={seed}", f"--output_dir={folder}"]
        flags += ["--save_strategy=no", *(["--target", target] if target else [])]
        run("learn", flags, folder)
        found.append(DomainWeights.from_pretrained(folder / "domain_weights"))
    spread = max(max(one.mean[n] for one in found) - min(one.mean[n] for one in found) for n in found[0].names)
    ranked = [sorted(one.mean.values(), reverse=True) for one in found]
    return {
        "weights": [{n: round(weight, 4) for n, weight in one.mean.items()} for one in found],
        "last": [{n: round(weight, 4) for n, weight in one.last.items()} for one in found],
        "entropy": [round(one.entropy, 4) for one in found],
        "max_entropy": round(found[0].max_entropy, 4),
        "largest_difference": round(spread, 4),
        **({"first_over_second": [round(one[0] / one[1], 2) for one in ranked]} if target else {}),
    }


if __name__ == "__main__":
    main()
