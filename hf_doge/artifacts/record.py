"""The numbers of domain weights and how they came about, step by step; nothing of files."""

import math
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from hf_doge.checks import (
    check_count,
    check_json,
    check_mapping,
    check_names,
    check_number,
    check_ratios,
    check_same_domains,
    check_simplex,
    show,
)
from hf_doge.text import printable

# Shapes: T = recorded steps, K = domains.

_SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "domain": pa.string(),
        "weight": pa.float64(),
        "score": pa.float64(),
        "loss": pa.float64(),
        "learning_rate": pa.float64(),
    }
)
_MU = pa.field("mu", pa.float64())
_WEIGHTS_SCHEMA = pa.schema(
    {
        "domain": pa.string(),
        "weight": pa.float64(),
        "last_weight": pa.float64(),
        "natural_proportion": pa.float64(),
        "num_rows": pa.int64(),
        "num_tokens": pa.int64(),
    }
)


@dataclass(eq=False)
class Trajectory:
    """
    Weights, scores and losses of every domain at every recorded step.

    Args:
        domains (`Sequence[str]` of length `K`): Names, each once; the order of the columns below.
        steps (`numpy.ndarray` of shape `(T,)`, int64): Optimizer steps, increasing; at least one.
        learning_rates (`numpy.ndarray` of shape `(T,)`, float64): Learning rate of the model at each step.
        weights (`numpy.ndarray` of shape `(T, K)`, float64):
            Domain weights after the step's update; finite, as an absent domain keeps its share.
        scores (`numpy.ndarray` of shape `(T, K)`, float64):
            Generalization scores that the update used; NaN where a domain was absent.
        losses (`numpy.ndarray` of shape `(T, K)`, float64):
            Mean loss of each domain; NaN where it was absent.
        mus (`numpy.ndarray` of shape `(T,)`, float64, *optional*): The coefficient `mu` in force, where it was not one for all.

    Raises:
        ValueError: A shape does not fit, a name is empty or repeated, there is no step, steps do not increase, a weight is not finite, a `mu` is not above 0.
    """

    domains: Sequence[str]
    steps: np.ndarray
    learning_rates: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    losses: np.ndarray
    mus: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.domains = check_names(self.domains)
        self.steps = np.asarray(self.steps, dtype=np.int64)
        if self.steps.ndim != 1 or len(self.steps) == 0 or (np.diff(self.steps) <= 0).any():
            raise ValueError(
                "`steps` must be a flat array of at least one step, increasing, but got"
                f" {np.array2string(self.steps, threshold=8)}. Where nothing was recorded, leave the trajectory out."
            )
        shape = (len(self.steps), len(self.domains))
        for name in self._arrays[1:]:
            expected = shape[:1] if name in ("learning_rates", "mus") else shape
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.shape != expected:
                raise ValueError(
                    f"`{name}` must have the shape {expected} of {shape[0]} steps and {shape[1]} domains, but has {values.shape}."
                )
            setattr(self, name, values)
        for step, domain in np.argwhere(~np.isfinite(self.weights)):
            raise ValueError(
                f"`weights` must be finite, but domain {self.domains[domain]!r} has {self.weights[step, domain]} at step {self.steps[step]}. "
                "A domain that was absent keeps its share."
            )
        if self.mus is not None and not (np.isfinite(self.mus) & (self.mus > 0)).all():
            raise ValueError(f"`mus` must be above 0 and finite, but got {np.array2string(self.mus, threshold=8)}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return (self.domains, self._arrays) == (other.domains, other._arrays) and all(
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=True) for name in self._arrays
        )

    @property
    def _arrays(self) -> tuple[str, ...]:
        return ("steps", "learning_rates", "weights", "scores", "losses", *(() if self.mus is None else ("mus",)))

    def to_table(self) -> pa.Table:
        """
        The trajectory as a long table, one row for each step and domain.

        Returns:
            `pyarrow.Table` of `T * K` rows: step, domain, weight, score, loss, learning_rate, and mu where it was not one for all.
        """
        num_steps, num_domains = self.weights.shape
        columns = {
            "step": np.repeat(self.steps, num_domains),
            "domain": pa.array(self.domains).take(pa.array(np.tile(np.arange(num_domains), num_steps))),
            "weight": self.weights.ravel(),
            "score": self.scores.ravel(),
            "loss": self.losses.ravel(),
            "learning_rate": np.repeat(self.learning_rates, num_domains),
        }
        table = pa.table(columns, schema=_SCHEMA)
        return table if self.mus is None else table.append_column(_MU, pa.array(np.repeat(self.mus, num_domains)))

    @classmethod
    def from_table(cls, table: pa.Table) -> "Trajectory":
        """
        Read what [`~Trajectory.to_table`] gives, its rows in any order.

        Raises:
            ValueError: A column is missing or of another kind, or a step lacks a domain or has it twice.
        """
        schema = _SCHEMA.append(_MU) if _MU.name in table.column_names else _SCHEMA
        try:
            table = table.select(schema.names).cast(schema)
        except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            expected = ", ".join(f"{field.name} ({field.type})" for field in schema)
            got = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
            raise ValueError(
                f"A trajectory must have the columns {expected}, but got {printable(got)}: {printable(error)}"
            ) from error
        if table.column("step").null_count or table.column("domain").null_count:
            raise ValueError("Each row of a trajectory must have a step and a domain, but some have null.")
        names = table.column("domain").combine_chunks().dictionary_encode()
        domains, column = names.dictionary.to_pylist(), names.indices.to_numpy(zero_copy_only=False)
        steps, row = np.unique(table.column("step").to_numpy(), return_inverse=True)
        shape = (len(steps), len(domains))
        counts = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1])
        if (counts != 1).any():
            step, domain = divmod(int(np.argmax(counts != 1)), shape[1])
            raise ValueError(
                "A trajectory must have each domain once at each step, but domain"
                f" {domains[domain]!r} is there {counts[step * shape[1] + domain]} times at step {steps[step]}."
            )

        def wide(name: str) -> np.ndarray:
            values = np.empty(shape)
            values[row, column] = table.column(name).to_numpy()
            return values

        rates, *mus = (wide(name)[:, 0] if domains else np.empty(0) for name in schema.names[5:])
        return cls(domains, steps, rates, wide("weight"), wide("score"), wide("loss"), *mus)


