"""Gradients measured by what an optimizer makes of them: [`OptimizerMetric`]."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.functional.doge import clip_scale
from hf_doge.gradients.vectors import Gradient, Vectors, own_part

ADAM, RADAM, OTHER = "adam", "radam", "other"
_CLASSES = {ADAM: (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam), RADAM: (torch.optim.RAdam,)}


def kind_of_step(optimizer: torch.optim.Optimizer) -> str | None:
    """
    What an optimizer makes of second moments: the same as Adam (`"adam"`: AdamW too, and NAdam, whose momentum is another), as
    RAdam (`"radam"`), something that is not known here (`"other"`), or nothing, since it keeps none (`None`). The code of its
    step decides, so that a subclass with a step of its own is another optimizer.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    has_moments = all(has_two_averages(group) and "eps" in group for group in inner.param_groups)
    if not has_moments or isinstance(inner, torch.optim.Adamax):
        return None
    step = inspect.unwrap(type(inner).step)
    return next((kind for kind, known in _CLASSES.items() if step in [inspect.unwrap(c.step) for c in known]), OTHER)


def has_two_averages(group: Mapping[str, Any]) -> bool:
    """Whether the optimizer of a parameter group averages gradients and their squares, as Adam does, and nothing else."""
    return len(group.get("betas") or ()) == 2


def rectification(step: int, decay: float) -> float | None:
    """
    The factor r_t of RAdam's update (https://huggingface.co/papers/1908.03265), `None` where its step is the plain gradient.

    Args:
        step (`int`): The number of the step, from 1 on.
        decay (`float`): Of the second moment, beta_2.
    """
    longest = 2 / (1 - decay) - 1
    length = longest - 2 * step * decay**step / (1 - decay**step)
    if length <= 5:
        return None
    return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5


def warn_of_other_step(optimizer: torch.optim.Optimizer, setting: str, *, plain: str) -> None:
    """
    Warn if an optimizer is taken for Adam that may step otherwise.

    Args:
        optimizer (`torch.optim.Optimizer`): Of the training.
        setting (`str`): Which asks for its metric, as it is written.
        plain (`str`): Which asks for none.
    """
    if kind_of_step(optimizer) == OTHER:
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        warnings.warn(
            f"{setting} takes what {name} keeps as `exp_avg_sq` for the second moments of Adam, but {name} is none of the"
            " optimizers whose steps are known (Adam, AdamW, NAdam and RAdam of torch), so scores are approximate if it steps"
            f" otherwise. Train with `optim='adamw_torch'`, or use {plain}.",
            stacklevel=3,
        )


class OptimizerMetric:
    """
    The inner product of a target's gradient with the update that Adam or AdamW would make from a domain's gradient.

    `<u_j, G>` with `u_j = lr * g_j / (sqrt(v) + eps)` is, to first order, by how many nats a step on the domain alone lowers the
    target's loss, or the mean loss of several targets. It equals `<g_j, H G>` with a diagonal `H`, so the domains' gradients stay as they are: one elementwise
    product of the target's gradient.

    `lr`, `eps`, the decay rate and the step count are the optimizer's own, by parameter group. `v` is its second moment,
    bias-corrected, after one more step whose gradient is the mean of the targets': a parameter that the optimizer has not seen
    yet is otherwise divided by `eps` alone. Momentum and weight decay are left out: they are the same for all domains. RAdam's
    update has its [`rectification`]; an optimizer that is not known counts as Adam, see [`warn_of_other_step`].

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
        self._kind = kind_of_step(optimizer)
        if self._kind is None:
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
            average = state.get("exp_avg_sq")
            if average is None or "step" not in state or own_part(average).shape != part.shape:
                raise self._refusal()
            moment, step = moment + decay * _numbers(average).to(wide), 1 + int(state["step"])
        correction, factor = 1 - decay**step, scale * float(group["lr"]) / weight
        moment, eps = moment / correction, group["eps"]
        if "max_exp_avg_sq" in state:
            moment = torch.maximum(moment, _numbers(state["max_exp_avg_sq"]).to(wide) / correction)
        if self._kind == RADAM:
            rectified = rectification(step, decay)
            if rectified is None:
                return (wide * factor).to(part.dtype)
            factor, eps = factor * rectified, eps / correction**0.5
        return (wide * (factor / (moment.sqrt() + eps))).to(part.dtype)

    def _refusal(self) -> ValueError:
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return ValueError(
            "`score_metric='optimizer'`, as the recipe 'doge_plus' has it, divides by the second moments that Adam and AdamW keep, but the optimizer "
            f"{type(optimizer).__name__} keeps none of that kind. Use `optim='adamw_torch'`, say, or "
            "`recipe='paper'`."
        )


def _numbers(average: Tensor) -> Tensor:
    """This process' part of an average; what it stands for, where it is quantised as in torchao's optimizers."""
    part = own_part(average)
    return part if type(part).dequantize is Tensor.dequantize else part.dequantize()
