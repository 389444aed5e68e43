"""The arguments of [`DoGETrainer`]: everything `TrainingArguments` has, and how the domain weights are learned."""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from functools import partial

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

MODES = ("proxy", "online")
RECIPES = ("paper", "official")
ALIGNMENTS = ("auto", "single_pass", "per_domain", "streamed")
_CHECKS = {
    "mode": partial(check_choice, choices=MODES),
    "recipe": partial(check_choice, choices=RECIPES),
    "alignment": partial(check_choice, choices=ALIGNMENTS),
    "normalization": partial(check_choice, choices=NORMALIZATIONS, optional=True),
    "mu": partial(check_number, least=1 / LARGEST_RATE, most=LARGEST_RATE),
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
    "self_term": check_flag,
    "lagged_update": check_flag,
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


@dataclass(frozen=True)
class Recipe:
    """
    The ingredients of one weight update, all decided. It is written into the artifact as it is.

    Attributes:
        name (`str`): `"paper"` or `"official"`, the recipe the ingredients started from.
        mu (`float`): Bregman coefficient.
        normalization (`str`): See [`~hf_doge.functional.normalize_scores`].
        score_min (`float` or `None`): Lower bound of the normalised scores.
        score_max (`float` or `None`): Upper bound of the normalised scores.
        domain_max_grad_norm (`float` or `None`): Norm to which each domain's gradient is clipped alone.
        smoothing (`float`): Share of the uniform weights mixed into each update.
        self_term (`bool`): Whether a domain's alignment with itself counts, in the universal setting.
        burn_in_steps (`int`): Updates left out of the mean, from the start.
        reweight_steps (`int`): Optimizer steps from one update to the next.
    """

    name: str
    mu: float
    normalization: str
    score_min: float | None
    score_max: float | None
    domain_max_grad_norm: float | None
    smoothing: float
    self_term: bool
    burn_in_steps: int
    reweight_steps: int

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass
class DoGEConfig(TrainingArguments):
    """
    `TrainingArguments` for learning domain weights with DoGE, https://huggingface.co/papers/2310.15393.

    Two recipes set the ingredients of the weight update; any ingredient given beside the recipe overrides it:

    | | `recipe="paper"` | `recipe="official"` (the authors' code) |
    |---|---|---|
    | score | inner product, unbounded | inner product / mean train-gradient norm, clipped to [0, 5] |
    | each domain's gradient | as it is | clipped alone to `max_grad_norm` |
    | target | the step's train domains, or a target set | a target set (held-out mix or out-of-domain) |

    In both, the new weights step the model, and the result is the mean of the weights after every update.
    `mu` cannot be carried from one recipe to the other, nor from the authors' later code: see
    [`hf_doge.functional.doge`] for the three conventions.
    """

    domain_column: str = field(
        default="domain",
        metadata={"help": "Column of the train set that names each example's domain (string, ClassLabel or integer)."},
    )
    recipe: str = field(
        default="paper",
        metadata={"help": "Where the ingredients of the weight update come from: 'paper' or 'official'."},
    )
    mu: float = field(
        default=0.01,
        metadata={
            "help": "Bregman coefficient of the weight update, exp(learning_rate * score / mu). Smaller means faster "
            "weights. Must be > 0. The paper's runs use 0.01 (universal), 0.05 and 0.001 (out-of-domain)."
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
    self_term: bool = field(
        default=True,
        metadata={"help": "Count a domain's alignment with itself when the targets are the train domains."},
    )
    burn_in_steps: int = field(
        default=0,
        metadata={
            "help": "Weight updates left out of the mean, from the start; the paper leaves out none. If none is left, the mean is "
            "the last weights."
        },
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
        metadata={"help": "GiB that kept domain gradients may take. Beyond it they are not kept but computed again."},
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
        rate = self.learning_rate / self.mu
        if not rate <= LARGEST_RATE:
            raise ValueError(
                f"`learning_rate` / `mu`, the speed of the weights, must be at most {LARGEST_RATE:g}, but it is {rate:g}. Lower"
                " `learning_rate` or raise `mu`."
            )
        if self.is_online and self.lagged_update:
            raise ValueError("`lagged_update` is of the mode 'proxy'; in 'online' mode see `sampler_lag_steps`.")
        if self.score_min is not None and self.score_max is not None and self.score_min > self.score_max:
            raise ValueError(f"`score_min` must not exceed `score_max`, but got {self.score_min} > {self.score_max}.")
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

    def get_recipe(self) -> Recipe:
        """The ingredients in force: the recipe's, where none was given beside it."""
        official = self.recipe == "official"
        domain_max_grad_norm = self.domain_max_grad_norm
        if domain_max_grad_norm is None and official:
            domain_max_grad_norm = self.max_grad_norm
        if domain_max_grad_norm == math.inf:
            domain_max_grad_norm = None
        score_min = 0.0 if self.score_min is None and official else self.score_min
        score_max = 5.0 if self.score_max is None and official else self.score_max
        return Recipe(
            name=self.recipe,
            mu=self.mu,
            normalization=self.normalization or ("mean_norm" if official else "none"),
            score_min=None if score_min == -math.inf else score_min,
            score_max=None if score_max == math.inf else score_max,
            domain_max_grad_norm=domain_max_grad_norm or None,
            smoothing=self.smoothing,
            self_term=self.self_term,
            burn_in_steps=self.burn_in_steps,
            reweight_steps=self.reweight_steps,
        )

    def get_doge_arguments(self) -> dict:
        """The arguments that `TrainingArguments` does not have, as plain values; an infinite bound as a string."""
        inherited = {inherited_field.name for inherited_field in fields(TrainingArguments)}
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in inherited}
        return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in arguments.items()}
