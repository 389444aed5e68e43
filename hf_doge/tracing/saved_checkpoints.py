"""Folders of checkpoints: which step and learning rate they are of, and in which order they come."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_doge.text import parse_json
from hf_doge.tracing.saved_rates import saved_learning_rate

logger = logging.getLogger(__name__)

# `checkpoint-12`, `step_12` (accelerate), `ckpt12`, `checkpoint-12-loss-1.9`; no date, fraction or `12k` behind the word
_STEP = re.compile(
    r"(?<![a-z0-9])(?:checkpoint|ckpt|steps?|iter|iteration|epochs?|model|best|last|final)[-_.= ]?([0-9]{1,18})"
    r"(?![a-z0-9]|[-_.,][0-9])",
    re.IGNORECASE,
)
_VERSION = re.compile(r"(v[0-9]+\.)([0-9]{1,18})", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,18}")


def describe_checkpoint(path: Path, *, learning_rate: float | None = None) -> dict[str, Any]:
    """
    Name, step, epoch and learning rate of a checkpoint that a Trainer saved, from its `trainer_state.json`.

    Args:
        path (`Path`): Its folder.
        learning_rate (`float`, *optional*): In force there; see [`saved_learning_rate`] if left out.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The learning rate is not given, and no file tells it.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"A checkpoint must be a folder, but {str(path)!r} is none. Look at its name.")
    state = _trainer_state(path)
    step = checkpoint_step(path)
    if learning_rate is None and step:
        learning_rate = saved_learning_rate(path, state, step)
    if learning_rate is None:
        raise ValueError(
            f"The learning rate in force at {str(path)!r} must be known, but its trainer_state.json has none logged at step"
            f" {step}, and neither training_args.bin nor scheduler.pt tells it. Pass `learning_rates`, one for each checkpoint (all 1 weighs"
            " them alike)."
        )
    return {"name": path.name, "step": step or 0, "epoch": state.get("epoch"), "learning_rate": float(learning_rate)}


def checkpoint_step(path: Path) -> int | None:
    """After which step a checkpoint was saved: by its `trainer_state.json`, else by its name; None where neither says it."""
    step = _trainer_state(path).get("global_step")
    return _named_step(path.resolve().name) if step is None else step  # a link may be called "last"


def _named_step(name: str) -> int | None:
    """`checkpoint-12`, `step_12`, `12` and `v1.12` say 12; a date, a hash or a name with two steps says nothing."""
    if version := _VERSION.fullmatch(name):
        return int(version[2])
    numbers = [name] if _NUMBER.fullmatch(name) else _STEP.findall(name)
    return int(numbers[0]) if len(numbers) == 1 else None


def _counted(name: str, step: int) -> str:
    """What the step of a checkpoint counts: steps, unless it was read off a name that counts something else."""
    if _named_step(name) != step:
        return "steps"
    version = _VERSION.fullmatch(name)
    return version[1] if version else "epochs" if re.search("epoch", name, re.IGNORECASE) else "steps"


def in_order_of_steps(paths: Sequence[Path], recorded: Mapping[str, int]) -> list[int]:
    """
    The places of checkpoints in `paths`, by ascending step: the last one is the model whose predictions are traced.

    Args:
        paths (`Sequence[Path]`): Folders of checkpoints.
        recorded (`Mapping[str, int]`): Name -> step of checkpoints that an index has already.

    Raises:
        ValueError: One is given twice, or of some the step is known and of others it is not.
    """
    steps = [checkpoint_step(path) for path in paths]
    places: dict[Any, str] = {step: name for name, step in recorded.items() if step > 0}
    known = bool(places) or any(step is not None for step in steps)
    named = [*recorded.items(), *((path.resolve().name, step) for path, step in zip(paths, steps, strict=True))]
    counted = sorted({_counted(name, step) for name, step in named if step})
    unplaced = [name for name in recorded if _named_step(name) is None] if known and not places else []
    if len(counted) > 1 or (unplaced and {path.name for path in paths} - set(recorded)):
        raise ValueError(
            "Checkpoints are ordered by their steps, but "
            + (
                f"{unplaced} of the index have"
                if unplaced
                else f"some of {sorted({name for name, _ in named})} count {counted[0]}"
            )
            + (" none" if unplaced else f", others {counted[1]}")
            + ". Call all of them 'checkpoint-' and their steps, and record them in a new folder."
        )
    for path, step in zip(paths, steps, strict=True):
        unclear = known or re.search("[0-9]", path.resolve().name)  # a date or a hash is no step, and hides an order
        if step is None and unclear and len(paths) + len(recorded) > 1 and path.name not in recorded:
            raise ValueError(
                f"Checkpoints are ordered by their steps, but that of {str(path)!r} is unknown: it has no trainer_state.json"
                " and its name is no step. Call it 'checkpoint-' and its step, or write its step into its"
                ' trainer_state.json: {"global_step": 100}.'
            )
        for place in {path.resolve(), step} - {None}:
            if places.setdefault(place, path.name) != path.name:
                raise ValueError(
                    f"Each checkpoint counts once, but {path.name!r} and {places[place]!r} are both"
                    + (f" of step {step}" if place == step else f" the folder {str(place)!r}")
                    + ". Name one of them."
                )
    if None in steps and len(paths) > 1:
        logger.warning(
            "The steps of %s are unknown, so they are taken in this order, the last as the end of the training. Folders"
            " called 'checkpoint-<step>' are ordered by themselves.",
            [path.name for path in paths],
        )
        return list(range(len(paths)))
    return sorted(range(len(paths)), key=lambda place: steps[place] or 0)


def _trainer_state(path: Path) -> dict[str, Any]:
    file = path / "trainer_state.json"
    try:
        state = parse_json(file.read_bytes(), source=str(file)) if file.is_file() else {}
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{str(file)!r} must be JSON as the Trainer writes it, but it is not: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{str(file)!r} must hold the state of a Trainer, but it holds something else.")
    history = state.get("log_history") or []
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"`log_history` in {str(file)!r} must be a list of what was logged, but got {history!r:.80}.")
    step = state.get("global_step")
    if step is not None and not (type(step) is int and 0 <= step < 2**63):
        raise ValueError(f"`global_step` in {str(file)!r} must be a step, but got {step!r:.80}.")
    return state


def group_learning_rate(logged: float | None, first: Mapping[str, Any], group: Mapping[str, Any]) -> float | None:
    """
    The learning rate of a parameter group, where that of the first one is logged.

    Schedules of transformers multiply the rate that each group begins with (`initial_lr`) by one factor. None where the
    groups do not agree with that.
    """
    if logged is None or group is first:
        return logged
    try:
        now = [float(one["lr"]) for one in (first, group)]
        begun = [float(one.get("initial_lr", rate)) for one, rate in zip((first, group), now, strict=True)]
    except (KeyError, OverflowError, TypeError, ValueError):  # a file can hold anything
        return None
    if not all(0 <= rate < math.inf for rate in (*now, *begun)):
        return None
    if begun[0] == begun[1] and now[0] == now[1]:
        return logged
    if begun[0] <= 0 or not math.isclose(now[0] * begun[1], now[1] * begun[0], rel_tol=1e-6, abs_tol=1e-300):
        return None
    return logged * (begun[1] / begun[0])
