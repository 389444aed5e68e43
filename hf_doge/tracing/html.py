"""One page that shows queries and what pushed them: words shaded by their part of the score. No script, no other file."""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_doge.artifacts.cards.html import escape_html
from hf_doge.tracing.words import Reading, position_parts, read_ids, read_text

Hit = Mapping[str, Any]

MAX_WORDS = 12  # listed with a hit
LEAST_SHARE = 0.005  # of a score that special or hidden tokens hold, to be told
NUM_OPEN = 3  # hits of a kind that are unfolded
DOMAIN_COLUMNS = ("domain", "source")  # of the examples: what says where one is from, the first that there is
_NO_LIMIT = 1_000_000  # a tokenizer that knows none has a much larger one
_PROPONENT, _OPPONENT = "22, 163, 74", "220, 38, 38"  # green and red that black and white text both stand out from
_OPAQUE = 0.6

# Of a page, and of a part of a notebook's: the latter changes nothing but what stands in it.
_PAGE_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
"""
_STYLE = """\
.hf-doge section { border-top: 1px solid #8888; margin-top: 2rem; }
.hf-doge article { border-inline-start: 4px solid; margin: 1rem 0; padding-inline-start: .8rem; }
.hf-doge article.proponent { border-color: rgb(22, 163, 74); }
.hf-doge article.opponent { border-color: rgb(220, 38, 38); }
.hf-doge .text { unicode-bidi: plaintext; text-align: start; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.hf-doge .facts { font-size: .85em; opacity: .8; margin: .3rem 0; }
.hf-doge mark { color: inherit; border-radius: .2em; }
.hf-doge li { display: inline-block; margin-inline-end: .6em; }
.hf-doge summary { cursor: pointer; font-size: .85em; opacity: .8; }
.hf-doge ul { padding: 0; font-size: .85em; }
"""
_LEGEND = """\
<p class="facts">A proponent (green) is a training example that lowered the query's loss, an opponent (red) one that raised
it. A word is shaded by its part of that score, relative to the largest part of a word shown with it; a query's words by their parts of its
proponents' scores. Where a training example shares but a piece of a query's word, its own word follows in brackets.{hidden}</p>
"""
_HIDDEN = " The parts of special tokens and of the ends of sentences count and are not shown."

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body class="hf-doge">
<h1>{title}</h1>
{legend}{sections}
</body>
</html>
"""


def render_page(
    hits: Iterable[Hit],
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Sequence[str],
    *,
    title: str = "Traced predictions",
) -> str:
    """
    The page of some hits.

    Args:
        hits (`Iterable[Mapping]`): Rows of [`InfluenceIndex.search`], those of a query one after the other.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The one of the model.
        columns (`Sequence[str]`): Those of the hits that hold the text of an example.
        title (`str`): Title of the page.

    Returns:
        `str`: HTML that needs no other file and runs nothing. Whatever the texts hold is escaped.
    """
    legend, sections = _legend_and_sections(hits, tokenizer, columns)
    return _PAGE.format(title=escape_html(title), style=_PAGE_STYLE + _STYLE, legend=legend, sections=sections)


def render_fragment(hits: Iterable[Hit], tokenizer: PreTrainedTokenizerBase | None, columns: Sequence[str]) -> str:
    """The same as a part of another page, such as a notebook's; arguments as in [`render_page`]."""
    legend, sections = _legend_and_sections(hits, tokenizer, columns)
    return f'<div class="hf-doge">\n<style>\n{_STYLE}</style>\n{legend}{sections}\n</div>'


@dataclass(frozen=True)
class Shown:
    """Something that a notebook shows: `html` is what it shows."""

    html: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.html):,} characters of HTML, which a notebook shows)"

    def _repr_html_(self) -> str:
        return self.html


def _legend_and_sections(
    hits: Iterable[Hit], tokenizer: PreTrainedTokenizerBase | None, columns: Sequence[str]
) -> tuple[str, str]:
    queries = [(query, list(rows)) for query, rows in groupby(hits, key=lambda hit: hit["query"])]
    hides = any(hit.get("hidden_token_ids") for _, rows in queries for hit in rows)
    sections = [_section(query, rows, tokenizer, columns) for query, rows in queries]
    nothing = '<p class="text">No training example has a score other than 0.</p>'
    return _LEGEND.format(hidden=_HIDDEN if hides else ""), "\n".join(sections) or nothing


