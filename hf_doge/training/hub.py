"""The learned weights beside the model on the Hub, and the cards of both that name each other."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from hf_doge.artifacts.cards.text import code_block
from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.training.config import WEIGHTS_SUFFIX

_TAG = "hf_doge"
_SECTION = "## Domain weights"


def weights_repository(trainer: Trainer) -> str | None:
    """Where the weights go to: `hub_weights_id`, or the model's repository with `-domain-weights` behind its name."""
    args: Any = trainer.args  # a [`DoGEConfig`], perhaps of another trainer's kind too
    if args.hub_weights_id is not None:
        return args.hub_weights_id
    model_id = getattr(trainer, "hub_model_id", None)
    return None if model_id is None else model_id + WEIGHTS_SUFFIX


def link_weights(card_file: Path, repo_id: str, weights: DomainWeights) -> None:
    """Name the repository of the weights in a model's card: in its header, and in a section with their table."""
    card = ModelCard.load(card_file)
    datasets = card.data.get("datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    card.data.datasets = [*datasets, *({repo_id} - set(datasets))]
    card.data.tags = [*(card.data.tags or ()), *({_TAG} - set(card.data.tags or ()))]
    if _SECTION not in card.text:
        # The table of the weights' own card would be too much here.
        card.text = (
            f"{card.text.rstrip()}\n\n{_SECTION}\n\nTraining this model learned domain weights with DoGE"
            f" (https://huggingface.co/papers/2310.15393): [{repo_id}](https://huggingface.co/datasets/{repo_id}).\n\n"
            f"{code_block(weights.summary())}\n"
        )
    card.save(card_file)
