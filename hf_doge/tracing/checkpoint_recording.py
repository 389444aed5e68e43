"""What [`TracInWECallback`] does with `record="checkpoint"`: all examples at the weights of each checkpoint."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments

from hf_doge.files import write_json
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.optimizer_metric import warn_of_other_step
from hf_doge.tracing.batches import SequentialBatches
from hf_doge.tracing.examples import Examples
from hf_doge.tracing.metric import moments_for
from hf_doge.tracing.models import has_fingerprint, unwrap_model
from hf_doge.tracing.opening import SharedIndex, open_shared_index
from hf_doge.tracing.processes import process_index, run_on_all_processes, run_on_main_process
from hf_doge.tracing.recording import Recording, check_first_batch, encoding_of, make_recorder, record_checkpoint
from hf_doge.tracing.saved_checkpoints import group_learning_rate
from hf_doge.tracing.saved_rates import logged_learning_rate
from hf_doge.tracing.second_moments import current_second_moments, find_group, require_adam
from hf_doge.tracing.settings import RecordingSettings
from hf_doge.tracing.trained_loss import ADVICE, TrainedLoss

logger = logging.getLogger(__name__)

PLAN_FILE = "recording.json"  # the checkpoint that is being recorded, so that a resumed training can finish it


class CheckpointRecording(Recording):
    """
    Records all examples at each save, each process some segments of them.

    Args:
        folder (`str` or `os.PathLike`): Of the index.
        dataset ([`Examples`]): What to record.
        options ([`RecordingSettings`]): How.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the dataset.
        collator (`Callable`, *optional*): Instead of the Trainer's.
        optimizer (`Optimizer`): Of the training; read for `metric="optimizer"`.
        batch_size (`int`): Examples at once; changes rows by rounding at most.
        seed (`int`): Of whatever the collator draws.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        dataset: Examples,
        options: RecordingSettings,
        tokenizer: Any | None,
        optimizer: torch.optim.Optimizer,
        collator: Callable | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.dataset = dataset
        self.options = options
        self.tokenizer = tokenizer
        self.optimizer = optimizer
        self.collator = collator
        self.batch_size = batch_size
        self.seed = seed
        self._index: SharedIndex | None = None
        self._trained_loss: TrainedLoss | None = None

    def start(
        self, *, model: nn.Module, train_dataloader: DataLoader, args: TrainingArguments, state: TrainerState
    ) -> None:
        """
        Open the index and try a few examples, so that what cannot be recorded is known before training.

        Raises:
            ValueError: if something cannot be recorded, or the folder has another training's checkpoints.
        """
        require_whole_weights(model, args)
        self.options = self.options.resolved(unwrap_model(model), self.folder)
        if self.options.metric == "optimizer":
            self._require_adam(model, started=state.global_step > 0)
        if self.options.metric != "gradient" and process_index() == 0:
            warn_of_other_step(self.optimizer, f"`metric={self.options.metric!r}`", plain="`metric='gradient'`")
        self._progress = not args.disable_tqdm
        collator = self.collator or train_dataloader.collate_fn
        self._batches = SequentialBatches(self.dataset.recorded, collator, batch_size=self.batch_size, seed=self.seed)
        self._index = open_shared_index(
            self.folder,
            model=model,
            dataset=self.dataset,
            tokenizer=self.tokenizer,
            settings=self.options,
            metadata=lambda: {"collator_seed": self.seed, **encoding_of(self._batches, self.tokenizer, args)},
            seed=self.seed,
        )
        self._recorder = make_recorder(model, self.options, self.tokenizer)
        run_on_all_processes(lambda heartbeat: self._try(state))
        if self.options.loss_fn is not None or process_index() > 0:
            return
        if args.label_smoothing_factor:
            factor = args.label_smoothing_factor
            warnings.warn(
                f"Labels are smoothed in training (`label_smoothing_factor={factor}`).{ADVICE}", stacklevel=2
            )
            return
        self._trained_loss = TrainedLoss(model, args, train_dataloader)

    def before_step(self) -> None:
        """See what is trained: whether it is what is recorded."""
        if self._trained_loss is not None:
            self._trained_loss.watch()

    def before_optimizer_step(self, *, learning_rate: float, state: TrainerState) -> None:
        """Warn once if something else than what is recorded is trained."""
        difference = None if self._trained_loss is None else self._trained_loss.difference()
        if difference is not None:
            self._trained_loss.close()
            self._trained_loss = None
            warnings.warn(difference, stacklevel=2)

    def after_first_step(self, *, model: nn.Module) -> None:
        """See that the optimizer keeps what its metric needs; it does so from its first step on."""
        if self.options.metric == "optimizer":
            self._require_adam(model, started=True)

    def plan(self, facts: Mapping[str, Any]) -> None:
        """Note on disk what [`save`] is about to be called with, in case it does not come to its end."""
        run_on_main_process(lambda heartbeat: write_json(self.folder / PLAN_FILE, facts))

    def save(self, facts: Mapping[str, Any], *, model: nn.Module) -> None:
        """
        Record all examples at the current weights, unless the index has them; called by all processes.

        Args:
            facts (`Mapping`): Name, step, epoch and path of the checkpoint, and the learning rate of the last step.
            model (`nn.Module`): With the weights that were saved.
        """
        self._record(model, run_on_main_process(lambda heartbeat: self._plan_to_record(model, facts)))

    def finish_interrupted(self, facts: Mapping[str, Any], *, model: nn.Module, state: TrainerState) -> None:
        """
        Record the checkpoint that training resumes from, if that was interrupted or never begun.

        Args:
            facts (`Mapping`): Its name, step, epoch and path. Path and learning rate are those planned, where they were.
            model (`nn.Module`): With the weights of that checkpoint.
            state ([`~transformers.TrainerState`]): With the log of the training so far.
        """
        self._record(model, run_on_main_process(lambda heartbeat: self._plan_to_finish(model, facts, state)))

    def stop(self) -> None:
        """Let go of the index, and of the model."""
        if self._trained_loss is not None:
            self._trained_loss.close()
        self._trained_loss = None
        if self._index is not None:
            self._index.close()
        self._index = None

    def _require_adam(self, model: nn.Module, *, started: bool) -> None:
        chosen = self.options.chosen_layers(unwrap_model(model))
        require_adam(self.optimizer, model, started=started, chosen=chosen)

    def _try(self, state: TrainerState) -> None:
        """A few examples on each process, so that all know of the model what recording teaches."""
        names = self._index.writer.checkpoint_names
        if state.global_step == 0 and names:
            raise ValueError(
                f"{str(self.folder)!r} holds checkpoints {names} of an earlier training, but this one begins again. Resume"
                " that one (`resume_from_checkpoint`), delete the folder, or choose another."
            )
        if not check_first_batch(self._recorder, self._batches):
            return
        begun = self._index.writer.config["metadata"].get("collator_seed", self.seed)
        if begun != self.seed:
            raise ValueError(
                f"All checkpoints of an index must be recorded with one `seed`, since the collator or dataset draws at random:"
                f" {str(self.folder)!r} was begun with {begun}, but got {self.seed}. Pass `seed={begun}`, or record in"
                " another folder."
            )
        if process_index() == 0:
            warnings.warn(
                f"The collator or dataset draws at random (masked tokens?), so no recording sees exactly what training saw:"
                f" each example is drawn once with `seed={self.seed}`, the same at every checkpoint. Pass a `collator=`"
                " without chance to `TracInWECallback` for rows that depend on the example alone.",
                stacklevel=2,
            )

    def _plan_to_record(self, model: nn.Module, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """On the main process: what is to be recorded, if anything, noted on disk."""
        name, fingerprint = facts["name"], self._recorded_fingerprint(facts["name"])
        if fingerprint is not None:
            if has_fingerprint(model, fingerprint):
                logger.info("Checkpoint %s is in the index already.", name)
                (self.folder / PLAN_FILE).unlink(missing_ok=True)
                return None
            logger.info("Training was set back and %s came out differently: it is recorded again.", name)
            self._index.writer.forget(name)
        write_json(self.folder / PLAN_FILE, facts)
        return facts

    def _record(self, model: nn.Module, facts: Mapping[str, Any] | None) -> None:
        """On all processes: what the main one has planned."""
        if facts is None:
            return
        moments = None
        if self.options.metric != "gradient":
            chosen = self.options.chosen_layers(unwrap_model(model))
            find = partial(current_second_moments, self.optimizer, model, chosen)
            moments = moments_for(self._index, self.options.metric, find, name=facts["name"])
        record_checkpoint(
            self._index, self._recorder, self._batches, facts, second_moments=moments, progress=self._progress
        )
        if process_index() == 0:
            (self.folder / PLAN_FILE).unlink(missing_ok=True)

    def _plan_to_finish(
        self, model: nn.Module, facts: Mapping[str, Any], state: TrainerState
    ) -> Mapping[str, Any] | None:
        """On the main process: what is left to record of the checkpoint that training resumes from."""
        name, step, fingerprint = facts["name"], facts["step"], self._recorded_fingerprint(facts["name"])
        if fingerprint is not None:
            if not has_fingerprint(model, fingerprint):
                raise ValueError(
                    f"Training resumes at step {step} with other weights than {name!r} in {str(self.folder)!r} was recorded"
                    " of. Resume the recorded training, or record this one in another folder."
                )
            return None
        plan = _read_json(self.folder / PLAN_FILE) or {}
        if plan.get("step") == step:
            facts = plan
        learning_rate = plan.get("learning_rate") if plan.get("step") == step else None
        if learning_rate is None:
            learning_rate = self._logged_rate(model, state)
        if learning_rate is None:
            warnings.warn(
                f"Training resumes at step {step}, which was saved but not recorded, and its learning rate is unknown: it"
                " will be missing in the index. Record it afterwards with `hf-doge index` and its learning rate.",
                stacklevel=2,
            )
            return None
        return self._plan_to_record(model, {**facts, "learning_rate": learning_rate})

    def _logged_rate(self, model: nn.Module, state: TrainerState) -> float | None:
        """That of the embeddings' parameter group, from the log, which has that of the first."""
        logged = logged_learning_rate(state.log_history, state.global_step)
        group = find_group(self.optimizer, input_embedding_matrix(unwrap_model(model)))
        return group_learning_rate(logged, self.optimizer.param_groups[0], group)

    def _recorded_fingerprint(self, name: str) -> str | None:
        """By which the index knows the weights of a checkpoint, if it has that whole."""
        checkpoints = self._index.writer.config["checkpoints"]
        return next((one["fingerprint"] for one in checkpoints if one["name"] == name), None)


def require_whole_weights(model: nn.Module, args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: if no process has the whole model.
    """
    # `accelerate launch --use_fsdp` shards without telling the arguments; of FSDP 2 and others only the parameters tell.
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    sharded = any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if wrapped or sharded or args.fsdp:
        raise ValueError(
            "Recording needs the whole model in one process, but its weights are sharded (FSDP, ZeRO-3 or tensor"
            " parallelism). Train without the callback, and record the saved checkpoints by `hf-doge index`."
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
