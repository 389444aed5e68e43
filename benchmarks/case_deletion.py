"""
Case deletion on two tasks with two architectures: what becomes of a prediction when its proponents are gone.

    OMP_NUM_THREADS=1 python -m benchmarks.case_deletion --data_dir ../shared/data/classification --output_dir outputs/case_deletion

About an hour on one core: 500 training examples of at most 32 tokens, up to 1,446 retrainings of half a second for each
of the four tables. Interrupted, the same command continues; with more scorers it adds only their retrainings.

Prints each table. Last line: `auc_del+` and `auc_del-` by task, architecture and scorer in percentage points, each with
its 95 % interval over test points, the noise of retraining, test accuracies, and cancellation ratios.
"""

import argparse
import json
from pathlib import Path

import torch

from hf_doge.evaluation.influence.experiment import InfluenceEvaluation, evaluate_small_task
from hf_doge.evaluation.influence.scorers import SCORERS
from hf_doge.evaluation.influence.small_tasks import load_small_task
from hf_doge.influence_plots import plot_case_deletion

SCORERS_WITHOUT_LIBRARY = [name for name in SCORERS if not name.startswith("bm25")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["ag_news", "toxicity_jigsaw"])
    parser.add_argument("--architectures", nargs="+", default=["cnn", "transformer"])
    parser.add_argument("--scorers", nargs="+", default=None, help="Default: all whose library is installed.")
    parser.add_argument("--num_train", type=int, default=500)
    parser.add_argument("--num_points", type=int, default=10)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--ks", type=int, nargs="+", default=[10, 20, 40])
    args = parser.parse_args()
    torch.set_num_threads(1)  # tiny models stall on more
    scorers = args.scorers or installed_scorers()
    figures = {}
    for task_name in args.tasks:
        if not list(args.data_dir.glob(f"{task_name}.train.jsonl*")):
            print(f"Skipped: {args.data_dir} has no {task_name}.train.jsonl.gz.")
            continue
        task = load_small_task(args.data_dir, task_name, num_train=args.num_train)
        for architecture in args.architectures:
            folder = args.output_dir / f"{task_name}-{architecture}"
            evaluation = evaluate_small_task(
                task,
                architecture,
                scorers=scorers,
                ks=args.ks,
                num_points=args.num_points,
                num_seeds=args.num_seeds,
                journal_path=folder / "retrainings.jsonl",
            )
            evaluation.save(folder)
            try:
                plot_case_deletion(evaluation.result.to_plot_rows(), folder / "case_deletion.png")
            except ImportError as error:
                print(f"No plot: {error}")
            print(f"\n## {task_name}, {architecture}\n\n{evaluation.to_markdown()}", flush=True)
            figures[f"{task_name}/{architecture}"] = summarise(evaluation)
    print(json.dumps(figures))


def installed_scorers() -> list[str]:
    """All scorers, without BM25 where its library is missing."""
    try:
        import bm25s  # noqa: F401
    except ImportError:
        print("Without BM25: bm25s is not installed.")
        return SCORERS_WITHOUT_LIBRARY
    return list(SCORERS)


def summarise(evaluation: InfluenceEvaluation) -> dict[str, object]:
    """The numbers of one table for the last line, changes in percentage points."""
    summary = evaluation.result.summary()
    noise = summary.pop("retraining noise")
    return {
        **{
            name: {
                scorer: [round(100 * value, 2) for value in (values[name]["mean"], *values[name]["interval"])]
                for scorer, values in summary.items()
            }
            for name in ("auc_del+", "auc_del-")
        },
        "noise": [round(100 * value, 2) for value in (noise["mean"], *noise["interval"])],
        "accuracy": [round(value, 3) for value in evaluation.accuracy],
        "cancellation": [
            {name: round(ratios[name], 2) for name in ("embedding", "last_weight", "last_bias")}
            for ratios in evaluation.cancellation
        ],
        "num_retrainings": evaluation.result.num_retrainings,
    }


if __name__ == "__main__":
    main()
