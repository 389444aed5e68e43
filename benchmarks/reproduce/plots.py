"""Plots of the mixing experiments, legible without colour; they need matplotlib: `hf-doge[plot]`."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.reproduce.report import new_figure

_MARKERS = ("o", "s", "^", "D")
_COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73")


def plot_changes(
    changes: Mapping[str, Mapping[str, Mapping[str, list[float | None]]]],
    path: Path,
    *,
    yardstick: str,
    unit: str = "%",
    better: str = "left",
) -> None:
    """
    Change against the baseline with its 95 % interval: one line per arm, one mark per group.

    Args:
        changes (`Mapping`): group -> arm -> yardstick -> mean, low and high. Only the first word of
            `yardstick` names the entry.
        path (`Path`): PNG file.
        yardstick (`str`): What changed, for the axis.
        unit (`str`): Of the changes.
        better (`str`): Which side is better, left or right.

    Raises:
        ImportError: matplotlib is not installed.
    """
    entry = yardstick.split()[0]
    arms = list(dict.fromkeys(arm for by_arm in changes.values() for arm in by_arm))
    figure = new_figure(7.0, 1.4 + 0.36 * len(arms))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for number, (group, by_arm) in enumerate(changes.items()):
        offset = 0.22 * (number - (len(changes) - 1) / 2)
        shown = [arm for arm in arms if arm in by_arm]
        means = [by_arm[arm][entry][0] for arm in shown]
        lows = [
            0.0 if by_arm[arm][entry][1] is None else by_arm[arm][entry][0] - by_arm[arm][entry][1] for arm in shown
        ]
        highs = [
            0.0 if by_arm[arm][entry][2] is None else by_arm[arm][entry][2] - by_arm[arm][entry][0] for arm in shown
        ]
        axes.errorbar(
            means,
            [arms.index(arm) + offset for arm in shown],
            xerr=[lows, highs],
            fmt=_MARKERS[number % len(_MARKERS)],
            color=_COLORS[number % len(_COLORS)],
            markersize=5,
            capsize=3,
            linewidth=1.2,
            label=group,
        )
    axes.set_yticks(range(len(arms)), arms, fontsize="small", parse_math=False)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(
        f"change in {yardstick} against uniform, {unit}, with 95 % intervals; {better} is better", fontsize="small"
    )
    axes.spines[["top", "right"]].set_visible(False)
    if len(changes) > 1:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
