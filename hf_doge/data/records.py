"""The rows of a mixture's data sets by domain, as `datasets.load_dataset` reads them."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from hf_doge.checks import show
from hf_doge.data.mixture import BUILDERS, FORMATS, DatasetConfig, MixtureConfig
from hf_doge.sampling.domains import DomainIndex
from hf_doge.sampling.lengths import is_list

# What a row can hold, as trl's SFTTrainer names it; where a row has columns of more than one kind, the first counts.
KINDS = (("messages",), ("prompt", "completion"), ("text",))
_HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Records:
    """
    The rows of one domain.

    Attributes:
        name (`str`): The domain.
        config (`DatasetConfig`): What they were read from.
        divided (`tuple[Dataset, Dataset]`, *optional*): Train and validation rows, where they are part of a data set that a
            column divides. By default they are read when they are first asked for.
        folder (`Path`, *optional*): Where relative paths are looked for besides the working directory.
    """

    name: str
    config: DatasetConfig
    divided: tuple[Dataset, Dataset] | None = field(default=None, repr=False)
    folder: Path | None = None

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        """
        Rows to train on and to evaluate on.

        Raises:
            FileNotFoundError: There is no such file, folder or data set.
            ValueError: It cannot be read, is empty, or lacks a column. Names it.
        """
        config = self.config
        if self.divided is not None:
            train, validation = self.divided
        elif config.validation_split is not None:
            train, validation = self.train, _load(config, config.validation_split, self.folder)
        else:
            train, validation = _hold_out(_load(config, config.split, self.folder), config, f"Data set {self.name!r}")
        return {"train": train, "validation": validation}

    @cached_property
    def train(self) -> Dataset:
        """Rows to train on, as in `splits`; a split to evaluate on is not read for them."""
        if self.divided is None and self.config.validation_split is not None:
            return _load(self.config, self.config.split, self.folder)
        return self.splits["train"]

    @cached_property
    def kind(self) -> tuple[str, ...]:
        """The columns that are trained on, one of [`KINDS`]."""
        return find_kind(self.train, f"Data set {self.name!r}")

    @property
    def masks(self) -> tuple[str, ...]:
        """Which tokens alone have a loss, as [`~hf_doge.tracing.encoding.Encoding`] names them; all if it is empty."""
        masks: tuple[str, ...] = ()
        if self.kind == ("prompt", "completion") and self.config.completion_only_loss:
            masks += ("completion",)
        if self.config.assistant_only_loss:
            if not self.is_chat:
                raise ValueError(
                    f"`assistant_only_loss` needs messages, but data set {self.name!r} holds texts in "
                    f"{' and '.join(map(repr, self.kind))}. Leave it out, or give the messages."
                )
            masks += ("assistant",)
        return masks

    @property
    def is_chat(self) -> bool:
        """Whether rows hold messages, so that a chat template is needed."""
        return not _is_text(self.train, self.kind[0])

    def documents(self) -> Iterator[str]:
        """The texts of the train rows, without any template."""
        for row in self.train.select_columns(list(self.kind)):
            yield readable(row, self.kind)


def readable(row: Mapping[str, Any], kind: tuple[str, ...]) -> str:
    """What a person reads of a row."""
    parts = [row[name] for name in kind]
    texts = [
        part if isinstance(part, str) else "\n".join(_spoken(one.get("content")) for one in part or ())
        for part in parts
    ]
    return "".join(texts) if isinstance(parts[0], str) else "\n".join(texts)


def _spoken(content: Any) -> str:
    """The text of a message's content: of its parts, where it is a list of texts, pictures and others."""
    parts = content if isinstance(content, list) else [content]
    return "".join(str((part.get("text") if isinstance(part, Mapping) else part) or "") for part in parts)


def find_kind(dataset: Dataset, what: str) -> tuple[str, ...]:
    """
    Which columns of a data set are trained on.

    Raises:
        ValueError: It has none of them, or they hold something else. Names `what`.
    """
    columns = dataset.column_names
    kind = next((one for one in KINDS if set(one) <= set(columns)), None)
    if kind is None:
        raise ValueError(
            f"{what} must have a column `text`, `messages`, or both `prompt` and `completion`, but its columns are {columns}. "
            "Rename one in the mixture, as in `columns: {text: body}`."
        )
    texts = [_is_text(dataset, name) for name in kind]
    chats = [is_list(dataset.data.schema.field(name).type) for name in kind]
    if not (all(texts) and kind != ("messages",)) and not (all(chats) and kind != ("text",)):
        wanted = {"text": "texts", "messages": "lists of messages"}.get(kind[0], "texts, or lists of messages")
        raise ValueError(
            f"{what} must hold {wanted} in {' and '.join(map(repr, kind))}, but holds "
            f"{', '.join(show(dataset.features[name]) for name in kind)}."
        )
    return kind


