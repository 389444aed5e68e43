"""
What learning domain weights costs: a DoGE step beside a plain Trainer step on the same tokens.

    python -m benchmarks.alignment

A Llama of 10 million parameters, 4,096 tokens a step: 64 sequences of 64 (K = 8 and 64 domains), and 512 of 8 (K = 8 and
512, since every domain needs an example). Each run is a process of its own with `Trainer.train()` or
`DoGETrainer.train()` and AdamW; runs take turns, round by round, and a figure is the median of a run's steps after the
first two, then the least over the rounds. A step is counted from `on_step_begin` to `on_step_end`: loading the batch,
forward, backward, weights, clipping and optimizer. Memory is the peak of the process (`ru_maxrss`), less what it held before
the first step. The runs named `ddp` are two processes each under `accelerate launch`, gloo, half of the examples in either.
The runs named `sft` are trl's SFTTrainer, plain and with `DoGEMixin`, on the same rows.

`--device cuda --preset gpt2` takes the shape of GPT-2 (124M parameters, 65,536 tokens a step, K = 7, bfloat16).
The last line is JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGEMixin, DoGETrainer

# name: alignment or kind of scores (None is a plain Trainer), domains, sequences, length, processes
RUNS = {
    "plain": (None, 8, 64, 64, 1),
    "single_pass_k8": ("single_pass", 8, 64, 64, 1),
    "independent_k8": ("independent", 8, 64, 64, 1),
    "doge_plus_k8": ("doge_plus", 8, 64, 64, 1),
    "per_domain_k8": ("per_domain", 8, 64, 64, 1),
    "streamed_k8": ("streamed", 8, 64, 64, 1),
    "single_pass_k64": ("single_pass", 64, 64, 64, 1),
    "per_domain_k64": ("per_domain", 64, 64, 64, 1),
    "plain_short": (None, 8, 512, 8, 1),
    "single_pass_short_k8": ("single_pass", 8, 512, 8, 1),
    "single_pass_short_k512": ("single_pass", 512, 512, 8, 1),
    "plain_ddp": (None, 8, 64, 64, 2),
    "single_pass_ddp": ("single_pass", 8, 64, 64, 2),
    "sft_plain": (None, 8, 64, 64, 1),
    "sft_single_pass_k8": ("single_pass", 8, 64, 64, 1),
    "sft_per_domain_k8": ("per_domain", 8, 64, 64, 1),
}
GPU_RUNS = {
    "plain": (None, 7, 64, 1024, 1),
    "single_pass_k8": ("single_pass", 7, 64, 1024, 1),
    "per_domain_k8": ("per_domain", 7, 64, 1024, 1),
}

SCORES = {
    "independent": {"alignment": "single_pass", "self_term": "independent"},
    "doge_plus": {"alignment": "single_pass", "recipe": "doge_plus"},
}


class StepTimes(TrainerCallback):
    """Wall and CPU seconds of every step, and the memory before the first."""

    def __init__(self) -> None:
        self.wall, self.cpu, self.memory_before = [], [], None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.memory_before is None:
            self.memory_before = _peak_memory()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def make_model(preset: str) -> torch.nn.Module:
    """`llama`: 10 million parameters. `gpt2`: 124 million, without dropout, so that all ways see the same."""
    torch.manual_seed(0)
    if preset == "gpt2":
        return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_trainer(model: torch.nn.Module, folder: str, options: dict, **kwargs: Any) -> Trainer:
    """A plain one, or one that learns where the options have a `mu`."""
    if "mu" in options:
        return DoGETrainer(model, DoGEConfig(folder, **options), **kwargs)
    return Trainer(model, TrainingArguments(folder, **options), **kwargs)


def make_sft_trainer(model: torch.nn.Module, folder: str, options: dict, **kwargs: Any) -> Trainer:
    """The same of trl's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    class DoGESFTTrainer(DoGEMixin, SFTTrainer):
        """What a user would write."""

    @dataclass
    class DoGESFTConfig(DoGEConfig, SFTConfig):
        """What a user would write."""

    vocabulary = {f"w{number}": number for number in range(model.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    trainer, config = (DoGESFTTrainer, DoGESFTConfig) if "mu" in options else (SFTTrainer, SFTConfig)
    settings = {"max_length": None, "gradient_checkpointing": False, "bf16": False}
    return trainer(model, config(folder, **{**settings, **options}), processing_class=tokenizer, **kwargs)


def measure(name: str, args: argparse.Namespace) -> dict:
    """One run in this process."""
    alignment, num_domains, sequences, length, num_processes = args.runs[name]
    if args.threads:
        torch.set_num_threads(args.threads)
    model = make_model(args.preset)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, model.config.vocab_size, (2 * sequences, length), generator=generator).tolist()
    rows = {"input_ids": tokens, "labels": tokens, "domain": [f"d{i % num_domains}" for i in range(2 * sequences)]}
    data = Dataset.from_dict(rows)
    options = {
        "per_device_train_batch_size": sequences // num_processes // args.accumulate,
        "gradient_accumulation_steps": args.accumulate,
        "max_steps": args.steps,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.device != "cpu",
    }
    if alignment is not None:
        options |= {"mu": 1.0, **SCORES.get(alignment, {"alignment": alignment})}
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        make = make_sft_trainer if name.startswith("sft") else make_trainer
        trainer = make(model, folder, options, train_dataset=data, callbacks=[times])
        trainer.train()
    result = {
        "wall": statistics.median(times.wall[2:]),
        "cpu": statistics.median(times.cpu[2:]),
        "memory_mib": _peak_memory() - times.memory_before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if alignment is not None:
        result["scores"] = trainer.domain_weights.trajectory.scores[0].tolist()
    return result if trainer.is_world_process_zero() else {}


def launch(name: str, args: argparse.Namespace) -> dict:
    """One run in a process (or two) of its own."""
    num_processes = args.runs[name][4]
    command = [sys.executable, "-m", "benchmarks.alignment", "--run", name]
    if num_processes > 1:
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
        launcher += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        command = [sys.executable, "-m", *launcher, "-m", "benchmarks.alignment", "--run", name]
    threads = args.threads if num_processes == 1 else 1
    command += ["--threads", str(threads), "--steps", str(args.steps), "--device", args.device]
    command += ["--preset", args.preset, "--accumulate", str(args.accumulate)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"wall"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def relative_error(found: list[float], expected: list[float]) -> float:
    """Largest difference of a score, over the largest score."""
    found, expected = torch.tensor(found).double(), torch.tensor(expected).double()
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="Measure one run in this process (the script starts itself with it).")
    parser.add_argument("--only", nargs="*", help="Runs to measure; all by default.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1, help="Micro-batches of a step.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="llama", choices=["llama", "gpt2"])
    args = parser.parse_args()
    args.runs = GPU_RUNS if args.preset == "gpt2" else RUNS
    logging.set_verbosity_error()
    if args.run:
        print(json.dumps(measure(args.run, args)))
        return

    names = args.only or list(args.runs)
    results: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(args.rounds):
        for name in names:
            results[name].append(launch(name, args))
            last = results[name][-1]
            print(
                f"round {turn + 1}  {name:24} {last['wall']:7.3f} s  {last['cpu']:7.3f} CPU s  {last['memory_mib']:6.0f} MiB"
            )
    best = {
        name: {k: min(run[k] for run in runs) for k in ("wall", "cpu", "memory_mib")} for name, runs in results.items()
    }
    print(f"{results[names[0]][0]['parameters']:,} parameters, torch {torch.__version__}")

    def ratio(name: str, base: str, figure: str = "wall") -> float | None:
        return round(best[name][figure] / best[base][figure], 3) if name in best and base in best else None

    figures = {
        "single_pass_over_plain": ratio("single_pass_k8", "plain"),
        "single_pass_over_plain_k64": ratio("single_pass_k64", "plain"),
        "single_pass_over_per_domain_k64": ratio("single_pass_k64", "per_domain_k64"),
        "independent_over_plain": ratio("independent_k8", "plain"),
        "independent_over_single_pass": ratio("independent_k8", "single_pass_k8"),
        "doge_plus_over_plain": ratio("doge_plus_k8", "plain"),
        "per_domain_over_plain": ratio("per_domain_k8", "plain"),
        "streamed_over_plain": ratio("streamed_k8", "plain"),
        "memory_over_plain": ratio("single_pass_k8", "plain", "memory_mib"),
        "extra_memory_mib_k64": round(best["single_pass_k64"]["memory_mib"] - best["plain"]["memory_mib"])
        if "single_pass_k64" in best and "plain" in best
        else None,
        "k512_over_k8": ratio("single_pass_short_k512", "single_pass_short_k8"),
        "ddp_over_plain_ddp": ratio("single_pass_ddp", "plain_ddp"),
        "sft_single_pass_over_sft_plain": ratio("sft_single_pass_k8", "sft_plain"),
        "sft_per_domain_over_sft_plain": ratio("sft_per_domain_k8", "sft_plain"),
        "sft_memory_over_sft_plain": ratio("sft_single_pass_k8", "sft_plain", "memory_mib"),
    }
    pairs = [
        (f"{kind}single_pass_{k}", f"{kind}per_domain_{k}") for kind, k in (("", "k8"), ("", "k64"), ("sft_", "k8"))
    ]
    errors = [
        relative_error(results[a][0]["scores"], results[b][0]["scores"]) for a, b in pairs if {a, b} <= set(names)
    ]
    figures["max_relative_error"] = max(errors, default=None)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
