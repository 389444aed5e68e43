"""What the commands say, and the pictures they leave."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from hf_doge.text import printable

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this is the process that speaks for all of those that a launcher started, on all machines."""
    return os.environ.get("RANK", "0") == "0"  # set by every launcher before any process group is there


def say(text: str) -> None:
    """Write to standard output, on the main process only: the one place where this package does."""
    if is_main_process():
        print(printable(text, keep="\n"), flush=True)  # names and texts of others reach no terminal as controls


@contextmanager
def lasting_output() -> Iterator[None]:
    """
    Whoever reads the output may stop reading (`| head -1`), never read (`>&-`) or know fewer letters (an ASCII terminal): the
    work goes on, and none of it is an error.
    """
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    with ExitStack() as streams:
        # Python has none for what was closed before it began.
        nothing = streams.enter_context(open(os.devnull, "w"))
        out = streams.enter_context(redirect_stdout(_LastingStream(sys.stdout or nothing)))
        streams.enter_context(redirect_stderr(_LastingStream(sys.stderr or nothing)))
        try:
            yield
        finally:
            out.flush()


class _LastingStream:
    """A stream that goes on into nothing when its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        with suppress(io.UnsupportedOperation):
            os.dup2(nothing, self._stream.fileno())  # what is buffered is written when Python ends
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def save_plot(plot: Callable[[Path], object], path: Path) -> Path | None:
    """Draw a picture into a file where matplotlib is installed, and return the file."""
    try:
        plot(path)
    except ImportError as error:
        logger.warning("No plot: %s", error)
        return None
    return path
