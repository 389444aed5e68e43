"""How an index is searched where nothing else is asked: decided when it is begun, and kept in its config.json."""

from typing import Any

from torch import nn

from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.tracing.limits import num_classes
from hf_doge.tracing.settings import RecordingSettings, text_tokenizer

_ENDS = (".", "?", "!", "...", "…", "。", "？", "！", "؟", "।")  # noqa: RUF001


def search_defaults(settings: RecordingSettings, model: nn.Module, tokenizer: Any | None) -> dict[str, Any]:
    """
    What [`SearchOptions`] are at their defaults for a new index.

    Special tokens and ends of sentences are in every text, so that as words they explain nothing and are hidden; their gradients
    hold much of a sentence, and count. A classifier's few examples of large gradient are proponents of everything, unless
    scores are divided by the norms. The paper does neither.

    Args:
        settings ([`RecordingSettings`]): Of the recording.
        model (`nn.Module`): Which is recorded.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the examples.

    Returns:
        `dict`: `special_tokens`, `sentence_ends` and `cosine`, see [`SearchOptions`], and `sentence_end_ids`; `layers` where
        words and layers have rows.
    """
    is_paper, layers = settings.recipe == "paper", settings.chosen_layers(model)
    shown, num_words = "count" if is_paper else "hide", len(input_embedding_matrix(model))
    return {
        "special_tokens": shown,
        "sentence_ends": shown,
        "cosine": not is_paper and settings.record == "checkpoint" and (num_classes(model) or 0) > 1,
        **({"layers": "count"} if layers is not None and layers.embedding else {}),
        "sentence_end_ids": [token for token in sentence_end_ids(tokenizer) if token < num_words],
    }


def sentence_end_ids(processing_class: Any | None) -> list[int]:
    """Ids of the tokens that are nothing but the end of a sentence, ascending; none without a tokenizer."""
    tokenizer = text_tokenizer(processing_class)
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        return []
    found = set()
    for end in _ENDS:
        for text in (end, f"a{end}", f"a {end}"):  # at a beginning, or behind a word
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if ids and tokenizer.decode(ids[-1:]).strip() == end:
                found.add(int(ids[-1]))
    return sorted(found)
