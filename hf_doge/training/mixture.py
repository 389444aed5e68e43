"""Training any model on data drawn by domain weights: [`DomainWeightedTrainer`] and the mixin behind it."""

import json
from collections.abc import Mapping
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.checks import check_choice, check_number, check_text
from hf_doge.sampling.collation import SeededCollator
from hf_doge.sampling.domains import StreamDomains, merge_domains
from hf_doge.sampling.phases import read_phases
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.sampling.schedule import DRAW_MODES, UNITS
from hf_doge.sampling.streaming import holds_streams, interleave_domains
from hf_doge.sampling.transforms import needs_domain_column
from hf_doge.sampling.weights import to_shares
from hf_doge.training.as_made import AsMade
from hf_doge.training.checkpoints import TRAINER_STATE_FILE, read_step, resolve_checkpoint
from hf_doge.training.collator import ColumnCollator, DomainCollator, DomainLookup
from hf_doge.training.global_batch import describe_reading, examples_per_step
from hf_doge.training.metrics_mixin import STREAM_COLUMN, DomainMetricsMixin
from hf_doge.training.mixture_checks import (
    keeps_column,
    refuse_arguments,
    refuse_endless,
    refuse_lost_column,
    refuse_lost_order,
    refuse_untaken_rows,
    warn_of_reading_everything,
)
from hf_doge.training.mixture_state import (
    READING_FILE,
    SAMPLER_FILE,
    describe_phases,
    describe_streams,
    load_sampler,
    phases_by_draw,
    refuse_other_reading,
    save_sampler,
)
from hf_doge.training.packing import with_lengths
from hf_doge.training.provenance import describe_domains
from hf_doge.training.run_identity import RUN_FILE, describe_identity, refuse_other_run
from hf_doge.training.sampler_guard import SamplerGuardCallback, StreamGuardCallback
from hf_doge.training.units import read_lengths, warn_of_other_unit

_ENDLESS = 2**62  # examples of a stream that the training ends, not the data


