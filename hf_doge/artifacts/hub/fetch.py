"""Fetching an artifact from the Hub, into its cache."""

import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hf_doge._version import __version__
from hf_doge.checks import check_flag, check_path, check_text
from hf_doge.files import DISK_IS_FULL

_COMMIT = re.compile("[0-9a-f]{40}")
_SECONDS_TO_ASK = 5.0  # whether the Hub has what is in the cache


def fetch_folder(
    name_or_path: str | os.PathLike,
    *,
    file_hint: str = "",
    allow_patterns: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """
    A local folder as it is; any other name is fetched from the Hub, into its cache, and taken from there when offline, or,
    with a warning, when the Hub refuses it.

    Args:
        name_or_path (`str` or `os.PathLike`): A local folder, else the name of a dataset repository.
        file_hint (`str`): What the error adds if the path is a file.
        allow_patterns (`Sequence[str]`, *optional*): Which files.
        revision, token, cache_dir, local_files_only, force_download: As in `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: It is neither a folder nor a dataset repository that can be read or is cached.
        NotADirectoryError: It is a file.
        PermissionError: The token may not read it.
        ValueError: `token` cannot be one.
        OSError: The disk is full, or the download did not end.
    """
    folder = Path(check_path("name_or_path", name_or_path))
    check_text("revision", revision, optional=True)
    check_path("cache_dir", cache_dir, optional=True)
    check_flag("local_files_only", local_files_only)
    check_flag("force_download", force_download)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise NotADirectoryError(
            f"`name_or_path` must be a folder or a name on the Hub, but {str(folder)!r} is a file.{file_hint}"
        )
    # Only here: a folder needs no Hub, and importing its client takes longer than reading one.
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    from hf_doge.artifacts.hub.errors import (
        FetchError,
        Patience,
        check_reading,
        is_transient,
        raise_explained,
        shortly,
    )

    check_reading(token, revision)
    name = str(name_or_path)
    fetch = partial(
        _download,
        name,
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        local_files_only=local_files_only,
        force_download=force_download,
        allow_patterns=None if allow_patterns is None else list(allow_patterns),
    )
    try:
        return Path(Patience().call(fetch))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        reasons = {
            HFValidationError: "it is no name of a repository, 'user/name'.",
            RepositoryNotFoundError: "no dataset repository of this name that your token can see. A repository of a model is"
            " none; for a private one log in by `hf auth login`, or set HF_TOKEN.",
            LocalEntryNotFoundError: "it is not in the cache, and the Hub could not be asked.",
        }
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise FileNotFoundError(
            f"{name!r} must be a folder or a dataset repository on the Hub, but there is no such folder, and {reason}"
        ) from error
    except Exception as error:  # what the Hub answered, or did not: from four libraries
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            raise OSError(
                error.errno,
                f"The disk did not take all of {name!r} ({error.strerror}). What came is kept: free some space, or choose"
                " another `cache_dir`, and call again",
            ) from error
        if is_transient(error):
            raise FetchError(
                f"{name!r} could not be fetched: {shortly(error)}. What came is kept; try again later."
            ) from error
        raise_explained(error, name, action="read")


def _download(
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    local_files_only: bool,
    force_download: bool,
    **options: Any,
) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from hf_doge.artifacts.hub.errors import explain, is_transient

    options |= {"repo_type": "dataset", "library_name": "hf_doge", "library_version": __version__}
    fetch = partial(snapshot_download, name, revision=revision, token=token, **options)
    if local_files_only:
        return fetch(local_files_only=True)
    cached = None
    if not force_download and _COMMIT.fullmatch(revision or "") is None:  # a commit stays what it is
        with suppress(LocalEntryNotFoundError):
            cached = fetch(local_files_only=True)
    # Asked here too, as of what the Hub refuses its client would return the last download without a word.
    if force_download or cached is not None:
        try:
            timeout = None if force_download else _SECONDS_TO_ASK
            HfApi(library_name="hf_doge").dataset_info(name, revision=revision, token=token, timeout=timeout)
        except Exception as error:  # what the Hub answered, or did not: from four libraries
            if force_download:
                raise
            if isinstance(error, HfHubHTTPError) and not is_transient(error):
                warnings.warn(
                    f"{name!r} is read from the cache, as it was when it was downloaded, for the Hub refuses it now:"
                    f" {explain(error, name, action='read')} Pass `local_files_only=True` to be told no more.",
                    stacklevel=5,
                )
    return fetch(force_download=force_download)
