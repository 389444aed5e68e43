"""
Is the noise of a score that a run tells of itself the spread of the score over independent batches?

    OMP_NUM_THREADS=1 python -m benchmarks.score_noise --data_dir ../shared/data

Real text, by the byte, in blocks of 64. In every setting a run of constant learning rate warms up and then goes every stretch of
`span` steps twice: from the same weights with two independent lots of batches, of which only the first moves the model on. The noise is
*predicted* from the differences of successive scores of the first lots, as a run without the second ones tells it
(`hf_doge.artifacts.score_noise.estimate_score_noise`), and *observed* as the spread between the sums of scores over the two lots, over the root
of `span`. Two spans:

- 1: the scores of two batches at the same weights, the draw of the examples and nothing else.
- 10: sums of ten scores, which is what moves the weights, the model going its own way in either. What a model's score does from one step to the
  next without remembering it, as training at a high rate makes it do, adds to what a run cannot tell, and is in the prediction.

With `--runs 16`, whole runs in their place: from the same initial weights, each with batches of its own. What moves weights is how far a score is
from the mean over the domains (`hf_doge.training.score_noise.ScoreNoise`), so that is summed over the steps after the warm-up: its spread over the runs is
*observed*, and *predicted* is what one run tells of itself, as the bands of its plot do (the mean over the runs). Everything is in it: the draw of the examples, and
where that led the model.

The settings differ in the width of the model, the number of domains, the batch, the metric and what of a domain's product with
itself counts. The last line is JSON: for each setting and span, or for whole runs, predicted over observed, pooled over the domains with its 95 % interval (a
bootstrap over blocks of ten steps or over stretches; for whole runs of chi squared, as if all domains but one were independent), and for the domain that is farthest
from 1; and the worst pooled one of each span.
"""

import argparse
import gzip
import json
import math
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from benchmarks.mixtures import ENGLISH, LANGUAGES
from hf_doge import DoGEConfig, DoGETrainer
from hf_doge.artifacts.score_noise import estimate_score_noise

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


class SecondLot(TrainerCallback):
    """From step `start` on, lets every second stretch of `span` steps begin at the weights of the one before, and puts back what came of that one."""

    def __init__(self, *, start: int, span: int) -> None:
        self.start, self.span = start, span
        self._before: Any = None
        self._after: Any = None

    def _place(self, step: int) -> int | None:
        """Where in two stretches a step is."""
        return (step - self.start) % (2 * self.span) if step >= self.start else None

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        place = self._place(state.global_step)
        if place == 0:
            self._before = _copy(model, optimizer)
        elif place == self.span:
            self._after = _copy(model, optimizer)
            _put_back(model, optimizer, self._before)

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
        if self._place(state.global_step) == 0 and state.global_step > self.start:
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
    parser.add_argument("--spans", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--runs", type=int, default=0, help="Whole runs in place of stretches that are taken twice.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.data_dir / "lm").is_dir():
        print(f"Skipped: {args.data_dir} has no folder `lm`.\n{json.dumps({'skipped': str(args.data_dir)})}")
        return
    found = {}
    for name in args.settings:
        if args.runs:
            found[name] = {"runs": measure_runs(SETTINGS[name], args)}
        else:
            found[name] = {span: measure(SETTINGS[name], span, args) for span in args.spans}
        print(name, SETTINGS[name], found[name], flush=True)
    spans = ["runs"] if args.runs else args.spans
    pooled = {span: [one[span]["pooled"] for one in found.values()] for span in spans}
    worst = {span: max(some, key=lambda ratio: abs(math.log(ratio))) for span, some in pooled.items()}
    print(json.dumps({"predicted_over_observed": found, "worst_pooled": worst}))


def measure(setting: Setting, span: int, args: argparse.Namespace) -> dict[str, Any]:
    """Predicted over observed noise in one setting, of stretches."""
    twice = SecondLot(start=args.warm, span=span)
    scores = scores_of_run(setting, args, num_steps=2 * args.moving, seed=args.seed, callbacks=[twice])
    return ratios(scores, span)


