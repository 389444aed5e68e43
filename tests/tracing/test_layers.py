"""Indices with rows of layers: recorded in training and after it, resumed, grown, by two processes, and searched."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.cli import main
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.layers import recorded_layers
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings
from tests.gradients.test_layer_gradients import expected_rows, weight_gradients
from tests.launch import launch
from tests.tiny import tiny_classifier, tiny_llama, tiny_tokenizer
from tests.tracing.recorded_training import (
    causal_collator,
    classification_data,
    language_data,
    make_trainer,
    record_again,
    segments,
    single_examples,
)

SEGMENT = {"max_segment_bytes": 30 * 16 * 4, "batch_size": 3, "dtype": "float32"}
QUERIES = classification_data(4, seed=9).remove_columns(["text", "domain"])


def summed_loss(outputs, batch):
    return outputs.loss * (1 if batch["labels"].ndim == 1 else (batch["labels"][:, 1:] != -100).sum())


def brute_force(index, dataset, queries, load, *, cosine=False):
    """`sum_c lr_c <G_c(q), G_c(x)>` by autograd on the weights of the chosen layers alone."""
    chosen, total = recorded_layers(index.config), 0
    for checkpoint in index.reader.checkpoints:
        model = load(checkpoint["path"])
        sides = [
            torch.stack(
                [
                    expected_rows(weight_gradients(model, one, chosen, summed_loss), chosen).flatten()
                    for one in single_examples(part)
                ]
            )
            for part in (queries, dataset)
        ]
        if cosine:
            sides = [F.normalize(side, dim=1) for side in sides]
        total = total + checkpoint["learning_rate"] * sides[0] @ sides[1].T
    return total.numpy()


def close(found, expected, tolerance=1e-4):
    return np.allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def train_classifier(folder, *, resume=None, **options):
    callback = TracInWECallback(folder / "index", **{**SEGMENT, **options})
    trainer = make_trainer(folder / "run", callback, tokenizer=tiny_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")


LAYERS = {"layers": ["classifier", "attention.output.dense"], "projection_dim": 7}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An index of a classifier's layers alone, made in its training."""
    folder = tmp_path_factory.mktemp("recorded")
    return folder, train_classifier(folder, **LAYERS)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """An index of LoRA adapters, made in their training; their checkpoints hold nothing but them."""
    folder = tmp_path_factory.mktemp("adapted")
    tiny_llama(tied=False).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tokenizer = tiny_tokenizer()
    callback = TracInWECallback(folder / "index", layers="adapters", dtype="float32", dataset=language_data())
    trainer = make_trainer(
        folder / "run",
        callback,
        tokenizer=tokenizer,
        collator=causal_collator(tokenizer),
        dataset=language_data(),
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config),
    )
    trainer.train()
    return folder, InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")


def load_adapted(folder):
    def load(path):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), path)

    return load


# Scores


@pytest.mark.parametrize("cosine", [False, True])
def test_scores_are_inner_products_of_projected_gradients_of_the_layers(recorded, cosine):
    _, index = recorded
    expected = brute_force(
        index, classification_data(), QUERIES, BertForSequenceClassification.from_pretrained, cosine=cosine
    )
    assert close(index.scores(QUERIES, cosine=cosine), expected)


def test_self_influence_is_the_squared_length_of_the_layers_gradients(recorded):
    _, index = recorded
    data = classification_data()
    table = index.self_influence()
    expected = np.diag(brute_force(index, data, data, BertForSequenceClassification.from_pretrained))
    assert close(np.array(table["score"][:])[np.argsort(table["example_id"][:])], expected)


def test_words_and_layers_add_up(tmp_path, recorded):
    both = train_classifier(tmp_path / "both", **{**LAYERS, "layers": ["embedding", *LAYERS["layers"]]})
    words = train_classifier(tmp_path / "words", layers="embedding")
    options = {"cosine": False, "special_tokens": "count", "sentence_ends": "count"}
    expected = words.scores(QUERIES, **options) + recorded[1].scores(QUERIES, **options)
    assert close(both.scores(QUERIES, **options), expected)
    assert both.config["virtual"] is False


