"""Reading an index that stays on the Hub: a query fetches the rows of its own tokens, by ranges of bytes."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hf_doge.artifacts.hub.errors import Patience
from hf_doge.artifacts.hub.fetch import fetch_folder
from hf_doge.artifacts.hub.ranges import RangedFile
from hf_doge.artifacts.influence.examples import check_number_of_examples
from hf_doge.artifacts.influence.manifest import (
    MANIFEST,
    check_files,
    examples_files,
    read_config,
    require_checkpoints,
    warn_of_unknown,
)
from hf_doge.artifacts.influence.metric import CheckpointMetric
from hf_doge.artifacts.influence.reader import IndexReader, check_integers
from hf_doge.artifacts.influence.remote_examples import RemoteExamples
from hf_doge.artifacts.influence.remote_map import RemoteMap
from hf_doge.artifacts.influence.row_map import RowMap, default_cache_dir

if TYPE_CHECKING:
    from datasets import Dataset

_FEW_BYTES = 4 * 2**20  # so much of examples is fetched at once


class RemoteIndexReader(IndexReader):
    """
    Search engine over a dataset repository on the Hub, of which it reads what a query needs. Open it by
    [`RemoteIndexReader.open`].

    The scores are those of [`IndexReader`] on the same files, bit for bit. What was read once is read from `cache_dir`
    from then on, where fetched rows lie in sparse files. The repository is read at the commit that `revision` was when it
    was opened, whatever is pushed since.

    Attributes:
        repo_id, commit (`str`): Which files.
        folder (`Path`): Their snapshot in the Hub's cache, with those that were fetched as a whole.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *,
        cache_dir: Path,
        repo_id: str,
        token: str | bool | None = None,
        hub_cache_dir: Path | None = None,
        patience: Patience | None = None,
    ) -> None:
        super().__init__(folder, config, cache_dir=cache_dir)
        self.is_whole = False
        self.repo_id, self.commit = repo_id, folder.name
        self._token, self._hub_cache_dir = token, hub_cache_dir
        self._patience = patience or Patience()
        self._remote: dict[int, RemoteMap] = {}
        self._few_examples: RemoteExamples | None = None
        self._has_examples = False

    @classmethod
    def open(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        patience: Patience | None = None,
    ) -> "RemoteIndexReader":
        """
        Open an index on the Hub: fetches its config.json.

        Args:
            repo_id (`str`): The dataset repository.
            revision (`str`, *optional*): Branch, tag or commit.
            token (`str` or `bool`, *optional*): For private repositories.
            cache_dir (`str` or `os.PathLike`, *optional*):
                Where files and rows go; by default the Hub's cache and `$HF_HOME/hf_doge`.
            patience ([`Patience`], *optional*): How long to keep trying to read rows.

        Raises:
            FileNotFoundError: There is no such repository, or it holds no index.
            ValueError: No checkpoint is whole yet, the rows are int8, or config.json cannot be read.
        """
        hub_cache_dir = None if cache_dir is None else Path(cache_dir)
        where = {"token": token, "cache_dir": hub_cache_dir}
        folder = fetch_folder(repo_id, allow_patterns=[MANIFEST], revision=revision, **where)
        config = read_config(folder)
        require_checkpoints(config, repo_id)
        warn_of_unknown(config)
        if config["dtype"] == "int8":
            raise ValueError(
                f"An index of dtype int8 cannot be read in parts, as Parquet packs its rows, and {repo_id!r} is one."
                " Download it: `streaming=False`."
            )
        return cls(
            folder,
            config,
            cache_dir=hub_cache_dir or default_cache_dir(),
            repo_id=repo_id,
            token=token,
            hub_cache_dir=hub_cache_dir,
            patience=patience,
        )

    @property
    def examples(self) -> "Dataset":
        """What is known of the training examples, row `i` being example `i`. All is fetched when first asked for."""
        if self._examples is None:
            self._fetch(examples_files(self.config))
        return super().examples

    def examples_of(self, ids: Iterable[int]) -> "Dataset":
        """What is known of some examples: one row for each of `ids`, in their order. Of many, only those are fetched."""
        if self._examples is None:
            few = self._open_examples()
            if few is not None:
                from datasets import Dataset

                return Dataset(few.take(check_integers("Examples", ids, self.num_examples)))
        return super().examples_of(ids)

    def build_map(self, checkpoint: int) -> None:
        """Fetch the offsets of a checkpoint now, and not when its rows are first needed."""
        self._open_map(checkpoint)

    def metric(self, checkpoint: int) -> CheckpointMetric:
        """What queries are divided by at a checkpoint. All of it is fetched: a query needs the model, which is larger."""
        if checkpoint not in self._metrics:
            files = self.config["checkpoints"][checkpoint]["metric"]
            self._fetch({file["path"]: file["sha256"] for file in files})
        return super().metric(checkpoint)

    def basis(self, checkpoint: int) -> Tensor:
        """The principal components that rows are projected to at a checkpoint; their file is fetched."""
        if checkpoint not in self._bases:
            self._fetch({file["path"]: file["sha256"] for file in self.config["checkpoints"][checkpoint]["basis"]})
        return super().basis(checkpoint)

    def fetch_model(self, checkpoint: int) -> None:
        """Fetch the model of a checkpoint, if the repository holds it."""
        path = self.checkpoints[checkpoint].get("path") or ""
        parts = PurePosixPath(path).parts
        if parts and not path.startswith("/") and ".." not in parts:
            self._fetch_patterns([f"{path}/*"])

    def require_whole(self, what: str) -> None:
        """
        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{what} needs all rows of the index, but {self.repo_id!r} was opened with `streaming=True`. Download it:"
            f" `from_pretrained({self.repo_id!r}, revision={self.commit!r})`."
        )

    def _map(self, checkpoint: int, tokens: np.ndarray | None) -> RowMap:
        if tokens is None:
            self.require_whole("This")
        remote = self._open_map(checkpoint)
        remote.fetch(tokens)
        return remote.row_map

    def _open_map(self, checkpoint: int) -> RemoteMap:
        self._check_checkpoint(checkpoint)
        if checkpoint not in self._remote:
            files = self.config["checkpoints"][checkpoint]["files"]
            paths = [file["offsets_path"] for file in files]
            self._open_examples()
            self._fetch({file["offsets_path"]: file["offsets_sha256"] for file in files})
            segments = [self._ranged(file["path"], file["sha256"]) for file in files]
            self._remote[checkpoint] = RemoteMap(
                self.config,
                checkpoint,
                segments=segments,
                offsets=[self.folder / path for path in paths],
                cache_dir=self._cache_dir,
            )
        return self._remote[checkpoint]

    def _open_examples(self) -> RemoteExamples | None:
        """
        The examples, to be fetched in parts; `None` if they are few, and all here.

        Raises:
            ValueError: There are not as many as config.json claims. Scores take memory for each.
        """
        if self._few_examples is None and not self._has_examples:
            checksums = examples_files(self.config)
            files = [self._ranged(path, checksum) for path, checksum in checksums.items()]
            here = all((self.folder / path).is_file() for path in checksums)
            if here or sum(file.size for file in files) <= _FEW_BYTES:
                self._fetch(checksums)
                check_number_of_examples(self.folder, self.config)
                self._has_examples = True
            else:
                few = RemoteExamples(files, list(checksums.values()), cache_dir=self._cache_dir)
                if few.num_examples != self.num_examples:
                    raise ValueError(
                        f"{self.repo_id!r} must have {self.num_examples} examples, as its config.json says, but its files"
                        f" {list(checksums)} have {few.num_examples}. Its author must push it again."
                    )
                self._few_examples = few
        return self._few_examples

    def _ranged(self, path: str, sha256: str | None) -> RangedFile:
        return RangedFile(
            self.repo_id, path, commit=self.commit, token=self._token, sha256=sha256, patience=self._patience
        )

    def _fetch(self, checksums: Mapping[str, str | None]) -> None:
        """Fetch whole files, and check them."""
        self._fetch_patterns(list(checksums))
        check_files(self.folder, checksums, verify=True)

    def _fetch_patterns(self, patterns: Sequence[str]) -> None:
        where = {"token": self._token, "cache_dir": self._hub_cache_dir}
        fetch_folder(self.repo_id, allow_patterns=patterns, revision=self.commit, **where)
