"""
Adam's second moments of the input embeddings: of an optimizer that trains, or of the `optimizer.pt` that a Trainer saved.

`optimizer.pt` knows parameters by number alone: by their place in the groups that `Trainer.create_optimizer` made. So the
same groups are made of the loaded model, and believed only where all numbers and shapes agree.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from hf_doge.functional.tracin_we import scale_by_second_moment
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.models import tensor_fingerprint, unwrap_model
from hf_doge.tracing.saved_checkpoints import group_learning_rate

AVERAGE = "exp_avg_sq"
EPS = 1e-8
_FROZEN = "the embeddings are frozen, so no optimizer knows anything of them"
_NOT_SAVED = "no optimizer was saved with the checkpoint"
_UNREADABLE = "the saved optimizer cannot be read"
_UNCERTAIN = "it is not certain which entry of the saved optimizer belongs to the embeddings"
WHAT_TO_DO = (
    " Record in training by `TracInWECallback(metric='optimizer')`, or index with `metric='gradient'` (`hf-doge index"
    " --metric gradient`)."
)


class NoSecondMoments(ValueError):
    """
    There are none of the input embeddings, or it is not known which they are.

    Attributes:
        why (`str`): The reason in a few words, without a path.
        is_exact (`bool`): Whether the plain gradient is the metric of the optimizer.
    """

    def __init__(self, message: str, *, why: str, is_exact: bool = False) -> None:
        super().__init__(message)
        self.why, self.is_exact = why, is_exact


class NoSavedOptimizer(NoSecondMoments, FileNotFoundError):
    """A checkpoint has no `optimizer.pt`."""


@dataclass
class SecondMoments:
    """
    Adam's running average of the squared gradients of the embedding matrix, after some number of steps.

    Args:
        average (`torch.Tensor` of shape `(vocabulary_size, width)`):
            As the optimizer keeps it, biased towards 0; with AMSGrad the largest so far, which its steps divide by.
        correction (`float`): `1 - beta2 ** step`, in (0, 1]; what it is divided by.
        eps (`float`): Adam's.
    """

    average: Tensor
    correction: float
    eps: float = EPS

    def of(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Bias-corrected: `(W,)` tokens to `(W, width)`."""
        return self.average[tokens].to(dtype) / self.correction

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


def second_moments_of(state: Mapping[str, Any], group: Mapping[str, Any]) -> SecondMoments:
    """
    The second moments of one parameter.

    Args:
        state (`Mapping`): What the optimizer keeps of it; see [`keeps_second_moments`].
        group (`Mapping`): The parameter group that it is in.
    """
    average, eps = state.get(f"max_{AVERAGE}", state[AVERAGE]), float(group.get("eps", EPS))
    return SecondMoments(average, 1 - group["betas"][1] ** float(state["step"]), eps if eps > 0 else EPS)


def current_second_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> SecondMoments:
    """
    Adam's second moments of the input embeddings, of an optimizer that has made a step.

    Raises:
        NoSecondMoments: The embeddings are frozen, or the optimizer keeps none of them.
    """
    require_adam(optimizer, model, started=True)
    matrix = input_embedding_matrix(unwrap_model(model))
    return second_moments_of(optimizer.state[matrix], find_group(optimizer, matrix))


def require_adam(optimizer: torch.optim.Optimizer, model: nn.Module, *, started: bool) -> None:
    """
    Raises:
        NoSecondMoments: The embeddings are frozen; or the optimizer keeps no second moments of them, as far as that is known
            if it has not `started`.
    """
    matrix = input_embedding_matrix(unwrap_model(model))
    if not matrix.requires_grad:
        raise NoSecondMoments(
            "`metric='optimizer'` needs input embeddings that are trained, but they are frozen, so the optimizer knows"
            " nothing of them. Use `metric='gradient'`.",
            why=_FROZEN,
        )
    group, state = find_group(optimizer, matrix), optimizer.state.get(matrix, {})
    average = state.get(AVERAGE)
    # Quantised averages (8 bit) are of other types, or of other names.
    plain = type(average) is Tensor and average.is_floating_point() and average.shape == matrix.shape
    if not group.get("betas") or (started and not (plain and keeps_second_moments(state))):
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise NoSecondMoments(
            f"`metric='optimizer'` needs an optimizer that keeps `exp_avg_sq` of the embedding matrix, as Adam and AdamW do,"
            f" but `{name}` does not. Train with `optim='adamw_torch'`, or use `metric='gradient'`.",
            why=_no_adam(name, group),
            is_exact=_is_sgd(group),
        )


def find_group(optimizer: torch.optim.Optimizer, matrix: Tensor) -> dict[str, Any]:
    """The parameter group that trains the embedding matrix; the first one if none does."""
    for group in optimizer.param_groups:
        if any(parameter is matrix for parameter in group["params"]):
            return group
    return optimizer.param_groups[0]


