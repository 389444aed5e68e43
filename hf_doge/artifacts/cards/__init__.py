"""The README.md of artifacts: rendered from templates with the real numbers, and merged with what a person wrote."""

from hf_doge.artifacts.cards.index import index_card
from hf_doge.artifacts.cards.merge import card_bytes, card_text, read_card
from hf_doge.artifacts.cards.weights import PLOT_FILE, draw_plot, weights_card

__all__ = ["PLOT_FILE", "card_bytes", "card_text", "draw_plot", "index_card", "read_card", "weights_card"]
