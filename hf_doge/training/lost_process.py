"""What went wrong when a process of the group is gone: the cause, the step, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from transformers import Trainer


@contextmanager
def explaining_lost_process(trainer: Trainer) -> Iterator[None]:
    """
    Around training: says what a failed exchange between processes means.

    Gloo notices at once that a process is gone. One that hangs is given up on, by gloo and NCCL, after
    `args.ddp_timeout` seconds, or after torch's 30 minutes with `use_cpu=True`, for which transformers does not pass the
    number on. `accelerate launch` ends its processes by itself as soon as one of them fails.

    Args:
        trainer (`transformers.Trainer`): Who trains, for the step.

    Raises:
        `RuntimeError`: in place of the backend's error, which is its cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_exchange(error):
            raise
        state = trainer.state
        where = (
            f"the end of step {state.global_step + 1} of {state.max_steps}" if state.max_steps else "the first step"
        )
        raise RuntimeError(
            f"All processes must reach {where}, but process "
            f"{trainer.args.process_index} lost another one, which was killed, failed or hung for longer than the timeout "
            "of the process group: its own log tells, or the system's (memory, pre-emption). End what is left of the "
            "run, and start all processes again with `resume_from_checkpoint=True`."
        ) from error


def _is_of_the_exchange(error: RuntimeError) -> bool:
    """Whether a backend raised it; gloo's errors have no class of their own, but name the file that raised them."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
