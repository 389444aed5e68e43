"""Domain weights as they are named on the command line."""

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset

from hf_doge.artifacts import DomainWeights


def describe_blocks(train: Mapping[str, Dataset], block_size: int) -> dict[str, dict[str, int]]:
    """Rows and tokens of each domain, as `DomainWeights.domains` holds them."""
    return {name: {"num_rows": len(rows), "num_tokens": len(rows) * block_size} for name, rows in train.items()}


def load_weights(spec: str, domains: Mapping[str, Mapping[str, int]]) -> DomainWeights:
    """
    The weights that a word on the command line stands for, in the order of the domains.

    Args:
        spec (`str`): `uniform`, `natural` (in proportion to tokens), `temperature:T`, `unimax:TOKENS:EPOCHS`, the output
            folder of `hf-doge learn` or `estimate`, a folder or Hub name of an artifact, or a JSON or YAML file of weights.
        domains (`Mapping[str, Mapping[str, int]]`): What there is to train on, from [`describe_blocks`].

    Raises:
        `FileNotFoundError`: if there is no such folder, file or repository.
        `ValueError`: if the weights are of other domains.
    """
    if spec == "uniform":
        return DomainWeights.uniform(domains)
    if spec == "natural":
        return DomainWeights.natural(domains)
    rule, _, values = spec.partition(":")
    if rule in ("temperature", "unimax") and values:
        return _weigh_by_rule(rule, values.split(":"), domains)
    path = Path(spec)
    if path.is_file():
        weights = DomainWeights.from_file(path)
    else:
        learned = path / "domain_weights"
        weights = DomainWeights.from_pretrained(learned if learned.is_dir() else spec)
    if set(weights.mean) != set(domains):
        raise ValueError(
            f"The weights must be of the domains to train on, {sorted(domains)}, but {spec!r} is of "
            f"{sorted(weights.mean)}. Choose the domains with `--domains` and `--target`."
        )
    return DomainWeights.from_mapping({name: weights.mean[name] for name in domains}, domains=domains)


def _weigh_by_rule(rule: str, values: list[str], domains: Mapping[str, Mapping[str, int]]) -> DomainWeights:
    try:
        if rule == "temperature":
            (temperature,) = map(float, values)
            return DomainWeights.from_temperature(domains, temperature=temperature)
        num_tokens, max_epochs = map(float, values)
        return DomainWeights.unimax(domains, num_tokens=int(num_tokens), max_epochs=max_epochs)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"A mixture by rule is `temperature:T` or `unimax:TOKENS:EPOCHS`, but {rule}:{':'.join(values)} is not one that "
            f"can be computed: {error}"
        ) from error
