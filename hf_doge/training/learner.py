"""What learns the domain weights, apart from when: [`DomainLearner`], driven by a trainer."""

import time
import zlib
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.functional.doge import clamp_scores, normalize_scores, update_domain_weights
from hf_doge.gradients.alignment import Alignment, DomainAlignment, RandomReplay
from hf_doge.gradients.reduction import Reduction
from hf_doge.gradients.sharding import is_sharded, reshard, sum_every_backward, without_gradient
from hf_doge.sampling.domains import DomainIndex, StreamDomains
from hf_doge.training.checkpoints import read_step
from hf_doge.training.collator import DOMAIN_IDS
from hf_doge.training.domain_batches import TargetBatches
from hf_doge.training.domain_loss import DomainLoss
from hf_doge.training.global_batch import describe_reading
from hf_doge.training.learning_state import LearningState, TrajectoryPoint
from hf_doge.training.metrics import DomainMetrics
from hf_doge.training.provenance import describe_run
from hf_doge.training.setup import choose_alignment, uses_fsdp, weights_in_order
from hf_doge.training.step_gradients import DomainSlice, MicroBatch, StepGradients


class DomainLearner:
    """
    The weights of the domains, what they are learned from, and how they are updated; the same on all processes.

    Args:
        trainer (`Trainer`): With a `DoGEConfig`; its model, loss, collator and learning rate are read at every step.
        domains (`DomainIndex` or `StreamDomains`): Of its train set.
        targets (`TargetBatches`, *optional*): `None` if the training domains are the target.
        initial_weights (`DomainWeights` or `Mapping[str, float]`, *optional*): alpha_0; uniform by default.
    """

    def __init__(
        self,
        trainer: Trainer,
        domains: DomainIndex | StreamDomains,
        *,
        targets: TargetBatches | None,
        initial_weights: DomainWeights | Mapping[str, float] | None,
    ) -> None:
        self.trainer = trainer
        self.domains = domains
        self.targets = targets
        self.target_weights = None if targets is None else targets.weights  # by position
        self.initial_weights = weights_in_order(initial_weights, domains.names)
        self.metrics = DomainMetrics(domains.names)
        self.state = LearningState.fresh(domains.names, self.initial_weights)
        self._clock = time.monotonic()
        self._described_step: int | None = None  # at which `state.described` was taken
        self._loss = DomainLoss(trainer)
        self._reduction = Reduction()
        self._trained_parameters: list[int] = []
        self.read_arguments()
        self._alignment = self.alignment

    def read_arguments(self) -> None:
        """
        Take the arguments as they stand. A copy, so that what the artifact records is what the weights are learned with,
        whatever is set while or after they are.
        """
        self.args = copy(self.trainer.args)
        self.recipe = self.args.get_recipe()
        self._trained_parameters = []  # for the alignment to be chosen again

    @property
    def alignment(self) -> DomainAlignment:
        """
        Chosen anew when other parameters are trained: after `model_init`, when a callback unfreezes some, or when FSDP has
        sharded them.
        """
        model = self.trainer.model
        reshard(model)
        trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
        if not trained or trained != self._trained_parameters:
            self._trained_parameters = trained
            self._alignment = choose_alignment(
                model,
                self.args,
                self.recipe,
                num_domains=len(self.domains.names),
                is_universal=self.target_weights is None,
                loss_may_talk=self._loss_may_talk,
                shards=uses_fsdp(self.trainer),
            )
        return self._alignment

    @property
    def _loss_may_talk(self) -> bool:
        """
        Whether the loss may talk to the other processes, as that of trl's SFTTrainer does to gather its metrics, and any
        loss of a sharded model to gather its parameters: then all of them must call it equally often, whatever examples
        they have.
        """
        has_own_loss = type(self.trainer).compute_loss is not Trainer.compute_loss
        return self._reduction.is_needed and (has_own_loss or is_sharded(self.trainer.model))

    def begin(self, checkpoint: Path | None) -> None:
        """Start anew, or from where a checkpoint stands."""
        names = self.domains.names
        self.metrics = DomainMetrics(names)
        self._loss = DomainLoss(self.trainer)
        if checkpoint is None:
            self.state = LearningState.fresh(names, self.initial_weights)
        else:
            self.state = LearningState.load(checkpoint, names)
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
        self.state.save(checkpoint, step=self.trainer.state.global_step, run=self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the weights, for [`~hf_doge.training.run_identity.refuse_other_run`]."""
        identity = {"recipe": self.recipe.to_dict(), "mode": self.args.mode}
        identity["initial_weights"] = dict(zip(self.domains.names, self.initial_weights.tolist(), strict=True))
        identity["targets"] = None if self.targets is None else self.targets.describe()
        identity["target_data"] = None if self.targets is None else self.targets.fingerprints
        for name in ("alignment_parameters", "lagged_update", "per_device_target_batch_size"):
            identity[name] = getattr(self.args, name)
        if self.args.is_online:
            identity["sampler_lag_steps"] = self.args.lag_steps
        if self.domains.sizes is None:
            identity["reading"] = describe_reading(self.args, self.trainer.train_dataset.num_shards)
            identity["num_rows"] = dict.fromkeys(self.domains.names)
        return identity

    def to_domain_weights(self) -> DomainWeights:
        """What has been learned so far, as an artifact."""
        state = self.state
        return DomainWeights(
            dict(zip(state.names, state.mean.tolist(), strict=True)),
            last=dict(zip(state.names, state.weights.tolist(), strict=True)),
            trajectory=state.trajectory,
            recipe={**self.recipe.to_dict(), "arguments": self.args.get_doge_arguments()},
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
        objective = "universal" if self.target_weights is None else "target"
        return {**described, "objective": objective, "training": {**described["training"], **cost}}

    def prepare(
        self,
        batches: list[dict[str, Any]],
        target_batches: list[tuple[dict[str, Any], Tensor]],
        *,
        trains: bool,
        spare: dict[str, Any] | None = None,
    ) -> StepGradients:
        """
        Move this process' examples to the device, and count them over all processes.

        Args:
            batches (`list[dict[str, Any]]`): Micro-batches of train examples, with their domains.
            target_batches (`list[tuple[dict[str, Any], torch.Tensor]]`): Batches of targets, and the target of each example.
            trains (`bool`): Whether the model is trained on the train examples, and not only compared.
            spare (`dict[str, Any]`, *optional*): A micro-batch that this process has in any case.
        """
        for inputs in batches:
            if DOMAIN_IDS not in inputs:
                raise ValueError(
                    "Every batch must come with its domains, which the trainer's own data collator adds, but a batch came "
                    "without. Pass `data_collator` when the trainer is made, and leave `trainer.data_collator` alone."
                )
            if (inputs[DOMAIN_IDS] < 0).any():
                raise ValueError(
                    f"Every train example must come with its {self.args.domain_column!r}, but some come without. Keep "
                    "that column in the format or transform of the train dataset, and do not pack examples."
                )
        train = [self._to_device(inputs, inputs[DOMAIN_IDS]) for inputs in batches]
        targets = [self._to_device(inputs, ids) for inputs, ids in target_batches]
        num_domains, num_targets = len(self.domains.names), len(self.target_weights or ())
        counts = [_count_items(train, num_domains), _count_items(targets, num_targets)]
        if trains:
            counts.append(_count_examples(train, num_domains))
        items, target_items, *examples = self._sum_counts(counts)
        if trains:
            self.state.num_tokens += items
            self.state.num_examples += examples[0]
        model = self.trainer.model  # not its DDP wrapper: sums over the processes are made once, of what a step needs
        self._learn_loss(model, train)
        sum_every_backward(model)
        return StepGradients(
            train,
            targets,
            num_items=items,
            target_items=target_items,
            target_weights=self.target_weights,
            compute_loss=lambda piece, num_items: self._loss(model, piece, num_items),
            backward=self._backward,
            replay=RandomReplay(self.args.device),
            device=self.args.device,
            num_calls=self._agree_on_calls(train, targets),
            call_for_nothing=self._call_for_nothing,
            spare=None if spare is None else self._to_device(spare, spare[DOMAIN_IDS]),
        )

    def _learn_loss(self, model: nn.Module, train: list[MicroBatch]) -> None:
        """On examples of this process; where the loss may talk, on all processes or on none."""
        labelled = [batch for batch in train if batch.items.any()]
        is_ready, is_learned = bool(labelled), self._loss.is_learned
        if self._loss_may_talk:
            lacks = torch.tensor([not is_ready, not is_learned], dtype=torch.int64, device=self.args.device)
            is_ready, is_learned = (not lack for lack in self._reduction.max(lacks).tolist())
        if is_ready and not is_learned:
            self._loss.learn(model, labelled, makes_same_calls=self._loss_may_talk)

    def _call_for_nothing(self, piece: DomainSlice) -> None:
        """Take part in what the other processes do, and add nothing; of a sharded model, the backward is a part of it."""
        model = self.trainer.model
        if is_sharded(model):
            with without_gradient(model):
                self._backward(0.0 * self._loss(model, piece, 1))
        else:
            with torch.no_grad():
                self._loss(model, piece, 1)

    def _backward(self, loss: Tensor) -> None:
        """Add what this process has to the sum over all; FSDP adds the mean over them."""
        scale = self._reduction.num_processes if is_sharded(self.trainer.model) else 1
        self.trainer.accelerator.backward(loss * scale)

    def _agree_on_calls(
        self, train: list[MicroBatch], targets: list[MicroBatch]
    ) -> tuple[list[int], list[int]] | None:
        """The most slices of each domain and target that some process has, if all must call the loss that often."""
        if not self._loss_may_talk:
            return None
        num_domains, num_targets = len(self.domains.names), len(self.target_weights or ())
        calls = torch.zeros(num_domains + num_targets, dtype=torch.int64)
        for offset, batches in ((0, train), (num_domains, targets)):
            for batch in batches:
                calls[offset + batch.domain_ids[batch.items > 0].unique()] += 1
        calls = self._reduction.max(calls.to(self.args.device)).tolist()
        return calls[:num_domains], calls[num_domains:]

    def count_consumed(self, batches: list[dict[str, Any]]) -> None:
        """Note, over all processes, examples and labels of a step that the trainer takes by itself."""
        micro_batches = [
            MicroBatch(
                {name: value for name, value in inputs.items() if name != DOMAIN_IDS},
                inputs[DOMAIN_IDS],
                labels_are_shifted=self._loss.labels_are_shifted,
            )
            for inputs in batches
        ]
        num_domains = len(self.domains.names)
        counts = [_count_items(micro_batches, num_domains), _count_examples(micro_batches, num_domains)]
        items, examples = self._sum_counts(counts)
        self.state.num_tokens += items
        self.state.num_examples += examples

    def _sum_counts(self, counts: list[Tensor]) -> list[Tensor]:
        """Sums over the processes. The same message tells whether all of them hold the same weights."""
        checksum = zlib.crc32(self.state.weights.numpy().tobytes())
        numbers = self._reduction.sum(torch.cat([*counts, torch.tensor([checksum])]).to(self.args.device)).cpu()
        if int(numbers[-1]) != checksum * self._reduction.num_processes:
            raise RuntimeError(
                "All processes must hold the same domain weights, but at step "
                f"{self.trainer.state.global_step} they differ. Start all of them with the same code, arguments, data and "
                "checkpoint."
            )
        return list(numbers[:-1].split([len(count) for count in counts]))

    def _to_device(self, inputs: dict[str, Any], ids: Tensor) -> MicroBatch:
        prepared = self.trainer._prepare_inputs(inputs)
        return MicroBatch(prepared, ids, labels_are_shifted=self._loss.labels_are_shifted)

    def update_weights(self, alignment: Alignment, present: set[int]) -> None:
        """One mirror step by the scores of an alignment, unless something in it is not finite."""
        scores = alignment.inner_products
        if self.target_weights is None and not self.recipe.self_term:
            scores = scores - alignment.norms.square()
        usable = alignment.usable
        finite = len(present) == int(usable.sum()) and bool(scores[usable].isfinite().all())
        self.note_finiteness(not finite)
        learning_rate = self.trainer._get_learning_rate()
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
                self.state.weights,
                scores,
                learning_rate=learning_rate,
                mu=self.recipe.mu,
                smoothing=self.recipe.smoothing,
                present=usable,
            )
            self.state.update(weights, burn_in_steps=self.recipe.burn_in_steps)
            if self.state.num_updates % self.args.trajectory_steps == 0:
                step = self.trainer.state.global_step + 1
                self.state.points.append(TrajectoryPoint(step, learning_rate, weights, scores, alignment.losses))
        self.metrics.record(losses=alignment.losses, scores=scores)

    def note_finiteness(self, nonfinite: bool) -> None:
        """Count a step in which a domain's loss or gradient was not finite, and stop when they do not end."""
        state = self.state
        state.nonfinite_steps += nonfinite
        state.nonfinite_in_a_row = state.nonfinite_in_a_row + 1 if nonfinite else 0
        if state.nonfinite_in_a_row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"Loss and gradient must be finite, but in the last {state.nonfinite_in_a_row} steps some domain's was "
                "not. The weights were left alone meanwhile. Look at `domain_loss/...` in the logs, lower the learning "
                "rate or clean the data of that domain (`max_nonfinite_steps` sets the patience)."
            )

    def shares(self, usable: Tensor) -> Tensor:
        """Shares of the usable domains, summing to 1; where they hold no weight at all, they count alike."""
        shares = torch.where(usable, self.state.weights, 0.0)
        if shares.sum() == 0:
            shares = usable.double()
        return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)

    def weighted_loss(self, losses: Tensor, usable: Tensor) -> Tensor:
        """The weighted loss that the step minimises, for the Trainer's log."""
        shares = self.shares(usable)
        loss = torch.where(shares > 0, shares * losses, 0.0).sum()
        return loss.to(device=self.args.device, dtype=torch.float32)


def _count_items(batches: list[MicroBatch], num_domains: int) -> Tensor:
    counts = torch.zeros(num_domains, dtype=torch.int64)
    for batch in batches:
        counts += batch.count(batch.items, num_domains)
    return counts


def _count_examples(batches: list[MicroBatch], num_domains: int) -> Tensor:
    return sum(
        (torch.bincount(batch.domain_ids, minlength=num_domains) for batch in batches), torch.zeros(num_domains).long()
    )