def _is_sgd(group: Mapping[str, Any]) -> bool:
    return {"momentum", "dampening", "nesterov"} <= set(group)


def _no_adam(name: str, group: Mapping[str, Any]) -> str:
    return (
        "SGD steps along the plain gradient" if _is_sgd(group) else f"{name} keeps no second moments of the embeddings"
    )


def require_saved_optimizer(folder: Path) -> Path:
    """
    The file with the optimizer of a checkpoint.

    Raises:
        NoSavedOptimizer: The folder has none, or has it in shards.
    """
    path = folder / OPTIMIZER_NAME
    if not path.is_file():
        patterns = ("optimizer*", "global_step*", f"*{OPTIMIZER_NAME}*")
        found = sorted({entry.name for pattern in patterns for entry in folder.glob(pattern)})
        raise NoSavedOptimizer(
            f"`metric='optimizer'` needs {OPTIMIZER_NAME} in every checkpoint, as a Trainer saves it without"
            f" `save_only_model`, but {str(folder)!r} has"
            + (f" {found} instead: optimizers of FSDP or DeepSpeed cannot be read." if found else " none.")
            + WHAT_TO_DO,
            why=_NOT_SAVED,
        )
    return path


def saved_second_moments(folder: Path, model: nn.Module) -> SecondMoments:
    """
    Adam's second moments of the input embeddings, from the `optimizer.pt` of a checkpoint.

    Which of its numbered entries belongs to the embeddings is known where its parameter groups are those that
    `Trainer.create_optimizer` makes of the model: as many, of as many parameters, and no tensor of another shape than its
    parameter. Where they are not, it can only be the one entry of the shape of the matrix, if the model has one parameter
    of that shape, and the file one entry. (Groups made otherwise that look just like the Trainer's cannot be told apart.)

    Args:
        folder (`Path`): Of the checkpoint.
        model (`nn.Module`): Its model, with `requires_grad` as in training where that is known.

    Returns:
        [`SecondMoments`]: On the device of the embeddings. Nothing else of the file stays in memory.

    Raises:
        NoSavedOptimizer: See [`require_saved_optimizer`].
        NoSecondMoments: The file cannot be read, the optimizer is not Adam, or it is not certain which entry it is.
    """
    path = require_saved_optimizer(folder)
    model = unwrap_model(model)
    matrix = input_embedding_matrix(model)
    if not matrix.requires_grad:
        raise NoSecondMoments(
            f"`metric='optimizer'` needs input embeddings that are trained, but the adapter in {str(folder)!r} leaves them"
            " frozen, so no optimizer knows anything of them. Use `metric='gradient'`.",
            why=_FROZEN,
        )
    states, groups = _read(path)
    if not all("betas" in group for group in groups):
        raise _not_adam(path, matrix, "no `betas`", groups[0])
    number, why_not = _number_by_groups(states, groups, model, matrix)
    if number is None:
        number = _number_by_shape(states, model, matrix, path=path, why_not=why_not)
    state, group = states.get(number, {}), next((group for group in groups if number in group["params"]), {})
    average = state.get(AVERAGE)
    # Quantised averages (8 bit) are of other types, or of other names.
    plain = type(average) is Tensor and average.is_floating_point() and average.shape == matrix.shape
    if not plain or not keeps_second_moments(state) or not group:
        raise _not_adam(path, matrix, _described(state), group)
    moments = second_moments_of(state, group)
    # A copy, for the mapped file could change or go away while the rows are made.
    moments.average = moments.average.to(matrix.device, copy=True)
    return moments


def saved_group_rate(folder: Path, logged: float, load: Callable[[], nn.Module]) -> float:
    """
    The learning rate of the input embeddings at a checkpoint, where the Trainer logged that of the first parameter group.

    Args:
        folder (`Path`): Of the checkpoint. Without `optimizer.pt`, all groups are taken to have one rate.
        logged (`float`): What the Trainer logged.
        load (`Callable`): Loads the model, which is needed only where the groups have several.

    Raises:
        ValueError: They have, and it is not certain which group the embeddings are in, or what its rate was.
    """
    path = folder / OPTIMIZER_NAME
    if not path.is_file():
        return logged
    try:
        states, groups = _read(path)
    except ValueError:  # of a kind that keeps its groups elsewhere
        return logged
    rates = [group_learning_rate(logged, groups[0], group) if "lr" in group else logged for group in groups]
    if set(rates) == {logged}:
        return logged
    model = load()
    matrix = input_embedding_matrix(model)
    number, _ = _number_by_groups(states, groups, model, matrix)
    numbers = [number] if number is not None else _numbers_of_shape(states, matrix)
    if states and not numbers:
        return logged  # frozen, as training knows them; then those of the first group count
    found = {
        rate for rate, group in zip(rates, groups, strict=True) if not states or set(numbers) & set(group["params"])
    }
    known = [rate for rate in found if rate is not None]
    if len(found) != 1 or not known:
        raise ValueError(
            f"The learning rate of the input embeddings at {str(folder)!r} must be known, but the optimizer's parameter"
            f" groups have several ({[group['lr'] for group in groups]}) and {str(path)!r} does not tell theirs. Pass"
            " `learning_rates` (`hf-doge index --learning_rates`), one for each checkpoint."
        )
    return known[0]


