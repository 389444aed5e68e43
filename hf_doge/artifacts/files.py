"""
A set of files that is replaced as one.

One of the files, the manifest, says which contents the others must have. Contents are first *staged* in the same folder
under names that carry their checksum, then moved to their places. The move of the manifest is the moment of change:
before it every reader finds the old set, after it the new one, if need be from the staged files. So a crash at any
point loses nothing, no file that is not ours is touched, and saving again completes what was interrupted.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

STAGED_PREFIX = ".hf_doge-"


def sha256(content: bytes) -> str:
    """Checksum as it is written into manifests."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """The same of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_own_folder(folder: Path, *, manifest: str, subfolders: tuple[str, ...]) -> None:
    """
    Refuse to save where something else lives.

    Raises:
        NotADirectoryError: `folder` is a file.
        FileExistsError: `folder` holds visible files but neither a `manifest` nor an interrupted save of ours, or one of
            its `subfolders` is a symbolic link.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`save_directory` must be a folder, but {str(folder)!r} is a file.")
    if not folder.exists() or (folder / manifest).exists():
        foreign = []
    else:
        entries = sorted(entry.name for entry in folder.iterdir())
        interrupted = any(entry.startswith(STAGED_PREFIX) for entry in entries)
        foreign = [] if interrupted else [entry for entry in entries if not entry.startswith(".")]
    if foreign:
        raise FileExistsError(
            f"`save_directory` must be new, empty or hold an artifact to replace, but {str(folder)!r} has no {manifest} and"
            f" holds {foreign[:5]}. Choose another folder."
        )
    for name in subfolders:
        if (folder / name).is_symlink():
            raise FileExistsError(
                f"{str(folder / name)!r} is a symbolic link, and files behind it are not ours to replace. Remove the link"
                " or choose another folder."
            )


def replace_files(folder: Path, files: Mapping[str, bytes], *, manifest: str) -> None:
    """
    Write `files` so that a crash leaves either all the old ones or all the new ones readable by [`read_verified`].

    Args:
        folder (`Path`): Made when it does not exist. Files of other names stay as they are.
        files (`Mapping[str, bytes]`): Path inside the folder (at most one level deep) -> content.
        manifest (`str`): The one of `files` whose appearance makes the set valid.
    """
    others = [name for name in files if name != manifest]
    # Nobody reads a first save before its manifest is there; a later one is read from the staged files meanwhile.
    order = [manifest, *others] if (folder / manifest).exists() else [*others, manifest]
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    staged = {name: _stage(folder, name, content) for name, content in files.items()}
    sync_folder(folder)
    for name in order:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        os.replace(staged[name], path)
        sync_folder(path.parent)
    for leftover in folder.glob(f"{STAGED_PREFIX}*"):
        leftover.unlink()


def read_verified(folder: Path, name: str, *, checksum: str) -> bytes:
    """
    Content of one file, from its place or, after an interrupted save, from where it was staged.

    Raises:
        ValueError: Neither has the given sha256.
    """
    path = folder / name
    for candidate in (path, _staged_path(folder, name, checksum)):
        if candidate.is_file():
            content = candidate.read_bytes()
            if sha256(content) == checksum:
                return content
    problem = "was altered or cut short: its sha256 is not the recorded one" if path.is_file() else "is missing"
    raise ValueError(f"{str(path)!r} {problem}. Fetch the artifact again, or save it again where it was made.")


def remove_file(path: Path) -> None:
    """Remove one file, and its folder if that leaves it empty."""
    if path.exists() or path.is_symlink():
        path.unlink()
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _staged_path(folder: Path, name: str, checksum: str) -> Path:
    return folder / f"{STAGED_PREFIX}{checksum[:16]}-{name.replace('/', '-')}"


def _stage(folder: Path, name: str, content: bytes) -> Path:
    path = _staged_path(folder, name, sha256(content))
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def sync_folder(folder: Path) -> None:
    """Make renames in the folder last through a power cut, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
