"""What is recorded by default, and by the paper's recipe."""

import json
import shutil

import numpy as np
import pytest

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.search_defaults import sentence_end_ids
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import tiny_classifier, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.tracing.influence_tools import (
    byte_level_tokenizer,
    classifier,
    sentencepiece_tokenizer,
    tokenised,
    train,
    wordpiece_tokenizer,
)
from tests.tracing.recorded_training import BATCH_SIZE, causal_collator, language_data, make_trainer, segments

TEXTS = (
    "The market is up. The team lost.",
    "Is the goal good? The market fell!",
    "A team, a goal, a rocket. Is it up?",
    "The rocket is up! The moon is far.",
)
PAPER = {"tied": "input", "metric": "gradient", "special_tokens": "count"}


def test_own_rows_are_recorded_of_language_models_with_tied_embeddings_only():
    assert RecordingSettings().resolved(tiny_gpt2()).tied == "own"
    assert RecordingSettings().resolved(tiny_llama(tied=False)).tied == "input"
    assert RecordingSettings().resolved(tiny_classifier()).tied == "input"
    assert RecordingSettings(tied="full").resolved(tiny_gpt2()).tied == "full"


@pytest.mark.parametrize("options", [{"record": "online"}, {"top_k_tokens": 3}, {"recipe": "paper"}])
def test_where_own_rows_are_refused_or_not_the_papers_those_of_the_input_are_recorded(options):
    assert RecordingSettings(**options).resolved(tiny_gpt2()).tied == "input"


