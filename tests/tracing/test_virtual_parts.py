"""Indices that hold what was frozen next to what was trained: the gradients of the first are of a training that never was."""

import json

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.cli import main
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tracing.recorded_training import causal_collator, language_data, make_trainer, segments
from tests.tracing.test_layers import close

BOTH = ["embedding", "adapters"]
QUERIES = language_data(3)
pytestmark = pytest.mark.filterwarnings("ignore:The (parts|input embeddings) .*of the model are frozen")


def train(folder, layers):
    tiny_llama(tied=False).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tokenizer, data = tiny_tokenizer(), language_data()
    callback = TracInWECallback(folder / "index", layers=layers, dtype="float32", dataset=data, tied="input")
    trainer = make_trainer(
        folder / "run",
        callback,
        tokenizer=tokenizer,
        collator=causal_collator(tokenizer),
        dataset=data,
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config),
    )
    trainer.train()
    return InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")


@pytest.fixture(scope="module")
def indices(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("both", "adapters", "words")}
    layers = {"both": BOTH, "adapters": "adapters", "words": "embedding"}
    return folders, {name: train(folder, layers[name]) for name, folder in folders.items()}


@pytest.mark.parametrize("cosine", [False, True])
def test_only_what_was_trained_counts_unless_it_is_asked_for(indices, cosine):
    _, found = indices
    both = found["both"].scores(QUERIES, cosine=cosine)
    assert close(both, found["adapters"].scores(QUERIES, cosine=cosine))
    counted = found["both"].scores(QUERIES, cosine=cosine, virtual="count")
    assert not close(counted, both, 0.1)
    if not cosine:
        assert close(counted, both + found["words"].scores(QUERIES))


@pytest.mark.parametrize("cosine", [False, True])
def test_the_mean_of_parts_is_of_those_that_were_trained(indices, cosine):
    _, found = indices
    options = {"layers": "mean", "cosine": cosine}
    trained = found["adapters"].scores(QUERIES, **options)
    assert close(found["both"].scores(QUERIES, **options), trained)
    num_layers = len(found["both"].config["layers"]["modules"])
    words = found["words"].scores(QUERIES, cosine=cosine)
    expected = (num_layers * trained + words) / (num_layers + 1)
    assert close(found["both"].scores(QUERIES, virtual="count", **options), expected)
    for hit in found["both"].search(QUERIES, top_k=2, **options):
        assert sum(hit["word_scores"]) == pytest.approx(hit["score"], rel=1e-4)


def test_self_influence_is_that_of_what_was_trained(indices):
    _, found = indices

    def own(name, **options):
        table = found[name].self_influence(**options)
        return np.array(table["score"][:])[np.argsort(table["example_id"][:])]

    assert close(own("both"), own("adapters"))
    assert close(own("both", virtual="count"), own("adapters") + own("words"))


def test_words_of_hits_are_layers_that_were_trained(indices):
    _, found = indices
    names = {one["name"] for one in found["both"].config["layers"]["modules"]}
    for hit in found["both"].search(QUERIES, top_k=2):
        assert set(hit["words"]) <= names
        assert sum(hit["word_scores"]) == pytest.approx(hit["score"], rel=1e-4)
    assert not set(found["both"].search(QUERIES, top_k=2, virtual="count")[0]["words"]) <= names


def test_what_was_frozen_is_told_by_config_card_and_notebook(indices):
    folders, found = indices
    index = found["both"]
    assert index.config["virtual"] is False
    assert index.config["metadata"]["virtual_parts"] == ["embedding"]
    card = (folders["both"] / "index" / "README.md").read_text()
    assert '- Not trained: `embedding` (frozen: a search leaves it out unless `virtual="count"`)' in card
    assert "parts of it virtual (frozen), which do not count" in index._repr_html_()
    assert "virtual_parts" not in found["adapters"].config["metadata"]
    assert "all of it was frozen" in (folders["words"] / "index" / "README.md").read_text()


def test_what_was_recorded_afterwards_says_the_same(indices, tmp_path):
    folders, found = indices
    with pytest.warns(UserWarning, match="The parts 'embedding' of the model are frozen.*`virtual='count'`"):
        record_dataset(
            tmp_path / "index",
            sorted((folders["both"] / "run").glob("checkpoint-*")),
            language_data(),
            collator=causal_collator(tiny_tokenizer()),
            tokenizer=tiny_tokenizer(),
            settings=RecordingSettings(layers=BOTH, dtype="float32", tied="input"),
            batch_size=4,
            progress=False,
        )
    again = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    assert segments(again.reader) == segments(found["both"].reader)
    assert again.config["metadata"]["virtual_parts"] == ["embedding"]


def test_an_index_of_before_answers_as_it_did(indices):
    folders, found = indices
    index = InfluenceIndex.from_pretrained(folders["both"] / "index", cache_dir=folders["both"] / "maps")
    del index.config["metadata"]["virtual_parts"]
    assert np.array_equal(index.scores(QUERIES), found["both"].scores(QUERIES, virtual="count"))
    with pytest.raises(ValueError, match="of an earlier version, does not tell which of its parts were"):
        index.scores(QUERIES, virtual="drop")


def test_an_index_of_nothing_but_what_was_frozen_counts_it_all(indices):
    _, found = indices
    assert np.array_equal(found["words"].scores(QUERIES), found["words"].scores(QUERIES, virtual="count"))
    assert np.abs(found["words"].scores(QUERIES)).max() > 0
    for ask in (
        lambda: found["words"].scores(QUERIES, virtual="drop"),
        lambda: found["words"].self_influence(virtual="drop"),
    ):
        with pytest.raises(ValueError, match="nothing in this index was trained, so nothing would be left"):
            ask()
    with pytest.raises(ValueError, match="`virtual` must be one of"):
        found["both"].scores(QUERIES, virtual="keep")


def test_the_command_has_the_option(indices, capsys, monkeypatch, tmp_path):
    folders, _ = indices
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    argv = ["search", "--index", str(folders["both"] / "index"), "--query", "w5 w6 w7 w8 w9", "--top_k", "9", "--json"]
    words = []
    for more in ([], ["--virtual", "count"]):
        assert main([*argv, *more]) == 0
        words.append({word for line in capsys.readouterr().out.splitlines() for word in json.loads(line)["words"]})
    assert all("lora_" in word for word in words[0])
    assert not all("lora_" in word for word in words[1])
