"""The page of `hf-doge view`: what its functions answer, and, where gradio and a browser are there, the page itself."""

import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import yaml

from hf_doge import InfluenceIndex
from hf_doge.cli import main, view
from hf_doge.cli.view import LISTED, MOST_HITS, Viewer, make_page, serve
from tests.launch import REPOSITORY
from tests.tracing.influence_tools import (
    TOPICS,
    byte_level_tokenizer,
    classifier,
    language_model,
    sentences,
    tokenised,
    train,
    wordpiece_tokenizer,
)
from tests.tracing.test_influence_html import Page

ATTACK = '<img src=x onerror="document.title=1"> ${alert(1)} {{value}}\u202e'
SPACE = REPOSITORY / "examples" / "space"
SHOWN = ATTACK.replace("\u202e", "\\u202e")


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    """A classifier whose sources have hostile names, and one wrong label."""
    folder, tokenizer = tmp_path_factory.mktemp("view"), wordpiece_tokenizer()
    rows = [{**row, "source": ATTACK if number % 2 else "web"} for number, row in enumerate(sentences(18))]
    rows[4] = {**rows[4], "text": "Market <img src=x onerror=1> ${1}"}
    index = train(folder, classifier(tokenizer), tokenizer, tokenised(rows, tokenizer), epochs=1)
    return Viewer(InfluenceIndex.from_pretrained(index, cache_dir=folder / "maps"))


@pytest.fixture(scope="module")
def language_viewer(tmp_path_factory):
    """A language model without labels or domains."""
    folder, tokenizer = tmp_path_factory.mktemp("language"), byte_level_tokenizer()
    rows = [{"text": row["text"]} for row in sentences(9)]
    dataset = tokenised(rows, tokenizer)
    index = train(folder, language_model(tokenizer), tokenizer, dataset, language=True, epochs=1)
    return Viewer(InfluenceIndex.from_pretrained(index, cache_dir=folder / "maps"))


def read(html):
    page = Page(html)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not any(name.startswith("on") or "http" in (value or "") for name, value in page.attributes)
    return page, "".join(page.text)


def hits_of(html):
    return [tuple(map(str, one)) for one in re.findall(r"(proponent|opponent) (\d+) .*?example (\d+)", html)]


def test_a_text_has_the_hits_of_a_search_with_shaded_words_and_every_domain(viewer):
    hits, domains = viewer.trace("The market is new", label="money", top_k=2)
    assert read(hits)[0].marks
    asked = [{"text": "The market is new", "label": "money"}]
    found = viewer.index.search(asked, top_k=2)
    assert hits_of(hits) == [(hit["kind"], str(hit["rank"]), str(hit["example_id"])) for hit in found]
    _, told = read(domains)
    assert "By source" in told
    assert "By label" in told
    assert SHOWN in told
    for column in ("source", "label_name"):
        for row in viewer.index.domain_influence(asked, column):
            assert f">{row['score']:+.3g}<" in domains
    assert hits_of(viewer.trace("The market is new")[0])  # of what the model predicts


def test_scores_are_divided_as_asked(viewer):
    for cosine in (False, True):
        found = viewer.index.search(["The market is new"], top_k=1, cosine=cosine)
        hits, domains = viewer.trace("The market is new", top_k=1, cosine=cosine)
        assert re.search(re.escape(f"score {found[0]['score']:+.3g}") + r"(?![\d.e])", hits)
        for row in viewer.index.domain_influence(["The market is new"], "source", cosine=cosine):
            assert f">{row['score']:+.3g}<" in domains
    assert viewer.cosine is bool(viewer.index.config["metadata"]["search"]["cosine"])


def test_domains_have_bars_by_their_score_and_none_below_0(viewer):
    _, domains = viewer.trace("The market is new")
    rows = re.findall(r"transparent ([\d.]+)%\)\">([-+][^<]+)</td>", domains)
    assert len(rows) == 5  # two sources, three labels
    assert all((float(bar) == 0) == (score.startswith("-")) for bar, score in rows)


def test_a_training_example_is_traced_to_the_others(viewer):
    hits, domains = viewer.trace_example("4", top_k=MOST_HITS)
    assert {example for *_, example in hits_of(hits)} <= {str(n) for n in range(18)} - {"4"}
    assert len(hits_of(hits)) > 5
    assert domains
    _, text = read(hits)
    assert "label 1" in text  # it is asked about with its own label


def test_a_training_example_answers_as_its_text_does(language_viewer):
    index = language_viewer.index
    hits, domains = language_viewer.trace_example(3, top_k=3)
    found = index.search([index.examples[3]["text"]], top_k=3, exclude=[3])
    assert hits_of(hits) == [(hit["kind"], str(hit["rank"]), str(hit["example_id"])) for hit in found]
    assert domains == ""
    assert hits_of(language_viewer.trace("The runner", " is winning", top_k=1)[0])  # a prompt and its completion


def test_suspicious_labels_are_the_examples_of_most_self_influence(viewer):
    page = viewer.suspicious()
    _, text = read(page)
    strongest, second = (f">{row['score']:.3g}<" for row in viewer.index.self_influence().select([0, 1]))
    assert page.index(strongest) <= page.index(second)
    assert all(topic in text for topic in TOPICS)
    assert SHOWN in text