@pytest.mark.parametrize(
    ("name", "value"), [("tied", "own"), ("metric", "optimizer"), ("special_tokens", "drop"), ("second_moment", True)]
)
@pytest.mark.filterwarnings("ignore:.second_moment=True. is called:FutureWarning")
def test_the_papers_recipe_refuses_what_contradicts_it(name, value):
    said = "metric" if name == "second_moment" else name
    with pytest.raises(ValueError, match=rf"`recipe='paper'` means `{said}={PAPER[said]!r}`, but got"):
        RecordingSettings(recipe="paper", **{name: value})
    with pytest.raises(ValueError, match=r"`recipe` must be one of \['paper'\], but got 'ours'"):
        TracInWECallback("influence", recipe="ours")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One training of a tied language model with three callbacks: folder of each index, and of the run."""
    folder, tokenizer = tmp_path_factory.mktemp("recipes"), tiny_tokenizer()
    kinds = {"default": {}, "paper": {"recipe": "paper"}, "explicit": PAPER}
    callbacks = [TracInWECallback(folder / name, dtype="float32", **options) for name, options in kinds.items()]
    trainer = make_trainer(
        folder / "run", None, tokenizer=tokenizer, model=tiny_gpt2(), dataset=language_data(),
        collator=causal_collator(tokenizer),
    )  # fmt: skip
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return folder


def test_the_papers_recipe_records_what_its_settings_record_byte_for_byte(recorded):
    default, paper, explicit = (IndexReader.open(recorded / name) for name in ("default", "paper", "explicit"))
    assert segments(paper) == segments(explicit) != segments(default)
    assert (paper.config["tied"], default.config["tied"]) == ("input", "own")


def test_an_index_that_is_continued_keeps_what_it_was_begun_with(recorded, tmp_path):
    checkpoints = sorted((recorded / "run").glob("checkpoint-*"))
    for tied in ("input", "own"):
        begun = {"tied": tied, "dtype": "float32", "metric": "gradient"}
        for some, options in ((checkpoints[:1], begun), (checkpoints, {**begun, "tied": "auto"})):
            record_dataset(
                tmp_path / tied, some, language_data(), settings=RecordingSettings(**options), progress=False,
                batch_size=BATCH_SIZE, collator=lambda examples: causal_collator(tiny_tokenizer())(examples),
            )  # fmt: skip
    found = {tied: IndexReader.open(tmp_path / tied) for tied in ("input", "own")}
    assert {tied: reader.config["tied"] for tied, reader in found.items()} == {"input": "input", "own": "own"}
    assert segments(found["input"]) == segments(IndexReader.open(recorded / "paper"))


# Searching


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A classifier that was recorded at the defaults, with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("searched"), wordpiece_tokenizer(TEXTS * 20)
    data = tokenised([{"text": text, "label": place % 3} for place, text in enumerate(TEXTS * 3)], tokenizer)
    return train(folder, classifier(tokenizer), tokenizer, data, epochs=1, recipe=None, metric="gradient"), tokenizer


def open_index(folder, tmp_path, **told):
    """The index, or one whose config.json tells something else of searches (`search=None`: nothing)."""
    if told:
        folder = shutil.copytree(folder, tmp_path / "told", dirs_exist_ok=True)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["metadata"] |= told
        path.write_text(json.dumps(config))
    return InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")


def test_special_tokens_and_ends_of_sentences_count_but_are_no_words_by_default_and_classifiers_are_asked_by_cosine(
    searched, tmp_path
):
    folder, tokenizer = searched
    index, asked = open_index(folder, tmp_path), "Is the market up? The team lost."
    assert index.config["metadata"]["search"]["sentence_end_ids"] == sorted(
        tokenizer.convert_tokens_to_ids([".", "?", "!"])
    )
    explicit = {"special_tokens": "count", "sentence_ends": "count", "cosine": True, "layers": "count"}
    plain = {**explicit, "cosine": False, "layers": "drop"}
    assert np.array_equal(index.scores(asked), index.scores(asked, **explicit))
    assert np.array_equal(index.scores(asked, recipe="paper"), index.scores(asked, **plain))
    for name, value in (("special_tokens", "drop"), ("sentence_ends", "drop"), ("cosine", False)):
        assert not np.allclose(index.scores(asked), index.scores(asked, **{name: value})), name
    silent = {*tokenizer.all_special_tokens, ".", "?", "!"}
    by_recipe = [{word for hit in index.search(asked, recipe=one) for word in hit["words"]} for one in (None, "paper")]
    assert by_recipe[0]
    assert not by_recipe[0] & silent
    assert {"[CLS]", "[SEP]", ".", "?"} <= by_recipe[1]
    for hit in index.search(asked):
        told = dict(zip(hit["words"], hit["word_scores"], strict=True))
        ends = tokenizer.convert_tokens_to_ids([*tokenizer.all_special_tokens, ".", "?", "!"])
        rest = sum(part for token, part in zip(hit["token_ids"], hit["token_scores"], strict=True) if token in ends)
        assert hit["special_token_share"] > 0
        assert sum(told.values()) + rest == pytest.approx(hit["score"])


def test_an_index_that_does_not_tell_how_it_is_searched_answers_as_before(searched, tmp_path):
    plain = {"special_tokens": "count", "sentence_ends": "count", "cosine": False, "layers": "count"}
    expected = open_index(searched[0], tmp_path).scores(TEXTS[:2], **plain)
    for told in (None, ["drop"], {"special_tokens": 3, "sentence_ends": [], "cosine": "yes", "sentence_end_ids": "."}):
        assert np.array_equal(open_index(searched[0], tmp_path, search=told).scores(TEXTS[:2]), expected)


def test_ends_of_sentences_are_left_out_of_an_index_that_does_not_tell_them(searched, tmp_path):
    options = {"special_tokens": "count", "sentence_ends": "drop", "cosine": False}
    old, new = (open_index(searched[0], tmp_path, **told) for told in ({"search": None}, {}))
    asked = "Is the market up? The team lost."
    assert np.array_equal(old.scores(asked, **options), new.scores(asked, **options))
    assert not np.array_equal(old.scores(asked, **options), old.scores(asked, recipe="paper"))


def test_the_papers_recipe_of_a_search_refuses_what_contradicts_it(searched, tmp_path):
    index = open_index(searched[0], tmp_path)
    for name, given, paper in (("cosine", True, False), ("sentence_ends", "drop", "count")):
        with pytest.raises(
            ValueError, match=rf"`recipe='paper'` means `{name}={paper!r}`, but got `{name}={given!r}`"
        ):
            index.scores("goal", recipe="paper", **{name: given})


@pytest.mark.parametrize("make", [wordpiece_tokenizer, byte_level_tokenizer, sentencepiece_tokenizer])
def test_ends_of_sentences_are_known_of_each_kind_of_tokenizer(make):
    tokenizer = make(TEXTS * 20)
    ids = tokenizer("The team lost. Is it up? No!", add_special_tokens=False)["input_ids"]
    ends = [tokenizer.decode([token]).strip() for token in ids if token in sentence_end_ids(tokenizer)]
    assert ends == [".", "?", "!"]
    assert sentence_end_ids(None) == []
