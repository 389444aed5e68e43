"""The arguments of [`DoGETrainer`]: everything `TrainingArguments` has, and how the domain weights are learned."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from hf_doge.checks import (
    LARGEST_RATE,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_repo_id,
    check_seed,
    check_text,
    show,
)
from hf_doge.functional.doge import NORMALIZATIONS
from hf_doge.training.recipe import Recipe

MODES = ("proxy", "online")
RECIPES = ("paper", "official", "doge_plus")
SELF_TERMS: dict[bool | str, bool | str] = {
    True: True,
    False: False,
    "same": True,
    "none": False,
    "independent": "independent",
}
SCORE_METRICS = ("gradient", "optimizer")
MEAN_WEIGHTINGS = ("steps", "inverse_variance")
# Given without a recipe these are meant as the paper has them: a `mu` above all, whose unit is another in "doge_plus".
_OF_THE_PAPER = "mu", "normalization", "score_min", "score_max", "domain_max_grad_norm"
_MU = 0.01  # of the paper's universal runs
_MU_IN_NATS, _MU_IN_NATS_TO_TARGET = 3.0, 1.0  # of scores in nats
_MIN_SPREAD = 6.0  # towards a target
ALIGNMENTS = ("auto", "single_pass", "per_domain", "streamed")


def _check_self_term(name: str, value: Any) -> bool | str:
    names = [choice for choice in SELF_TERMS if isinstance(choice, str)]
    if isinstance(value, str) and value in names:
        return value
    try:
        return check_flag(name, value)
    except ValueError as error:
        raise ValueError(f"`{name}` must be True, False or one of {names}, but got {show(value)}.") from error


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "mode": partial(check_choice, choices=MODES),
    "recipe": partial(check_choice, choices=RECIPES, optional=True),
    "alignment": partial(check_choice, choices=ALIGNMENTS),
    "normalization": partial(check_choice, choices=NORMALIZATIONS, optional=True),
    "score_metric": partial(check_choice, choices=SCORE_METRICS, optional=True),
    "mu": partial(check_number, least=1 / LARGEST_RATE, most=LARGEST_RATE, optional=True),
    "min_spread": partial(check_number, least=0, most=LARGEST_RATE, optional=True),
    "smoothing": partial(check_number, least=0, below=1),
    "score_min": partial(check_number, below=math.inf, finite=False, optional=True),  # and see `check_arguments`
    "score_max": partial(check_number, above=-math.inf, finite=False, optional=True),
    "domain_max_grad_norm": partial(check_number, least=0, finite=False, optional=True),
    "gradient_memory_budget": partial(check_number, least=0, unit="GiB", finite=False),
    "burn_in_steps": partial(check_count, least=0),
    "reweight_steps": check_count,
    "max_nonfinite_steps": check_count,
    "trajectory_steps": check_count,
    "sampler_lag_steps": partial(check_count, optional=True),
    "per_device_target_batch_size": partial(check_count, optional=True),
    "self_term": _check_self_term,
    "lagged_update": check_flag,
    "mean_weighting": partial(check_choice, choices=MEAN_WEIGHTINGS),
    "shrinkage": partial(check_flag, optional=True),
    "stop_when_undecided": check_flag,
    "undecided_window": partial(check_count, least=2),
    "domain_column": partial(check_text, what="the name of a column"),
    "hub_weights_id": partial(check_repo_id, optional=True),
    # Of the Trainer's own arguments those that the weights depend on.
    "learning_rate": partial(check_number, least=0, most=LARGEST_RATE),
    "max_grad_norm": partial(check_number, least=0, finite=False, optional=True),
    "per_device_train_batch_size": check_count,
    "gradient_accumulation_steps": check_count,
    "seed": partial(check_seed, least=0, most=2**32 - 1),
    "data_seed": partial(check_seed, least=0, most=2**32 - 1, optional=True),
}
_LEAST_LAG = 2  # steps: a DataLoader without workers runs one batch ahead of the step
WEIGHTS_SUFFIX = "-domain-weights"  # of the repository of the weights, behind the name of the model's


@dataclass
class DoGEConfig(TrainingArguments):
    """
    `TrainingArguments` for learning domain weights with DoGE, https://huggingface.co/papers/2310.15393.

    Three recipes set the ingredients of the weight update; any ingredient given besides the recipe overrides it. Without a recipe it
    is `"doge_plus"`, or `"paper"` where an ingredient of its is given: `mu`, `normalization`, `score_min`, `score_max`,
    `domain_max_grad_norm`, `self_term="same"` or `"none"`, `score_metric="gradient"`:

    | | `recipe="paper"` | `recipe="official"` (the authors' code) | `recipe="doge_plus"` (ours) |
    |---|---|---|---|
    | score | inner product, unbounded | inner product / mean train-gradient norm, clipped to [0, 5] | inner product with the optimizer's update, in nats |
    | a domain compared with itself | yes | no: the target is held out | across halves of its examples only |
    | each domain's gradient | as it is | clipped alone to `max_grad_norm` | as it is |
    | target | the step's train domains, or a target set | a target set (held-out mix or out-of-domain) | either |
    | `mu` | 0.01 | 0.01 | 1 nat towards a target, less in a short run; else 3 |
    | weights | as the scores make them | as the scores make them | shrunk by the noise of the scores |

    In all of them the new weights step the model, and the result is the mean of the weights after every update.
    `mu` cannot be carried from one recipe to the other, nor from the authors' later code: see
    [`hf_doge.functional.doge`] for the three conventions. With `score_metric="optimizer"` its unit is nats: weights change by
    `exp(score / mu)`, where the score is by how many nats a step on the domain alone would lower the targets' mean loss.

    `min_spread` (ours) lowers `mu` where a run is short in nats, as a fine-tuning is: the domain whose scores add up to most ends at least
    `exp(min_spread)` times as heavy as one whose scores add up to nothing, but for shrinkage; see [`~hf_doge.training.score_noise.ScoreNoise`].

    `self_term="independent"` needs two examples of each domain in a step, and memory for twice as many gradients where they are
    kept. A domain of which a step has but one example with a label has no score in that step. Given targets share no example
    with a domain: with them it is the same as `"same"`.

    The logs tell how sure a score is: `domain_score_noise/<name>` is the standard deviation of one step's score, from
    the differences of the last hundred (see [`~hf_doge.artifacts.score_noise.estimate_score_noise`]), and
    `domain_score_snr/<name>` the mean score since the last log over it.

    `stop_when_undecided=True` ends the learning when scores no longer tell the domains apart, by the rule in
    [`~hf_doge.training.score_noise.ScoreNoise`]: the run of a proxy stops there, and online the weights stay as they are while the
    training goes on. `shrinkage=True` moves the weights only as far from the initial ones as that noise cannot account for,
    with nearly the same result for domains that it does not tell apart, whatever the seed.
    `mean_weighting="inverse_variance"` lets the weights after an update count less in the mean the more noise has reached
    them; it is nearer to the initial weights, as a larger `mu` is.
    """

    _argument_group_name = "domain weights (DoGE)"

    domain_column: str = field(
        default="domain",
        metadata={"help": "Column of the train set that names each example's domain (string, ClassLabel or integer)."},
    )
    recipe: str | None = field(
        default=None,
        metadata={
            "help": "Ingredients of the weight update: 'paper', 'official' or, by default, 'doge_plus', ours; 'paper' where `mu` is "
            "given. So it is where another ingredient of the paper's is given."
        },
    )
    mu: float | None = field(
        default=None,
        metadata={
            "help": "Bregman coefficient of the weight update, exp(learning_rate * score / mu), the paper's unless a recipe is given, or "
            "exp(score / mu) with `score_metric='optimizer'`. Smaller means faster weights. Must be > 0. The paper's runs use 0.01 (universal), "
            "0.05 and 0.001 (out-of-domain). Default with scores in nats ('doge_plus'): 1 towards a target, else 3. Otherwise 0.01."
        },
    )
    min_spread: float | None = field(
        default=None,
        metadata={
            "help": "Lower `mu` until the domain that helps most ends exp(min_spread) times as heavy as one without effect. Only "
            "where the scores of the run add up to less; 0 for never. Needs `shrinkage`. Default: 6 for 'doge_plus' "
            "towards a target where `mu` is not given, else 0."
        },
    )
    score_metric: str | None = field(
        default=None,
        metadata={
            "help": "What is compared with the target's gradient: 'gradient', each domain's gradient, or 'optimizer', the "
            "update that AdamW would make from it, so that scores are in nats of target loss a step. Default: what the recipe "
            "says."
        },
    )
    normalization: str | None = field(
        default=None,
        metadata={"help": "Score normalisation: 'none', 'mean_norm' or 'cosine'. Default: what the recipe says."},
    )
    score_min: float | None = field(
        default=None,
        metadata={"help": "Lower bound of the normalised scores, -inf for none. Default: what the recipe says."},
    )
    score_max: float | None = field(
        default=None,
        metadata={"help": "Upper bound of the normalised scores, inf for none. Default: what the recipe says."},
    )
    domain_max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Clip the gradient of each domain, alone, to this norm; 0 switches it off. Default: what the recipe "
            "says. The combined gradient is clipped to `max_grad_norm` afterwards, as in any Trainer."
        },
    )
    smoothing: float = field(
        default=0.0, metadata={"help": "Share of the uniform weights mixed into each update, in [0, 1)."}
    )
    self_term: bool | str = field(
        default=True,
        metadata={
            "help": "Count a domain's alignment with itself when the targets are the train domains: True or 'same' (the "
            "paper), False or 'none', or 'independent', across halves of its examples. True is 'independent' in the recipe 'doge_plus'."
        },
    )
    burn_in_steps: int = field(
        default=0,
        metadata={
            "help": "Weight updates left out of the mean, from the start; the paper leaves out none. If none is left, the mean is "
            "the last weights."
        },
    )
    mean_weighting: str = field(
        default="steps",
        metadata={
            "help": "How much the weights after each update count in the mean: 'steps', all alike (the paper), or "
            "'inverse_variance', by how little noise of the scores has reached them (ours)."
        },
    )
    shrinkage: bool | None = field(
        default=None,
        metadata={
            "help": "Move the weights only as far from the initial ones as the noise of the scores cannot account for (ours). "
            "Default: what the recipe says, which is on for 'doge_plus' alone."
        },
    )
    stop_when_undecided: bool = field(
        default=False,
        metadata={
            "help": "Stop learning when scores have not told the domains apart in two windows of `undecided_window` updates: a "
            "proxy run ends, online the weights stay."
        },
    )
    undecided_window: int = field(
        default=100, metadata={"help": "Updates of a window of `stop_when_undecided`. Must be >= 2."}
    )
    reweight_steps: int = field(
        default=1, metadata={"help": "Update the weights every this many optimizer steps. Must be >= 1."}
    )
    mode: str = field(
        default="proxy",
        metadata={
            "help": "'proxy' (the paper): every step sees every domain and the weights scale the loss. 'online': the weights "
            "draw the examples of an ordinary training and are updated every `reweight_steps` on examples of their own."
        },
    )
    sampler_lag_steps: int | None = field(
        default=None,
        metadata={
            "help": "Online mode: steps from an update of the weights to the first examples drawn by them; at least as many "
            "as the DataLoader runs ahead. Default: `reweight_steps`, but at least 2."
        },
    )
    lagged_update: bool = field(
        default=False,
        metadata={
            "help": "Step the model with the weights before the update instead of those after it (the paper steps with the "
            "new ones). For comparison with methods that do so; it saves no time here."
        },
    )
    alignment: str = field(
        default="auto",
        metadata={
            "help": "How gradients are compared, always exactly: 'single_pass' takes all domains from one backward of the "
            "mixed batch; 'per_domain' makes one backward per domain and keeps every gradient; 'streamed' keeps one at a "
            "time and computes each again. 'auto' is 'single_pass' where the model allows it (never where FSDP shards it), "
            "else 'per_domain' while `gradient_memory_budget` allows (of each process' parts), else 'streamed'."
        },
    )
    gradient_memory_budget: float = field(
        default=4.0,
        metadata={
            "help": "GiB that kept domain gradients may take. Beyond it they are not kept but computed again. Also the GiB that "
            "whole logits may take in 'single_pass' under trl's SFTTrainer, whose own head makes none."
        },
    )
    alignment_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression searched in parameter names: only these gradients are compared. The model is "
            "trained on all of them. Default: all trainable parameters."
        },
    )
    per_device_target_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples of each target per step. Default: one domain's share of the train batch, rounded up."
        },
    )
    max_nonfinite_steps: int = field(
        default=10,
        metadata={
            "help": "Stop with an error after this many steps in a row in which a domain's loss or gradient was not "
            "finite. Until then such a step keeps the weights, leaves that domain out and is counted in the logs."
        },
    )
    trajectory_steps: int = field(
        default=1, metadata={"help": "Keep every this many-th weight update in the trajectory. Must be >= 1."}
    )

    hub_weights_id: str | None = field(
        default=None,
        metadata={
            "help": "Dataset repository that `push_to_hub` pushes the domain weights to, 'user/name'. Default: the model's "
            "repository with '-domain-weights' behind its name."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_arguments()

    def check_arguments(self) -> None:
        """
        Refuse what cannot be learned with, also what was set since the arguments were made.

        Raises:
            ValueError: Names the argument.
        """
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        for name in ("score_min", "score_max"):
            if LARGEST_RATE < abs(getattr(self, name) or 0) < math.inf:
                raise ValueError(
                    f"`{name}` must be in [-{LARGEST_RATE:g}, {LARGEST_RATE:g}] or infinite, but got {getattr(self, name)}."
                )
        recipe = self.get_recipe(has_target=True)  # of the two rates the larger
        rate = self.learning_rate / recipe.mu
        if not rate <= LARGEST_RATE:
            raise ValueError(
                f"`learning_rate` / `mu`, the speed of the weights, must be at most {LARGEST_RATE:g}, but it is {rate:g}. Lower"
                " `learning_rate` or raise `mu`."
            )
        if self.is_online and self.lagged_update:
            raise ValueError("`lagged_update` is of the mode 'proxy'; in 'online' mode see `sampler_lag_steps`.")
        if self.score_min is not None and self.score_max is not None and self.score_min > self.score_max:
            raise ValueError(f"`score_min` must not exceed `score_max`, but got {self.score_min} > {self.score_max}.")
        recipe.check()
        if self.hub_weights_id is None and self.push_to_hub and self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id + WEIGHTS_SUFFIX)
            except ValueError as error:
                raise ValueError(
                    f"The domain weights are to be pushed to {self.hub_model_id + WEIGHTS_SUFFIX!r}, which is no name of a"
                    f" repository: {error} Pass `hub_weights_id`."
                ) from error
        if self.alignment_parameters is not None:
            try:
                re.compile(self.alignment_parameters)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"`alignment_parameters` must be a regular expression, but got {show(self.alignment_parameters)}: {error}."
                ) from error

    @property
    def is_online(self) -> bool:
        """Whether the weights draw the examples, rather than scale the loss."""
        return self.mode == "online"

    @property
    def lag_steps(self) -> int:
        """Steps from an update of the weights to the first examples drawn by them, in force in online mode."""
        return max(self.reweight_steps, _LEAST_LAG) if self.sampler_lag_steps is None else self.sampler_lag_steps

    def get_recipe(self, *, has_target: bool = False) -> Recipe:
        """The ingredients in force: the recipe's, where none was given beside it. Where there is a target, `mu` is its own."""
        is_papers = self.self_term not in (True, "independent") or self.score_metric == "gradient"
        is_papers |= any(getattr(self, one) is not None for one in _OF_THE_PAPER)
        name = self.recipe or ("paper" if is_papers else "doge_plus")
        official, plus = name == "official", name == "doge_plus"
        metric = self.score_metric or ("optimizer" if plus else "gradient")
        max_norm = self.max_grad_norm if self.domain_max_grad_norm is None and official else self.domain_max_grad_norm
        score_min = 0.0 if self.score_min is None and official else self.score_min
        score_max = 5.0 if self.score_max is None and official else self.score_max
        in_nats = _MU_IN_NATS_TO_TARGET if has_target else _MU_IN_NATS
        shrinkage = plus if self.shrinkage is None else self.shrinkage
        spreads = plus and has_target and shrinkage and self.mu is None
        return Recipe(
            name=name,
            mu=self.mu if self.mu is not None else (in_nats if metric == "optimizer" else _MU),
            normalization=self.normalization or ("mean_norm" if official else "none"),
            score_min=None if score_min == -math.inf else score_min,
            score_max=None if score_max == math.inf else score_max,
            domain_max_grad_norm=None if max_norm == math.inf else max_norm or None,
            smoothing=self.smoothing,
            self_term="independent" if plus and self.self_term is True else SELF_TERMS[self.self_term],
            burn_in_steps=self.burn_in_steps,
            reweight_steps=self.reweight_steps,
            score_metric=metric,
            mean_weighting=self.mean_weighting,
            shrinkage=shrinkage,
            min_spread=self.min_spread if self.min_spread is not None else (_MIN_SPREAD if spreads else 0.0),
        )

    def get_doge_arguments(self) -> dict:
        """The arguments that `TrainingArguments` does not have, as plain values; an infinite bound as a string."""
        inherited = {inherited_field.name for inherited_field in fields(TrainingArguments)}
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in inherited}
        return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in arguments.items()}