def _is_text(dataset: Dataset, column: str) -> bool:
    return getattr(dataset.features[column], "dtype", None) in ("string", "large_string")


def open_mixture(mixture: MixtureConfig, *, train_only: bool = False) -> dict[str, Records]:
    """
    The domains of a mixture, in its order; those of a column in alphabetical order.

    Data sets without a `domain_column` are read when their rows are first asked for.

    Args:
        mixture ([`MixtureConfig`]): The data sets.
        train_only (`bool`): Whether domains need no rows to evaluate on.

    Raises:
        ValueError: A domain is there twice, or what [`Records.splits`] raises.
    """
    found: dict[str, Records] = {}
    for config in mixture.datasets:
        if config.domain_column is None:
            assert config.domain is not None  # the mixture names each
            parts = [Records(config.domain, config, folder=mixture.folder)]
        else:
            parts = list(_divide(config, mixture.folder, train_only=train_only))
        for part in parts:
            if part.name in found:
                raise ValueError(
                    f"Every domain must be there once, but {part.name!r} is in {config.path!r} and in "
                    f"{found[part.name].config.path!r}. Rename one."
                )
            found[part.name] = part
    return found


def _divide(config: DatasetConfig, folder: Path | None, *, train_only: bool) -> Iterator[Records]:
    """One domain for each value of the domain column. Rows are held out of each domain alike."""
    column = config.domain_column
    assert column is not None
    train, is_held_out = _load(config, config.split, folder), config.validation_split is None
    given: dict[str, Dataset] = {}
    if config.validation_split is not None and not train_only:
        given = _by_domain(_load(config, config.validation_split, folder), column)
    for name, rows in _by_domain(train, column).items():
        if is_held_out:
            yield Records(name, config, divided=_hold_out(rows, config, f"Domain {name!r}"))
        elif train_only or name in given:
            yield Records(name, config, divided=(rows, given.get(name, rows.select([]))))
        else:
            raise ValueError(
                f"Every domain must have rows to evaluate on, but {name!r} has none in the split {config.validation_split!r} "
                f"of {config.path!r}. Leave out `validation_split` to hold some out."
            )


def _by_domain(dataset: Dataset, column: str) -> dict[str, Dataset]:
    index = DomainIndex.from_labels(dataset[column])
    parts = {}
    for number, (name, size) in enumerate(zip(index.names, index.sizes.tolist(), strict=True)):
        if size > 0:
            parts[name] = dataset.select(index.rows(np.full(size, number), np.arange(size)))
    return parts


def _hold_out(rows: Dataset, config: DatasetConfig, what: str) -> tuple[Dataset, Dataset]:
    """Rows drawn at random, from a seed of their own, that no run is trained on."""
    try:
        parts = rows.train_test_split(test_size=config.test_split_size, seed=_HELD_OUT_SEED)
    except ValueError as error:
        raise ValueError(
            f"{what} must have rows to train on and {config.test_split_size} of them to hold out, but it has {len(rows)}. Name a "
            "`validation_split`, or change `test_split_size`."
        ) from error
    return parts["train"], parts["test"]


def _load(config: DatasetConfig, split: str, folder: Path | None) -> Dataset:
    """The rows of a split with the columns that are kept."""
    what = f"Data set {config.domain or config.path!r}"
    options = _place(config, folder)
    try:
        dataset = _read(config, split, options)
        dataset = _keep_columns(dataset, config, what)
        if isinstance(dataset, IterableDataset):
            dataset = Dataset.from_list(list(dataset.take(config.max_examples)), features=dataset.features)
    except (DatasetsError, OSError, ValueError, StopIteration, pa.ArrowException) as error:
        if isinstance(error, ValueError) and str(error).startswith(what):
            raise
        reason = error.__cause__ or error
        text = str(reason) or "it is empty"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{what} ({config.path!r}, split {split!r}) must be readable, but it is not: {text}") from error
    if config.max_examples is not None:
        dataset = dataset.select(range(min(config.max_examples, len(dataset))))
    if len(dataset) == 0:
        raise ValueError(f"{what} must have rows, but its split {split!r} is empty. Leave it out or fill it.")
    return dataset


