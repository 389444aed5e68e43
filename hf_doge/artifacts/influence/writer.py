"""
Writing an influence index.

```
config.json                             everything about the index, with the sha256 of every file
README.md                               makes `load_dataset(folder, "gradients" | "examples" | "checkpoints")` work
examples/train-*.parquet                one row for each training example
checkpoints/train-*.parquet             one row for each checkpoint
gradients/<checkpoint>/segment-*.parquet    the gradient rows of a range of examples, sorted by token
offsets/<checkpoint>/segment-*.parquet      where in that file the rows of each token lie
gradients/<checkpoint>.partial/         a checkpoint that is not whole yet, with a journal of the segments of each process
```
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from hf_doge._version import __version__
from hf_doge.artifacts.checks import require_json
from hf_doge.artifacts.files import replace_files, require_own_folder, sha256
from hf_doge.artifacts.influence.card import renewed_card
from hf_doge.artifacts.influence.checkpoint_writer import PARTIAL, CheckpointWriter
from hf_doge.artifacts.influence.encoding import projection_matrix, projection_sha256, recorded_projection
from hf_doge.artifacts.influence.examples import ordered_examples
from hf_doge.artifacts.influence.lock import WriterLock
from hf_doge.artifacts.influence.manifest import (
    CHECKPOINT_FACTS,
    CHECKPOINTS_FILE,
    DTYPES,
    EXAMPLES_FILE,
    FORMAT_VERSION,
    GRADIENTS,
    MANIFEST,
    OFFSETS,
    SETTINGS,
    file_sha256,
    read_config,
    to_json,
    write_atomically,
)
from hf_doge.artifacts.influence.tables import read_table, to_parquet

_CHECKPOINTS_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "step": pa.int64(),
        "epoch": pa.float64(),
        "learning_rate": pa.float64(),
        "path": pa.string(),
        "revision": pa.string(),
        "model_class": pa.string(),
        "fingerprint": pa.string(),
    }
)
_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class IndexWriter:
    """
    Opens a new folder for an influence index, or continues one of the same configuration. No other process can write it
    until [`~IndexWriter.close`]; in this process, a writer that is opened later for the same folder takes its place.

    Args:
        folder (`str` or `os.PathLike`): New, empty, or an influence index.
        width (`int`): Width of the embedding matrix.
        vocabulary_size (`int`): Its number of rows.
        num_examples (`int`): Training examples, numbered from 0.
        dtype (`str`):
            `"float16"` (times a power of two for each segment, so that tiny gradients stay), `"float32"` or `"int8"`
            (with a float32 scale for each row).
        projection_width (`int`, *optional*): Store rows projected to this width at random; not when left out.
        projection_seed (`int`): Seed of the projection, the same for all rows and later queries.
        max_segment_bytes (`int`):
            Rows, in float32, that are gathered before they are written. Memory is bounded by about five times this.
        settings (`Mapping`, *optional*): What config.json says of how the rows were made, see `SETTINGS` in
            `hf_doge.artifacts.influence.manifest`.

    Attributes:
        folder (`Path`).
        config (`dict`): The content of config.json.

    Raises:
        ValueError: An argument is out of range, or the index in the folder has another configuration; the message names
            what differs.
        FileExistsError: The folder holds something else.
        BlockingIOError: Another process is writing the index.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        width: int,
        vocabulary_size: int,
        num_examples: int,
        dtype: str = "float16",
        projection_width: int | None = None,
        projection_seed: int = 0,
        max_segment_bytes: int = 64 * 2**20,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {
            "width": width,
            "vocabulary_size": vocabulary_size,
            "num_examples": num_examples,
            "max_segment_bytes": max_segment_bytes,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer >= 1, but got {value!r}.")
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {list(DTYPES)}, but got {dtype!r}.")
        if projection_width is not None and not 1 <= projection_width <= width:
            raise ValueError(f"`projection_width` must be in [1, {width}], but got {projection_width!r}.")
        unknown = sorted(set(settings or {}) - set(SETTINGS))
        if unknown:
            raise ValueError(f"`settings` must be among {list(SETTINGS)}, but got {unknown}.")
        self.folder = Path(folder)
        self.max_segment_bytes = max_segment_bytes
        self._projection: Tensor | None = None
        projection = None
        if projection_width is not None:
            self._projection = projection_matrix(width, projection_width, projection_seed)
            checksum = projection_sha256(self._projection)
            projection = {"width": projection_width, "seed": projection_seed, "sha256": checksum}
        asked = {
            "width": width,
            "stored_width": projection_width or width,
            "dtype": dtype,
            "projection": projection,
            "vocabulary_size": vocabulary_size,
            "num_examples": num_examples,
            **require_json("settings", {**SETTINGS, **(settings or {})}),
        }
        require_own_folder(self.folder, manifest=MANIFEST, subfolders=("examples", "checkpoints", GRADIENTS, OFFSETS))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ticket = object()  # not the writer itself, which nobody but its user should keep alive
        self._lock: WriterLock | None = WriterLock.take(self.folder, self._ticket)  # `None` of one that joined
        try:
            if (self.folder / MANIFEST).exists():
                self.config = self._continued(asked)
            else:
                versions = {"format_version": FORMAT_VERSION, "hf_doge_version": __version__}
                self.config = {**versions, **asked, "checkpoints": [], "files": {}}
                self._replace(self.config, {})
        except BaseException:
            self.close()
            raise

    @classmethod
    def join(cls, folder: str | os.PathLike, *, max_segment_bytes: int) -> "IndexWriter":
        """
        The index that another process has opened, to write parts of its checkpoints: [`~IndexWriter.checkpoint_part`].

        The other keeps the index from being written by anybody else; here, [`~IndexWriter.close`] does nothing.

        Args:
            folder (`str` or `os.PathLike`), max_segment_bytes (`int`): As the other has them.

        Raises:
            FileNotFoundError: There is no index.
        """
        writer = cls.__new__(cls)
        writer.folder, writer.max_segment_bytes = Path(folder), max_segment_bytes
        writer.config = read_config(writer.folder)
        writer._lock = None
        writer._projection = None if writer.config["projection"] is None else recorded_projection(writer.config)
        return writer

    def _continued(self, asked: dict[str, Any]) -> dict[str, Any]:
        config = read_config(self.folder)
        differing = [
            f"`{key}` is {config.get(key)!r:.200}, not {value!r:.200}"
            for key, value in asked.items()
            if key != "metadata" and config.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"The influence index in {str(self.folder)!r} has another configuration: {'; '.join(differing)}."
                " Continue it with the same, or choose another folder."
            )
        return config

    def close(self) -> None:
        """Let other processes write the index. What is not finished is continued by a new writer."""
        if self._lock is not None:
            self._lock.release(self._ticket)

    def require_open(self) -> None:
        """
        Raises:
            ValueError: The writer was closed, or the index was opened for writing again, and may be another by now.
        """
        if self._lock is not None and self._lock.holder is not self._ticket:
            raise ValueError(
                f"The index in {str(self.folder)!r} was closed, or opened anew since. Continue it by a new `IndexWriter`."
            )

    @property
    def checkpoint_names(self) -> list[str]:
        """Names of the checkpoints that are whole."""
        return [checkpoint["name"] for checkpoint in self.config["checkpoints"]]

    def project(self, rows: Tensor) -> Tensor:
        """The shared random projection, `(n, width) -> (n, stored_width)`; `rows` themselves without one."""
        return rows if self._projection is None else rows @ self._projection.to(rows.dtype)

    def write_examples(self, table: pa.Table) -> None:
        """
        Write what is to be known of the training examples, once, before the first checkpoint.

        Args:
            table (`pyarrow.Table`):
                `example_id` (integers), each of `0 ... num_examples - 1` once, and any other columns: text, label,
                `content_hash`.

        Raises:
            ValueError: An example is missing or repeats, or the index has other examples already.
        """
        table = ordered_examples(table, self.config["num_examples"])
        path = self.folder / EXAMPLES_FILE
        recorded = self.config["files"].get(EXAMPLES_FILE)
        if recorded is not None and path.is_file() and file_sha256(path) == recorded:
            same = read_table(path).equals(table)  # the bytes may differ with the version of pyarrow
        else:
            content = to_parquet(table)
            same = recorded in (None, sha256(content))
            if same:
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, content)
                self._replace({**self.config, "files": {**self.config["files"], EXAMPLES_FILE: sha256(content)}}, {})
        if not same:
            raise ValueError(
                f"The influence index in {str(self.folder)!r} has other examples already. Continue it with the dataset"
                " it was begun with, or choose another folder."
            )

    def checkpoint(
        self,
        name: str,
        *,
        step: int,
        epoch: float | None,
        learning_rate: float,
        path: str | os.PathLike,
        revision: str | None = None,
        model_class: str,
        fingerprint: str,
        borders: Sequence[int] | None = None,
    ) -> CheckpointWriter:
        """
        Begin a checkpoint, or continue an interrupted one: if all arguments agree with its own; else it starts anew.

        Args:
            name (`str`): Letters, digits, `.`, `_` and `-`; a folder gets this name.
            step, epoch: When in training it was.
            learning_rate (`float`): In force then, `>= 0`.
            path (`str` or `os.PathLike`), revision (`str`, *optional*): Where the model can be loaded from.
            model_class (`str`), fingerprint (`str`): Which model that must be.
            borders (`Sequence[int]`, *optional*): Examples that a segment begins with, however full the one before is.
                With the same borders any number of processes writes the same files, in any order of their ranges.

        Raises:
            ValueError: It is whole already, or an argument cannot be kept; or there are no examples yet.
        """
        if not name or set(name) - _NAME_CHARACTERS or name.startswith(".") or name.endswith(PARTIAL):
            raise ValueError(
                f"The name of a checkpoint must be of letters, digits, '.', '_' and '-', not begin with '.' and not end"
                f" with {PARTIAL!r}, but got {name!r}."
            )
        if name in self.checkpoint_names:
            raise ValueError(
                f"Checkpoint {name!r} is in {str(self.folder)!r} already, and whole. Record it under another name, or"
                " in another folder."
            )
        if EXAMPLES_FILE not in self.config["files"]:
            raise ValueError("The examples must come before the first checkpoint. Call `write_examples`.")
        if not learning_rate >= 0:
            raise ValueError(f"`learning_rate` must be at least 0, but got {learning_rate!r}.")
        values = (name, step, epoch, learning_rate, str(path), revision, model_class, fingerprint)
        self.require_open()
        facts = require_json("checkpoint", dict(zip(CHECKPOINT_FACTS, values, strict=True)))
        return CheckpointWriter(self, facts, position=len(self.config["checkpoints"]), borders=borders)

    def checkpoint_part(self, facts: Mapping[str, Any], *, part: int, borders: Sequence[int] = ()) -> CheckpointWriter:
        """
        To write some ranges of a checkpoint that another process has begun, and will finish.

        Args:
            facts (`Mapping`): The other's `CheckpointWriter.facts`.
            part (`int`): At least 1, and no other process's.
            borders (`Sequence[int]`): The other's.
        """
        facts = dict(facts)
        return CheckpointWriter(self, facts, position=facts.pop("position"), borders=borders, part=part)

    def _register(self, checkpoint: dict[str, Any], *, position: int) -> None:
        """The moment at which a checkpoint begins to exist."""
        if position != len(self.config["checkpoints"]):
            raise ValueError(
                "Checkpoints must be written one after the other, but two were open. Write this one again."
            )
        self._replace_checkpoints([*self.config["checkpoints"], checkpoint])

    def forget(self, name: str) -> None:
        """
        Remove a whole checkpoint and those written after it, which a run that was set back makes again.

        Args:
            name (`str`): One of `checkpoint_names`.
        """
        self.require_open()
        position = self.checkpoint_names.index(name)
        forgotten = self.checkpoint_names[position:]
        self._replace_checkpoints(self.config["checkpoints"][:position])
        for name in forgotten:
            for place in (GRADIENTS, OFFSETS):
                shutil.rmtree(self.folder / place / name, ignore_errors=True)

    def _replace_checkpoints(self, checkpoints: list[dict[str, Any]]) -> None:
        table = checkpoints_table(checkpoints)
        files = {**self.config["files"], CHECKPOINTS_FILE: sha256(table)}
        config = {**self.config, "checkpoints": checkpoints, "files": files}
        written = {CHECKPOINTS_FILE: table}
        self._replace(config, {**written, **renewed_card(self.folder, config, written)})

    def _replace(self, config: dict[str, Any], files: dict[str, bytes]) -> None:
        assert self._lock is not None, "only the writer that opened the index changes what all of them read"
        self.require_open()
        replace_files(self.folder, {**files, MANIFEST: to_json(config)}, manifest=MANIFEST)
        self.config = config


def checkpoints_table(checkpoints: Sequence[Mapping[str, Any]]) -> bytes:
    """The table of the checkpoints, in Parquet: the facts that config.json has of each."""
    rows = [{key: entry[key] for key in CHECKPOINT_FACTS} for entry in checkpoints]
    return to_parquet(pa.Table.from_pylist(rows, schema=_CHECKPOINTS_SCHEMA))
