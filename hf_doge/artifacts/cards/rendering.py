"""Filling the templates of the cards."""

from functools import cache
from typing import Any

import jinja2

PLACEHOLDER = "path/or/name"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("hf_doge.artifacts.cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown; what others wrote is escaped where it is put into words
    )


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values."""
    return _environment().get_template(template).render(**values).strip()


def place_of(repo_id: str | None) -> dict[str, Any]:
    """What every template says of where the artifact is: its name, and what comes before its paths in SQL."""
    if repo_id is None:
        return {"place": PLACEHOLDER, "root": "", "is_local": True}
    return {"place": repo_id, "root": f"hf://datasets/{repo_id}/", "is_local": False}


def listing(facts: dict[str, str | None]) -> str:
    """A list of what is known, and nothing of what is not."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
