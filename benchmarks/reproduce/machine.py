"""Where numbers come from: the commit, the data and the machine."""

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch

from hf_doge.files import sha256


@functools.cache
def describe_commit() -> str:
    """
    The commit of this checkout when it was first asked for, with `-changed` where tracked files differ from it.

    It is asked once: commits made during a run are not what runs.
    """
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=-changed", "--exclude=*", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def describe_data(data_dir: Path) -> str:
    """A digest of the names and contents of all JSONL files of a data folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(data_dir).rglob("*.jsonl*") if path.is_file()):
        digest.update(f"{path.relative_to(data_dir).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def describe_machine() -> str:
    """Processor, cores and threads used, and the accelerator where there is one."""
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s){accelerator}"
