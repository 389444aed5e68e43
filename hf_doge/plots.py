"""Pictures of domain weights and of what they bring, legible without colour. They need matplotlib: `hf-doge[plot]`."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hf_doge.files import prepare_file, write_atomically
from hf_doge.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dash, marker and darkness all differ, so that any one of them tells two series apart: color, dashes, marker, its filling.
_STYLES = [
    ("#000000", "-", "o", "#000000"),
    ("#d55e00", "--", "s", "white"),
    ("#0072b2", "-.", "^", "#0072b2"),
    ("#009e73", ":", "D", "white"),
    ("#56b4e9", "-", "v", "#56b4e9"),
    ("#cc79a7", "--", "P", "white"),
    ("#8c6d00", "-.", "X", "#8c6d00"),
    ("#7f7f7f", ":", "h", "white"),
]
_FAINT = "#bdbdbd"
_BAR = "#9ecae1"
_ROW_HEIGHT = 0.22  # inches for one domain
_MAX_SIDE_BY_SIDE = 16  # with more domains the bars go under the trajectory, not next to it
_MAX_NAME_LENGTH = 28
_MOST_NOISE = 50.0  # of a logarithm that is drawn: beyond it a band is the whole panel
_MAX_PIXELS = 65_000  # on a side; matplotlib 3.8 draws fewer than 2**16


class _Trajectory(Protocol):
    domains: Sequence[str]
    steps: np.ndarray
    weights: np.ndarray


class _Weights(Protocol):
    """What is drawn of domain weights: pictures know numbers, not artifacts."""

    mean: dict[str, float]
    recipe: dict[str, Any]

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def natural_proportions(self) -> dict[str, float] | None: ...
    @property
    def trajectory(self) -> _Trajectory | None: ...


def plot_domain_weights(
    weights: _Weights,
    path: str | os.PathLike | None = None,
    *,
    max_domains: int | None = None,
    noise: np.ndarray | None = None,
) -> "Figure":
    """
    Two panels: the weights over the steps, and the mean weights against uniform and natural proportions.

    The trajectory names the heaviest domains, at most eight, and draws the others in grey. Where the noise is known, each named
    line has a band: where the noise of the scores alone could have led it, two standard deviations either way (of shrunk weights: before
    they were shrunk). Without a trajectory there is only the second panel; without token counts it has no natural proportions.

    Args:
        weights (`DomainWeights`): What to draw.
        path (`str` or `os.PathLike`, *optional*): Where to write the picture; the suffix decides the format.
        max_domains (`int`, *optional*): How many domains have a bar, the heaviest; by default all.
        noise (`numpy.ndarray` of shape `(T, K)`, *optional*): Standard deviation of the logarithm of each weight of the
            trajectory, as [`~hf_doge.artifacts.score_noise.weight_noise`] tells it.

    Returns:
        `matplotlib.figure.Figure`: not known to pyplot, so nothing needs closing; a notebook shows it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = sorted(weights.names, key=lambda name: weights.mean[name], reverse=True)
    shown = names[:max_domains]
    rows_height = 1.3 + _ROW_HEIGHT * len(shown)
    if weights.trajectory is None:
        figure = _new_figure(7.0, rows_height)
        bars = figure.subplots()
    else:
        if len(shown) > _MAX_SIDE_BY_SIDE:
            figure = _new_figure(8.5, 4.2 + rows_height)
            lines, bars = figure.subplots(2, 1, height_ratios=[4.2, rows_height])
        else:
            figure = _new_figure(12.0, max(4.2, rows_height))
            lines, bars = figure.subplots(1, 2, width_ratios=[1.1, 1])
        _draw_trajectory(lines, weights.trajectory, names, noise)
        before = " before shrinkage" if weights.recipe.get("shrinkage") else ""
        bands = "" if noise is None else f" (bands: noise of the scores{before}, two standard deviations)"
        lines.set_xlabel(f"step{bands}")
    _draw_weights(bars, weights, shown)
    _write(figure, path)
    return figure


