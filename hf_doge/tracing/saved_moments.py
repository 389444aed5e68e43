"""
Adam's second moments out of the `optimizer.pt` that a Trainer saved with a checkpoint.

The file knows parameters by number alone: by their place in the groups that `Trainer.create_optimizer` made. So the same groups
are made of the loaded model, and believed only where all numbers and shapes agree.
"""

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.layers import ChosenLayers, recorded_weights
from hf_doge.gradients.optimizer_metric import ADAM, OTHER, RADAM, has_two_averages
from hf_doge.tracing.models import unwrap_model
from hf_doge.tracing.saved_checkpoints import group_learning_rate
from hf_doge.tracing.saved_rates import has_one_rate
from hf_doge.tracing.second_moments import (
    AVERAGE,
    NoSecondMoments,
    SecondMoments,
    called,
    is_sgd,
    joined_moments,
    keeps_plain_moments,
    keeps_second_moments,
    no_adam,
    refuse_frozen,
    second_moments_of,
)

_NOT_SAVED = "no optimizer was saved with the checkpoint"
_UNREADABLE = "the saved optimizer cannot be read"
_WHAT_TO_DO = (
    " Record in training by `TracInWECallback(metric='optimizer')`, or index with `metric='gradient'` (`hf-doge index"
    " --metric gradient`)."
)


class NoSavedOptimizer(NoSecondMoments, FileNotFoundError):
    """A checkpoint has no `optimizer.pt`."""


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
            + _WHAT_TO_DO,
            why=_NOT_SAVED,
        )
    return path


def saved_second_moments(folder: Path, model: nn.Module, chosen: ChosenLayers | None = None) -> SecondMoments:
    """
    Adam's second moments of what has rows, from the `optimizer.pt` of a checkpoint.

    Which of its numbered entries belongs to a weight is known where its parameter groups are those that
    `Trainer.create_optimizer` makes of the model: as many, of as many parameters, and no tensor of another shape than its
    parameter. Where they are not, it can only be the one entry of the shape of the weight, if the model has one parameter
    of that shape, and the file one entry. (Groups made otherwise that look just like the Trainer's cannot be told apart.)

    Args:
        folder (`Path`): Of the checkpoint.
        model (`nn.Module`): Its model, with `requires_grad` as in training where that is known.
        chosen ([`ChosenLayers`], *optional*): Layers that have rows; words alone if left out.

    Returns:
        [`SecondMoments`]: On the device of the weights. Nothing else of the file stays in memory.

    Raises:
        NoSavedOptimizer: See [`require_saved_optimizer`].
        NoSecondMoments: The file cannot be read, the optimizer is not Adam, or it is not certain which entry it is.
    """
    path = require_saved_optimizer(folder)
    model = unwrap_model(model)
    frozen = f"they were frozen in the training of {str(folder)!r}, so no optimizer knows anything of them"
    refuse_frozen(recorded_weights(model, chosen), frozen)
    states, groups = _read(path)
    numbers, why_not = _numbers_by_groups(states, groups, model)

    def find(name: str, weight: Tensor) -> SecondMoments:
        if not all("betas" in group for group in groups):
            raise _not_adam(path, weight, "no `betas`", groups[0], name)
        number = numbers.get(weight)
        if number is None:
            number = _number_by_shape(states, model, weight, path=path, why_not=why_not, what=name)
        return _moments_of(states, groups, number, weight, path=path, what=name)

    return joined_moments(model, chosen, find)


def _moments_of(
    states: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    number: int,
    weight: Tensor,
    *,
    path: Path,
    what: str,
) -> SecondMoments:
    """Those of one weight of the model, which has this number."""
    state, group = states.get(number, {}), next((group for group in groups if number in group["params"]), {})
    if not keeps_plain_moments(state, weight) or not has_two_averages(group):
        raise _not_adam(path, weight, _described(state), group, what)
    moments = second_moments_of(state, group, kind=_kind_of(state, group))
    # A copy, for the mapped file could change or go away while the rows are made.
    moments.average = moments.average.to(weight.device, copy=True)
    return moments


def warn_of_saved_step(folder: Path) -> None:
    """Warn if the optimizer of a checkpoint keeps second moments, but may step otherwise than Adam; see [`warn_of_other_step`]."""
    try:
        states, groups = _read(require_saved_optimizer(folder))
    except NoSecondMoments:
        return
    alike = [group for group in groups if has_two_averages(group)]
    kept = [(states.get(number, {}), group) for group in alike for number in group["params"]]
    state, group = next((one for one in kept if keeps_second_moments(one[0])), ({}, {}))
    if state and _kind_of(state, group) == OTHER:
        warnings.warn(
            f"The metric of the optimizer takes what {str(folder / OPTIMIZER_NAME)!r} keeps as `{AVERAGE}` for the second moments of"
            f" Adam, but its optimizer is none whose steps are known (Adam, AdamW, NAdam and RAdam of torch): it keeps"
            f" {sorted(state)}. Scores are approximate if it steps otherwise; `metric='gradient'` takes plain gradients.",
            stacklevel=2,
        )


