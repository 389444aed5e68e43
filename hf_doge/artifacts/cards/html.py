"""Tables as notebooks show them: HTML that runs nothing and needs nothing, whatever the names of others hold."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from hf_doge.artifacts.cards.weights import headline, noise_notes, summary_columns
from hf_doge.artifacts.record import WeightsRecord
from hf_doge.text import printable

_BAR = "158, 202, 225, .6"  # legible under black and under white text
_MOST_ROWS = 200


def escape_html(value: Any) -> str:
    """Text of others as HTML, where lines may break but nothing else changes how its surroundings look."""
    return html.escape(printable(value, keep="\r\n\t"))


def html_table(
    columns: Mapping[str, Sequence[Any]], *, bars: Sequence[float] = (), bold: Mapping[str, set[int]] | None = None
) -> str:
    """
    Equally long columns under their titles, the first to the left, the others to the right. Cells are escaped.

    Args:
        columns (`Mapping[str, Sequence]`): Title -> cells.
        bars (`Sequence[float]`): One number in [0, 1] for each row: how much of the second column's cell is filled.
        bold (`Mapping[str, set[int]]`, *optional*): Title -> rows whose cell is bold.
    """
    titles, rows = list(columns), list(zip(*columns.values(), strict=True))
    cells = "".join(f'<th style="text-align:{_side(column)}">{escape_html(t)}</th>' for column, t in enumerate(titles))
    lines = [f"<thead><tr>{cells}</tr></thead>", "<tbody>"]
    for number, row in enumerate(rows[:_MOST_ROWS]):
        line = []
        for column, cell in enumerate(row):
            style = f"text-align:{_side(column)}"
            if column == 1 and bars:
                share = f"{100 * min(max(bars[number], 0.0), 1.0):.1f}%"
                style += f";background:linear-gradient(to right, rgba({_BAR}) {share}, transparent {share})"
            text = escape_html(cell)
            is_bold = number in (bold or {}).get(titles[column], ())
            line.append(f'<td style="{style}">{f"<b>{text}</b>" if is_bold else text}</td>')
        lines.append(f"<tr>{''.join(line)}</tr>")
    left_out = f"<p>{len(rows) - _MOST_ROWS:,} more rows are not shown.</p>" if len(rows) > _MOST_ROWS else ""
    return f"<table>{''.join(lines)}</tbody></table>{left_out}"


def _side(column: int) -> str:
    return "right" if column else "left"


def weights_html(weights: WeightsRecord) -> str:
    """The summary of domain weights, with a bar behind each weight."""
    columns = summary_columns(weights)
    largest = max(weights.mean.values())
    bars = [weights.mean[name] / largest for name in columns["domain"]]
    *recipe, spread = headline(weights)
    lines = "".join(f"<p>{escape_html(line)}</p>" for line in (" ".join(map(str.strip, recipe)), spread))
    notes = "".join(f"<p>{escape_html(text)}</p>" for text in filter(None, noise_notes(weights)))
    return f"<div>{lines}{html_table(columns, bars=bars)}{notes}</div>"


def index_html(config: Mapping[str, Any]) -> str:
    """What an index of influence holds: its checkpoints, and how they were recorded."""
    checkpoints = config["checkpoints"]
    columns = {
        "checkpoint": [one["name"] for one in checkpoints],
        "step": ["" if one.get("step") is None else one["step"] for one in checkpoints],
        "epoch": ["" if one.get("epoch") is None else f"{one['epoch']:g}" for one in checkpoints],
        "learning rate": [f"{one['learning_rate']:g}" for one in checkpoints],
    }
    facts = [
        f"recorded {'in the training backward' if config.get('record') == 'online' else 'at each checkpoint'}",
        f"rows of {config['width']} numbers, {config['dtype']}",
        *([f"tied embeddings: {config['tied']}"] if config.get("tied") else []),
        *(["in the metric of the optimizer"] if config.get("second_moment") else []),
        *(["virtual: all of it was frozen"] if config.get("virtual") is True else []),
        *(
            ["parts of it virtual (frozen), which do not count"]
            if (config.get("metadata") or {}).get("virtual_parts")
            else []
        ),
        *(["without texts"] if config.get("redacted") else []),
    ]
    head = f"Influence of {config['num_examples']:,} training examples, {len(checkpoints):,} checkpoints; {'; '.join(facts)}."
    return f"<div><p>{escape_html(head)}</p>{html_table(columns)}</div>"
