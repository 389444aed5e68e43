"""Adding examples to a whole index: further files for each checkpoint, which all begin to exist at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from hf_doge.artifacts.influence.checkpoint_writer import CheckpointWriter
from hf_doge.artifacts.influence.examples import read_examples, same_examples
from hf_doge.artifacts.influence.manifest import added_examples_file
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
    done: dict[str, tuple[CheckpointWriter, list[dict[str, Any]]]] = field(default_factory=dict)
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

    def config(self) -> dict[str, Any]:
        """The content of config.json with the new examples."""
        files = {**self.present["files"], added_examples_file(self.present["num_examples"]): self.examples_sha256}
        checkpoints = [{**entry, "files": self.done[entry["name"]][1]} for entry in self.present["checkpoints"]]
        return {
            **self.present,
            "num_examples": self.num_examples,
            "dataset": self.dataset,
            "checkpoints": checkpoints,
            "files": files,
        }


def _columns(schema: pa.Schema) -> str:
    return printable(", ".join(f"{field.name} ({field.type})" for field in schema))
