"""
The artifact that learning domain weights ends in, https://huggingface.co/papers/2310.15393: a folder that is also a dataset
repository.

```
domain_weights.json                        everything but the trajectory, with the sha256 of the tables
weights/train-00000-of-00001.parquet       one row for each domain
trajectory/train-00000-of-00001.parquet    one row for each step and domain; absent when nothing was recorded
README.md                                  makes `load_dataset(folder, "weights" | "trajectory")` work
```
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from hf_doge._version import __version__
from hf_doge.artifacts.cards.card import card_bytes, read_card
from hf_doge.artifacts.cards.weights import PLOT_FILE, draw_plot, summarize, weights_card
from hf_doge.artifacts.hub.fetch import fetch_folder
from hf_doge.artifacts.hub.publication import Publication
from hf_doge.artifacts.parquet import read_parquet, to_parquet
from hf_doge.artifacts.readers import holds_artifact, read_ratios, read_weights_table
from hf_doge.artifacts.record import Trajectory, WeightsRecord
from hf_doge.artifacts.score_noise import weight_noise
from hf_doge.checks import check_flag, check_json, check_names, check_path, naming, show
from hf_doge.files import (
    prepare_file,
    read_settled,
    read_verified,
    remove_file,
    replace_files,
    require_own_folder,
    sha256,
    sole_writer,
    write_atomically,
)
from hf_doge.text import parse_json, printable

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from matplotlib.figure import Figure

FORMAT_VERSION = "1.0"  # a newer major number tells older readers that they would misread the files
MANIFEST = "domain_weights.json"
WEIGHTS_FILE = "weights/train-00000-of-00001.parquet"
TRAJECTORY_FILE = "trajectory/train-00000-of-00001.parquet"
CARD_FILE = "README.md"
DOMAIN_WEIGHTS_FOLDER = "domain_weights"  # in the output folder of what finds weights
_FETCHED_FILES = (MANIFEST, WEIGHTS_FILE, TRAJECTORY_FILE)
_SUBFOLDERS = ("weights", "trajectory")
_KEYS = dict.fromkeys(("mean", "last", "recipe", "domains", "metadata", "files"), dict) | {"domain_names": list}
_VERSION_KEYS = ("format_version", "hf_doge_version")

Weights = TypeVar("Weights", bound=WeightsRecord)


class DomainWeights(WeightsRecord):
    """
    How much of each data domain to train on, and how that was found.

    Args:
        mean (`Mapping[str, float]`):
            Domain name -> weight: the mean of the weights over the run, the one to train with. At least 0, summing to 1
            within 1e-6. For ratios that do not sum to 1 there is [`~DomainWeights.from_mapping`].
        last (`Mapping[str, float]`, *optional*): Weights after the last update, same domains. `mean` when not given.
        trajectory (`Trajectory`, *optional*): Weights, scores and losses step by step, same domains.
        recipe (`Mapping`, *optional*): `name` of the recipe and every argument of it.
        domains (`Mapping[str, Mapping]`, *optional*):
            Domain name -> what is known of its data: `num_rows`, `num_tokens`, `fingerprint`, ...
        metadata (`Mapping`, *optional*): Model, tokenizer, versions, commit, date.
            `recipe`, `domains` and `metadata` hold what JSON can.

    Attributes:
        mean, last (`dict[str, float]`): In the order of the domains. `weights[name]` and `dict(weights)` read `mean`.
        trajectory (`Trajectory` or `None`): As given.
        recipe, metadata (`dict`): As given, as JSON holds it.
        domains (`dict[str, dict]`): One entry for every domain, empty where nothing is known.
        unknown_keys (`dict`): Keys that a newer version of this package wrote; they are saved again as they are.

    Raises:
        ValueError: Weights off the simplex, or domains that differ; the message names the domain.
    """

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Self:
        """
        Read weights written by others, normalising their ratios.

        Known are the JSON of DoReMi (`train_domain_weights`), the YAML of RegMix (`train`), the `..._optimal.json` of Olmix (a
        list of `domain` and `weight`), and plain `{name: ratio}` in JSON or YAML. Names stay as they are written.

        Raises:
            ValueError: The file is malformed, repeats a key, or a ratio is no finite number >= 0. Names file and domain.
        """
        path = Path(check_path("path", path))
        ratios, shape = read_ratios(path)
        with naming(str(path)):
            return cls.from_mapping(ratios, metadata={"source_file": path.name, "source_format": shape})

    def export(
        self,
        format: str,
        *,
        paths: Mapping[str, str | Sequence[str]] | None = None,
        num_rows: Mapping[str, int] | None = None,
        path: str | os.PathLike | None = None,
    ) -> str:
        """
        The weights as another training framework reads them. Domains of weight 0 are left out.

        Args:
            format (`str`): `axolotl`, `datasets`, `levanter`, `llama-factory`, `megatron`, `mosaic-streaming`, `ms-swift`,
                `nemo`, `olmo-core` or `trl`. [`hf_doge.artifacts.export`] tells the form of each and where it is published.
            paths (`Mapping[str, str or Sequence[str]]`, *optional*): Domain name -> where its data is: files, a folder, or a
                name on the Hub, as the framework takes it. `datasets` and `llama-factory` hold none, the others need them.
            num_rows (`Mapping[str, int]`, *optional*): Domain name -> rows of its data; only `axolotl` needs them.
            path (`str` or `os.PathLike`, *optional*): File to write it to.

        Returns:
            `str`: The text.

        Raises:
            ValueError: The format is unknown, cannot hold a name or a path, or lacks one.
        """
        from hf_doge.artifacts.export import export_weights

        check_path("path", path, optional=True)
        text = export_weights(self, format, paths=paths, num_rows=num_rows)
        if path is not None:
            write_atomically(prepare_file(path), text.encode())
        return text

    def summary(self) -> str:
        """A table of the domains, heaviest first, under a line on the recipe."""
        return summarize(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from hf_doge.artifacts.cards.html import weights_html

        return weights_html(self)

    def plot(self, path: str | os.PathLike | None = None) -> "Figure":
        """
        Draw the trajectory with bands for the noise of its scores, and the weights against uniform and natural proportions.
        See [`~hf_doge.plots.plot_domain_weights`].
        """
        from hf_doge.plots import plot_domain_weights

        return plot_domain_weights(self, check_path("path", path, optional=True), noise=weight_noise(self))

    def save_pretrained(self, save_directory: str | os.PathLike, *, plot: bool = False) -> None:
        """
        Save as a dataset folder: `domain_weights.json`, `weights/` and `trajectory/` in Parquet, `README.md`.

        `datasets.load_dataset(save_directory, "weights")` and `"trajectory"` open it. An artifact in the folder is
        replaced as one: a crash at any point leaves the old or the new one to [`~DomainWeights.from_pretrained`], and
        saving again completes it. Other files stay, and so does what a person wrote into `README.md`: only the block between
        our markers and our keys of its YAML are written again; without markers only digests of the data change, with a warning.

        Several processes may call this for one folder, as those of `accelerate launch` do in a script that knows of none:
        they save one after the other, and each can read an artifact when it returns.

        Args:
            save_directory (`str` or `os.PathLike`): New, empty, or an artifact to replace.
            plot (`bool`): Also draw `plot.png` for the card, where matplotlib is installed.

        Raises:
            FileExistsError: The folder holds something else than an artifact.
            NotADirectoryError: `save_directory` is a file.
        """
        folder = Path(check_path("save_directory", save_directory))
        files = artifact_files(self, plot=check_flag("plot", plot))
        card = weights_card(self, files)
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        with sole_writer(folder):
            require_own_folder(folder, manifest=MANIFEST, subfolders=_SUBFOLDERS)
            replaced = {}
            if (folder / MANIFEST).exists():
                # A file of such a name that the manifest does not list is not ours to remove.
                replaced = read_manifest(folder)["files"]
            files[CARD_FILE] = card_bytes(card.merged_with(read_card(folder / CARD_FILE)))
            replace_files(folder, files, manifest=MANIFEST)
            if self.trajectory is None:
                remove_file(folder / TRAJECTORY_FILE)
            if PLOT_FILE in replaced and PLOT_FILE not in files:
                remove_file(folder / PLOT_FILE)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        model_id: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
    ) -> "CommitInfo | None":
        """
        Push to a dataset repository on the Hub, in one commit that everybody sees whole or not at all.

        What the repository holds already is not sent again, and where it holds everything nothing is committed; so a push
        that failed or was killed is repeated by the same call. Requests that fail are tried again for about a minute, or as
        long as the Hub asks for. Files of others in the repository stay, and so does what a person wrote into its card.

        Args:
            repo_id (`str`): `"user/name"`, or `"name"` of your own. Made if it does not exist.
            model_id (`str`, *optional*): Repository of the model that the weights were learned with, for the card.
            commit_message (`str`, *optional*), commit_description (`str`, *optional*): Title and text of the commit.
            private (`bool`, *optional*): Whether a new repository is private. One that exists stays as it is.
            token (`str` or `bool`, *optional*): Access token with the write role; by default the one you logged in with.
            revision (`str`, *optional*): Branch to push to, made if it does not exist. By default `main`.
            create_pr (`bool`): Open a pull request instead.
            tag (`str`, *optional*): Tag to put on the commit, so that others can pin it.

        Returns:
            `huggingface_hub.CommitInfo`: The commit; of a repository that held everything already, its head. `None` on all
                processes but the first of those that `accelerate launch` or `torchrun` started, when that one has pushed.

        Raises:
            PermissionError: There is no token, or it may not write there. Says what to do.
            ValueError: The name is not valid, or a file holds an access token.
            FileExistsError: The repository holds something else, or `tag` is taken.
            PushError: The Hub could not be reached for too long. Says what it holds now.
        """
        from hf_doge.artifacts.hub.push import push_publication  # needs the Hub's client, which a folder does not

        return push_publication(
            weights_publication(self, repo_id, model_id=model_id),
            repo_id,
            commit_message=commit_message or f"Upload domain weights, {len(self.names)} domains",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """
        Load what [`~DomainWeights.save_pretrained`] or [`~DomainWeights.push_to_hub`] wrote.

        Args:
            name_or_path (`str` or `os.PathLike`):
                A local folder, or the output folder of a run, else a dataset repository on the Hub; offline, its last download.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): Access token, as in `huggingface_hub`.
            cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are kept; the Hub's own cache by default.
            local_files_only (`bool`): Use cached files only; never contact the Hub.
            force_download (`bool`): Fetch again what is in the cache.

        Raises:
            FileNotFoundError: There is no such folder and no such repository, or no artifact in it.
            PermissionError: The repository is private or gated, and the token may not read it.
            ValueError: A file is malformed, was altered or cut short, or is from a newer version that cannot be read.
            OSError: The disk is full, or the Hub could not be reached for too long.
        """
        folder = fetch_folder(
            name_or_path,
            file_hint=" Read a single file by `DomainWeights.from_file`.",
            allow_patterns=_FETCHED_FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        if (folder / DOMAIN_WEIGHTS_FOLDER).is_dir() and not holds_artifact(folder / MANIFEST):
            folder /= DOMAIN_WEIGHTS_FOLDER
        return read_settled(folder, MANIFEST, partial(_read_folder, cls, folder))


def weights_publication(weights: WeightsRecord, repo_id: str, *, model_id: str | None = None) -> Publication:
    """The files of domain weights for the Hub."""
    files = artifact_files(weights, plot=True)
    return Publication(
        files,
        manifest=MANIFEST,
        owned=lambda path: path == PLOT_FILE or (path.partition("/")[0] in _SUBFOLDERS and path.endswith(".parquet")),
        check_manifest=partial(parse_manifest, source=f"{MANIFEST} of {repo_id}"),
        card=weights_card(weights, files, repo_id=repo_id, model_id=model_id),
    )


def artifact_files(weights: WeightsRecord, *, plot: bool) -> dict[str, bytes]:
    """The tables, the picture if asked for and matplotlib is there, and the manifest with their checksums."""
    tables = {WEIGHTS_FILE: weights.to_table()}
    if weights.trajectory is not None:
        tables[TRAJECTORY_FILE] = weights.trajectory.to_table()
    files = {name: to_parquet(table, row_group_size=None) for name, table in tables.items()}
    picture = draw_plot(weights) if plot else None
    if picture is not None:
        files[PLOT_FILE] = picture
    return {**files, MANIFEST: _to_manifest(weights, files)}


def _read_folder(kind: type[Weights], folder: Path) -> Weights:
    """Weights whose files have the checksums of the manifest; what a newer version wrote into it besides is kept."""
    manifest = read_manifest(folder)
    contents = {
        name: read_verified(folder, name, checksum=manifest["files"][name])
        for name in (WEIGHTS_FILE, TRAJECTORY_FILE)
        if name in manifest["files"]
    }
    trajectory = None
    if TRAJECTORY_FILE in contents:
        with naming(f"{TRAJECTORY_FILE} in {str(folder)!r}"):
            trajectory = Trajectory.from_table(read_parquet(contents[TRAJECTORY_FILE], TRAJECTORY_FILE))
    with naming(str(folder / MANIFEST)):
        if sorted(check_names(names := manifest["domain_names"])) != sorted(manifest["mean"]):
            raise ValueError(f"`domain_names` must be the domains of `mean`, but is {show(names)}.")
        mean = {name: manifest["mean"][name] for name in names}
        told = {key: manifest[key] for key in ("last", "recipe", "domains", "metadata")}
        weights = kind(mean, trajectory=trajectory, **told)
        newer = sorted(manifest.keys() - {*_KEYS, *_VERSION_KEYS})
        weights.unknown_keys = check_json("keys of a newer version", {key: manifest[key] for key in newer})
    if WEIGHTS_FILE in contents and read_weights_table(contents[WEIGHTS_FILE], WEIGHTS_FILE) != weights.mean:
        raise ValueError(
            f"{WEIGHTS_FILE!r} in {str(folder)!r} must tell the same weights as {MANIFEST!r}, but does not."
        )
    return weights


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
    if not all(isinstance(checksum, str) for checksum in manifest["files"].values()):
        raise ValueError(f"{source!r} must have a sha256 of each of 'files', but got {show(manifest['files'])}.")
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
