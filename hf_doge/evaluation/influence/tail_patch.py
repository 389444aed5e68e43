"""
The tail patch (Chang et al. 2024, https://huggingface.co/papers/2410.17413): one more step on what should have mattered.

    TP(x') = loss(x'; theta after one optimizer step on the top k of x') - loss(x'; theta)

It needs no retraining. Below 0 the step lowered the query's loss; compare scorers with steps on random examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_doge.checks import check_count, check_flag, check_number

Batch = Mapping[str, Tensor]
LossOfBatch = Callable[[nn.Module, Batch], Tensor]
ADAM_EPSILON = 1e-8  # the Trainer's


def tail_patch(
    model: nn.Module,
    scores: np.ndarray,
    train_dataset: Sequence[Mapping[str, Any]],
    query_dataset: Sequence[Mapping[str, Any]],
    data_collator: Callable[[list[Any]], Batch],
    *,
    learning_rate: float,
    top_k: int = 10,
    together: bool = True,
    max_grad_norm: float | None = 1.0,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    loss_fn: LossOfBatch | None = None,
) -> np.ndarray:
    """
    How much each query's loss changes by one more optimizer step on its `top_k` highest scores.

    Every query starts from the same weights; afterwards the model is exactly as it was, its gradients and modes too. It
    is in evaluation mode throughout, so that no dropout decides. A copy of the weights is held in memory.

    Args:
        model (`nn.Module`): The trained model. Only parameters that require a gradient are stepped.
        scores (`numpy.ndarray` of shape `(Q, N)`): Positive for proponents; of equal scores the earlier example is taken.
        train_dataset (`Sequence`): The N training examples, as the collator takes them.
        query_dataset (`Sequence`): The Q queries, the same; their labels are what the loss is of.
        data_collator (`Callable`): Makes a batch of a list of examples, as in training.
        learning_rate (`float`): That of the step, such as the training's last.
        top_k (`int`): From 1 to N.
        together (`bool`): One step on all of them as one batch; otherwise one step on each alone, and the mean change.
        max_grad_norm (`float`, *optional*): Gradients are clipped to this norm, as the Trainer does; `None` for no clipping.
        make_optimizer (`Callable`, *optional*):
            `make_optimizer(model)` gives a new optimizer, called before each step; its learning rate is replaced. Load the
            state of the training's `optimizer.pt` here: a new AdamW, the default (without weight decay), moves every
            weight by about the learning rate, whatever the size of its gradient.
        loss_fn (`Callable`, *optional*): `loss_fn(model, batch)` gives the mean loss; by default that of the model's output.

    Returns:
        `numpy.ndarray` of shape `(Q,)`: loss after the step less loss before it. Mean and interval: [`bootstrap_interval`].

    Raises:
        ValueError: if shapes do not fit, a score or loss is no finite number, the model gives no loss or has no parameter
            to train, or an option is out of range.
    """
    scores = _check_sizes(scores, len(train_dataset), len(query_dataset))
    top_k = check_count("top_k", top_k, most=scores.shape[1])
    learning_rate = check_number("learning_rate", learning_rate, above=0)
    max_grad_norm = check_number("max_grad_norm", max_grad_norm, above=0, optional=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            "The model must have parameters that require a gradient, but has none. Unfreeze what was trained."
        )
    loss_fn, make_optimizer = loss_fn or _own_loss, make_optimizer or _adamw
    together = check_flag("together", together)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k].tolist()
    changes = np.zeros(len(scores))
    with _unchanged(model) as restore:

        def batch_of(dataset: Sequence[Mapping[str, Any]], places: Sequence[int]) -> Batch:
            batch = data_collator([dataset[place] for place in places])
            return {name: value.to(parameters[0].device) for name, value in batch.items()}

        for query, places in enumerate(best):
            asked = batch_of(query_dataset, [query])
            before = _loss(loss_fn, model, asked, f"query {query}")
            steps = [places] if together else [[place] for place in places]
            for step in steps:
                optimizer = make_optimizer(model)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                model.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    loss_fn(model, batch_of(train_dataset, step)).backward()
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                optimizer.step()
                after = _loss(loss_fn, model, asked, f"query {query} after the step on {step}")
                changes[query] += (after - before) / len(steps)
                restore()
    return changes


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[Callable[[], None]]:
    """The model in evaluation mode; what is given puts its weights back, as leaving does with all else too."""
    tensors = [*model.parameters(), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    grads = [parameter.grad for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore() -> None:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)

    model.eval()
    for parameter in model.parameters():
        parameter.grad = None  # zeroing would change what the caller holds
    try:
        yield restore
    finally:
        restore()
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        for module, training in modes:
            module.training = training


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, eps=ADAM_EPSILON, weight_decay=0.0)


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"The model must return a loss, but `{type(model).__name__}` gave none for {sorted(batch)}. Have the collator "
            "give `labels`, or pass `loss_fn`."
        )
    return loss


@torch.no_grad()
def _loss(loss_fn: LossOfBatch, model: nn.Module, batch: Batch, where: str) -> float:
    loss = float(loss_fn(model, batch))
    if not np.isfinite(loss):
        raise ValueError(
            f"Losses must be finite numbers, but that of {where} is {loss}. Check labels and learning rate."
        )
    return loss


def _check_sizes(scores: np.ndarray, num_examples: int, num_queries: int) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (num_queries, num_examples) or 0 in scores.shape:
        raise ValueError(
            f"`scores` must have one row for each of the {num_queries} queries and one column for each of the {num_examples} "
            f"training examples, at least one of both, but has the shape {scores.shape}."
        )
    if not np.isfinite(scores).all():
        raise ValueError("Scores must be finite numbers, but some are not. Leave out queries without a score.")
    return scores