class DomainWeightedMixin(DomainMetricsMixin):
    """
    Makes a `Trainer` draw its train examples by domain weights; everything else stays as it is.

    Put it before the trainer it changes: `class MySFTTrainer(DomainWeightedMixin, SFTTrainer): ...`. Where that trainer packs
    (`packing=True`), each domain is packed by itself: an example is then a packed row.

    On several processes (`accelerate launch`, `torchrun`), all together train on exactly the rows that one process
    would train on with the same global batch, in the same order, whatever `even_batches`, `split_batches`,
    `dispatch_batches` and the workers are: an epoch is the number of rows, rounded up to whole optimizer steps. A
    checkpoint can be resumed on another number of processes, or with other accumulation, as long as the examples of an
    optimizer step stay the same number. Weights that differ between processes are refused at train begin.

    What the data collator draws (masks, say) is a function of the seed and the batch, see [`SeededCollator`], so that a
    resumed run draws what the uninterrupted one draws.

    The logs tell loss, tokens, share and epochs of each domain; see [`~hf_doge.training.metrics_mixin.DomainMetricsMixin`].

    A dict of streams (`IterableDataset`) is mixed by [`interleave_domains`], which tells how processes and workers
    share a stream. The mixture has no end, so set `max_steps`. Resuming is exact, but by the Trainer's way: what was
    trained on is read again and thrown away. How often streams were repeated is not known.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`): The model to train.
        args (`TrainingArguments`): Its training arguments.
        train_dataset (`datasets.Dataset`, or mapping of `str` to `datasets.Dataset` or `datasets.IterableDataset`):
            One dataset with a column `domain_column`, one dataset per domain, or one stream per domain. The splits of a
            `DatasetDict` are no domains.
        domain_weights (`DomainWeights`, `dict[str, float]`, or list of `(fraction, weights)`): Share of what is drawn by domain; or
            phases, such as `[(0, weights), (0.8, other_weights)]`, where the other weights hold from the first step on that has
            80 % of all steps before it.
        domain_column (`str`): Column that names each example's domain. It reaches neither collator
            nor model, unless the dataset came with it and `remove_unused_columns` is off. Not used for streams.
        max_epochs_per_domain (`float`, *optional*): Most times that a domain may be repeated over the whole run; what
            exceeds it goes to the other domains, and is logged. Not for streams.
        draw (`str`): `"quota"` (low variance) or `"iid"` (as in the paper).
        unit (`str`): What weights are shares of: `"examples"`, or `"tokens"` that are trained on, for which rows must be tokenised.
        kwargs: Everything else the trainer takes.

    Attributes:
        domain_sampler ([`DomainWeightedSampler`] or `None`): What the rows are drawn by; `None` for streams.

    Raises:
        `ValueError`: if weights and data do not name the same domains, the trainer's preprocessing
            dropped the domain column, the trainer draws in an order of its own (trl's GRPO and RLOO: groups of one
            prompt), or a run is resumed with another stream or batch than it was saved with.
    """

    _labels_streams = False  # whether the examples of streams get the domain column
    _learns_weights = False  # whether a checkpoint holds what a learner of weights needs

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        train_dataset: Dataset | Mapping[str, Dataset] | Mapping[str, IterableDataset],
        domain_weights: DomainWeights | Mapping[str, float] | list[tuple[float, Any]],
        domain_column: str = "domain",
        max_epochs_per_domain: float | None = None,
        draw: str = "quota",
        unit: str = "examples",
        **kwargs: Any,
    ) -> None:
        if not isinstance(train_dataset, (Dataset, Mapping)):
            raise ValueError(
                "`train_dataset` must be a `datasets.Dataset` or a dict of datasets or streams, but got "
                f"{type(train_dataset).__name__}, whose domains cannot be drawn from one by one. Pass a dict with one "
                "stream per domain, or pass `interleave_domains(datasets, weights)` to a plain Trainer."
            )
        check_text("domain_column", domain_column, what="the name of a column")
        check_choice("draw", draw, DRAW_MODES)
        check_choice("unit", unit, UNITS)
        read_phases(domain_weights)  # refuses here what is none
        check_number("max_epochs_per_domain", max_epochs_per_domain, above=0, finite=False, optional=True)
        refuse_arguments(args)
        self.domain_sampler, self._domain_column = None, domain_column
        self._identity, self._resumed_step, self._hides_column, self._seeded_collators = None, 0, False, []
        if holds_streams(train_dataset):
            if max_epochs_per_domain is not None:
                raise ValueError(
                    "The length of a stream is not known, so `max_epochs_per_domain` must be unset for streams, but "
                    f"got {max_epochs_per_domain}. Lower the weights of the small domains instead."
                )
            refuse_endless(args)
            self._stream_column = domain_column if self._labels_streams else STREAM_COLUMN
            mixed, settings = self._mix_streams(train_dataset, domain_weights, args, draw=draw, unit=unit)
            super().__init__(model=model, args=args, train_dataset=mixed, **kwargs)
            self._follow_streams(settings)
            warn_of_reading_everything(self.args, mixed)
            self._stream_settings, seed = settings, settings["seed"]
            self._described_streams = describe_streams(train_dataset)
            guard = StreamGuardCallback({k: v for k, v in settings.items() if k != "weights"}, settings["weights"])
            fixed = ("max_steps",) if "phases" in settings else ()
        else:
            merged, domains = merge_domains(train_dataset, domain_column)
            super().__init__(model=model, args=args, train_dataset=merged, **kwargs)
            refuse_lost_column(self, domain_column)
            refuse_lost_order(self, super()._get_train_sampler)
            is_ours = isinstance(train_dataset, Mapping) or kwargs.get("data_collator") is None
            removes = self.args.remove_unused_columns
            self._hides_column = needs_domain_column(self.train_dataset) if removes else is_ours
            if self.train_dataset is not merged:  # the trainer has prepared another
                _, domains = merge_domains(self.train_dataset, domain_column)
            self._drawn = {
                "domains": domains,
                "weights": domain_weights,
                "draw": draw,
                "max_epochs_per_domain": max_epochs_per_domain,
                "unit": unit,
                "lengths": read_lengths(self, unit),
            }
            warn_of_other_unit(self, domain_weights, domains, unit)
            self._draws = self._read_draws()
            self.domain_sampler = DomainWeightedSampler(**self._drawn, **self._draws)
            seed, guard = self.domain_sampler.seed, SamplerGuardCallback(self.domain_sampler)
            self._measure_domains(domains.names, domains.sizes, unit=unit)
            fixed = ()
        self._seed_collator(seed)
        self.add_callback(guard)
        given = {"unit": unit, "draw": draw, "max_epochs_per_domain": max_epochs_per_domain}
        self._as_made = AsMade(
            self, fixed, {**given, "domain_weights": domain_weights, "domain_column": domain_column}
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(DomainWeightedMixin):
            base = next(base.__name__ for base in cls.__bases__ if issubclass(base, Trainer))
            raise TypeError(
                f"The mixin must come before the trainer it changes, but {cls.__name__} names {base} first. Write `class "
                f"{cls.__name__}({next(b.__name__ for b in cls.__bases__ if issubclass(b, DomainWeightedMixin))}, {base})`."
            )

    def _mix_streams(
        self, streams: Mapping[str, IterableDataset], domain_weights: Any, args: Any, *, draw: str, unit: str
    ) -> tuple[IterableDataset, dict[str, Any]]:
        """The mixture, and what decides which examples it yields."""
        names, seed = list(streams), args.seed if args.data_seed is None else args.data_seed
        weights, num_planned = phases_by_draw(domain_weights, args)
        mixed = interleave_domains(
            streams,
            weights,
            unit=unit,
            num_planned=num_planned,
            seed=seed,
            draw=draw,
            num_samples=_ENDLESS,
            domain_column=self._stream_column,
        )
        first = to_shares(read_phases(domain_weights)[0][1], names).tolist()
        settings = {"seed": seed, "draw": draw, "domains": names, "weights": dict(zip(names, first, strict=True))}
        if num_planned is not None:
            settings |= {"phases": describe_phases(domain_weights, tuple(names)), "num_planned": num_planned}
        return mixed, settings | ({"unit": unit} if unit == "tokens" else {})

    def _follow_streams(self, settings: dict[str, Any]) -> None:
        """Let the examples of streams tell their domains, where the trainer lets them."""
        assert self._stream_column is not None
        if self._labels_streams:
            refuse_lost_column(self, self._stream_column)
        elif keeps_column(self, self._stream_column):
            lookup = DomainLookup(None, tuple(settings["domains"]))
            collator = with_lengths(self.data_collator)
            self.data_collator = DomainCollator(collator, self._stream_column, lookup, seed=settings["seed"])
            self._seeded_collators.append(self.data_collator)
            self._measure_domains(settings["domains"], None, unit=settings.get("unit", "examples"))

    def _read_draws(self) -> dict[str, Any]:
        """What the arguments say of the sampler."""
        args = self.args
        step_size = examples_per_step(args)
        num_samples = ceil(len(self.train_dataset) / step_size) * step_size  # whole batches on every process
        return {
            "num_samples": num_samples,
            "num_epochs": args.max_steps * step_size / num_samples if args.max_steps > 0 else args.num_train_epochs,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "step_size": step_size,
        }

    def _read_arguments(self) -> None:
        """Follow what was set in the arguments since they were last read: at train begin, and in each trial of a search."""
        args = self.args
        refuse_arguments(args)
        self._as_made.refuse_changes(self)
        if self.domain_sampler is None:
            refuse_endless(args)
            seed, mixed = args.seed if args.data_seed is None else args.data_seed, self._stream_settings["seed"]
            if seed != mixed:
                raise ValueError(
                    f"The seed of a mixture of streams must stay what the trainer was made with, {mixed}, but is {seed} now. "
                    "Make another trainer, or set `data_seed`, which the streams follow, from the start."
                )
            self._seed_collator(seed)
            return
        draws = self._read_draws()
        self._seed_collator(draws["seed"])
        names = ["num_samples", "seed", *(["num_epochs", "step_size"] if self._has_plan else [])]
        has_other_rows = self.train_dataset is not self._as_made.train_dataset
        if has_other_rows:
            self.__dict__.pop("described_domains", None)
            self._drawn["lengths"] = read_lengths(self, self._drawn["unit"])
        if has_other_rows or any(draws[name] != self._draws[name] for name in names):
            self._draws = draws
            self.domain_sampler.__init__(**self._drawn, **draws)  # the same object, which others may hold

    def _seed_collator(self, seed: int) -> None:
        """Seed what the data collator draws, also where another one was set after the trainer was made."""
        if not any(self.data_collator is one for one in self._seeded_collators):
            if self._hides_column:
                self.data_collator = ColumnCollator(self.data_collator, self._domain_column)
            self.data_collator = SeededCollator(with_lengths(self.data_collator), seed=seed)
            self._seeded_collators.append(self.data_collator)
        for collator in self._seeded_collators:
            collator.seed = seed

    @property
    def _has_plan(self) -> bool:
        """Whether what is drawn depends on how long the training is."""
        drawn = self._drawn
        return drawn["max_epochs_per_domain"] is not None or len(read_phases(drawn["weights"])) > 1

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self._read_arguments()
        # transformers 5.0 makes the model of a trial after this: then what a checkpoint says of it is described with that.
        self._identity = None if self.model is None else self._describe_identity()

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`."""
        # transformers 5.0 takes the size of the checkpoint, which on another number of processes is another batch
        self._train_batch_size = self.args.train_batch_size
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> DomainWeightedSampler:
        return self.domain_sampler

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As `Trainer.train`, but a resumed run is the run that wrote the checkpoint: it goes on under its weights, also those
        set on the way; one of another run is refused, see [`~hf_doge.training.run_identity.describe_identity`]; and one that
        has made its last step makes none, where the Trainer makes one more. `True` takes the last whole checkpoint.
        """
        self._read_arguments()
        refuse_untaken_rows(self, self.train_dataset, "Train rows")
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir, learns=self._learns_weights)
        # In a trial of a search there is no model until the Trainer has made one, and then `_hp_search_setup` describes it.
        self._identity = None if self.model is None else self._describe_identity()
        self._resumed_step = read_step(checkpoint)
        if checkpoint is not None:
            if self._identity is not None:
                refuse_other_run(checkpoint, self._identity)
            if self._resumed_step > self._get_max_steps():
                raise ValueError(
                    f"A run must be resumed before its end, step {self._get_max_steps()}, but {checkpoint} is of step "
                    f"{self._resumed_step}. Name an earlier checkpoint, or raise the number of steps."
                )
        self._take_up(checkpoint)
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _take_up(self, checkpoint: Path | None) -> None:
        """Be where a run begins, or where it stood when a checkpoint was written."""
        self._load_domain_metrics(checkpoint)
        # Without a file of ours, it is a plain Trainer's checkpoint.
        if checkpoint is not None and self.domain_sampler is not None and (checkpoint / SAMPLER_FILE).exists():
            load_sampler(checkpoint, self.domain_sampler, self.args, learns=self._learns_weights)
        elif checkpoint is not None and self.domain_sampler is None and (checkpoint / READING_FILE).exists():
            refuse_other_reading(checkpoint, self._describe_reading())

    def _get_max_steps(self) -> int:
        """Of the whole run, as the Trainer counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return ceil(self.args.num_train_epochs * (self.domain_sampler.num_samples // examples_per_step(self.args)))

    def _describe_identity(self) -> dict[str, Any]:
        sampler = self.domain_sampler
        has_planned_draws = sampler is not None and self._has_plan
        identity = describe_identity(self, max_steps=self._get_max_steps(), has_planned_draws=has_planned_draws)
        if sampler is None:
            settings = {name: value for name, value in self._stream_settings.items() if name != "seed"}
            return {**identity, **settings, "streams": self._described_streams}
        described, phases = self.described_domains, describe_phases(self._drawn["weights"], sampler.domains.names)
        return {
            **identity,
            "unit": sampler.unit,
            "phases": phases,
            "domains": list(described),
            "draw": sampler.draw,
            "max_epochs_per_domain": sampler.max_epochs_per_domain,
            "weights": sampler.state_dict()["schedule"][0]["weights"],
            **{kind: {name: facts[kind] for name, facts in described.items()} for kind in ("num_rows", "num_tokens")},
            "data": {name: facts["fingerprint"] for name, facts in described.items()},
        }

    @cached_property
    def described_domains(self) -> dict[str, dict[str, Any]]:
        """Rows, tokens and a fingerprint of the content of each domain of the train set, as far as they are known."""
        if self.domain_sampler is None:
            domains = StreamDomains(tuple(self._stream_settings["domains"]))
        else:
            domains = self.domain_sampler.domains
        return describe_domains(self.train_dataset, domains, domain_column=self._domain_column)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple:
        """As the Trainer's; a run that has made its last step has no epoch left."""
        num_epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        if self._resumed_step >= max_steps:
            num_epochs = self._resumed_step // steps_per_epoch
        return num_epochs, steps_per_epoch, *others, max_steps

    def _save_rng_state(self, output_dir: str) -> None:
        """All processes have written theirs before the main one calls the checkpoint whole, and deletes older ones."""
        super()._save_rng_state(output_dir)
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint, also what the stream of examples depends on."""
        is_checkpoint = _internal_call and output_dir is not None  # `push_to_hub` names no folder
        if is_checkpoint and self.args.should_save:
            # Of an older checkpoint that lies there: half written over, it must not count as whole.
            (Path(output_dir) / TRAINER_STATE_FILE).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)
        if not is_checkpoint or not self.args.should_save:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # where FSDP saves shards, the model comes later
        (folder / RUN_FILE).write_text(
            json.dumps(self._identity or self._describe_identity(), indent=2, sort_keys=True)
        )
        if self.domain_sampler is None:
            (folder / READING_FILE).write_text(json.dumps(self._describe_reading(), indent=2))
            return
        save_sampler(folder, self.domain_sampler, self.args, step=self.state.global_step)

    def _describe_reading(self) -> dict[str, Any]:
        return {**self._stream_settings, **describe_reading(self.args, self.train_dataset.num_shards)}


class DomainWeightedTrainer(DomainWeightedMixin, Trainer):
    """A `Trainer` that draws its train examples by domain weights; see [`DomainWeightedMixin`] for its arguments."""
