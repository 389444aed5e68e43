"""`hf-doge report`: show again what a folder of results holds."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.cards.text import code_block, escape
from hf_doge.artifacts.readers import holds_artifact
from hf_doge.cli.console import save_plot, say
from hf_doge.cli.parser import parse
from hf_doge.evaluation.comparison import Comparison
from hf_doge.files import write_atomically
from hf_doge.plots import plot_comparison


@dataclass
class ReportArguments:
    """Where the results are."""

    _argument_group_name = "report"

    folder: Path = field(
        metadata={"positional": True, "help": "Output folder of `hf-doge learn`, `compare` or `demo`."}
    )


@dataclass(frozen=True)
class Section:
    """One part of a report: text in Markdown, and a picture of it where matplotlib is installed."""

    title: str
    text: str
    plot: Path | None

    def to_markdown(self, *, embed: bool) -> str:
        """The section with its picture inside, or with the picture's path only."""
        picture = ""
        if self.plot is not None:
            data = base64.b64encode(self.plot.read_bytes()).decode()
            picture = (
                f"\n![{escape(self.title)}](data:image/png;base64,{data})\n"
                if embed
                else f"\nPlot: {escape(self.plot)}\n"
            )
        return f"## {escape(self.title)}\n\n{self.text.strip()}\n{picture}"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    (args,) = parse(
        argv,
        ReportArguments,
        prog="hf-doge report",
        description="Show the learned weights and comparisons in a folder, and write them into one report.md with plots.",
    )
    folder = args.folder
    sections = collect_sections(folder)
    say("\n".join(section.to_markdown(embed=False) for section in sections))
    say(f"Report: {write_report(folder, sections)}")
    return 0


def collect_sections(folder: Path) -> list[Section]:
    """
    Read everything a folder holds, and draw its pictures again.

    Raises:
        `FileNotFoundError`: if the folder is not there, or holds neither weights nor a comparison.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder must exist, but {str(folder)!r} does not. Check the path.")
    sections = [*_weights_sections(folder), *_comparison_sections(folder)]
    if not sections:
        raise FileNotFoundError(
            f"The folder must hold learned weights or a finished comparison, but {str(folder)!r} holds neither. "
            "Run `hf-doge learn` or `hf-doge compare` to the end first."
        )
    return sections


def write_report(folder: Path, sections: Sequence[Section]) -> Path:
    """Write the sections into one file that needs no other, `report.md` in the folder."""
    report = folder / "report.md"
    text = "\n".join(["# Domain weights\n", *(section.to_markdown(embed=True) for section in sections)])
    write_atomically(report, text.encode())
    return report


def _weights_sections(folder: Path) -> Iterator[Section]:
    for file in filter(holds_artifact, _find(folder, "domain_weights.json")):
        weights = DomainWeights.from_pretrained(file.parent)
        # The picture goes beside the artifact, not in it.
        plot = save_plot(weights.plot, file.parent.parent / "domain_weights.png")
        yield Section(f"Learned weights, {file.parent}", code_block(weights.summary()), plot)


def _comparison_sections(folder: Path) -> Iterator[Section]:
    for file in _find(folder, "comparison.json"):
        comparison = Comparison.load(file.parent)
        plot = save_plot(partial(plot_comparison, comparison.to_plot_rows()), file.parent / "comparison.png")
        yield Section(f"Comparison, {file.parent}", comparison.to_markdown(), plot)


def _find(folder: Path, name: str) -> list[Path]:
    """Files of that name, but for those in a checkpoint."""
    found = sorted(path.relative_to(folder) for path in folder.rglob(name))
    return [folder / path for path in found if not any(part.startswith("checkpoint-") for part in path.parts)]
