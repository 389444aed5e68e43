"""What an experiment leaves: [`Results`], written as tables, a plot and the facts of the run."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.machine import describe_commit, describe_machine
from hf_doge._version import __version__


@dataclass(frozen=True)
class Table:
    """
    One table: what people read and the rows it was made of.

    Attributes:
        title (`str`): A sentence above it: what the numbers are, their unit, which direction is better.
        header (`Sequence[str]`): Names of the columns.
        cells (`Sequence[Sequence[str]]`): Rows of text for the Markdown.
        rows (`Sequence[Mapping[str, Any]]`): Records for the Parquet file, one per measurement (seed and all).
    """

    title: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    rows: Sequence[Mapping[str, Any]]

    def to_markdown(self) -> str:
        """Title and table, columns padded so that it reads as well before rendering."""
        lines = [self.header, *self.cells]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        padded = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        ]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([self.title, "", padded[0], rule, *padded[1:]]) + "\n"


@dataclass(frozen=True)
class Results:
    """
    What an experiment found.

    Attributes:
        tables (`Mapping[str, Table]`): By file name without suffix.
        figures (`Mapping[str, Any]`): For the last line of the output, in plain values.
        plot (`Callable[[Path], Any]`, *optional*): Draws the plot into a PNG file.
        notes (`Sequence[str]`): What was skipped, and why.
    """

    tables: Mapping[str, Table]
    figures: Mapping[str, Any]
    plot: Callable[[Path], Any] | None = None
    notes: Sequence[str] = field(default_factory=list)


def write_results(results: Results, args: Arguments, folder: Path) -> None:
    """
    Write `<table>.md` and `<table>.parquet` for each table, `plot.png` and `run.json`, and print the tables.

    Tables depend on the finished parts alone, so a second run writes the same bytes; what belongs to a run is in
    `run.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in results.tables.items():
        markdown = table.to_markdown()
        (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
        pq.write_table(pa.Table.from_pylist([dict(row) for row in table.rows]), folder / f"{name}.parquet")
        print(f"\n{markdown}", flush=True)
    for note in results.notes:
        print(note, flush=True)
    if results.plot is not None:
        try:
            results.plot(folder / "plot.png")
        except ImportError as error:
            print(f"No plot: {error}")
    contents = {**describe_run(args), "notes": list(results.notes), "figures": dict(results.figures)}
    (folder / "run.json").write_text(json.dumps(contents, indent=1, sort_keys=True), encoding="utf-8")


def describe_run(args: Arguments) -> dict[str, Any]:
    """Command, commits, machine and time: of this call, and summed over the parts it used, whenever they were made."""
    used = args.store.used.values()
    return {
        "command": f"python -m benchmarks.reproduce {shlex.join(sys.argv[1:])}",
        "commit": describe_commit(),
        "commits_of_parts": sorted({str(part["commit"]) for part in used}),
        "scale": args.scale,
        "num_parts": len(used),
        "num_parts_computed_now": sum(not part["was_finished"] for part in used),
        "seconds_of_parts": round(sum(part["seconds"] for part in used), 1),
        "cpu_seconds_of_parts": round(sum(part["cpu_seconds"] for part in used), 1),
        "machine": describe_machine(),
        "versions": {"hf_doge": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }


def new_figure(width: float, height: float) -> Any:
    """
    A matplotlib figure for a plot of less than 80 kB.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: `pip install hf-doge[plot]`.") from error
    return Figure(figsize=(width, height), dpi=90, layout="constrained")
