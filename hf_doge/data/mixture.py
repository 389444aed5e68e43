"""
A mixture in YAML: which data sets there are, and how each is read.

The file has the shape of `DatasetMixtureConfig` of trl: a list `datasets`, whose entries have the keys that
`datasets.load_dataset` has, next to `streaming` and `test_split_size`. Ours are the names of the domains, their weights, the
validation split, limits, and which tokens have a loss:

```yaml
datasets:
  - path: data/chat.jsonl           # a file, a folder, a name on the Hub, or a builder (json, parquet, csv, arrow) with data_files
    domain: chat                    # default: from the path and the configuration
    assistant_only_loss: true
  - path: allenai/c4
    name: ca                        # the configuration
    split: train
    validation_split: validation    # default: `test_split_size` of the rows is held out
    columns: {text: body}           # columns to keep, as a list or renamed
    streaming: true
    max_examples: 10000             # rows read, from the start
  - path: data/pile.parquet
    domain_column: source           # every value of this column is a domain
test_split_size: 0.05
```
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from hf_doge.artifacts.readers import parse_yaml
from hf_doge.checks import check_count, check_flag, check_names, check_number, check_text, show
from hf_doge.data.domain_files import find_domain_files, select_domains
from hf_doge.text import parse_json

BUILDERS = ("json", "parquet", "csv", "arrow")
# File name endings, and which builder of `datasets` reads them.
FORMATS = {
    **{f".{name}{packed}": "json" for name in ("jsonl", "json", "ndjson") for packed in ("", ".gz", ".zst")},
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".arrow": "arrow",
}
HELD_OUT = 0.05

_HINTS = {
    "fraction": "Trl cuts data sets to `fraction`; here `weight` is the share by which a domain is drawn.",
    "config": "The configuration is called `name`, as `load_dataset` calls it; the domain is called `domain`.",
    "data_set": "The place of a data set is called `path`.",
    "dataset": "The place of a data set is called `path`.",
}


def _check_columns(name: str, value: Any) -> dict[str, str]:
    """Columns to keep, by the name that they get."""
    columns = {one: one for one in value} if isinstance(value, list) and all(map(_is_name, value)) else value
    if not isinstance(columns, Mapping) or not columns or not all(map(_is_name, (*columns, *columns.values()))):
        raise ValueError(
            f"`{name}` must be a list of columns to keep, or map the names they get to those they have, but got {show(value)}."
        )
    return dict(columns)


def _check_files(name: str, value: Any) -> Any:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    for one in values:
        for path in one if isinstance(one, list) else [one]:
            check_text(name, path, what="a path, a list of paths, or a map of splits to them")
    return value


def _check_held_out(name: str, value: Any) -> float | int:
    """A share or a number of rows, as `test_size` of `Dataset.train_test_split`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return check_count(name, value)
    return check_number(name, value, above=0, below=1)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_Check = Callable[[str, Any], Any]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(("path", "domain", "name", "data_dir", "split", "validation_split"), check_text),
    **dict.fromkeys(("revision", "domain_column"), check_text),
    **dict.fromkeys(("streaming", "completion_only_loss", "assistant_only_loss"), check_flag),
    "data_files": _check_files,
    "columns": _check_columns,
    "max_examples": check_count,
    "weight": partial(check_number, least=0),
    "test_split_size": _check_held_out,
}


