"""What a model is worth on a target it was not trained on: at its own temperature, and after a few steps on the target."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, set_seed

from hf_doge.checks import check_count, check_number
from hf_doge.training.evaluated_loss import EvaluatedLossMixin

CALIBRATED = "calibrated"
NUM_CALIBRATION_LOGITS = 2**25  # 128 MiB of them in float32
NUM_NEWTON_STEPS = 20


class _Adapted(EvaluatedLossMixin, Trainer):
    pass


@dataclass(frozen=True)
class Adaptation:
    """
    How the targets of a comparison are measured besides as they are.

    Attributes:
        train_dataset (`Mapping[str, Dataset]`): Text of each target that is not its validation text.
        steps (`tuple[int, ...]`): Numbers of training steps on it, each a training of its own with a linear schedule.
        learning_rate (`float`, *optional*): Peak of these trainings; by default that of the run.
    """

    train_dataset: Mapping[str, Dataset]
    steps: tuple[int, ...] = (25, 100)
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for steps in self.steps:
            check_count("steps", steps)
        if len(set(self.steps)) != len(self.steps):
            raise ValueError(f"`steps` must be different, but got {self.steps}.")
        check_number("learning_rate", self.learning_rate, above=0, optional=True)
        empty = sorted(name for name, dataset in self.train_dataset.items() if len(dataset) == 0)
        if empty:
            raise ValueError(f"Every target must have train text, but {empty} have none.")

    @property
    def identity(self) -> dict[str, Any]:
        """What of it decides a result, in plain values; the data have fingerprints elsewhere."""
        return {"steps": list(self.steps), "learning_rate": self.learning_rate}

    def measure(self, trainer: Trainer, eval_dataset: Mapping[str, Dataset]) -> dict[str, dict[str, float]]:
        """
        Losses of every target by every measure, in nats a token: `[measure][target]`. The trainer's model is left as it was.

        All mixtures of a seed see the same batches of the target in the same order.

        Args:
            trainer (`Trainer`): With the trained model; its arguments, seed and collator are used.
            eval_dataset (`Mapping[str, Dataset]`): Validation text of each target, and maybe of other domains.
        """
        found: dict[str, dict[str, float]] = {CALIBRATED: {}}
        for target, train in self.train_dataset.items():
            validation = eval_dataset[target]
            found[CALIBRATED][target] = calibrated_loss(trainer, train, validation)
            for steps in self.steps:
                adapted = self._adapt(trainer, train, steps)
                metrics = adapted.evaluate(validation)
                found.setdefault(f"adapted_{steps}", {})[target] = metrics["eval_loss"]
        return found

    def _adapt(self, trainer: Trainer, train: Dataset, steps: int) -> Trainer:
        args = copy.copy(trainer.args)
        args.max_steps, args.learning_rate = steps, self.learning_rate or args.learning_rate
        args.report_to = []
        args.lr_scheduler_type, args.warmup_steps = "linear", 0
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        set_seed(args.seed)
        adapted = _Adapted(
            copy.deepcopy(trainer.model), args, train_dataset=train, data_collator=trainer.data_collator
        )
        for callback in (ProgressCallback, PrinterCallback):
            adapted.remove_callback(callback)
        adapted.train()
        return adapted


def calibrated_loss(trainer: Trainer, train: Dataset, validation: Dataset) -> float:
    """
    Mean token loss on `validation` with the logits multiplied by the one number that is best for `train`.

    A causal language model's logits at a position are of the next token.
    """
    fitted, num_tokens = [], 0
    for logits, labels in _logits_of(trainer, train):
        fitted.append((logits.float(), labels))
        num_tokens += len(labels)
        if num_tokens * logits.shape[1] >= NUM_CALIBRATION_LOGITS:
            break
    scale = fit_inverse_temperature(torch.cat([logits for logits, _ in fitted]), torch.cat([x for _, x in fitted]))
    total, count = 0.0, 0
    for logits, labels in _logits_of(trainer, validation):
        total += nn.functional.cross_entropy(logits.float() * scale, labels, reduction="sum").item()
        count += len(labels)
    return total / count


def fit_inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """
    The number `b > 0` under which `softmax(b * logits)` makes the labels most likely, by Newton's method.

    The mean loss is convex in `b`: its slope is `mean(E[z] - z_label)`, its curvature `mean(Var[z])`, of logits `z`.

    Args:
        logits (`torch.Tensor` of shape `(num_tokens, vocab_size)`): Float.
        labels (`torch.Tensor` of shape `(num_tokens,)`): In `[0, vocab_size)`.
    """
    scale = 1.0
    chosen = logits.gather(1, labels[:, None]).double().mean().item()
    for _ in range(NUM_NEWTON_STEPS):
        mean, variance, count = 0.0, 0.0, len(labels)
        for part in logits.split(1024):
            probabilities = torch.softmax(part * scale, dim=1)
            first = (probabilities * part).sum(dim=1).double()
            second = (probabilities * part.square()).sum(dim=1).double()
            mean += first.sum().item() / count
            variance += (second - first.square()).sum().item() / count
        slope = mean - chosen
        step = slope / max(variance, 1e-12)
        new = min(max(scale - step, scale / 2), scale * 2)  # stays positive, and near where the curve was measured
        if abs(new - scale) < 1e-6 * scale:
            return new
        scale = new
    return scale


def _logits_of(trainer: Trainer, dataset: Dataset) -> Iterable[tuple[Tensor, Tensor]]:
    """Logits and labels of the tokens that count, batch by batch: `(N, V)` and `(N,)`."""
    model = trainer.model
    assert model is not None
    model.eval()
    for inputs in trainer.get_eval_dataloader(dataset):
        inputs = trainer._prepare_inputs(inputs)
        labels = inputs.pop("labels")[:, 1:].flatten()
        with torch.no_grad():
            logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        counted = labels != -100
        yield logits[counted], labels[counted]
