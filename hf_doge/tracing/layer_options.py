"""How the rows of layers count in a search: what is asked, what the index says, and what is refused."""

from collections.abc import Mapping
from typing import Any

from hf_doge.artifacts.influence import IndexReader
from hf_doge.checks import check_choice, show
from hf_doge.gradients.layers import EMBEDDING

_ABOUT_WORDS = {"kernel": "token", "synonym_threshold": 0.5, "special_tokens": "count", "sentence_ends": "count"}
LAYERS = ("count", "mean", "drop", "only")


def decide_layers(options: Mapping[str, Any], reader: IndexReader) -> Any:
    """
    The option `layers` of a search, see [`SearchOptions`]: as given, else as the index says; `"drop"` in the paper's recipe. In an
    index that was written before the option existed, layers count in that recipe too. Options that were not given are not filled in
    yet.

    Raises:
        ValueError: It is no such value, contradicts the recipe, is about layers that the index has not, or nothing is left; or
            another option that was given is about words, and none counts.
    """
    given, is_paper = check_choice("layers", options["layers"], LAYERS, optional=True), options["recipe"] == "paper"
    if is_paper and given not in (None, "drop"):
        raise ValueError(
            f"`recipe='paper'` means `layers='drop'`, but got `layers={given!r}`. Leave out one of the two."
        )
    search = reader.config["metadata"].get("search")
    told = search.get("layers") if isinstance(search, dict) else None
    is_told = isinstance(told, str) and told in LAYERS
    layers = given or (("drop" if is_paper else told) if is_told else "count")
    _refuse_nothing_left(str(layers), options["virtual"], reader)
    _refuse_about_words(str(layers), options, reader)
    return layers


def _refuse_about_words(layers: str, options: Mapping[str, Any], reader: IndexReader) -> None:
    """An option that was given is about words, and no word counts."""
    recorded, frozen = reader.config.get("layers"), reader.config["metadata"].get("virtual_parts")
    if layers == "only":
        why, advice = "by `layers='only'` no word counts", "Leave one of the two out."
    elif recorded is not None and not recorded["embedding"]:
        why, advice = "this index has no rows of them", "Leave it out."
    elif isinstance(frozen, list) and EMBEDDING in frozen and options["virtual"] != "count":
        why, advice = "in this index they were frozen in training", "Leave it out, or count them by `virtual='count'`."
    else:
        return
    for name, plain in _ABOUT_WORDS.items():
        if options[name] not in (None, plain):
            raise ValueError(f"`{name}={show(options[name])}` is about words, but {why}. {advice}")


def _refuse_nothing_left(layers: str, virtual: str | None, reader: IndexReader) -> None:
    recorded = reader.config.get("layers")
    names = [] if recorded is None else [one["name"] for one in recorded["modules"]]
    words = [EMBEDDING] if recorded is None or recorded["embedding"] else []
    if layers in ("mean", "only") and not names:
        raise ValueError(
            f"`layers={layers!r}` is about the rows of layers, but this index holds those of words alone. Leave it out, or"
            " record some (`layers` of a recording)."
        )
    counted = {"drop": words, "only": names}.get(layers, [*words, *names])
    frozen = reader.config["metadata"].get("virtual_parts")
    left = counted if virtual == "count" or not isinstance(frozen, list) else set(counted) - set(map(str, frozen))
    if not left:
        raise ValueError(
            f"`layers={layers!r}` must leave something to count, but of this index it leaves {counted or 'nothing'}"
            + (", which was frozen in training (`virtual='count'` counts it)." if counted else ".")
            + " Leave it out."
        )