def test_adapters_are_traced_by_their_own_gradients(adapted):
    folder, index = adapted
    queries = language_data(3)
    expected = brute_force(index, language_data(), queries, load_adapted(folder))
    assert recorded_layers(index.config).is_exact
    assert index.config["virtual"] is False
    labelled = queries.map(lambda row: {"labels": row["input_ids"]})
    assert close(index.scores(labelled), expected)
    assert close(index.scores(queries), expected)


# Storage


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_are_stored_as_those_of_words_are(tmp_path, recorded, dtype):
    index = train_classifier(tmp_path, **LAYERS, dtype=dtype, projection_width=None)
    assert close(index.scores(QUERIES, cosine=False), recorded[1].scores(QUERIES, cosine=False), 0.02)


def test_an_index_with_layers_says_so(recorded):
    folder, _ = recorded
    config = json.loads((folder / "index" / "config.json").read_text())
    layers = config["layers"]
    assert config["format_version"] == "3.0"
    assert [one["name"] for one in layers["modules"]] == [
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.1.attention.output.dense",
        "classifier",
    ]
    assert [one["kept"] for one in layers["modules"]] == [[7, 7], [7, 7], [3, 7]]
    assert layers["embedding_shape"] == [32, 16]
    assert (config["width"], config["vocabulary_size"]) == (49, 32 + 3)  # the least room: a row each
    card = (folder / "index" / "README.md").read_text()
    assert "with respect to 3 linear layers of the model" in card
    assert "From `token_id` 32 on, rows are no words but rows of linear layers" in card
    assert "the piece of a weight that `token_id` numbers" in card
    assert "share no token" not in card
    assert "| bert.encoder.layer.1.attention.output.dense | 16 x 16 | 7 x 7 | 33 | 1 |" in card


def test_an_index_of_words_is_of_the_earlier_format(tmp_path):
    config = train_classifier(tmp_path, layers="embedding").config
    assert (config["format_version"], config["layers"]) == ("1.0", None)


def test_what_was_recorded_afterwards_is_what_was_recorded_in_training(adapted, tmp_path):
    folder, index = adapted
    again = record_again(folder, tmp_path / "index", layers=["adapters"], dtype="float32")
    assert segments(again.reader) == segments(index.reader)
    assert again.config["virtual"] is False
    queries = language_data(3)
    assert np.array_equal(again.scores(queries), index.scores(queries))


def test_an_interrupted_recording_goes_on_after_its_last_segment(tmp_path, recorded, monkeypatch):
    record, count = EmbeddingGradientRecorder.record, []

    def failing(self, batch):
        count.append(batch)
        if len(count) == 1 + 4 + 3:  # a trial, the first checkpoint, half of the second
            raise KeyboardInterrupt("stopped by the test")
        return record(self, batch)

    monkeypatch.setattr(EmbeddingGradientRecorder, "record", failing)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        train_classifier(tmp_path, **LAYERS)
    assert list((tmp_path / "index" / "gradients").glob("checkpoint-4.partial/segment*"))
    index = train_classifier(tmp_path, resume=True, **LAYERS)
    assert segments(index.reader) == segments(recorded[1].reader)
    assert len(count) < 1 + 4 + 3 + 1 + 4


def test_an_index_grows(tmp_path, recorded):
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    for seed, path in enumerate(checkpoints):
        tiny_classifier(seed=seed).save_pretrained(path)
    options = {"tokenizer": tiny_tokenizer(), "settings": RecordingSettings(**LAYERS), "progress": False}
    for name, counts in (("grown", (5, 11)), ("whole", (11,))):
        for count in counts:
            rates = {"add_examples": True} if count > counts[0] else {"learning_rates": [0.1, 0.05]}
            record_dataset(
                tmp_path / name, checkpoints, classification_data(11).select(range(count)), **options, **rates
            )
    grown, whole = (
        InfluenceIndex.from_pretrained(tmp_path / name, cache_dir=tmp_path / "maps") for name in ("grown", "whole")
    )
    assert close(grown.scores(QUERIES), whole.scores(QUERIES), 1e-2)
    assert len(grown) == 11


SCRIPT = """
import sys
from pathlib import Path

from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings
from tests.launch import end_process_group
from tests.tracing.recorded_training import classification_data
from tests.tracing.test_layers import LAYERS, SEGMENT
from tests.tiny import tiny_tokenizer

folder, index = map(Path, sys.argv[1:])
segment = {name: SEGMENT[name] for name in ("max_segment_bytes", "dtype")}
record_dataset(
    index, sorted((folder / "run").glob("checkpoint-*")), classification_data(), tokenizer=tiny_tokenizer(),
    settings=RecordingSettings(**LAYERS, **segment), batch_size=3, progress=False,
)
end_process_group()
"""


