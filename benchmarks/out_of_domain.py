"""
Out-of-domain on real text: learn weights of six languages for a seventh that no model is trained on.

    python -m benchmarks.out_of_domain --data_dir ../shared/data/multilingual --output_dir outputs/out_of_domain

Sources en nl fr de es it, target ca. For each seed: a proxy of 1.3 million parameters (4 layers, width 128) learns the weights (the target
gives gradients only, from at most 200,000 tokens of its train split); then the same shape is trained from scratch on
uniform and on the learned weights, for the same tokens, and evaluated on the target's validation split.

Last line: `romance_mass` (learned weight of es, fr and it together), `target_ppl_learned`, `target_ppl_uniform`, each a
list by seed, and `weights` by seed.
"""

import argparse
import json
import math
from pathlib import Path

from benchmarks.commands import compare, flags, learn
from hf_doge.evaluation.comparison import Comparison

SOURCES = ["en", "nl", "fr", "de", "es", "it"]
ROMANCE = ["fr", "es", "it"]
TARGET = "ca"

DATA = ["--train_tokenizer_vocab", "4096", "--block_size", "64", "--domains", *SOURCES, "--target", TARGET]
PROXY = {
    "max_target_tokens": 200_000,
    "recipe": "official",  # each domain's gradient clipped alone: no single batch decides the weights
    "mu": 0.01,  # at 0.002 two domains take most of the weight within the first tenth of the run
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model_size", default="tiny", help="micro: 914,048 parameters; tiny: 1,303,680.")
    args = parser.parse_args()
    if not (args.data_dir / f"{TARGET}.train.jsonl.gz").exists():
        print(f"Skipped: {args.data_dir} has no {TARGET}.train.jsonl.gz.")
        return
    data = ["--data_dir", str(args.data_dir), "--model_size", args.model_size, *DATA]
    weights, runs = {}, []
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        weights[seed] = learn(folder / "proxy", seed, *data, *flags(PROXY)).mean
        mixtures = ["--baselines", "uniform", "--weights", f"learned={folder / 'proxy' / 'domain_weights'}"]
        runs += compare(folder / "compare", seed, *data, *mixtures, *flags(BASE))

    comparison = Comparison(runs)
    comparison.save(args.output_dir)
    print(comparison.to_markdown())
    perplexity = {(run.mixture, run.seed): math.exp(run.losses[TARGET]) for run in runs}
    figures = {
        "romance_mass": [round(sum(weights[seed][name] for name in ROMANCE), 4) for seed in args.seeds],
        "target_ppl_learned": [round(perplexity["learned", seed], 2) for seed in args.seeds],
        "target_ppl_uniform": [round(perplexity["uniform", seed], 2) for seed in args.seeds],
        "weights": [{name: round(weight, 4) for name, weight in weights[seed].items()} for seed in args.seeds],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
