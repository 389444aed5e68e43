"""
Per-example weight gradients of any linear or convolutional layer, from one forward and one backward per batch.

Shapes: B = examples of a batch, T = positions, I and O = what a layer reads and gives, k = width of a convolution,
P = weights of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_doge.evaluation.influence.scorers.base import Batches
from hf_doge.gradients.embedding import EmbeddingGradientRecorder


def layer_gradients(model: nn.Module, batches: Batches, layers: Sequence[str]) -> dict[str, Tensor]:
    """
    Gradient of each example's own loss in the weight of each layer; biases are left out, for they say nothing of inputs.

    The loss is the cross-entropy of a classifier's label or the sum of a causal model's token losses. The model must
    not mix examples, and is left in evaluation mode.

    Args:
        model (`nn.Module`): Returns `.logits`.
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Padded batches with `labels`.
        layers (`Sequence[str]`): Names of `nn.Linear` and `nn.Conv1d` modules, each used once in a forward.

    Returns:
        `dict[str, torch.Tensor]`: by layer, shape `(N, P)`, on the CPU.
    """
    model.eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {name: model.get_submodule(name) for name in layers}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0].detach(), output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    try:
        for batch in batches:
            batch = {name: values.to(device) for name, values in batch.items()}
            labels = batch.pop("labels")
            loss = summed_loss(model(**batch).logits, labels)
            output_grads = torch.autograd.grad(loss, [seen[name][1] for name in layers])
            for name, output_grad in zip(layers, output_grads, strict=True):
                found[name].append(_weight_gradients(modules[name], seen[name][0], output_grad).cpu())
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses of all examples: of one label each, or of every next token that has a label."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def cancellation_by_entry(model: nn.Module, batches: Batches) -> dict[str, float]:
    """
    `sum_i |g_i| / |sum_i g_i|`, both summed over the entries of a weight, of the embedding and each layer of a classifier.

    Unlike the ratio of norms, it is 1 for gradients that share no entry, as those of texts without a word in common.
    """
    net = 0.0
    total = 0.0
    with EmbeddingGradientRecorder(model) as recorder:
        zeros = recorder.matrix.new_zeros(recorder.matrix.shape, dtype=torch.float64).detach()
        for batch in batches:
            rows = recorder.record(batch)
            total += float(rows.rows.double().abs().sum())
            net = net + zeros.index_add(0, rows.tokens, rows.rows.double())
    ratios = {"embedding": total / float(net.abs().sum())}
    for layer, values in layer_gradients(model, batches, weight_layers(model)).items():
        ratios[layer] = float(values.double().abs().sum() / values.double().sum(dim=0).abs().sum())
    return ratios


def weight_layers(model: nn.Module) -> list[str]:
    """Names of all linear and convolutional layers, from the input to the output."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d))]
    return sorted(names, key=lambda name: name == "classifier")  # made first in the small classifiers, but read last


def _weight_gradients(module: nn.Module, inputs: Tensor, output_grads: Tensor) -> Tensor:
    """`(B, T, I)` or `(B, I)` and the gradient of what the layer gave -> `(B, P)`."""
    if isinstance(module, nn.Conv1d):
        (padding,), (width,) = module.padding, module.kernel_size
        windows = F.pad(inputs, (padding, padding)).unfold(2, width, 1)  # (B, I, T, k)
        return torch.einsum("bot,bitk->boik", output_grads, windows).flatten(1)
    if inputs.ndim == 2:
        inputs, output_grads = inputs[:, None], output_grads[:, None]
    return (output_grads.transpose(1, 2) @ inputs).flatten(1)  # (B, O, T) @ (B, T, I)
