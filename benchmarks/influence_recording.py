"""
What recording costs: CPU seconds beside a training step, and memory as the dataset grows.

    python -m benchmarks.influence_recording

A training step is one forward and one backward for all parameters in training mode, without an optimiser, on the same
batches, turn by turn with recording. Part of its cost is dropout, which recording is spared; the ratios `_without_dropout`
are against a step without any. There a bare loop that only asks for the gradient at the embedding's output takes 0.71
of the step for this BERT, so no recorder can take much less. `_own` is GPT-2 at its default, both uses of its tied words.

Memory is that of recording to an index on disk, each size in a process of its own, with segments so small (4 MiB) that
the smaller size fills several too. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers.measure import Meter
from benchmarks.peers.workload import VOCABULARY_SIZE, bert, random_examples
from hf_doge.artifacts.influence import IndexWriter
from hf_doge.gradients.embedding import EmbeddingGradientRecorder

BATCH_SIZE = 16
SIZES = (1_000, 50_000)


def bert_batches(count: int) -> list[dict[str, Tensor]]:
    """Batches of the workload's kind of examples, 64 tokens long."""
    return list(random_examples(count * BATCH_SIZE, generator=np.random.default_rng(0)).batches(BATCH_SIZE))


def gpt2() -> nn.Module:
    """GPT-2 of the same size, its head tied."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=2, n_head=2, n_positions=64, use_cache=False))


def gpt2_batches(count: int) -> list[dict[str, Tensor]]:
    """The same, to be continued: labels are the ids."""
    batches = bert_batches(count)
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batches


def recording_over_step(
    model: nn.Module, batches: list[dict[str, Tensor]], *, dropout: bool, rounds: int, tied: str = "input"
) -> float:
    """Median over rounds of CPU seconds of recording over those of training steps, all batches each."""
    model.train(dropout)
    recorder = EmbeddingGradientRecorder(model, tied=tied)

    def record(batches: list[dict[str, Tensor]]) -> None:
        with recorder:
            for batch in batches:
                recorder.record(batch)

    def step(batches: list[dict[str, Tensor]]) -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    record(batches[:2])  # the first batch of all is compared with its examples alone, once in a recorder's life
    step(batches[:2])
    ratios = []
    for turn in range(rounds):
        seconds = {}
        for run in (record, step) if turn % 2 else (step, record):
            start = time.process_time()
            run(batches)
            seconds[run] = time.process_time() - start
        ratios.append(seconds[record] / seconds[step])
    return round(statistics.median(ratios), 3)


def extra_mib(num_examples: int) -> float:
    """Peak memory above that before, of recording so many short examples (32 tokens, 1 layer) to an index on disk."""
    model = bert(num_layers=1)

    def batches(count: int) -> Iterator[dict[str, Tensor]]:
        """Made as they are asked for, as a dataset on disk would give them."""
        generator = np.random.default_rng(0)
        for start in range(0, count, 1_000):
            yield from random_examples(min(1_000, count - start), generator=generator, length=32).batches(BATCH_SIZE)

    with EmbeddingGradientRecorder(model) as recorder:
        for batch in batches(2 * BATCH_SIZE):
            recorder.record(batch)
    with tempfile.TemporaryDirectory() as folder, Meter() as meter:
        writer = IndexWriter(
            Path(folder) / "index",
            width=128,
            vocabulary_size=VOCABULARY_SIZE,
            num_examples=num_examples,
            max_segment_bytes=4 * 2**20,
        )
        writer.write_examples(pa.table({"example_id": np.arange(num_examples)}))
        facts = {"step": 1, "epoch": 1.0, "learning_rate": 1.0, "path": "model", "fingerprint": ""}
        checkpoint = writer.checkpoint("step-1", model_class=type(model).__name__, **facts)
        with EmbeddingGradientRecorder(model) as recorder, checkpoint:
            for batch in batches(num_examples):
                checkpoint.add(recorder.record(batch))
            writer.publish(checkpoint)
    return meter.extra_mib


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="Turns of each kind.")
    parser.add_argument("--num_batches", type=int, default=8, help=f"Batches of {BATCH_SIZE} in a turn.")
    parser.add_argument("--num_examples", type=int, help="Only print the memory of recording this many.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.num_examples:
        print(json.dumps(extra_mib(args.num_examples)))
        return
    figures = {}
    models = [("", bert(), bert_batches, "input"), ("_gpt2", gpt2(), gpt2_batches, "input")]
    models += [("_gpt2_own", gpt2(), gpt2_batches, "own")]
    for name, model, batches, tied in models:
        for suffix, dropout in (("", True), ("_without_dropout", False)):
            figures[f"recording_over_step{name}{suffix}"] = recording_over_step(
                model, batches(args.num_batches), dropout=dropout, rounds=args.rounds, tied=tied
            )
    command = [sys.executable, "-m", "benchmarks.influence_recording", "--num_examples"]
    peaks = [
        json.loads(subprocess.run([*command, str(size)], check=True, capture_output=True, text=True).stdout)
        for size in SIZES
    ]
    figures["recording_rss_ratio"] = round(peaks[1] / peaks[0], 3)
    figures["recording_extra_mib"] = {str(size): round(peak, 1) for size, peak in zip(SIZES, peaks, strict=True)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