def test_examples_are_listed_by_number_domain_and_text(viewer):
    listed = viewer.listed()
    assert [number for _, number in listed] == list(range(18))
    assert listed[2][0] == f"2 · web · {TOPICS[2]} · {viewer.index.examples[2]['text']}"
    assert viewer.label_names == sorted(TOPICS)
    assert "\u202e" not in listed[1][0]
    assert len(listed) <= LISTED


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (lambda viewer: viewer.trace("  "), "Write a text first."),
        (lambda viewer: viewer.trace("a" * 50_001), "must have at most 50,000 characters"),
        (lambda viewer: viewer.trace("market", label="<b>none</b>"), "<b>none</b>"),
        (lambda viewer: viewer.trace_example("18"), "An example must be a number from 0 to 17."),
        (lambda viewer: viewer.trace_example("-1"), "An example must be a number from 0 to 17."),
    ],
)
def test_a_question_that_cannot_be_answered_is_answered_with_the_reason(asked, reason, viewer):
    hits, domains = asked(viewer)
    _, text = read(hits)
    assert reason in text
    assert domains == ""


def test_an_example_without_text_is_no_query(viewer, monkeypatch):
    kept = viewer._rows([3]).select_columns(["label"])
    monkeypatch.setattr(viewer, "_rows", lambda ids: kept)
    assert "keeps neither the text of this example nor its tokens" in read(viewer.trace_example(3)[0])[1]


def test_tokens_without_the_labels_of_an_index_of_completions_are_no_query(viewer, monkeypatch):
    kept = viewer._rows([3]).select_columns(["source"]).add_column("input_ids", [[5, 6, 7]])
    monkeypatch.setattr(viewer, "_rows", lambda ids: kept)
    assert set(viewer._query_of(kept[0])) == {"input_ids"}
    monkeypatch.setitem(viewer.index.config["metadata"], "encoding", {"masks": ["completion"]})
    assert "input_ids" not in viewer._query_of(kept[0])


def test_an_index_that_cannot_answer_says_why(viewer, monkeypatch):
    def gone(*_, **__):
        raise FileNotFoundError("Checkpoint '<b>' is gone.")

    monkeypatch.setattr(InfluenceIndex, "search", gone)
    monkeypatch.setattr(InfluenceIndex, "self_influence", gone)
    for told in (*viewer.trace("market")[:1], viewer.suspicious()):
        assert read(told)[1] == "Checkpoint '<b>' is gone."


def test_without_gradio_the_command_says_what_to_install(viewer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["view", str(viewer.index.reader.folder)]) == 2
    assert "pip install 'hf-doge[view]'" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [(["--port", "70000"], "--port"), ([], "required: index")])
def test_what_cannot_be_viewed_is_refused(flags, message, capsys, tmp_path):
    assert main(["view", *([str(tmp_path)] if flags else []), *flags]) == 2
    assert message in capsys.readouterr().err


# As a Space


def test_the_space_shows_the_index_of_its_variable(viewer, monkeypatch):
    shown = []
    monkeypatch.setenv("INDEX", str(viewer.index.reader.folder))
    monkeypatch.setenv("HF_HOME", str(viewer.index.reader.folder / ".." / "home"))
    monkeypatch.setattr(
        view, "make_page", lambda one: SimpleNamespace(block_thread=lambda: shown.append(one.listed()))
    )
    monkeypatch.setattr(view, "serve", lambda page: None)
    runpy.run_path(str(SPACE / "app.py"))
    assert shown == [viewer.listed()]


def test_the_card_of_the_space_says_how_it_is_run():
    _, card, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(card)
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert card["sdk_version"].startswith("6.")
    assert len(card["short_description"]) <= 60  # longer ones are refused
    assert "hf-doge[view]" in (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()


# In a browser


@pytest.fixture
def address(viewer):
    """Where the page is, while it is."""
    pytest.importorskip("gradio")
    page = make_page(viewer)
    yield serve(page, server_name="127.0.0.1")
    page.close()


@pytest.fixture
def browser_page(address):
    """The page in a headless Chromium, and what it asked other places for."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, elsewhere, wrong = browser.new_page(), [], []
        page.on("request", lambda request: elsewhere.append(request.url) if not is_own(request.url, address) else None)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        assert page.goto(address).headers["content-security-policy"].startswith("default-src 'self'")
        yield page
        assert elsewhere == []
        assert wrong == []
        assert page.title() != "1"
        browser.close()


def is_own(url, address):
    return url.startswith((address, "data:", "blob:"))


@pytest.mark.slow
def test_in_a_browser_texts_are_traced_and_rows_picked_and_labels_listed(browser_page, viewer):
    page = browser_page
    page.get_by_label("Text", exact=True).fill("The market is new")
    page.get_by_role("button", name="Trace").click()
    page.wait_for_selector(".hf-doge article.proponent mark")
    found = viewer.index.search(["The market is new"], top_k=5)
    assert page.locator(".hf-doge article").count() == len(found)
    assert page.locator("h3", has_text="By source").count() == 1
    assert SHOWN in page.locator("table").last.evaluate("one => one.parentElement.innerText")
    page.get_by_role("tab", name="Trace a training example").click()
    page.get_by_label("Example", exact=True).fill("4")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Trace").last.click()
    page.wait_for_selector("h2:has-text('label 1')")
    page.get_by_role("tab", name="Suspicious labels").click()
    page.get_by_role("button", name="List them").click()
    page.wait_for_selector("th:has-text('example')")
    assert page.locator("img[src=x]").count() == 0
