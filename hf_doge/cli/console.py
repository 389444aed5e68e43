"""What the commands say, and the pictures they leave."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from hf_doge.text import printable

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this is the process that speaks for all of those that a launcher started, on all machines."""
    return os.environ.get("RANK", "0") == "0"  # set by every launcher before any process group is there


def say(text: str) -> None:
    """Write to standard output, on the main process only: the one place where this package does."""
    if is_main_process():
        print(printable(text, keep="\n"), flush=True)  # names and texts of others reach no terminal as controls


def save_plot(plot: Callable[[Path], object], path: Path) -> Path | None:
    """Draw a picture into a file where matplotlib is installed, and return the file."""
    try:
        plot(path)
    except ImportError as error:
        logger.warning("No plot: %s", error)
        return None
    return path
