"""One page that shows queries and what pushed them: words shaded by their part of the score. No script, no other file."""

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_doge.text import printable
from hf_doge.tracing.hits import example_reading, query_reading
from hf_doge.tracing.words import Reading, position_parts

Hit = Mapping[str, Any]

MAX_WORDS = 12  # listed with a hit
_PROPONENT, _OPPONENT = "22, 163, 74", "220, 38, 38"  # green and red that black and white text both stand out from
_OPAQUE = 0.6

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
section { border-top: 1px solid #8888; margin-top: 2rem; }
article { border-inline-start: 4px solid; margin: 1rem 0; padding-inline-start: .8rem; }
article.proponent { border-color: rgb(22, 163, 74); }
article.opponent { border-color: rgb(220, 38, 38); }
.text { unicode-bidi: plaintext; text-align: start; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.facts { font-size: .85em; opacity: .8; margin: .3rem 0; }
mark { color: inherit; border-radius: .2em; }
li { display: inline; margin-inline-end: .6em; }
ul { padding: 0; font-size: .85em; }
"""

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
<body>
<h1>{title}</h1>
<p class="facts">A proponent (green) is a training example that lowered the query's loss, an opponent (red) one that raised
it. A word is shaded by its part of that score, relative to the largest part shown with it.</p>
{sections}
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
    by_query = groupby(hits, key=lambda hit: hit["query"])
    sections = [_section(query, list(rows), tokenizer, columns) for query, rows in by_query]
    if not sections:
        sections = ['<p class="text">No training example has a score other than 0.</p>']
    return _PAGE.format(title=_escape(title), style=_STYLE, sections="\n".join(sections))


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
        pieces += [_escape(reading.text[end:start]), _mark(reading.text[start:stop], part, largest)]
        end = stop
    return "".join([*pieces, _escape(reading.text[end:])])


def _section(
    query: int,
    hits: Sequence[Hit],
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Sequence[str],
) -> str:
    first = hits[0]
    label = "" if first.get("query_label") is None else f", label {_escape(_plain(first['query_label']))}"
    total: dict[int, float] = {}
    for hit in hits:
        for token, part in _parts(hit).items():
            total[token] = total.get(token, 0.0) + part
    articles = "\n".join(_article(hit, example_reading(hit, tokenizer, columns)) for hit in hits)
    return (
        f'<section>\n<h2>Query {_escape(query)}{label}</h2>\n<div class="text" dir="auto">{shade(query_reading(first, tokenizer), total)}</div>\n'
        f"{articles}\n</section>"
    )


def _article(hit: Hit, reading: Reading | None) -> str:
    facts = [
        f"{_escape(hit['kind'])} {_escape(hit['rank'])}",
        f"score {_escape(_number(hit['score']))}",
        f"example {_escape(hit['example_id'])}",
        *([f"label {_escape(_label(hit))}"] if hit.get("label") is not None else []),
        f"special tokens {hit['special_token_share']:.0%}",
    ]
    text = "" if reading is None else f'<div class="text" dir="auto">{shade(reading, _example_parts(hit))}</div>\n'
    return (
        f'<article class="{_escape(hit["kind"])}">\n<p class="facts">{" · ".join(facts)}</p>\n'
        f"{text}{_word_list(hit)}\n</article>"
    )


def _word_list(hit: Hit) -> str:
    """The words of the query with the largest parts."""
    parts = hit["word_scores"]
    largest = abs(parts[0]) if parts else 0.0
    items = [
        f"<li><bdi>{_mark(word, part, largest)}</bdi> {_escape(_number(part))}</li>"
        for word, part in zip(hit["words"][:MAX_WORDS], parts, strict=False)
    ]
    return f"<ul>{''.join(items)}</ul>"


def _mark(text: str, part: float, largest: float) -> str:
    strength = 0.0 if largest == 0 else _OPAQUE * abs(part) / largest
    colour = _PROPONENT if part >= 0 else _OPPONENT
    style = f"background: rgba({colour}, {strength:.3f})"
    return f'<mark style="{style}" title="{_escape(_number(part))}">{_escape(text)}</mark>'


def _parts(hit: Hit) -> dict[int, float]:
    return dict(zip(hit["token_ids"], hit["token_scores"], strict=True))


def _example_parts(hit: Hit) -> dict[int, float]:
    return dict(zip(hit["example_token_ids"], hit["example_token_scores"], strict=True))


def _number(value: float) -> str:
    return f"{value:+.3g}"


def _label(hit: Hit) -> str:
    name = hit.get("label_name")
    return str(hit["label"]) if name is None else f"{hit['label']} ({name})"


def _plain(value: Any) -> Any:
    """A label that is a whole number without its decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _escape(value: Any) -> str:
    """Text of others as HTML, where lines may break but nothing else changes how its surroundings look."""
    return html.escape(printable(value, keep="\r\n\t"))
