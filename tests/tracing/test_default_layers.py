"""What `layers="auto"`, the default, records: words, and the last layer of a classifier that is trained with them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings
from tests.reference_tracin_we import slow_part_score
from tests.tiny import tiny_classifier, tiny_gpt2, tiny_tokenizer
from tests.tracing.recorded_training import classification_data, language_data, make_trainer, segments, train

BOTH = ["embedding", "classifier"]
SIZES = {"vocab_size": 32, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def resolved(model, folder=None, **settings):
    return RecordingSettings(**settings).resolved(model, folder).layers


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad = False
    return model


def test_words_and_the_last_layer_of_a_classifier_are_recorded():
    roberta = RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **SIZES)
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **SIZES)
    assert resolved(tiny_classifier()) == BOTH
    assert resolved(RobertaForSequenceClassification(roberta)) == ["embedding", "classifier.out_proj"]
    assert resolved(GPT2ForSequenceClassification(gpt2)) == ["embedding", "score"]


def test_words_alone_are_recorded_of_models_that_choose_no_class_of_a_text():
    regression = tiny_classifier()
    regression.config.problem_type = "regression"
    assert resolved(tiny_gpt2()) is None
    assert resolved(regression) is None


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "classifier.weight"])
def test_words_alone_are_recorded_where_they_or_the_layer_are_frozen(name):
    assert resolved(frozen(tiny_classifier(), name)) is None


def test_no_other_layer_takes_the_place_of_a_last_one_that_is_not_trained_itself():
    """Neither one with as many outputs as there are classes, nor the half of an adapter."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=24, num_labels=16)
    assert resolved(BertForSequenceClassification(config)) == BOTH
    assert resolved(frozen(BertForSequenceClassification(config), "classifier.weight")) is None
    lora = LoraConfig(r=3, target_modules=["query", "classifier"], modules_to_save=["word_embeddings"])
    assert resolved(get_peft_model(tiny_classifier(), lora)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "paper"},
        {"record": "online"},
        {"metric": "optimizer"},
        {"metric": "auto"},
        {"projection": "pca", "projection_width": 4},
        {"layers": "embedding"},
        {"layers": None},
    ],
    ids=str,
)
def test_words_alone_are_recorded_where_nothing_else_can_be_or_is_meant(options):
    assert resolved(tiny_classifier(), **options) is None


def test_a_projection_of_layers_needs_layers_that_are_named():
    with pytest.raises(ValueError, match="`projection_dim` is about the gradients of layers, but `layers` names none"):
        RecordingSettings(projection_dim=4)


