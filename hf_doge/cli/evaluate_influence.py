"""`hf-doge evaluate-influence`: what becomes of predictions when the examples that a scorer blames are gone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from hf_doge.checks import check_choice, check_count, check_seed
from hf_doge.cli.console import save_plot, say
from hf_doge.cli.parser import parse
from hf_doge.evaluation.influence.experiment import CLASSES, evaluate_small_task
from hf_doge.evaluation.influence.scorers import SCORERS
from hf_doge.evaluation.influence.small_models import ARCHITECTURES
from hf_doge.evaluation.influence.small_tasks import load_small_task
from hf_doge.influence_plots import plot_case_deletion


@dataclass
class InfluenceEvaluationArguments:
    """Which task, which scorers, how many retrainings: points x ks x 2 x scorers x seeds at most."""

    _argument_group_name = "evaluation"

    data_dir: str = field(
        metadata={
            "help": "Folder with <task>.train.jsonl[.gz] and <task>.test.jsonl[.gz]; each record has `text` (or `premise` "
            "and `hypothesis`) and `label`, an integer."
        }
    )
    task: str = field(metadata={"help": "Name of the task's files, such as ag_news."})
    output_dir: str = field(
        default="influence_evaluation",
        metadata={"help": "Folder for the table, the plot and the journal of retrainings; the same folder continues."},
    )
    architecture: str = field(
        default="cnn",
        metadata={"help": "Which small classifier to train from scratch.", "choices": list(ARCHITECTURES)},
    )
    scorers: list[str] = field(
        default_factory=lambda: ["tracin_we", "tracin_we_topk", "tracin_last", "random"],
        metadata={"help": f"What to compare, among {', '.join(SCORERS)}."},
    )
    num_points: int = field(default=10, metadata={"help": "Test points, drawn at random. At least 1."})
    seeds: int = field(default=3, metadata={"help": "Retraining seeds: 1, 2, ... up to this number. At least 1."})
    ks: list[int] = field(
        default_factory=lambda: [10, 20, 40], metadata={"help": "How many training examples to remove, ascending."}
    )
    explain: str = field(
        default="predicted",
        metadata={"help": "Whose probability is followed: the predicted or the true class.", "choices": list(CLASSES)},
    )
    num_train: int = field(default=500, metadata={"help": "Training examples, drawn at random."})
    num_test: int = field(default=400, metadata={"help": "Test examples that points are drawn from."})
    max_length: int = field(default=32, metadata={"help": "Tokens per text."})
    width: int = field(default=32, metadata={"help": "Width of the embedding."})
    data_seed: int = field(default=0, metadata={"help": "Seed of the draw of examples and points."})

    def __post_init__(self) -> None:
        for name in ("num_points", "seeds", "num_train", "num_test", "width"):
            check_count(f"--{name}", getattr(self, name))
        check_count("--max_length", self.max_length, least=5)
        check_seed("--data_seed", self.data_seed, least=0)
        for k in self.ks:
            check_count("--ks", k)
        for name in ("ks", "scorers"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`--{name}` must name each once, and at least one, but got {values}.")
        for name in self.scorers:
            check_choice("--scorers", name, SCORERS)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args, *_ = parse(
        argv,
        InfluenceEvaluationArguments,
        prog="hf-doge evaluate-influence",
        description=(
            "Train a small classifier on a task, score its training examples, and retrain without the strongest "
            "proponents and opponents of some test points. Finished retrainings are kept and not done again."
        ),
        defaults={},
    )
    torch.set_num_threads(1)  # tiny models stall on more
    task = load_small_task(
        args.data_dir,
        args.task,
        num_train=args.num_train,
        num_test=args.num_test,
        max_length=args.max_length,
        seed=args.data_seed,
    )
    folder = Path(args.output_dir)
    try:
        evaluation = evaluate_small_task(
            task,
            args.architecture,
            scorers=args.scorers,
            ks=args.ks,
            num_points=args.num_points,
            num_seeds=args.seeds,
            explain=args.explain,
            width=args.width,
            point_seed=args.data_seed,
            journal_path=folder / "retrainings.jsonl",
        )
    except ImportError as error:  # a scorer's library: the message says which extra has it
        raise ValueError(str(error)) from error
    evaluation.save(folder)
    plot = save_plot(partial(plot_case_deletion, evaluation.result.to_plot_rows()), folder / "case_deletion.png")
    say(evaluation.to_markdown())
    say(f"Table: {folder / 'case_deletion.md'} (.json){f', plot: {plot}' if plot else ''}")
    return 0
