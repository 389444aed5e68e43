"""
`config.json` of an influence index: what is in the folder, how it was made, and the sha256 of every file. The table of the
checkpoints says again what it says of them.

Whoever makes an index for others can write anything into it. Its claims are compared with what can be ([`check_claims`]) before
memory is taken or a file is touched; [`segments`], [`segment_reader`] and the reader compare them with the files.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from hf_doge._version import __version__
from hf_doge.artifacts.influence.claims import check_claims
from hf_doge.artifacts.parquet import to_parquet
from hf_doge.checks import show
from hf_doge.files import sha256
from hf_doge.text import parse_json, printable

FORMAT_VERSION = "1.0"  # a newer major number tells older readers that they would misread the files
MEASURED_VERSION = "2.0"  # of an index in the optimizer's metric
LAYERS_VERSION = "3.0"  # of one with rows of layers, whose numbers older readers take for words
FITTED_VERSION = "4.0"  # of one whose checkpoints have a basis each; the newest that can be read
MANIFEST = "config.json"
EXAMPLES_FILE = "examples/train-00000-of-00001.parquet"
CHECKPOINTS_FILE = "checkpoints/train-00000-of-00001.parquet"
CARD_FILE = "README.md"
GRADIENTS = "gradients"
OFFSETS = "offsets"
METRIC = "metric"
BASIS = "basis"
CHECKPOINT_FOLDERS = (GRADIENTS, OFFSETS, METRIC, BASIS)
TABLE_FOLDERS = ("examples", "checkpoints", *CHECKPOINT_FOLDERS)
PARTIAL = ".partial"  # what a folder ends with that is not whole yet
DTYPES = ("float16", "float32", "int8")
PCA = "pca"
PROJECTIONS = ("random", PCA)

# What a recording says about itself, with the value where it says nothing.
SETTINGS: dict[str, Any] = {
    "loss_reduction": None,
    "loss_fn": None,
    "tied": None,
    "top_k": None,
    "top_k_unit": None,
    "record": "checkpoint",
    "metric": None,
    "second_moment": False,
    "virtual": False,
    "layers": None,
    "special_token_ids": [],
    "special_tokens": "count",
    "tokenizer": None,
    "dataset": None,
    "metadata": {},
}
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
CHECKPOINT_FACTS = tuple(_CHECKPOINTS_SCHEMA.names)

_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_KINDS = {
    "width": int,
    "stored_width": int,
    "dtype": str,
    "vocabulary_size": int,
    "num_examples": int,
    "special_token_ids": list,
    "metadata": dict,
    "checkpoints": list,
    "files": dict,
}
_KEYS = {*_KINDS, *SETTINGS, "format_version", "hf_doge_version", "projection", "redacted"}
_FILE_KINDS = {
    "path": str,
    "sha256": str,
    "num_rows": int,
    "first_example": int,
    "num_examples": int,
    "scale": (int, float),
}
_OFFSETS_KINDS = {"offsets_path": str, "offsets_sha256": str}


def read_config(folder: Path) -> dict[str, Any]:
    """
    Read `config.json`.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: It is malformed, not of an influence index, or of a format that this version cannot read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"A folder of an influence index must hold {MANIFEST}, but {str(folder)!r} does not.")
    return parse_config(path.read_bytes(), source=str(path))


def parse_config(content: bytes, *, source: str) -> dict[str, Any]:
    """
    The content of a `config.json`.

    Raises:
        ValueError: As [`read_config`]. Names `source`.
    """
    config = parse_json(content, source=source)
    version = config.get("format_version") if isinstance(config, dict) else None
    major = version.partition(".")[0] if isinstance(version, str) else ""
    if not major.isdecimal() or len(major) > 9:
        raise ValueError(
            f"{source!r} must have a `format_version` such as {FORMAT_VERSION!r}, but got {show(version)}: it does not"
            " belong to an influence index. Choose another folder."
        )
    if int(major) > int(FITTED_VERSION.partition(".")[0]):
        raise ValueError(
            f"{source!r} has format {printable(version)[:40]}, but hf_doge {__version__} reads up to {FITTED_VERSION}. Update with"
            " `pip install -U hf-doge`."
        )
    _check_kinds(config, _KINDS, source)
    if config["dtype"] not in DTYPES:
        raise ValueError(f"`dtype` in {source!r} must be one of {list(DTYPES)}, but got {config['dtype']!r}.")
    for position, checkpoint in enumerate(config["checkpoints"]):
        place = f"{source}: checkpoint {position}"
        _check_kinds(checkpoint, {"name": str, "learning_rate": (int, float), "files": list}, place)
        for file in checkpoint["files"]:
            _check_kinds(file, _FILE_KINDS if config["dtype"] == "int8" else _FILE_KINDS | _OFFSETS_KINDS, place)
        if config.get("metric") == "optimizer" or "metric" in checkpoint:
            _check_kinds(checkpoint, {"metric": list}, place)
        if fits_basis(config) or "basis" in checkpoint:
            _check_kinds(checkpoint, {"basis": list}, place)
        for file in other_files(checkpoint):
            _check_kinds(file, {"path": str, "sha256": str}, place)
        _check_coverage(checkpoint, config["num_examples"], source)
    check_claims(config, source=source)
    told = [{**dict.fromkeys(CHECKPOINT_FACTS), **checkpoint} for checkpoint in config["checkpoints"]]
    return {**config, "checkpoints": ordered_checkpoints(told)}


