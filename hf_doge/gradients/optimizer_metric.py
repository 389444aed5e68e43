"""Gradients measured by what an optimizer makes of them: [`OptimizerMetric`]."""

import torch
from torch import Tensor, nn

from hf_doge.functional.doge import clip_scale
from hf_doge.gradients.vectors import Gradient, Vectors, own_part


class OptimizerMetric:
    """
    The inner product of a target's gradient with the update that Adam or AdamW would make from a domain's gradient.

    `<u_j, G>` with `u_j = lr * g_j / (sqrt(v) + eps)` is, to first order, by how many nats a step on the domain alone lowers the
    target's loss, or the mean loss of several targets. It equals `<g_j, H G>` with a diagonal `H`, so the domains' gradients stay as they are: one elementwise
    product of the target's gradient.

    `lr`, `eps`, the decay rate and the step count are the optimizer's own, by parameter group. `v` is its second moment,
    bias-corrected, after one more step whose gradient is the mean of the targets': a parameter that the optimizer has not seen
    yet is otherwise divided by `eps` alone. Momentum and weight decay are left out: they are the same for all domains.

    The optimizer sees gradients clipped to `max_norm`, so the domains' and that new one count times the factor that clips the
    mean of the targets' gradients: one long gradient would otherwise outweigh hundreds of steps. It stands for the factor of the
    step, which depends on the weights that are sought.

    Args:
        optimizer (`torch.optim.Optimizer`): At a step; its state is read and not changed.
        max_norm (`float`, *optional*): To which the gradient is clipped before each step, `None` or 0 if it is not.

    Raises:
        `ValueError`: if it keeps no second moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None = None) -> None:
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        if not all(len(group.get("betas", ())) == 2 and "eps" in group for group in optimizer.param_groups):
            raise self._refusal()

    def __call__(self, vectors: Vectors, target: Gradient, *, weight: float) -> Gradient:
        """See [`~hf_doge.gradients.alignment.TargetMetric`]."""
        scale = 1.0
        if self._max_norm:
            square = vectors.inner_product(target, target, scored_only=False)
            square = vectors.sum_numbers(square) if vectors.is_sharded else square
            scale = float(clip_scale(square.sqrt() / weight, self._max_norm))
        return [
            None if part is None else self._measure(parameter, part, weight, scale)
            for parameter, part in zip(vectors.parameters, target, strict=True)
        ]

    def _measure(self, parameter: nn.Parameter, part: Tensor, weight: float, scale: float) -> Tensor:
        group = self._groups.get(parameter)
        if group is None:  # the optimizer does not train it
            return torch.zeros_like(part)
        state, decay = self._optimizer.state.get(parameter, {}), group["betas"][1]
        wide = part if part.dtype.itemsize >= 4 else part.float()
        moment, step = (scale * wide / weight).square() * (1 - decay), 1
        if state:
            if "exp_avg_sq" not in state:
                raise self._refusal()
            moment, step = moment + decay * own_part(state["exp_avg_sq"]).to(wide), 1 + int(state["step"])
        moment = moment / (1 - decay**step)
        if "max_exp_avg_sq" in state:
            moment = torch.maximum(moment, own_part(state["max_exp_avg_sq"]).to(wide) / (1 - decay**step))
        return (wide * (scale * float(group["lr"]) / weight / (moment.sqrt() + group["eps"]))).to(part.dtype)

    def _refusal(self) -> ValueError:
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return ValueError(
            "`score_metric='optimizer'`, as the recipe 'doge_plus' has it, divides by the second moments that Adam and AdamW keep, but the optimizer "
            f"{type(optimizer).__name__} keeps none of that kind. Use `optim='adamw_torch'`, say, or "
            "`recipe='paper'`."
        )
