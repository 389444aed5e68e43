"""
Is the noise of a score that a run tells of itself the spread of the score over independent batches?

    OMP_NUM_THREADS=1 python -m benchmarks.score_noise --data_dir ../shared/data

Real text, by the byte, in blocks of 64. In every setting one run, of constant learning rate, warms up and then takes each step
twice: from the same weights with two independent batches, of which only the first moves the model. The noise is *predicted* from
the differences of successive scores of the first batches, as a run without the second ones tells it
(`hf_doge.artifacts.record.estimate_score_noise`), and *observed* as the spread between the two scores at the same weights, over the
same steps. What is between the two is the drift of the score from step to step, and chance: the interval is that of a bootstrap over
blocks of ten steps.

The settings differ in the width of the model, the number of domains, the batch, the metric and what of a domain's product with
itself counts. The last line is JSON: for each setting predicted over observed, pooled over the domains with its 95 % interval, and for
the domain that is farthest from 1; and the worst pooled one.
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


class SecondBatch(TrainerCallback):
    """From step `start` on, lets every second step begin at the weights of the one before, and puts back what came of that one."""

    def __init__(self, *, start: int) -> None:
        self.start = start
        self._before: Any = None
        self._after: Any = None

    def _is_first(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % 2 == 0

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        if self._is_first(state.global_step):
            self._before = _copy(model, optimizer)

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
        if self._is_first(state.global_step - 1):
            self._after = _copy(model, optimizer)
            _put_back(model, optimizer, self._before)
        elif state.global_step > self.start:
            _put_back(model, optimizer, self._after)


def _copy(model: Any, optimizer: Any) -> Any:
    return deepcopy((model.state_dict(), optimizer.state_dict()))


def _put_back(model: Any, optimizer: Any, kept: Any) -> None:
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(deepcopy(kept[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with `lm` and `multilingual`.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--warm", type=int, default=60, help="Steps before the noise is predicted.")
    parser.add_argument("--moving", type=int, default=300, help="Steps that are taken twice.")
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
    """Predicted over observed noise of a run on these domains."""
    with tempfile.TemporaryDirectory() as folder:
        config = DoGEConfig(
            folder, per_device_train_batch_size=setting.batch_size, max_steps=args.warm + 2 * args.moving, mu=1e6,
            learning_rate=setting.learning_rate, lr_scheduler_type="constant", self_term=setting.self_term,
            score_metric=setting.score_metric, seed=args.seed, report_to="none", save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = DoGETrainer(model, config, train_dataset=domains, callbacks=[SecondBatch(start=args.warm)])
        trainer.train()
    scores = trainer.domain_weights.trajectory.scores[args.warm :]
    first, second = scores[0::2], scores[1::2]
    predicted = np.square(np.diff(first, axis=0)) / 2
    observed = np.square(first - second)[1:] / 2
    assert np.allclose(np.sqrt(predicted.mean(axis=0)), estimate_score_noise(first))
    each = np.sqrt(predicted.mean(axis=0) / observed.mean(axis=0))
    low, high = interval(predicted.sum(axis=1), observed.sum(axis=1))
    return {
        "pooled": round(float(np.sqrt(predicted.sum() / observed.sum())), 3),
        "low": low,
        "high": high,
        "farthest": round(float(each[np.abs(np.log(each)).argmax()]), 3),
    }


def interval(predicted: np.ndarray, observed: np.ndarray, *, block: int = 10) -> list[float]:
    """95 % of the pooled ratio over resampled blocks of steps."""
    starts = np.arange(0, len(predicted) - block + 1, block)
    sums = np.array([[predicted[i : i + block].sum(), observed[i : i + block].sum()] for i in starts])
    drawn = np.random.default_rng(0).integers(len(sums), size=(5_000, len(sums)))
    totals = sums[drawn].sum(axis=1)
    return np.quantile(np.sqrt(totals[:, 0] / totals[:, 1]), [0.025, 0.975]).round(3).tolist()


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
