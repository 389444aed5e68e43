"""
Universal generalization on real text: weights of eight English domains that should serve all eight.

    python -m benchmarks.universal --data_dir ../shared/data/lm --output_dir outputs/universal

For each seed: a proxy of 0.9 million parameters (2 layers, width 128) learns the weights by the paper's recipe (the target is the sum of the
step's own domains); then the same shape is trained from scratch on uniform, natural-proportion and the seed's learned
weights, for the same tokens, and evaluated on every domain's validation split.

Prints the table of perplexities. Last line: `average_ppl_learned`, `average_ppl_uniform`, `average_ppl_natural` and the
same for `worst_ppl`, each a list by seed, and `weights` by seed.
"""

import argparse
import json
from pathlib import Path

from benchmarks.commands import compare, flags, learn
from hf_doge.evaluation.comparison import Comparison
from hf_doge.plots import plot_comparison

DATA = ["--train_tokenizer_vocab", "4096", "--block_size", "64"]
PROXY = {
    "recipe": "paper",
    "mu": 0.05,
    "max_steps": 500,
    "per_device_train_batch_size": 32,  # 4 x 64 tokens of each domain per step
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
}
BASE = {
    "max_steps": 1000,
    "per_device_train_batch_size": 32,
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
    parser.add_argument("--model_size", default="micro", help="micro: 914,048 parameters; tiny: 1,303,680.")
    args = parser.parse_args()
    if not list(args.data_dir.glob("*.train.jsonl.gz")):
        print(f"Skipped: {args.data_dir} has no *.train.jsonl.gz.")
        return
    data = ["--data_dir", str(args.data_dir), "--model_size", args.model_size, *DATA]
    weights, runs = {}, []
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        weights[seed] = learn(folder / "proxy", seed, *data, *flags(PROXY)).mean
        mixtures = ["--weights", f"learned={folder / 'proxy' / 'domain_weights'}"]
        runs += compare(folder / "compare", seed, *data, *mixtures, *flags(BASE))

    comparison = Comparison(runs)
    comparison.save(args.output_dir)
    plot_comparison(comparison.to_plot_rows(), args.output_dir / "comparison.png")
    print(comparison.to_markdown())
    figures = {
        f"{row.split()[0]}_ppl_{mixture}": [round(float(value), 3) for value in comparison.perplexities(mixture)[row]]
        for row in ("average", "worst domain")
        for mixture in ("learned", "uniform", "natural")
    }
    figures["weights"] = [{name: round(value, 4) for name, value in weights[seed].items()} for seed in args.seeds]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
