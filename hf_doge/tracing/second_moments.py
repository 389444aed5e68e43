"""Adam's second moments of what has rows in an index: of the input embeddings, of chosen layers, or of both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.functional.tracin_we import scale_by_second_moment
from hf_doge.gradients.layers import WORDS, ChosenLayers, as_out_in, recorded_weights
from hf_doge.gradients.optimizer_metric import RADAM, has_two_averages, kind_of_step, rectification
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.models import tensor_fingerprint, unwrap_model

AVERAGE = "exp_avg_sq"
EPS = 1e-8


class NoSecondMoments(ValueError):
    """
    There are none of what has rows, or it is not known which they are.

    Attributes:
        why (`str`): The reason in a few words, without a path.
        is_exact (`bool`): Whether the plain gradient is the metric of the optimizer.
    """

    def __init__(self, message: str, *, why: str, is_exact: bool = False) -> None:
        super().__init__(message)
        self.why, self.is_exact = why, is_exact


@dataclass
class SecondMoments:
    """
    Adam's running average of the squared gradients of the embedding matrix, after some number of steps.

    Args:
        average (`torch.Tensor` of shape `(vocabulary_size, width)`):
            As the optimizer keeps it, biased towards 0; with AMSGrad the largest so far, which its steps divide by.
        correction (`float`): `1 - beta2 ** step`, in (0, 1]; what it is divided by.
        eps (`float`): Adam's.
        first (`int`): The token of the first row: 0, or the first row of layers where words have none.
    """

    average: Tensor
    correction: float
    eps: float = EPS
    first: int = 0

    def of(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Bias-corrected: `(W,)` tokens to `(W, width)`."""
        return self.average[tokens - self.first].to(dtype) / self.correction

    def divisors(self, tokens: Tensor) -> Tensor:
        """`sqrt(sqrt(v) + eps)`: what rows and queries are divided by, `(W,)` tokens to `(W, width)` in float32."""
        return (self.of(tokens).sqrt() + self.eps).sqrt()

    def measure(self, rows: TokenRows, *, one_sided: bool) -> TokenRows:
        """
        Rows in Adam's metric.

        Args:
            rows ([`TokenRows`]): Plain gradients.
            one_sided (`bool`): As an earlier version did: divided by all of `sqrt(v) + eps`, for queries that are plain.
        """
        if one_sided:
            moments, eps, sides = self.of(rows.tokens).to(rows.rows.dtype), EPS, "one"
        else:
            moments, eps, sides = self.of(rows.tokens, rows.rows.dtype), self.eps, "both"
        scaled = scale_by_second_moment(rows.rows, moments, eps=eps, sides=sides)
        return TokenRows(rows.offsets, rows.tokens, scaled, rows.virtual)

    def fingerprint(self) -> str:
        """Checksum by which they are recognised, as [`model_fingerprint`] is one of weights."""
        return tensor_fingerprint(f"{AVERAGE} / {self.correction!r}", self.average)


def keeps_second_moments(state: Mapping[str, Any]) -> bool:
    """Whether what an optimizer keeps of a parameter has what Adam keeps: `exp_avg_sq` and the number of steps."""
    return AVERAGE in state and "step" in state


def keeps_plain_moments(state: Mapping[str, Any], weight: Tensor) -> bool:
    """Whether these are numbers, one for each of the weight. Quantised averages (8 bit) are of other types, or of other names."""
    average = state.get(AVERAGE)
    is_plain = type(average) is Tensor and average.is_floating_point() and average.shape == weight.shape
    return is_plain and keeps_second_moments(state)


def second_moments_of(state: Mapping[str, Any], group: Mapping[str, Any], *, kind: str | None) -> SecondMoments:
    """
    The second moments of one parameter.

    Args:
        state (`Mapping`): What the optimizer keeps of it; see [`keeps_second_moments`].
        group (`Mapping`): The parameter group that it is in.
        kind (`str`, *optional*): How the optimizer steps, see [`kind_of_step`]. Those of RAdam are divided by the square of its
            [`rectification`], and 1 as long as it makes plain steps.
    """
    average, eps = state.get(f"max_{AVERAGE}", state[AVERAGE]), float(group.get("eps", EPS))
    decay, step, eps = group["betas"][1], float(state["step"]), eps if eps > 0 else EPS
    correction = 1 - decay**step
    if kind != RADAM:
        return SecondMoments(average, correction, eps)
    factor = rectification(int(step), decay)
    if factor is None:
        return SecondMoments(torch.ones_like(average), 1.0)
    return SecondMoments(average, correction * factor**2, eps / (correction**0.5 * factor))


