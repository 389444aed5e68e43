"""
Is the noise of a score that a run tells of itself the spread of the score over independent batches?

    OMP_NUM_THREADS=1 python -m benchmarks.score_noise --data_dir ../shared/data

Real text, by the byte, in blocks of 64. In every setting one run, of constant learning rate, has three parts: it warms up; it moves,
and from the differences of successive scores in this part alone the noise is *predicted*
(`hf_doge.artifacts.record.estimate_score_noise`, as logs and summaries do); then model and optimizer are put back to the middle of
that part before every step, so that the scores of further steps are those of independent batches at the same weights, and their
standard deviation is the *observed* noise. The chance error of both together is about 9 % of one domain's at the default lengths.

The settings differ in the width of the model, the number of domains, the batch, the metric and what of a domain's product with
itself counts. The last line is JSON: for each setting predicted over observed, pooled over the domains and for the domain that
is farthest from 1; and the worst pooled one.
"""

import argparse
import gzip
import json
import math
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from benchmarks.mixtures import ENGLISH, LANGUAGES
from hf_doge import DoGEConfig, DoGETrainer
from hf_doge.artifacts.record import estimate_score_noise

BLOCK, BLOCKS = 64, 4_000


@dataclass(frozen=True)
class Setting:
    """What differs."""

    width: int
    num_domains: int
    batch_size: int
    score_metric: str
    self_term: str = "independent"
    learning_rate: float = 1e-3


SETTINGS = {
    "small": Setting(16, 3, 12, "gradient"),
    "small_in_nats": Setting(16, 3, 24, "optimizer"),
    "wide_in_nats": Setting(64, 8, 32, "optimizer"),
    "large_batch": Setting(32, 2, 64, "gradient"),
    "many_in_nats": Setting(32, 12, 48, "optimizer"),
    "paper": Setting(32, 3, 12, "gradient", self_term="same"),
    "fast_in_nats": Setting(32, 4, 16, "optimizer", learning_rate=5e-3),
}


class Standing(TrainerCallback):
    """Keeps model and optimizer as they are after step `middle`, from step `start` on."""

    def __init__(self, *, middle: int, start: int) -> None:
        self.middle, self.start = middle, start
        self._model: Any = None
        self._optimizer: Any = None

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
        if state.global_step == self.middle:
            self._model, self._optimizer = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())
        if state.global_step >= self.start:
            model.load_state_dict(self._model)
            optimizer.load_state_dict(deepcopy(self._optimizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with `lm` and `multilingual`.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--warm", type=int, default=60, help="Steps before the noise is predicted.")
    parser.add_argument("--moving", type=int, default=150, help="Updates that it is predicted from.")
    parser.add_argument("--standing", type=int, default=200, help="Batches that it is observed on.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.data_dir / "lm").is_dir():
        print(f"Skipped: {args.data_dir} has no folder `lm`.\n{json.dumps({'skipped': str(args.data_dir)})}")
        return
    found = {}
    for name in args.settings:
        found[name] = measure(SETTINGS[name], args)
        print(name, SETTINGS[name], found[name], flush=True)
    worst = max(found.values(), key=lambda one: abs(math.log(one["pooled"])))["pooled"]
    print(json.dumps({"predicted_over_observed": found, "worst_pooled": worst}))


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, float]:
    """Predicted over observed noise in one setting."""
    domains = {name: read_blocks(args.data_dir, name) for name in (*ENGLISH, *LANGUAGES)[: setting.num_domains]}
    return ratios(make_model(setting.width), domains, setting, args)


def ratios(model: Any, domains: dict[str, Dataset], setting: Setting, args: argparse.Namespace) -> dict[str, float]:
    """The three parts, and what comes of them."""
    start = args.warm + args.moving
    with tempfile.TemporaryDirectory() as folder:
        config = DoGEConfig(
            folder, per_device_train_batch_size=setting.batch_size, max_steps=start + args.standing, mu=1e6,
            learning_rate=setting.learning_rate, lr_scheduler_type="constant", self_term=setting.self_term,
            score_metric=setting.score_metric, seed=args.seed, report_to="none", save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        standing = Standing(middle=args.warm + args.moving // 2, start=start)
        trainer = DoGETrainer(model, config, train_dataset=domains, callbacks=[standing])
        trainer.train()
    scores = trainer.domain_weights.trajectory.scores
    predicted = estimate_score_noise(scores[args.warm : start])
    observed = scores[start:].std(axis=0, ddof=1)
    each = predicted / observed
    return {
        "pooled": round(float(np.sqrt(np.square(predicted).sum() / np.square(observed).sum())), 3),
        "farthest": round(float(each[np.abs(np.log(each)).argmax()]), 3),
        "mean": round(float(each.mean()), 3),
    }


def make_model(width: int) -> LlamaForCausalLM:
    """Two layers; an entry for each byte."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=BLOCK, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def read_blocks(data_dir: Path, name: str) -> Dataset:
    """The first blocks of a domain."""
    room = "multilingual" if name in LANGUAGES else "lm"
    text = b""
    with gzip.open(data_dir / room / f"{name}.train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            text += json.loads(line)["text"].encode() + b"\n"
            if len(text) >= BLOCK * BLOCKS:
                break
    ids = (
        np.frombuffer(text, dtype=np.uint8)[: len(text) // BLOCK * BLOCK].reshape(-1, BLOCK)[:BLOCKS].astype(np.int64)
    )
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


if __name__ == "__main__":
    main()
