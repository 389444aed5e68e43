"""An index of influence as files: opening, copying and pushing it."""

import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_doge.artifacts.cards.html import index_html
from hf_doge.artifacts.hub.fetch import fetch_folder
from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.lock import LOCK_FILE
from hf_doge.artifacts.influence.manifest import (
    CARD_FILE,
    MANIFEST,
    PARTIAL,
    TABLE_FOLDERS,
    check_files,
    read_config,
    recorded_checksums,
)
from hf_doge.artifacts.influence.remote import RemoteIndexReader
from hf_doge.checks import check_flag, check_function, check_path, show
from hf_doge.files import read_settled, staged_folder, sync_folder
from hf_doge.gradients.example_losses import LossFunction
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.models import MODELS, LoadModel, checkpoint_folders, tokenizer_fingerprint
from hf_doge.tracing.pretrained import load_tokenizer, tokenizer_place

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# config.json first: what it names is there by then, and stays, whatever is added while the rest is copied.
_ENTRIES = (MANIFEST, CARD_FILE, *TABLE_FOLDERS, MODELS)
FETCHED_FILES = (
    MANIFEST,
    CARD_FILE,
    *(f"{name}/*" for name in (*TABLE_FOLDERS, MODELS)),
)


class ModelOptions(TypedDict, total=False):
    """
    How the models of an index are had; keywords of [`InfluenceIndex.from_pretrained`], all optional.

    Args:
        model (`nn.Module`):
            A model to take where it is the recorded one; where it is not, a copy of it gets each checkpoint's weights.
        load_model (`Callable`):
            `load_model(path) -> nn.Module` for classes that are not of transformers. `path` is the checkpoint's.
        processing_class (`PreTrainedTokenizerBase`): Tokenizer of the model. By default the one saved with the checkpoints.
        loss_fn (`Callable`): The one the index was recorded with, if any.
        masking (`str`):
            Which tokens of a prompt with its completion, or of messages, are scored: `"none"` is ignored, those of the
            `"completion"` alone, or of the `"assistant"` alone. By default as the training examples were masked.
    """

    model: nn.Module | None
    load_model: LoadModel | None
    processing_class: Any
    loss_fn: LossFunction | None
    masking: str | None


