"""
One process at a time writes an index.

The lock is the operating system's, on a file of the folder, so it ends with the process that holds it, however that ends.
Within a process the writer that was opened last has it: after an error in a notebook, the next attempt need not wait for
what the error still refers to.
"""

import logging
import os
from pathlib import Path
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

LOCK_FILE = ".writing.lock"

# A killed process can leave helpers (workers of a DataLoader) that hold its files for some seconds.
_PATIENCE_SECONDS = 10.0

logger = logging.getLogger(__name__)


class WriterLock:
    """
    Held by this process until the last writer of the folder has let go of it. Made by [`WriterLock.take`].

    Attributes:
        holder (`object`): Whoever took it last, and may write.
    """

    def __init__(self, folder: Path) -> None:
        self.holder: object | None = None
        # For all threads: a Trainer may be closed by another than that which opened it.
        self._file = FileLock(folder / LOCK_FILE, thread_local=False)
        try:
            self._file.acquire(timeout=_PATIENCE_SECONDS)
        except Timeout as error:
            raise BlockingIOError(
                f"One process at a time can write an influence index, but another one is writing {str(folder)!r}. Wait for "
                "it to end, or choose another folder."
            ) from error
        except NotImplementedError:
            logger.info(
                "The file system of %s has no locks: nothing keeps two processes from writing at once.", folder
            )

    @classmethod
    def take(cls, folder: Path, holder: object) -> "WriterLock":
        """
        Lock a folder, which must exist, or take over the lock that this process has.

        Raises:
            BlockingIOError: Another process has it, and keeps it for longer than a few seconds.
        """
        key = (os.getpid(), str(folder.resolve()))
        lock = _locks.get(key)
        if lock is None:
            lock = _locks[key] = cls(folder)
        lock.holder = holder
        return lock

    def release(self, holder: object) -> None:
        """Let other processes write, unless somebody else took the lock over."""
        if self.holder is holder:
            self.holder = None
            self._file.release()
            for key in [key for key, lock in _locks.items() if lock is self]:
                del _locks[key]

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.release(force=True)


_locks: "WeakValueDictionary[tuple[int, str], WriterLock]" = WeakValueDictionary()
