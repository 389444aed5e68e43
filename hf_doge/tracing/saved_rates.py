"""
The learning rate that made the step of a checkpoint, where the Trainer logged none at that step.

The schedule of the training tells it: its arguments lie next to the checkpoint (`training_args.bin`), and are believed where they
agree with all that was logged and with what the scheduler had next (`scheduler.pt`). Where they do not (a schedule of one's own),
the rate of the next step is what comes nearest.
"""

import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import get_scheduler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import SchedulerType

from hf_doge.tracing.inert_pickle import read_state

logger = logging.getLogger(__name__)

Schedule = Callable[[int], float]  # steps that were made -> factor of the next one's rate


def scheduled_rate(folder: Path, state: Mapping[str, Any], step: int) -> float | None:
    """
    The rate of the first parameter group at step `step`, counted from 1.

    Args:
        folder (`Path`): Of the checkpoint.
        state (`Mapping`): The content of its `trainer_state.json`.
        step (`int`): After which it was saved.

    Returns:
        `float`, *optional*: `None` where no file tells it, or the schedule has ended and only the next rate is known, 0.
    """
    arguments, saved = read_state(folder / TRAINING_ARGS_NAME), _saved_scheduler(folder)
    schedule = _schedule(arguments, state.get("max_steps"))
    bases = saved.get("base_lrs") or [arguments.get("learning_rate")]
    if schedule is not None and _is_rate(bases[0]):
        told = [(entry.get("step"), entry.get("learning_rate")) for entry in state.get("log_history") or ()]
        logged = [(at, rate) for at, rate in told if type(at) is int and at > 0 and _is_rate(rate)]
        last = [(step + 1, rate) for rate in (saved.get("_last_lr") or ())[:1]]
        # Older Trainers logged the rate of the step after. Many schedules end at 0, which is no sign of any.
        agrees = any(
            _agree(schedule, bases[0], [*((at + late, rate) for at, rate in logged), *last]) for late in (0, 1)
        )
        is_its_own = bases[0] != arguments.get("learning_rate")
        if agrees and (not is_its_own or any(rate > 0 for _, rate in (*logged, *last))):
            return float(bases[0]) * schedule(step - 1)
    rates = saved.get("_last_lr") or _optimizer_rates(folder)
    if not rates or not _is_rate(rates[0]) or rates[0] == 0:
        return None
    logger.warning(
        "The learning rate that made step %d is not logged in %r, and the arguments of its training do not tell its schedule: that of the"
        " next step, %g, is taken.",
        step,
        str(folder),
        rates[0],
    )
    return float(rates[0])


def _schedule(arguments: Mapping[str, Any], max_steps: Any) -> Schedule | None:
    """The factor of a schedule of transformers, if the arguments name one that depends on the step alone."""
    kind, warmup = arguments.get("lr_scheduler_type"), arguments.get("warmup_steps") or 0
    if kind not in {one.value for one in SchedulerType} or type(max_steps) is not int or max_steps < 1:
        return None
    if warmup < 1:  # a part of all steps
        warmup = math.ceil(max_steps * (warmup or arguments.get("warmup_ratio") or 0))
    given = arguments.get("learning_rate")
    rate = float(given) if _is_rate(given) else 1.0  # some schedules end at a rate of its own
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate or 1.0)
    options = arguments.get("lr_scheduler_kwargs") or None
    try:
        found = get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=int(warmup),
            num_training_steps=max_steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError):
        return None
    lambdas: Any = getattr(found, "lr_lambdas", None)
    return None if lambdas is None else lambdas[0]


def _agree(schedule: Schedule, base: float, told: Sequence[tuple[int, float]]) -> bool:
    """Whether rates are those of a schedule, each at its step."""
    return all(math.isclose(base * schedule(at - 1), rate, rel_tol=1e-5, abs_tol=1e-12 * base) for at, rate in told)


def _saved_scheduler(folder: Path) -> dict[str, Any]:
    content = _load(folder / SCHEDULER_NAME)
    return {name: content[name] for name in ("base_lrs", "_last_lr") if isinstance(content.get(name), list)}


def _optimizer_rates(folder: Path) -> list[Any]:
    groups = _load(folder / OPTIMIZER_NAME).get("param_groups")
    return [group.get("lr") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def _load(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a file; nothing where it is missing or of another kind."""
    if not path.is_file():
        return {}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_rate(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