def shade(reading: Reading, parts: Mapping[int, float]) -> str:
    """
    A text with its words shaded, green for positive parts, red for negative ones.

    Args:
        reading (`Reading`): The text and its tokens.
        parts (`Mapping[int, float]`): Token id -> part of the score, shared by its positions.
    """
    found = [(reading.word_span(group), part) for group, part in position_parts(reading, parts)]
    words = sorted((span, part) for span, part in found if span is not None and span[0] < span[1])
    largest = max((abs(part) for _, part in words), default=0.0)
    pieces, end = [], 0
    for (start, stop), part in words:
        if start < end:
            continue  # pieces that overlap are shaded once
        pieces += [escape_html(reading.text[end:start]), _mark(reading.text[start:stop], part, largest)]
        end = stop
    return "".join([*pieces, escape_html(reading.text[end:])])


def _section(
    query: int,
    hits: Sequence[Hit],
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Sequence[str],
) -> str:
    first = hits[0]
    label = "" if first.get("query_label") is None else f", label {escape_html(_query_label(first, hits))}"
    by_kind = {
        kind: [hit for hit in hits if hit["kind"] == kind] for kind in dict.fromkeys(hit["kind"] for hit in hits)
    }
    total: dict[int, float] = {}
    for hit in by_kind.get("proponent", hits):
        for token, part in _parts(hit).items():
            total[token] = total.get(token, 0.0) + part
    target, reading = first.get("query_target"), query_reading(first, tokenizer)
    traced = "" if target is None else f'<p class="facts">traced: <bdi>{escape_html(target)}</bdi></p>\n'
    strongest = max((size for hit in hits if isfinite(size := abs(hit["score"]))), default=0.0) or 1.0
    sections = [
        _fold(
            [_article(hit, reading, example_reading(hit, tokenizer, columns), strongest=strongest) for hit in rows],
            kind,
        )
        for kind, rows in by_kind.items()
    ]
    return (
        f'<section>\n<h2>Query {escape_html(query)}{label}</h2>\n<div class="text" dir="auto">{shade(reading, total)}</div>\n'
        f"{traced}{chr(10).join(sections)}\n</section>"
    )


def _fold(articles: Sequence[str], kind: str) -> str:
    """The first of a kind, and the others behind a line that opens them."""
    shown, more = "\n".join(articles[:NUM_OPEN]), "\n".join(articles[NUM_OPEN:])
    if not more:
        return shown
    number = len(articles) - NUM_OPEN
    told = escape_html(f"{number} more {kind}{'s' if number > 1 else ''}")
    return f"{shown}\n<details>\n<summary>{told}</summary>\n{more}\n</details>"


def _article(hit: Hit, query: Reading, example: Reading | None, *, strongest: float) -> str:
    special = hit["special_token_share"]
    facts = [
        f"{escape_html(hit['kind'])} {escape_html(hit['rank'])}",
        f"score {escape_html(_number(hit['score']))}, {100 * abs(hit['score']) / strongest:.3g}% of the strongest",
        f"example {escape_html(hit['example_id'])}",
        *([f"label {escape_html(_label(hit))}"] if hit.get("label") is not None else []),
        *(escape_html(name) for name in (domain_of(hit),) if name is not None),
        *([f"special tokens {special:.0%}"] if special >= LEAST_SHARE else []),
        *([f"not shown {share:.0%}"] if (share := hidden_share(hit)) >= LEAST_SHARE else []),
    ]
    text = "" if example is None else f'<div class="text" dir="auto">{shade(example, _example_parts(hit))}</div>\n'
    return (
        f'<article class="{escape_html(hit["kind"])}">\n<p class="facts">{" · ".join(facts)}</p>\n'
        f"{text}{_word_list(hit, query, example)}\n</article>"
    )


