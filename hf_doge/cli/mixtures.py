"""Domain weights as they are named on the command line."""

from collections.abc import Callable, Mapping
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.domain_weights import DOMAIN_WEIGHTS_FOLDER
from hf_doge.cli.console import save_plot, say
from hf_doge.data.domain_data import DomainData
from hf_doge.mixing.estimate import estimate_domain_weights

ESTIMATED = "estimated"
GIVEN = "mixture"  # the weights that the mixture file gives


def describe_blocks(train: Mapping[str, Dataset], block_size: int) -> dict[str, dict[str, int]]:
    """Rows and tokens of each domain, as `DomainWeights.domains` holds them."""
    return {name: {"num_rows": len(rows), "num_tokens": len(rows) * block_size} for name, rows in train.items()}


def estimate_for_targets(data: DomainData, *, order: int = 2, max_tokens: int | None = None) -> DomainWeights:
    """
    The n-gram estimate for the train text of the targets, of at most `max_tokens` of each domain.

    Raises:
        `ValueError`: without a target.
    """
    if not data.targets:
        raise ValueError("An estimate needs a target, but there is none. Name one with `--target`.")
    return estimate_domain_weights(
        data.train,
        concatenate_datasets(list(data.targets.values())),
        order=order,
        max_tokens=max_tokens,
        max_target_tokens=None,
    )


def describe_estimate(learned: DomainWeights, data: DomainData) -> str:
    """What n-grams say of the same targets, next to what was learned; of 2 million tokens of each domain, for seconds."""
    try:
        estimated = estimate_for_targets(data, max_tokens=2_000_000).mean
    except ValueError as error:  # a target too short for it was long enough to learn from
        return f"No estimate by n-grams to compare with: {error}"
    width = max(map(len, estimated))
    lines = [f"{name:{width}}  {learned.mean[name]:7.3f}  {weight:9.3f}" for name, weight in estimated.items()]
    distance = sum(abs(learned.mean[name] - weight) for name, weight in estimated.items()) / 2
    return "\n".join(
        [
            "Next to the estimate by n-grams, which needs no training (`hf-doge estimate`):",
            f"{'':{width}}  learned  estimated",
            *lines,
            f"Weight placed differently: {distance:.3f}. `hf-doge compare --weights RUN --mixtures uniform natural estimated`, with RUN the "
            "folder of this run and the same data, model and target, tells which helps.",
        ]
    )


def save_results(weights: DomainWeights, output_dir: Path) -> None:
    """Write weights and their plot, and print both the weights and where they are."""
    folder = output_dir / DOMAIN_WEIGHTS_FOLDER
    weights.save_pretrained(folder, plot=True)
    plot = save_plot(weights.plot, output_dir / "domain_weights.png")
    say(weights.summary())
    say(f"Weights: {folder}{f', plot: {plot}' if plot else ''}")


Domains = Mapping[str, Mapping[str, int]]  # what there is to train on, from [`describe_blocks`]


def _temperature(domains: Domains, num_tokens: int | None, temperature: float) -> DomainWeights:
    return DomainWeights.from_temperature(domains, temperature=temperature)


def _unimax(domains: Domains, num_tokens: int | None, max_epochs: float, budget: float | None = None) -> DomainWeights:
    num_tokens = num_tokens if budget is None else int(budget)
    if num_tokens is None:
        raise ValueError("the tokens of the training are not known here, so name them")
    return DomainWeights.unimax(domains, num_tokens=num_tokens, max_epochs=max_epochs)


# Mixtures by rule: how each is written, and what makes it of the domains, the tokens of a training, and the numbers written.
RULES: dict[str, tuple[str, Callable[..., DomainWeights]]] = {
    "uniform": ("uniform", lambda domains, num_tokens: DomainWeights.uniform(domains)),
    "natural": ("natural", lambda domains, num_tokens: DomainWeights.natural(domains)),
    "temperature": ("temperature:T", _temperature),
    "unimax": ("unimax:EPOCHS[:TOKENS]", _unimax),
}


def is_rule(spec: str) -> bool:
    """Whether a word on the command line names a mixture by rule, and no folder or file."""
    name, colon, _ = spec.partition(":")
    return name in RULES and (not colon or ":" in RULES[name][0])


def load_weights(
    spec: str, domains: Domains, *, num_tokens: int | None = None, given: Mapping[str, float] | None = None
) -> DomainWeights:
    """
    The weights that a word on the command line stands for, in the order of the domains.

    Args:
        spec (`str`): `uniform`, `natural` (in proportion to tokens), `temperature:T`, `unimax:EPOCHS[:TOKENS]`, `mixture`
            (those of the mixture file), the output folder of `hf-doge learn` or `estimate`, a folder or Hub name of an artifact, or a JSON or YAML file of weights.
        domains (`Mapping[str, Mapping[str, int]]`): The domains to train on, from [`describe_blocks`].
        num_tokens (`int`, *optional*): Tokens of the whole training, for `unimax:EPOCHS`.
        given (`Mapping[str, float]`, *optional*): Shares that the mixture file gives.

    Raises:
        `FileNotFoundError`: if there is no such folder, file or repository.
        `ValueError`: if the weights are of other domains.
    """
    if is_rule(spec):
        return _weigh_by_rule(spec, domains, num_tokens)
    if spec == GIVEN and (given is not None or not Path(spec).exists()):  # a folder may be called so
        if given is None:
            raise ValueError(
                "The weights of the mixture file are asked for, but it gives none. Add a `weight` to each data set."
            )
        return DomainWeights.from_mapping(given, domains=domains)
    load = DomainWeights.from_file if Path(spec).is_file() else DomainWeights.from_pretrained
    weights = load(spec)
    if set(weights.mean) != set(domains):
        raise ValueError(
            f"The weights must be of the domains to train on, {sorted(domains)}, but {spec!r} is of "
            f"{sorted(weights.mean)}. Choose the domains with `--domains` and `--target`."
        )
    return DomainWeights.from_mapping({name: weights.mean[name] for name in domains}, domains=domains)


def _weigh_by_rule(spec: str, domains: Domains, num_tokens: int | None) -> DomainWeights:
    rule, *values = spec.split(":")
    try:
        return RULES[rule][1](domains, num_tokens, *map(float, values))
    except (ValueError, OverflowError, TypeError) as error:
        reason = "it takes other numbers" if isinstance(error, TypeError) else error
        raise ValueError(
            f"Mixtures by rule are {', '.join(written for written, _ in RULES.values())}, but {spec!r} cannot be computed: "
            f"{reason}"
        ) from error
