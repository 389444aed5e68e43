"""The command line, `hf-doge` or `python -m hf_doge`: one module per command, imported when it is called."""

import atexit
import errno
import gc
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from safetensors import SafetensorError

from hf_doge._version import __version__
from hf_doge.cli.console import is_main_process, lasting_output, say
from hf_doge.text import hide_secrets, printable

COMMANDS = {
    "demo": "learn weights on text found on this machine and see whether they help; no data, no network, minutes",
    "data": "show the domains of a mixture or a folder: rows, tokens, epochs at a budget",
    "estimate": "estimate domain weights in seconds, without training",
    "learn": "learn domain weights with a small proxy model",
    "sweep": "find the best mixture by small runs and a law fitted to them",
    "train": "train a model on given weights",
    "compare": "train the same model on several mixtures and tabulate its perplexities",
    "index": "record what each training example pushed, at saved checkpoints",
    "search": "trace predictions to training examples and words",
    "view": "show an influence index in the browser: trace texts and examples, see domains and labels",
    "evaluate-influence": "delete what scorers blame, retrain, and see what becomes of predictions",
    "export": "write domain weights as another training framework reads them",
    "push": "bring domain weights or an influence index to the Hub",
    "completion": "print a script that completes commands and flags in a shell",
    "report": "show again what a folder of results holds",
}
USAGE = "\n".join(
    [
        "usage: hf-doge COMMAND [flags]",
        "",
        "Learn how much of each data domain to train on (DoGE), and train with it.",
        "",
        *(f"  {command:<18}  {purpose}" for command, purpose in COMMANDS.items()),
        "",
        "hf-doge COMMAND --help lists the flags of a command.",
    ]
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM_IN_WORDS = re.compile(
    r"No space left|Disk quota exceeded|os error (28|122)\b|PytorchStreamWriter failed|inline_container.*unexpected pos"
)
_FULL_DISK = (
    "a file could not be written, since the disk is full or a quota is used up ({}). What was saved before is whole: make "
    "room and run the command again; `learn` and `train` go on with `--resume_from_checkpoint last`."
)

INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (`Sequence[str]`, *optional*): Command and flags, by default those of the process.

    Returns:
        `int`: 0 if all went well, 2 if it was asked for something that cannot be, said in one line on standard error,
            130 if it was interrupted, 143 if SIGTERM stopped it after a checkpoint that it had been asked to save then.
    """
    with lasting_output():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        say(USAGE)
        return 0
    command = argv[0]
    if command == "--version":
        say(f"hf-doge {__version__}")
        return 0
    if command not in COMMANDS:
        return _refuse("hf-doge", f"the command must be one of {', '.join(COMMANDS)}, but got {command!r}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_doge").setLevel(logging.INFO if is_main_process() else logging.WARNING)
    try:
        code = import_module(f"hf_doge.cli.{command.replace('-', '_')}").main(argv[1:])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            atexit.register(_end_process_group)  # not before: a process can join one once
        return code
    except SystemExit as stop:  # argparse, after --help or a flag it does not know
        return stop.code or 0
    except KeyboardInterrupt:
        sys.stderr.write(f"\nhf-doge {command}: interrupted. What was saved is kept.\n")
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError, RuntimeError, SafetensorError) as error:
        if _is_full_disk(error):
            return _refuse(f"hf-doge {command}", _FULL_DISK.format(printable(" ".join(str(error).split()))))
        if isinstance(error, (RuntimeError, SafetensorError)):
            raise
        logger.debug("What was refused:", exc_info=True)
        return _refuse(f"hf-doge {command}", printable(hide_secrets(" ".join(str(error).split()))))


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a write failed for want of room; torch does not say why it did, and safetensors in words only."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _NO_ROOM) or _NO_ROOM_IN_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_process_group() -> None:
    """
    Without it, a thread of gloo that is still busy when Python ends aborts a process that did all it should. Its threads end
    with the group, which a model that waits to be collected still holds.
    """
    distributed = sys.modules.get("torch.distributed")  # most commands on one process never load it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def _refuse(prog: str, message: str) -> int:
    sys.stderr.write(f"{prog}: error: {message}\n")
    return 2