def plot_comparison(table: Sequence[Mapping[str, Any]], path: str | os.PathLike | None = None) -> "Figure":
    """
    Perplexity of every domain under several mixtures, and its change against the first mixture in percent.

    Args:
        table (`Sequence[Mapping]`):
            One row for each mixture and domain: `mixture`, `domain`, `mean` (perplexity over the seeds, > 0) and `std`
            (its standard deviation; `None` or NaN for a single seed). Both are drawn in the order of their first rows.
            At most eight mixtures.
        path (`str` or `os.PathLike`, *optional*): Where to write the picture; the suffix decides the format.

    Returns:
        `matplotlib.figure.Figure`: not known to pyplot, so nothing needs closing; a notebook shows it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No or too many mixtures, a mean is not positive, or a mixture has a domain twice or not at all.
    """
    require_fields(table, ("mixture", "domain", "mean", "std"))
    mixtures, domains, means, stds = _comparison_arrays(table)
    figure = _new_figure(12.0, 1.6 + len(domains) * max(0.3, 0.11 * len(mixtures)))
    absolute, relative = figure.subplots(1, 2, sharey=True, width_ratios=[1.2, 1])
    _draw_dots(absolute, means, stds)
    absolute.set_xlabel("perplexity, lower is better")
    if means.max() > 3 * means.min():
        _scale_logarithmically(absolute)
    _draw_dots(relative, 100 * (means / means[0] - 1), 100 * stds / means[0])
    relative.axvline(0, color="black", linewidth=0.8, zorder=1)
    relative.set_xlabel(f"change against {_short(mixtures[0])}, %", parse_math=False)
    absolute.set_yticks(range(len(domains)), [_short(name) for name in domains], parse_math=False)
    absolute.set_ylim(len(domains) - 0.5, -0.5)
    legend = figure.legend(
        absolute.containers, [_short(name) for name in mixtures], loc="outside upper center", ncols=4, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    if np.isfinite(stds).any():
        figure.supxlabel("Bars: one standard deviation over the seeds.", fontsize="small")
    _write(figure, path)
    return figure


def plot_sweep(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike | None = None) -> "Figure":
    """
    The loss of each run of a sweep against what the law predicts for it, fitted with it and without it.

    Args:
        runs (`Sequence[Mapping]`): One for each mixture: `objective`, `predicted` and `predicted_left_out`, in nats.
        path (`str` or `os.PathLike`, *optional*): Where to write the picture; the suffix decides the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no run, or one lacks a number.
    """
    if not runs:
        raise ValueError("There must be at least one run to draw, but `runs` is empty.")
    require_fields(runs, ("objective", "predicted", "predicted_left_out"))
    figure = _new_figure(5.6, 5.2)
    axes = figure.subplots()
    observed = np.array([run["objective"] for run in runs])
    for position, (key, label) in enumerate(
        (("predicted_left_out", "predicted without the run"), ("predicted", "fitted with it"))
    ):
        color, _, marker, filling = _STYLES[position]
        axes.plot(
            observed, [run[key] for run in runs], marker, color=color, markerfacecolor=filling, label=label, zorder=3
        )
    ends = observed.min(), observed.max()
    axes.plot(ends, ends, color="black", linewidth=0.8, zorder=1)
    axes.set_xlabel("loss of the run, nats a token")
    axes.set_ylabel("loss by the law")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)
    return figure


