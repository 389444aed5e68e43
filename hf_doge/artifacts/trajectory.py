"""How the domain weights came about, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from hf_doge.checks import check_names
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

    Raises:
        ValueError: A shape does not fit, a name is empty or repeated, there is no step, steps do not increase, or a
            weight is not finite.
    """

    domains: Sequence[str]
    steps: np.ndarray
    learning_rates: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        self.domains = check_names(self.domains)
        self.steps = np.asarray(self.steps, dtype=np.int64)
        if self.steps.ndim != 1 or len(self.steps) == 0 or (np.diff(self.steps) <= 0).any():
            raise ValueError(
                "`steps` must be a flat array of at least one step, increasing, but got"
                f" {np.array2string(self.steps, threshold=8)}. Where nothing was recorded, leave the trajectory out."
            )
        shape = (len(self.steps), len(self.domains))
        for name in ("learning_rates", "weights", "scores", "losses"):
            expected = shape[:1] if name == "learning_rates" else shape
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.shape != expected:
                raise ValueError(
                    f"`{name}` must have the shape {expected} of {shape[0]} steps and {shape[1]} domains, but has"
                    f" {values.shape}."
                )
            setattr(self, name, values)
        for step, domain in np.argwhere(~np.isfinite(self.weights)):
            raise ValueError(
                f"`weights` must be finite, but domain {self.domains[domain]!r} has {self.weights[step, domain]} at step"
                f" {self.steps[step]}. A domain that was absent keeps its share."
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        arrays = ("steps", "learning_rates", "weights", "scores", "losses")
        return self.domains == other.domains and all(
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=True) for name in arrays
        )

    def to_table(self) -> pa.Table:
        """
        The trajectory as a long table, one row for each step and domain.

        Returns:
            `pyarrow.Table` of `T * K` rows: step, domain, weight, score, loss, learning_rate.
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
        return pa.table(columns, schema=_SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> "Trajectory":
        """
        Read what [`~Trajectory.to_table`] gives, its rows in any order.

        Raises:
            ValueError: A column is missing or of another kind, or a step lacks a domain or has it twice.
        """
        try:
            table = table.select(_SCHEMA.names).cast(_SCHEMA)
        except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            expected = ", ".join(f"{field.name} ({field.type})" for field in _SCHEMA)
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

        learning_rates = wide("learning_rate")[:, 0] if domains else np.empty(0)
        return cls(domains, steps, learning_rates, wide("weight"), wide("score"), wide("loss"))
