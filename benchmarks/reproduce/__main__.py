"""
One experiment: `python -m benchmarks.reproduce NAME --data_dir ../shared/data --output_dir outputs/reproduce`.

Finished parts (one training, say) are kept in `OUTPUT_DIR/NAME/parts`, so that a run which was killed goes on where it was,
and a second run only writes its tables again. Tables (Markdown and Parquet), a plot and `run.json` (command, commit,
machine, time) are written to `RESULTS_DIR/NAME`. The last line of the output is one line of JSON.
"""

import argparse
import importlib
import json
from pathlib import Path

import torch

from benchmarks.reproduce.arguments import SCALES, Arguments
from benchmarks.reproduce.machine import describe_commit, describe_data
from benchmarks.reproduce.report import write_results
from benchmarks.reproduce.store import PartStore

EXPERIMENTS = (
    "doge_universal",
    "doge_out_of_domain",
    "doge_data_restricted",
    "doge_finetune",
    "few_shot",
    "tracin_case_deletion",
    "tracin_mislabelled",
    "tracin_lm",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=EXPERIMENTS, help="Which experiment.")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="Folder with the subfolders lm, multilingual and classification."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Finished parts, models and learned weights.")
    parser.add_argument("--results_dir", type=Path, default=None, help="Tables and plot. Default: OUTPUT_DIR/results.")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=None, help="Default: those of the experiment at this scale."
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="small",
        help="tiny: seconds, shows only that it runs; small: one CPU core; gpu: the paper's shapes.",
    )
    parser.add_argument(
        "--stages", nargs="+", default=None, help="Only these stages of the experiment. Default: all of them."
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; small models stall on more than one.")
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    results_dir = parsed.results_dir or parsed.output_dir / "results"
    args = Arguments(
        name=parsed.name,
        data_dir=parsed.data_dir,
        output_dir=parsed.output_dir / parsed.name,
        seeds=None if parsed.seeds is None else tuple(parsed.seeds),
        scale=parsed.scale,
        stages=None if parsed.stages is None else tuple(parsed.stages),
        store=PartStore(parsed.output_dir / parsed.name / "parts"),
    )
    describe_commit()  # before the run: what is committed meanwhile is not what runs
    args.store.belongs_to(scale=args.scale, data=describe_data(args.data_dir))
    experiment = importlib.import_module(f"benchmarks.reproduce.{parsed.name}")
    results = experiment.run(args)
    write_results(results, args, results_dir / parsed.name)
    print(json.dumps(results.figures, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