def _draw_trajectory(axes: "Axes", trajectory: _Trajectory, names: list[str], noise: np.ndarray | None) -> None:
    """Weights over steps: the first of `names` each in a style of its own and with a band, the rest in grey."""
    steps, order = trajectory.steps, [trajectory.domains.index(name) for name in names]
    weights = trajectory.weights[:, order]
    num_named = len(names) if len(names) <= len(_STYLES) else len(_STYLES) - 1
    ends = []
    for position, name in enumerate(names[:num_named]):
        # Marks of different lines stand at different steps: lines that run together can still be told apart.
        spacing = max(1, len(steps) // 8)
        first = spacing * position // num_named
        (line,) = axes.plot(steps, weights[:, position], **_line_style(position), markevery=(first, spacing), zorder=3)
        ends.append((weights[-1, position], line, _short(name)))
        if noise is not None:
            factor = np.exp(np.minimum(2 * noise[:, order[position]], _MOST_NOISE))
            low, high = weights[:, position] / factor, np.minimum(weights[:, position] * factor, 1)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0, zorder=1, label=name)
    if num_named < len(names):
        rest = axes.plot(steps, weights[:, num_named:], color=_FAINT, linewidth=0.8, zorder=1)
        ends.append((float(np.median(weights[-1, num_named:])), rest[0], f"{len(rest)} smaller domains"))
    axes.axhline(1 / len(names), color="black", linewidth=0.8, linestyle=(0, (1, 3)), zorder=2)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.set_ylim(0, 1.05 * max(weights.max(), 1 / len(names)))
    axes.set_title("Weights while learning", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, ends)


def _label_ends(axes: "Axes", ends: list) -> None:
    """Write names at the right ends of lines, pushed apart where they would overlap, with a sample of each line."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import blended_transform_factory

    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[0])
    heights = _push_apart([end[0] for end in ends], gap=0.055 * (high - low), low=low, high=high)
    transform = blended_transform_factory(axes.transAxes, axes.transData)
    for (value, line, label), height in zip(ends, heights, strict=True):
        leader = Line2D(
            [1.0, 1.03], [value, height], transform=transform, color="#7f7f7f", linewidth=0.6, clip_on=False
        )
        sample = Line2D([1.03, 1.065, 1.1], [height] * 3, transform=transform, clip_on=False)
        sample.update_from(line)
        sample.set(transform=transform, clip_on=False, markevery=[1])
        axes.add_artist(leader)
        axes.add_artist(sample)
        axes.text(1.115, height, label, transform=transform, va="center", fontsize="small", parse_math=False)


def _push_apart(values: list[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions near ascending `values`, at least `gap` from each other and within `[low, high]` if they fit."""
    positions = list(values)
    for index in range(1, len(positions)):
        positions[index] = max(positions[index], positions[index - 1] + gap)
    positions[-1] = min(positions[-1], max(high, low + gap * (len(positions) - 1)))
    for index in range(len(positions) - 2, -1, -1):
        positions[index] = min(positions[index], positions[index + 1] - gap)
    return positions


def _draw_weights(axes: "Axes", weights: _Weights, names: list[str]) -> None:
    """Horizontal bars, heaviest on top, their values in a column at the right."""
    rows = range(len(names))
    values = [weights.mean[name] for name in names]
    series: list[Any] = [
        axes.barh(rows, values, height=0.6, color=_BAR, edgecolor="black", linewidth=0.7, label="weight")
    ]
    num_domains = len(weights.names)
    uniform = f"uniform (1/{num_domains})"
    series.append(axes.axvline(1 / num_domains, color="black", linewidth=1.2, linestyle="--", label=uniform))
    if (natural := weights.natural_proportions) is not None:
        shares = [natural[name] for name in names]
        series += axes.plot(shares, rows, "D", color="black", markerfacecolor="white", markersize=5, clip_on=False)
        series[-1].set_label("natural (share of the tokens)")
    axes.set_yticks(rows, [_short(name) for name in names], parse_math=False, fontsize="small")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    column: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "va": "center",
        "fontsize": "small",
        "family": "monospace",
    }
    for row, value in zip(rows, values, strict=True):
        axes.text(1.02, row, "<.001" if 0 < value < 0.0005 else f"{value:.3f}", **column)
    left_out = num_domains - len(names)
    axes.set_xlabel(f"weight ({left_out:,} lighter domains are not shown)" if left_out else "weight")
    axes.legend(
        handles=series,
        title="Mean weights",
        title_fontsize="medium",
        alignment="left",
        fontsize="small",
        ncols=3,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        columnspacing=1.2,
        borderpad=0,
    )


