"""What learns the domain weights, apart from when: [`DomainLearner`], driven by a trainer."""

import time
from collections.abc import Mapping
from copy import copy
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.functional.doge import clamp_scores, independent_scores, normalize_scores, update_domain_weights
from hf_doge.gradients.alignment import Alignment, DomainAlignment, TargetMetric
from hf_doge.gradients.optimizer_metric import OptimizerMetric
from hf_doge.gradients.sharding import reshard, sum_every_backward
from hf_doge.gradients.vectors import Reduction
from hf_doge.sampling.domains import DomainIndex, StreamDomains
from hf_doge.training.checkpoints import read_step
from hf_doge.training.collator import DOMAIN_IDS
from hf_doge.training.config import DoGEConfig
from hf_doge.training.domain_batches import DomainBatches, TargetBatches
from hf_doge.training.domain_loss import DomainLoss
from hf_doge.training.global_batch import describe_reading
from hf_doge.training.halves import split_in_halves
from hf_doge.training.learning_state import DomainMetrics, LearningState, TrajectoryPoint
from hf_doge.training.provenance import describe_run
from hf_doge.training.run_identity import describe_recipe
from hf_doge.training.score_noise import ScoreNoise
from hf_doge.training.setup import choose_alignment, weights_in_order
from hf_doge.training.step_gradients import (
    MicroBatch,
    StepGradients,
    agree_on_calls,
    count_examples,
    count_labels,
    sum_counts,
)