def check_checkpoint_name(name: str) -> None:
    """
    Raises:
        ValueError: No folder of a checkpoint can be called so.
    """
    if not name or set(name) - _NAME_CHARACTERS or name.startswith(".") or name.endswith(PARTIAL):
        raise ValueError(
            f"The name of a checkpoint must be of letters, digits, '.', '_' and '-', not begin with '.' and not end"
            f" with {PARTIAL!r}, but got {name!r}."
        )


def ordered_checkpoints(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Checkpoints by ascending step, in whatever order they were recorded.

    Their rows name them by a number, which is their place among them unless they have another: then `number` says it.
    """
    numbered = [(checkpoint_number(entries, place), dict(entry)) for place, entry in enumerate(entries)]
    if all(isinstance(entry.get("step"), int) for entry in entries):
        numbered.sort(key=lambda one: (one[1]["step"], one[0]))
    for place, (number, entry) in enumerate(numbered):
        entry.pop("number", None)
        if number != place:
            entry["number"] = number
    return [entry for _, entry in numbered]


def checkpoint_number(entries: Sequence[Mapping[str, Any]], place: int) -> int:
    """By which number the rows of a checkpoint name it."""
    return entries[place].get("number", place)


def next_checkpoint_number(entries: Sequence[Mapping[str, Any]]) -> int:
    """A number that no checkpoint has yet."""
    return 1 + max((checkpoint_number(entries, place) for place in range(len(entries))), default=-1)


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


def warn_of_unknown(config: Mapping[str, Any]) -> None:
    """One warning that names the keys of a newer version."""
    unknown = sorted(set(config) - _KEYS)
    if unknown:
        warnings.warn(
            f"{MANIFEST} has keys {unknown} that hf_doge {__version__} does not know; they are left out of account. It was"
            f" written by hf_doge {printable(config.get('hf_doge_version'))[:40]}: install that version to have them.",
            stacklevel=3,
        )


def _check_coverage(checkpoint: Mapping[str, Any], num_examples: int, source: str) -> None:
    """Each example must be in one file."""
    end = 0
    for file in sorted(checkpoint["files"], key=lambda file: file["first_example"]):
        end = end + file["num_examples"] if file["first_example"] == end else -1
    if end != num_examples:
        raise ValueError(
            f"The files of checkpoint {checkpoint['name']!r} in {source!r} must hold examples 0 to {num_examples - 1}, each"
            " once, but they do not. Fetch it again."
        )


def embedding_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """
    Of the matrix of words: `(num_words, width)`. Tokens from `num_words` on, up to `vocabulary_size`, are rows of layers, which may
    be of another width where words have none.
    """
    layers = config.get("layers")
    return (config["vocabulary_size"], config["width"]) if layers is None else tuple(layers["embedding_shape"])


def example_dtype(config: Mapping[str, Any]) -> str:
    """The integers that example ids are stored as."""
    return "int32" if config["num_examples"] <= 2**31 else "int64"


def added_examples_file(first_example: int) -> str:
    """Path of the file of examples that were added later, whose name comes after those of the ones before."""
    return f"examples/train-{first_example:012d}.parquet"


def first_added_example(path: str) -> int:
    """What [`added_examples_file`] was given."""
    return int(path.rpartition("-")[2].removesuffix(".parquet"))


def fits_basis(config: Mapping[str, Any]) -> bool:
    """Whether each checkpoint has a basis of its own (`projection="pca"`), rather than all one drawn at random, or none."""
    projection = config.get("projection")
    return isinstance(projection, dict) and projection.get("kind") == PCA


def other_files(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The files of a checkpoint besides those of its rows: its metric, its basis."""
    return [*checkpoint.get("metric", ()), *checkpoint.get("basis", ())]


def checkpoint_folders(config: Mapping[str, Any]) -> set[str]:
    """The folders that hold the files of whole checkpoints, relative to the index."""
    files = [file for one in config["checkpoints"] for file in (*one["files"], *other_files(one))]
    return {file["path"].rpartition("/")[0] for file in files}


def examples_files(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Path -> sha256 of the files of the examples, in their order."""
    paths = sorted(path for path in config["files"] if path.startswith("examples/"))
    return {path: config["files"][path] for path in paths} or {EXAMPLES_FILE: None}


def recorded_checksums(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Path -> sha256 of every file that a reader needs, without config.json itself."""
    # What people read of the checkpoints stands in config.json too, which may be newer for a moment.
    checksums = examples_files(config)
    for checkpoint in config["checkpoints"]:
        for file in (*checkpoint["files"], *other_files(checkpoint)):
            checksums[file["path"]] = file["sha256"]
            if file.get("offsets_path") is not None:
                checksums[file["offsets_path"]] = file["offsets_sha256"]
    return checksums


def require_checkpoints(config: Mapping[str, Any], source: str) -> None:
    """
    Raises:
        ValueError: The index has none yet.
    """
    if not config["checkpoints"]:
        raise ValueError(f"{source!r} has no whole checkpoint yet. Let the recording finish.")


def require_same(
    config: Mapping[str, Any], asked: Mapping[str, Any], *, folder: Path, but: Sequence[str] = ()
) -> None:
    """
    Check that an index can be continued.

    Args:
        config (`Mapping`): What its config.json says.
        asked (`Mapping`): What it would say of a new one.
        folder (`Path`): Named in errors.
        but (`Sequence[str]`): Keys that may differ.

    Raises:
        ValueError: They differ in something else. Names it.
    """
    has_other_layers = _layers_in_words(config.get("layers")) != _layers_in_words(asked.get("layers"))
    if has_other_layers:
        config = {**config, "layers": _layers_in_words(config.get("layers"))}
        asked = {**asked, "layers": _layers_in_words(asked.get("layers"))}
        but = (*but, "vocabulary_size", "width", "stored_width")  # these follow
    differing = [
        f"`{key}` is {config.get(key)!r:.200}, not {value!r:.200}"
        for key, value in asked.items()
        if key not in ("metadata", *but) and _lasting(config.get(key)) != _lasting(value)
    ]
    if not differing:
        return
    more = asked["num_examples"] > config["num_examples"] and config["checkpoints"] and not but
    raise ValueError(
        f"The influence index in {str(folder)!r} has another configuration: {'; '.join(differing)}. "
        + ("An index keeps the layers that it was begun with. " if has_other_layers else "")
        + "Continue it with the same, or choose another folder."
        + (
            " To add the examples behind those it has, pass `add_examples=True` (`hf-doge index --add_examples`)."
            if more
            else ""
        )
    )


def _layers_in_words(layers: Mapping[str, Any] | None) -> str:
    """Of what the rows are, as far as a person would say it."""
    if layers is None:
        return "word embeddings"
    kept = [f"{one['name']}, {' x '.join(map(str, one['kept']))} kept" for one in layers["modules"]]
    linear = f"{len(kept)} linear layer{'s' if len(kept) > 1 else ''} ({'; '.join(kept)})"
    return f"word embeddings and {linear}" if layers["embedding"] else linear


def _lasting(setting: Any) -> Any:
    """A setting without the name of what it describes: the same tokenizer may be loaded from another place."""
    return {key: value for key, value in setting.items() if key != "name"} if isinstance(setting, dict) else setting


def check_files(folder: Path, checksums: Mapping[str, str | None], *, verify: bool) -> None:
    """
    Args:
        folder (`Path`): Of the index.
        checksums (`Mapping`): Path -> sha256 of the files that must be there.
        verify (`bool`): Whether to compare the checksums.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: `verify`, and a file is not what it was.
    """
    missing = [path for path in checksums if not (folder / path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The influence index in {str(folder)!r} lacks {len(missing)} files: {missing[:5]}. Fetch it again."
        )
    altered = [path for path, checksum in checksums.items() if verify and sha256(folder / path) != checksum]
    if altered:
        raise ValueError(
            f"Files of the influence index in {str(folder)!r} were altered or cut short, as their sha256 is not the"
            f" recorded one: {altered[:5]} ({len(altered)} in all). Fetch them again."
        )


def _check_kinds(mapping: Any, kinds: Mapping[str, Any], source: str) -> None:
    if not isinstance(mapping, dict):
        raise ValueError(f"{source!r} must be a JSON object, but got {mapping!r:.80}.")
    for key, kind in kinds.items():
        value = mapping.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{source!r} must have {names} under {key!r}, but got {value!r:.80}. Fetch it again.")
