"""
Peers that look at the last layer of a classifier: TracIn, the influence function, the representer value.

Shapes: N = training examples, Q = queries, D = width of what the last layer reads, C = classes. The last layer gives
`f = W a + b`; the cross-entropy's gradient is `delta = softmax(f) - onehot` with respect to f and `delta a^T` to W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_doge.evaluation.influence.scorers.base import Batches, check_checkpoints


@dataclass
class LastLayerFactors:
    """
    All that the last layer's gradients are made of, in float64.

    Attributes:
        inputs (`torch.Tensor` of shape `(N, D)`): What the layer read.
        probabilities (`torch.Tensor` of shape `(N, C)`): Softmax of what it returned.
        deltas (`torch.Tensor` of shape `(N, C)`): `probabilities - onehot(labels)`.
        labels (`torch.Tensor` of shape `(N,)`): Class of each example.
    """

    inputs: Tensor
    probabilities: Tensor
    deltas: Tensor
    labels: Tensor


def last_layer_factors(model: nn.Module, batches: Batches, *, last_layer: str | None = None) -> LastLayerFactors:
    """
    Run a classifier in evaluation mode and keep the factors of its last layer's gradients.

    Args:
        model (`nn.Module`): Returns `.logits` of shape `(B, C)`, as its last layer gave them.
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Padded batches with `labels`.
        last_layer (`str`, *optional*):
            Name of the layer among the model's modules, by default the linear one whose output the logits are.

    Raises:
        ValueError: if no linear layer, or not the named one, gives the logits of one label per example.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    named: list[nn.Module] = [*layers] if last_layer is None else [model.get_submodule(last_layer)]
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
        for layer in named
    ]
    training = model.training
    inputs, logits, labels = [], [], []
    try:
        model.eval()
        device = next(model.parameters()).device
        for batch in batches:
            seen.clear()
            with torch.no_grad():
                returned = model(**{name: value.to(device) for name, value in batch.items()}).logits
            last = [read for read, gave in seen if gave.shape == returned.shape and torch.equal(gave, returned)]
            if len(last) != 1 or returned.ndim != 2 or batch["labels"].ndim != 1:
                raise ValueError(
                    "The last layer must be linear and return the logits of one label per example, but "
                    f"`{type(model).__name__}` has {len(last)} such layer(s){f' at {last_layer!r}' if last_layer else ''} "
                    f"and logits of shape {tuple(returned.shape)}. Methods of the last layer are for classifiers; name the "
                    "layer by `last_layer` if there are several."
                )
            inputs.append(last[0].cpu().double())
            logits.append(returned.cpu().double())
            labels.append(batch["labels"].cpu())
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    probabilities, classes = torch.cat(logits).softmax(dim=1), torch.cat(labels)
    onehot = torch.nn.functional.one_hot(classes, probabilities.shape[1])
    return LastLayerFactors(torch.cat(inputs), probabilities, probabilities - onehot, classes)


