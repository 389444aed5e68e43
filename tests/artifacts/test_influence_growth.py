"""Adding examples to a whole index: further files and no other change, at once or not at all."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from hf_doge import files
from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.growth import Growth
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing import saved_index
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.index import InfluenceIndex
from hf_doge.tracing.pretrained import load_model
from hf_doge.tracing.settings import RecordingSettings
from tests.artifacts.influence_rows import (
    FACTS,
    NUM_EXAMPLES,
    dense_scores,
    equal_rows,
    examples_table,
    grow_index,
    open_writer,
    publish,
    random_rows,
    some,
    write_checkpoint,
    write_index,
)
from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer

FIRST = 30
TOLERANCES = {"float32": 1e-6, "float16": 1e-3, "int8": 2e-2}


@pytest.fixture
def rows():
    return [random_rows(NUM_EXAMPLES, seed=0), random_rows(NUM_EXAMPLES, seed=1)]


def begun(folder, rows, **options):
    return write_index(folder, *(some(one, 0, FIRST) for one in rows), **options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_scores(folder, rows, tmp_path, tolerance=1e-3):
    reader = IndexReader.open(folder, cache_dir=tmp_path / "cache")
    for checkpoint, one in enumerate(rows):
        expected = dense_scores(rows[0], one)
        assert np.abs(reader.scores(checkpoint, rows[0]) - expected).max() <= tolerance * np.abs(expected).max()
    return reader


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_grown_index_scores_as_one_made_at_once(tmp_path, rows, dtype):
    folder = begun(tmp_path / "index", rows, dtype=dtype)
    assert_scores(folder, [some(one, 0, FIRST) for one in rows], tmp_path, TOLERANCES[dtype])
    grow_index(folder, *(some(one, 0, 33) for one in rows), dtype=dtype)
    grow_index(folder, *rows, dtype=dtype)
    reader = assert_scores(folder, rows, tmp_path, TOLERANCES[dtype])
    assert reader.examples["text"] == [f"text {number}" for number in range(NUM_EXAMPLES)]
    names = ["gradients", "examples", "checkpoints", *(["offsets"] if dtype != "int8" else [])]
    loaded = {
        name: datasets.load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "datasets"))
        for name in names
    }
    assert len(loaded["gradients"]) == sum(len(one.tokens) for one in rows)
    assert loaded["examples"]["example_id"] == list(range(NUM_EXAMPLES))
    assert len(loaded["checkpoints"]) == 2


def test_1_percent_more_examples_are_about_1_percent_more_bytes_and_no_file_changes(tmp_path):
    options = {"width": 64, "vocabulary_size": 400, "max_segment_bytes": 2**22}
    rows = equal_rows(2020, num_tokens=25, width=64, vocabulary_size=400)
    folder = write_index(tmp_path / "index", some(rows, 0, 2000), some(rows, 0, 2000), **options)
    before = contents(folder)
    grow_index(folder, rows, rows, **options)
    after = contents(folder)
    assert {path for path in before if after[path] != before[path]} == {"README.md", "config.json"}
    added = {path: len(after[path]) for path in after if path not in before}
    assert {path.split("/")[0] for path in added} == {"gradients", "offsets", "examples"}
    whole = sum(len(content) for path, content in before.items() if "/" in path)
    assert 0.009 <= sum(added.values()) / whole <= 0.015


def grow_step_by_step(folder, rows, *, stop_after=None):
    """As `grow_index`; ends after some steps, as a process does that is killed there."""
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        if steps == stop_after:
            raise KeyboardInterrupt("stopped by the test")

    writer = open_writer(folder, num_examples=NUM_EXAMPLES, add_examples=True)
    step()
    for number, one in enumerate(rows):
        with writer.checkpoint(f"checkpoint-{number}", step=number, **FACTS) as checkpoint:
            for example in range(checkpoint.num_done, NUM_EXAMPLES):
                checkpoint.add(some(one, example, example + 1))
                if example in (33, 38):
                    step()
            publish(checkpoint)
        step()


def test_borders_cut_the_segments_of_examples_that_are_added(tmp_path, rows):
    folder = begun(tmp_path / "index", rows[:1])
    writer = open_writer(folder, num_examples=NUM_EXAMPLES, add_examples=True)
    with writer.checkpoint("checkpoint-0", step=0, borders=[33, 35], **FACTS) as checkpoint:
        assert checkpoint.missing() == [(FIRST, 33), (33, 35), (35, NUM_EXAMPLES)]
        for first, last in checkpoint.missing():
            checkpoint.begin(first, last)
            checkpoint.add(some(rows[0], first, last))
        publish(checkpoint)
    files = json.loads((folder / "config.json").read_text())["checkpoints"][0]["files"]
    assert {FIRST, 33, 35} <= {file["first_example"] for file in files}


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_an_interrupted_growth_shows_nothing_and_goes_on(tmp_path, rows, stop):
    folder = begun(tmp_path / "index", rows)
    whole = shutil.copytree(folder, tmp_path / "whole")
    grow_step_by_step(whole, rows)
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        grow_step_by_step(folder, rows, stop_after=stop)
    after = contents(folder)
    assert {path: after[path] for path in before} == before
    assert_scores(folder, [some(one, 0, FIRST) for one in rows], tmp_path)
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "datasets"))
    assert len(loaded) == sum(int(one.offsets[FIRST]) for one in rows)
    grow_step_by_step(folder, rows)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("step", ["rename", "register"])
def test_a_crash_at_the_end_of_growth_is_completed(tmp_path, rows, step, monkeypatch):
    folder = begun(tmp_path / "index", rows)
    whole = shutil.copytree(folder, tmp_path / "whole")
    grow_step_by_step(whole, rows)
    renamed = []

    def rename(path, target):
        renamed.append(path)
        if len(renamed) == 3:
            raise OSError("power cut")
        return original(path, target)

    def replace(*arguments, **options):
        raise OSError("power cut")

    original = Path.rename
    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr("pathlib.Path.rename", rename)
        else:
            patch.setattr("hf_doge.artifacts.influence.writer.replace_files", replace)
        with pytest.raises(OSError, match="power cut"):
            grow_step_by_step(folder, rows)
    assert json.loads((folder / "config.json").read_bytes())["num_examples"] == FIRST
    grow_step_by_step(folder, rows)
    assert contents(folder) == contents(whole)


def test_a_crash_between_config_and_card_is_completed(tmp_path, rows, monkeypatch):
    folder = begun(tmp_path / "index", rows)
    whole = shutil.copytree(folder, tmp_path / "whole")
    grow_index(whole, *rows)

    def sync(path):
        original(path)
        if json.loads((folder / "config.json").read_bytes())["num_examples"] == NUM_EXAMPLES:
            raise OSError("power cut")

    original = files.sync_folder
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_folder", sync)
        with pytest.raises(OSError, match="power cut"):
            grow_index(folder, *rows)
    assert (folder / "README.md").read_bytes() != (whole / "README.md").read_bytes()
    open_writer(folder, add_examples=True).close()
    assert (folder / "README.md").read_bytes() == (whole / "README.md").read_bytes()
    assert not list(folder.glob(".hf_doge-*"))


def test_what_an_attempt_with_other_examples_left_does_not_count(tmp_path, rows):
    folder = begun(tmp_path / "index", rows)
    writer = open_writer(folder, examples=False, num_examples=NUM_EXAMPLES, add_examples=True)
    table = examples_table().set_column(
        1, "text", pa.array([f"text {n if n < FIRST else -n}" for n in range(NUM_EXAMPLES)])
    )
    writer.write_examples(table)
    with writer.checkpoint("checkpoint-0", step=0, **FACTS) as checkpoint:
        checkpoint.add(some(random_rows(NUM_EXAMPLES, seed=9), FIRST, NUM_EXAMPLES))
    grow_index(folder, *rows)
    assert_scores(folder, rows, tmp_path)


def test_examples_without_rows_need_no_file(tmp_path, rows):
    without = []
    for one in rows:
        end = int(one.offsets[FIRST])
        without.append(TokenRows(one.offsets.clamp(max=end), one.tokens[:end], one.rows[:end], False))
    folder = begun(tmp_path / "index", without)
    before = set(contents(folder))
    grow_index(folder, *without)
    assert {path for path in contents(folder) if path not in before} == {f"examples/train-{FIRST:012d}.parquet"}
    assert_scores(folder, without, tmp_path)


def test_a_checkpoint_can_follow_a_growth_and_another_growth_that(tmp_path, rows):
    folder = begun(tmp_path / "index", rows[:1])
    grow_index(folder, some(rows[0], 0, 35))
    writer = open_writer(folder, num_examples=35)
    write_checkpoint(writer, some(rows[1], 0, 35), name="checkpoint-1", step=1)
    grow_index(folder, *rows)
    assert_scores(folder, rows, tmp_path)


def test_growing_an_index_to_what_it_is_changes_nothing(tmp_path, rows):
    folder = grow_index(begun(tmp_path / "index", rows), *rows)
    before = contents(folder)
    writer = open_writer(folder, add_examples=True)
    assert writer.has_whole("checkpoint-1")
    writer.close()
    assert contents(folder) == before


def test_what_cannot_be_added_is_refused_and_leaves_the_index_as_it_was(tmp_path, rows):
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        open_writer(tmp_path / "nowhere", add_examples=True)
    with pytest.raises(ValueError, match="no whole checkpoint yet"):
        open_writer(open_writer(tmp_path / "empty").folder, add_examples=True)
    folder = begun(tmp_path / "index", rows)
    before = contents(folder)
    more = {"num_examples": NUM_EXAMPLES, "add_examples": True}
    with pytest.raises(ValueError, match=r"`num_examples` is 30, not 40\..* pass `add_examples=True`"):
        open_writer(folder, num_examples=NUM_EXAMPLES)
    with pytest.raises(ValueError, match="has 30 already and 29 were given"):
        open_writer(folder, num_examples=29, add_examples=True)
    with pytest.raises(ValueError, match="another configuration: `dtype` is 'float16', not 'float32'"):
        open_writer(folder, dtype="float32", **more)
    writer = open_writer(folder, examples=False, **more)
    with pytest.raises(ValueError, match="Call `write_examples`"):
        writer.checkpoint("checkpoint-0", step=0, **FACTS)
    with pytest.raises(ValueError, match="must begin with the 30 examples of the index"):
        writer.write_examples(pa.table({"example_id": range(NUM_EXAMPLES), "text": ["other"] * NUM_EXAMPLES}))
    with pytest.raises(ValueError, match=r"must have the columns of the index .*text \(string\), but have example_id"):
        writer.write_examples(pa.table({"example_id": range(NUM_EXAMPLES)}))
    writer.write_examples(examples_table())
    with pytest.raises(ValueError, match=r"at the checkpoints of the index, .* but got 'checkpoint-7'"):
        writer.checkpoint("checkpoint-7", step=0, **FACTS)
    with pytest.raises(ValueError, match="was recorded with other weights"):
        writer.checkpoint("checkpoint-0", step=0, **{**FACTS, "fingerprint": "g"})
    with writer.checkpoint("checkpoint-0", step=0, **FACTS) as checkpoint:
        checkpoint.add(some(rows[0], FIRST, NUM_EXAMPLES - 1))
        with pytest.raises(ValueError, match="must hold all 10 examples, but 9 were added"):
            publish(checkpoint)
    write_checkpoint(writer, some(rows[0], FIRST, NUM_EXAMPLES), name="checkpoint-0", step=0)
    with pytest.raises(ValueError, match=r"\['checkpoint-1'\] have not"):
        writer.require_grown()
    with pytest.raises(ValueError, match="has the new examples already"):
        writer.checkpoint("checkpoint-0", step=0, **FACTS)
    after = contents(folder)
    assert {path: after[path] for path in before} == before
    assert isinstance(writer._growth, Growth)


@pytest.mark.parametrize("name", saved_index._ENTRIES)
def test_a_copy_that_is_made_while_the_index_grows_is_whole(tmp_path, rows, name, monkeypatch):
    folder = begun(tmp_path / "index", rows)

    def copy(source, target):
        original(source, target)
        if source.name == name:
            grow_index(folder, *rows)

    original = saved_index._copy
    monkeypatch.setattr(saved_index, "_copy", copy)
    saved_index.copy_index(folder, tmp_path / "copy")
    reader = IndexReader.open(tmp_path / "copy", cache_dir=tmp_path / "cache")
    assert_scores(tmp_path / "copy", [some(one, 0, reader.num_examples) for one in rows], tmp_path)


# Of saved checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two saved models and their tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = wordpiece_tokenizer()
    for seed in (0, 1):
        classifier(tokenizer, seed=seed).save_pretrained(folder / f"model-{seed}")
    return [folder / "model-0", folder / "model-1"], tokenizer


def test_a_grown_recording_holds_the_rows_of_a_whole_one(tmp_path, saved):
    models, tokenizer = saved
    settings = RecordingSettings(dtype="float32", max_segment_bytes=20_000)
    options = {"tokenizer": tokenizer, "settings": settings, "progress": False}
    data = tokenised(sentences(24), tokenizer)
    record_dataset(tmp_path / "whole", models, data, learning_rates=[0.1, 0.2], **options)
    record_dataset(tmp_path / "grown", models, data.select(range(16)), learning_rates=[0.1, 0.2], **options)
    for wrong, match in (
        ({"checkpoints": models[:1]}, "all checkpoints of the index, .*but 1 folders were given"),
        ({"learning_rates": [0.1, 0.2]}, "the index has them. Leave them out"),
        ({"dataset": data.select(range(3, 24))}, "must begin with the 16 examples of the index"),
    ):
        arguments = {"checkpoints": models, "dataset": data, **options, **wrong}
        with pytest.raises(ValueError, match=match):
            record_dataset(tmp_path / "grown", add_examples=True, **arguments)
    other = tmp_path / "other"
    classifier(tokenizer, seed=5).save_pretrained(other)
    with pytest.raises(ValueError, match="are not those of any checkpoint of the index"):
        record_dataset(tmp_path / "grown", [models[0], other], data, add_examples=True, **options)
    renamed = shutil.copytree(models[1], tmp_path / "called-otherwise")
    for _ in range(2):  # the second time there is nothing to do
        writer = record_dataset(tmp_path / "grown", [renamed, models[0]], data, add_examples=True, **options)
    assert (writer.config["num_examples"], writer.config["dataset"]["num_rows"]) == (24, 24)
    readers = [IndexReader.open(tmp_path / name, cache_dir=tmp_path / "maps") for name in ("whole", "grown")]
    assert readers[0].config["dataset"] == readers[1].config["dataset"]
    for checkpoint in range(2):
        whole, grown = (reader.example_rows(checkpoint, range(24)) for reader in readers)
        for one, other in zip(whole, grown, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    assert readers[0].examples.to_dict() == readers[1].examples.to_dict()


def test_where_the_tokenizer_was_loaded_from_does_not_matter(tmp_path, saved):
    models, tokenizer = saved
    data = tokenised(sentences(9), tokenizer)
    tokenizers = []
    for name in ("one", "two", "three"):
        tokenizer.save_pretrained(tmp_path / name)
        tokenizers.append(AutoTokenizer.from_pretrained(tmp_path / name))
    options = {"progress": False, "learning_rates": [0.1]}
    record_dataset(tmp_path / "index", models[:1], data.select(range(6)), tokenizer=tokenizers[0], **options)
    record_dataset(tmp_path / "index", models[1:], data.select(range(6)), tokenizer=tokenizers[1], **options)
    record_dataset(tmp_path / "index", models[::-1], data, tokenizer=tokenizers[2], add_examples=True, progress=False)
    assert json.loads((tmp_path / "index/config.json").read_bytes())["num_examples"] == 9
    other = wordpiece_tokenizer(vocab_size=69)
    with pytest.raises(ValueError, match="another configuration: `tokenizer` is"):
        record_dataset(tmp_path / "index", models, data, tokenizer=other, add_examples=True, progress=False)


def test_added_examples_have_the_columns_of_the_others_though_their_domain_is_of_two_words(tmp_path, saved):
    models, tokenizer = saved
    rows = [{**row, "domain": "wiki" if number < 6 else "common crawl"} for number, row in enumerate(sentences(9))]
    data = tokenised(rows, tokenizer).remove_columns("text")
    options = {"tokenizer": tokenizer, "progress": False}
    record_dataset(tmp_path / "index", models[:1], data.select(range(6)), learning_rates=[0.1], **options)
    record_dataset(tmp_path / "index", models[:1], data, add_examples=True, **options)
    examples = IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "maps").examples
    assert examples["input_ids"] == data["input_ids"]
    assert examples["domain"] == data["domain"]


def test_the_domains_of_a_grown_index_may_be_unknown(tmp_path, saved):
    models, tokenizer = saved
    rows = [{**row, "domain": ["a", None, "b"][number % 3]} for number, row in enumerate(sentences(9))]
    data = tokenised(rows, tokenizer)
    options = {"tokenizer": tokenizer, "progress": False}
    record_dataset(tmp_path / "index", models[:1], data.select(range(5)), learning_rates=[0.1], **options)
    record_dataset(tmp_path / "index", models[:1], data, add_examples=True, **options)
    index = InfluenceIndex.from_pretrained(
        tmp_path / "index",
        cache_dir=tmp_path / "maps",
        load_model=lambda _: load_model(models[0]),
        processing_class=tokenizer,
    )
    scores = index.scores("the stadium")[0]
    domains = index.domain_influence("the stadium", "domain", reduction="sum")
    assert domains["domain"] == ["a", None, "b"]
    assert domains["num_examples"] == [3, 3, 3]
    np.testing.assert_allclose(domains["score"], [scores[number::3].sum() for number in range(3)], rtol=1e-4)


def test_checkpoints_of_the_same_weights_can_all_be_given_the_new_examples(tmp_path, saved):
    models, tokenizer = saved
    data = tokenised(sentences(9), tokenizer)
    copies = [shutil.copytree(models[0], tmp_path / name) for name in ("a", "b", "c", "d")]
    options = {"tokenizer": tokenizer, "progress": False}
    record_dataset(tmp_path / "index", copies[:2], data.select(range(6)), learning_rates=[0.1, 0.2], **options)
    writer = record_dataset(tmp_path / "index", copies[2:], data, add_examples=True, **options)
    assert writer.config["num_examples"] == 9


@pytest.mark.filterwarnings("ignore:The input embeddings of the model are frozen")
@pytest.mark.parametrize("frozen", [False, True])
def test_an_index_that_a_training_recorded_can_be_given_more_examples(tmp_path, frozen):
    tokenizer = wordpiece_tokenizer()
    data = tokenised(sentences(12), tokenizer)
    model = classifier(tokenizer)
    model.get_input_embeddings().weight.requires_grad_(not frozen)
    folder = train(tmp_path, model, tokenizer, data.select(range(8)), epochs=2)
    saved = sorted((tmp_path / "run").iterdir())
    options = {"tokenizer": AutoTokenizer.from_pretrained(saved[0]), "add_examples": True, "progress": False}
    for _ in range(2):  # the second time there is nothing to do
        record_dataset(folder, saved, data, settings=RecordingSettings(dtype="float32"), **options)
    config = IndexReader.open(folder, cache_dir=tmp_path / "maps").config
    assert (config["num_examples"], config["virtual"]) == (12, frozen)
