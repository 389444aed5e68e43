"""
Files and folders that are replaced as one, also while other processes read or write them, and whenever a process is killed.

Of a set of files one, the manifest, says which contents the others must have. Contents are first *staged* in the same folder
under names that carry their checksum, then moved to their places. The move of the manifest is the moment of change:
before it every reader finds the old set, after it the new one, if need be from the staged files. So a crash at any
point loses nothing, no file that is not ours is touched, and saving again completes what was interrupted.

Processes that save to the same place at once do so one after the other, and each finds a whole set when it is done. All
modes follow the umask of who saves.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STAGED_PREFIX = ".hf_doge-"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = "What was there before is as it was. Free some space, or choose another place, and write again"
_LOOKS = 100  # of a reader at a set that is replaced again and again
_AT_WORKING_DIRECTORY = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS

Result = TypeVar("Result")


def sha256(source: bytes | Path) -> str:
    """Checksum of a content or of a file of any size, as it is written into manifests and known on the Hub."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(content: Mapping[str, Any]) -> bytes:
    """JSON as manifests and journals have it: indented, sorted by key, ending in a line break."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


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
    foreign = _foreign_entries(folder) if folder.exists() else []
    # Listed first: a process that saves the same may be putting its manifest into its place meanwhile.
    if foreign and not (folder / manifest).exists():
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


def _foreign_entries(folder: Path) -> list[str]:
    entries = sorted(entry.name for entry in folder.iterdir())
    interrupted = any(entry.startswith(STAGED_PREFIX) for entry in entries)
    return [] if interrupted else [entry for entry in entries if not entry.startswith(".")]


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
    for name in order:
        (folder / name).parent.mkdir(exist_ok=True)
    sync_folder(folder)
    for name in order:
        path = folder / name
        try:
            os.replace(staged[name], path)
        except FileNotFoundError:  # without locks, another process that saves the same has been quicker
            write_atomically(path, files[name])
        sync_folder(path.parent)
    for leftover in folder.glob(f"{STAGED_PREFIX}*"):
        leftover.unlink(missing_ok=True)


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
    for _ in range(_LOOKS):
        # Written under a name of its own: without locks another process may be moving the same content to its place.
        own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            with naming_place(folder / name), own.open("wb") as file:
                _write_out(file, content)
        except BaseException:
            own.unlink(missing_ok=True)
            raise
        with suppress(FileNotFoundError):  # one that has just saved took it for a leftover
            os.replace(own, path)
            return path
    raise OSError(errno.EBUSY, "Others keep saving to the folder. Save it again", str(folder))


@contextmanager
def naming_place(path: Path) -> Iterator[None]:
    """A disk that is full is told with what was to be written to it, and with what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL or str(error.strerror).endswith(_ADVICE):  # told already
            raise
        raise OSError(error.errno, f"{error.strerror}. {_ADVICE}", str(path)) from error


