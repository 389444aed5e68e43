"""
The learning rate that made the step of a checkpoint.

What the Trainer logged at the step tells it. Where it logged none there, the schedule of the training does: its arguments lie
next to the checkpoint (`training_args.bin`), and are believed where they agree with all that was logged, with what the scheduler
had next (`scheduler.pt`), and with what it had next in the checkpoints around. Where they do not (a schedule of one's own), the
rate of the next step is what comes nearest. A rate that nothing confirms is taken with a warning.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import get_scheduler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import SchedulerType
from transformers.utils import CONFIG_NAME

from hf_doge.text import parse_json
from hf_doge.tracing.inert_pickle import read_state
from hf_doge.tracing.pretrained import ADAPTER_FILE

logger = logging.getLogger(__name__)

Schedule = Callable[[int], float]  # steps that were made -> factor of the next one's rate
Rates = list[tuple[int, float]]  # steps, counted from 1, and the rate that made each
_LARGEST_STEP = 2**63
_MOST_NEIGHBOURS = 8  # checkpoints around that are looked at
# What a schedule may be taken for.
_OTHERS = ("linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt")


def logged_learning_rate(log_history: Any, step: int | None) -> float | None:
    """The learning rate that made step `step`, if the Trainer logged at that step. (It logs the one before the scheduler.)"""
    rates = [rate for at, rate in _logged(log_history) if at == step]
    return rates[-1] if rates else None


@dataclass(frozen=True)
class _Told:
    """What the files of a checkpoint tell of the learning rates of its training."""

    arguments: Mapping[str, Any]
    max_steps: Any
    scheduler: Mapping[str, Any]
    logged: Rates
    last: Rates  # what the scheduler had next
    around: Rates  # what those of other checkpoints had next
    is_of_now: bool  # whether a Trainer of today logged, which is known to log the rate of the step

    @property
    def base(self) -> float | None:
        """With which the schedule of the first group began."""
        bases, given = _rates(self.scheduler.get("base_lrs")), self.arguments.get("learning_rate")
        return bases[0] if bases else float(given) if _is_rate(given) else None

    def readings(self) -> list[Rates]:
        """All rates, as the Trainer logs them and as older ones did: at the step before."""
        return [[*((at + late, rate) for at, rate in self.logged), *self.last, *self.around] for late in (0, 1)]

    def scheduled(self, step: int, *, changed: Mapping[str, Any] | None = None) -> tuple[float, Rates] | None:
        """The rate by the schedule of the arguments, and the reading that it agrees with, if there is one."""
        schedule, base = _schedule({**self.arguments, **(changed or {})}, self.max_steps), self.base
        if schedule is None or base is None:
            return None
        reading = next((one for one in self.readings() if _agree(schedule, base, one)), None)
        rate = base * _factor(schedule, step - 1)
        return None if reading is None or not _is_rate(rate) else (rate, reading)


def saved_learning_rate(folder: Path, state: Mapping[str, Any], step: int) -> float | None:
    """
    The rate of the first parameter group at step `step`, counted from 1.

    Args:
        folder (`Path`): Of the checkpoint.
        state (`Mapping`): The content of its `trainer_state.json`.
        step (`int`): After which it was saved.

    Returns:
        `float`, *optional*: `None` where no file tells it, or the schedule has ended and only the next rate is known, 0.
    """
    told = _read(folder, state, step)
    scheduled = told.scheduled(step)
    now = [rate for at, rate in told.logged if at == step][-1:]
    if now and _is_of_its_step(told, scheduled, now[0], step):
        return now[0]
    before = [rate for at, rate in told.around if at == step]
    if before:
        if scheduled is None:
            _warn(
                folder, step, before[0], "is what the checkpoint before had next, but not of the arguments' schedule"
            )
        return before[0]
    # Many schedules end at 0, which is no sign of any base rate.
    if scheduled is not None and (
        told.base == told.arguments.get("learning_rate") or any(rate > 0 for _, rate in scheduled[1])
    ):
        unsure = _why_unsure(told, *scheduled, step)
        if unsure:
            _warn(folder, step, scheduled[0], f"is that of the schedule in training_args.bin, but {unsure}")
        return scheduled[0]
    if now:
        _warn(folder, step, now[0], "was logged there, but may be that of the next step, as older Trainers logged it")
        return now[0]
    rates = _rates(told.scheduler.get("_last_lr")) or _optimizer_rates(folder)
    if not rates or rates[0] == 0:
        return None
    _warn(folder, step, rates[0], "is that of the next step, since training_args.bin does not tell the schedule")
    return rates[0]


def _read(folder: Path, state: Mapping[str, Any], step: int) -> _Told:
    saved, max_steps = _load(folder / SCHEDULER_NAME), state.get("max_steps")
    bases = _rates(saved.get("base_lrs"))
    return _Told(
        arguments=read_state(folder / TRAINING_ARGS_NAME),
        max_steps=max_steps,
        scheduler=saved,
        logged=_logged(state.get("log_history")),
        last=[(step + 1, rate) for rate in _rates(saved.get("_last_lr"))[:1]],
        around=list(_rates_around(folder, bases[0], max_steps, step)) if bases else [],
        is_of_now=_is_of_now(folder),
    )


def _is_of_its_step(told: _Told, scheduled: tuple[float, Rates] | None, logged: float, step: int) -> bool:
    """Whether what was logged at a step is its rate, and not that of the next one, as older Trainers logged it."""
    if told.is_of_now or (told.last and not _close(logged, told.last[0][1])):
        return True  # what the scheduler had last is the next one
    if scheduled is not None:
        return _close(logged, scheduled[0])
    others = [rate for at, rate in told.logged if at < step]
    return bool(others) and _close(others[-1], logged)


def _warn(folder: Path, step: int, rate: float, how: str) -> None:
    logger.warning(
        "The learning rate that made step %d is not certain in %r: %g is taken. It %s. If it was another, pass `learning_rates`"
        " (`hf-doge index --learning_rates`), one for each checkpoint.",
        step,
        str(folder),
        rate,
        how,
    )


def _why_unsure(told: _Told, rate: float, reading: Rates, step: int) -> str:
    """Why the rate of a schedule that agrees with a reading is not certain; empty where it is."""
    known = {at for at, one in reading if one > 0}
    if not told.scheduler.get("base_lrs") and not known:
        return "nothing was logged and no scheduler.pt is there to confirm it"
    if not _is_of_transformers(told) and len(known) < 2:
        return "the scheduler was not made of it, and one rate is too little to compare them"
    none = {"warmup_steps": 0, "warmup_ratio": 0}
    for kind, warmup in product(_OTHERS, ({}, none)):
        changed = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": None, **warmup}
        other = told.scheduled(step, changed=changed)
        if other is not None and not math.isclose(rate, other[0], rel_tol=1e-3):
            return f"{kind!r} would agree with all that is known too, and give {other[0]:g}"
    return ""


def _is_of_transformers(told: _Told) -> bool:
    """Whether a saved scheduler was made by transformers, whose schedules are partial functions; true where none was saved."""
    if not told.scheduler:
        return True
    constant = told.arguments.get("lr_scheduler_type") == "constant"  # a plain function
    lambdas = told.scheduler.get("lr_lambdas")
    return isinstance(lambdas, list) and lambdas[:1] == [None if constant else {}]


def _schedule(arguments: Mapping[str, Any], max_steps: Any) -> Schedule | None:
    """The factor of a schedule of transformers, if the arguments name one that depends on the step alone."""
    kind, warmup = arguments.get("lr_scheduler_type"), arguments.get("warmup_steps") or 0
    if kind not in [one.value for one in SchedulerType] or not _is_step(max_steps):
        return None
    ratio = arguments.get("warmup_ratio") or 0
    if not _is_rate(warmup) or not _is_rate(ratio) or max(warmup, ratio) >= _LARGEST_STEP:
        return None
    if warmup < 1:  # a part of all steps
        warmup = math.ceil(max_steps * (warmup or ratio))
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
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        # It does not know the options, or cannot count with them.
        return None
    lambdas: Any = getattr(found, "lr_lambdas", None)
    return None if lambdas is None else lambdas[0]


def _factor(schedule: Schedule, steps: int) -> float:
    """NaN where it cannot be computed."""
    try:
        return float(schedule(steps))
    except (ArithmeticError, TypeError, ValueError):  # by options such as a power of -1
        return math.nan


def _agree(schedule: Schedule, base: float, told: Sequence[tuple[int, float]]) -> bool:
    """Whether rates are those of a schedule, each at its step."""
    return all(_close(base * _factor(schedule, at - 1), rate, base) for at, rate in told)


def _close(one: float, other: float, base: float = 0.0) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-12 * base)


def _logged(log_history: Any) -> Rates:
    """What was logged; entries that are no rate of a step are left out."""
    entries = log_history if isinstance(log_history, list) else []
    told = [(one.get("step"), one.get("learning_rate")) for one in entries if isinstance(one, dict)]
    return [(at, float(rate)) for at, rate in told if _is_step(at) and _is_rate(rate)]


def _rates_around(folder: Path, base: float, max_steps: Any, step: int) -> Iterator[tuple[int, float]]:
    """What the schedulers of the nearest checkpoints around had next: those of the same training, and of the step before."""
    named = [(path.name.rpartition("-")[2], path) for path in folder.absolute().parent.glob("checkpoint-*")]
    steps = [(int(number), path) for number, path in named if number.isdecimal() and len(number) < 19]
    others = [(at, path) for at, path in steps if at != step]
    for at, path in sorted(others, key=lambda other: abs(other[0] - step + 1))[:_MOST_NEIGHBOURS]:
        saved = _load(path / SCHEDULER_NAME)
        bases, rates = _rates(saved.get("base_lrs")), _rates(saved.get("_last_lr"))
        is_same = bases[:1] == [base] and saved.get("last_epoch") == at
        # A training that was resumed may have had another end before.
        if rates and is_same and (at == step - 1 or _max_steps(path) == max_steps):
            yield at + 1, rates[0]


def _max_steps(folder: Path) -> Any:
    return _value(folder / TRAINER_STATE_NAME, "max_steps")


def _is_of_now(folder: Path) -> bool:
    """Whether transformers 5 or later trained. With an adapter no config.json is saved, but arguments, some of which that lacks."""
    if (folder / CONFIG_NAME).is_file() or not (folder / ADAPTER_FILE).is_file():
        return _version(folder) >= 5
    arguments = read_state(folder / TRAINING_ARGS_NAME)
    return bool(arguments) and not arguments.keys() & {"no_cuda", "fp16_backend"}


def _version(folder: Path) -> int:
    """The first number of the version of transformers that saved a model; 0 where that is not told."""
    major = str(_value(folder / CONFIG_NAME, "transformers_version")).partition(".")[0]
    return int(major) if major.isdecimal() and len(major) < 4 else 0


def _value(path: Path, name: str) -> Any:
    """A value of a JSON file; `None` where there is no such file or value."""
    try:
        content = parse_json(path.read_bytes(), source=path.name)
    except (OSError, ValueError):
        return None
    return content.get(name) if isinstance(content, dict) else None


def _rates(values: Any) -> list[float]:
    """Rates of all groups; none where one of them is no rate."""
    given = values if isinstance(values, list) else []
    plain = [one.item() if isinstance(one, torch.Tensor) and one.numel() == 1 else one for one in given]
    return [float(one) for one in plain] if all(_is_rate(one) for one in plain) else []


def has_one_rate(folder: Path) -> bool:
    """Whether the scheduler of a checkpoint had the same rate for all parameter groups, from the first step to the next."""
    saved = _load(folder / SCHEDULER_NAME)
    rates = [_rates(saved.get(name)) for name in ("base_lrs", "_last_lr")]
    return all(len(set(one)) == 1 for one in rates)


def _optimizer_rates(folder: Path) -> list[float]:
    groups = _load(folder / OPTIMIZER_NAME).get("param_groups")
    return _rates([group.get("lr") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else [])


def _load(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a file; nothing where it is missing or of another kind."""
    if not path.is_file():
        return {}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever wrote it can make any error of it
        return {}
    return content if isinstance(content, dict) else {}


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < _LARGEST_STEP


def _is_rate(value: Any) -> TypeGuard[int | float]:
    """A finite number that is not negative (an int can be too large for a float)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