def _draw_dots(axes: "Axes", values: np.ndarray, errors: np.ndarray) -> None:
    """`values` of shape `(M, K)` as marks with error bars: a row for each domain, its mixtures one below the other."""
    num_mixtures, num_domains = values.shape
    for row in range(0, num_domains, 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f0f0f0", linewidth=0, zorder=0)
    offsets = (np.arange(num_mixtures) - (num_mixtures - 1) / 2) * 0.8 / num_mixtures
    for position in range(num_mixtures):
        color, _, marker, filling = _STYLES[position]
        axes.errorbar(
            values[position],
            np.arange(num_domains) + offsets[position],
            xerr=errors[position],
            fmt=marker,
            color=color,
            markerfacecolor=filling,
            markersize=5,
            elinewidth=1.1,
            capsize=2,
            zorder=3,
        )
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def require_fields(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: A row of a table lacks one of these fields.
    """
    for number, row in enumerate(rows):
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(
                f"Every row of the table must have {list(names)}, but row {number} has {sorted(row)}, without {missing}."
            )


def _comparison_arrays(table: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Mixtures (M), domains (K), and means and standard deviations of shape `(M, K)`, NaN where there is no deviation."""
    mixtures = list(dict.fromkeys(row["mixture"] for row in table))
    domains = list(dict.fromkeys(row["domain"] for row in table))
    if not 1 <= len(mixtures) <= len(_STYLES):
        raise ValueError(f"A comparison must have 1 to {len(_STYLES)} mixtures, but got {len(mixtures)}: {mixtures}.")
    means = np.full((len(mixtures), len(domains)), np.nan)
    stds = means.copy()
    for row in table:
        place = mixtures.index(row["mixture"]), domains.index(row["domain"])
        if not np.isnan(means[place]):
            raise ValueError(
                f"A mixture must have each domain once, but {row['mixture']!r} has {row['domain']!r} twice."
            )
        if not (0 < row["mean"] < np.inf):
            raise ValueError(
                f"`mean` must be a finite number > 0, but got {row['mean']!r} for {row['mixture']!r} on {row['domain']!r}."
            )
        means[place] = row["mean"]
        stds[place] = np.nan if row["std"] is None else row["std"]
    for mixture, domain in np.argwhere(np.isnan(means)):
        raise ValueError(f"A mixture must have every domain, but {mixtures[mixture]!r} lacks {domains[domain]!r}.")
    return mixtures, domains, means, stds


def _scale_logarithmically(axes: "Axes") -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, 20, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _line_style(position: int) -> dict[str, Any]:
    color, dashes, marker, filling = _STYLES[position]
    return {"color": color, "linestyle": dashes, "marker": marker, "markerfacecolor": filling, "markersize": 5.5}


def _short(name: str) -> str:
    """The name, cut where it would take the space of the picture."""
    name = printable(name)
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 1] + "…"


def _new_figure(width: float, height: float) -> "Figure":
    """A figure of its own, in inches, that leaves pyplot's state alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from hf_doge.figure_plots import DrawnFigure
    except ImportError as error:
        raise ImportError("Plots need matplotlib. Install it by `pip install 'hf-doge[plot]'`.") from error
    dpi = min(150, _MAX_PIXELS / max(width, height))
    figure = DrawnFigure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: "Figure", path: str | os.PathLike | None) -> None:
    """Write the whole picture or nothing."""
    if path is None:
        return
    path = prepare_file(path)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lstrip(".") or "png")
    write_atomically(path, content.getvalue())
