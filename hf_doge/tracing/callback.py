"""Recording during training, for any Trainer: `Trainer(..., callbacks=[TracInWECallback("influence")])`."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_doge.checks import check_count, check_flag, check_function, check_path, check_repo_id, check_seed, show
from hf_doge.tracing.background_push import BackgroundPush
from hf_doge.tracing.checkpoint_recording import CheckpointRecording
from hf_doge.tracing.examples import choose_examples, has_texts
from hf_doge.tracing.models import MODELS, keep_weights, stored_path, warn_if_unsearchable
from hf_doge.tracing.processes import process_index, run_on_main_process
from hf_doge.tracing.recording import Recording
from hf_doge.tracing.second_moments import find_group
from hf_doge.tracing.settings import RecordingOptions, RecordingSettings

logger = logging.getLogger(__name__)


class TracInWECallback(TrainerCallback):
    """
    Records the gradient of each training example with respect to its words, for TracIn on word embeddings
    (TracIn-WE, https://huggingface.co/papers/2202.11844).

    ```python
    callback = TracInWECallback("influence")
    Trainer(model, args, train_dataset=train, callbacks=[callback]).train()
    index = InfluenceIndex.from_pretrained("influence")
    ```

    By default all training examples are recorded at every save, with the learning rate of the step that led there. Dataset,
    collator and tokenizer are the Trainer's. Training itself stays the same to the bit: neither the Trainer nor the
    dataset, the mode of the model, its gradients or any random number is touched. What is interrupted continues: rows are
    written in segments, and a training that is resumed from a checkpoint first finishes the recording of that checkpoint.
    If that was its last step, that is all: a Trainer by itself then makes one more, whose gradients are dropped here, so
    that no weight moves and nothing is saved, logged or recorded.

    Several processes share the recording: each records some segments of `max_segment_bytes`, into one folder that all must
    see, and the index is that of one process, file by file. If one fails or is killed, the others end within a minute with
    an error that names it ([`run_on_all_processes`]); what is whole stays, and resuming finishes it, on any number.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder of the index: new, or the one that this training was recording to before it was interrupted.
        dataset (`Dataset`, *optional*):
            What to record instead of the Trainer's dataset, tokenised like it. Columns that the model does not take
            (text, domain, ...) are kept with each example; without it the Trainer has dropped them. May also be the
            Trainer's dataset before it was tokenised (same rows), for its columns alone. Needed if training reads a stream.
        collator (`Callable`, *optional*): What makes a batch of examples instead of the Trainer's, say one that masks no
            tokens at random. Its random draws are seeded with `seed`.
        record_steps (`int` or `Sequence[int]`, *optional*):
            Record at every `n`-th step or at the steps of a list; at each save of the Trainer if left out. The weights
            of steps that the Trainer does not save are saved in `<output_dir>/models`.
        save_weights (`bool`, *optional*):
            Whether to copy the weights of recorded checkpoints into `<output_dir>/models`, where a search finds them
            even if the Trainer deletes its own. If left out, they are copied when `save_total_limit` is set.
        batch_size (`int`, *optional*): Examples at once; changes rows by rounding at most. That of training if left out.
        seed (`int`): Seed of whatever dataset and collator draw while recording.
        hub_index_id (`str`, *optional*):
            Dataset repository to push each finished checkpoint to, in the background, while training goes on. Made at
            train begin if it does not exist, private if `hub_private_repo` of the arguments says so; `hub_token` is used.
            A push that fails never stops a training: a warning at its end says so, and how to repeat it.
        redact_text (`bool`): What is pushed has no text of the examples, see [`InfluenceIndex.push_to_hub`].
        recipe (`str`, *optional*):
            `"paper"`: what the paper has of the settings below, `tied="input"`, `metric="gradient"` and
            `special_tokens="count"`. Another value next to it is refused. If left out, what our own experiments say.
        top_k_tokens (`int`, *optional*):
            Keep only so many rows of largest norm for each example and checkpoint (TracIn-WE-Topk; the paper has 10).
        top_k_unit (`str`): `"position"`, as the authors' code counts, or `"token"` (ours), see [`top_k_rows`].
        dtype (`str`): On disk: `"float16"`, `"float32"`, or `"int8"` with one scale per row.
        projection_width (`int`, *optional*): Store rows projected to this width. Ours.
        projection_seed (`int`): Seed of the random matrix, or of the sample.
        projection (`str`): `"random"`, by one random matrix, or `"pca"`: at each checkpoint by the principal components of the
            rows of a sample of 256 examples. Those need `record="checkpoint"`, and words alone.
        special_tokens (`str`):
            `"count"` records the rows of special tokens ([CLS], [SEP], end of text) like any other, and a search
            reports their share of each score; `"drop"` leaves them out before top-k is taken.
        tied (`str`):
            Which use of an embedding matrix that is tied to the output layer counts: `"input"`, as in the paper, `"output"`,
            `"full"`, their sum, or `"own"`: of the sum the rows of the tokens that the example itself holds. With
            `"output"` and `"full"` an example has a row for every token of the vocabulary, with `"own"` as few as with
            `"input"`: equation and cost are in [`EmbeddingGradientRecorder`]. Other than `"input"` it needs
            `record="checkpoint"`. `"auto"` is `"own"` where the output layer is tied, and `"input"` elsewhere, online
            and with top-k by position; config.json says which. An index that is continued keeps what it has.
        loss_reduction (`str`): `"sum"` or `"mean"` of an example's token losses.
        loss_fn (`Callable`, *optional*): `loss_fn(outputs, batch) -> (batch_size,)` instead of the model's own loss.
        metric (`str`):
            Which inner product of gradients is influence: `"gradient"`, the plain one of the paper; `"optimizer"`, the one
            that Adam steps in, `<g, g'> / (sqrt(v) + eps)`, not in the paper; or `"auto"`: that one if the optimizer has second
            moments of the embeddings at the first checkpoint, else the plain one, with a warning unless it is SGD. What was
            done is in the index's card. (`second_moment=True` is the older name of `"optimizer"`.)
        layers (`str` or `Sequence[str]`, *optional*):
            Of which parameters gradients are recorded, and counted; nothing else is. `"auto"`, if left out: of words and of the
            last linear layer of a classifier, see [`default_layers`], and of words alone of other models, online, in the metric
            of the optimizer and with `projection="pca"`; an index that is continued keeps what it has. `"embedding"`: of words,
            as in the paper. `"adapters"`: of the matrices A and B of LoRA adapters. Else of linear layers, by name, its end
            (`"o_proj"`) or a pattern, see [`choose_layers`]. They are rows of the same index, with the same search, and with the
            learning rate of the embeddings' parameter group (the first one, where they are frozen). Ours.
        projection_dim (`int`, *optional*):
            Project each of these gradients at random to at most so many numbers on each side. If left out, as many as make one
            row, the room of one more word; adapters are kept whole. Only whole ones have the metric of the optimizer.
        record (`str`):
            `"checkpoint"`: all examples at the same weights, by an extra pass over the dataset. `"online"`: each at the
            step that used it, in the training backward itself, at no extra pass; see [`OnlineRecording`].
        max_segment_bytes (`int`): Bound of the rows held in memory, as float32, before they are written.

    Raises:
        ValueError: an argument is out of range. At train begin, where the training cannot be recorded: see the message.
        ProcessFailedError: at train begin or a save, if another process failed or was killed.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        dataset: Any | None = None,
        collator: Callable | None = None,
        record_steps: int | Sequence[int] | None = None,
        save_weights: bool | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        hub_index_id: str | None = None,
        redact_text: bool = False,
        **settings: Unpack[RecordingOptions],
    ) -> None:
        self.output_dir = Path(check_path("output_dir", output_dir))
        self.dataset = dataset
        self.collator = check_function("collator", collator, optional=True)
        self.record_steps = _checked_steps(record_steps)
        self.settings = RecordingSettings(**settings)
        if collator is not None and self.settings.record == "online":
            raise ValueError(
                "`record='online'` records the batches of the training, but got another `collator`. Leave it out, or use"
                " `record='checkpoint'`."
            )
        self.save_weights = check_flag("save_weights", save_weights, optional=True)
        self.batch_size = check_count("batch_size", batch_size, optional=True)
        self.seed = check_seed("seed", seed)
        if check_flag("redact_text", redact_text) and hub_index_id is None:
            raise ValueError("`redact_text` is about what is pushed, but `hub_index_id` is None. Name a repository.")
        self.hub_index_id = check_repo_id("hub_index_id", hub_index_id, optional=True)
        self.redact_text = redact_text
        self._push: BackgroundPush | None = None
        self._recording: Recording | None = None
        # Step and epoch of a training that had ended when it was resumed.
        self._end: tuple[int, float | None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what can be checked, and finish what an interruption left."""
        self._require_recordable(args, state)
        self._prepare_push(args)
        if self._recording is not None:
            self._recording.stop()  # a training that failed has not ended
        self._learning_rate: float | None = None
        self._recorded_step = self._awaited_step = -1
        self._num_recorded = 0
        self._started = False
        self._own_weights = args.save_total_limit is not None if self.save_weights is None else self.save_weights
        if args.save_total_limit is not None and not self._own_weights and self.record_steps is None:
            warnings.warn(
                f"With `save_total_limit={args.save_total_limit}` the Trainer deletes checkpoints that a search needs."
                " Leave `save_weights` out, so that their weights are kept with the index.",
                stacklevel=2,
            )
        model, dataloader = kwargs["model"], kwargs["train_dataloader"]
        warn_if_unsearchable(model)
        self._recording = self._make_recording(args, dataloader, kwargs["processing_class"], kwargs["optimizer"])
        try:
            self._recording.start(model=model, train_dataloader=dataloader, args=args, state=state)
        except BaseException:
            self._recording.stop()
            raise
        if state.global_step > 0 and self._is_due(state.global_step) and self.settings.record == "checkpoint":
            facts = {**self._facts(state), "path": self._keep_weights(args, state, replace=False, **kwargs)}
            self._recording.finish_interrupted(facts, model=model, state=state)
            if self._push is not None:
                self._push.request()
        self._end = None
        if state.global_step >= state.max_steps:
            logger.info("The training ended at step %d: there is nothing left to train or record.", state.global_step)
            self._recording.stop()
            self._end = state.global_step, state.epoch
            control.should_training_stop = True  # after the Trainer's further step, or the first part of it

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record now what was left to a save that never came."""
        if self._end is None and self._awaited_step == state.global_step:
            self._record(args, state, **kwargs)
        self._recording.before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate that this step is made with; after it, the scheduler sets the next one."""
        if self._end is not None:
            kwargs["model"].zero_grad()  # an optimizer leaves alone what has no gradient
            return
        matrix = kwargs["model"].get_input_embeddings().weight
        self._learning_rate = float(find_group(kwargs["optimizer"], matrix)["lr"])
        self._recording.before_optimizer_step(learning_rate=self._learning_rate, state=state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record a step that was asked for, unless the Trainer is about to save it."""
        if self._end is not None:
            control.should_save = control.should_evaluate = control.should_log = False
            return
        if not self._started:
            self._recording.after_first_step(model=kwargs["model"])
        self._started = True
        if not self._is_due(state.global_step):
            return
        asked = self.record_steps is not None
        if control.should_save or (asked and args.save_strategy in (SaveStrategy.EPOCH, SaveStrategy.BEST)):
            self._await_save(args, state)  # by epoch, or where an evaluation is the best so far, a save may be next
        elif asked:
            self._record(args, state, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As [`on_step_end`], for a Trainer that saves by epoch."""
        if self._end is not None:
            control.should_save = control.should_evaluate = control.should_log = False
        elif self._awaited_step == state.global_step and self.record_steps is not None:
            best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
            if control.should_save or (best and state.global_step < state.max_steps):
                return  # the save is next; if it does not come, the next step begins with the recording
            self._record(args, state, **kwargs)
        elif control.should_save and self._is_due(state.global_step) and self._recorded_step != state.global_step:
            self._await_save(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the checkpoint that the Trainer has just saved."""
        if self._end is None and self._is_due(state.global_step) and self._recorded_step != state.global_step:
            self._record(args, state, saved=True, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave everything as it was."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        recording.stop()
        if self._end is not None:
            state.global_step, state.epoch = self._end
        if self._push is not None:
            self._push.finish()
        if self._num_recorded == 0 and self._started:
            warnings.warn(
                f"Nothing was recorded in {str(self.output_dir)!r}: the Trainer did not save. Set `save_strategy`, or pass"
                " `record_steps`.",
                stacklevel=2,
            )

    def _make_recording(self, args: TrainingArguments, dataloader: Any, tokenizer: Any, optimizer: Any) -> Recording:
        examples = choose_examples(self.dataset, dataloader.dataset)
        if self.dataset is None and args.remove_unused_columns and not has_texts(examples.described):
            warnings.warn(
                "The index keeps no text, source or the like of its examples: the Trainer drops the columns that the model does"
                " not take before a callback sees them. Pass `dataset=`, the train dataset with its columns, to have them"
                " with the hits and for `domain_influence`.",
                stacklevel=3,
            )
        if self.settings.record == "online":
            from hf_doge.tracing.online import OnlineRecording

            return OnlineRecording(self.output_dir, dataset=examples, options=self.settings, tokenizer=tokenizer)
        return CheckpointRecording(
            self.output_dir,
            dataset=examples,
            options=self.settings,
            tokenizer=tokenizer,
            optimizer=optimizer,
            collator=self.collator,
            batch_size=self.batch_size or args.per_device_train_batch_size,
            seed=self.seed,
        )

    def _require_recordable(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_hyper_param_search:
            raise ValueError(
                "A search for hyperparameters trains many models, and an index is of one. Drop the callback."
            )
        steps = self.record_steps
        if steps is None and args.save_strategy == SaveStrategy.NO:
            raise ValueError(
                "Examples are recorded when the Trainer saves, but `save_strategy` is 'no', so nothing would be. Set it,"
                " or pass `record_steps`."
            )
        last = max(steps) if isinstance(steps, frozenset) else steps
        if last is not None and state.max_steps < last:
            raise ValueError(
                f"`record_steps` must be steps of the training, but {last} is beyond its end: it makes {state.max_steps}."
            )

    def _is_due(self, step: int) -> bool:
        if self.record_steps is None:
            return True
        return step in self.record_steps if isinstance(self.record_steps, frozenset) else step % self.record_steps == 0

    def _await_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._awaited_step = state.global_step if self.record_steps is not None else -1
        path = self._own_path(state.global_step) if self._own_weights else _checkpoint_path(args, state)
        self._recording.plan({**self._facts(state), "path": stored_path(path, self.output_dir)})

    def _record(self, args: TrainingArguments, state: TrainerState, *, saved: bool = False, **kwargs: Any) -> None:
        facts = {**self._facts(state), "path": self._keep_weights(args, state, saved=saved, **kwargs)}
        self._recording.save(facts, model=kwargs["model"])
        self._recorded_step, self._awaited_step = state.global_step, -1
        self._num_recorded += 1
        if self._push is not None:
            self._push.request()

    def _prepare_push(self, args: TrainingArguments) -> None:
        """The repository is there, and may be written: told before the training, not after it."""
        if self.hub_index_id is None:
            return
        # Only here: without `hub_index_id` no client of the Hub is needed.
        from hf_doge.tracing.publication import prepare_index_push, push_index_folder

        options = {"token": args.hub_token, "private": args.hub_private_repo}
        run_on_main_process(
            lambda heartbeat: prepare_index_push(self.hub_index_id, redact_text=self.redact_text, **options)
        )
        if process_index() > 0:
            return
        redact = ", redact_text=True" if self.redact_text else ""
        self._push = BackgroundPush(
            lambda: push_index_folder(self.output_dir, self.hub_index_id, redact_text=self.redact_text, **options),
            advice=f"Push it by `InfluenceIndex.from_pretrained({str(self.output_dir)!r}).push_to_hub("
            f"{self.hub_index_id!r}{redact})`.",
        )

    def _facts(self, state: TrainerState) -> dict[str, Any]:
        return {
            "name": f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
            "step": state.global_step,
            "epoch": None if state.epoch is None else float(state.epoch),
            "learning_rate": self._learning_rate,
        }

    def _keep_weights(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        model: nn.Module,
        processing_class: Any,
        saved: bool = True,
        replace: bool = True,
        **kwargs: Any,
    ) -> str:
        """Where the weights of this step are, as the index says it; saved there if the Trainer does not keep them."""
        checkpoint, own = _checkpoint_path(args, state), self._own_path(state.global_step)
        kept = checkpoint if saved and not self._own_weights else None
        return run_on_main_process(
            lambda heartbeat: keep_weights(
                model, own, kept=kept, index=self.output_dir, replace=replace, processing_class=processing_class
            )
        )

    def _own_path(self, step: int) -> Path:
        return self.output_dir / MODELS / f"step-{step}"


def _checkpoint_path(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _checked_steps(steps: int | Sequence[int] | None) -> int | frozenset[int] | None:
    if steps is None:
        return None
    if isinstance(steps, str | bytes) or not isinstance(steps, Iterable) or getattr(steps, "ndim", 1) == 0:
        return check_count("record_steps", steps)
    numbers = frozenset(check_count("record_steps", step) for step in steps)
    if not numbers:
        raise ValueError(
            f"`record_steps` must be a step or several, but got {show(steps)}. Leave it out to record at saves."
        )
    return numbers