class SavedIndex:
    """
    The files of an index, with the models that it was recorded with. Made by [`~SavedIndex.from_pretrained`].

    Attributes:
        reader ([`IndexReader`]): The files.
        config (`dict`): Settings and checkpoints, as in config.json.
    """

    def __init__(
        self, reader: IndexReader, *, token: str | bool | None = None, **options: Unpack[ModelOptions]
    ) -> None:
        unknown = sorted(set(options) - set(ModelOptions.__annotations__))
        if unknown:
            raise TypeError(f"`InfluenceIndex` got an unexpected keyword argument {unknown[0]!r}.")
        self.reader = reader
        self.config = reader.config
        model, processing_class = options.get("model"), options.get("processing_class")
        check_function("load_model", options.get("load_model"), what="a function of a path", optional=True)
        check_function("loss_fn", options.get("loss_fn"), what="a function of (outputs, batch)", optional=True)
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(
                f"`model` must be a torch.nn.Module, but got {show(model)}. To load one, pass `load_model`."
            )
        self._given_tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self._given_tokenizer is not None:
            if not callable(self._given_tokenizer):
                raise ValueError(
                    f"`processing_class` must be a tokenizer, but got {processing_class!r:.80}. Load it by "
                    "`AutoTokenizer.from_pretrained`."
                )
            self._check_tokenizer(self._given_tokenizer)
        self._encoding = Encoding.of(self.config, options.get("masking"))
        self._loading: dict[str, Any] = {name: options.get(name) for name in ("model", "load_model", "loss_fn")}
        self._loading["token"] = token

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
        verify: bool = True,
        streaming: bool = False,
        **options: Unpack[ModelOptions],
    ) -> Self:
        """
        Open an index.

        Args:
            name_or_path (`str` or `os.PathLike`):
                Folder, or name of a dataset repository on the Hub. When offline, its last download is opened.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): For private repositories.
            cache_dir (`str` or `os.PathLike`, *optional*):
                Where a download and the memory maps go; by default the Hub's cache and `$HF_HOME/hf_doge`.
            local_files_only (`bool`): Use cached files only; never contact the Hub.
            force_download (`bool`): Fetch again what is in the cache.
            verify (`bool`): Whether to check the sha256 of every file.
            streaming (`bool`):
                Do not download an index of the Hub, but read what each query needs: the rows of its tokens once, by ranges of
                bytes, and the examples and models when they are first needed. The answers are the same. A folder is
                read in place anyway. `self_influence` and `cosine` need all rows, and so the download.
            model, load_model, processing_class, loss_fn, masking: See [`ModelOptions`].

        Raises:
            FileNotFoundError: There is no such folder or repository, or a file of it is missing.
            PermissionError: The repository is private or gated, and the token may not read it.
            OSError: The disk is full, or the Hub could not be reached for too long.
            ValueError: A file was altered, no checkpoint is whole, or the tokenizer is another than the recorded one; or
                `streaming`, and the rows are int8, or it is asked for together with `local_files_only` or `force_download`.
        """
        reader: IndexReader
        check_path("name_or_path", name_or_path)
        check_flag("verify", verify)
        if check_flag("streaming", streaming) and (local_files_only or force_download):
            raise ValueError(
                "`streaming=True` reads from the Hub what is not in the cache, so it does not go with `local_files_only` or"
                " `force_download`. Leave one of them out."
            )
        if streaming and not Path(name_or_path).exists():
            reader = RemoteIndexReader.open(str(name_or_path), revision=revision, token=token, cache_dir=cache_dir)
        else:
            folder = fetch_folder(
                name_or_path,
                allow_patterns=FETCHED_FILES,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
            reader = IndexReader.open(folder, cache_dir=cache_dir, verify=verify)
        return cls(reader, token=token, **options)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Copy the index, with the models it holds, if any.

        Args:
            save_directory (`str` or `os.PathLike`):
                New, empty, or an index to replace, in one step: a reader finds the old or the new one. An interrupted copy
                leaves what was there before. Several processes may save to one folder.
        """
        check_path("save_directory", save_directory)
        self.reader.require_whole("`save_pretrained`")
        copy_index(self.reader.folder, Path(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        redact_text: bool = False,
        keep_columns: Sequence[str] = (),
        include_models: bool = True,
        publish_text: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
    ) -> "CommitInfo | None":
        """
        Push to a dataset repository on the Hub, in one commit.

        An index reveals its training examples: the table of examples holds their text, and the gradient rows tell which
        tokens each of them has, also after `redact_text`. Share it only as you would share those.

        What the repository holds already is not sent again: call this again to continue a push that failed or was killed.
        Further checkpoints or examples are further files. See [`DomainWeights.push_to_hub`] for the rest.

        Args:
            repo_id (`str`): `"user/name"`, or `"name"` of your own. Made if it does not exist.
            redact_text (`bool`):
                Leave out every column of the examples that can hold text: strings, token ids and whatever nests them,
                `content_hash` among them. Numbers, dates, labels and the names of labels stay.
            keep_columns (`Sequence[str]`): Columns to publish anyway, such as the domain.
            include_models (`bool`):
                Publish the weights and the tokenizer of each checkpoint that is on this machine, under `models/`, so that
                others can search at once. Otherwise they must pass `load_model` or `model`.
            publish_text (`bool`):
                Publish the texts also where the repository holds an index that was pushed with `redact_text`, which is
                refused otherwise.
            commit_message, commit_description, private, token, revision, create_pr, tag: See [`DomainWeights.push_to_hub`].

        Returns:
            `huggingface_hub.CommitInfo` or `None`: See [`DomainWeights.push_to_hub`].

        Raises:
            PermissionError: See [`DomainWeights.push_to_hub`]; or the repository holds the index without its texts.
            FileExistsError, PushError: See [`DomainWeights.push_to_hub`].
            ValueError: As there; or a file of the index was altered, or `keep_columns` names no column.
        """
        self.reader.require_whole("`push_to_hub`")
        # Only here: a folder needs no client of the Hub.
        from hf_doge.tracing.publication import push_index_folder

        return push_index_folder(
            self.reader.folder,
            repo_id,
            redact_text=redact_text,
            keep_columns=keep_columns,
            include_models=include_models,
            publish_text=publish_text,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
        )

    def __len__(self) -> int:
        """Number of training examples."""
        return self.reader.num_examples

    def __repr__(self) -> str:
        names = [checkpoint["name"] for checkpoint in self.reader.checkpoints]
        return f"{type(self).__name__}({str(self.reader.folder)!r}, num_examples={len(self)}, checkpoints={names})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return index_html(self.config)

    @property
    def examples(self) -> Dataset:
        """What is known of the training examples; row `i` is example `i`."""
        return self.reader.examples

    @cached_property
    def processing_class(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was given, or the one saved with the checkpoints; `None` if there is none."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        for position, checkpoint in reversed(list(enumerate(self.reader.checkpoints))):
            self.reader.fetch_model(position)
            for path in checkpoint_folders(checkpoint, self.reader.folder):
                place = tokenizer_place(path)
                if place is not None:
                    tokenizer = load_tokenizer(place)
                    self._check_tokenizer(tokenizer)
                    return tokenizer
        return None

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        recorded = self.config.get("tokenizer")
        if recorded is None or not hasattr(tokenizer, "get_vocab"):
            return
        if (
            len(tokenizer) != recorded["vocabulary_size"]
            or tokenizer_fingerprint(tokenizer) != recorded["fingerprint"]
        ):
            raise ValueError(
                f"The tokenizer must be the one of the index, {recorded['name']!r} with {recorded['vocabulary_size']} tokens,"
                f" but {getattr(tokenizer, 'name_or_path', '')!r} with {len(tokenizer)} tokens has another vocabulary. "
                "Pass the recorded model's own as `processing_class`."
            )


def copy_index(folder: Path, save_directory: Path) -> None:
    """
    Copy an index: staged next to its place, then moved there in one step.

    Args:
        folder (`Path`): The index.
        save_directory (`Path`): New, empty, or an index, which is replaced as a whole.

    Raises:
        NotADirectoryError: `save_directory` is a file.
        FileExistsError: It holds anything else, which would be lost.
    """
    save_directory = save_directory.absolute()
    if save_directory.exists() and save_directory.resolve() == folder.resolve():
        return
    _require_replaceable(save_directory)
    with staged_folder(save_directory) as staged:
        read_settled(folder, MANIFEST, lambda: _copy_entries(folder, staged))


def _require_replaceable(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise NotADirectoryError(f"`save_directory` must be a folder, but {str(folder)!r} is a file or a link.")
    if not folder.exists():
        return
    foreign = sorted({entry.name for entry in folder.iterdir()} - {*_ENTRIES, LOCK_FILE})
    if foreign:
        raise FileExistsError(
            f"`save_directory` must be new, empty or hold an index to replace, but {str(folder)!r} holds {foreign[:5]}. "
            "Choose another folder."
        )
    if any(folder.iterdir()):
        read_config(folder)  # a config.json that is not of an index is not ours to replace


def _copy_entries(folder: Path, staged: Path) -> None:
    """
    Raises:
        FileNotFoundError, ValueError: The index was replaced by another meanwhile.
    """
    for left in staged.iterdir():  # of a first look
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for name in _ENTRIES:
        _copy(folder / name, staged / name)
    replaced = (folder / MANIFEST).read_bytes() != (staged / MANIFEST).read_bytes()
    check_files(staged if replaced else folder, recorded_checksums(read_config(staged)), verify=replaced)


def _copy(source: Path, target: Path) -> None:
    """A file or a folder, with the modes of new ones; recordings that are not finished stay behind."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            if not entry.name.startswith(".") and not entry.name.endswith(PARTIAL):
                _copy(entry, target / entry.name)
        sync_folder(target)
    elif source.is_file():
        shutil.copyfile(source, target)
        sync_folder(target)
