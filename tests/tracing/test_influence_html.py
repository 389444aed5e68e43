from html.parser import HTMLParser

import pytest

from hf_doge.tracing.html import hidden_share, render_page, shade
from hf_doge.tracing.words import read_text
from tests.tracing.influence_tools import byte_level_tokenizer, wordpiece_tokenizer

ATTACK = "<script>alert('goal & \"team\"')</script> market"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.marks = [], [], [], [], []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "mark":
            self.marks.append(data)


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece_tokenizer()


def make_hit(tokenizer, text, *, query=0, kind="proponent", query_text="A new market", sign=1.0, **columns):
    tokens = sorted(set(tokenizer(query_text)["input_ids"]))
    parts = [sign * (position + 1) for position in range(len(tokens))]
    return {
        "query": query,
        "rank": 1,
        "kind": kind,
        "example_id": 4,
        "score": sign,
        "special_token_share": 0.25,
        "words": ["market", "<b>"],
        "word_scores": [0.75 * sign, 0.25 * sign],
        "token_ids": tokens,
        "token_scores": parts,
        "example_token_ids": tokens,
        "example_token_scores": parts,
        "query_label": 2.0,
        "query_text": query_text,
        "query_token_ids": tokenizer(query_text)["input_ids"],
        "text": text,
        **columns,
    }


def render(hits, tokenizer):
    return render_page(hits, tokenizer, ["text"])


def test_everything_is_escaped_and_nothing_runs(tokenizer):
    hits = [make_hit(tokenizer, ATTACK, query_text=ATTACK, label=1, label_name="<img src=x onerror=alert(1)>")]
    text = render(hits, tokenizer)
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert ATTACK in "".join(page.text)  # and yet it reads as it was written
    assert "1 (<img src=x onerror=alert(1)>)" in "".join(page.text)


def test_the_page_needs_nothing_else(tokenizer):
    text = render([make_hit(tokenizer, "The market.")], tokenizer)
    page = Page(text)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset"}
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text
    assert "color-scheme: light dark" in text


def test_a_hit_tells_how_much_of_its_score_is_not_shown(tokenizer):
    whole = make_hit(tokenizer, "market")
    hidden = {**whole, "hidden_token_ids": [whole["token_ids"][1]]}
    share = abs(whole["token_scores"][1]) / sum(map(abs, whole["token_scores"]))
    assert f"not shown {share:.0%}" in "".join(Page(render([hidden], tokenizer)).text)
    assert "not shown 1" not in "".join(Page(render([whole], tokenizer)).text)
    assert hidden_share({**whole, "hidden_token_ids": whole["token_ids"]}) == 1.0
    assert hidden_share({**whole, "token_ids": [], "token_scores": []}) == 0.0


def test_a_hit_tells_where_its_example_is_from(tokenizer):
    told = {"domain": "<i>chat</i>", "source": "web"}, {"domain": 3, "source": "web"}, {"domain": None}
    pages = ["".join(Page(render([make_hit(tokenizer, "market", **columns)], tokenizer)).text) for columns in told]
    assert [("<i>chat</i>" in page, "web" in page) for page in pages] == [(True, False), (False, True), (False, False)]


def test_queries_and_hits_stand_in_order_with_their_facts(tokenizer):
    hits = [
        make_hit(tokenizer, "The market."),
        make_hit(tokenizer, "A goal.", kind="opponent", sign=-1.0),
        make_hit(tokenizer, "", query=1),
    ]
    page = Page(render(hits, tokenizer))
    text = "".join(page.text)
    assert (
        text.index("Query 0, label 2") < text.index("proponent 1") < text.index("opponent 1") < text.index("Query 1")
    )
    assert page.tags.count("section") == 2
    assert page.tags.count("article") == 3
    assert "special tokens 25%" in text
    assert "score -1" in text


