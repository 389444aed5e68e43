"""`scorer="bm25"`: the texts of an index, searched by the words that they share with a query."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_doge import InfluenceIndex
from hf_doge.cli import main
from hf_doge.evaluation.influence.scorers import BM25Scorer
from hf_doge.tracing.lexical import lexical_index
from tests.tracing.influence_tools import (
    byte_level_tokenizer,
    classifier,
    language_model,
    sentences,
    tokenised,
    train,
    wordpiece_tokenizer,
)

pytest.importorskip("bm25s")
QUERIES = ["The rocket is winning a goal.", "Stocks, stocks and the market", "qqq"]


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece_tokenizer()


@pytest.fixture(scope="module")
def dataset(tokenizer):
    return tokenised(sentences(12), tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, dataset):
    folder = tmp_path_factory.mktemp("lexical")
    train(folder, classifier(tokenizer), tokenizer, dataset, epochs=1, recipe=None, tied="auto")  # searched by cosine
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")


def batch(ids):
    return [{"input_ids": torch.tensor([one])} for one in ids]


def expected_scores(tokenizer, texts, dataset):
    scorer = BM25Scorer(ignore_tokens=tuple(tokenizer.all_special_ids))
    return scorer.scores(batch(dataset["input_ids"]), batch([tokenizer(text)["input_ids"] for text in texts]))


def test_scores_are_those_of_bm25_over_the_tokens_without_special_ones(index, tokenizer, dataset):
    expected = expected_scores(tokenizer, QUERIES, dataset)
    assert expected[:2].max() > 0
    assert np.allclose(index.scores(QUERIES, scorer="bm25"), expected, rtol=1e-6)
    tokens = [{"input_ids": tokenizer(text)["input_ids"]} for text in QUERIES]
    assert np.allclose(index.scores(tokens, scorer="bm25"), expected, rtol=1e-6)


def test_hits_are_proponents_with_texts_and_words_that_add_up(index, tokenizer, dataset):
    hits = index.search(QUERIES, scorer="bm25", top_k=3, exclude=[5])
    expected = expected_scores(tokenizer, QUERIES, dataset)
    expected[:, 5] = 0
    assert set(hits["kind"]) == {"proponent"}
    assert set(hits["query"]) == {0, 1}  # no example shares a word with the third
    for hit in hits:
        assert hit["score"] == pytest.approx(expected[hit["query"], hit["example_id"]], rel=1e-5)
        assert sum(hit["word_scores"]) == pytest.approx(hit["score"], rel=1e-5)
        assert sum(hit["checkpoint_scores"]) == pytest.approx(hit["score"], rel=1e-5)
        assert hit["text"] == dataset[hit["example_id"]]["text"]
        assert all(word.lower() in hit["query_text"].lower() for word in hit["words"])
    best = [hits[int(np.argmax(np.array(hits["query"][:]) == query))]["example_id"] for query in (0, 1)]
    assert best == expected[:2].argmax(axis=1).tolist()
    assert "<mark" in index.to_html(hits)
    table = index.domain_influence(QUERIES, "label", scorer="bm25", reduction="sum")
    assert sum(table["score"][:3]) == pytest.approx(expected_scores(tokenizer, QUERIES, dataset)[0].sum(), rel=1e-5)


def test_no_checkpoint_is_needed(folder, tmp_path, tokenizer, dataset):
    shutil.copytree(folder / "index", tmp_path / "index")
    index = InfluenceIndex.from_pretrained(
        tmp_path / "index", cache_dir=tmp_path / "maps", processing_class=tokenizer, load_model=lambda path: None
    )
    expected = expected_scores(tokenizer, QUERIES, dataset)
    assert np.allclose(index.scores(QUERIES, scorer="bm25"), expected, rtol=1e-6)
    assert not list((tmp_path / "maps").glob("*"))


def test_texts_without_tokens_are_read_by_the_tokenizer_and_no_text_is_refused(tokenizer, dataset):
    facts = {"special_token_ids": tokenizer.all_special_ids}
    told = SimpleNamespace(examples=dataset.remove_columns(["input_ids"]), config=facts)
    query = [token for token in tokenizer(QUERIES[0])["input_ids"] if token not in facts["special_token_ids"]]
    found = lexical_index(told, tokenizer).scores(query)
    assert np.allclose(found, expected_scores(tokenizer, QUERIES[:1], dataset)[0], rtol=1e-6)
    without = SimpleNamespace(examples=Dataset.from_dict({"label": [0, 1]}), config={**facts, "redacted": True})
    with pytest.raises(ValueError, match=r"holds none of its examples.*published with `redact_text`.*\['label'\]"):
        lexical_index(without, tokenizer)


def test_what_the_model_says_next_is_searched_too(tmp_path):
    tokenizer = byte_level_tokenizer()
    dataset = tokenised([{"text": row["text"]} for row in sentences(12)], tokenizer)
    folder = train(tmp_path, language_model(tokenizer), tokenizer, dataset, language=True, epochs=2)
    index = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
    hits = index.search(["The"], next_tokens=6, scorer="bm25", top_k=12)
    assert hits[0]["query_text"] == f"The{hits[0]['query_target']}"
    pairs = [{"prompt": "The", "completion": hits[0]["query_target"]}, {"prompt": "The ", "completion": "goal"}]
    assert np.allclose(index.scores(["The"], next_tokens=6, scorer="bm25"), index.scores(pairs[:1], scorer="bm25"))
    chats = [[{"role": "user", "content": "The "}, {"role": "assistant", "content": "goal"}]]
    assert np.array_equal(index.scores(pairs[1:], scorer="bm25"), index.scores(["The goal"], scorer="bm25"))
    assert np.array_equal(
        index.scores([{"messages": chats[0]}], scorer="bm25"), index.scores(["The \ngoal"], scorer="bm25")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cosine": True}, "knows no gradients, so it does not go with `cosine=True`"),
        ({"target": "goal"}, "does not go with `target="),
        ({"kernel": "synonym"}, "does not go with `kernel='synonym'`"),
        ({"recipe": "paper"}, "does not go with `recipe='paper'`"),
        ({"scorer": "tfidf"}, r"`scorer` must be one of \['tracin_we', 'bm25'\]"),
    ],
)
def test_options_about_gradients_are_refused(index, options, message):
    with pytest.raises(ValueError, match=message):
        index.scores(QUERIES, **{"scorer": "bm25", **options})


def test_a_missing_library_is_told(folder, monkeypatch):
    index = InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-doge\[evaluate-influence\]'"):
        index.scores(QUERIES, scorer="bm25")


def test_the_command_has_the_option(folder, index, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    argv = ["search", "--index", str(folder / "index"), "--query", QUERIES[0], "--scorer", "bm25", "--json"]
    assert main([*argv, "--top_k", "1"]) == 0
    hit = json.loads(capsys.readouterr().out.splitlines()[0])
    assert hit["example_id"] == index.search(QUERIES[:1], scorer="bm25")[0]["example_id"]