class DomainLearner:
    """
    The weights of the domains, what they are learned from, and how they are updated; the same on all processes.

    Args:
        trainer (`Trainer`): With a `DoGEConfig`; its model, loss, collator and learning rate are read at every step.
        domains (`DomainIndex` or `StreamDomains`): Of its train set.
        targets (`TargetBatches`, *optional*): `None` if the training domains are the target.
        looks (`DomainBatches`, *optional*): In online mode, the examples that are compared and not trained on.
        initial_weights (`DomainWeights` or `Mapping[str, float]`, *optional*): alpha_0; uniform by default.
    """

    def __init__(
        self,
        trainer: Trainer,
        domains: DomainIndex | StreamDomains,
        *,
        targets: TargetBatches | None,
        looks: DomainBatches | None,
        initial_weights: DomainWeights | Mapping[str, float] | None,
    ) -> None:
        self.trainer = trainer
        self.domains = domains
        self.targets = targets
        self.looks = looks
        self.is_online = looks is not None
        self.initial_weights = weights_in_order(initial_weights, domains.names)
        self.metrics = DomainMetrics(domains.names)
        self.state = LearningState.fresh(domains.names, self.initial_weights)
        self._clock = time.monotonic()
        self._described_step: int | None = None  # at which `state.described` was taken
        self._loss = DomainLoss(trainer)
        self._reduction = Reduction(trainer.args.device)
        self._trained_parameters: list[int] = []
        self.read_arguments()
        self._alignment = self.alignment

    def read_arguments(self) -> None:
        """
        Take the arguments as they stand. A copy, so that what the artifact records is what the weights are learned with,
        whatever is set while or after they are.
        """
        args = copy(self.trainer.args)
        assert isinstance(args, DoGEConfig)
        self.args, self.recipe = args, args.get_recipe(has_target=self.targets is not None)
        # Of each domain that are aligned: given targets share no example with it, so only a universal score needs halves.
        self._num_parts = 2 if self.recipe.is_independent and self.targets is None else 1
        self._trained_parameters = []  # for the alignment to be chosen again
        if self.state.num_updates == 0:  # a search sets the arguments of a trial after `begin`
            self.state.noise = ScoreNoise.if_asked_for(self.args, self.recipe, self.initial_weights)

    @property
    def alignment(self) -> DomainAlignment:
        """
        How gradients are compared. Chosen again when other parameters are trained: after `model_init`, when a callback
        unfreezes some, or when FSDP has sharded them.
        """
        if self._has_other_parameters():
            reshard(self.trainer.model)  # after a forward without a backward, some are whole
            if self._has_other_parameters():
                self._trained_parameters = self._find_trained_parameters()
                self._alignment = choose_alignment(
                    self.trainer,
                    self.args,
                    self.recipe,
                    num_domains=len(self.domains.names),
                    num_parts=self._num_parts,
                    is_universal=self.targets is None,
                )
        return self._alignment

    def _has_other_parameters(self) -> bool:
        trained = self._find_trained_parameters()
        return not trained or trained != self._trained_parameters

    def _find_trained_parameters(self) -> list[int]:
        return [id(parameter) for parameter in self.trainer.model.parameters() if parameter.requires_grad]

    @property
    def is_due(self) -> bool:
        """Whether the weights are updated in the step at hand."""
        return self.trainer.state.global_step % self.args.reweight_steps == 0 and not self.has_settled

    @property
    def has_settled(self) -> bool:
        """Whether nothing is left to learn and that ends the learning; see [`~hf_doge.training.score_noise.ScoreNoise`]."""
        return self.args.stop_when_undecided and self.state.has_settled

    def step(self, batches: list[tuple[dict[str, Any], Tensor]]) -> Tensor:
        """
        One step of Algorithm 1 of the paper, or with targets of Algorithm 2; between two updates of the weights, a plain step
        on the weighted loss. Leaves in `.grad` what steps the model.

        Args:
            batches (`list[tuple[dict[str, Any], torch.Tensor]]`):
                Micro-batches of this process on its device, each with the domains of its examples.

        Returns:
            `torch.Tensor` of shape `()`: the weighted loss that the step lowers.
        """
        start, way, metric = time.perf_counter(), self.alignment, self._metric()
        targets = self.targets if self.is_due else None
        step = self._prepare(batches, targets, trains=True)
        if self.is_due and step.can_align:
            alignment = way.align(step, metric)  # <g_j, G> of every domain j
            losses, usable, _ = found = _by_domain(alignment, step)
            before = self._shares(usable)
            self._update_weights(alignment, step, *found)  # alpha_j *= exp(lr <g_j, G> / mu)
            shares = before if self.args.lagged_update else self._shares(usable)
            way.write_gradient(step, _by_part(shares, step) * alignment.step_scales)  # sum_j alpha_j g_j
        else:
            losses, usable = self._write_weighted_gradient(step)
        loss = self._weighted_loss(losses, usable)
        self.record_time(step_seconds=time.perf_counter() - start, training_seconds=step.training_seconds)
        return loss

    def look(self, batch: tuple[dict[str, Any], Tensor]) -> bool:
        """
        In online mode, update the weights by examples of their own, which do not train the model.

        Args:
            batch (`tuple[dict[str, Any], torch.Tensor]`): A micro-batch of the step that follows, as for [`step`].

        Returns:
            `bool`: whether there was anything to compare with.
        """
        step = self._prepare(self._pieces(self.looks), self.targets, trains=False, spare=batch)
        if step.can_align:
            alignment = self.alignment.align(step, self._metric())
            self.alignment.forget()
            self._update_weights(alignment, step, *_by_domain(alignment, step))
        return step.can_align

    def _write_weighted_gradient(self, step: StepGradients) -> tuple[Tensor, Tensor]:
        """`sum_j alpha_j g_j` of a step that is not aligned; returns the losses and which domains are in it."""
        way, weights, usable = self.alignment, self.state.weights, step.is_present
        losses = way.write_weighted_gradient(step, _by_part(self._shares(usable), step))
        losses = losses if step.halves is None else step.halves.mean_losses(losses)
        finite = usable & losses.isfinite()
        if not torch.equal(usable & (weights > 0), finite):
            # A loss that is not a number has spoilt the sum: take it again without that domain.
            self.trainer.model.zero_grad()
            way.write_weighted_gradient(step, _by_part(self._shares(finite), step))
        is_broken = bool((usable & ~finite & (weights > 0)).any())
        self.state.note_finiteness(is_broken, patience=self.args.max_nonfinite_steps)
        self.metrics.record(losses=losses)
        return losses, finite

    def _metric(self) -> TargetMetric | None:
        is_plain = self.recipe.score_metric != "optimizer"
        return None if is_plain else OptimizerMetric(self.trainer.optimizer, max_norm=self.args.max_grad_norm)

    def _pieces(self, batches: DomainBatches) -> list[tuple[dict[str, Any], Tensor]]:
        """This process' share of the examples that the step at hand compares, besides those that it trains on."""
        trainer = self.trainer
        pieces = batches.batches(
            trainer.state.global_step // self.args.reweight_steps,
            trainer._signature_columns,
            process_index=trainer.args.process_index,
            num_processes=trainer.args.world_size,
        )
        return [(trainer._prepare_inputs(trainer.data_collator(features)), ids) for features, ids in pieces]

    def _micro_batch(self, inputs: dict[str, Any], ids: Tensor) -> MicroBatch:
        return MicroBatch(inputs, ids, labels_are_shifted=self._loss.labels_are_shifted)

    def _prepare(
        self,
        batches: list[tuple[dict[str, Any], Tensor]],
        targets: TargetBatches | None,
        *,
        trains: bool,
        spare: tuple[dict[str, Any], Tensor] | None = None,
    ) -> StepGradients:
        """
        Count this process' examples over all processes, and make them ready to be differentiated.

        Args:
            batches (`list[tuple[dict[str, Any], torch.Tensor]]`): Train examples, as for [`step`].
            targets (`TargetBatches`, *optional*): What they are compared with, if not with each other.
            trains (`bool`): Whether the model is trained on the train examples, and not only compared.
            spare (`tuple[dict[str, Any], torch.Tensor]`, *optional*): A batch that this process has in any case.
        """
        train = [self._micro_batch(*batch) for batch in batches]
        if not self._loss.is_settled:
            self._loss.learn(train)
        target = [] if targets is None else [self._micro_batch(*batch) for batch in self._pieces(targets)]
        num_domains, weights = len(self.domains.names), None if self.targets is None else self.targets.weights
        num_targets = len(weights or ())
        if trains:
            counts = [count_labels(train, num_domains), count_examples(train, num_domains)]
        if self._num_parts == 2:
            split_in_halves(train, num_domains, self._reduction)
        num_domains *= self._num_parts
        items, target_items = count_labels(train, num_domains), count_labels(target, num_targets)
        items, target_items, *counts = sum_counts(
            [items, target_items, *(counts if trains else [])],
            self.state.weights,
            self._reduction,
            step=self.trainer.state.global_step,
        )
        if trains:
            self.state.num_tokens += counts[0]
            self.state.num_examples += counts[1]
        num_calls = None
        if self._loss.uses_collectives:
            num_calls = agree_on_calls(train, target, num_domains, num_targets, self._reduction)
        if self._loss.is_sharded:
            sum_every_backward(self.trainer.model)
        return StepGradients(
            self._loss,
            train,
            target,
            num_items=items,
            target_items=target_items,
            target_weights=weights,
            num_parts=self._num_parts,
            num_calls=num_calls,
            spare=None if spare is None else self._micro_batch(*spare),
        )

    def begin(self, checkpoint: Path | None) -> None:
        """Start from the beginning, or from where a checkpoint stands."""
        names = self.domains.names
        self._loss = DomainLoss(self.trainer)
        noise = ScoreNoise.if_asked_for(self.args, self.recipe, self.initial_weights)
        if checkpoint is None:
            self.state = LearningState.fresh(names, self.initial_weights, noise)
        else:
            self.state = LearningState.load(checkpoint, names, noise)
        self.metrics = DomainMetrics(names, self.state.unlogged)
        if self.state.labels_are_shifted is not None:
            self._loss.take_shift(self.state.labels_are_shifted)
        self._clock = time.monotonic()
        self._described_step = None if self.state.described is None else read_step(checkpoint)

    def record_time(self, *, step_seconds: float, training_seconds: float) -> None:
        """At the end of a step: what it took, and the time since training or the last step began, for what it costs."""
        self.metrics.record_time(step_seconds=step_seconds, training_seconds=training_seconds)
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now

    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run needs."""
        self._describe_run()
        self.state.labels_are_shifted, self.state.unlogged = self._loss.found_shift, self.metrics.state_dict()
        self.state.save(checkpoint, step=self.trainer.state.global_step, run=self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the weights, for [`~hf_doge.training.run_identity.refuse_other_run`]."""
        identity = describe_recipe(self.args, self.recipe, self.targets)
        identity["initial_weights"] = dict(zip(self.domains.names, self.initial_weights.tolist(), strict=True))
        identity |= {"max_steps": self.trainer._get_max_steps()} if self.recipe.min_spread else {}  # mu follows it
        if self.domains.sizes is None:
            identity["reading"] = describe_reading(self.args, self.trainer.train_dataset.num_shards)
            identity["num_rows"] = dict.fromkeys(self.domains.names)
        return identity

    def to_domain_weights(self) -> DomainWeights:
        """What has been learned so far, as an artifact."""
        state = self.state
        has_one_label_each = bool(state.num_tokens.any()) and torch.equal(state.num_tokens, state.num_examples)
        unit = "examples" if has_one_label_each else "tokens"  # whose losses a proxy weighs
        unit = self.trainer.domain_sampler.unit if self.is_online else unit
        return DomainWeights(
            dict(zip(state.names, state.mean.tolist(), strict=True)),
            last=dict(zip(state.names, state.weights.tolist(), strict=True)),
            trajectory=state.trajectory,
            recipe={**self.recipe.to_dict(), "unit": unit, "arguments": self.args.get_doge_arguments()},
            domains=self.trainer.described_domains,
            metadata=self._describe_run(),
        )

    def _describe_run(self) -> dict[str, Any]:
        """Once for each step: asked for again, by a resumed run too, what was learned is the same artifact to the byte."""
        step = self.trainer.state.global_step
        if self._described_step != step:
            self._described_step, self.state.described = step, describe_run(self.trainer, self.args)
        described = self.state.described
        cost = {"seconds": round(self.state.seconds, 1), "num_tokens_seen": int(self.state.num_tokens.sum())}
        cost |= {"settled_after_updates": self.state.num_updates} if self.has_settled else {}
        objective = "universal" if self.targets is None else "target"
        return {**described, "objective": objective, "training": {**described["training"], **cost}}

    def count_consumed(self, batches: list[dict[str, Any]]) -> None:
        """Note, over all processes, examples and labels of a step that the trainer takes by itself."""
        pieces = [({name: v for name, v in one.items() if name != DOMAIN_IDS}, one[DOMAIN_IDS]) for one in batches]
        micro_batches, num_domains = [self._micro_batch(*piece) for piece in pieces], len(self.domains.names)
        counts = [count_labels(micro_batches, num_domains), count_examples(micro_batches, num_domains)]
        items, examples = sum_counts(counts, self.state.weights, self._reduction, step=self.trainer.state.global_step)
        self.state.num_tokens += items
        self.state.num_examples += examples

    def _score(self, alignment: Alignment) -> Tensor:
        """The score of every domain, NaN where there is none."""
        if self._num_parts == 2:
            return independent_scores(alignment.inner_products.view(-1, 2, 2))
        scores = alignment.inner_products[:, 0]
        return scores - alignment.norms.square() if self.targets is None and not self.recipe.self_term else scores

    def _update_weights(
        self, alignment: Alignment, step: StepGradients, losses: Tensor, usable: Tensor, scored: Tensor
    ) -> None:
        """One mirror step by the scores of an alignment, unless something in it is not finite."""
        recipe, state = self.recipe, self.state
        scores = self._score(alignment)
        finite = torch.equal(usable, step.is_present) and bool(scores[scored].isfinite().all())
        if not finite:
            state.note_finiteness(True, patience=self.args.max_nonfinite_steps)
            self.metrics.record(losses=losses, scores=scores)
            return
        found = scores[scored]
        if self._num_parts == 1:
            norms, target_norm = alignment.norms[scored], alignment.target_norm
            found = normalize_scores(found, norms, target_norm, normalization=recipe.normalization)
        found = clamp_scores(found, score_min=recipe.score_min, score_max=recipe.score_max)
        scores = scores.index_put((scored,), found)
        learning_rate = self.trainer._get_learning_rate()
        rate = 1.0 if recipe.score_metric == "optimizer" else learning_rate  # which is in such scores
        weights = update_domain_weights(
            state.weights, scores, learning_rate=rate, mu=recipe.mu, smoothing=recipe.smoothing, present=scored
        )
        self.metrics.record(losses=losses, scores=scores)
        step, every = self.trainer.state.global_step, self.args.reweight_steps
        number = step // every + 1  # of those that are due
        progress = number / max(number, ceil(self.trainer.state.max_steps / every))
        state.update(weights, scores, rate=rate / recipe.mu, burn_in_steps=recipe.burn_in_steps, progress=progress)
        if state.num_updates % self.args.trajectory_steps == 0:
            mu = None if state.noise is None else state.noise.mu_in_force
            state.points.append(TrajectoryPoint(step + 1, learning_rate, state.weights, scores, losses, mu))

    def _shares(self, usable: Tensor) -> Tensor:
        """Shares of the usable domains, summing to 1; where they hold no weight at all, they count alike."""
        shares = torch.where(usable, self.state.weights, 0.0)
        if shares.sum() == 0:
            shares = usable.double()
        return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)

    def _weighted_loss(self, losses: Tensor, usable: Tensor) -> Tensor:
        """The weighted loss that the step minimises, for the Trainer's log."""
        shares = self._shares(usable)
        loss = torch.where(shares > 0, shares * losses, 0.0).sum()
        return loss.to(device=self.args.device, dtype=torch.float32)


def _by_domain(alignment: Alignment, step: StepGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Mean losses; which domains can step the model; which have a score."""
    if step.halves is not None:
        return step.halves.by_domain(alignment)
    usable = alignment.step_scales > 0
    return alignment.losses, usable, usable


def _by_part(shares: Tensor, step: StepGradients) -> Tensor:
    """The factor of each gradient that was aligned, from the shares of the domains."""
    return shares if step.halves is None else step.halves.spread(shares)
