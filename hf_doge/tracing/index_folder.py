"""The folder of an index: what belongs to it, and copying it."""

import os
import shutil
from pathlib import Path

from hf_doge.artifacts.influence.lock import LOCK_FILE
from hf_doge.artifacts.influence.manifest import CARD_FILE, GRADIENTS, MANIFEST, OFFSETS, read_config
from hf_doge.tracing.weights import MODELS

# config.json first: what it names is there by then, and stays, whatever is added while the rest is copied.
_ENTRIES = (MANIFEST, CARD_FILE, "examples", "checkpoints", GRADIENTS, OFFSETS, MODELS)
FETCHED_FILES = (
    MANIFEST,
    CARD_FILE,
    *(f"{name}/*" for name in ("examples", "checkpoints", GRADIENTS, OFFSETS, MODELS)),
)
_STAGED, _REPLACED = ".hf_doge-{name}.new", ".hf_doge-{name}.old"


def copy_index(folder: Path, save_directory: Path) -> None:
    """
    Copy an index: staged beside its place, then moved there in one step.

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
    save_directory.parent.mkdir(parents=True, exist_ok=True)
    staged, replaced = (
        save_directory.with_name(pattern.format(name=save_directory.name)) for pattern in (_STAGED, _REPLACED)
    )
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        for name in _ENTRIES:
            _copy(folder / name, staged / name)
        read_config(staged)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if save_directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(save_directory, replaced)
    os.replace(staged, save_directory)
    shutil.rmtree(replaced, ignore_errors=True)


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


def _copy(source: Path, target: Path) -> None:
    """A file or a folder; recordings that are not finished stay behind."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.partial", ".*"))
    elif source.is_file():
        shutil.copyfile(source, target)
