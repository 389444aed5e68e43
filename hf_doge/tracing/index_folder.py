"""The folder of an index: what belongs to it, and copying it."""

import shutil
from pathlib import Path

from hf_doge.artifacts.influence.checkpoint_writer import PARTIAL
from hf_doge.artifacts.influence.lock import LOCK_FILE
from hf_doge.artifacts.influence.manifest import (
    CARD_FILE,
    GRADIENTS,
    MANIFEST,
    OFFSETS,
    check_files,
    read_config,
    recorded_checksums,
)
from hf_doge.files import read_settled, staged_folder, sync_folder
from hf_doge.tracing.weights import MODELS

# config.json first: what it names is there by then, and stays, whatever is added while the rest is copied.
_ENTRIES = (MANIFEST, CARD_FILE, "examples", "checkpoints", GRADIENTS, OFFSETS, MODELS)
FETCHED_FILES = (
    MANIFEST,
    CARD_FILE,
    *(f"{name}/*" for name in ("examples", "checkpoints", GRADIENTS, OFFSETS, MODELS)),
)


def copy_index(folder: Path, save_directory: Path) -> None:
    """
    Copy an index: staged next to its place, then moved there in one step.

    Args:
        folder (`Path`): Of the index.
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
