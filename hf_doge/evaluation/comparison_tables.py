"""The tables of a comparison, in Markdown that reads as well before rendering, and in HTML as a notebook shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_doge.artifacts.cards.html import escape_html, html_table
from hf_doge.artifacts.cards.text import escape
from hf_doge.evaluation.intervals import Interval


class Bold(str):
    """A cell that is bold."""


@dataclass(frozen=True)
class Table:
    """
    Cells under the names of mixtures.

    Attributes:
        title (`str`): A sentence above it.
        columns (`Mapping[str, Sequence[str]]`): Title -> cells; the first column, titled `""`, has the names of the rows.
    """

    title: str
    columns: Mapping[str, Sequence[str]]

    def to_markdown(self) -> str:
        """Columns are padded, all but the first to the right."""
        cells = [[escape(title), *map(_markdown_cell, column)] for title, column in self.columns.items()]
        cells[0] = [escape(cell) for cell in ["", *next(iter(self.columns.values()))]]
        widths = [max(map(len, column)) for column in cells]
        first, *others = zip(*cells, strict=True)
        rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
        lines = [_line(first, widths), rule, *(_line(row, widths) for row in others)]
        return f"{self.title}\n\n" + "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """With names escaped; it runs nothing."""
        bold = {
            title: {row for row, cell in enumerate(column) if isinstance(cell, Bold)}
            for title, column in self.columns.items()
        }
        return f"<p>{escape_html(self.title)}</p>{html_table(self.columns, bold=bold)}"


def _markdown_cell(cell: str) -> str:
    return f"**{cell}**" if isinstance(cell, Bold) else cell


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join([cells[0].ljust(widths[0]), *others])} |"


def format_change(change: Interval) -> str:
    """A change in percent with its interval."""
    ends = "" if change.low is None else f" [{change.low:+.1f}, {change.high:+.1f}]"
    return f"{change.mean:+.1f}{ends}"


def format_perplexity(mean: float, std: float | None, *, is_bold: bool) -> str:
    """A mean, and its standard deviation where there is one."""
    text = _format(mean) if std is None else f"{_format(mean)} ± {_format(std)}"
    return Bold(text) if is_bold else text


def _format(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.4g}"