def test_a_page_unfolds_the_first_hits_of_each_kind_and_tells_how_strong_each_is(tokenizer):
    scores = [4.0, -8.0, 2.0, -1.0, 1.0, 0.5, 0.25]  # in an order of the user's own
    kinds = ["opponent" if score < 0 else "proponent" for score in scores]
    hits = [
        make_hit(tokenizer, f"Text {at}.", kind=kind, sign=score, special_token_share=0.0)
        for at, (kind, score) in enumerate(zip(kinds, scores, strict=True))
    ]
    page = render(hits, tokenizer)
    text = "".join(Page(page).text)
    assert [f"Text {at}." in text for at in range(7)] == [True] * 7
    assert page.count("<details>") == 1
    assert "2 more proponents" in page.partition("<details>")[2]
    assert page.index("Text 4.") < page.index("<details>") < page.index("Text 5.") < page.index("Text 1.")
    assert "score +4, 50% of the strongest" in text
    assert "special tokens" not in text
    foreign = [make_hit(tokenizer, "a", sign=float("nan")), *hits]
    assert "score +4, 50% of the strongest" in "".join(Page(render(foreign, tokenizer)).text)


def test_what_is_hidden_is_said_only_where_something_is(tokenizer):
    hit = make_hit(tokenizer, "market")
    assert "are not shown" not in render([hit], tokenizer)
    assert "are not shown" in render([{**hit, "hidden_token_ids": [hit["token_ids"][0]]}], tokenizer)


def test_the_words_of_a_query_are_shaded_by_its_proponents_alone(tokenizer):
    hits = [make_hit(tokenizer, "A market."), make_hit(tokenizer, "A market.", kind="opponent", sign=-9.0)]
    heading = render(hits, tokenizer).partition("<article")[0]
    assert "22, 163, 74" in heading.partition("<h2>")[2]
    assert "220, 38, 38" not in heading.partition("<h2>")[2]
    assert "220, 38, 38" in render(hits[1:], tokenizer).partition("<h2>")[2].partition("<article")[0]


def test_a_word_of_which_the_example_has_but_a_piece_comes_with_the_word_that_has_it(tokenizer):
    whole = tokenizer("marketing", add_special_tokens=False)["input_ids"]
    assert len(whole) > 1  # pieces, the first of which is a word of its own
    listed = {"query_text": "marketing", "words": ["marketing"], "word_scores": [1.0]}
    page = render([make_hit(tokenizer, "The market.", **listed)], tokenizer)
    assert "marketing (market)" in "".join(Page(page).text)
    assert "marketing (" not in "".join(Page(render([make_hit(tokenizer, "Marketing!", **listed)], tokenizer)).text)


def test_the_label_of_a_query_has_its_name_where_an_example_tells_it(tokenizer):
    hits = [make_hit(tokenizer, "a", label=1, label_name="no"), make_hit(tokenizer, "b", label=2, label_name="<yes>")]
    assert "Query 0, label 2 (<yes>)" in "".join(Page(render(hits, tokenizer)).text)
    assert "Query 0, label 2" in "".join(Page(render(hits[:1], tokenizer)).text)


def test_words_are_shaded_by_their_part_relative_to_the_largest(tokenizer):
    reading = read_text(tokenizer, ["market team goal"])
    market, team, goal = (
        tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("market", "team", "goal")
    )
    parts = {market[0]: 2.0, team[0]: -1.0, **{token: 0.0 for token in goal if token not in (market[0], team[0])}}
    text = shade(reading, parts)
    assert 'rgba(22, 163, 74, 0.600)" title="+2">market</mark>' in text
    assert 'rgba(220, 38, 38, 0.300)" title="-1">team</mark>' in text
    assert "".join(Page(text).text) == "market team goal"


def test_words_that_are_not_shared_are_not_shaded(tokenizer):
    reading = read_text(tokenizer, ["market team"])
    assert shade(reading, {}) == "market team"
    assert Page(shade(reading, {tokenizer("team")["input_ids"][1]: 1.0})).marks == ["team"]


def test_text_from_right_to_left_keeps_its_letters_and_order():
    text = "مرحبا بالعالم שלום"
    tokenizer = byte_level_tokenizer([text] * 3, vocab_size=280)
    reading = read_text(tokenizer, [text])
    shaded = shade(reading, dict.fromkeys(reading.token_ids, 1.0))
    page = Page(shaded)
    assert "".join(page.text) == text
    assert page.marks == text.split()  # no mark inside a word, where it would break the joining of letters
    whole = render([make_hit(tokenizer, text, query_text=text)], tokenizer)
    assert whole.count('dir="auto"') == 2
    assert "<bdi>" in whole


def test_no_hits_is_said(tokenizer):
    assert "No training example has a score other than 0." in render([], tokenizer)
