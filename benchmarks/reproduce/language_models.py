"""What the mixing experiments share: blocks of text by domain, a model of a named size, learning weights, training on them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.cli.arguments import DataArguments, ModelArguments
from hf_doge.cli.models import get_config, make_model
from hf_doge.data.blocks import collate_blocks
from hf_doge.data.domain_data import DomainData, load_domain_data
from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.trainer import DoGETrainer

QUIET = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1_000_000,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class TextSettings:
    """
    How text becomes blocks.

    Attributes:
        vocab_size (`int`): Entries of the byte-level BPE trained on an equal share of every domain.
        block_size (`int`): Tokens of an example.
        max_train_tokens, max_validation_tokens (`int`, *optional*): Most tokens of each domain.
    """

    vocab_size: int
    block_size: int
    max_train_tokens: int | None = None
    max_validation_tokens: int | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """
    How a model is trained; AdamW with linear warmup and cosine decay.

    Attributes:
        steps (`int`): Optimizer steps.
        batch_size (`int`): Blocks per step.
        learning_rate (`float`): At its peak.
        warmup_steps (`int`).
        weight_decay (`float`).
        bf16 (`bool`): Mixed precision.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    bf16: bool = False

    def to_arguments(self) -> dict[str, Any]:
        """As `TrainingArguments` takes them."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": 64,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler_type": "cosine",
            "weight_decay": self.weight_decay,
            "bf16": self.bf16,
            **QUIET,
        }


def load_text(
    data_dir: Path, settings: TextSettings, folder: Path, *, domains: Sequence[str] | None = None
) -> DomainData:
    """
    Blocks of every domain of a folder, all by one tokenizer trained on all of them.

    Tokenizer and blocks are kept in a subfolder named by the files (names and sizes) and the settings, and found there.
    """
    sizes = sorted((path.name, path.stat().st_size) for path in data_dir.glob("*.jsonl*"))
    key = hashlib.sha256(repr((sizes, settings.vocab_size, domains)).encode()).hexdigest()[:12]
    folder = folder / f"{data_dir.name}-{key}"
    trained = folder / "tokenizer"
    is_trained = (trained / "tokenizer_config.json").exists()  # written last
    data_args = DataArguments(
        data_dir=str(data_dir),
        domains=None if domains is None else list(domains),
        tokenizer=str(trained) if is_trained else None,
        train_tokenizer_vocab=None if is_trained else settings.vocab_size,
        block_size=settings.block_size,
        max_train_tokens=settings.max_train_tokens,
        max_validation_tokens=settings.max_validation_tokens,
    )
    return load_domain_data(data_args, folder)


def describe_text(train: Mapping[str, Dataset], block_size: int) -> dict[str, dict[str, int]]:
    """Rows and tokens of each domain, as `DomainWeights.domains` holds them."""
    return {name: {"num_rows": len(rows), "num_tokens": len(rows) * block_size} for name, rows in train.items()}


def new_model(size: str, data: DomainData, block_size: int, *, seed: int) -> PreTrainedModel:
    """A new model of a size that `hf-doge` knows, the same for the same seed; the paper's sizes are GPT-2's."""
    model_type = "gpt2" if size.endswith("m") else "llama"
    config = get_config(ModelArguments(model_size=size, model_type=model_type), data.tokenizer, block_size)
    set_seed(seed)
    return make_model(None, config)


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def train_silently(trainer: Trainer) -> None:
    """Train without printing the logs."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.train()


