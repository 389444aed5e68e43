"""Loss, tokens, share and epochs of every domain in the logs of any Trainer: [`DomainMetricsCallback`]."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_doge.checks import check_names, check_text
from hf_doge.sampling.domains import DomainIndex
from hf_doge.training.charts import MEASURED, GroupedChartsCallback
from hf_doge.training.collator import DOMAIN_IDS, DomainLookup, SwitchedDomainCollator
from hf_doge.training.domain_loss import are_labels_shifted
from hf_doge.training.domain_metrics import DomainMeter, saved_in
from hf_doge.training.loss_watch import LossWatch
from hf_doge.training.metrics_mixin import DomainMetricsMixin
from hf_doge.training.packing import without_lengths


class DomainMetricsCallback(TrainerCallback):
    """
    Logs of each domain what [`DomainWeightedTrainer`] logs, for a trainer that draws its examples by itself:

    ```python
    trainer = Trainer(model, args, train_dataset=dataset)  # with a column "domain"
    trainer.add_callback(DomainMetricsCallback(trainer))
    ```

    Next to each training log there is one more with `domain_loss/<name>` (mean cross-entropy of the domain's tokens since the
    last log, seen in the forward that trains), `domain_tokens/<name>` and `domain_epochs/<name>` (so far), and
    `domain_share/<name>` (of the examples since the last log). They are summed over the processes only then, and go on
    after a resume (from the last log, where a callback after this one or `save_strategy="best"` asked for the checkpoint).

    A callback sees neither batches nor losses. So while training lasts, the trainer's data collator hands each example's
    domain on with the batch, as `domain_ids`, and two hooks of the model take it out again before the forward and look on at
    the loss. A loss that is computed outside of the model (`compute_loss_func`, label smoothing), in a compiled model, or by
    something else than one plain cross-entropy of torch is not seen, which is said once; tokens, share and epochs are
    logged all the same. Trainers that do not pass the batch to the model as it is (trl's DPO, KTO and the like) are refused
    at their first log.

    Args:
        trainer (`Trainer`): Before it trains; trl's SFTTrainer is one. Its data collator is replaced by one that calls it.
        domain_column (`str`): Column of its train set that names each example's domain, or a `ClassLabel`.
        domains (sequence of `str`, *optional*): The names of the domains, for a stream: what occurs in one is not known.
            Examples of other domains are not counted.

    Raises:
        `ValueError`: if the train set has no such column, is a stream and `domains` is not given, or the trainer logs its
            domains by itself.
    """

    def __init__(
        self, trainer: Trainer, *, domain_column: str = "domain", domains: Sequence[str] | None = None
    ) -> None:
        check_text("domain_column", domain_column, what="the name of a column")
        self._trainer, self._column = trainer, domain_column
        names, sizes = _find_domains(trainer, domain_column, domains)
        dataset: Any = trainer.train_dataset
        feature = (dataset.features or {}).get(domain_column)
        self._collator: SwitchedDomainCollator = SwitchedDomainCollator(
            trainer.data_collator,
            domain_column,
            DomainLookup(feature, names),
            keeps_column=not trainer.args.remove_unused_columns,
        )
        trainer.data_collator = self._collator
        trainer.add_callback(GroupedChartsCallback(trainer, MEASURED))
        trainer._set_signature_columns_if_needed()
        columns: Any = trainer._signature_columns  # which transformers declares as None
        columns.append(domain_column)  # otherwise the Trainer drops it
        self._meter = DomainMeter(names, trainer.args.device, sizes=sizes)
        self._watch: LossWatch | None = None
        self._inputs: dict[str, Any] = {}
        self._domain_ids: Tensor | None = None
        self._has_seen_a_batch = self._is_due = self._is_saving = False
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        collator: Any = trainer.data_collator
        if collator is not self._collator:
            raise ValueError(
                "The data collator must stay the one that `DomainMetricsCallback` put in place, since it hands on the domains, "
                f"but it is a {type(collator).__name__} now. Set `data_collator` before making the callback."
            )
        self._release()
        self._meter.load(saved_in(state))
        self._has_seen_a_batch = self._is_due = self._is_saving = False
        self._collator.is_on = True
        model: Any = trainer.model_wrapped
        inner: Any = trainer.model
        self._watch = LossWatch(inner)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after_forward, prepend=True, always_call=True),
        ]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_due, self._is_saving = control.should_log, control.should_save
        if self._is_saving and not self._is_due:
            self._meter.save(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # All processes come here, as they have summed the loss; somebody's own log of one process is none of these.
        if not self._is_due or "loss" not in (logs or {}):
            return
        self._is_due = False
        if not self._has_seen_a_batch:
            raise ValueError(
                f"Batches must reach the model as they are collated, but {type(self._trainer).__name__} passes them on without "
                "their domains. Train it without `DomainMetricsCallback`."
            )
        found = self._meter.collect()
        if self._is_saving:
            self._meter.save(state)
        # Not the trainer's own method, which adds what it has added to this log already.
        Trainer.log(self._trainer, found)

    def _release(self) -> None:
        """Leave model and collator as they were."""
        for handle in self._handles:
            handle.remove()
        if self._watch is not None:
            self._watch.end()
        self._handles, self._collator.is_on = [], False

    def _before_forward(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if DOMAIN_IDS not in kwargs:
            return None
        inputs = {name: value for name, value in kwargs.items() if name != DOMAIN_IDS}
        if model.training and torch.is_grad_enabled():
            assert self._watch is not None
            self._domain_ids, self._inputs = kwargs[DOMAIN_IDS], inputs
            self._watch.begin(model)
        return args, without_lengths(inputs)

    def _after_forward(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if self._domain_ids is None:
            return
        watch, domain_ids, inputs = self._watch, self._domain_ids, self._inputs
        assert watch is not None
        self._domain_ids, self._inputs = None, {}
        watch.end_of_forward(model, args, outputs)
        watch.end()
        self._has_seen_a_batch = True
        seen = watch.seen(inputs, labels_are_shifted=are_labels_shifted(self._trainer.model))
        if seen.problem is not None and _computes_outside(self._trainer):
            seen.problem = (
                "it is computed outside of the model (`compute_loss_func` or `label_smoothing_factor`), where a callback does "
                "not see it (a trainer with `DomainWeightedMixin` does)"
            )
        self._meter.add(domain_ids, seen, inputs)


def _computes_outside(trainer: Trainer) -> bool:
    return trainer.compute_loss_func is not None or trainer.label_smoother is not None


def _find_domains(
    trainer: Trainer, domain_column: str, domains: Sequence[str] | None
) -> tuple[tuple[str, ...], Sequence[int] | None]:
    """Names of the domains, and the rows of each where they are known."""
    if isinstance(trainer, DomainMetricsMixin):
        raise ValueError(
            f"{type(trainer).__name__} logs loss, tokens, share and epochs of its domains by itself. Leave "
            "`DomainMetricsCallback` out."
        )
    dataset: Any = trainer.train_dataset
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            "`train_dataset` must be a `datasets.Dataset` or `datasets.IterableDataset` with a column that tells the domain, "
            f"but is a {type(dataset).__name__}."
        )
    if dataset.column_names is not None and domain_column not in dataset.column_names:
        raise ValueError(
            f"The train set must have a column {domain_column!r} that tells the domain of each row, but its columns are "
            f"{dataset.column_names}. Set `domain_column`. If {type(trainer).__name__} packed the rows, which drops it, pack the data of each domain "
            "before (`trl.pack_dataset`), or train with `DomainWeightedMixin`, which has each domain packed by itself."
        )
    if isinstance(dataset, Dataset):
        index = DomainIndex.from_labels(dataset[domain_column], names=domains)
        return index.names, index.sizes.clip(1).tolist()
    if domains is None:
        raise ValueError(
            "`domains` must name the domains of a stream, since what occurs in it is not known before it is read, but got "
            "None. Pass their names in a list."
        )
    return check_names(domains), None
