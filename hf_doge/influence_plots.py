"""Pictures of how well influence scores do, legible without colour. They need matplotlib: `hf-doge[plot]`."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_doge.plots import _STYLES, _line_style, _new_figure, _short, _write, require_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "+": "DEL+: without proponents, lower is better",
    "-": "DEL-: without opponents, higher is better",
}


def plot_case_deletion(table: Sequence[Mapping[str, Any]], path: str | os.PathLike | None = None) -> "Figure":
    """
    Two panels, DEL+ and DEL-, each with a curve over k for every scorer.

    Args:
        table (`Sequence[Mapping]`):
            One row for each scorer, sign and k: `scorer`, `sign` (`"+"` or `"-"`), `k`, and `mean`, `low` and `high`, changes
            of a probability. The band of the first scorer and that of `"random"` are drawn. From the ninth scorer on,
            lines are thinner.
        path (`str` or `os.PathLike`, *optional*): Where to write the picture; the suffix decides the format.

    Returns:
        `matplotlib.figure.Figure`: not known to pyplot, so nothing needs closing.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no row, or one lacks a field.
    """
    require_fields(table, ("scorer", "sign", "k", "mean", "low", "high"))
    scorers = list(dict.fromkeys(row["scorer"] for row in table))
    if not scorers:
        raise ValueError(
            "There must be at least one scorer to draw, but the table is empty. Run the evaluation first."
        )
    figure = _new_figure(11.0, 4.6)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, sign in zip(panels, _TITLES, strict=True):
        for position, scorer in enumerate(scorers):
            rows = sorted(
                (row for row in table if row["scorer"] == scorer and row["sign"] == sign), key=lambda row: row["k"]
            )
            ks = [row["k"] for row in rows]
            style = _line_style(position % len(_STYLES))
            width = 1.6 if position < len(_STYLES) else 0.8
            axes.plot(ks, [100 * row["mean"] for row in rows], **style, linewidth=width, label=_short(scorer))
            if position == 0 or scorer == "random":
                low, high = ([100 * row[end] for row in rows] for end in ("low", "high"))
                axes.fill_between(ks, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8, zorder=1)
        axes.set_title(_TITLES[sign], loc="left", fontsize="medium")
        axes.set_xlabel("removed training examples, k")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change of probability, percentage points")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.supxlabel("Bands: 95 % over test points, of the first scorer and of random.", fontsize="small")
    _write(figure, path)
    return figure