def train_base(
    model: PreTrainedModel,
    settings: TrainingSettings,
    *,
    train: Mapping[str, Dataset],
    validation: Mapping[str, Dataset],
    weights: Mapping[str, float],
    seed: int,
    folder: Path,
    saves_model: bool = False,
    max_epochs_per_domain: float | None = None,
) -> dict[str, Any]:
    """
    Train a model on a mixture and evaluate it on every domain of `validation`.

    Domains of weight 0 stay in `weights` and are not drawn.

    Returns:
        `losses` (mean nats per token) and `epochs` by domain, `weights` in force (after a cap), `train_tokens`.
    """
    args = TrainingArguments(output_dir=str(folder), seed=seed, **settings.to_arguments())
    trainer = DomainWeightedTrainer(
        model,
        args,
        train_dataset=dict(train),
        domain_weights=dict(weights),
        max_epochs_per_domain=max_epochs_per_domain,
        eval_dataset=dict(validation),
        data_collator=collate_blocks,
    )
    train_silently(trainer)
    metrics = trainer.evaluate()
    if saves_model:
        trainer.save_model(str(folder))
    block_size = len(next(iter(train.values()))[0]["input_ids"])
    return {
        "losses": {name: metrics[f"eval_{name}_loss"] for name in validation},
        "epochs": trainer.get_domain_epochs(),
        "weights": trainer.domain_sampler.weights_at(0),
        "train_tokens": settings.steps * settings.batch_size * block_size,
    }


def learn_weights(
    model: PreTrainedModel,
    settings: TrainingSettings,
    options: Mapping[str, Any],
    *,
    train: Mapping[str, Dataset],
    target: Mapping[str, Dataset] | Dataset | None,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """
    Learn domain weights with a proxy and save them as an artifact in `folder/domain_weights`.

    Args:
        model (`PreTrainedModel`): The proxy.
        settings (`TrainingSettings`): Its training.
        options (`Mapping[str, Any]`): Arguments of `DoGEConfig` beside these: recipe, mu, ...
        train (`Mapping[str, Dataset]`): Blocks by source.
        target (`Dataset`, mapping of them or `None`): What the weights should serve; `None` for the sources themselves.
        seed (`int`): Of the order of the data.
        folder (`Path`): Where the artifact goes.

    Returns:
        `mean` and `last` weights, and what describes the trajectory: see [`describe_trajectory`].
    """
    arguments = {"recipe": "paper", **settings.to_arguments(), **options}
    args = DoGEConfig(output_dir=str(folder), seed=seed, **arguments)
    trainer = DoGETrainer(model, args, train_dataset=dict(train), target_dataset=target, data_collator=collate_blocks)
    train_silently(trainer)
    weights = trainer.domain_weights
    weights.save_pretrained(folder / "domain_weights")
    return {"mean": weights.mean, "last": weights.last, **describe_trajectory(weights)}


def describe_trajectory(weights: DomainWeights) -> dict[str, Any]:
    """
    How the weights came about: by domain, the median score, and the share of the ten largest steps in the whole drift.

    The drift of a domain is the sum over steps of `learning_rate * (score - mean score of the domains) / mu`, its gain in
    log weight over the mean domain; `top10_drift` is the part of it that the ten steps of largest score make.
    """
    trajectory, mu = weights.trajectory, weights.recipe["mu"]
    gains = trajectory.learning_rates[:, None] * (
        trajectory.scores - trajectory.scores.mean(axis=1, keepdims=True)
    )  # (T, K)
    gains = gains / mu
    described: dict[str, Any] = {"score_median": {}, "drift": {}, "top10_drift": {}}
    for position, name in enumerate(trajectory.domains):
        largest = trajectory.scores[:, position].argsort()[-10:]
        described["score_median"][name] = float(sorted(trajectory.scores[:, position])[len(gains) // 2])
        described["drift"][name] = float(gains[:, position].sum())
        described["top10_drift"][name] = float(gains[largest, position].sum())
    return described


def summarize_losses(losses: Mapping[str, float]) -> dict[str, float]:
    """Average and worst-domain perplexity and `exp` of the mean loss, which no single domain dominates."""
    perplexities = [math.exp(loss) for loss in losses.values()]
    return {
        "average": sum(perplexities) / len(perplexities),
        "geometric": math.exp(sum(losses.values()) / len(losses)),
        "worst": max(perplexities),
    }


def plain(settings: TextSettings | TrainingSettings) -> dict[str, Any]:
    """Settings as the key of a part holds them."""
    return asdict(settings)
