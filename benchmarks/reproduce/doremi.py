"""
DoReMi (Xie et al., NeurIPS 2023, https://huggingface.co/papers/2305.10429), for comparison: [`DoReMiTrainer`].

As published: a reference model is trained on the starting mixture; a proxy of the same size is then trained by group
distributionally robust optimisation. At every step, on a batch with the same number of examples of each domain,

    excess_j = mean over the tokens of domain j of max(loss of the proxy - loss of the reference, 0)
    alpha_j  proportional to  alpha_j * exp(step_size * excess_j), then (1 - smoothing) * alpha + smoothing / K

and the proxy steps on `sum_j alpha_j * loss_j`. The result is the mean of alpha over the steps. Published values:
step size 1, smoothing 1e-3, neither of which was tuned here. Departures: the starting mixture is uniform, as in the DoGE paper's
comparison; a batch has the same number of examples of each domain, where the published one is drawn from the mixture; and reference and
proxy start from the same weights and see the same batches in the same order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from benchmarks.reproduce.language_models import TrainingSettings, train_silently
from hf_doge.data.blocks import collate_blocks
from hf_doge.training.mixture import DomainWeightedTrainer

STEP_SIZE = 1.0
SMOOTHING = 1e-3


def update_doremi_weights(weights: Tensor, excess: Tensor, *, step_size: float, smoothing: float) -> Tensor:
    """One exponentiated-gradient step; both vectors and the result have shape `(num_domains,)`."""
    updated = torch.softmax(weights.log() + step_size * excess, dim=0)
    return (1 - smoothing) * updated + smoothing / len(updated)


class DoReMiTrainer(DomainWeightedTrainer):
    """
    The proxy's training.

    Args:
        reference (`PreTrainedModel`): The reference model; its parameters stay as they are.
        names (`tuple[str, ...]`): The domains, in the order of the train set's column `domain` (a `ClassLabel`).
        kwargs: Of [`DomainWeightedTrainer`], with uniform `domain_weights`.

    Attributes:
        weights (`Tensor` of shape `(num_domains,)`): alpha of the last step.
        weight_sum (`Tensor` of shape `(num_domains,)`): Sum of alpha over the steps.
    """

    def __init__(self, *args: Any, reference: PreTrainedModel, names: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, data_collator=self._collate, **kwargs)
        self.reference = reference.eval().requires_grad_(False).to(self.args.device)
        self.names = names
        self.weights = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
        self.weight_sum = torch.zeros_like(self.weights)

    def _collate(self, examples: list[dict]) -> dict[str, Tensor]:
        domain_ids = torch.tensor([example["domain"] for example in examples])
        return {**collate_blocks(examples), "domain_ids": domain_ids}

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns.append("domain")  # otherwise the Trainer drops it

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Update the weights by the batch's excess losses, and return the loss that they make of it."""
        input_ids, domain_ids = inputs["input_ids"], inputs["domain_ids"]
        losses = token_losses(model, input_ids)  # (B, T - 1)
        with torch.no_grad():
            excess = (losses.detach() - token_losses(self.reference, input_ids)).clamp(min=0).mean(dim=1)
        num_domains = len(self.names)
        counts = torch.bincount(domain_ids, minlength=num_domains).clamp(min=1)
        domain_excess = torch.zeros(num_domains, device=excess.device).index_add(0, domain_ids, excess) / counts
        self.weights = update_doremi_weights(
            self.weights, domain_excess.double().cpu(), step_size=STEP_SIZE, smoothing=SMOOTHING
        )
        self.weight_sum += self.weights
        domain_loss = torch.zeros(num_domains, device=losses.device).index_add(0, domain_ids, losses.mean(dim=1))
        return (self.weights.to(losses) * domain_loss / counts).sum()


def token_losses(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Loss of each token but the first, shape `(batch, length - 1)`."""
    logits = model(input_ids=input_ids).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")


def learn_doremi_weights(
    proxy: PreTrainedModel,
    reference: PreTrainedModel,
    settings: TrainingSettings,
    *,
    train: Mapping[str, Dataset],
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Weights learned by a proxy against a trained reference: `mean` and `last`, by domain."""
    names = tuple(train)
    trainer = DoReMiTrainer(
        proxy,
        TrainingArguments(output_dir=str(folder), seed=seed, **settings.to_arguments()),
        train_dataset=dict(train),
        domain_weights=dict.fromkeys(names, 1.0),
        reference=reference,
        names=names,
    )
    train_silently(trainer)
    mean = trainer.weight_sum / trainer.weight_sum.sum()
    return {
        "mean": dict(zip(names, mean.tolist(), strict=True)),
        "last": dict(zip(names, trainer.weights.tolist(), strict=True)),
    }
