"""
How the tokens of a text make words that a person can read, and what part of a score each word carries.

A token is a piece of text, `[start, end)` in characters. Pieces that touch are one word where both of the characters at
the seam belong to words: letters, marks and digits, in scripts that put spaces between words. That is decided by the
text and not by the tokenizer's own `word_ids`, which call a whole text one word (SentencePiece without a pre-tokenizer)
or cut a word at every vowel sign (byte-level BPE).
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n"  # between the two texts of a pair

# Scripts written without spaces, where every token is a word: Thai to Khmer, kana, Han.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
)
_FIRST_RARE_HAN = 0x20000

Span = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """
    A text and the tokens that a model reads in it.

    Attributes:
        text (`str`): What a person reads.
        token_ids (`list[int]`): The token at each position.
        spans (`list[tuple[int, int] | None]`): Where each piece stands in the text; `None` for one that it does not show.
        tokens (`list[str]`): The tokenizer's name of each.
    """

    text: str
    token_ids: list[int]
    spans: list[Span | None]
    tokens: list[str]

    @cached_property
    def groups(self) -> list[list[int]]:
        """Positions of each word, in order of the text."""
        groups: list[list[int]] = []
        for position, span in enumerate(self.spans):
            if groups and span is not None and self._continues(groups[-1][-1], span):
                groups[-1].append(position)
            else:
                groups.append([position])
        return groups

    def word(self, group: Sequence[int]) -> str:
        """What a word looks like in the text, or the token's name where the text does not show it."""
        span = self.word_span(group)
        if span is None:
            return self.tokens[group[0]]
        return self.text[slice(*span)] or self.tokens[group[0]]

    def word_span(self, group: Sequence[int]) -> Span | None:
        """Where a word stands in the text, without the space around it."""
        spans = [span for span in (self.spans[position] for position in group) if span is not None]
        if len(spans) < len(group):
            return None
        start, end = min(start for start, _ in spans), max(end for _, end in spans)
        piece = self.text[start:end]
        stripped = piece.strip()
        if not stripped:
            return start, end
        start += piece.index(stripped)
        return start, start + len(stripped)

    def _continues(self, previous: int, span: Span) -> bool:
        """Whether a piece belongs to the word of the piece before it."""
        before = self.spans[previous]
        if before is None or span[0] == span[1] or before[0] == before[1]:
            return False
        gap = self.text[before[1] : span[0]]
        if gap and not all(_joins(character) for character in gap):
            return False  # a gap of letters or marks was in the word and is only not in the tokens
        if span[0] < before[1]:
            return True  # bytes of one character
        piece, next_piece = self.text[slice(*before)], self.text[slice(*span)]
        if piece.isspace() or next_piece.isspace():
            return piece.isspace() and not next_piece[0].isspace()  # a space that is a token of its own leads its word
        return _joins(piece[-1]) and _joins(next_piece[0])


def read_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int | None = None) -> Reading:
    """
    The reading of a text, or of a pair of texts, as the model is fed it: special tokens added, cut at `max_length`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any. One without offsets is read through what it decodes to.
        texts (`Sequence[str]`): One or two.
        max_length (`int`, *optional*): In tokens.
    """
    limits = {"truncation": max_length is not None, "max_length": max_length}
    if not tokenizer.is_fast:
        return read_ids(tokenizer, tokenizer(*texts, **limits)["input_ids"])
    encoded = tokenizer(*texts, return_offsets_mapping=True, verbose=False, **limits)
    starts = (0, len(texts[0]) + len(SEPARATOR))
    spans = [
        None if sequence is None else (start + starts[sequence], end + starts[sequence])
        for (start, end), sequence in zip(encoded["offset_mapping"], encoded.sequence_ids(), strict=True)
    ]
    return Reading(SEPARATOR.join(texts), list(encoded["input_ids"]), spans, _names(tokenizer, encoded["input_ids"]))


