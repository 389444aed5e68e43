"""What [`~hf_doge.training.mixture.DomainWeightedMixin`] logs of its domains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.sampling.transforms import needs_domain_column
from hf_doge.training.charts import MEASURED, GroupedChartsCallback
from hf_doge.training.collator import DOMAIN_IDS
from hf_doge.training.domain_loss import are_labels_shifted
from hf_doge.training.domain_metrics import DomainMeter, read_saved
from hf_doge.training.evaluated_loss import EvaluatedLossMixin
from hf_doge.training.global_batch import draws_of_batch, examples_per_step
from hf_doge.training.loss_watch import LossWatch
from hf_doge.training.packing import PackingMixin, without_lengths

STREAM_COLUMN = "__domain__"  # of the examples of streams; a name that no data set has


class DomainMetricsMixin(PackingMixin, EvaluatedLossMixin):
    """
    Adds to each training log, of every domain:

    - `domain_loss/<name>`: the mean cross-entropy of its tokens (labels that count) since the last log. It is seen in the
      forward that trains, see [`~hf_doge.training.loss_watch.LossWatch`]; what else a training loss may hold, such as the
      auxiliary loss of a router, is not in it. Where the loss is none that can be told apart, that is said once, in words;
    - `domain_tokens/<name>`: its tokens trained on so far;
    - `domain_share/<name>`: its share of the examples since the last log, or of the tokens where weights are shares of these;
    - `domain_epochs/<name>`: how often it has been gone through so far (not of streams).

    All of them are of all processes, which talk about it only when something is logged or saved; a resumed run logs what an
    uninterrupted one logs.
    """

    domain_sampler: DomainWeightedSampler | None
    _measures_domains = True  # whether this logs losses, tokens and shares, and not a subclass
    _charts = MEASURED
    _domain_meter: DomainMeter | None = None
    _stream_column: str | None = None
    _last_batch = (-1, 0)  # optimizer step, and its micro-batches so far

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(GroupedChartsCallback(self, self._charts))

    def _measure_domains(self, names: Sequence[str], sizes: Sequence[int] | None, *, unit: str) -> None:
        if self._measures_domains:
            self._domain_meter = DomainMeter(names, self.args.device, sizes=sizes, unit=unit)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns  # which transformers declares as None
            if self._stream_column is not None:
                columns.append(self._stream_column)  # otherwise the Trainer drops it

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """As the Trainer's; rows that go through the transform of their domain keep the column that tells it."""
        if self.args.remove_unused_columns and needs_domain_column(dataset):
            self._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            if self._domain_column not in columns:
                columns.append(self._domain_column)
        return super()._remove_unused_columns(dataset, description)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; what it shows of the domains is noted."""
        meter = self._domain_meter
        if meter is None:
            return super().training_step(model, without_lengths(inputs), *args, **kwargs)
        domain_ids = self._domains_of_batch(inputs)
        inputs = self._without_domains(inputs)
        noted, inputs = dict(inputs), without_lengths(inputs)  # trainers take what they do not need out of it
        inner: Any = self.model
        watch = LossWatch(inner)
        with watch.during(model):
            loss = super().training_step(model, inputs, *args, **kwargs)
        meter.add(domain_ids, watch.seen(noted, labels_are_shifted=are_labels_shifted(self.model)), noted)
        return loss

    def _domains_of_batch(self, inputs: dict[str, Any]) -> Tensor:
        """Domain of each example of this process' micro-batch: drawn by the sampler, or told by the stream."""
        step, before = self.state.global_step, self._last_batch
        self._last_batch = (step, before[1] + 1 if step == before[0] else 1)
        if self.domain_sampler is None:
            return inputs[DOMAIN_IDS]
        draws = draws_of_batch(self.args, step, self._last_batch[1] - 1)
        return torch.from_numpy(self.domain_sampler.domain_ids(draws.start, draws.stop))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """As the Trainer's; the model does not take the domains."""
        return super().prediction_step(model, without_lengths(self._without_domains(inputs)), *args, **kwargs)

    def _without_domains(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model takes, of batches that our collator made; in others the name is somebody else's."""
        if self.domain_sampler is not None:
            return inputs
        return {name: value for name, value in inputs.items() if name != DOMAIN_IDS}

    def _load_domain_metrics(self, checkpoint: Path | None) -> None:
        """Begin as a run begins, or as it stood when the checkpoint was written."""
        self._last_batch = (-1, 0)
        if self._domain_meter is not None:
            self._domain_meter.load(read_saved(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint, what was added up goes into the Trainer's state."""
        if self._domain_meter is not None and _internal_call and output_dir is not None:
            self._domain_meter.save(self.state)
        super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what there is to tell of each domain to the training logs."""
        if "loss" in logs:
            epochs = self.get_domain_epochs()
            found = {f"domain_epochs/{name}": value for name, value in epochs.items()}
            # All processes come here only if the Trainer is about to log: then it has summed its own loss over them.
            if self._domain_meter is not None and self.control.should_log:
                found |= self._domain_meter.collect(epochs)
            logs = {**logs, **found}
        super().log(logs, *args, **kwargs)

    def get_domain_epochs(self) -> dict[str, float]:
        """How often each domain has been gone through so far, by name; empty for streams, whose length is unknown."""
        if self.domain_sampler is None:
            return {}
        domains = self.domain_sampler.domains
        counts = self.domain_sampler.domain_counts(self.state.global_step * examples_per_step(self.args))
        return {name: counts[name] / int(size) for name, size in zip(domains.names, domains.sizes, strict=True)}