class WeightsRecord:
    """
    Domain weights as numbers, checked, with what follows from them. Files, cards and plots know this class alone;
    [`DomainWeights`] is the same with ways to save, load, push and plot, and tells of the arguments and attributes.
    """

    def __init__(
        self,
        mean: Mapping[str, float],
        *,
        last: Mapping[str, float] | None = None,
        trajectory: Trajectory | None = None,
        recipe: Mapping[str, Any] | None = None,
        domains: Mapping[str, Mapping[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.mean = check_simplex("mean", mean)
        self.last = dict(self.mean)
        if last is not None:
            check_mapping("last", last)
            check_same_domains("last", last, self.mean)
            self.last = check_simplex("last", {name: last[name] for name in self.mean})
        if trajectory is not None:
            if not isinstance(trajectory, Trajectory):
                raise ValueError(f"`trajectory` must be a `Trajectory`, but got {show(trajectory)}.")
            check_same_domains("trajectory", trajectory.domains, self.mean)
        self.trajectory = trajectory
        if domains is not None:
            check_mapping("domains", domains)
            check_same_domains("domains", domains, self.mean)
        known = {name: check_mapping(f"domains[{name!r}]", (domains or {}).get(name, {})) for name in self.mean}
        self.domains = check_json("domains", known)
        self.recipe = check_json("recipe", check_mapping("recipe", recipe, optional=True) or {})
        self.metadata = check_json("metadata", check_mapping("metadata", metadata, optional=True) or {})
        self.unknown_keys: dict[str, Any] = {}
        for name, facts in self.domains.items():
            for key in ("num_rows", "num_tokens"):
                count = facts.get(key)
                if count is not None and (
                    isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**63
                ):
                    raise ValueError(f"`{key}` of domain {name!r} must be an integer >= 0, but got {count!r}.")

    @classmethod
    def from_mapping(
        cls,
        ratios: Mapping[str, float],
        *,
        recipe: Mapping[str, Any] | None = None,
        domains: Mapping[str, Mapping[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """
        Weights in the given ratios, whatever they sum to: `{"wiki": 3, "web": 1}` is `{"wiki": 0.75, "web": 0.25}`.

        Raises:
            ValueError: A ratio is negative or not finite, or all are 0.
        """
        checked = check_ratios("ratios", ratios)
        total = math.fsum(checked.values())
        mean = {name: ratio / total for name, ratio in checked.items()}
        return cls(mean, recipe=recipe, domains=domains, metadata=metadata)

    @classmethod
    def uniform(cls, domains: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> Self:
        """The same weight for every domain: of these names, or of a mapping as in [`~DomainWeights.domains`]."""
        names = check_names(domains)
        known = domains if isinstance(domains, Mapping) else None
        return cls.from_mapping(dict.fromkeys(names, 1.0), recipe={"name": "uniform"}, domains=known)

    @classmethod
    def natural(cls, domains: Mapping[str, Mapping[str, Any]]) -> Self:
        """
        Weights in proportion to the tokens each domain has: what plain training on all the data amounts to.

        Args:
            domains (`Mapping[str, Mapping]`): As in [`~DomainWeights.domains`], with `num_tokens` for every domain.

        Raises:
            ValueError: A domain lacks `num_tokens`, or none has a token.
        """
        tokens = _known_tokens(domains, "Natural weights")
        return cls.from_mapping(tokens, recipe={"name": "natural", "unit": "tokens"}, domains=domains)

    @classmethod
    def from_temperature(cls, domains: Mapping[str, Mapping[str, Any]], *, temperature: float) -> Self:
        """
        Weights in proportion to `num_tokens ** (1 / temperature)`: natural at 1, nearer to uniform the higher it is.

        Args:
            domains (`Mapping[str, Mapping]`): As in [`~DomainWeights.domains`], with `num_tokens` for every domain.
            temperature (`float`): Positive.

        Raises:
            ValueError: A domain lacks `num_tokens`, none has a token, or the temperature is not positive and finite.
        """
        temperature = check_number("temperature", temperature, above=0)
        tokens = _known_tokens(domains, "Weights by temperature")
        most = max(tokens.values())
        ratios = {name: (count / most) ** (1 / temperature) if count else 0.0 for name, count in tokens.items()}
        return cls.from_mapping(
            ratios, recipe={"name": "temperature", "temperature": temperature, "unit": "tokens"}, domains=domains
        )

    @classmethod
    def unimax(cls, domains: Mapping[str, Mapping[str, Any]], *, num_tokens: int, max_epochs: float) -> Self:
        """
        Equal parts, except that no domain is read more than `max_epochs` times within a budget of `num_tokens`: what a
        small domain cannot take goes to the others in equal parts (UniMax, https://huggingface.co/papers/2304.09151).

        Args:
            domains (`Mapping[str, Mapping]`): As in [`~DomainWeights.domains`], with `num_tokens` for every domain.
            num_tokens (`int`): Tokens of the whole training, at least 1.
            max_epochs (`float`): Positive.

        Raises:
            ValueError: A domain lacks `num_tokens`, or all of them together cannot fill the budget.
        """
        tokens = _known_tokens(domains, "UniMax weights")
        num_tokens, max_epochs = check_count("num_tokens", num_tokens), check_number("max_epochs", max_epochs, above=0)
        if max_epochs * sum(tokens.values()) < num_tokens:
            raise ValueError(
                f"{max_epochs} epochs of {sum(tokens.values())} tokens must fill the budget of {num_tokens} tokens, but do "
                "not. Raise `max_epochs` or lower `num_tokens`."
            )
        left, shares = float(num_tokens), {}
        by_size = sorted(tokens, key=lambda name: tokens[name])
        for position, name in enumerate(by_size):
            shares[name] = min(left / (len(by_size) - position), max_epochs * tokens[name])
            left -= shares[name]
        recipe = {"name": "unimax", "num_tokens": num_tokens, "max_epochs": max_epochs, "unit": "tokens"}
        return cls.from_mapping({name: shares[name] for name in tokens}, recipe=recipe, domains=domains)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains, in order."""
        return tuple(self.mean)

    @property
    def unit(self) -> str | None:
        """What the weights are shares of as they were found, `"examples"` or `"tokens"`; `None` where it is not known."""
        unit = self.recipe.get("unit")
        return unit if unit in ("examples", "tokens") else None

    @property
    def entropy(self) -> float:
        """Entropy of the mean weights in nats, from 0 (one domain only) to [`~DomainWeights.max_entropy`] (uniform)."""
        return -math.fsum(weight * math.log(weight) for weight in self.mean.values() if weight > 0)

    @property
    def max_entropy(self) -> float:
        """Entropy of uniform weights over as many domains, in nats."""
        return math.log(len(self.mean))

    @property
    def natural_proportions(self) -> dict[str, float] | None:
        """Share of each domain in all tokens; `None` unless every domain's `num_tokens` is known and one is positive."""
        tokens = {name: facts.get("num_tokens") for name, facts in self.domains.items()}
        if None in tokens.values() or not any(tokens.values()):
            return None
        total = sum(tokens.values())
        return {name: count / total for name, count in tokens.items()}

    def expected_epochs(self, num_tokens: int) -> dict[str, float]:
        """
        How often each domain is repeated when `num_tokens` tokens are drawn by `mean`, in sequences that are equally long
        in all domains. DoGE does not price repetition, so look here before giving a small domain a large weight.

        Raises:
            ValueError: `num_tokens` is negative, or a domain of positive weight has no known token.
        """
        tokens = check_number("num_tokens", num_tokens, least=0)
        available = {name: facts.get("num_tokens") for name, facts in self.domains.items()}
        unknown = [name for name, weight in self.mean.items() if weight > 0 and not available[name]]
        if unknown:
            raise ValueError(
                f"Domains of positive weight must have `num_tokens` > 0, but {unknown} have {[available[n] for n in unknown]}."
            )
        return {n: weight * tokens / available[n] if weight > 0 else 0.0 for n, weight in self.mean.items()}

    def to_table(self) -> pa.Table:
        """One row for each domain; null where a number is not known."""
        natural = self.natural_proportions or {}
        rows = [
            {
                "domain": name,
                "weight": self.mean[name],
                "last_weight": self.last[name],
                "natural_proportion": natural.get(name),
                "num_rows": self.domains[name].get("num_rows"),
                "num_tokens": self.domains[name].get("num_tokens"),
            }
            for name in self.names
        ]
        return pa.Table.from_pylist(rows, schema=_WEIGHTS_SCHEMA)

    def __getitem__(self, domain: str) -> float:
        """The mean weight of a domain."""
        return self.mean[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self.mean)

    def __len__(self) -> int:
        return len(self.mean)

    def keys(self) -> KeysView[str]:
        """The domains: `dict(weights)` is a copy of `mean`."""
        return self.mean.keys()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightsRecord):
            return NotImplemented
        return vars(self) == vars(other)

    def __repr__(self) -> str:
        heaviest = sorted(self.mean.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name}: {weight:.4f}" for name, weight in heaviest[:8])
        return f"{type(self).__name__}({shown}{f', and {len(heaviest) - 8} more' if len(heaviest) > 8 else ''})"


def _known_tokens(domains: Mapping[str, Mapping[str, Any]], which: str) -> dict[str, int]:
    for name, facts in check_mapping("domains", domains).items():
        check_mapping(f"domains[{name!r}]", facts)
    unknown = [name for name, facts in domains.items() if facts.get("num_tokens") is None]
    if unknown:
        raise ValueError(f"{which} need `num_tokens` of every domain, but domains {unknown} have none.")
    return {name: facts["num_tokens"] for name, facts in domains.items()}
