"""
Domain weights as a folder that is also a dataset repository.

```
domain_weights.json                        everything but the trajectory, with the sha256 of the tables
weights/train-00000-of-00001.parquet       one row for each domain
trajectory/train-00000-of-00001.parquet    one row for each step and domain; absent when nothing was recorded
README.md                                  makes `load_dataset(folder, "weights" | "trajectory")` work
```
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_doge._version import __version__
from hf_doge.artifacts.cards import PLOT_FILE, card_bytes, draw_plot, read_card, weights_card
from hf_doge.artifacts.parquet import read_parquet
from hf_doge.artifacts.record import Trajectory, WeightsRecord
from hf_doge.checks import show
from hf_doge.files import (
    read_settled,
    read_verified,
    remove_file,
    replace_files,
    require_own_folder,
    sha256,
    sole_writer,
)
from hf_doge.text import parse_json, printable

FORMAT_VERSION = "1.0"  # a newer major number tells older readers that they would misread the files
MANIFEST = "domain_weights.json"
WEIGHTS_FILE = "weights/train-00000-of-00001.parquet"
TRAJECTORY_FILE = "trajectory/train-00000-of-00001.parquet"
CARD_FILE = "README.md"
FETCHED_FILES = (MANIFEST, WEIGHTS_FILE, TRAJECTORY_FILE)

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
_KEYS = dict.fromkeys(("mean", "last", "recipe", "domains", "metadata", "files"), dict) | {"domain_names": list}
_VERSION_KEYS = ("format_version", "hf_doge_version")


def write_folder(weights: WeightsRecord, folder: Path, *, plot: bool = False) -> None:
    """See [`DomainWeights.save_pretrained`]."""
    files = artifact_files(weights, plot=plot)
    tables = [name for name in files if name.endswith(".parquet")]

    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder):
        require_own_folder(folder, manifest=MANIFEST, subfolders=("weights", "trajectory"))
        replaced = {}
        if (folder / MANIFEST).exists():
            replaced = read_manifest(folder)["files"]  # a file of this name that is not ours is not ours to replace
        existing = read_card(folder / CARD_FILE)
        files[CARD_FILE] = card_bytes(
            weights_card(
                weights, data_files={name: files[name] for name in tables}, plot=PLOT_FILE in files, existing=existing
            )
        )
        replace_files(folder, files, manifest=MANIFEST)
        if weights.trajectory is None:
            remove_file(folder / TRAJECTORY_FILE)
        if PLOT_FILE in replaced and PLOT_FILE not in files:
            remove_file(folder / PLOT_FILE)


def artifact_files(weights: WeightsRecord, *, plot: bool) -> dict[str, bytes]:
    """The tables, the picture if asked for and matplotlib is there, and the manifest with their checksums."""
    files = {WEIGHTS_FILE: _to_parquet(_weights_table(weights))}
    if weights.trajectory is not None:
        files[TRAJECTORY_FILE] = _to_parquet(weights.trajectory.to_table())
    picture = draw_plot(weights) if plot else None
    if picture is not None:
        files[PLOT_FILE] = picture
    return {**files, MANIFEST: _to_manifest(weights, files)}


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The arguments of [`DomainWeights`], checked against their checksums, and what a newer version wrote into the manifest
    besides: to be kept, not to be understood. See [`DomainWeights.from_pretrained`].
    """
    return read_settled(folder, MANIFEST, lambda: _read_folder(folder))


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = read_manifest(folder)
    contents = {
        name: read_verified(folder, name, checksum=manifest["files"][name])
        for name in (WEIGHTS_FILE, TRAJECTORY_FILE)
        if name in manifest["files"]
    }
    trajectory = None
    if TRAJECTORY_FILE in contents:
        trajectory = Trajectory.from_table(read_parquet(contents[TRAJECTORY_FILE], TRAJECTORY_FILE))
    names = manifest["domain_names"]
    if sorted(names) != sorted(manifest["mean"]):
        raise ValueError(f"`domain_names` of {MANIFEST} must be the domains of `mean`, but is {names}.")
    arguments = {
        "mean": {name: manifest["mean"][name] for name in names},
        "last": manifest["last"],
        "trajectory": trajectory,
        "recipe": manifest["recipe"],
        "domains": manifest["domains"],
        "metadata": manifest["metadata"],
    }
    return arguments, {key: value for key, value in manifest.items() if key not in {*_KEYS, *_VERSION_KEYS}}


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Read `domain_weights.json`.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: It is malformed, not ours, or of a format that this version cannot read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"A folder of domain weights must hold {MANIFEST}, but {str(folder)!r} does not.")
    return parse_manifest(path.read_bytes(), source=str(path))


def parse_manifest(content: bytes, *, source: str) -> dict[str, Any]:
    """
    The content of a `domain_weights.json`.

    Raises:
        ValueError: As [`read_manifest`]. Names `source`.
    """
    manifest = parse_json(content, source=source)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    major = version.partition(".")[0] if isinstance(version, str) else ""
    if not major.isdecimal() or len(major) > 9:
        raise ValueError(
            f"{source!r} must have a `format_version` such as {FORMAT_VERSION!r}, but got {show(version)}. If it holds"
            " plain weights, read it by `DomainWeights.from_file`."
        )
    if int(major) > int(FORMAT_VERSION.partition(".")[0]):
        raise ValueError(
            f"{source!r} has format {printable(version)[:40]}, but hf_doge {__version__} reads up to {FORMAT_VERSION}. Update with"
            " `pip install -U hf-doge`."
        )
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise ValueError(
                f"{source!r} must have a {kind.__name__} under {key!r}, but got {manifest.get(key)!r:.80}."
            )
    return manifest


def _to_manifest(weights: WeightsRecord, tables: dict[str, bytes]) -> bytes:
    manifest = {
        **weights.unknown_keys,
        "format_version": FORMAT_VERSION,
        "hf_doge_version": __version__,
        "domain_names": list(weights.names),  # sorted keys forget their order
        "mean": weights.mean,
        "last": weights.last,
        "recipe": weights.recipe,
        "domains": weights.domains,
        "metadata": weights.metadata,
        "files": {name: sha256(content) for name, content in tables.items()},
    }
    return (json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _weights_table(weights: WeightsRecord) -> pa.Table:
    """One row for each domain; null where a number is not known."""
    natural = weights.natural_proportions or {}
    rows = [
        {
            "domain": name,
            "weight": weights.mean[name],
            "last_weight": weights.last[name],
            "natural_proportion": natural.get(name),
            "num_rows": weights.domains[name].get("num_rows"),
            "num_tokens": weights.domains[name].get("num_tokens"),
        }
        for name in weights.names
    ]
    return pa.Table.from_pylist(rows, schema=_WEIGHTS_SCHEMA)


def _to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_index=True)  # the Hub's viewer reads pages by the index
    return sink.getvalue().to_pybytes()
