"""Training any model on data drawn by domain weights: [`DomainWeightedTrainer`] and the mixin behind it."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from datasets import Dataset
from transformers import Trainer

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.sampling.domains import DomainIndex, merge_domains
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.training.sampler_guard import SamplerGuardCallback


class DomainWeightedMixin:
    """
    Makes a `Trainer` draw its train examples by domain weights; everything else stays as it is.

    Put it before the trainer it changes: `class MySFTTrainer(DomainWeightedMixin, SFTTrainer): ...`.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`): The model to train.
        args (`TrainingArguments`): Its training arguments.
        train_dataset (`datasets.Dataset`, `datasets.DatasetDict` or `dict[str, datasets.Dataset]`):
            One dataset with a column `domain_column`, or one dataset per domain.
        domain_weights (`DomainWeights` or `dict[str, float]`): Share of the drawn examples by domain.
        domain_column (`str`): Column that names each example's domain. `remove_unused_columns`, on by default,
            keeps it from the model.
        max_epochs_per_domain (`float`, *optional*): Most times that a domain may be repeated over the whole run; what
            exceeds it goes to the other domains, and is logged.
        draw (`str`): `"quota"` (low variance) or `"iid"` (as in the paper).
        kwargs: Everything else the trainer takes.

    Raises:
        `ValueError`: if weights and data do not name the same domains, or the trainer's preprocessing (packing, say)
            dropped the domain column.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        train_dataset: Dataset | Mapping[str, Dataset],
        domain_weights: DomainWeights | Mapping[str, float],
        domain_column: str = "domain",
        max_epochs_per_domain: float | None = None,
        draw: str = "quota",
        **kwargs: Any,
    ) -> None:
        if not isinstance(train_dataset, (Dataset, Mapping)):
            raise ValueError(
                "`train_dataset` must be a `datasets.Dataset` or a dict of them, but got "
                f"{type(train_dataset).__name__}. For streaming data pass `interleave_domains(datasets, weights)` to a "
                "plain Trainer."
            )
        if getattr(args, "auto_find_batch_size", False):
            raise ValueError(
                "The order depends on the batch size, so `auto_find_batch_size` must be off. Set the size."
            )
        if getattr(args, "train_sampling_strategy", "random") != "random" or getattr(args, "group_by_length", False):
            raise ValueError("The order is drawn by the weights, so `group_by_length` and the like must be off.")
        merged, _ = merge_domains(train_dataset, domain_column)
        super().__init__(model=model, args=args, train_dataset=merged, **kwargs)
        prepared = self.train_dataset
        if domain_column not in prepared.column_names:
            raise ValueError(
                f"The train set must keep its column {domain_column!r}, but {type(self).__name__} prepared it down to "
                f"{prepared.column_names}. Packing mixes domains in one example: switch it off, or prepare the data of "
                "each domain before."
            )
        _, domains = merge_domains(prepared, domain_column)
        self.domain_sampler = self._make_sampler(domains, domain_weights, max_epochs_per_domain, draw)
        self.add_callback(SamplerGuardCallback(self.domain_sampler))

    def _make_sampler(
        self,
        domains: DomainIndex,
        domain_weights: DomainWeights | Mapping[str, float],
        max_epochs_per_domain: float | None,
        draw: str,
    ) -> DomainWeightedSampler:
        args = self.args
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        num_samples = ceil(len(self.train_dataset) / batch_size) * batch_size  # whole batches on every process
        num_epochs = args.max_steps * batch_size / num_samples if args.max_steps > 0 else args.num_train_epochs
        return DomainWeightedSampler(
            domains,
            domain_weights,
            num_samples=num_samples,
            num_epochs=num_epochs,
            seed=args.seed if args.data_seed is None else args.data_seed,
            draw=draw,
            max_epochs_per_domain=max_epochs_per_domain,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> DomainWeightedSampler:
        return self.domain_sampler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add how often each domain has been repeated to the training logs."""
        if "loss" in logs:
            logs = {**logs, **{f"domain_epochs/{name}": n for name, n in self.get_domain_epochs().items()}}
        super().log(logs, *args, **kwargs)

    def get_domain_epochs(self) -> dict[str, float]:
        """How often each domain has been gone through so far, by name."""
        args, domains = self.args, self.domain_sampler.domains
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        counts = self.domain_sampler.domain_counts(self.state.global_step * batch_size)
        return {name: counts[name] / int(size) for name, size in zip(domains.names, domains.sizes, strict=True)}


class DomainWeightedTrainer(DomainWeightedMixin, Trainer):
    """A `Trainer` that draws its train examples by domain weights; see [`DomainWeightedMixin`] for its arguments."""