# Recorded


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One training with three callbacks: folder of each index, and of the run."""
    folder = tmp_path_factory.mktemp("default_layers")
    kinds = {"default": {}, "named": {"layers": BOTH, "projection_dim": 5}, "words": {"layers": "embedding"}}
    trainer = make_trainer(folder / "run", None, tokenizer=tiny_tokenizer())
    for name, options in kinds.items():
        trainer.add_callback(
            TracInWECallback(folder / name, dtype="float32", dataset=classification_data(), **options)
        )
    trainer.train()
    return folder


def record(folder, checkpoints, **settings):
    record_dataset(
        folder, checkpoints, classification_data(), tokenizer=tiny_tokenizer(), progress=False, batch_size=4,
        settings=RecordingSettings(dtype="float32", **settings),
    )  # fmt: skip
    return IndexReader.open(folder)


def test_the_default_records_what_the_layers_by_name_record_byte_for_byte(recorded):
    default, named = (IndexReader.open(recorded / name) for name in ("default", "named"))
    assert [one["name"] for one in default.config["layers"]["modules"]] == ["classifier"]
    assert default.config["layers"]["modules"][0]["kept"] == [3, 5]  # 15 of the 16 numbers of one row
    assert default.config["layers"]["embedding"]
    assert segments(default) == segments(named)


def test_the_rows_of_words_are_those_of_an_index_of_words(recorded):
    default, words = (IndexReader.open(recorded / name, cache_dir=recorded / "maps") for name in ("default", "words"))
    for checkpoint in range(2):
        pairs = zip(
            default.example_rows(checkpoint, range(11)), words.example_rows(checkpoint, range(11)), strict=True
        )
        for (tokens, rows), (expected_tokens, expected) in pairs:
            is_word = tokens < default.embedding_shape[0]
            assert torch.equal(tokens[is_word], expected_tokens)
            torch.testing.assert_close(rows[is_word], expected)
            assert not is_word.all()


def test_what_is_recorded_afterwards_by_default_is_what_was_recorded_in_training(recorded, tmp_path):
    again = record(tmp_path / "index", sorted((recorded / "run").glob("checkpoint-*")))
    assert segments(again) == segments(IndexReader.open(recorded / "default"))


def test_an_index_that_is_continued_keeps_the_layers_that_it_was_begun_with(recorded, tmp_path):
    checkpoints = sorted((recorded / "run").glob("checkpoint-*"))
    for name, begun in (("words", {"layers": "embedding"}), ("default", {})):
        record(tmp_path / name, checkpoints[:1], **begun)
        assert segments(record(tmp_path / name, checkpoints)) == segments(IndexReader.open(recorded / name))
    record(tmp_path / "other", checkpoints[:1], layers=BOTH, projection_dim=7)
    continued = record(tmp_path / "other", checkpoints)
    assert continued.config["layers"]["modules"][0]["kept"] == [3, 7]
    assert len(continued.checkpoints) == 2
    for number, layers in enumerate(("classifier", ["embedding", "pooler.dense"], [*BOTH, "pooler.dense"])):
        record(tmp_path / f"named-{number}", checkpoints[:1], layers=layers)
        whole = record(tmp_path / f"whole-{number}", checkpoints, layers=layers)
        assert segments(record(tmp_path / f"named-{number}", checkpoints)) == segments(whole)
    told = "'word embeddings', not 'word embeddings and 1 linear layer (classifier, 3 x 4 kept)'. An index keeps the layers"
    with pytest.raises(ValueError, match=re.escape(f"another configuration: `layers` is {told}")):
        record(tmp_path / "words", checkpoints, layers=BOTH)
    told = "'word embeddings and 1 linear layer (classifier, 3 x 5 kept)', not 'word embeddings'. An index keeps the layers"
    with pytest.raises(ValueError, match=re.escape(f"another configuration: `layers` is {told}")):
        record(tmp_path / "default", checkpoints, recipe="paper")


def test_an_index_keeps_its_layers_whatever_its_model_trains_or_decides_later(recorded):
    """A head that is frozen in a second part of a training; a kind of problem that the first forward sets."""
    multi_label = tiny_classifier()
    multi_label.config.problem_type = "multi_label_classification"
    for model in (frozen(tiny_classifier(), "classifier.weight"), multi_label):
        assert resolved(model) is None
        assert resolved(model, recorded / "default") == BOTH


def test_a_training_that_is_resumed_keeps_the_layers_that_it_was_begun_with(tmp_path):
    for name, begun in (("words", {"layers": "embedding"}), ("default", {})):
        for resume, options in ((None, begun), (True, {})):
            steps = {"max_steps": 4 if resume else 2}
            callback = TracInWECallback(
                tmp_path / name / "index", dtype="float32", dataset=classification_data(), **options
            )
            reader = train(tmp_path / name, tokenizer=tiny_tokenizer(), callback=callback, resume=resume, **steps)
        assert len(reader.checkpoints) == 2
        assert (reader.config["layers"] is None) == (name == "words")


def test_a_language_model_is_recorded_as_before(tmp_path):
    data = language_data().map(lambda row: {"labels": row["input_ids"]})
    callback = TracInWECallback(tmp_path / "index", dtype="float32", dataset=data)
    reader = train(
        tmp_path,
        tokenizer=tiny_tokenizer(),
        callback=callback,
        model=tiny_gpt2(),
        dataset=data,
        per_device_train_batch_size=1,
    )
    assert (reader.config["format_version"], reader.config["layers"]) == ("1.0", None)


def test_the_layer_stands_among_the_words_of_a_hit_by_its_name(recorded):
    index = InfluenceIndex.from_pretrained(recorded / "default", cache_dir=recorded / "maps")
    hits = index.search(classification_data(2, seed=9).remove_columns(["text", "domain"]), top_k=3)
    assert all("classifier" in hit["words"] for hit in hits)
    assert any(len(hit["words"]) > 1 for hit in hits)
    assert "classifier" in index.to_html(hits)


def test_words_of_a_page_are_shaded_by_the_largest_word_however_large_the_layer_is(recorded):
    index = InfluenceIndex.from_pretrained(recorded / "default", cache_dir=recorded / "maps")
    hits = index.search(classification_data(2, seed=9).remove_columns(["text", "domain"]), top_k=3)
    alone = next(place for place, hit in enumerate(hits) if hit["words"][0] == "classifier" and len(hit["words"]) > 1)
    listed = index.to_html(hits.select([alone])).split("<ul>")[1]
    opacities = dict(zip(hits[alone]["words"], re.findall(r"rgba\([\d, ]+, ([\d.]+)\)", listed), strict=True))
    assert opacities["classifier"] == opacities[hits[alone]["words"][1]] == "0.600"


# Searched


PARTS = {"count": [range(33)], "mean": [range(32), range(32, 33)], "drop": [range(32)], "only": [range(32, 33)]}


@pytest.fixture(scope="module")
def index(recorded):
    return InfluenceIndex.from_pretrained(recorded / "default", cache_dir=recorded / "maps")


def asked(*ids):
    """Some training examples as queries: their gradients are the recorded ones."""
    return classification_data().select(ids).remove_columns(["text", "domain"])


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("layers", PARTS)
def test_scores_are_the_mean_of_those_of_the_parts_that_count(index, layers, cosine):
    reader, ids = index.reader, (2, 5)
    assert (reader.embedding_shape[0], reader.vocabulary_size) == (32, 33)
    expected = np.zeros((len(ids), len(index)))
    for place, checkpoint in enumerate(reader.checkpoints):
        rows = reader.example_rows(place, range(len(index)))
        for query, example in np.ndindex(expected.shape):
            score = slow_part_score(rows[ids[query]], rows[example], PARTS[layers], cosine=cosine)
            expected[query, example] += checkpoint["learning_rate"] * score
    found = index.scores(asked(*ids), layers=layers, cosine=cosine)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("layers", PARTS)
def test_the_words_and_the_layer_of_a_hit_add_up_to_its_score_however_they_count(index, layers, cosine):
    queries = asked(2, 5)
    scores = index.scores(queries, layers=layers, cosine=cosine)
    hits = index.search(queries, layers=layers, cosine=cosine)
    assert len(hits) > 10
    for hit in hits:
        assert hit["score"] == pytest.approx(scores[hit["query"], hit["example_id"]], rel=1e-4)
        for name in ("token_scores", "example_token_scores", "checkpoint_scores"):
            assert sum(hit[name]) == pytest.approx(hit["score"], rel=1e-6)
        assert ("classifier" in hit["words"]) == (layers != "drop")
    assert any(set(hit["words"]) > {"classifier"} for hit in hits) == (layers in ("count", "mean"))


def test_the_papers_recipe_of_a_search_counts_the_words_alone(index, recorded):
    words = InfluenceIndex.from_pretrained(recorded / "words", cache_dir=recorded / "maps")
    found, expected = (one.scores(asked(2, 5), recipe="paper") for one in (index, words))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`recipe='paper'` means `layers='drop'`, but got `layers='mean'`"):
        index.scores(asked(2), recipe="paper", layers="mean")


def test_an_index_of_before_counts_all_of_its_rows_in_the_papers_recipe_too(index, recorded, tmp_path):
    folder = shutil.copytree(recorded / "default", tmp_path / "index")
    config = json.loads((folder / "config.json").read_text())
    del config["metadata"]["search"]["layers"]
    (folder / "config.json").write_text(json.dumps(config))
    before = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
    plain = {"cosine": False, "special_tokens": "count", "sentence_ends": "count", "layers": "count"}
    assert np.array_equal(before.scores(asked(2, 5), recipe="paper"), index.scores(asked(2, 5), **plain))


def test_how_layers_count_is_refused_where_there_are_none_or_nothing_is_left(index, recorded):
    words = InfluenceIndex.from_pretrained(recorded / "words", cache_dir=recorded / "maps")
    for layers in ("mean", "only"):
        with pytest.raises(
            ValueError, match=rf"`layers='{layers}'` is about the rows of layers, but this index holds"
        ):
            words.scores(asked(2), layers=layers)
    assert np.array_equal(words.scores(asked(2), layers="drop"), words.scores(asked(2)))
    with pytest.raises(
        ValueError, match=r"`layers` must be one of \['count', 'mean', 'drop', 'only'\], but got 'sum'"
    ):
        index.scores(asked(2), layers="sum")


def test_nothing_is_left_of_an_index_of_layers_without_them(recorded, tmp_path):
    record(tmp_path / "index", sorted((recorded / "run").glob("checkpoint-*"))[:1], layers="classifier")
    alone = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    with pytest.raises(
        ValueError, match=r"`layers='drop'` must leave something to count, but of this index it leaves nothing"
    ):
        alone.scores(asked(2), layers="drop")
    assert np.array_equal(alone.scores(asked(2), layers="mean"), alone.scores(asked(2), layers="only"))


@pytest.mark.parametrize(
    "option",
    [{"kernel": "synonym"}, {"special_tokens": "drop"}, {"sentence_ends": "hide"}, {"synonym_threshold": 0.9}],
)
def test_what_is_about_words_is_refused_where_no_word_counts(index, recorded, tmp_path, option):
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=rf"`{name}={value!r}` is about words, but by `layers='only'` no word counts"):
        index.scores(asked(2), layers="only", **option)
    record(tmp_path / "index", sorted((recorded / "run").glob("checkpoint-*"))[:1], layers="classifier")
    alone = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    with pytest.raises(ValueError, match=rf"`{name}={value!r}` is about words, but this index has no rows of them"):
        alone.scores(asked(2), **option)
    assert alone.scores(asked(2), recipe="paper", special_tokens="count").any()


def test_the_card_counts_one_layer_as_one(recorded):
    card = (recorded / "default" / "README.md").read_text()
    assert "the word embeddings and 1 linear layer of the model" in card


@pytest.mark.filterwarnings("ignore:The (parts|input embeddings|chosen layers) .*of the model are frozen")
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("classifier.weight", {}, (None, False, None)),
        ("classifier.weight", {"layers": BOTH}, (BOTH[1:], False, ["classifier"])),
        ("classifier.weight", {"layers": "classifier"}, (BOTH[1:], True, None)),
        ("bert.embeddings.word_embeddings.weight", {"layers": "embedding"}, (None, True, None)),
    ],
)
def test_what_was_frozen_in_training_is_read_off_the_saved_optimizer(tmp_path, name, options, expected):
    """Which has nothing of its shape; a training that is recorded says the same."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    model = frozen(BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24, **SIZES)), name)
    callback = TracInWECallback(tmp_path / "trained", dtype="float32", dataset=classification_data(), **options)
    make_trainer(tmp_path / "run", callback, tokenizer=tiny_tokenizer(), model=model).train()
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    record(tmp_path / "index", checkpoints[:1], **options)
    for reader in (IndexReader.open(tmp_path / "trained"), record(tmp_path / "index", checkpoints, **options)):
        layers = reader.config["layers"]
        names = None if layers is None else [one["name"] for one in layers["modules"]]
        assert (names, reader.config["virtual"], reader.config["metadata"].get("virtual_parts")) == expected
    assert segments(record(tmp_path / "trained", checkpoints, **options)) == segments(reader)
    for path in checkpoints:  # an index that was begun without it stays as it is
        (path / "optimizer.pt").unlink()
    if expected[1]:
        return
    assert record(tmp_path / "index", checkpoints, **options).config["virtual"] is False


@pytest.mark.parametrize("lengths", [(5,), (3, 7)])
def test_numbers_for_labels_are_recorded_as_they_are_and_not_padded(tmp_path, lengths):
    """One for each of several classes at once."""
    model = tiny_classifier()
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "checkpoint-2")
    rows = [
        {"input_ids": [5 + number] * lengths[number % len(lengths)], "labels": [1.0, 0.0, float(number % 2)]}
        for number in range(6)
    ]
    record_dataset(
        tmp_path / "index", [tmp_path / "checkpoint-2"], Dataset.from_list(rows), tokenizer=tiny_tokenizer(),
        progress=False, batch_size=4, learning_rates=[0.1],
    )  # fmt: skip
    assert IndexReader.open(tmp_path / "index").num_examples == 6
