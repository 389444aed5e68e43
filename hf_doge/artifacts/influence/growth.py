"""Adding examples to a whole index: further files for each checkpoint, which all begin to exist at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from hf_doge.artifacts.influence.checkpoint_writer import CheckpointWriter
from hf_doge.artifacts.influence.examples import read_examples, same_examples
from hf_doge.artifacts.influence.manifest import (
    CHECKPOINT_FACTS,
    added_examples_file,
    checkpoint_number,
    example_dtype,
    require_checkpoints,
    require_same,
)
from hf_doge.artifacts.parquet import as_stored, to_parquet
from hf_doge.files import sha256, write_atomically
from hf_doge.text import printable


@dataclass
class Growth:
    """
    What an index will have when all its checkpoints have the new examples.

    Attributes:
        present (`Mapping`): The content of config.json until then.
        num_examples (`int`): All, with the new ones.
        dataset (`Any`): What config.json will say of the dataset.
        done (`dict`): Checkpoint -> its writer, and its files as config.json will name them.
        examples_sha256 (`str`, *optional*): Of the file of the new examples, once it is written.
    """

    present: Mapping[str, Any]
    num_examples: int
    dataset: Any
    done: dict[str, tuple[CheckpointWriter, dict[str, Any]]] = field(default_factory=dict)
    examples_sha256: str | None = None

    def write_examples(self, folder: Path, table: pa.Table) -> None:
        """
        Write those of the examples that are new.

        Args:
            folder (`Path`): Of the index.
            table (`pyarrow.Table`): All, by ascending `example_id`.

        Raises:
            ValueError: It does not begin with the examples of the index.
        """
        first = self.present["num_examples"]
        old, again, new = read_examples(folder, self.present), table.slice(0, first), table.slice(first)
        schema = as_stored(table.slice(0, 0)).schema
        if old.schema != schema:
            raise ValueError(
                f"Examples that are added must have the columns of the index in {str(folder)!r}, {_columns(old.schema)}, but"
                f" have {_columns(schema)}. Give the dataset that it was made of, with the new examples behind the others."
            )
        if not same_examples(again, old):
            raise ValueError(
                f"The dataset must begin with the {first} examples of the index in {str(folder)!r}, in their order, but it"
                " has others. Put the new examples behind those that the index was made of."
            )
        content = to_parquet(new)
        write_atomically(folder / added_examples_file(first), content)
        self.examples_sha256 = sha256(content)

    def facts_of(self, name: str, *, fingerprint: str, second_moments: str | None) -> dict[str, Any]:
        """
        What tells a checkpoint of the index, to be given the rows of the new examples, from others.

        Raises:
            ValueError: The index has no such checkpoint, or it has the new examples already, or it was recorded with other
                weights or second moments; or there are no examples yet.
        """
        names = [entry["name"] for entry in self.present["checkpoints"]]
        if name not in names:
            raise ValueError(
                f"Examples are added at the checkpoints of the index, {names}, but got {name!r}. Add the checkpoint"
                " afterwards."
            )
        if name in self.done:
            raise ValueError(f"Checkpoint {name!r} has the new examples already. Go on with the others.")
        if self.examples_sha256 is None:
            raise ValueError("The examples must come before the first checkpoint. Call `write_examples`.")
        place = names.index(name)
        entry, position = self.present["checkpoints"][place], checkpoint_number(self.present["checkpoints"], place)
        if fingerprint != entry["fingerprint"]:
            raise ValueError(
                f"Checkpoint {name!r} was recorded with other weights: their fingerprint is"
                f" {str(entry['fingerprint'])[:12]}, not {fingerprint[:12]}. Bring the recorded checkpoint back, in the dtype"
                " of its training."
            )
        recorded = entry.get("second_moments", second_moments)  # older indices do not tell
        if second_moments != recorded:
            raise ValueError(
                f"Checkpoint {name!r} was recorded with other second moments of Adam: their fingerprint is"
                f" {str(recorded)[:12]}, not {str(second_moments)[:12]}. Bring the optimizer.pt of the recorded checkpoint"
                " back."
            )
        # What an earlier attempt has left counts if it was of the same examples.
        facts = {key: entry[key] for key in CHECKPOINT_FACTS} | {"added_examples": self.examples_sha256}
        if second_moments is not None:
            facts["second_moments"] = second_moments
        return {**facts, "position": position}

    def take(self, checkpoint: CheckpointWriter, segments: Sequence[dict[str, Any]]) -> None:
        """Note the segments of a checkpoint that has the new examples."""
        name = checkpoint.facts["name"]
        before = next(entry for entry in self.present["checkpoints"] if entry["name"] == name)
        self.done[name] = checkpoint, checkpoint.entry(before, segments)

    def missing(self) -> list[str]:
        """The checkpoints that have not got the new examples yet."""
        return [entry["name"] for entry in self.present["checkpoints"] if entry["name"] not in self.done]

    def config(self) -> dict[str, Any]:
        """The content of config.json with the new examples."""
        files = {**self.present["files"], added_examples_file(self.present["num_examples"]): self.examples_sha256}
        checkpoints = [{**entry, **self.done[entry["name"]][1]} for entry in self.present["checkpoints"]]
        return {
            **self.present,
            "num_examples": self.num_examples,
            "dataset": self.dataset,
            "checkpoints": checkpoints,
            "files": files,
        }


def begin_growth(folder: Path, present: Mapping[str, Any], asked: Mapping[str, Any]) -> Growth | None:
    """
    The examples that an index is to get.

    Args:
        folder (`Path`): Of the index.
        present (`Mapping`): What its config.json says.
        asked (`Mapping`): What it would say of a new one of all examples.

    Returns:
        [`Growth`], *optional*: nothing where the index has all of them.

    Raises:
        ValueError: It has no checkpoint yet, more examples, or another configuration.
    """
    require_checkpoints(present, str(folder))
    first, count = present["num_examples"], asked["num_examples"]
    if count < first:
        raise ValueError(
            f"To add examples all must be given, first those of the index, then the new ones, but the index in"
            f" {str(folder)!r} has {first} already and {count} were given."
        )
    if example_dtype(present) != example_dtype(asked):
        raise ValueError(f"An index of {first} examples keeps their ids in 32 bits: it cannot grow to {count}.")
    # Of weights that were saved nobody can tell whether they were trained; the index knows.
    more = ("num_examples", "dataset") if count > first else ()
    require_same(present, asked, folder=folder, but=("virtual", *more))
    return Growth(present, num_examples=count, dataset=asked["dataset"]) if count > first else None


def _columns(schema: pa.Schema) -> str:
    return printable(", ".join(f"{field.name} ({field.type})" for field in schema))
