"""
Writing an influence index.

```
config.json                             everything about the index, with the sha256 of every file
README.md                               makes `load_dataset(folder, "gradients" | "examples" | "checkpoints")` work
examples/train-*.parquet                one row for each training example
checkpoints/train-*.parquet             one row for each checkpoint
gradients/<checkpoint>/segment-*.parquet    the gradient rows of a range of examples, sorted by token
offsets/<checkpoint>/segment-*.parquet      where in that file the rows of each token lie
metric/<checkpoint>/tokens.parquet      in the optimizer's metric: what the rows of each token were divided by
basis/<checkpoint>/basis.parquet        with `projection="pca"`: the principal components that rows are projected to
gradients/<checkpoint>/<number>/        of the examples that were added later, from this number on; the others too
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
from hf_doge.artifacts.cards.card import card_bytes, read_card
from hf_doge.artifacts.cards.index import index_card
from hf_doge.artifacts.influence.checkpoint_writer import JOURNALS, CheckpointWriter
from hf_doge.artifacts.influence.examples import ordered_examples, store_examples
from hf_doge.artifacts.influence.fitted_writer import FittedCheckpointWriter
from hf_doge.artifacts.influence.growth import Growth, begin_growth
from hf_doge.artifacts.influence.lock import WriterLock
from hf_doge.artifacts.influence.manifest import (
    CARD_FILE,
    CHECKPOINT_FACTS,
    CHECKPOINT_FOLDERS,
    CHECKPOINTS_FILE,
    DTYPES,
    EXAMPLES_FILE,
    MANIFEST,
    PROJECTIONS,
    SETTINGS,
    TABLE_FOLDERS,
    check_checkpoint_name,
    checkpoint_folders,
    checkpoints_table,
    embedding_shape,
    example_dtype,
    fits_basis,
    next_checkpoint_number,
    ordered_checkpoints,
    read_config,
    require_same,
)
from hf_doge.artifacts.influence.metric import Divisors, version_of, with_metric
from hf_doge.artifacts.influence.open_index import Heartbeat
from hf_doge.artifacts.influence.segments import describe_projection, recorded_projection
from hf_doge.checks import LARGEST_RATE, check_choice, check_count, check_json, check_number, check_path, check_seed
from hf_doge.files import STAGED_PREFIX, replace_files, require_own_folder, sha256, to_json


class IndexWriter:
    """
    Opens a new folder for an influence index, or continues one of the same configuration. No other process can write it
    until [`~IndexWriter.close`]; in this process, a writer that is opened later for the same folder takes its place.

    Args:
        folder (`str` or `os.PathLike`): New, empty, or an influence index.
        width (`int`): Of a row: of the embedding matrix, unless layers have rows and words have none.
        vocabulary_size (`int`): Its number of rows, and behind them those of layers (`layers` of the settings).
        num_examples (`int`): Training examples, numbered from 0.
        dtype (`str`):
            `"float16"` (times a power of two for each segment, so that tiny gradients stay), `"float32"` or `"int8"`
            (with a float32 scale for each row).
        projection_width (`int`, *optional*): Store rows projected to this width; not when left out.
        projection_seed (`int`): Seed of the projection, the same for all rows and later queries.
        projection (`str`): `"random"`, one for all; or `"pca"`: of each checkpoint its own, [`FittedCheckpointWriter.write_basis`].
        max_segment_bytes (`int`): Rows, in float32, gathered before they are written. Memory is bounded by about five times this.
        settings (`Mapping`, *optional*): What config.json says of how the rows were made, see `SETTINGS` in
            `hf_doge.artifacts.influence.manifest`.
        add_examples (`bool`):
            Add examples to a whole index: `num_examples` counts them too, and its first ones are those of the index. Then
            [`~IndexWriter.write_examples`], and [`~IndexWriter.checkpoint`] for each checkpoint that the index has,
            take what is new; with the last of them it all appears at once. No file changes but config.json and README.md.

    Attributes:
        folder (`Path`).
        config (`dict`): The content of config.json.
        first_example, num_examples (`int`): Which examples are written: all, or those that are added, up to all.
        projection (`torch.Tensor` of shape `(width, stored_width)`, *optional*): Of all rows, where it is random.
        fits_basis (`bool`): Whether each checkpoint has a projection of its own.

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
        projection: str = "random",
        max_segment_bytes: int = 64 * 2**20,
        settings: Mapping[str, Any] | None = None,
        add_examples: bool = False,
    ) -> None:
        width, vocabulary_size = check_count("width", width), check_count("vocabulary_size", vocabulary_size)
        num_examples = check_count("num_examples", num_examples)
        max_segment_bytes = check_count("max_segment_bytes", max_segment_bytes)
        check_choice("dtype", dtype, DTYPES)
        check_choice("projection", projection, PROJECTIONS)
        projection_width = check_count("projection_width", projection_width, most=width, optional=True)
        projection_seed = check_seed("projection_seed", projection_seed)
        if unknown := sorted(set(settings or {}) - set(SETTINGS)):
            raise ValueError(f"`settings` must be among {list(SETTINGS)}, but got {unknown}.")
        self.folder = Path(check_path("folder", folder))
        self.max_segment_bytes = max_segment_bytes
        self.first_example, self.num_examples = 0, num_examples
        self._growth: Growth | None = None
        asked = {
            "width": width,
            "stored_width": projection_width or width,
            "dtype": dtype,
            "projection": describe_projection(width, projection_width, projection_seed, kind=projection),
            "vocabulary_size": vocabulary_size,
            "num_examples": num_examples,
            **check_json("settings", {**SETTINGS, **(settings or {})}),
        }
        if add_examples:
            read_config(self.folder)  # there must be one
        require_own_folder(self.folder, manifest=MANIFEST, subfolders=TABLE_FOLDERS)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ticket = object()  # not the writer itself, which nobody but its user should keep alive
        self._lock: WriterLock | None = WriterLock.take(self.folder, self._ticket)  # `None` of one that joined
        try:
            if add_examples:
                self.config = read_config(self.folder)
                self._growth = begin_growth(self.folder, self.config, asked)
                self.first_example = 0 if self._growth is None else self.config["num_examples"]
            elif (self.folder / MANIFEST).exists():
                self.config = read_config(self.folder)
                require_same(self.config, asked, folder=self.folder)
            else:
                versions = {"format_version": version_of(asked), "hf_doge_version": __version__}
                self.config = {**versions, **asked, "checkpoints": [], "files": {}}
                self._replace(self.config, {})
            self._read_shapes()
            for place in checkpoint_folders(self.config):  # what a kill left when a checkpoint was whole
                for journal in (self.folder / place).glob(JOURNALS):
                    journal.unlink(missing_ok=True)
            if self.config["checkpoints"] and any(self.folder.glob(f"{STAGED_PREFIX}*")):
                self._replace_all(self.config)  # README.md was interrupted behind config.json
        except BaseException:
            self.close()
            raise

    @classmethod
    def join(
        cls, folder: str | os.PathLike, *, max_segment_bytes: int, num_examples: int | None = None
    ) -> "IndexWriter":
        """
        The index that another process has opened, to write parts of its checkpoints: [`~IndexWriter.checkpoint_part`].

        The other keeps the index from being written by anybody else; here, [`~IndexWriter.close`] does nothing.

        Args:
            folder (`str` or `os.PathLike`), max_segment_bytes (`int`): As the other has them.
            num_examples (`int`, *optional*): As the other has it, if it adds examples.

        Raises:
            FileNotFoundError: There is no index.
        """
        writer = cls.__new__(cls)
        writer.folder, writer.max_segment_bytes = Path(folder), max_segment_bytes
        writer.config = read_config(writer.folder)
        writer._lock = writer._growth = None
        present = writer.config["num_examples"]
        writer.num_examples = num_examples or present
        writer.first_example = present if writer.num_examples > present else 0
        writer._read_shapes()
        return writer

    def _read_shapes(self) -> None:
        self.projection, self.fits_basis = recorded_projection(self.config), fits_basis(self.config)
        self._embedding_shape, self.example_dtype = embedding_shape(self.config), example_dtype(self.config)
        self._make_writer: type[CheckpointWriter] = FittedCheckpointWriter if self.fits_basis else CheckpointWriter

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
                f"The index in {str(self.folder)!r} was closed, or opened again since. Continue it by a new `IndexWriter`."
            )

    @property
    def checkpoint_names(self) -> list[str]:
        """Names of the checkpoints that are whole."""
        return [checkpoint["name"] for checkpoint in self.config["checkpoints"]]

    def has_whole(self, name: str) -> bool:
        """Whether a checkpoint is whole, with the examples that are being added, if any are."""
        return name in self.checkpoint_names and (self._growth is None or name not in self._growth.missing())

    def require_grown(self) -> None:
        """
        Raises:
            ValueError: Examples are being added, and not all checkpoints have them, so that they do not show yet.
        """
        if self._growth is not None:
            raise ValueError(
                f"The new examples show when all checkpoints of {str(self.folder)!r} have them, but"
                f" {self._growth.missing()} have not. Add them there too; the others are kept."
            )

    def require_embeddings(self, matrix: Tensor, model_class: str) -> None:
        """
        Raises:
            ValueError: The embedding matrix of a model has another shape than that of the index.
        """
        expected, shape = self._embedding_shape, tuple(matrix.shape)
        if shape != expected:
            raise ValueError(
                f"All checkpoints of an index must have one shape of embeddings, {expected} here, but `{model_class}` has"
                f" {shape}. Embeddings that were resized in between need an index of their own: another folder."
            )

    def write_examples(self, table: pa.Table) -> None:
        """
        Write what is to be known of the training examples, once, before the first checkpoint.

        Args:
            table (`pyarrow.Table`):
                `example_id` (integers), each of `0 ... num_examples - 1` once, and any other columns: text, label,
                `content_hash`. When examples are added, those of the index must be the same as they are there.

        Raises:
            ValueError: An example is missing or repeats, or the index has other examples already.
        """
        self.require_open()
        table = ordered_examples(table, self.num_examples)
        if self._growth is not None:
            self._growth.write_examples(self.folder, table)
        elif checksums := store_examples(self.folder, self.config, table):
            self._replace({**self.config, "files": {**self.config["files"], **checksums}}, {})

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
        second_moments: str | None = None,
        dtypes: Mapping[str, Any] | None = None,
        borders: Sequence[int] | None = None,
    ) -> CheckpointWriter:
        """
        Begin a checkpoint, or continue an interrupted one: if all arguments agree with its own; else it starts again.

        Args:
            name (`str`): Letters, digits, `.`, `_` and `-`; a folder gets this name.
            step, epoch: When in training it was.
            learning_rate (`float`): In force then, `>= 0`.
            path (`str` or `os.PathLike`), revision (`str`, *optional*): Where the model can be loaded from.
            model_class (`str`), fingerprint (`str`): Which model that must be.
            second_moments (`str`, *optional*): Fingerprint of Adam's second moments, where rows are divided by them.
            dtypes (`Mapping`, *optional*): In which dtypes to load the model, where that is not as it was saved.
            borders (`Sequence[int]`, *optional*): Examples that a segment begins with, however full the one before is.
                With the same borders any number of processes writes the same files, in any order of their ranges.

        Raises:
            ValueError: It is whole already, or an argument cannot be kept; or there are no examples yet.
        """
        self.require_open()
        if self._growth is not None:
            facts = self._growth.facts_of(name, fingerprint=fingerprint, second_moments=second_moments)
            return self._make_writer(self, facts, borders=borders)
        if name in self.checkpoint_names:
            raise ValueError(
                f"Checkpoint {name!r} is in {str(self.folder)!r} already, and whole. Record it under another name, or"
                " in another folder."
            )
        if EXAMPLES_FILE not in self.config["files"]:
            raise ValueError("The examples must come before the first checkpoint. Call `write_examples`.")
        check_checkpoint_name(name)
        number = next_checkpoint_number(self.config["checkpoints"])
        learning_rate = check_number("learning_rate", learning_rate, least=0, most=LARGEST_RATE)
        values = (name, step, epoch, learning_rate, str(path), revision, model_class, fingerprint)
        facts = dict(zip(CHECKPOINT_FACTS, values, strict=True))
        optional = {"second_moments": second_moments, "dtypes": dtypes}
        facts |= {key: value for key, value in optional.items() if value is not None}
        return self._make_writer(self, {**check_json("checkpoint", facts), "position": number}, borders=borders)

    def checkpoint_part(self, facts: Mapping[str, Any], *, part: int, borders: Sequence[int] = ()) -> CheckpointWriter:
        """
        To write some ranges of a checkpoint that another process has begun, and will publish.

        Args:
            facts (`Mapping`): The other's `CheckpointWriter.facts`.
            part (`int`): At least 1, and no other process's.
            borders (`Sequence[int]`): The other's.
        """
        return self._make_writer(self, dict(facts), borders=borders, part=part)

    def decide_metric(self, metric: str, why: str | None = None) -> None:
        """Say in config.json in which metric the rows will be, and why. Before there is a checkpoint."""
        self._replace(with_metric(self.config, metric, why), {})

    def publish(
        self, checkpoint: CheckpointWriter, *, divisors: Divisors | None = None, heartbeat: Heartbeat = lambda: None
    ) -> None:
        """
        Make a checkpoint visible: what is new begins to exist here. When examples are added, the last checkpoint that gets
        them makes all of it visible.

        Args:
            checkpoint ([`CheckpointWriter`]): With all examples, its parts with theirs.
            divisors (`Callable`, *optional*): In the optimizer's metric: what the rows of tokens `(n,)` were divided by.
            heartbeat (`Callable`): Called every now and then.

        Raises:
            ValueError: As [`CheckpointWriter.finish`]; or another checkpoint was published since this one was begun.
        """
        segments = checkpoint.finish(divisors=divisors, heartbeat=heartbeat)
        facts = dict(checkpoint.facts)
        number = facts.pop("position")
        if self._growth is not None:
            self._growth.take(checkpoint, segments)
            if not self._growth.missing():
                self._publish_growth(self._growth)
            return
        if number != next_checkpoint_number(self.config["checkpoints"]):
            raise ValueError(
                "Checkpoints must be written one after the other, but two were open. Write this one again."
            )
        entry = {**facts, "number": number, **checkpoint.entry({}, segments)}
        checkpoint.settle()
        self._replace_all({**self.config, "checkpoints": [*self.config["checkpoints"], entry]})
        checkpoint.clean()

    def _publish_growth(self, growth: Growth) -> None:
        """All checkpoints have the new examples: let them appear in one step."""
        for checkpoint, _ in growth.done.values():
            checkpoint.settle()
        self._replace_all(growth.config())
        for checkpoint, _ in growth.done.values():
            checkpoint.clean()
        self.first_example, self._growth = 0, None

    def forget(self, name: str) -> None:
        """Remove a whole checkpoint and those of later steps, which a run that was set back makes again."""
        self.require_open()
        position = self.checkpoint_names.index(name)
        forgotten = self.checkpoint_names[position:]
        self._replace_all({**self.config, "checkpoints": self.config["checkpoints"][:position]})
        for name in forgotten:
            for place in CHECKPOINT_FOLDERS:
                shutil.rmtree(self.folder / place / name, ignore_errors=True)

    def _replace_all(self, config: dict[str, Any]) -> None:
        """Put another config.json in place, with the table of the checkpoints and the card that go with it."""
        checkpoints = ordered_checkpoints(config["checkpoints"])
        files = {CHECKPOINTS_FILE: checkpoints_table(checkpoints)}
        checksums = {**config["files"], CHECKPOINTS_FILE: sha256(files[CHECKPOINTS_FILE])}
        config = {**config, "checkpoints": checkpoints, "files": checksums}
        card = index_card(config, self.folder, files=files).merged_with(read_card(self.folder / CARD_FILE))
        self._replace(config, {**files, CARD_FILE: card_bytes(card)})

    def _replace(self, config: dict[str, Any], files: dict[str, bytes]) -> None:
        assert self._lock is not None, "only the writer that opened the index changes what all of them read"
        self.require_open()
        replace_files(self.folder, {**files, MANIFEST: to_json(config)}, manifest=MANIFEST)
        self.config = config