def _numbers_of_shape(states: Mapping[int, Mapping[str, Any]], matrix: Tensor) -> list[int]:
    """The entries that can be of the matrix."""
    return [
        number
        for number, state in states.items()
        if any(isinstance(value, Tensor) and value.shape == matrix.shape for value in state.values())
    ]


def _read(path: Path) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """States by number, and parameter groups. Tensors stay on disk until they are looked at."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise NoSecondMoments(
            f"`metric='optimizer'` needs an optimizer saved by `torch.save`, of tensors and numbers alone, but {str(path)!r} is"
            f" damaged or holds something else (an 8-bit optimizer?): {str(error).splitlines()[0]:.200}" + WHAT_TO_DO,
            why=_UNREADABLE,
        ) from error
    states: Any = content.get("state") if isinstance(content, dict) else None
    groups: Any = content.get("param_groups") if isinstance(content, dict) else None
    known = isinstance(states, dict) and isinstance(groups, list)
    if known:
        numbers = [*states, *(number for group in groups for number in group["params"])]
        known = all(isinstance(number, int) for number in numbers)
        known = known and all(isinstance(state, dict) for state in states.values())
    if not known:
        raise NoSecondMoments(
            f"`metric='optimizer'` needs an optimizer whose `state` and `param_groups` know parameters by number, as those of"
            f" torch do, but {str(path)!r} is of another kind (sharded?)." + WHAT_TO_DO,
            why=_UNREADABLE,
        )
    return states, groups


def _number_by_groups(
    states: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], model: nn.Module, matrix: Tensor
) -> tuple[int | None, str]:
    """The number of the matrix if the groups are those of `Trainer.create_optimizer`; else why they are not."""
    # It asks nothing of the Trainer itself.
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = [[named for named in trained if (named[0] in decaying) is decays] for decays in (True, False)]
    counts = [[len(group) for group in expected], [len(group["params"]) for group in groups]]
    if counts[0] != counts[1]:
        return None, f"its groups have {counts[1]} parameters, not {counts[0]} as the Trainer makes them of this model"
    found = None
    for numbers, group in zip(groups, expected, strict=True):
        for number, (name, parameter) in zip(numbers["params"], group, strict=True):
            misfit = [
                _shape(value)
                for value in states.get(number, {}).values()
                if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape
            ]
            if misfit:
                return None, f"entry {number} has a tensor of shape {misfit[0]}, but {name!r} has {_shape(parameter)}"
            if parameter is matrix:
                found = number
    return found, "the input embeddings are no parameter of the model"


def _number_by_shape(
    states: Mapping[int, Mapping[str, Any]], model: nn.Module, matrix: Tensor, *, path: Path, why_not: str
) -> int:
    """The number of the only entry that can be of the matrix."""
    entries = _numbers_of_shape(states, matrix)
    names = [name for name, parameter in model.named_parameters() if parameter.shape == matrix.shape]
    if len(entries) != 1 or len(names) != 1:
        raise NoSecondMoments(
            f"`metric='optimizer'` needs to know which entry of {str(path)!r} belongs to the input embeddings. Its parameter"
            " groups must be those that the Trainer makes of the model, or one entry and one parameter must have their"
            f" shape, {_shape(matrix)}. But {why_not}; and of that shape are {len(entries)} entries and"
            f" {len(names)} parameters, {names}. Was it another optimizer than Adam, were groups of your own made, or"
            " weights frozen or resized?" + WHAT_TO_DO,
            why=_UNCERTAIN,
        )
    return entries[0]


def _not_adam(path: Path, matrix: Tensor, found: str, group: Mapping[str, Any]) -> NoSecondMoments:
    return NoSecondMoments(
        f"`metric='optimizer'` needs an optimizer that keeps `{AVERAGE}` of the embedding matrix, {_shape(matrix)} here, its `step`"
        f" and `betas`, as Adam and AdamW do, but that in {str(path)!r} has {found}. Train with `optim='adamw_torch'`, or"
        " index with `metric='gradient'`.",
        why=_no_adam("the optimizer", group),
        is_exact=_is_sgd(group),
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _described(state: Mapping[str, Any]) -> str:
    """What an optimizer keeps, in words: names, with the types and shapes of tensors."""
    words = [
        f"{key} ({type(value).__name__}, {value.dtype}, {_shape(value)})" if isinstance(value, Tensor) else key
        for key, value in state.items()
    ]
    return ", ".join(words) or "nothing"
