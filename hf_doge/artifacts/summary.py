"""Domain weights as text that fits a terminal, a log or a card."""

import textwrap

from hf_doge.artifacts.record import WeightsRecord
from hf_doge.text import printable


def summarize(weights: WeightsRecord) -> str:
    """The recipe, the entropy and a table of the domains, heaviest first; columns without any value are left out."""
    return "\n".join([*_headline(weights), "", format_table(summary_columns(weights))])


def summary_columns(weights: WeightsRecord) -> dict[str, list[str]]:
    """Title -> cells, heaviest domain first; columns without any value are left out."""
    natural = weights.natural_proportions
    names = sorted(weights.names, key=weights.mean.get, reverse=True)

    def fact(key: str) -> list[str]:
        values = [weights.domains[name].get(key) for name in names]
        return ["" if value is None else f"{value:,}" for value in values]

    columns = {
        "domain": names,
        "weight": [f"{weights.mean[name]:.4f}" for name in names],
        "last": [f"{weights.last[name]:.4f}" for name in names] if weights.last != weights.mean else [],
        "uniform": [f"{1 / len(names):.4f}" for _ in names],
        "natural": [f"{natural[name]:.4f}" for name in names] if natural else [],
        "x natural": [_ratio(weights.mean[name], natural[name]) for name in names] if natural else [],
        "rows": fact("num_rows"),
        "tokens": fact("num_tokens"),
    }
    return {title: cells for title, cells in columns.items() if any(cells)}


def format_table(columns: dict[str, list[str]]) -> str:
    """Columns of equally many cells under their titles: the first aligned to the left, the others to the right."""
    lines = []
    for row in zip(*([title, *map(printable, cells)] for title, cells in columns.items()), strict=True):
        lines.append(row)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _headline(weights: WeightsRecord) -> list[str]:
    """How the weights were made, wrapped, and how far they are from uniform."""
    arguments = ", ".join(
        f"{key} {value}"
        for key, value in weights.recipe.items()
        if key != "name" and value is not None and not isinstance(value, dict | list)
    )
    recipe = f"Recipe: {weights.recipe.get('name', 'not recorded')}" + (f" ({arguments})" if arguments else "")
    recipe = printable(recipe)
    spread = f"{len(weights.names)} domains, entropy {weights.entropy:.3f} nats (uniform {weights.max_entropy:.3f})"
    if weights.trajectory is not None:
        steps = weights.trajectory.steps
        spread += f", steps {steps[0]} to {steps[-1]}"
    return [*textwrap.wrap(recipe, width=100, subsequent_indent="  "), spread]


def _ratio(weight: float, natural: float) -> str:
    """How many times its natural share a domain gets."""
    return f"{weight / natural:.2f}" if natural > 0 else ""