def _write_out(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def prepare_file(path: str | os.PathLike, *, name: str = "path") -> Path:
    """
    Where a file is about to be written, its folder made.

    Args:
        path (`str` or `os.PathLike`): The file, there already or not.
        name (`str`): The argument that named it, for errors.

    Raises:
        IsADirectoryError: A folder is there.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"`{name}` must be a file, but {str(path)!r} is a folder. Name a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, also if the disk is full, the power fails or others write it too."""
    with naming_place(path), _unfinished(path.with_name(f".{path.name}.tmp")) as (file, temporary):
        try:
            _write_out(file, content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As [`write_atomically`], of what [`to_json`] makes."""
    write_atomically(path, to_json(content))


@contextmanager
def _unfinished(temporary: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """An empty file to write to, and its path: this one if there are locks, by which others wait until it has moved."""
    while fcntl is not None:
        with temporary.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                break
            if _is_at(file, temporary):
                file.truncate(0)
                yield file, temporary
                return
    own = temporary.with_name(f"{temporary.name}-{uuid.uuid4().hex}")
    with own.open("wb") as file:
        yield file, own


def _is_at(file: BinaryIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """
    Keep other processes and threads that ask for the same from the folder, which must exist: they wait.

    The lock is on the folder itself, leaves no file behind and ends with the process. Where the file system has none,
    no process waits, which is safe as long as all save the same.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # explicitly, as a process that was forked meanwhile has the descriptor too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def read_settled(folder: Path, manifest: str, read: Callable[[], Result]) -> Result:
    """
    Read a set of files that another process may be replacing: what does not fit together is read a second time.

    Args:
        folder (`Path`): The folder of the set.
        manifest (`str`): The file that tells which contents the others must have.
        read (`Callable`): Raises `ValueError` or `FileNotFoundError` if something is missing or altered.
    """

    def stamp() -> tuple[int, ...] | None:
        with suppress(OSError):
            status = (folder / manifest).stat()
            return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
        return None

    try:
        return read()
    except (ValueError, FileNotFoundError):
        if not folder.is_dir():
            raise
    for _ in range(_LOOKS):
        # In it, what was being saved into the folder is done; as a whole the folder may still be replaced.
        with sole_writer(folder):
            before = stamp()
            try:
                return read()
            except (ValueError, FileNotFoundError):
                if stamp() == before:
                    raise
    return read()


@contextmanager
def staged_folder(place: Path) -> Iterator[Path]:
    """
    An empty folder to fill. When the block ends without an error it takes its place in one step, over an older one if
    there is one; until then, whenever that is interrupted, the older one is there. What killed processes left is removed.
    """
    prefix = f"{STAGED_PREFIX}{place.name}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        staged = _make_locked_folder(place.with_name(prefix), locks)
        try:
            with naming_place(place):
                yield staged
            mode = staged.stat().st_mode & 0o666  # some libraries write files that their owner alone may read
            for path in staged.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
            sync_folder(staged)
            _move_folder(staged, place)
            sync_folder(place.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # or what was replaced
    for left in place.parent.iterdir():
        if left.name.startswith((f"{prefix}-", f"{prefix}.")):
            _remove_if_abandoned(left)


def _make_locked_folder(prefix: Path, locks: ExitStack) -> Path:
    """A new folder, locked before others take it for abandoned."""
    while True:
        folder = prefix.with_name(f"{prefix.name}-{uuid.uuid4().hex}")
        folder.mkdir()
        with ExitStack() as attempt, suppress(FileNotFoundError):
            attempt.enter_context(sole_writer(folder))
            if folder.is_dir():
                locks.push(attempt.pop_all())
                return folder


def _move_folder(staged: Path, place: Path) -> None:
    """Move a folder to its place. What was there is in the place of the other then, or gone if that was empty."""
    for _ in range(_LOOKS):
        try:
            os.rename(staged, place)
            return
        except OSError as error:
            if not place.is_dir():
                raise
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
        if _exchange(staged, place):
            return
        # Without that, there is a moment without either.
        aside = staged.with_name(f"{staged.name}.old")
        with suppress(FileNotFoundError):
            os.rename(place, aside)
        try:
            os.rename(staged, place)
        except OSError:
            with suppress(OSError):  # unless another process that saves to the same place has been quicker
                os.rename(aside, place)
        if place.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        if not staged.exists():
            return
    raise OSError(errno.EBUSY, "Others keep replacing the folder. Save it again", str(place))


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, where the system can."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    first, second = os.fsencode(one), os.fsencode(other)
    if library is None:
        return False
    if hasattr(library, "renameat2"):
        return library.renameat2(_AT_WORKING_DIRECTORY, first, _AT_WORKING_DIRECTORY, second, _EXCHANGE) == 0
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(first, second, _EXCHANGE) == 0
    return False


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a folder that no process writes to, as its lock tells. Without locks it stays."""
    with suppress(OSError, AttributeError):  # gone already, in use, or without locks
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under the lock, for which the process that has just made the folder waits.
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make renames in a folder (or the content of a file) last through a power cut, where the system lets it be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