class TracInLastScorer:
    """
    TracIn-Last: `sum_c eta_c (a . a' [+ 1]) (delta . delta')`, the 1 for the bias, from the factors.

    Args:
        models (`Sequence[nn.Module]`): The classifier at each checkpoint.
        learning_rates (`Sequence[float]`): Learning rate in force at each.
        bias (`bool`): Whether the bias counts: it says nothing about the inputs, and cancels most.
        last_layer (`str`, *optional*): See [`last_layer_factors`].
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        learning_rates: Sequence[float],
        *,
        bias: bool = False,
        last_layer: str | None = None,
    ) -> None:
        check_checkpoints(models, learning_rates)
        self.models = models
        self.learning_rates = learning_rates
        self.bias = bias
        self.last_layer = last_layer

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        total = torch.zeros(())
        for model, learning_rate in zip(self.models, self.learning_rates, strict=True):
            ours = last_layer_factors(model, train, last_layer=self.last_layer)
            theirs = last_layer_factors(model, queries, last_layer=self.last_layer)
            similarities = theirs.inputs @ ours.inputs.T + self.bias  # (Q, D) @ (D, N)
            total = total + learning_rate * similarities * (theirs.deltas @ ours.deltas.T)
        return total.numpy()


class InfluenceLastScorer:
    """
    Influence function on the last layer at one checkpoint: `g(x)^T (H + lambda I)^-1 g(x')`.

    `H = 1/N sum_n (diag(p_n) - p_n p_n^T) (x) (a_n a_n^T)` is the exact Hessian of the mean training loss in W and b,
    solved exactly. It is singular (adding the same to every class changes no loss), hence the damping. The usual form
    has a minus for the change of the query's loss; ours is positive where training on x lowers it.

    Args:
        model (`nn.Module`): The trained classifier.
        damping (`float`): Lambda, as a share of the mean of the diagonal of H, `> 0`.
        bias (`bool`): Whether the bias belongs to the layer.
        last_layer (`str`, *optional*): See [`last_layer_factors`].
    """

    def __init__(
        self, model: nn.Module, *, damping: float = 0.01, bias: bool = True, last_layer: str | None = None
    ) -> None:
        if damping <= 0:
            raise ValueError(f"`damping` must be positive, for the Hessian is singular, but got {damping}.")
        self.model = model
        self.damping = damping
        self.bias = bias
        self.last_layer = last_layer

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        ours = last_layer_factors(self.model, train, last_layer=self.last_layer)
        theirs = last_layer_factors(self.model, queries, last_layer=self.last_layer)
        inputs, query_inputs = _append_one(ours.inputs, self.bias), _append_one(theirs.inputs, self.bias)
        hessian = softmax_regression_hessian(inputs, ours.probabilities)
        damping = self.damping * hessian.diagonal().mean()
        hessian.diagonal().add_(damping)
        solved = torch.linalg.solve(hessian, _gradients(inputs, ours.deltas).T)  # (C * D, N)
        return (_gradients(query_inputs, theirs.deltas) @ solved).numpy()


class RepresenterScorer:
    """
    Representer value of the query's class j on the last layer: `-delta_j(x) (a . a' [+ 1])`.

    The factor `1 / (2 lambda N)` that all training examples share is left out. The theorem holds at an optimum with
    weight decay lambda; elsewhere, as here and in the TracIn-WE paper's comparison, it is a heuristic. Positive where x
    is of class j, for its label pulls the query's logit j up.

    Args:
        model (`nn.Module`): The trained classifier.
        bias (`bool`): Whether the bias belongs to the layer.
        last_layer (`str`, *optional*): See [`last_layer_factors`].
    """

    def __init__(self, model: nn.Module, *, bias: bool = False, last_layer: str | None = None) -> None:
        self.model = model
        self.bias = bias
        self.last_layer = last_layer

    def scores(self, train: Batches, queries: Batches) -> np.ndarray:
        """Scores of shape `(Q, N)`, see [`Scorer`]."""
        ours = last_layer_factors(self.model, train, last_layer=self.last_layer)
        theirs = last_layer_factors(self.model, queries, last_layer=self.last_layer)
        similarities = theirs.inputs @ ours.inputs.T + self.bias  # (Q, N)
        return (-ours.deltas.T[theirs.labels] * similarities).numpy()


def softmax_regression_hessian(inputs: Tensor, probabilities: Tensor) -> Tensor:
    """Hessian of the mean cross-entropy in the weights of a linear layer, flattened class by class: `(C*D, C*D)`."""
    covariances = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
    num_classes, width = probabilities.shape[1], inputs.shape[1]
    hessian = inputs.new_empty(num_classes, width, num_classes, width)
    for first in range(num_classes):
        for second in range(num_classes):
            hessian[first, :, second, :] = inputs.T @ (covariances[:, first, second, None] * inputs)
    return hessian.reshape(num_classes * width, num_classes * width) / len(inputs)


def _gradients(inputs: Tensor, deltas: Tensor) -> Tensor:
    """Gradient of each example's loss in the weights, `(N, C * D)`."""
    return (deltas[:, :, None] * inputs[:, None, :]).flatten(1)


def _append_one(inputs: Tensor, bias: bool) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1) if bias else inputs
