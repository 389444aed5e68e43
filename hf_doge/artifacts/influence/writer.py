"""
Writing an influence index.

```
config.json                             everything about the index, with the sha256 of every file
README.md                               makes `load_dataset(folder, "gradients" | "examples" | "checkpoints")` work
examples/train-*.parquet                one row for each training example
checkpoints/train-*.parquet             one row for each checkpoint
gradients/<checkpoint>/segment-*.parquet    the gradient rows of a range of examples, sorted by token
offsets/<checkpoint>/segment-*.parquet      where in that file the rows of each token lie
gradients/<checkpoint>/<number>/        of the examples that were added later, from this number on; offsets too
gradients/<checkpoint>.partial/         a checkpoint that is not whole yet, with a journal of the segments of each process
```
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from hf_doge._version import __version__
from hf_doge.artifacts.influence.card import renewed_card
from hf_doge.artifacts.influence.checkpoint_writer import PARTIAL, CheckpointWriter
from hf_doge.artifacts.influence.examples import ordered_examples, read_examples, same_examples
from hf_doge.artifacts.influence.growth import Growth
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
    checkpoint_number,
    example_dtype,
    examples_files,
    first_added_example,
    next_checkpoint_number,
    ordered_checkpoints,
    read_config,
    require_checkpoints,
    to_json,
)
from hf_doge.artifacts.influence.segments import projection_matrix, projection_sha256, recorded_projection
from hf_doge.artifacts.parquet import to_parquet
from hf_doge.checks import LARGEST_RATE, check_choice, check_count, check_json, check_number, check_path, check_seed
from hf_doge.files import (
    STAGED_PREFIX,
    replace_files,
    require_own_folder,
    sha256,
    write_atomically,
)

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
        add_examples (`bool`):
            Add examples to a whole index: `num_examples` counts them too, and its first ones are those of the index. Then
            [`~IndexWriter.write_examples`], and [`~IndexWriter.checkpoint`] for each checkpoint that the index has,
            take what is new; with the last of them it all appears at once. No file changes but config.json and README.md.

    Attributes:
        folder (`Path`).
        config (`dict`): The content of config.json.
        first_example, num_examples (`int`): Which examples are written: all, or those that are added, up to all.

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
        add_examples: bool = False,
    ) -> None:
        width = check_count("width", width)
        vocabulary_size = check_count("vocabulary_size", vocabulary_size)
        num_examples = check_count("num_examples", num_examples)
        max_segment_bytes = check_count("max_segment_bytes", max_segment_bytes)
        check_choice("dtype", dtype, DTYPES)
        projection_width = check_count("projection_width", projection_width, most=width, optional=True)
        projection_seed = check_seed("projection_seed", projection_seed)
        unknown = sorted(set(settings or {}) - set(SETTINGS))
        if unknown:
            raise ValueError(f"`settings` must be among {list(SETTINGS)}, but got {unknown}.")
        self.folder = Path(check_path("folder", folder))
        self.max_segment_bytes = max_segment_bytes
        self.first_example, self.num_examples = 0, num_examples
        self._growth: Growth | None = None
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
            **check_json("settings", {**SETTINGS, **(settings or {})}),
        }
        if add_examples:
            read_config(self.folder)  # there must be one
        require_own_folder(self.folder, manifest=MANIFEST, subfolders=("examples", "checkpoints", GRADIENTS, OFFSETS))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ticket = object()  # not the writer itself, which nobody but its user should keep alive
        self._lock: WriterLock | None = WriterLock.take(self.folder, self._ticket)  # `None` of one that joined
        try:
            if add_examples:
                self.config = self._to_grow(asked)
            elif (self.folder / MANIFEST).exists():
                self.config = self._continued(asked)
            else:
                versions = {"format_version": FORMAT_VERSION, "hf_doge_version": __version__}
                self.config = {**versions, **asked, "checkpoints": [], "files": {}}
                self._replace(self.config, {})
            if self.config["checkpoints"] and any(self.folder.glob(f"{STAGED_PREFIX}*")):
                self._replace_checkpoints(self.config["checkpoints"])  # README.md was interrupted behind config.json
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
        writer._projection = None if writer.config["projection"] is None else recorded_projection(writer.config)
        return writer

    def _to_grow(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The index as it is, which is to have the examples and the dataset that `asked` tells of."""
        present = read_config(self.folder)
        require_checkpoints(present, str(self.folder))
        first, count = present["num_examples"], asked["num_examples"]
        if count < first:
            raise ValueError(
                f"To add examples all must be given, first those of the index, then the new ones, but the index in"
                f" {str(self.folder)!r} has {first} already and {count} were given."
            )
        if example_dtype(present) != example_dtype(asked):
            raise ValueError(f"An index of {first} examples keeps their ids in 32 bits: it cannot grow to {count}.")
        # Of weights that were saved nobody can tell whether they were trained; the index knows.
        if count == first:
            return self._continued(asked, but=("virtual",))
        config = self._continued(asked, but=("virtual", "num_examples", "dataset"))
        self.first_example = first
        self._growth = Growth(config, num_examples=count, dataset=asked["dataset"])
        return config

    def _continued(self, asked: dict[str, Any], *, but: Sequence[str] = ()) -> dict[str, Any]:
        config = read_config(self.folder)
        differing = [
            f"`{key}` is {config.get(key)!r:.200}, not {value!r:.200}"
            for key, value in asked.items()
            if key not in ("metadata", *but) and _lasting(config.get(key)) != _lasting(value)
        ]
        if differing:
            raise ValueError(
                f"The influence index in {str(self.folder)!r} has another configuration: {'; '.join(differing)}."
                " Continue it with the same, or choose another folder."
                + (
                    " To add the examples behind those it has, pass `add_examples=True` (`hf-doge index --add_examples`)."
                    if asked["num_examples"] > config["num_examples"] and config["checkpoints"] and not but
                    else ""
                )
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

    def has_whole(self, name: str) -> bool:
        """Whether a checkpoint is whole, with the examples that are being added, if any are."""
        return name in self.checkpoint_names and (self._growth is None or name in self._growth.done)

    def require_grown(self) -> None:
        """
        Raises:
            ValueError: Examples are being added, and not all checkpoints have them, so that they do not show yet.
        """
        if self._growth is not None:
            missing = [name for name in self.checkpoint_names if name not in self._growth.done]
            raise ValueError(
                f"The new examples show when all checkpoints of {str(self.folder)!r} have them, but {missing} have not. Add"
                " them there too; the others are kept."
            )

    def project(self, rows: Tensor) -> Tensor:
        """The shared random projection, `(n, width) -> (n, stored_width)`; `rows` themselves without one."""
        return rows if self._projection is None else rows @ self._projection.to(rows.dtype)

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
            return
        recorded = {path: checksum for path, checksum in examples_files(self.config).items() if checksum is not None}
        present = [(self.folder / path).is_file() for path in recorded]
        if recorded and all(present) and all(sha256(self.folder / path) == recorded[path] for path in recorded):
            # The bytes of the files may differ with the version of pyarrow.
            same = same_examples(table, read_examples(self.folder, self.config))
        else:
            contents = _example_contents(table, list(recorded) or [EXAMPLES_FILE])
            checksums = {path: sha256(content) for path, content in contents.items()}
            same = not recorded or recorded == checksums
            if same:
                (self.folder / EXAMPLES_FILE).parent.mkdir(exist_ok=True)
                for path, content in contents.items():
                    write_atomically(self.folder / path, content)
                self._replace({**self.config, "files": {**self.config["files"], **checksums}}, {})
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
        second_moments: str | None = None,
        dtypes: Mapping[str, Any] | None = None,
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
            second_moments (`str`, *optional*): Fingerprint of Adam's second moments, where rows are divided by them.
            dtypes (`Mapping`, *optional*): In which dtypes to load the model, where that is not as it was saved.
            borders (`Sequence[int]`, *optional*): Examples that a segment begins with, however full the one before is.
                With the same borders any number of processes writes the same files, in any order of their ranges.

        Raises:
            ValueError: It is whole already, or an argument cannot be kept; or there are no examples yet.
        """
        self.require_open()
        if not name or set(name) - _NAME_CHARACTERS or name.startswith(".") or name.endswith(PARTIAL):
            raise ValueError(
                f"The name of a checkpoint must be of letters, digits, '.', '_' and '-', not begin with '.' and not end"
                f" with {PARTIAL!r}, but got {name!r}."
            )
        if self._growth is not None:
            return self._checkpoint_to_grow(self._growth, name, fingerprint, second_moments, borders=borders)
        if name in self.checkpoint_names:
            raise ValueError(
                f"Checkpoint {name!r} is in {str(self.folder)!r} already, and whole. Record it under another name, or"
                " in another folder."
            )
        if EXAMPLES_FILE not in self.config["files"]:
            raise ValueError("The examples must come before the first checkpoint. Call `write_examples`.")
        learning_rate = check_number("learning_rate", learning_rate, least=0, most=LARGEST_RATE)
        values = (name, step, epoch, learning_rate, str(path), revision, model_class, fingerprint)
        facts = dict(zip(CHECKPOINT_FACTS, values, strict=True))
        optional = {"second_moments": second_moments, "dtypes": dtypes}
        facts |= {key: value for key, value in optional.items() if value is not None}
        facts = check_json("checkpoint", facts)
        number = next_checkpoint_number(self.config["checkpoints"])
        return CheckpointWriter(self, facts, position=number, borders=borders)

    def _checkpoint_to_grow(
        self,
        growth: Growth,
        name: str,
        fingerprint: str,
        second_moments: str | None,
        *,
        borders: Sequence[int] | None,
    ) -> CheckpointWriter:
        """A checkpoint of the index, to be given the rows of the examples that are added."""
        if name not in self.checkpoint_names:
            raise ValueError(
                f"Examples are added at the checkpoints of the index, {self.checkpoint_names}, but got {name!r}. Add the"
                " checkpoint afterwards."
            )
        if name in growth.done:
            raise ValueError(f"Checkpoint {name!r} has the new examples already. Go on with the others.")
        if growth.examples_sha256 is None:
            raise ValueError("The examples must come before the first checkpoint. Call `write_examples`.")
        place = self.checkpoint_names.index(name)
        entry, position = self.config["checkpoints"][place], checkpoint_number(self.config["checkpoints"], place)
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
        facts = {key: entry[key] for key in CHECKPOINT_FACTS} | {"added_examples": growth.examples_sha256}
        if second_moments is not None:
            facts["second_moments"] = second_moments
        return CheckpointWriter(self, facts, position=position, borders=borders)

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

    def take_over(self, checkpoint: CheckpointWriter, segments: Sequence[dict[str, Any]]) -> None:
        """
        Take a checkpoint that has all examples. What is new begins to exist here.

        Args:
            checkpoint (`CheckpointWriter`): Whose [`~CheckpointWriter.finish`] calls this.
            segments (`Sequence[dict]`): By ascending example.
        """
        facts, position = dict(checkpoint.facts), checkpoint.facts["position"]
        del facts["position"]
        if self._growth is not None:
            before = self.config["checkpoints"][self.checkpoint_names.index(facts["name"])]["files"]
            self._growth.done[facts["name"]] = (checkpoint, checkpoint.files(before, segments))
            if len(self._growth.done) == len(self.config["checkpoints"]):
                self._finish_growth(self._growth)
            return
        if position != next_checkpoint_number(self.config["checkpoints"]):
            raise ValueError(
                "Checkpoints must be written one after the other, but two were open. Write this one again."
            )
        files = checkpoint.files((), segments)
        checkpoint.settle()
        entries = [*self.config["checkpoints"], {**facts, "number": position, "files": files}]
        self._replace_checkpoints(ordered_checkpoints(entries))
        checkpoint.clean()

    def _finish_growth(self, growth: Growth) -> None:
        """All checkpoints have the new examples: let them appear in one step."""
        for checkpoint, _ in growth.done.values():
            checkpoint.settle()
        self._replace_all(growth.config())
        for checkpoint, _ in growth.done.values():
            checkpoint.clean()
        self.first_example, self._growth = 0, None

    def forget(self, name: str) -> None:
        """
        Remove a whole checkpoint and those of later steps, which a run that was set back makes again.

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
        self._replace_all({**self.config, "checkpoints": checkpoints})

    def _replace_all(self, config: dict[str, Any]) -> None:
        """Put another config.json in place, with the table of the checkpoints and the card that go with it."""
        table = checkpoints_table(config["checkpoints"])
        config = {**config, "files": {**config["files"], CHECKPOINTS_FILE: sha256(table)}}
        written = {CHECKPOINTS_FILE: table}
        self._replace(config, {**written, **renewed_card(self.folder, config, written)})

    def _replace(self, config: dict[str, Any], files: dict[str, bytes]) -> None:
        assert self._lock is not None, "only the writer that opened the index changes what all of them read"
        self.require_open()
        replace_files(self.folder, {**files, MANIFEST: to_json(config)}, manifest=MANIFEST)
        self.config = config


def _lasting(setting: Any) -> Any:
    """A setting without the name of what it describes: the same tokenizer may be loaded from another place."""
    return {key: value for key, value in setting.items() if key != "name"} if isinstance(setting, dict) else setting


def _example_contents(table: pa.Table, paths: Sequence[str]) -> dict[str, bytes]:
    """The files of all examples: those of an index that was made at once, and those that were added later."""
    starts = [0, *(first_added_example(path) for path in paths[1:]), len(table)]
    return {
        path: to_parquet(table.slice(first, last - first))
        for path, (first, last) in zip(paths, pairwise(starts), strict=True)
    }


def checkpoints_table(checkpoints: Sequence[Mapping[str, Any]]) -> bytes:
    """
    The table of the checkpoints, in Parquet: the facts that config.json has of each, by ascending step.

    Where their rows do not name them by their place in it, it has what they say in a column `checkpoint`.
    """
    rows = [{key: entry[key] for key in CHECKPOINT_FACTS} for entry in checkpoints]
    table = pa.Table.from_pylist(rows, schema=_CHECKPOINTS_SCHEMA)
    if any("number" in entry for entry in checkpoints):
        numbers = [checkpoint_number(checkpoints, place) for place in range(len(checkpoints))]
        table = table.append_column("checkpoint", pa.array(numbers, pa.int32()))
    return to_parquet(table)
