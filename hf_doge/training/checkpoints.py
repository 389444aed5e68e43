"""Which checkpoint a run resumes from: the last one that was written whole."""

import json
import logging
from pathlib import Path

from hf_doge.training.learning_state import STATE_FILE

logger = logging.getLogger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"  # the last file that the Trainer writes into a checkpoint


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> Path | None:
    """
    The checkpoint folder to resume from, or `None` to start anew.

    Args:
        resume_from_checkpoint (`str`, `bool` or `None`): As in `Trainer.train`; `True` means the last one in
            `output_dir` that is whole. One that a kill left half-written is passed over with a warning.
        output_dir (`str`): Where the run writes its checkpoints.

    Raises:
        `ValueError`: if there is no whole checkpoint, or the one named is not.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        checkpoint = Path(resume_from_checkpoint)
        if problem := _find_problem(checkpoint):
            raise ValueError(
                f"{checkpoint} must be a whole checkpoint of DoGETrainer, but {problem}. Name another one."
            )
        return checkpoint
    for checkpoint in sorted(Path(output_dir).glob("checkpoint-*"), key=_get_step, reverse=True):
        problem = _find_problem(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("Passing over %s: %s. Delete it.", checkpoint, problem)
    raise ValueError(f"No whole checkpoint found in {output_dir}. Start anew without `resume_from_checkpoint`.")


def _get_step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _find_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or `None`."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).exists():
            return f"it has no {name} (was it written with `save_only_model`?)"
    for name in (STATE_FILE, TRAINER_STATE_FILE):
        try:
            json.loads((checkpoint / name).read_text())
        except FileNotFoundError:
            return f"it has no {name}"
        except json.JSONDecodeError:
            return f"its {name} is cut off"
    return None