def test_two_processes_record_the_index_of_one(tmp_path, recorded):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch(tmp_path / "script.py", recorded[0], tmp_path / "index")
    by_two = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    assert segments(by_two.reader) == segments(recorded[1].reader)
    assert len(segments(by_two.reader)["checkpoint-2"]) > 1


# Hits


def test_hits_name_layers_among_the_words(tmp_path):
    index = train_classifier(tmp_path, **{**LAYERS, "layers": ["embedding", *LAYERS["layers"]]})
    hits = index.search(["w5 w9"], top_k=4, special_tokens="count")
    names = {one["name"] for one in index.config["layers"]["modules"]}
    for hit in hits:
        assert names <= set(hit["words"])
        assert sum(hit["word_scores"]) == pytest.approx(hit["score"], rel=1e-4)
        assert sum(hit["token_scores"]) == pytest.approx(hit["score"], rel=1e-4)
        assert sum(hit["example_token_scores"]) == pytest.approx(hit["score"], rel=1e-4)
        assert len([token for token in hit["token_ids"] if token >= index.reader.embedding_shape[0]]) == len(names)
    assert "classifier" in index.to_html(hits)


def test_a_special_token_without_a_row_in_the_matrix_is_no_layer(tmp_path):
    index = train_classifier(tmp_path, layers=["embedding", "classifier"])
    num_words = index.reader.embedding_shape[0]
    settings, tokenizer = RecordingSettings(), tiny_tokenizer()
    special = tokenizer.all_special_ids
    assert settings.to_manifest(tokenizer, vocabulary_size=num_words)["special_token_ids"] == sorted(special)
    told = settings.to_manifest(tokenizer, vocabulary_size=max(special))["special_token_ids"]
    assert told == sorted(special)[:-1]
    assert all(token < num_words for token in index.config["special_token_ids"])


@pytest.mark.filterwarnings("ignore:The parts 'embedding' of the model are frozen")
def test_checkpoints_whose_layers_have_other_shapes_are_refused(adapted, tmp_path):
    folder, _ = adapted
    other = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), other)
    model.save_pretrained(tmp_path / "checkpoint-9999")
    first = sorted((folder / "run").glob("checkpoint-*"))[0]
    with pytest.raises(
        ValueError, match="All checkpoints of an index must have the same layers, but 'checkpoint-9999'"
    ):
        record_dataset(
            tmp_path / "index",
            [first, tmp_path / "checkpoint-9999"],
            language_data(),
            tokenizer=tiny_tokenizer(),
            collator=causal_collator(tiny_tokenizer()),
            settings=RecordingSettings(layers=["embedding", "adapters"], dtype="float32"),
            learning_rates=[1e-3, 1e-3],
            progress=False,
        )


def test_synonyms_are_those_of_words_alone(tmp_path):
    index = train_classifier(tmp_path, **{**LAYERS, "layers": ["embedding", *LAYERS["layers"]]})
    options = {"kernel": "synonym", "synonym_threshold": 0.1}
    words = train_classifier(tmp_path / "words", layers="embedding")
    plain = {"cosine": False}
    found = index.scores(QUERIES, **plain, **options) - index.scores(QUERIES, **plain)
    expected = words.scores(QUERIES, **plain, **options) - words.scores(QUERIES, **plain)
    assert np.abs(expected).max() > 0
    assert close(found, expected, 1e-3)


# From the shell


