"""
Recording in the training itself: each example at the step that used it, at no extra pass.

TracIn ideally sums over the steps `t` that used example `x` the product `learning_rate_t * <g_t(x), g_t(x')>`. Here the
training side of each product is caught in the training backward, and the query side is taken at the end of the interval
between two saves (ours; the paper takes both at the checkpoint):

    score(x, x') = sum over checkpoints c of < sum over steps t of c that used x of learning_rate_t * g_t(x), g_c(x') >

so the row stored for `(x, token)` is that inner sum, and the checkpoint's own learning rate is written as 1. A gradient
`g_t(x)` is that of `x`'s own loss with the dropout of that step: before clipping, and whatever the size of the batch, of
the accumulated step or of the loss scale. With `top_k_tokens` each step's rows are truncated before they are summed.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments

from hf_doge.artifacts.influence import IndexWriter
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.tracing.batches import SequentialBatches
from hf_doge.tracing.checkpoint_recording import require_whole_weights
from hf_doge.tracing.models import describe_dtypes, model_fingerprint, unwrap_model
from hf_doge.tracing.online_capture import CaughtRows, TrainingCapture
from hf_doge.tracing.online_identity import IdentifiedBatches
from hf_doge.tracing.online_spill import RowSpill, Segment, merged_rows, read_journal, read_segments
from hf_doge.tracing.opening import open_writer
from hf_doge.tracing.processes import require_shared_folder, run_on_all_processes, run_on_main_process
from hf_doge.tracing.recording import Recording, encoding_of
from hf_doge.tracing.settings import RecordingSettings

logger = logging.getLogger(__name__)

PARTIAL = "online.partial"

_KEPT_FACTS = ("name", "step", "epoch", "path")
_SAME_IN_JOURNALS = ("name", "step", "first_step", "num_processes")


class OnlineRecording(Recording):
    """
    What [`TracInWECallback`] does with `record="online"`.

    Memory holds the rows of one step, of all its micro-batches, and `options.max_segment_bytes` of earlier ones. Between
    saves the rows lie in `<folder>/online.partial/`, each process's own; the folder must be one that all processes
    see. A save that was interrupted is finished when training is resumed from it, on any number of processes: all of it
    or, where the rows of one process are missing, nothing. Rows of steps that a resumed training repeats are dropped,
    those already in a whole checkpoint are not taken again.

    Args:
        folder (`str` or `os.PathLike`): Of the index.
        dataset (`Dataset` or [`Examples`]): What the train DataLoader reads; further columns are kept for reading.
        options ([`RecordingSettings`]): Which rows to keep, and how.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Knows the special tokens.

    Raises:
        ValueError: if an option has no meaning online.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dataset: Any,
        options: RecordingSettings,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.folder = Path(folder)
        self.dataset = dataset
        self.options = options
        self.tokenizer = tokenizer
        self._stack = ExitStack()
        self._writer: IndexWriter | None = None
        self._started = self._saving = False

    def start(
        self, *, model: nn.Module, train_dataloader: DataLoader, args: TrainingArguments, state: TrainerState
    ) -> None:
        """
        Begin to catch rows; at the beginning of training, also of a resumed one.

        Raises:
            ValueError: if the training is one that cannot be recorded online, or the folder holds another one.
        """
        self._stack.close()  # a training that failed and begins again (`auto_find_batch_size`) has not stopped
        require_whole_weights(model, args)
        _require_supported(args)
        model = unwrap_model(model)
        batches = IdentifiedBatches(train_dataloader)
        self._require_same_examples(batches)
        self._args = args
        self._matrix = input_embedding_matrix(model)
        recorded = getattr(self.dataset, "recorded", self.dataset)
        few = SequentialBatches(recorded, _as_it_is, batch_size=1)
        run_on_main_process(lambda heartbeat: self._open_writer(model, few, heartbeat))
        require_shared_folder(self.folder)
        self._last_step = self._resume(model, state)
        vocabulary_size, width = self._matrix.shape
        self._spill = RowSpill(
            self._rank_folder(args.process_index),
            width=width,
            vocabulary_size=vocabulary_size,
            max_bytes=self.options.max_segment_bytes,
        )
        self._first_unsaved: int | None = None
        self._closed_step: int | None = None  # whose rows are on disk, all of them
        self._saving = False
        self._stack.enter_context(batches)
        self._capture = self._stack.enter_context(
            TrainingCapture(
                model,
                settings=self.options,
                tokenizer=self.tokenizer,
                half_precision=args.fp16 or args.bf16,
                check_backward=not args.gradient_checkpointing,
                loss_is_scaled=args.fp16,
            )
        )
        self._model = model
        self._started = True

    def before_optimizer_step(self, *, learning_rate: float, state: TrainerState) -> None:
        """
        Take the rows of the step that is about to be made, all its micro-batches.

        Args:
            learning_rate (`float`): With which the step is made.
            state ([`~transformers.TrainerState`]): Its `global_step` steps are done.

        Raises:
            ValueError: if the step's batches had no identity or its loss no known scale; see [`TrainingCapture`].
        """
        try:
            self._keep(self._capture.take(), learning_rate, step=state.global_step + 1)
        except ValueError:
            self._stack.close()  # the training ends here
            raise

    def _keep(self, caught: list[CaughtRows], learning_rate: float, *, step: int) -> None:
        if not caught:
            raise ValueError(
                "Each training batch must reach the model's forward with all its keys, but none of this step did. A "
                "`compute_loss` that picks or renames inputs cannot be recorded online: use `record='checkpoint'`."
            )
        if step <= self._last_step or (self._args.fp16 and not self._has_finite_gradients()):
            return  # in a whole checkpoint already; or a step that the loss scaler will skip, which moves nothing
        self._closed_step = None
        for rows in caught:
            self._spill.add(rows.examples, rows.tokens, rows.rows, factors=learning_rate * rows.factors)
        if self._first_unsaved is None:
            self._first_unsaved = step

    def before_step(self) -> None:
        """Nothing: hooks of the model see its forward."""

    def after_first_step(self, *, model: nn.Module) -> None:
        """Nothing: what is caught shows whether it can be recorded."""

    def finish_interrupted(self, facts: Mapping[str, Any], *, model: nn.Module, state: TrainerState) -> None:
        """Nothing: [`start`] has done it."""

    def plan(self, facts: Mapping[str, Any]) -> None:
        """
        Write down all rows before the Trainer saves, with what [`save`] is about to be called with; called by all processes.

        Whatever is interrupted from here on: a training that is resumed from that save has its rows.
        """
        if facts["step"] > self._last_step:
            self._close({key: facts[key] for key in _KEPT_FACTS})

    def save(self, facts: Mapping[str, Any], *, model: nn.Module) -> None:
        """
        Make the rows of all steps since the previous save one checkpoint; called by all processes.

        Args:
            facts (`Mapping`): Name, step, epoch and path of the checkpoint. (Its rows have the learning rate of each step.)
            model (`nn.Module`): With the weights that were saved.
        """
        if facts["step"] <= self._last_step:
            return
        facts = {key: facts[key] for key in _KEPT_FACTS}
        self._saving = True
        self._close(facts)

        def write(heartbeat: Callable[[], None]) -> None:
            others = self._segments(first_process=1, num_processes=self._args.world_size)
            self._write_checkpoint(unwrap_model(model), facts, [*self._spill.read(), *others], heartbeat)

        run_on_main_process(write)
        self._spill.discard()
        self._saving = False
        self._last_step = facts["step"]
        self._first_unsaved = None

    def _close(self, facts: dict[str, Any]) -> None:
        """Bring the rows of all processes to disk, with journals that say that they are whole."""
        if self._closed_step == facts["step"]:
            return
        journal = {**facts, "first_step": self._last_step + 1, "num_processes": self._args.world_size}
        try:
            run_on_all_processes(lambda heartbeat: self._spill.close(journal))
        except ValueError:
            self._stack.close()
            raise
        self._closed_step = facts["step"]

    def stop(self) -> None:
        """Leave the model and the DataLoader as they were. Rows of steps after the last save are dropped, with a warning."""
        self._stack.close()
        if self._writer is not None:
            self._writer.close()
        if not self._started:
            return
        self._started = False
        if self._saving:
            return  # the save failed: its rows wait on disk for the training to be resumed
        if self._first_unsaved is not None:
            warnings.warn(
                f"The steps from {self._first_unsaved} on were trained after the last save, so no checkpoint has their "
                "rows and no search will see them. Let the Trainer save at the end of training.",
                stacklevel=2,
            )
        self._spill.discard()
        if self._args.process_index == 0:
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)

    def _open_writer(self, model: nn.Module, few: SequentialBatches, heartbeat: Callable[[], None]) -> None:
        self._writer = open_writer(
            self.folder,
            model=model,
            dataset=self.dataset,
            tokenizer=self.tokenizer,
            settings=self.options,
            metadata=lambda: encoding_of(few, self.tokenizer, self._args, known={"inputs": None}),
            heartbeat=heartbeat,
        )

    def _require_same_examples(self, batches: IdentifiedBatches) -> None:
        """The ids are positions in what the DataLoader reads, so the dataset of the index must be the same there."""
        recorded: Any = getattr(self.dataset, "recorded", self.dataset)
        trained = batches.dataset
        same = len(recorded) == len(trained)
        if same and recorded is not trained:
            positions = sorted({0, len(trained) // 2, len(trained) - 1} & set(range(len(trained))))
            same = all(_tokens(recorded[i]) == _tokens(trained[i]) for i in positions)
        if not same:
            raise ValueError(
                "`record='online'` records the examples that are trained on, but the dataset to record has "
                f"{len(recorded)} and the train DataLoader reads {len(trained)} others. Leave `dataset` out."
            )

    def _resume(self, model: nn.Module, state: TrainerState) -> int:
        """The step up to which whole checkpoints have all rows; what is left of later steps is finished or dropped."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        last_step = max((checkpoint["step"] for checkpoint in config["checkpoints"]), default=0)
        if last_step > 0 and state.global_step == 0:
            raise ValueError(
                f"{str(self.folder)!r} has recorded a training up to step {last_step}, but this one begins at step 0. "
                "Resume that training, or record this one in another folder."
            )
        found = run_on_main_process(lambda heartbeat: self._read_journals())
        asked = {"first_step": last_step + 1, "step": state.global_step}
        if state.global_step > last_step and found is not None and asked.items() <= found.items():
            facts = {key: found[key] for key in _KEPT_FACTS}
            run_on_main_process(
                lambda heartbeat: self._write_checkpoint(
                    model, facts, self._segments(num_processes=found["num_processes"]), heartbeat
                )
            )
            last_step = state.global_step
        elif state.global_step > last_step:
            warnings.warn(
                f"The steps from {last_step + 1} to {state.global_step} were trained without their rows being kept, so "
                f"no search will see them. To have them, resume from the checkpoint of step {last_step} or earlier.",
                stacklevel=4,
            )
            last_step = state.global_step
        elif state.global_step < last_step:
            logger.info("Steps up to %d are in the index already and are not recorded again.", last_step)
        run_on_main_process(lambda heartbeat: shutil.rmtree(self.folder / PARTIAL, ignore_errors=True))
        return last_step

    def _read_journals(self) -> dict[str, Any] | None:
        """What the processes of an interrupted save, as many as there were, agree on; None if a part is missing."""
        first = read_journal(self._rank_folder(0))
        journals = [read_journal(self._rank_folder(rank)) for rank in range((first or {}).get("num_processes", 0))]
        facts = [journal and [journal[key] for key in _SAME_IN_JOURNALS] for journal in journals]
        return first if facts and all(own == facts[0] for own in facts) else None

    def _segments(self, *, first_process: int = 0, num_processes: int) -> list[Segment]:
        """What processes left on disk."""
        ranks = range(first_process, num_processes)
        return [segment for rank in ranks for segment in read_segments(self._rank_folder(rank))]

    def _write_checkpoint(
        self, model: nn.Module, facts: dict[str, Any], segments: list[Segment], heartbeat: Callable[[], None]
    ) -> None:
        self._writer.require_embeddings(input_embedding_matrix(model), type(model).__name__)
        vocabulary_size, width = self._matrix.shape
        checkpoint = self._writer.checkpoint(
            facts["name"],
            step=facts["step"],
            epoch=facts["epoch"],
            path=facts["path"],
            learning_rate=1.0,
            model_class=type(model).__name__,
            fingerprint=model_fingerprint(model),
            dtypes=describe_dtypes(model),
        )
        with checkpoint as writer:
            blocks = merged_rows(
                segments,
                num_examples=self._writer.config["num_examples"],
                vocabulary_size=vocabulary_size,
                width=width,
                max_bytes=self.options.max_segment_bytes,
                first_example=writer.num_done,
                virtual=not self._matrix.requires_grad,
            )
            for token_rows in blocks:
                writer.add(token_rows)
                heartbeat()
            self._writer.publish(writer)

    def _rank_folder(self, rank: int) -> Path:
        return self.folder / PARTIAL / f"process-{rank:05d}"

    def _has_finite_gradients(self) -> bool:
        """Whether the scaler of fp16 will make the step."""
        grads = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        return all(bool(grad.isfinite().all()) for grad in grads)


def _require_supported(args: TrainingArguments) -> None:
    problems = {
        "packed sequences (`packing`)": getattr(args, "packing", False),
        "padding-free batches (`padding_free`)": getattr(args, "padding_free", False),
        "`torch_compile`": args.torch_compile,
        "DeepSpeed": args.deepspeed,
        "DataParallel over several GPUs in one process": args.n_gpu > 1,
        "parallelism inside an example (`parallelism_config`)": getattr(args, "parallelism_config", None),
        "label smoothing": args.label_smoothing_factor,
        "domain weights that change while they are learned (`DoGEConfig`)": hasattr(args, "reweight_steps"),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise ValueError(
            f"`record='online'` does not know which gradient is whose with {' and '.join(found)}. Turn it off, or use "
            "`record='checkpoint'`."
        )


def _tokens(example: Any) -> list | None:
    tokens: Any = example.get("input_ids") if isinstance(example, Mapping) else None
    return tokens.tolist() if hasattr(tokens, "tolist") else tokens


def _as_it_is(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """One example without its collator, which sees what is trained on and nothing else; what it adds is not known."""
    if not isinstance(items[0], Mapping):  # only its collator knows how to read it
        return {}
    names = [name for name in ("input_ids", "labels", "attention_mask") if items[0].get(name) is not None]
    return {name: torch.as_tensor(items[0][name])[None] for name in names}
