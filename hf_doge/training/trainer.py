"""Learning domain weights: [`DoGETrainer`], and the mixin behind it."""

import time
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer

from hf_doge.artifacts.domain_weights import DOMAIN_WEIGHTS_FOLDER, DomainWeights
from hf_doge.sampling.domains import DomainIndex, StreamDomains, merge_domains
from hf_doge.sampling.streaming import holds_streams
from hf_doge.training.as_made import AsMade
from hf_doge.training.collator import DOMAIN_IDS, DomainCollator, DomainLookup
from hf_doge.training.config import DoGEConfig
from hf_doge.training.domain_batches import DomainBatches, TargetBatches
from hf_doge.training.global_batch import examples_per_step, loader_lead
from hf_doge.training.hub import link_weights, weights_repository
from hf_doge.training.learner import DomainLearner
from hf_doge.training.lost_process import explaining_lost_process
from hf_doge.training.mixture import DomainWeightedMixin
from hf_doge.training.mixture_checks import refuse_untaken_rows
from hf_doge.training.preemption import PreemptionCallback
from hf_doge.training.score_noise import AdviceCallback, UndecidedCallback
from hf_doge.training.setup import (
    refuse_unsupported,
    refuse_unsupported_arguments,
    refuse_unsupported_engine,
    weights_in_order,
)


