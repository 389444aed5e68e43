"""`hf-doge demo`: the whole journey on text that this machine already has, in minutes and without network."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_doge.cli import compare, learn
from hf_doge.cli.console import say
from hf_doge.cli.demo_corpus import build_demo_corpus
from hf_doge.cli.demo_influence import trace_continuation
from hf_doge.cli.parser import parse
from hf_doge.cli.report import collect_sections, write_report

# Sized to end within five minutes on two CPU cores. Proxy and base model have half a million parameters.
SHARED_FLAGS = [
    "--block_size=64",
    "--model_size=micro",
    "--learning_rate=1e-3",
    "--lr_scheduler_type=cosine",
    "--warmup_steps=30",
    "--logging_strategy=no",
]
LEARN_FLAGS = [
    "--train_tokenizer_vocab=1024",
    "--per_device_train_batch_size=20",
    "--max_steps=300",
    "--save_strategy=no",
]
COMPARE_FLAGS = [
    "--per_device_train_batch_size=8",
    "--max_steps=500",
    "--per_device_eval_batch_size=64",
    "--seeds",
    "1",
    "2",
]


@dataclass
class DemoArguments:
    """Where everything goes."""

    _argument_group_name = "demo"

    output_dir: Path = field(default=Path("demo"), metadata={"help": "Where everything goes."})


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    (args,) = parse(
        argv,
        DemoArguments,
        prog="hf-doge demo",
        description=(
            "Build a small corpus from text on this machine, learn domain weights with a tiny proxy, and compare them "
            "with uniform and natural weights; then trace what a small model says to its training text. Less than four "
            "minutes on two CPU cores; no network."
        ),
    )
    folder = args.output_dir
    num_threads = torch.get_num_threads()
    # Threads of one small product wait for each other: two of them beside other programs took thirty times as long.
    torch.set_num_threads(1)
    try:
        _run(folder)
    finally:
        torch.set_num_threads(num_threads)
    return 0


def _run(folder: Path) -> None:
    start = time.perf_counter()
    corpus_dir, proxy_dir, comparison_dir = folder / "corpus", folder / "proxy", folder / "comparison"

    say("[1/5] Building a corpus from the texts on this machine")
    corpus = build_demo_corpus(corpus_dir)
    for domain, splits in corpus.items():
        train, validation = splits["train"], splits["validation"]
        say(
            f"      {domain:<14} {train.num_chars:>9,} characters in {len(train.documents):>3} documents to train on, "
            f"{validation.num_chars:>7,} in {len(validation.documents):>2} to validate"
        )
    learn_flags = [f"--data_dir={corpus_dir}", f"--output_dir={proxy_dir}", *SHARED_FLAGS, *LEARN_FLAGS]
    say(f"\n[2/5] Learning domain weights\n      hf-doge learn {' '.join(learn_flags)}")
    learn.main(learn_flags)

    compare_flags = [
        f"--data_dir={corpus_dir}",
        f"--output_dir={comparison_dir}",
        f"--tokenizer={proxy_dir / 'tokenizer'}",
        f"--weights=learned={proxy_dir}",
        *SHARED_FLAGS,
        *COMPARE_FLAGS,
    ]
    say(f"\n[3/5] Training a model on each mixture\n      hf-doge compare {' '.join(compare_flags)}")
    compare.main(compare_flags)

    say("\n[4/5] Tracing what a small model says to the text and the words that made it say so")
    page = trace_continuation(
        corpus_dir, folder / "tracing", tokenizer_dir=proxy_dir / "tokenizer", blocks_dir=proxy_dir / "blocks"
    )

    say("\n[5/5] Putting it together")
    report = write_report(folder, collect_sections(folder))
    say(
        f"Learned weights: {proxy_dir / 'domain_weights'}\n"
        f"Table: {comparison_dir / 'comparison.md'}\n"
        f"Plots: {proxy_dir / 'domain_weights.png'}, {comparison_dir / 'comparison.png'}\n"
        f"Weights and table in one: {report}\n"
        f"Traced prediction: {page}\n"
        f"Done in {time.perf_counter() - start:.0f} s. This is a demonstration: a tiny model, few tokens, two seeds."
    )
