"""CPU seconds and peak extra memory of one run of a library, in a process of its own."""

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from benchmarks.peers.workload import Workload

MIB = 2**20
REPEATS = 5  # in one process; the least counts
ENOUGH_SECONDS = 15  # CPU seconds after which a slow library is not asked again

Route = Callable[[nn.Module, Workload, Path], np.ndarray | None]


class Meter:
    """
    Measures what runs inside its context.

    Attributes:
        cpu_seconds (`float`): Processor time of the process, all threads.
        extra_mib (`float`): How far resident memory rose above what it was at entry, at most.
    """

    def __enter__(self) -> "Meter":
        _forget_peak()
        self._before = _status("VmRSS") or _peak()
        self._start = time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.cpu_seconds = time.process_time() - self._start
        self.extra_mib = (_peak() - self._before) / MIB


def _status(name: str) -> int | None:
    """A line of Linux's account of this process, in bytes; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> None:
    """Let the peak start anew (Linux only; elsewhere the peak of the imports counts, against everyone alike)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(routes: dict[str, Route], needs: Mapping[str, str] = MappingProxyType({})) -> None:
    """
    Command line of a runner: warm up on two examples, then measure a route on the whole workload.

    CPU seconds are the least of several runs, each from the start with a new copy of the model; memory is the first's.

    Args:
        routes (`dict`): What can be measured, by name.
        needs (`Mapping`): For a route that continues from what another left in `--state_dir`, the name of that one.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("route", choices=list(routes))
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--state_dir", type=Path, required=True, help="What one route leaves for another.")
    parser.add_argument("--output", type=Path, required=True, help="Writes <output>.json, and <output>.npy if scores.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    workload, route = Workload.load(args.data_dir), routes[args.route]
    with tempfile.TemporaryDirectory() as folder:  # what every first call pays once, such as late imports
        for warm_up in filter(None, (needs.get(args.route), args.route)):
            routes[warm_up](workload.model(), workload.head(2), Path(folder))
    model = workload.model()
    with Meter() as meter:
        scores = route(model, workload, args.state_dir)
    cpu_seconds = [meter.cpu_seconds]
    while len(cpu_seconds) < REPEATS and sum(cpu_seconds) < ENOUGH_SECONDS:
        model = workload.model()
        with tempfile.TemporaryDirectory() as folder, Meter() as repeated:
            route(model, workload, args.state_dir if args.route in needs else Path(folder))
        cpu_seconds.append(repeated.cpu_seconds)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if scores is not None:
        np.save(args.output.with_suffix(".npy"), scores)
    report = {"cpu_seconds": min(cpu_seconds), "extra_mib": meter.extra_mib}
    args.output.with_suffix(".json").write_text(json.dumps(report))
