"""Learning domain weights with a proxy model: [`DoGETrainer`]."""

import time
import zlib
from collections.abc import Mapping
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.functional.doge import clamp_scores, normalize_scores, update_domain_weights
from hf_doge.gradients.alignment import Alignment, DomainAlignment, RandomReplay
from hf_doge.gradients.reduction import Reduction
from hf_doge.sampling.domains import merge_domains
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.training.checkpoints import resolve_checkpoint
from hf_doge.training.collator import DOMAIN_IDS, DomainCollator, DomainLookup
from hf_doge.training.config import DoGEConfig
from hf_doge.training.domain_loss import DomainLoss
from hf_doge.training.learning_state import LearningState, TrajectoryPoint
from hf_doge.training.metrics import DomainMetrics
from hf_doge.training.provenance import describe_domains, describe_run
from hf_doge.training.sampler_guard import SamplerGuardCallback
from hf_doge.training.setup import choose_alignment, refuse_unsupported, weights_in_order
from hf_doge.training.step_gradients import MicroBatch, StepGradients
from hf_doge.training.target_batches import TargetBatches

DOMAIN_WEIGHTS_FOLDER = "domain_weights"


class DoGETrainer(Trainer):
    """
    A `Trainer` that learns domain weights while it trains a proxy model, by DoGE
    (https://huggingface.co/papers/2310.15393, Algorithms 1 and 2).

    Every optimizer step draws the same number of examples from every domain, compares each domain's gradient `g_j` with
    the target's, updates the weights by `alpha_j *= exp(lr * <g_j, G> / mu)`, and steps the model with
    `sum_j alpha_j g_j`, the new weights. `g_j` is the gradient of the domain's mean loss over its own tokens of the
    whole step, over all micro-batches. Departures from the paper, where one is not asked for in the arguments: none in
    the formulas; a domain without a token in a step keeps its share and the others step the model in proportion.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`): The proxy model. It is discarded after: train another one with
            the learned weights.
        args (`DoGEConfig`): The training arguments.
        train_dataset (`datasets.Dataset`, `datasets.DatasetDict` or `dict[str, datasets.Dataset]`):
            One dataset with a column `args.domain_column`, or one dataset per domain.
        target_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            What the weights should serve: a held-out mix, or data of a domain that is not trained on. The model is
            never trained on it. `None` means the training domains themselves (universal generalization).
        target_weights (`dict[str, float]`, *optional*): How much each target counts; all 1 by default.
        initial_weights (`DomainWeights` or `dict[str, float]`, *optional*): alpha_0; uniform by default.
        kwargs: Everything else a `Trainer` takes.

    Raises:
        `ValueError`: for combinations that would give wrong weights (several processes, fp16, ...) and for data, names
            or weights that do not fit together; the message says what to do.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DoGEConfig | None = None,
        *,
        train_dataset: Dataset | Mapping[str, Dataset],
        target_dataset: Dataset | Mapping[str, Dataset] | None = None,
        target_weights: Mapping[str, float] | None = None,
        initial_weights: DomainWeights | Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unsupported(args, train_dataset, has_target=target_dataset is not None)
        train_dataset, self._domains = merge_domains(train_dataset, args.domain_column)
        names = self._domains.names
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if batch_size < len(names):
            raise ValueError(
                f"Every step must hold every domain, but {batch_size} examples a step cannot hold {len(names)} domains. "
                "Raise `per_device_train_batch_size`, `gradient_accumulation_steps` or the number of processes."
            )
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)

        self.recipe = args.get_recipe()
        seed = args.seed if args.data_seed is None else args.data_seed
        self.data_collator = DomainCollator(
            self.data_collator,
            args.domain_column,
            DomainLookup(train_dataset.features[args.domain_column], names),
            seed=seed,
        )
        self._sampler = DomainWeightedSampler(
            self._domains,
            dict.fromkeys(names, 1.0),
            num_samples=ceil(len(train_dataset) / batch_size) * batch_size,
            seed=seed,
        )
        self.add_callback(SamplerGuardCallback(self._sampler))
        self._targets = None
        if target_dataset is not None:
            self._targets = TargetBatches(
                target_dataset,
                target_weights,
                examples_per_target=args.per_device_target_batch_size or ceil(batch_size / len(names)),
                batch_size=args.train_batch_size,
                seed=seed,
            )
        self._reduction = Reduction()
        self._trained_parameters: list[int] = []
        self._alignment = self._get_alignment()
        self._initial_weights = weights_in_order(initial_weights, names)
        self._learning = LearningState.fresh(names, self._initial_weights)
        self._metrics = DomainMetrics(names)
        self._domain_loss = DomainLoss(self)
        self._micro_batches: list[dict[str, Any]] = []

    @property
    def domain_weights(self) -> DomainWeights:
        """What has been learned so far: mean and last weights, trajectory, recipe and provenance."""
        state = self._learning
        return DomainWeights(
            dict(zip(state.names, state.mean.tolist(), strict=True)),
            last=dict(zip(state.names, state.weights.tolist(), strict=True)),
            trajectory=state.trajectory,
            recipe={**self.recipe.to_dict(), "arguments": self.args.get_doge_arguments()},
            domains=self._described_domains,
            metadata=describe_run(self),
        )

    @property
    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint, or its artifact would lie."""
        sizes = dict(zip(self._domains.names, self._domains.sizes.tolist(), strict=True))
        return {"recipe": self.recipe.to_dict(), "num_rows": sizes, "seed": self._sampler.seed}

    @cached_property
    def _described_domains(self) -> dict[str, dict[str, Any]]:
        return describe_domains(self.train_dataset, self._domains)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written whole."""
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        names = self._domains.names
        if checkpoint is None:
            self._learning = LearningState.fresh(names, self._initial_weights)
        else:
            self._learning = LearningState.load(checkpoint, names, run=self._identity)
        self._metrics = DomainMetrics(names)
        self._micro_batches = []
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collect the step's micro-batches; at the last one, update the weights and write the weighted gradient."""
        self._micro_batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        self._alignment = self._get_alignment()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        start = time.perf_counter()
        step = self._prepare_step(micro_batches)
        loss = self._reweighting_step(step) if self._is_reweighting and step.can_align else self._weighted_step(step)
        self._metrics.record_time(step_seconds=time.perf_counter() - start, training_seconds=step.training_seconds)
        return loss

    def _get_alignment(self) -> DomainAlignment:
        """Chosen anew when other parameters are trained: after `model_init`, or when a callback unfreezes some."""
        trained = [id(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        if trained and trained == self._trained_parameters:
            return self._alignment
        self._trained_parameters = trained
        return choose_alignment(
            self.model,
            self.args,
            self.recipe,
            num_domains=len(self._domains.names),
            is_universal=self._targets is None,
        )

    @property
    def _is_reweighting(self) -> bool:
        return self.state.global_step % self.recipe.reweight_steps == 0

    def _reweighting_step(self, step: StepGradients) -> Tensor:
        """Align, update the weights, and step with the new ones."""
        alignment = self._alignment.align(step)
        self._update_domain_weights(alignment, set(step.present_domains))
        coefficients = self._renormalize(self._learning.weights, alignment.usable) * alignment.step_scales
        self._alignment.write_gradient(step, coefficients)
        return self._report_loss(alignment.losses, alignment.usable)

    def _weighted_step(self, step: StepGradients) -> Tensor:
        """A plain step on the weighted loss, between two updates of the weights."""
        usable = torch.zeros_like(self._learning.weights, dtype=torch.bool)
        usable[list(step.present_domains)] = True
        losses = self._alignment.write_weighted_gradient(step, self._renormalize(self._learning.weights, usable))
        finite = usable & losses.isfinite()
        if not torch.equal(usable & (self._learning.weights > 0), finite):
            # A loss that is not a number has spoilt the sum: take it again without that domain.
            self.model.zero_grad()
            self._alignment.write_weighted_gradient(step, self._renormalize(self._learning.weights, finite))
        self._note_finiteness(bool((usable & ~finite & (self._learning.weights > 0)).any()))
        self._metrics.record(losses=losses)
        return self._report_loss(losses, finite)

    def _update_domain_weights(self, alignment: Alignment, present: set[int]) -> None:
        scores = alignment.inner_products
        if self._targets is None and not self.recipe.self_term:
            scores = scores - alignment.norms.square()
        usable = alignment.usable
        finite = len(present) == int(usable.sum()) and bool(scores[usable].isfinite().all())
        self._note_finiteness(not finite)
        learning_rate = self._get_learning_rate()
        if finite:
            scores = scores.clone()
            scores[usable] = clamp_scores(
                normalize_scores(
                    scores[usable],
                    alignment.norms[usable],
                    alignment.target_norm,
                    normalization=self.recipe.normalization,
                ),
                score_min=self.recipe.score_min,
                score_max=self.recipe.score_max,
            )
            weights = update_domain_weights(
                self._learning.weights,
                scores,
                learning_rate=learning_rate,
                mu=self.recipe.mu,
                smoothing=self.recipe.smoothing,
                present=usable,
            )
            self._learning.update(weights, burn_in_steps=self.recipe.burn_in_steps)
            if self._learning.num_updates % self.args.trajectory_steps == 0:
                self._learning.points.append(
                    TrajectoryPoint(self.state.global_step + 1, learning_rate, weights, scores, alignment.losses)
                )
        self._metrics.record(losses=alignment.losses, scores=scores)

    def _note_finiteness(self, nonfinite: bool) -> None:
        """Count a step in which a domain's loss or gradient was not finite, and stop when they do not end."""
        state = self._learning
        state.nonfinite_steps += nonfinite
        state.nonfinite_in_a_row = state.nonfinite_in_a_row + 1 if nonfinite else 0
        if state.nonfinite_in_a_row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"Loss and gradient must be finite, but in the last {state.nonfinite_in_a_row} steps some domain's was "
                "not. The weights were left alone meanwhile. Look at `domain_loss/...` in the logs, lower the learning "
                "rate or clean the data of that domain (`max_nonfinite_steps` sets the patience)."
            )

    @staticmethod
    def _renormalize(weights: Tensor, usable: Tensor) -> Tensor:
        """Shares of the usable domains, summing to 1; where they hold no weight at all, they count alike."""
        shares = torch.where(usable, weights, 0.0)
        if shares.sum() == 0:
            shares = usable.double()
        return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)

    def _report_loss(self, losses: Tensor, usable: Tensor) -> Tensor:
        """The weighted loss that the step minimises, for the Trainer's log."""
        shares = self._renormalize(self._learning.weights, usable)
        loss = torch.where(shares > 0, shares * losses, 0.0).sum()
        return loss.to(device=self.args.device, dtype=torch.float32)

    def _prepare_step(self, micro_batches: list[dict[str, Any]]) -> StepGradients:
        """Move the step's train and target batches to the device, and count them over all processes."""
        for inputs in micro_batches:
            if (inputs[DOMAIN_IDS] < 0).any():
                raise ValueError(
                    f"Every train example must come with its {self.args.domain_column!r}, but some come without. Keep "
                    "that column in the format or transform of the train dataset."
                )
        train = [self._prepare_batch(inputs, inputs[DOMAIN_IDS]) for inputs in micro_batches]
        targets = []
        if self._targets is not None and self._is_reweighting:
            pieces = self._targets.batches(
                self.state.global_step,
                self._signature_columns,
                process_index=self.args.process_index,
                num_processes=self.args.world_size,
            )
            targets = [self._prepare_batch(self.data_collator(features), ids) for features, ids in pieces]
        num_items, num_target_items = self._count(train, targets)
        model = self.model  # not its DDP wrapper: sums over the processes are made once, of what a step needs
        if labelled := [batch for batch in train if batch.items.any()]:
            self._domain_loss.learn(model, next(iter(labelled[0].slices().values())))
        return StepGradients(
            train,
            targets,
            num_items=num_items,
            target_items=num_target_items,
            target_weights=None if self._targets is None else self._targets.weights,
            compute_loss=lambda piece, num_items: self._domain_loss(model, piece, num_items),
            backward=self.accelerator.backward,
            replay=RandomReplay(self.args.device),
            device=self.args.device,
        )

    def _count(self, train: list[MicroBatch], targets: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """
        Labels of each domain and of each target in this step on all processes; what the domains consume is noted.

        The same message tells whether all processes hold the same weights.
        """
        num_domains, num_targets = len(self._domains.names), 0 if self._targets is None else len(self._targets.weights)
        examples = sum(batch.count(torch.ones_like(batch.items), num_domains) for batch in train)
        items = sum(batch.count(batch.items, num_domains) for batch in train)
        target_items = torch.zeros(num_targets, dtype=torch.int64)
        for batch in targets:
            target_items += batch.count(batch.items, num_targets)
        checksum = zlib.crc32(self._learning.weights.numpy().tobytes())
        numbers = torch.cat([examples, items, target_items, torch.tensor([checksum])])
        numbers = self._reduction.sum(numbers.to(self.args.device)).cpu()
        if int(numbers[-1]) != checksum * self._reduction.num_processes:
            raise RuntimeError(
                f"All processes must hold the same domain weights, but at step {self.state.global_step} they differ. Start "
                "all of them with the same code, arguments, data and checkpoint."
            )
        examples, items, target_items = numbers[:-1].split([num_domains, num_domains, num_targets])
        self._learning.num_examples += examples
        self._learning.num_tokens += items
        return items, target_items

    def _prepare_batch(self, inputs: dict[str, Any], domain_ids: Tensor) -> MicroBatch:
        return MicroBatch(
            self._prepare_inputs(inputs), domain_ids, labels_are_shifted=self._domain_loss.labels_are_shifted
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model does not take the domains."""
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != DOMAIN_IDS})

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns.append(self.args.domain_column)  # otherwise the Trainer drops it

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> DomainWeightedSampler:
        return self._sampler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what each domain weighs, scored, lost and consumed to the training logs."""
        if "loss" in logs:
            logs = {**logs, **self._metrics.collect(self._learning, self._domains.sizes)}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with the domain weights beside it; in a checkpoint, also what a resumed run needs."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.domain_weights.save_pretrained(folder / DOMAIN_WEIGHTS_FOLDER)
            if _internal_call:
                self._learning.save(folder, step=self.state.global_step, run=self._identity)
