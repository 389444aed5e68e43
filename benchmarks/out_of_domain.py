"""
Out-of-domain on real text: learn weights of six languages for a seventh that no model is trained on.

    python -m benchmarks.out_of_domain --data_dir ../shared/data/multilingual --output_dir outputs/out_of_domain

Sources en nl fr de es it, target ca. For each seed: a proxy of 1.3 million parameters learns the weights (the target
gives gradients only, from at most 200,000 tokens of its train split); then the same shape is trained from scratch on
uniform and on the learned weights, for the same tokens, and evaluated on the target's validation split.

Last line: `romance_mass` (learned weight of es, fr and it together), `target_ppl_learned`, `target_ppl_uniform`, each a
list by seed, and `weights` by seed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.cli import main as hf_doge

SOURCES = ["en", "nl", "fr", "de", "es", "it"]
ROMANCE = ["fr", "es", "it"]
TARGET = "ca"

DATA = ["--train_tokenizer_vocab", "4096", "--block_size", "64", "--domains", *SOURCES, "--target", TARGET]
MODEL = ["--model_size", "tiny"]  # 4 layers, width 128: 1,303,680 parameters
PROXY = {
    "max_target_tokens": 200_000,
    "recipe": "paper",
    "mu": 0.002,
    "max_steps": 800,
    "per_device_train_batch_size": 24,  # 4 x 64 tokens of each source per step
    "per_device_target_batch_size": 16,  # 1,024 tokens of the target per step
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
}
BASE = {
    "max_steps": 1500,
    "per_device_train_batch_size": 24,
    "per_device_eval_batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
}
QUIET = ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "100"]


def flags(arguments: dict) -> list[str]:
    """Arguments as command-line flags."""
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def run(command: list[str]) -> None:
    """Run an hf-doge command; stop if it fails."""
    if code := hf_doge(command):
        sys.exit(code)


def learn(data_dir: Path, folder: Path, seed: int) -> DomainWeights:
    """The weights of one seed, learned now or found from an earlier run."""
    weights = folder / "domain_weights"
    if not weights.exists():
        where = ["--data_dir", str(data_dir), "--output_dir", str(folder), "--seed", str(seed)]
        run(["learn", *where, *DATA, *MODEL, *flags(PROXY), *QUIET])
    return DomainWeights.from_pretrained(weights)


def compare(data_dir: Path, folder: Path, seed: int, weights: Path) -> dict[str, float]:
    """Perplexity on the target by mixture."""
    where = ["--data_dir", str(data_dir), "--output_dir", str(folder), "--seeds", str(seed)]
    mixtures = ["--baselines", "uniform", "--weights", f"learned={weights}"]
    run(["compare", *where, *mixtures, *DATA, *MODEL, *flags(BASE), *QUIET])
    runs = [json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")]
    return {finished["mixture"]: math.exp(finished["losses"][TARGET]) for finished in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    if not (args.data_dir / f"{TARGET}.train.jsonl.gz").exists():
        print(f"Skipped: {args.data_dir} has no {TARGET}.train.jsonl.gz.")
        return
    figures = {"romance_mass": [], "target_ppl_learned": [], "target_ppl_uniform": [], "weights": []}
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        weights = learn(args.data_dir, folder / "proxy", seed)
        perplexity = compare(args.data_dir, folder / "compare", seed, folder / "proxy" / "domain_weights")
        figures["romance_mass"].append(round(sum(weights.mean[name] for name in ROMANCE), 4))
        figures["target_ppl_learned"].append(round(perplexity["learned"], 2))
        figures["target_ppl_uniform"].append(round(perplexity["uniform"], 2))
        figures["weights"].append({name: round(weight, 4) for name, weight in weights.mean.items()})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