class DoGEMixin(DomainWeightedMixin):
    """
    Makes a `Trainer` learn domain weights while it trains, by DoGE (https://huggingface.co/papers/2310.15393,
    Algorithms 1 and 2). Put it before the trainer it changes, and `DoGEConfig` before its arguments:

    ```python
    class DoGESFTTrainer(DoGEMixin, SFTTrainer): ...
    @dataclass
    class DoGESFTConfig(DoGEConfig, SFTConfig): ...
    ```

    `args.mode="proxy"`, the paper's: every optimizer step draws the same number of examples from every domain, compares
    each domain's gradient `g_j` with the target's, updates the weights by `alpha_j *= exp(lr * <g_j, G> / mu)` (or by the recipe of
    [`DoGEConfig`]), and steps the model with `sum_j alpha_j g_j`, the new weights. `g_j` is the gradient of the domain's mean loss over its own tokens
    of the whole step, over all micro-batches and processes. Departures from the paper by `recipe="paper"`: none in the formulas; a domain without a token in a step keeps its share and the others step the model in
    proportion.

    `args.mode="online"`, ours, after the authors' later work (DGA, https://huggingface.co/papers/2410.02498; GRAPE): no
    proxy. The model itself is trained by ordinary steps on examples that the weights draw. Every `args.reweight_steps`
    steps the gradients of extra examples, as many of every domain, are compared with the target's and the weights are
    updated; those examples move the weights and not the model. Weights learned before step `s` draw the examples from step
    `s + args.lag_steps` on, whatever the DataLoader has taken ahead, so that the stream of examples is the same
    with any number of workers and processes, and after a resume.

    On several processes (DDP, `accelerate launch`) the weights, equal to the bit on all of them, and the steps are those
    of one process with the same global batch, up to rounding. A checkpoint resumes on another number of processes.

    The same holds for a model that FSDP2 shards, by accelerate (`fsdp=True, fsdp_config={"fsdp_version": 2, ...}` or
    `accelerate launch --use_fsdp --fsdp_version 2`) or while transformers loads it (`DistributedConfig(fsdp_size=...)`,
    which does not resume). There every domain has a forward and a backward of its own, as with
    `alignment="per_domain"`, each process keeps its part of every domain's gradient, and a process without an example of
    a domain goes along with one that counts nothing. The model's parameters must all be sharded, as far as they are
    trained. A checkpoint resumes under FSDP only.

    A dict of streams (`IterableDataset`) serves a proxy; set `max_steps`. All domains are drawn in turns by
    [`interleave_domains`], examples of a domain in the order of its stream, and a stream that ends begins anew. All of the
    above holds where the mixture is read as one: by the main process for all (the default; the batches of a step then need
    one shape, so pad to a fixed length or set `split_batches`), or by every process in full. Where processes (with
    `dispatch_batches=False`) or DataLoader workers read shards of their own, each draws the domains in turns by itself:
    the weights are still equal on all processes and resuming is exact, but a step holds other examples than on one
    process. It may then hold, for every part that is read apart, one example of a domain more or less than its share; if
    a part of a step has fewer examples than there are domains, a step may even lack a domain, which keeps its share. A
    checkpoint then resumes on the same number of processes and workers only. Resuming reads again what was trained on and
    throws it away. There is no `domain_epochs/...` in the logs, and no number of rows in the artifact.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`): The proxy model, which is discarded after: train another one with
            the learned weights. In online mode, the model to train.
        args (`DoGEConfig`): The training arguments.
        train_dataset (`datasets.Dataset`, or mapping of `str` to `datasets.Dataset` or `datasets.IterableDataset`):
            One dataset with a column `args.domain_column`, one dataset per domain, or, for a proxy, one stream per domain.
        target_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            What the weights should serve: a held-out mix, or data of a domain that is not trained on. The model is
            never trained on it. `None` means the training domains themselves (universal generalization).
        target_weights (`dict[str, float]`, *optional*): How much each target counts; all 1 by default.
        initial_weights (`DomainWeights` or `dict[str, float]`, *optional*): alpha_0; uniform by default.
        max_epochs_per_domain (`float`, *optional*): Online mode: most times that a domain may be repeated.
        kwargs: Everything else the trainer takes.

    Raises:
        `ValueError`: for combinations that would give wrong weights (FSDP1, fp16, ...) and for data, names or weights that
            do not fit together; the message says what to do.
    """

    args: DoGEConfig
    _labels_streams = True
    _learns_weights = True
    _measures_domains = False  # the learner tells of them
    _charts = ("domain_weight", "domain_loss", "domain_score", "domain_epochs")

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DoGEConfig | None = None,
        *,
        train_dataset: Dataset | Mapping[str, Dataset] | Mapping[str, IterableDataset],
        target_dataset: Dataset | Mapping[str, Dataset] | None = None,
        target_weights: Mapping[str, float] | None = None,
        initial_weights: DomainWeights | Mapping[str, float] | None = None,
        max_epochs_per_domain: float | None = None,
        **kwargs: Any,
    ) -> None:
        brings = any(kwargs.get("optimizers") or ()) or kwargs.get("optimizer_cls_and_kwargs") is not None
        refuse_unsupported(args, train_dataset, has_target=target_dataset is not None, has_optimizer=brings)
        assert args is not None
        domains: DomainIndex | StreamDomains
        if is_streamed := holds_streams(train_dataset):
            domains = StreamDomains(tuple(train_dataset))
        else:
            train_dataset, domains = merge_domains(train_dataset, args.domain_column)
        names = domains.names
        self._refuse_lost_domains(args, names, has_target=target_dataset is not None)
        self._refuse_useless_cap(args, max_epochs_per_domain, kwargs.get("unit", "examples"))
        first_weights = weights_in_order(initial_weights if args.is_online else None, names)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            domain_weights=dict(zip(names, first_weights.tolist(), strict=True)),
            domain_column=args.domain_column,
            max_epochs_per_domain=max_epochs_per_domain,
            **kwargs,
        )
        refuse_unsupported_engine(self)
        domains = domains if is_streamed else self.domain_sampler.domains  # of the train set as it was prepared
        lookup = DomainLookup(None if is_streamed else self.train_dataset.features[args.domain_column], names)
        plan = self._plan(names)
        collator = DomainCollator(self.data_collator.collator, args.domain_column, lookup, seed=plan["seed"])
        self.data_collator, self._seeded_collators = collator, [collator]
        self._alignment_batches = self._targets = None
        if args.is_online:
            self._alignment_batches = DomainBatches(self.train_dataset, domains, **{**plan, "seed": plan["seed"] + 1})
        if target_dataset is not None:
            self._targets = TargetBatches(target_dataset, target_weights, **self._plan(names, for_targets=True))
        own = {"target_dataset": target_dataset, "target_weights": target_weights, "initial_weights": initial_weights}
        self._as_made = AsMade(self, ("mode", "domain_column"), {**self._as_made.given, **own})
        self._learner = DomainLearner(
            self, domains, targets=self._targets, looks=self._alignment_batches, initial_weights=initial_weights
        )
        self._micro_batches: list[dict[str, Any]] = []
        PreemptionCallback.take_over(self)
        self.add_callback(AdviceCallback(lambda: self.domain_weights))
        self.add_callback(UndecidedCallback(lambda: self.has_settled and not args.is_online))

    @property
    def has_settled(self) -> bool:
        """Whether learning has ended by `stop_when_undecided`."""
        return self._learner.has_settled

    @property
    def domain_weights(self) -> DomainWeights:
        """What has been learned so far: mean and last weights, trajectory, recipe and provenance."""
        return self._learner.to_domain_weights()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As that of [`DomainWeightedMixin`]: a resumed run learns on from the weights that the checkpoint holds."""
        with explaining_lost_process(self):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _take_up(self, checkpoint: Path | None) -> None:
        self._learner.begin(checkpoint)
        self._micro_batches = []
        if checkpoint is None and self.domain_sampler is not None:
            self._forget_schedule()
        super()._take_up(checkpoint)

    def _describe_identity(self) -> dict[str, Any]:
        return {**super()._describe_identity(), **self._learner.identity}

    def _read_arguments(self) -> None:
        args, names = self.args, self._learner.domains.names
        if not isinstance(args, DoGEConfig):
            raise ValueError(f"`args` must be a `DoGEConfig`, but is a {type(args).__name__} now.")
        super()._read_arguments()
        args.check_arguments()
        has_target = self._targets is not None
        refuse_unsupported_arguments(args, has_target=has_target, has_optimizer=self.optimizer is not None)
        self._refuse_lost_domains(args, names, has_target=has_target)
        plan = self._plan(names)
        if args.is_online:
            self._alignment_batches.dataset = self.train_dataset
            self._alignment_batches.plan(**{**plan, "seed": plan["seed"] + 1})
        if self._targets is not None:
            refuse_untaken_rows(self, self._targets.dataset, "Target rows")
            self._targets.plan(**self._plan(names, for_targets=True))
        self._learner.read_arguments()

    def _plan(self, names: tuple[str, ...], *, for_targets: bool = False) -> dict[str, int]:
        """How many examples of every domain or target a step looks at, and by which seed."""
        args = self.args
        if args.is_online:
            self._refuse_short_lag()
        share = max(ceil(examples_per_step(args) / len(names)), 2 if args.get_recipe().is_independent else 1)
        return {
            "examples_per_domain": args.per_device_target_batch_size or share if for_targets else share,
            "batch_size": args.train_batch_size,
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        A micro-batch. For a proxy, those of an optimizer step together are one [`~DomainLearner.step`], at the last of them;
        online, every one trains as in any Trainer, and before the first the learner takes its look.
        """
        return (self._online_step if self._learner.is_online else self._proxy_step)(model, inputs, num_items_in_batch)

    def _proxy_step(self, model: nn.Module, inputs: dict[str, Any], _: Tensor | int | None) -> Tensor:
        micro_batches = self._collect(inputs)
        if micro_batches is None:
            return torch.zeros((), device=self.args.device)
        self._enter_training(model)
        return self._learner.step([self._prepare_batch(batch) for batch in micro_batches])

    def _online_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        learner, start = self._learner, time.perf_counter()
        if learner.is_due and not self._micro_batches:
            self._enter_training(model)
            self._reweight_sampler(inputs)
        training_start = time.perf_counter()
        micro_batches = self._collect(inputs)
        if micro_batches is not None:
            learner.count_consumed(micro_batches)
        loss = super().training_step(model, inputs, num_items_in_batch)
        end = time.perf_counter()
        learner.record_time(step_seconds=end - start, training_seconds=end - training_start)
        return loss

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple:
        """As the Trainer's; a proxy whose learning has ended has no epoch left."""
        num_epochs, steps_per_epoch, *others = super().set_initial_training_values(*args, **kwargs)
        if self.has_settled and not self.args.is_online:
            num_epochs = self._resumed_step // steps_per_epoch
        return num_epochs, steps_per_epoch, *others

    def _enter_training(self, model: nn.Module) -> None:
        """As `Trainer.training_step` begins: schedule-free optimizers hold other parameters for evaluation."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

    def _collect(self, inputs: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The micro-batches of this optimizer step once all of them are there."""
        self._micro_batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return None
        micro_batches, self._micro_batches = self._micro_batches, []
        return micro_batches

    def _reweight_sampler(self, inputs: dict[str, Any]) -> None:
        """Let the learner take its look, and tell the sampler from which draw on the new weights hold."""
        learner, sampler = self._learner, self.domain_sampler
        if not learner.look(self._prepare_batch(inputs)):
            return
        weights = dict(zip(learner.state.names, learner.state.weights.tolist(), strict=True))
        first_draw = (self.state.global_step + learner.args.lag_steps) * examples_per_step(self.args)
        if sampler.max_epochs_per_domain is None or first_draw < sampler.num_planned:
            sampler.set_weights(weights, first_draw=first_draw)

    @staticmethod
    def _refuse_lost_domains(args: DoGEConfig, names: tuple[str, ...], *, has_target: bool) -> None:
        batch_size = examples_per_step(args)
        num_parts = 2 if args.get_recipe().is_independent and not has_target else 1
        if batch_size < num_parts * len(names) and not args.is_online:
            each = "every domain" if num_parts == 1 else "two examples of every domain (one with `recipe='paper'`)"
            raise ValueError(
                f"Every step must hold {each}, but {batch_size} examples a step cannot hold {len(names)} domains, which "
                f"take {num_parts * len(names)}. Raise `per_device_train_batch_size`, `gradient_accumulation_steps` or the number of processes."
            )

    @staticmethod
    def _refuse_useless_cap(args: DoGEConfig, max_epochs_per_domain: float | None, unit: str) -> None:
        if (max_epochs_per_domain, unit) != (None, "examples") and not args.is_online:
            raise ValueError(
                "A proxy sees the same number of examples of every domain, so `max_epochs_per_domain` must be unset and `unit` "
                f"'examples', but got {max_epochs_per_domain} and {unit!r}. Set them where the learned weights are used, or set "
                "`mode='online'`."
            )

    def _refuse_short_lag(self) -> None:
        """Weights must not be due before a draw that the DataLoader has taken already."""
        ahead, given = loader_lead(self.args), self.args.lag_steps * examples_per_step(self.args)
        if given < ahead:
            needed = ceil(ahead / examples_per_step(self.args))
            raise ValueError(
                f"`sampler_lag_steps` must be at least {needed}, since the DataLoader runs up to {ahead} examples ahead of "
                f"the training step, but got {self.args.lag_steps}. Raise it (or `reweight_steps`, its default), or "
                "lower `dataloader_num_workers` or `dataloader_prefetch_factor`."
            )

    def _forget_schedule(self) -> None:
        """Draw by the first weights again, as a trainer that has not trained yet."""
        state = self.domain_sampler.state_dict()
        self.domain_sampler.load_state_dict({**state, "schedule": state["schedule"][:1], "epoch": 0, "position": 0})

    def _prepare_batch(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """A train batch on the device, and the domain of each example."""
        if DOMAIN_IDS not in inputs:
            raise ValueError(
                "Every batch must come with its domains, which the trainer's own data collator adds, but a batch came "
                "without. Pass `data_collator` when the trainer is made, and leave `trainer.data_collator` alone."
            )
        if (inputs[DOMAIN_IDS] < 0).any():
            raise ValueError(
                f"Every train example must come with its {self.args.domain_column!r}, but some come without. Keep "
                "that column in the format or transform of the train dataset, and do not pack streams."
            )
        return self._prepare_inputs(inputs), inputs[DOMAIN_IDS]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model does not take the domains."""
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != DOMAIN_IDS})

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns.append(self.args.domain_column)  # otherwise the Trainer drops it

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what each domain weighs, scored, lost and consumed to the training logs."""
        if "loss" in logs:
            logs = {**logs, **self._learner.metrics.collect(self._learner.state, self._learner.domains.sizes)}
            if self.args.is_online:
                drawn_by = self.domain_sampler.weights_at(
                    max(self.state.global_step - 1, 0) * examples_per_step(self.args)
                )
                logs |= {f"sampling_weight/{name}": weight for name, weight in drawn_by.items()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with the domain weights beside it; in a checkpoint, also what a resumed run needs."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.domain_weights.save_pretrained(folder / DOMAIN_WEIGHTS_FOLDER)
            if _internal_call:
                self._learner.save(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with a link to the weights where they are pushed."""
        super().create_model_card(*args, **kwargs)
        card_file, repo_id = Path(self.args.output_dir) / "README.md", weights_repository(self)
        if repo_id is not None and self.is_world_process_zero() and card_file.is_file():
            link_weights(card_file, repo_id, self.domain_weights)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Push the model as any Trainer does, and the domain weights to a dataset repository beside it: `hub_weights_id`, or
        the model's name with `-domain-weights` behind it. The cards of both name each other.

        Should one of the two fail, the other is pushed nevertheless, and the error raised then.

        Returns:
            What `Trainer.push_to_hub` returns.
        """
        try:
            if private is not None:  # transformers 5.0 does not know it
                kwargs["private"] = private
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        finally:
            if self.is_world_process_zero() and getattr(self, "hub_model_id", None) is not None:
                self.domain_weights.push_to_hub(
                    weights_repository(self),
                    model_id=self.hub_model_id,
                    commit_message=commit_message,
                    token=token if token is not None else self.args.hub_token,
                    revision=revision if revision is not None else getattr(self.args, "hub_revision", None),
                    private=private if private is not None else self.args.hub_private_repo,
                )


class DoGETrainer(DoGEMixin, Trainer):
    """A `Trainer` that learns domain weights; see [`DoGEMixin`] for what it does and takes."""