def measure_runs(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Predicted over observed noise in one setting, of the sums over whole runs."""
    seeds = range(args.seed, args.seed + args.runs)
    scores = np.stack([scores_of_run(setting, args, num_steps=args.moving, seed=seed) for seed in seeds])
    scores = scores - scores.mean(axis=2, keepdims=True)
    predicted = np.mean([np.square(estimate_score_noise(one)) for one in scores], axis=0)
    observed = scores.sum(axis=1).var(axis=0, ddof=1) / args.moving
    pooled, each = np.sqrt(predicted.sum() / observed.sum()), np.sqrt(predicted / observed)
    freedom = (args.runs - 1) * (setting.num_domains - 1)
    low, high = (pooled * np.sqrt(chi2.ppf([0.025, 0.975], freedom) / freedom)).round(3).tolist()
    farthest = each[np.abs(np.log(each)).argmax()]
    return {"pooled": round(float(pooled), 3), "low": low, "high": high, "farthest": round(float(farthest), 3)}


def scores_of_run(
    setting: Setting, args: argparse.Namespace, *, num_steps: int, seed: int, callbacks: Sequence[TrainerCallback] = ()
) -> np.ndarray:
    """Scores of the steps after the warm-up, shape `(num_steps, K)`."""
    domains = {name: read_blocks(args.data_dir, name) for name in (*ENGLISH, *LANGUAGES)[: setting.num_domains]}
    with tempfile.TemporaryDirectory() as folder:
        config = DoGEConfig(
            folder, per_device_train_batch_size=setting.batch_size, max_steps=args.warm + num_steps, mu=1e6,
            learning_rate=setting.learning_rate, lr_scheduler_type="constant", self_term=setting.self_term,
            score_metric=setting.score_metric, seed=seed, report_to="none", save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        model = make_model(setting.width)
        trainer = DoGETrainer(model, config, train_dataset=domains, callbacks=list(callbacks))
        trainer.train()
    return trainer.domain_weights.trajectory.scores[args.warm :]


def ratios(scores: np.ndarray, span: int) -> dict[str, Any]:
    """Predicted over observed noise of scores of shape `(T, K)`, whose stretches are by turns first and second lots."""
    lots = scores.reshape(-1, 2, span, scores.shape[1])
    first = lots[:, 0].reshape(-1, scores.shape[1])
    predicted = np.square(np.diff(first, axis=0)) / 2
    observed = np.square(lots[:, 0].sum(axis=1) - lots[:, 1].sum(axis=1)) / (2 * span)
    assert np.allclose(np.sqrt(predicted.mean(axis=0)), estimate_score_noise(first))
    each = np.sqrt(predicted.mean(axis=0) / observed.mean(axis=0))
    low, high = interval(predicted.sum(axis=1), observed.sum(axis=1))
    return {
        "pooled": round(float(np.sqrt(predicted.mean(axis=0).sum() / observed.mean(axis=0).sum())), 3),
        "low": low,
        "high": high,
        "farthest": round(float(each[np.abs(np.log(each)).argmax()]), 3),
    }


def interval(predicted: np.ndarray, observed: np.ndarray, *, num_blocks: int = 30) -> list[float]:
    """95 % of the pooled ratio over resampled blocks of steps."""
    means = np.array([
        [np.mean(some) for some in np.array_split(values, num_blocks)] for values in (predicted, observed)
    ])  # fmt: skip
    drawn = np.random.default_rng(0).integers(num_blocks, size=(5_000, num_blocks))
    totals = means[:, drawn].sum(axis=2)
    return np.quantile(np.sqrt(totals[0] / totals[1]), [0.025, 0.975]).round(3).tolist()


def make_model(width: int) -> LlamaForCausalLM:
    """Two layers; an entry for each byte."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=BLOCK, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@cache
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
