"""The ingredients of one weight update, all decided: [`Recipe`]."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Recipe:
    """
    The ingredients of one weight update, all decided. It is written into the artifact as it is.

    Attributes:
        name (`str`): `"paper"`, `"official"` or `"doge_plus"`, the recipe the ingredients started from.
        mu (`float`): Bregman coefficient.
        normalization (`str`): See [`~hf_doge.functional.normalize_scores`].
        score_min (`float` or `None`): Lower bound of the normalised scores.
        score_max (`float` or `None`): Upper bound of the normalised scores.
        domain_max_grad_norm (`float` or `None`): Norm to which each domain's gradient is clipped alone.
        smoothing (`float`): Share of the uniform weights mixed into each update.
        self_term (`bool` or `"independent"`): Whether a domain's alignment with itself counts, in the universal setting; and
            `"independent"` if all gradients are compared across halves of the examples.
        burn_in_steps (`int`): Updates left out of the mean, from the start.
        reweight_steps (`int`): Optimizer steps from one update to the next.
        score_metric (`str`): `"gradient"` or `"optimizer"`.
        mean_weighting (`str`): How much the weights after each update count in the mean: `"steps"` or `"inverse_variance"`.
        shrinkage (`bool`): Whether the weights go only as far from the initial ones as the noise of the scores cannot account for.
    """

    name: str
    mu: float
    normalization: str
    score_min: float | None
    score_max: float | None
    domain_max_grad_norm: float | None
    smoothing: float
    self_term: bool | str
    burn_in_steps: int
    reweight_steps: int
    score_metric: str = "gradient"
    mean_weighting: str = "steps"
    shrinkage: bool = False

    @property
    def is_independent(self) -> bool:
        """Whether domains are aligned in halves."""
        return self.self_term == "independent"

    def to_dict(self) -> dict:
        """Plain values, for JSON; what came later where it is not the paper's, so that older checkpoints are of the same recipe."""
        later = {"score_metric": "gradient", "mean_weighting": "steps", "shrinkage": False}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}