def _kind_of(state: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """What an optimizer makes of second moments, see [`kind_of_step`], by what it keeps. A subclass keeps what Adam keeps."""
    kept, settings = set(state) - {"exp_avg", AVERAGE, f"max_{AVERAGE}", "mu_product", "step"}, set(group)
    if kept or not settings & {"amsgrad", "momentum_decay", "decoupled_weight_decay"}:
        return OTHER
    return ADAM if settings & {"amsgrad", "momentum_decay"} else RADAM


def tells_groups(folder: Path) -> bool:
    """
    Whether a checkpoint has an optimizer that can be read, which tells its parameter groups; or a scheduler that has one rate for
    all of them.
    """
    if has_one_rate(folder):
        return True
    try:
        _read(require_saved_optimizer(folder))
    except NoSecondMoments:
        return False
    return True


def freeze_untrained(folder: Path, model: nn.Module) -> None:
    """
    Freeze what the optimizer of a checkpoint shows to have been frozen: parameters of whose shape it has kept nothing. Of those
    that share their shape with a trained one, and where no moments of the shape of all its parameters are there, nothing is known.
    An optimizer of as many parameters as the model has was given them all: one of another shape was resized since.

    Args:
        folder (`Path`): Of the checkpoint.
        model (`nn.Module`): Its model. An adapter's configuration tells what is trained, so it stays as it is.
    """
    if hasattr(model, "get_base_model"):
        return
    try:
        states, groups = _read(require_saved_optimizer(folder))
    except NoSecondMoments:
        return
    kept = [states.get(number, {}) for group in groups for number in group["params"]]
    averages = [state.get("exp_avg", state.get("momentum_buffer")) for state in kept]
    shapes = {average.shape for average in averages if isinstance(average, Tensor)}
    parameters = list(model.parameters())
    are_known = shapes and all(isinstance(average, Tensor) for average in averages)
    if not are_known or not shapes <= {p.shape for p in parameters} or len(averages) == len(parameters):
        return
    for parameter in parameters:
        if parameter.shape not in shapes:
            parameter.requires_grad = False


def saved_group_rate(folder: Path, logged: float, load: Callable[[], nn.Module]) -> float:
    """
    The learning rate of the input embeddings at a checkpoint, where the Trainer logged that of the first parameter group.

    Args:
        folder (`Path`): Of the checkpoint. Unless it [`tells_groups`], all of them are taken to have one rate.
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
    number = _numbers_by_groups(states, groups, model)[0].get(matrix)
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
            f" groups have several ({[group.get('lr') for group in groups]!r:.200}) and {str(path)!r} does not tell theirs. Pass"
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
            f" damaged or holds something else (an 8-bit optimizer?): {str(error).splitlines()[0]:.200}" + _WHAT_TO_DO,
            why=_UNREADABLE,
        ) from error
    states: Any = content.get("state") if isinstance(content, dict) else None
    groups: Any = content.get("param_groups") if isinstance(content, dict) else None
    known = isinstance(states, dict) and isinstance(groups, list)
    known = known and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    if known:
        numbers = [*states, *(number for group in groups for number in group["params"])]
        known = all(isinstance(number, int) for number in numbers)
        known = known and all(isinstance(state, dict) for state in states.values())
    if not known:
        raise NoSecondMoments(
            f"`metric='optimizer'` needs an optimizer whose `state` and `param_groups` know parameters by number, as those of"
            f" torch do, but {str(path)!r} is of another kind (sharded?)." + _WHAT_TO_DO,
            why=_UNREADABLE,
        )
    return states, groups


def _numbers_by_groups(
    states: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], model: nn.Module
) -> tuple[dict[Tensor, int], str]:
    """The number of each trained parameter if the groups are those of `Trainer.create_optimizer`; else none, and why not."""
    # It asks nothing of the Trainer itself.
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = [[named for named in trained if (named[0] in decaying) is decays] for decays in (True, False)]
    counts = [[len(group) for group in expected], [len(group["params"]) for group in groups]]
    if counts[0] != counts[1]:
        return {}, f"its groups have {counts[1]} parameters, not {counts[0]} as the Trainer makes them of this model"
    found: dict[Tensor, int] = {}
    for numbers, group in zip(groups, expected, strict=True):
        for number, (name, parameter) in zip(numbers["params"], group, strict=True):
            misfit = [
                _shape(value)
                for value in states.get(number, {}).values()
                if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape
            ]
            if misfit:
                return {}, f"entry {number} has a tensor of shape {misfit[0]}, but {name!r} has {_shape(parameter)}"
            found[parameter] = number
    return found, "it is no parameter of the model"


def _number_by_shape(
    states: Mapping[int, Mapping[str, Any]], model: nn.Module, matrix: Tensor, *, path: Path, why_not: str, what: str
) -> int:
    """The number of the only entry that can be of the matrix."""
    entries = _numbers_of_shape(states, matrix)
    names = [name for name, parameter in model.named_parameters() if parameter.shape == matrix.shape]
    if len(entries) != 1 or len(names) != 1:
        raise NoSecondMoments(
            f"`metric='optimizer'` needs to know which entry of {str(path)!r} belongs to the {what}. Its parameter"
            " groups must be those that the Trainer makes of the model, or one entry and one parameter must have their"
            f" shape, {_shape(matrix)}. But {why_not}; and of that shape are {len(entries)} entries and"
            f" {len(names)} parameters, {names}. Was it another optimizer than Adam, were groups of your own made, or"
            " weights frozen or resized?" + _WHAT_TO_DO,
            why=f"it is not certain which entry of the saved optimizer belongs to {called(what)}",
        )
    return entries[0]


def _not_adam(path: Path, matrix: Tensor, found: str, group: Mapping[str, Any], name: str) -> NoSecondMoments:
    return NoSecondMoments(
        f"`metric='optimizer'` needs an optimizer that keeps `{AVERAGE}` of the {name}, {_shape(matrix)} here, its `step`"
        f" and `betas`, as Adam and AdamW do, but that in {str(path)!r} has {found}. Train with `optim='adamw_torch'`, or"
        " index with `metric='gradient'`.",
        why=no_adam("the optimizer", group, name),
        is_exact=is_sgd(group),
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
