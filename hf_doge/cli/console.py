"""What the commands say, and the pictures they leave."""

import logging
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


def say(text: str) -> None:
    """Write to standard output: the one place where this package does."""
    print(text, flush=True)


def save_plot(plot: Callable[[Path], object], path: Path) -> Path | None:
    """Draw a picture into a file where matplotlib is installed, and return the file."""
    try:
        plot(path)
    except ImportError as error:
        logger.warning("No plot: %s", error)
        return None
    return path
