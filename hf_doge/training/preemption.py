"""A checkpoint when the machine is about to be taken away: [`PreemptionCallback`]."""

import logging
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class PreemptionCallback(TrainerCallback):
    """
    On SIGTERM, lets the step at hand end, saves a checkpoint and stops training; resuming from it is exact.

    `TrainingArguments(enable_jit_checkpoint=True)` asks for such a checkpoint. What transformers then does is not
    right for learning weights: it may save after the weights of a step were updated and before the model took that
    step, and on several processes each decides by a clock of its own, so that one saves while another waits for it in
    the next step. [`PreemptionCallback.take_over`] puts this callback in its place.

    All processes stop after the same step, whichever of them got the signal: after each step they add up one number.
    An evaluation due after that step is left out, as the time left may be short. From the signal to the checkpoint it
    takes at most one step (or the evaluation at hand) and the writing. Torch's launcher, and so `accelerate launch`,
    kills the processes 30 seconds after it was told to stop; the environment variable `TORCH_ELASTIC_SHUTDOWN_TIMEOUT`
    (seconds) grants more.

    Further SIGTERM signals change nothing while training lasts. `trainer.train()` returns as if training were over;
    `trainer.state.global_step < trainer.state.max_steps` tells that it is not.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._previous_handler: Any = None

    @classmethod
    def take_over(cls, trainer: Trainer) -> None:
        """Let this callback do what `trainer.args.enable_jit_checkpoint` asks for; nothing if it does not."""
        if not getattr(trainer.args, "enable_jit_checkpoint", False):  # transformers 5.0 lacks it
            return
        from transformers.trainer_jit_checkpoint import JITCheckpointCallback

        replaced = trainer.pop_callback(JITCheckpointCallback)
        if replaced is not None:
            replaced.on_train_end(trainer.args, trainer.state, trainer.control)  # gives the signal back
            trainer.add_callback(cls())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_asked = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._is_asked_anywhere(args.device):
            return
        logger.warning(
            "SIGTERM: saving a checkpoint after step %d of %d and stopping. Go on with `resume_from_checkpoint`.",
            state.global_step,
            state.max_steps,
        )
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def _is_asked_anywhere(self, device: torch.device) -> bool:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._is_asked
        flag = torch.tensor(int(self._is_asked), device=device)
        dist.all_reduce(flag)
        return bool(flag)