def _word_list(hit: Hit, query: Reading, example: Reading | None) -> str:
    """The words of the query with the largest parts; those that the example has only a piece of with its own word."""
    words, parts = hit["words"][:MAX_WORDS], hit["word_scores"]
    # Layers, which the text does not show, may outweigh all words, and leave none of them visible.
    read = {query.word(group) for group in query.groups}
    of_words = [abs(part) for word, part in zip(words, parts, strict=False) if word in read]
    largest = max(of_words or map(abs, parts), default=0.0)
    others = {} if example is None else _words_that_share(words, query, example, _parts(hit).keys())
    items = []
    for word, part in zip(words, parts, strict=False):
        told = f" (<bdi>{escape_html(others[word])}</bdi>)" if word in others else ""
        items.append(f"<li><bdi>{_mark(word, part, largest)}</bdi>{told} {escape_html(_number(part))}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _words_that_share(
    words: Sequence[str], query: Reading, example: Reading, shared: AbstractSet[int]
) -> dict[str, str]:
    """Word of the query -> the example's word with a piece of it, where the example does not have the query's word itself."""
    tokens = {example.word(group): {example.token_ids[at] for at in group} for group in example.groups}
    own = {word.casefold() for word in tokens}
    pieces: dict[str, set[int]] = {}
    for group in query.groups:
        pieces.setdefault(query.word(group), set()).update(query.token_ids[at] for at in group)
    found = {}
    for word in words:
        common = pieces.get(word, set()) & shared
        other = next((name for name, held in tokens.items() if common & held), None)
        if other is not None and word.casefold() not in own:
            found[word] = other
    return found


def _mark(text: str, part: float, largest: float) -> str:
    strength = 0.0 if largest == 0 else _OPAQUE * min(1.0, abs(part) / largest)
    colour = _PROPONENT if part >= 0 else _OPPONENT
    style = f"background: rgba({colour}, {strength:.3f})"
    return f'<mark style="{style}" title="{escape_html(_number(part))}">{escape_html(text)}</mark>'


def _parts(hit: Hit) -> dict[int, float]:
    return _shown(hit, "token_ids", "token_scores")


def _example_parts(hit: Hit) -> dict[int, float]:
    return _shown(hit, "example_token_ids", "example_token_scores")


def _shown(hit: Hit, ids: str, scores: str) -> dict[int, float]:
    hidden = hit.get("hidden_token_ids") or ()
    return {token: part for token, part in zip(hit[ids], hit[scores], strict=True) if token not in hidden}


def _number(value: float) -> str:
    return f"{value:+.3g}"


def _label(hit: Hit) -> str:
    name = hit.get("label_name")
    return str(hit["label"]) if name is None else f"{hit['label']} ({name})"


def _query_label(first: Hit, hits: Iterable[Hit]) -> str:
    """A query's label, by its name too where an example of that label tells it."""
    label = _plain(first["query_label"])
    return next((_label(hit) for hit in hits if hit.get("label") == label), str(label))


def hidden_share(hit: Hit) -> float:
    """Which part of a score, in absolute parts of its tokens, those have that count and are not shown, in [0, 1]."""
    hidden = hit.get("hidden_token_ids") or ()
    sizes = {token: abs(part) for token, part in zip(hit["token_ids"], hit["token_scores"], strict=True)}
    total = sum(sizes.values())
    return sum(size for token, size in sizes.items() if token in hidden) / total if total else 0.0


def domain_of(hit: Hit) -> str | None:
    """Where the example of a hit is from, where the index tells it."""
    return next((hit[name] for name in DOMAIN_COLUMNS if isinstance(hit.get(name), str)), None)


def _plain(value: Any) -> Any:
    """A label that is a whole number without its decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def query_reading(hit: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Reading:
    """The query of a hit, in its own spelling where its text gives its tokens again."""
    token_ids, text = list(hit["query_token_ids"]), hit["query_text"]
    if tokenizer is not None:
        first, separator, second = text.partition("\n")
        for texts in ([text], [first, second]) if separator else ([text],):
            reading = read_text(tokenizer, texts, max_length=len(token_ids))
            if reading.token_ids == token_ids:
                return reading
    return read_ids(tokenizer, token_ids)


def example_reading(
    hit: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, fields: Sequence[str]
) -> Reading | None:
    """The training example of a hit, as far as the index kept it: its text fields, else its tokens."""
    texts = [hit[name] for name in fields if isinstance(hit.get(name), str)]
    if texts and tokenizer is not None:
        limit = tokenizer.model_max_length
        return read_text(tokenizer, texts[:2], max_length=limit if limit < _NO_LIMIT else None)
    if texts:
        return Reading("\n".join(texts), [], [], [])
    ids = hit.get("input_ids")
    return read_ids(tokenizer, ids) if ids is not None and len(ids) else None