def read_ids(tokenizer: PreTrainedTokenizerBase | None, token_ids: Sequence[int]) -> Reading:
    """
    The reading of token ids: the text they decode to, special tokens included.

    Without a tokenizer, or where the decoded text cannot be told apart token by token, every token is a word: its name.
    """
    token_ids = [int(token) for token in token_ids]
    names = _names(tokenizer, token_ids)
    reading = None
    if tokenizer is not None:
        reading = _read_by_encoding(tokenizer, token_ids, names) or _read_by_decoding(tokenizer, token_ids, names)
    if reading is not None:
        return reading
    spans: list[Span | None] = []
    start = 0
    for name in names:
        spans.append((start, start + len(name)))
        start += len(name) + 1
    return Reading(" ".join(names), token_ids, spans, names)


def word_parts(
    reading: Reading,
    parts: Mapping[int, float],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    names: Mapping[int, str] | None = None,
) -> tuple[list[str], list[float]]:
    """
    The part of a score that each distinct word of a text carries, the largest first.

    A token's part is shared equally by the positions that hold it, and a word's part is the sum over its pieces. Tokens
    that the text does not hold (rows of an output layer, or of a decoder) follow as words of their own. Nothing is lost:
    the parts of the words add up to those of the tokens.

    Where the output part of a tied matrix was recorded, a token's part says how much the two texts agree on it as it is
    read and as it is predicted, anywhere in them: the positions that share it are where it is read.

    Args:
        reading (`Reading`): The query's text.
        parts (`Mapping[int, float]`): Token id -> part of the score.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Names the tokens that the text does not hold.
        names (`Mapping[int, str]`, *optional*): Names of what is no token: of layers.

    Returns:
        `tuple[list[str], list[float]]`: words and their parts, by falling magnitude; only words with a token of `parts`.
    """
    totals: dict[str, float] = {}
    for group, part in position_parts(reading, parts):
        word = reading.word(group)
        totals[word] = totals.get(word, 0.0) + part
    for token, name in (names or {}).items():
        if token in parts:
            totals[name] = totals.get(name, 0.0) + parts[token]
    unseen = sorted(set(parts) - set(reading.token_ids) - set(names or ()))
    for token, word in zip(unseen, _names(tokenizer, unseen), strict=True):
        totals[word] = totals.get(word, 0.0) + parts[token]
    words = sorted(totals, key=lambda word: -abs(totals[word]))
    return words, [totals[word] for word in words]


def position_parts(reading: Reading, parts: Mapping[int, float]) -> list[tuple[list[int], float]]:
    """Each word's positions and part, in order of the text; words without a token of `parts` are left out."""
    counts = Counter(reading.token_ids)
    shared = []
    for group in reading.groups:
        tokens = [reading.token_ids[position] for position in group]
        if any(token in parts for token in tokens):
            shared.append((group, sum(parts.get(token, 0.0) / counts[token] for token in tokens)))
    return shared


def _read_by_encoding(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], names: list[str]) -> Reading | None:
    """The offsets of the decoded text, where it encodes to the same tokens again."""
    if not tokenizer.is_fast:
        return None
    text = _decode(tokenizer, token_ids)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if list(encoded["input_ids"]) != token_ids:
        return None
    return Reading(text, token_ids, [tuple(span) for span in encoded["offset_mapping"]], names)


def _read_by_decoding(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], names: list[str]) -> Reading | None:
    """What each token adds to the decoded text, where every prefix of the tokens decodes to a prefix of the text."""
    text, start = _decode(tokenizer, token_ids), 0
    spans: list[Span | None] = []
    for position in range(1, len(token_ids) + 1):
        prefix = _decode(tokenizer, token_ids[:position]).rstrip("\N{REPLACEMENT CHARACTER}")
        if not text.startswith(prefix) or len(prefix) < start:
            return None
        spans.append((start, len(prefix)))
        start = len(prefix)
    return Reading(text, token_ids, spans, names)


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def _names(tokenizer: PreTrainedTokenizerBase | None, token_ids: Sequence[int]) -> list[str]:
    if tokenizer is None:
        return [f"#{token}" for token in token_ids]
    names = tokenizer.convert_ids_to_tokens(list(token_ids))
    return [f"#{token}" if name is None else name for token, name in zip(token_ids, names, strict=True)]


def _joins(character: str) -> bool:
    """Whether a character continues a word: a letter, a mark or a digit of a script that puts spaces between words."""
    code = ord(character)
    if code >= _FIRST_RARE_HAN or any(first <= code <= last for first, last in _UNSPACED):
        return False
    return character == "_" or unicodedata.category(character)[0] in "LMN"