@pytest.mark.filterwarnings("ignore:The input embeddings of the model are frozen")
def test_adapters_are_indexed_and_searched_from_the_shell(adapted, tmp_path, capsys, monkeypatch):
    folder, _ = adapted
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    texts = ["w1 w2 w3", "w4 w2", "w5 w2 w7 w8"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    checkpoints = sorted(map(str, (folder / "run").glob("checkpoint-*")))
    argv = ["index", "--checkpoints", *checkpoints, "--data", str(tmp_path / "data.jsonl")]
    assert main([*argv, "--output_dir", str(tmp_path / "index"), "--layers", "adapters", "--projection_dim", "4"]) == 0
    layers = json.loads((tmp_path / "index" / "config.json").read_text())["layers"]["modules"]
    assert [one["kept"] for one in layers[:2]] == [[3, 4], [4, 3]]
    capsys.readouterr()
    assert main(["search", "--index", str(tmp_path / "index"), "--query", "w4 w2", "--top_k", "2", "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert hits[0]["example_id"] == 1
    assert any("lora_A" in word for word in hits[0]["words"])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "`layers` must be 'auto', 'embedding', 'adapters', .* each once, but got"),
        ({"layers": ["o_proj", "o_proj"]}, "each once"),
        ({"layers": 3}, "`layers` must be 'auto', 'embedding'"),
        ({"projection_dim": 4}, r"`projection_dim` is about the gradients of layers.*`projection_width`"),
        ({"layers": "lm_head", "projection_dim": 0}, "`projection_dim` must be at least 1"),
        ({"layers": "lm_head", "record": "online"}, r"`record='online'` catches the gradients of words only"),
        (
            {"layers": "lm_head", "metric": "optimizer"},
            r"needs layers that are whole, but \['lm_head'\] are projected",
        ),
        (
            {"layers": "lm_head", "top_k_tokens": 3},
            r"`top_k_tokens=3` is about the rows of words.*without 'embedding'",
        ),
        ({"layers": "lm_head", "tied": "own"}, r"`tied='own'` is about the rows of words"),
        ({"layers": "lm_head", "special_tokens": "drop"}, r"`special_tokens='drop'` is about the rows of words"),
        ({"layers": "lm_head", "recipe": "paper"}, r"`recipe='paper'` means `layers=None`, but got"),
    ],
)
def test_what_does_not_go_with_layers_is_refused_at_construction(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TracInWECallback(tmp_path, **options)


def test_a_layer_that_the_model_lacks_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"none that is called 'clasifier'.*\['classifier'"):
        train_classifier(tmp_path, layers="clasifier")
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_another_choice_of_layers_is_another_index(recorded, tmp_path):
    folder, _ = recorded
    shutil.copytree(folder / "index", tmp_path / "index")
    with pytest.raises(ValueError, match=r"has another configuration: .*`layers` is"):
        record_dataset(
            tmp_path / "index",
            [folder / "run" / "checkpoint-2"],
            classification_data(),
            tokenizer=tiny_tokenizer(),
            settings=RecordingSettings(layers=["classifier"], dtype="float32"),
            progress=False,
        )


def test_an_adapter_without_its_base_is_refused(adapted, tmp_path):
    folder, _ = adapted
    shutil.copytree(folder / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
    facts = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "checkpoint-2" / "adapter_config.json").write_text(json.dumps(facts))
    with pytest.raises(FileNotFoundError, match=r"The model in '.*gone' cannot be loaded"):
        record_dataset(
            tmp_path / "index",
            [tmp_path / "checkpoint-2"],
            language_data(),
            tokenizer=tiny_tokenizer(),
            settings=RecordingSettings(layers=["adapters"]),
            learning_rates=[0.1],
            progress=False,
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers.update(embedding_shape=[3, 16]),
        lambda layers: layers.update(embedding_shape=3),
        lambda layers: layers.update(embedding=True),
        lambda layers: layers["modules"].pop(),
        lambda layers: layers["modules"][0].update(kept=[99, 7]),
        lambda layers: layers["modules"][0].update(name=3),
        lambda layers: layers.update(embedding="yes"),
    ],
)
def test_layers_that_cannot_be_are_refused(recorded, tmp_path, change):
    shutil.copytree(recorded[0] / "index", tmp_path / "index")
    config = json.loads((tmp_path / "index" / "config.json").read_text())
    change(config["layers"])
    (tmp_path / "index" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must have layers whose rows are numbered behind the words"):
        InfluenceIndex.from_pretrained(tmp_path / "index")


def test_projections_that_cannot_be_drawn_again_are_refused(recorded, tmp_path):
    shutil.copytree(recorded[0] / "index", tmp_path / "index")
    config = json.loads((tmp_path / "index" / "config.json").read_text())
    config["layers"]["seed"] = 1
    (tmp_path / "index" / "config.json").write_text(json.dumps(config))
    index = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    with pytest.raises(ValueError, match="projections of layers must be drawn again"):
        index.scores(QUERIES)