@dataclass(frozen=True)
class DatasetConfig:
    """
    One data set of a mixture: what `load_dataset` needs to find it, and what becomes of its rows.

    Attributes:
        path (`str`): File, folder, name on the Hub, or builder (`json`, `parquet`, `csv`, `arrow`) with `data_files`.
        name (`str`, *optional*): Configuration of the data set.
        data_dir (`str`, *optional*): As `load_dataset` has it.
        data_files (`str`, `list` or `dict`, *optional*): As `load_dataset` has it.
        split (`str`): Split to train on.
        validation_split (`str`, *optional*): Split to evaluate on. Without it, `test_split_size` of the rows is held out.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        columns (`dict[str, str]`, *optional*): Columns to keep: the name each gets, and the one it has.
        domain (`str`, *optional*): Name of the domain. Default: see [`DatasetConfig.default_domain`].
        domain_column (`str`, *optional*): Column that names the domain of each row, instead of `domain`.
        weight (`float`, *optional*): Share by which the domain is drawn, `>= 0`; shares need not sum to 1.
        max_examples (`int`, *optional*): Rows read, from the start of the split.
        streaming (`bool`, *optional*): Read rows as they come, without the whole. Needs `max_examples`.
        completion_only_loss (`bool`): Of prompts and completions, only completions have a loss.
        assistant_only_loss (`bool`): Of messages, only the assistant's have a loss; the chat template must mark them.
        test_split_size (`float` or `int`): Share or number of rows that are held out.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list | dict | None = None
    split: str = "train"
    validation_split: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    domain: str | None = None
    domain_column: str | None = None
    weight: float | None = None
    max_examples: int | None = None
    streaming: bool | None = None
    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    test_split_size: float | int = HELD_OUT

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not one.default:
                object.__setattr__(self, one.name, _CHECKS[one.name](one.name, value))
        if self.domain_column is not None and (self.domain is not None or self.weight is not None):
            raise ValueError(
                f"A data set with a `domain_column` has many domains, so it must have neither `domain` nor `weight`, but that "
                f"of {self.path!r} has. Leave them out, and give weights as a file."
            )
        if self.streaming and self.max_examples is None:
            raise ValueError(
                f"A stream must end somewhere, but the data set {self.path!r} has no `max_examples`. Set how many rows are read."
            )
        if self.path in BUILDERS and self.data_files is None and self.data_dir is None:
            raise ValueError(f"`path` {self.path!r} names a format, so `data_files` must name the files. Add it.")

    @property
    def default_domain(self) -> str:
        """Name of the file, folder or repository, with that of the configuration, if there is one, behind it."""
        place = self.path
        if self.path in BUILDERS and isinstance(self.data_files, str):
            place = self.data_files
        stem = Path(place).name
        ending = next((one for one in sorted(FORMATS, key=len, reverse=True) if stem.endswith(one)), "")
        return "-".join(filter(None, (stem.removesuffix(ending) or place, self.name)))


@dataclass(frozen=True)
class MixtureConfig:
    """
    Data sets, each a domain or divided into domains by a column.

    Attributes:
        datasets (`tuple[DatasetConfig, ...]`): At least one; each without a `domain_column` has a `domain` of its own.
        folder (`Path`, *optional*): Where relative paths are looked for that the working directory does not have.

    Raises:
        ValueError: Two have one name, or only some have weights.
    """

    datasets: tuple[DatasetConfig, ...]
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("A mixture must hold data sets, but `datasets` is empty. List at least one.")
        named = tuple(
            one if one.domain_column is not None else replace(one, domain=one.domain or one.default_domain)
            for one in self.datasets
        )
        object.__setattr__(self, "datasets", named)
        names = [one.domain for one in named if one.domain is not None]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"Every data set must have a name of its own, but {repeated} are names of more than one. Set `domain`."
            )
        if names:
            check_names(names, what="Names of data sets")
        without = [one.domain or one.path for one in named if one.weight is None]
        if 0 < len(without) < len(named):
            raise ValueError(
                f"Either all data sets must have a `weight` or none, but {without} have none. Add them, or leave out the others."
            )

    @property
    def weights(self) -> dict[str, float] | None:
        """The shares by domain, where the file gives them."""
        return {one.domain: one.weight for one in self.datasets if one.domain and one.weight is not None} or None

    @classmethod
    def from_file(cls, path: str | Path) -> "MixtureConfig":
        """
        Read a mixture.

        Args:
            path (`str` or `Path`): YAML or JSON file; see the module for its keys.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is malformed, has a key that is not known or a value that is not allowed. Names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"The mixture must be a YAML file, but {str(path)!r} is no file. Check the path.")
        parse = parse_json if path.suffix.lower() == ".json" else parse_yaml
        content = parse(path.read_bytes(), source=str(path))
        try:
            return cls.from_dict(content, folder=path.parent)
        except ValueError as error:
            raise ValueError(f"The mixture {str(path)!r} cannot be used: {error}") from error

    @classmethod
    def from_folder(cls, data_dir: str | Path, *, train_only: bool = False) -> "MixtureConfig":
        """
        The domains of a data folder as data sets, see [`find_domain_files`].

        Args:
            data_dir (`str` or `Path`): The folder.
            train_only (`bool`): Take all domains that have a train file, whether or not they have one to evaluate on.

        Raises:
            FileNotFoundError: There is no such folder, or no such file in it.
            ValueError: A domain lacks a file.
        """
        files = find_domain_files(data_dir)
        trained = {name: paths for name, paths in files.items() if "train" in paths}
        if not (train_only and trained):
            select_domains(files, domains=None)  # each has both files
        sets = [
            DatasetConfig(
                "json",
                data_files={split: str(path) for split, path in paths.items()},
                validation_split="validation",
                domain=name,
                columns={"text": "text"},
            )
            for name, paths in trained.items()
        ]
        return cls(tuple(sets))

    @classmethod
    def from_dict(cls, content: Any, *, folder: Path | None = None) -> "MixtureConfig":
        """The mixture that a parsed file describes, see [`MixtureConfig.from_file`]."""
        allowed = ("datasets", "streaming", "test_split_size")
        if not isinstance(content, Mapping) or not isinstance(content.get("datasets"), list):
            raise ValueError(f"It must hold a list `datasets`, each with a `path`, but it holds {show(content)}.")
        _refuse_unknown(content, allowed, "It")
        shared = {name: content[name] for name in allowed[1:] if content.get(name) is not None}
        keys = [one.name for one in fields(DatasetConfig)]
        entries = []
        for number, entry in enumerate(content["datasets"], start=1):
            where = f"Data set {number}"
            if not isinstance(entry, Mapping) or entry.get("path") is None:
                raise ValueError(f"{where} must map keys to values, `path` among them, but is {show(entry)}.")
            _refuse_unknown(entry, keys, where)
            given = {name: value for name, value in entry.items() if value is not None}
            try:
                entries.append(DatasetConfig(**{**shared, **given}))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return cls(tuple(entries), folder=folder)


def _refuse_unknown(content: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    unknown = [key for key in content if key not in allowed]
    if unknown:
        key = str(unknown[0])
        near = get_close_matches(key, allowed, n=1)
        advice = _HINTS.get(key) or (f"Did you mean {near[0]!r}?" if near else "Leave it out.")
        raise ValueError(f"{where} has an unknown key {key!r}; allowed are {', '.join(sorted(allowed))}. {advice}")
