"""Which checkpoint a run resumes from: the last one that was written whole, the same on every process."""

import logging
import zipfile
from pathlib import Path

import torch.distributed as dist

from hf_doge.entries import COUNT
from hf_doge.training.learning_state import STATE_FILE
from hf_doge.training.saved_entries import read_entries

logger = logging.getLogger(__name__)

# By the Trainer alone; by FSDP, whole; by FSDP, in shards, of which this file is the last.
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata")
TRAINER_STATE_FILE = "trainer_state.json"  # the last file that the main process writes into a checkpoint


def resolve_checkpoint(
    resume_from_checkpoint: str | bool | None, output_dir: str, *, learns: bool = True
) -> Path | None:
    """
    The checkpoint folder to resume from, or `None` to start anew.

    With several processes every one of them must call this, and all get the same answer: a checkpoint counts as whole
    when each process finds it so, from its own machine.

    Args:
        resume_from_checkpoint (`str`, `bool` or `None`): As in `Trainer.train`; `True` means the last one in
            `output_dir` that is whole. One that a kill left half-written is passed over with a warning.
        output_dir (`str`): Where the run writes its checkpoints.
        learns (`bool`): Whether it must hold what a learner of weights needs. Other checkpoints, a plain Trainer's too,
            are whole with what the main process writes last.

    Raises:
        `ValueError`: if there is no whole checkpoint, or the one named is not, or some processes resume and others do
            not. All processes raise it, with the same message.
    """
    num_processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    request, candidates = "none", []
    if resume_from_checkpoint is True:
        request, candidates = "the last", list(Path(output_dir).glob("checkpoint-*"))
    elif resume_from_checkpoint:
        request, candidates = str(resume_from_checkpoint), [Path(resume_from_checkpoint)]
    found = {path.name: _find_problem(path, num_processes, learns) for path in candidates}
    problems = _merge(_gather((request, found), num_processes))
    if request == "none":
        return None
    if request != "the last":
        ((_, problem),) = problems.items()
        if problem is not None:
            kind = "of DoGETrainer" if learns else "of a Trainer"
            raise ValueError(f"{request} must be a whole checkpoint {kind}, but {problem}. Name another one.")
        return Path(request)
    for name in sorted(problems, key=_get_step, reverse=True):
        if problems[name] is None:
            return Path(output_dir) / name
        logger.warning("Passing over %s: %s. Delete it.", Path(output_dir) / name, problems[name])
    raise ValueError(f"No whole checkpoint found in {output_dir}. Start anew without `resume_from_checkpoint`.")


def _gather(own: tuple[str, dict[str, str | None]], num_processes: int) -> list[tuple[str, dict[str, str | None]]]:
    """What every process was asked for and found, in the order of their ranks."""
    if num_processes == 1:
        return [own]
    everywhere = [own] * num_processes
    dist.all_gather_object(everywhere, own)
    return everywhere


def _merge(everywhere: list[tuple[str, dict[str, str | None]]]) -> dict[str, str | None]:
    """What is wrong with each checkpoint, to the eyes of the first process that finds something."""
    requests = [request for request, _ in everywhere]
    if len(set(requests)) > 1:  # who starts anew while the others resume would wait for them in vain
        raise ValueError(
            f"All processes must resume from the same checkpoint, but in the order of their ranks they were asked for "
            f"{requests}. Put the output folder where every machine sees it, and pass the same arguments to all."
        )
    problems: dict[str, str | None] = {}
    for rank, (_, found) in enumerate(everywhere):
        for name in set().union(*(names for _, names in everywhere)):
            problem = found.get(name, f"process {rank} does not see it (do all machines share the output folder?)")
            problems[name] = problems.get(name) or problem
    return problems


def _get_step(name: str) -> int:
    step = name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def read_step(checkpoint: Path | None) -> int:
    """Steps that were taken when a whole checkpoint was written; 0 without one."""
    return 0 if checkpoint is None else read_entries(checkpoint / TRAINER_STATE_FILE)["global_step"]


def _find_problem(checkpoint: Path, num_processes: int, learns: bool) -> str | None:
    """What is wrong with a checkpoint folder for this process, or `None`."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    for names in (OPTIMIZER_FILES, ("scheduler.pt",)) if learns else ():
        if not any((checkpoint / name).exists() for name in names):
            return f"it has no {' or '.join(names)} (was it written with `save_only_model`?)"
    states = {}
    for name in (STATE_FILE, TRAINER_STATE_FILE) if learns else (TRAINER_STATE_FILE,):
        try:
            states[name] = read_entries(
                checkpoint / name, {"global_step": COUNT} if name == TRAINER_STATE_FILE else None
            )
        except FileNotFoundError:
            return f"it has no {name}"
        except ValueError:
            return f"its {name} is cut off or damaged"
    if not learns or states[STATE_FILE].get("num_processes") != num_processes:
        return None  # random states are only of use to as many processes
    # Every process writes its own when it gets there, maybe long after the main one has written all its files.
    random_state = "rng_state.pth" if num_processes == 1 else f"rng_state_{dist.get_rank()}.pth"
    if not zipfile.is_zipfile(checkpoint / random_state):
        return f"its {random_state} is missing or cut off"
    return None