def joined_moments(
    model: nn.Module, chosen: ChosenLayers | None, find: Callable[[str, Tensor], SecondMoments]
) -> SecondMoments:
    """
    The second moments of all that has rows, row by row as they are stored.

    Args:
        model (`nn.Module`): Unwrapped.
        chosen ([`ChosenLayers`], *optional*): Layers that have rows, whole ones; words alone where it is left out.
        find (`Callable`): Returns those of one weight, given its name too.

    Raises:
        NoSecondMoments: As `find`; or their `eps` differ.
    """
    found = {name: find(name, weight) for name, weight in recorded_weights(model, chosen).items()}
    if chosen is None:
        return next(iter(found.values()))
    if len({one.eps for one in found.values()}) > 1:
        raise NoSecondMoments(
            "`metric='optimizer'` needs one `eps` for all that has rows, but the parameter groups of the optimizer have several."
            " Use `metric='gradient'`.",
            why="the parameter groups of the optimizer have several `eps`",
        )
    modules, parts = dict(model.named_modules()), []
    for name, one in found.items():
        moments = one.average.float() / one.correction
        layer = next((layer for layer in chosen.layers if layer.name == name), None)
        # Rows are filled up with zeros, which a divisor of 1 leaves so.
        parts.append(moments if layer is None else chosen.cut(layer, as_out_in(modules[name], moments), fill=1.0))
    first = 0 if chosen.embedding else chosen.num_words
    return SecondMoments(torch.cat(parts), 1.0, next(iter(found.values())).eps, first)


def current_second_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, chosen: ChosenLayers | None = None
) -> SecondMoments:
    """
    Adam's second moments of what has rows, of an optimizer that has made a step.

    Raises:
        NoSecondMoments: It is frozen, or the optimizer keeps none of it.
    """
    require_adam(optimizer, model, started=True, chosen=chosen)

    def find(name: str, weight: Tensor) -> SecondMoments:
        return second_moments_of(optimizer.state[weight], find_group(optimizer, weight), kind=kind_of_step(optimizer))

    return joined_moments(unwrap_model(model), chosen, find)


def require_adam(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, started: bool, chosen: ChosenLayers | None = None
) -> None:
    """
    Raises:
        NoSecondMoments: What has rows is frozen; or the optimizer keeps no second moments of it, as far as that is known
            if it has not `started`.
    """
    weights = recorded_weights(unwrap_model(model), chosen)
    refuse_frozen(weights, "they are frozen, so the optimizer knows nothing of them")
    for name, weight in weights.items():
        _require_adam_of(optimizer, name, weight, started=started)


def refuse_frozen(weights: Mapping[str, Tensor], because: str) -> None:
    """
    Raises:
        NoSecondMoments: One of the weights that have rows is frozen; the message says what of them is trained.
    """
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if not frozen:
        return
    trained = len(weights) - len(frozen)
    kinds = " or ".join(sorted({"'embedding'" if name == WORDS else "what is frozen" for name in frozen}))
    advice = (
        f"Leave {kinds} out of `layers` to have the metric of Adam for the {trained} weights that are trained, or use"
    )
    raise NoSecondMoments(
        f"`metric='optimizer'` needs {frozen[0]} that are trained, but {because}. {advice if trained else 'Use'} `metric='gradient'`.",
        why=is_frozen(frozen[0]),
    )


def _require_adam_of(optimizer: torch.optim.Optimizer, what: str, matrix: Tensor, *, started: bool) -> None:
    group, state = find_group(optimizer, matrix), optimizer.state.get(matrix, {})
    is_adam = has_two_averages(group) and kind_of_step(optimizer) is not None
    if not is_adam or (started and not keeps_plain_moments(state, matrix)):
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise NoSecondMoments(
            f"`metric='optimizer'` needs an optimizer that keeps `exp_avg_sq` of the {what}, as Adam and AdamW do,"
            f" but `{name}` does not. Train with `optim='adamw_torch'`, or use `metric='gradient'`.",
            why=no_adam(name, group, what),
            is_exact=is_sgd(group),
        )


def find_group(optimizer: torch.optim.Optimizer, matrix: Tensor) -> dict[str, Any]:
    """The parameter group that trains the embedding matrix; the first one if none does."""
    for group in optimizer.param_groups:
        if any(parameter is matrix for parameter in group["params"]):
            return group
    return optimizer.param_groups[0]


def is_sgd(group: Mapping[str, Any]) -> bool:
    return {"momentum", "dampening", "nesterov"} <= set(group)


def no_adam(name: str, group: Mapping[str, Any], what: str) -> str:
    return (
        "SGD steps along the plain gradient" if is_sgd(group) else f"{name} keeps no second moments of {called(what)}"
    )


def is_frozen(what: str) -> str:
    are, them = ("are", "them") if what == WORDS else ("is", "it")
    return f"{called(what)} {are} frozen, so no optimizer knows anything of {them}"


def called(what: str) -> str:
    """The name of a weight within a sentence."""
    return f"the {what}" if what == WORDS else f"layer {what!r}"
