"""The README.md of an influence index, as its writer renews it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_doge.artifacts.cards.card import card_bytes, read_card
from hf_doge.artifacts.cards.index import index_card
from hf_doge.artifacts.influence.manifest import CARD_FILE


def renewed_card(folder: Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """
    The card as a file to write.

    Args:
        folder (`Path`), config (`Mapping`): The index, and what its config.json is about to say.
        files (`Mapping[str, bytes]`): What is about to be written with it.
    """
    card = index_card(config, folder, files=files)
    return {CARD_FILE: card_bytes(card.merged_with(read_card(folder / CARD_FILE)))}
