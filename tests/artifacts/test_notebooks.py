"""What notebooks show: weights, comparisons and figures as HTML and pictures, whatever names hold."""

import pickle
import re

import pytest

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.cards.html import html_table, index_html
from hf_doge.evaluation.comparison import Comparison
from tests.artifacts.test_domain_weights import make_weights
from tests.evaluation.test_comparison import make_run, paired
from tests.tracing.test_influence_html import ATTACK, Page

HOSTILE = '<script>alert("x")</script> & co'


def shown(thing):
    """The tags, and the text as a reader sees it."""
    page = Page(thing._repr_html_())
    assert "script" not in page.tags
    return page.tags, "".join(page.text)


def test_weights_show_every_domain_heaviest_first_with_the_bar_of_its_weight():
    weights = DomainWeights({"wiki": 0.25, "web": 0.75}, recipe={"name": "paper", "mu": 0.5})
    tags, text = shown(weights)
    assert tags.count("tr") == 3
    assert text.index("web") < text.index("wiki")
    assert "0.7500" in text
    assert "Recipe: paper (mu 0.5)" in text
    page = weights._repr_html_()
    assert re.findall(r"linear-gradient\(to right, rgba\([^)]*\) ([\d.]+)%", page) == ["100.0", "33.3"]


def test_names_of_others_are_text():
    tags, text = shown(DomainWeights({HOSTILE: 0.5, "b": 0.5}, recipe={"name": HOSTILE}))
    assert text.count(HOSTILE) == 2
    assert "script" not in tags
    _, text = shown(Comparison([make_run(HOSTILE, 1, {"code": 1.0, "prose": 2.0, ATTACK: 3.0})]))
    assert HOSTILE in text
    assert ATTACK in text
    assert HOSTILE in "".join(Page(html_table({HOSTILE: ["a"], "b": [HOSTILE]})).text)


def test_what_changes_its_surroundings_is_shown_escaped():
    table = html_table({"name": ["a\u202eb"], "value": ["1"]})
    assert "\u202e" not in table
    assert "a\\u202eb" in table


def test_weights_that_were_learned_show_their_steps():
    _, text = shown(make_weights())
    assert "steps 10 to 50" in text


def test_of_many_rows_the_first_are_shown_and_the_others_counted():
    tags, text = shown(DomainWeights.uniform([f"domain {number}" for number in range(250)]))
    assert tags.count("tr") == 201
    assert "50 more rows are not shown." in text
    _, text = shown(DomainWeights.uniform([f"domain {number}" for number in range(200)]))
    assert "more rows" not in text


def test_a_comparison_shows_its_tables_lowest_mean_bold_and_its_verdict():
    comparison = Comparison(paired(0.9))
    tags, text = shown(comparison)
    assert tags.count("table") == len(comparison.tables()) == 3
    page = comparison._repr_html_()
    (bold,) = re.findall(r"<td[^>]*>code</td>.*?</tr>", page)[:1]
    assert re.search(r"10\.00 ± 0\.00</td>.*<b>9\.00 ± 0\.00</b>", bold)
    assert "learned against uniform, ca (target, not trained on): -10.0" in text
    assert "better." in text


def test_a_comparison_of_few_seeds_says_so():
    _, text = shown(Comparison(paired(0.9, seeds=2)))
    assert "From 2 seed(s) no interval means much." in text


def test_an_index_shows_its_checkpoints_and_how_they_were_recorded():
    config = {
        "num_examples": 1200,
        "width": 8,
        "dtype": "float16",
        "record": "checkpoint",
        "tied": "own",
        "second_moment": True,
        "checkpoints": [{"name": HOSTILE, "step": 7, "epoch": 0.5, "learning_rate": 1e-3}],
    }
    page = Page(index_html(config))
    text = "".join(page.text)
    assert "1,200 training examples, 1 checkpoints" in text
    assert "tied embeddings: own; in the metric of the optimizer" in text
    assert HOSTILE in text
    assert "script" not in page.tags


# Pictures


def test_a_figure_shows_itself_as_a_picture_without_pyplot():
    pytest.importorskip("matplotlib")
    figure = make_weights().plot()
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    assert pickle.loads(pickle.dumps(figure))._repr_png_()[:4] == b"\x89PNG"


def test_ipython_shows_a_figure_as_a_picture():
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(make_weights().plot())
    assert data["image/png"]
