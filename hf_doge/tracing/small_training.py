"""Training a small classifier again and again, without some of its examples: one run is a short loop without a Trainer."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class TrainingRecipe:
    """
    How each run trains: no weight decay, no dropout, and the learning rate falls to 0 on a line.

    With a constant rate the last steps decide much of what a model predicts, and two runs that differ by a few examples
    differ by three times as much.

    Args:
        num_epochs (`int`): Passes over the data.
        batch_size (`int`): Examples per step.
        learning_rate (`float`): Of the first step.
        optimizer (`str`): `"sgd"` (with momentum 0.9, as in the paper's notebook) or `"adam"`.
        checkpoint_epochs (`Sequence[int]`): After which epochs, counted from 1, weights are kept for the scores; 0 are the
            initial ones, with the learning rate of the first step.
    """

    num_epochs: int = 8
    batch_size: int = 50
    learning_rate: float = 2e-3
    optimizer: str = "adam"
    checkpoint_epochs: tuple[int, ...] = (2, 4, 6, 8)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"`optimizer` must be one of {list(OPTIMIZERS)}, but got {self.optimizer!r}.")
        if not self.checkpoint_epochs or not all(0 <= epoch <= self.num_epochs for epoch in self.checkpoint_epochs):
            raise ValueError(
                f"`checkpoint_epochs` must be epochs from 0 to {self.num_epochs}, but got {self.checkpoint_epochs}."
            )


class Checkpoint(NamedTuple):
    """A copy of the model, and the learning rate of the step before it."""

    model: nn.Module
    learning_rate: float


def train_classifier(
    make_model: Callable[[int], nn.Module],
    data: Mapping[str, Tensor],
    recipe: TrainingRecipe,
    *,
    seed: int,
    removed: Collection[int] = (),
    keep_checkpoints: bool = False,
    on_checkpoint: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None,
) -> tuple[nn.Module, list[Checkpoint]]:
    """
    Train from scratch without some examples, and otherwise as alike as can be.

    Initial weights and batches depend on the seed alone: a removed example leaves its place in its batch empty, and
    the loss is the mean over who is left. So two runs of one seed differ by the removed examples and by nothing that
    would come of another shuffle, which is most of the noise between runs.

    Args:
        make_model (`Callable[[int], nn.Module]`): Gives the initial model of a seed; it returns `.logits`.
        data (`Mapping[str, torch.Tensor]`): `input_ids`, `attention_mask` of shape `(N, T)` and `labels (N,)`.
        recipe (`TrainingRecipe`): How to train.
        seed (`int`): Of initial weights and batches.
        removed (`Collection[int]`): Positions of examples left out.
        keep_checkpoints (`bool`): Whether to keep the weights after each of `recipe.checkpoint_epochs`.
        on_checkpoint (`Callable`, *optional*): Called with the model and its optimizer at each checkpoint that is kept.

    Returns:
        `tuple[nn.Module, list[Checkpoint]]`: the trained model, in evaluation mode, and its checkpoints.
    """
    model = make_model(seed).train()
    parameters = list(model.parameters())
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, fused=True)
    num_examples = len(data["labels"])
    kept = torch.ones(num_examples, dtype=torch.bool)
    kept[list(removed)] = False
    generator = torch.Generator().manual_seed(seed)
    checkpoints: list[Checkpoint] = []
    num_steps = recipe.num_epochs * -(-num_examples // recipe.batch_size)
    learning_rates = iter([recipe.learning_rate * (1 - step / num_steps) for step in range(num_steps)])

    def keep(epoch: int, learning_rate: float) -> None:
        if keep_checkpoints and epoch in recipe.checkpoint_epochs:
            checkpoints.append(Checkpoint(copy.deepcopy(model).eval(), learning_rate))
            if on_checkpoint is not None:
                on_checkpoint(model, optimizer)

    keep(0, recipe.learning_rate)
    for epoch in range(1, recipe.num_epochs + 1):
        for batch in torch.randperm(num_examples, generator=generator).split(recipe.batch_size):
            batch = batch[kept[batch]]
            learning_rate = optimizer.param_groups[0]["lr"] = next(learning_rates)
            if not len(batch):
                continue
            logits = model(input_ids=data["input_ids"][batch], attention_mask=data["attention_mask"][batch]).logits
            optimizer.zero_grad()
            F.cross_entropy(logits, data["labels"][batch]).backward()
            optimizer.step()
        keep(epoch, learning_rate)
    return model.eval(), checkpoints


@torch.no_grad()
def predict_probabilities(model: nn.Module, data: Mapping[str, Tensor], *, batch_size: int = 256) -> Tensor:
    """Probability of every class for every example, shape `(N, num_classes)`; `data` as in [`train_classifier`]."""
    parts = [
        model(input_ids=ids, attention_mask=mask).logits.softmax(dim=1)
        for ids, mask in zip(
            data["input_ids"].split(batch_size), data["attention_mask"].split(batch_size), strict=True
        )
    ]
    return torch.cat(parts)


def to_batches(data: Mapping[str, Tensor], batch_size: int = 64) -> Sequence[dict[str, Tensor]]:
    """Split tensors of one line per example into batches, in order."""
    num_batches = -(-len(data["labels"]) // batch_size)
    return [
        {name: values[i * batch_size : (i + 1) * batch_size] for name, values in data.items()}
        for i in range(num_batches)
    ]
