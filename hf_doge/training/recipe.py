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
        min_spread (`float`): By how much the logarithms of the weights are to differ at least; 0 if `mu` is as it is.
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
    min_spread: float = 0.0

    @property
    def is_independent(self) -> bool:
        """Whether domains are aligned in halves."""
        return self.self_term == "independent"

    def to_dict(self) -> dict:
        """Plain values, for JSON; what came later where it is not the paper's, so that older checkpoints are of the same recipe."""
        later = {"score_metric": "gradient", "mean_weighting": "steps", "shrinkage": False, "min_spread": 0.0}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def check(self) -> None:
        """
        Refuse ingredients that would ask for numbers which are not there.

        Raises:
            ValueError: Names the arguments.
        """
        is_measured = self.score_metric == "optimizer"
        if self.is_independent and self.domain_max_grad_norm is not None:
            raise ValueError(
                "`self_term='independent'` compares halves, whose lengths do not tell that of the whole gradient, so "
                f"`domain_max_grad_norm` must be 0, but got {self.domain_max_grad_norm}. Set it to 0, or `self_term='same'`."
            )
        if (self.is_independent or is_measured) and self.normalization != "none":
            raise ValueError(
                "`self_term='independent'` and `score_metric='optimizer'` take scores as they are, so `normalization` must be "
                f"'none', but got {self.normalization!r}. Set it to 'none', or leave the other two at the paper's."
            )
        if is_measured and self.self_term is False:
            raise ValueError(
                "`score_metric='optimizer'` cannot take off a domain's product with itself, so `self_term` must be "
                "'independent' or 'same', but got 'none'. Use 'independent'."
            )
        if self.min_spread and not self.shrinkage:
            raise ValueError(
                f"`min_spread` ({self.min_spread:g}) would spread the weights by noise too, so `shrinkage` must be True, but it is "
                f"False in the recipe {self.name!r}. Set it to True, give `recipe='doge_plus'`, or set `min_spread` to 0."
            )