def _read(config: DatasetConfig, split: str, options: dict[str, Any]) -> Dataset | IterableDataset:
    folder = Path(options["path"])
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # of `save_to_disk`
        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"it has the splits {list(saved)}, but no {split!r}")
            saved = saved[split]
        return saved.to_iterable_dataset() if config.streaming else saved
    if folder.is_dir() and glob.escape(str(folder)) != str(folder):
        raise ValueError(
            "`datasets` takes a name with * ? or [ for a pattern and reads the folders that fit it. Rename the folder, or name"
            " the builder as `path` and the files as `data_files`"
        )
    return load_dataset(**options, split=split, streaming=bool(config.streaming))


def _keep_columns(dataset: Dataset | IterableDataset, config: DatasetConfig, what: str) -> Dataset | IterableDataset:
    """
    The columns of the configuration under their new names, and the domain column.

    Raises:
        ValueError: One is missing. Names it and what there is.
    """
    names = dataset.column_names
    if names is None:  # a stream that tells its columns with its first row only
        names = list(next(iter(dataset), {}))
    kept = config.columns
    wanted = [*(kept or {}).values(), *([config.domain_column] if config.domain_column else [])]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{what} must have the column {missing[0]!r}, but its columns are {names}. Correct the name.")
    if kept is None:
        return dataset
    dataset = dataset.select_columns(list(dict.fromkeys(wanted)))
    renamed = {theirs: ours for ours, theirs in kept.items() if theirs != ours}
    if config.domain_column in renamed:
        raise ValueError(f"{what} must keep the name of its `domain_column`, but {config.domain_column!r} is renamed.")
    return dataset.rename_columns(renamed) if renamed else dataset


def _place(config: DatasetConfig, folder: Path | None) -> dict[str, Any]:
    """
    What `load_dataset` is called with: the builder of a file, the folder, or a name on the Hub.

    Raises:
        FileNotFoundError: What looks like a path is none.
        ValueError: A file has an ending that no builder reads.
    """
    options = {"path": config.path, "name": config.name, "data_dir": config.data_dir, "revision": config.revision}
    if config.path in BUILDERS:
        return {**options, "data_files": _resolve(config.data_files, folder)}
    place = Path(config.path)
    if folder is not None and not place.exists() and (folder / place).exists():
        place = folder / place
    if place.is_dir():
        return {**options, "path": str(place), "data_files": config.data_files}
    ending = next((one for one in FORMATS if config.path.lower().endswith(one)), None)
    if place.is_file():
        if ending is None:
            raise ValueError(
                f"Files of a data set must end in one of {', '.join(FORMATS)}, but got {config.path!r}. Convert it, or name the "
                "builder as `path` and the file as `data_files`."
            )
        return {**options, "path": FORMATS[ending], "data_files": _literal(place.name, place.parent)}
    if ending is not None or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise FileNotFoundError(
            f"Data set {config.domain or config.path!r} must be a file, a folder or a name on the Hub, but there is no "
            f"{config.path!r}. Check the path."
        )
    return {**options, "data_files": config.data_files}


def _resolve(files: Any, folder: Path | None) -> Any:
    """Paths that the working directory lacks, in the folder of the mixture if they are there; a file's name is no pattern."""
    if isinstance(files, Mapping):
        return {split: _resolve(one, folder) for split, one in files.items()}
    if isinstance(files, list):
        return [_resolve(one, folder) for one in files]
    if files is None or "://" in files:
        return files
    folders = [Path()] if folder is None or Path(files).is_absolute() else [Path(), folder]
    for one in folders:
        if (one / files).is_file():
            return _literal(files, one)
    found = next((one for one in folders[1:] if any(one.glob(files)) and not any(Path().glob(files))), None)
    return files if found is None else f"{glob.escape(str(found))}/{files}"


def _literal(file: str, folder: Path) -> str:
    """A file of a folder as `datasets` takes it, which reads `a1` for `a[1]` and several files for `a?`."""
    place = str(folder / file)
    whole = str(Path(place).absolute())
    return place if glob.escape(whole) == whole else glob.escape(whole)
