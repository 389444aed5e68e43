import dataclasses
import itertools
import json
import re
import shutil

import datasets
import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from hf_doge.cli.arguments import DataArguments
from hf_doge.data.blocks import BlockMaker
from hf_doge.data.domain_data import RecordDomain, load_domain_data, load_mixture
from hf_doge.data.encoding import RecordEncoder
from hf_doge.data.mixture import DatasetConfig, MixtureConfig
from hf_doge.data.records import open_mixture
from hf_doge.data.tokenizer import get_tokenizer
from tests.data.made import rows_of, write_jsonl, write_sets
from tests.launch import REPOSITORY

TRAINED = {"train_tokenizer_vocab": 300, "block_size": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test finds what another left in the cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    texts = [json.dumps(row) for name in ("chat", "tasks", "prose") for row in rows_of(name, 20)]
    folder = tmp_path_factory.mktemp("tokenizer")
    return get_tokenizer(None, 300, documents=[lambda: texts], save_directory=folder, for_chat=True)


def write_mixture(path, *entries, **others):
    path.write_text(json.dumps({"datasets": list(entries), **others}))  # JSON is YAML too
    return path


def load(tmp_path, *entries, targets=(), output="out", **others):
    mixture = write_mixture(tmp_path / "mixture.yaml", *entries)
    args = DataArguments(mixture=str(mixture), **{**TRAINED, **others})
    return load_domain_data(args, tmp_path / output, targets=targets)


def encoded(config, tokenizer, split="train"):
    (records,) = open_mixture(MixtureConfig((config,))).values()
    return RecordDomain(records).encode(BlockMaker(tokenizer, 16, None), split)


def kept_texts(rows, tokenizer):
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows]


# What rows become


def test_the_blocks_of_texts_are_those_of_a_data_folder(tmp_path):
    for split, number in (("train", 60), ("validation", 20)):
        write_jsonl(tmp_path / "data" / "prose" / f"{split}.jsonl", list(rows_of("prose", 80))[:number])
    folder = load_domain_data(DataArguments(str(tmp_path / "data"), **TRAINED), tmp_path / "folder")
    entry = {"path": "data/prose", "validation_split": "validation"}
    mixture = load(tmp_path, entry, tokenizer=str(tmp_path / "folder/tokenizer"), train_tokenizer_vocab=None)
    assert mixture.train["prose"][:] == folder.train["prose"][:]
    assert mixture.validation["prose"][:] == folder.validation["prose"][:]
    assert mixture.train["prose"].features == folder.train["prose"].features


def test_only_completions_have_labels_unless_the_file_says_otherwise(tmp_path, chat_tokenizer):
    rows = list(rows_of("tasks", 30))
    path = write_jsonl(tmp_path / "tasks.jsonl", rows)
    config = DatasetConfig(str(path), domain="tasks", test_split_size=5)
    kept = sorted(kept_texts(encoded(config, chat_tokenizer), chat_tokenizer))
    held_out = kept_texts(encoded(config, chat_tokenizer, "validation"), chat_tokenizer)
    assert sorted([*kept, *held_out]) == sorted(row["completion"] + "<|endoftext|>" for row in rows)
    whole = encoded(dataclasses.replace(config, completion_only_loss=False), chat_tokenizer)
    assert whole.column_names == ["input_ids"]
    assert {chat_tokenizer.decode(row["input_ids"]) for row in whole} <= {
        row["prompt"] + row["completion"] + "<|endoftext|>" for row in rows
    }


def test_only_the_assistants_turns_have_labels_where_the_file_asks_for_it(tmp_path, chat_tokenizer):
    rows = list(rows_of("chat", 30))
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    config = DatasetConfig(str(path), domain="chat", test_split_size=5, assistant_only_loss=True)
    answers = {row["messages"][1]["content"] + "<|im_end|>" for row in rows}
    assert set(kept_texts(encoded(config, chat_tokenizer), chat_tokenizer)) <= answers
    assert encoded(dataclasses.replace(config, assistant_only_loss=False), chat_tokenizer).column_names == [
        "input_ids"
    ]


def test_tokens_without_a_loss_stay_without_one_in_the_blocks(tmp_path):
    write_sets(tmp_path / "data")
    entries = [{"path": "data/chat.jsonl", "assistant_only_loss": True}, {"path": "data/prose.jsonl"}]
    data = load(tmp_path, *entries)
    blocks = {name: np.array(rows["labels"]) for name, rows in data.train.items()}
    assert np.array_equal(blocks["prose"], np.array(data.train["prose"]["input_ids"]))
    ignored = blocks["chat"] == -100
    assert 0.2 < ignored.mean() < 0.5
    assert np.array_equal(blocks["chat"][~ignored], np.array(data.train["chat"]["input_ids"])[~ignored])
    assert not ignored[:, 1:].all(axis=1).any()


def save_as(kind, rows, folder):
    """Rows in a file or folder of a kind, and its entry in a mixture."""
    dataset, path = Dataset.from_list(rows), folder / f"made.{kind}"
    if kind.startswith("jsonl"):
        dataset.to_json(path, compression="gzip" if kind.endswith("gz") else None)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "csv":
        dataset.to_csv(path)
    elif kind == "saved":
        DatasetDict({"train": dataset}).save_to_disk(path)
    elif kind == "arrow":
        dataset.save_to_disk(folder / "parts")
        shutil.copy(next((folder / "parts").glob("*.arrow")), path)
    else:
        dataset.to_json(path / "train.jsonl")
    return {"path": path.name, "domain": "made"}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv", "arrow", "saved", "folder"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
    rows = list(rows_of("tasks", 12))
    config = MixtureConfig.from_dict({"datasets": [save_as(kind, rows, tmp_path)], "test_split_size": 2})
    splits = open_mixture(config)["made"].splits
    assert [len(splits[name]) for name in ("train", "validation")] == [10, 2]
    both = [row for part in splits.values() for row in part]
    assert sorted(map(str, both)) == sorted(map(str, rows))


def test_columns_are_chosen_and_renamed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "a b", "text": "c", "messages": "d"}] * 8)
    config = MixtureConfig.from_dict({"datasets": [{"path": "a.jsonl", "columns": {"text": "body"}}]})
    records = open_mixture(config)["a"]
    assert records.kind == ("text",)
    assert list(records.documents()) == ["a b"] * 7


# One data set with a domain column


@pytest.fixture
def divided(tmp_path):
    rows = [{**row, "source": name} for name in ("chat", "prose") for row in rows_of("prose", 40)]
    rows = [row for pair in zip(rows[:40], rows[40:], strict=True) for row in pair]
    Dataset.from_list(rows).to_parquet(tmp_path / "all.parquet")
    return rows


@pytest.mark.parametrize("streaming", [False, True])
def test_every_value_of_the_domain_column_is_a_domain(streaming, divided, tmp_path):
    config = DatasetConfig("all.parquet", domain_column="source", max_examples=60, streaming=streaming)
    found = open_mixture(MixtureConfig((config,)))
    assert list(found) == ["chat", "prose"]
    for name, records in found.items():
        both = [row["text"] for part in records.splits.values() for row in part]
        assert sorted(both) == sorted(row["text"] for row in divided[:60] if row["source"] == name)
        assert len(records.splits["validation"]) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_domains_have_the_names_of_their_class_labels(streaming, tmp_path):
    rows = Dataset.from_list([{"body": f"row {place}", "source": place % 2} for place in range(80)])
    rows.cast_column("source", ClassLabel(names=["news", "wiki"])).to_parquet(tmp_path / "all.parquet")
    columns = {"text": "body", "source": "source"}
    config = DatasetConfig(
        "all.parquet", domain_column="source", columns=columns, max_examples=60, streaming=streaming
    )
    assert list(open_mixture(MixtureConfig((config,)))) == ["news", "wiki"]


def test_a_data_set_with_a_domain_column_is_learned_from_by_flags_alone(divided, tmp_path):
    args = DataArguments(dataset="all.parquet", domain_column="source", domains=["prose"], **TRAINED)
    data = load_domain_data(args, tmp_path / "out", targets=["chat"])
    assert (list(data.train), list(data.targets), set(data.validation)) == (["prose"], ["chat"], {"chat", "prose"})


# What is kept


def test_rows_are_tokenised_once_whatever_the_output_folder(tmp_path, monkeypatch):
    write_sets(tmp_path / "data")
    entries = [{"path": "data/tasks.jsonl"}, {"path": "data/prose.jsonl"}]
    first = load(tmp_path, *entries)
    options = {"tokenizer": str(tmp_path / "out" / "tokenizer"), "train_tokenizer_vocab": None, "output": "other"}
    monkeypatch.setattr(RecordEncoder, "__call__", None)
    again = load(tmp_path, *entries, **options)
    assert again.fingerprints == first.fingerprints
    assert again.train["tasks"][:] == first.train["tasks"][:]
    with pytest.raises(TypeError, match="NoneType"):
        load(tmp_path, {**entries[0], "completion_only_loss": False}, entries[1], **options)


def test_other_processes_read_what_the_main_one_made_and_not_the_data(tmp_path):
    write_sets(tmp_path / "data")
    mixture = write_mixture(
        tmp_path / "m.yaml",
        {"path": "data/chat.jsonl", "assistant_only_loss": True, "weight": 3},
        {"path": "data/prose.jsonl", "weight": 1},
        {"path": "data/tasks.jsonl", "weight": 1},
    )
    args = DataArguments(mixture=str(mixture), **TRAINED)
    first = load_domain_data(args, tmp_path / "out", targets=["tasks"])
    shutil.rmtree(tmp_path / "data")
    other = load_domain_data(args, tmp_path / "out", targets=["tasks"], is_prepared=True)
    assert (other.fingerprints, other.weights) == (first.fingerprints, {"chat": 3, "prose": 1})
    for part in ("train", "targets", "validation"):
        for name, rows in getattr(first, part).items():
            assert getattr(other, part)[name][:] == rows[:]
    with pytest.raises(ValueError, match=r"same arguments, but what .* is of other \['target', 'max_target_tokens'\]"):
        load_domain_data(args, tmp_path / "out", max_target_tokens=100, is_prepared=True)
    with pytest.raises(FileNotFoundError, match="All processes must see the output folder"):
        load_domain_data(args, tmp_path / "elsewhere", is_prepared=True)


def test_limits_cut_the_tokens_of_a_domain(tmp_path):
    write_sets(tmp_path / "data")
    data = load(tmp_path, {"path": "data/prose.jsonl"}, max_train_tokens=100, max_validation_tokens=40)
    assert (len(data.train["prose"]), len(data.validation["prose"])) == (6, 2)


def test_relative_paths_are_also_looked_for_beside_the_mixture(tmp_path, monkeypatch):
    write_sets(tmp_path / "there")
    mixture = write_mixture(
        tmp_path / "there" / "m.yaml",
        {"path": "prose.jsonl"},
        {"path": "json", "data_files": {"train": ["tasks.jsonl"]}, "domain": "tasks"},
    )
    found = open_mixture(MixtureConfig.from_file(mixture))
    assert [len(records.splits["train"]) for records in found.values()] == [57, 76]


PATTERNS = ["a[1]", "a?", "a*", "[!b]", "{a,b}", "a b%20#1"]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("given", ["path", "data_files", "relative", "data_dir"])
def test_the_name_of_a_file_is_no_pattern(name, given, tmp_path, monkeypatch):
    """Next to files and folders that it would fit."""
    for one in (name, "a1", "a", "b", "ab"):
        for place in (tmp_path / f"in {name}" / f"{one}.train.jsonl", tmp_path / "in a" / f"{one}.train.jsonl"):
            write_jsonl(place, [{"text": f"{place.parent.name}/{one}"}] * 3)
            write_jsonl(place.with_name(f"{one}.validation.jsonl"), [{"text": "held out"}])
    folder = tmp_path / f"in {name}"
    file = f"{name}.train.jsonl"
    monkeypatch.chdir(tmp_path if given != "relative" else folder)
    if given == "data_dir":
        records = open_mixture(MixtureConfig.from_folder(folder))[name]
    else:
        entry = {"path": str(folder / file)} if given == "path" else {"path": "json", "data_files": file}
        (folder / "m.yaml").write_text(yaml.dump({"datasets": [{**entry, "domain": "x"}]}))
        records = open_mixture(MixtureConfig.from_file(folder / "m.yaml"))["x"]
    assert set(records.train["text"]) == {f"in {name}/{name}"}


def test_a_folder_that_would_be_taken_for_a_pattern_is_refused(tmp_path):
    write_jsonl(tmp_path / "a?" / "x.jsonl", [{"text": "x"}])
    (tmp_path / "m.yaml").write_text(yaml.dump({"datasets": [{"path": "a?", "domain": "x"}]}))
    with pytest.raises(
        ValueError, match=r"Data set 'x' \('a\?', split 'train'\) must be readable, .* Rename the folder"
    ):
        _ = open_mixture(MixtureConfig.from_file(tmp_path / "m.yaml"))["x"].splits


def test_the_keys_of_trl_mean_what_they_mean_there():
    trl = pytest.importorskip("trl.scripts.utils")
    ours = {one.name: one.default for one in dataclasses.fields(DatasetConfig)}
    theirs = {one.name: one.default for one in dataclasses.fields(trl.DatasetConfig)}
    theirs.pop("fraction", None)  # refused: it cuts data sets
    assert {name: ours[name] for name in theirs} == theirs
    wanted = {one.name for one in dataclasses.fields(trl.DatasetMixtureConfig)}
    assert wanted == {"datasets", "streaming", "test_split_size"}


@pytest.mark.parametrize("page", ["docs/data.md", "hf_doge/data/mixture.py", "examples/mixture/mixture.yaml"])
def test_every_mixture_that_is_shown_can_be_read(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (shown,) = [text] if page.endswith("yaml") else re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(MixtureConfig.from_dict(yaml.safe_load(shown)).datasets) == 3


# In Python


def mixed(tmp_path, tokenizer, **options):
    write_sets(tmp_path / "data")
    mixture = write_mixture(
        tmp_path / "m.yaml",
        {"path": "data/chat.jsonl", "assistant_only_loss": True},
        {"path": "data/tasks.jsonl"},
        {"path": "data/prose.jsonl"},
        test_split_size=10,
    )
    return load_mixture(mixture, tokenizer, **options)


def test_a_mixture_in_python_is_what_the_commands_cut_into_blocks(tmp_path, chat_tokenizer):
    found = mixed(tmp_path, chat_tokenizer)
    assert {name: len(rows) for name, rows in found.items()} == {"chat": 50, "tasks": 70, "prose": 50}
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    args = DataArguments(mixture=str(tmp_path / "m.yaml"), tokenizer=str(tmp_path / "tokenizer"), block_size=16)
    blocks = load_domain_data(args, tmp_path / "out").train
    for name, rows in found.items():
        texts = list(zip(rows["input_ids"], rows["labels"], strict=True))
        tokens, labels = (list(itertools.chain.from_iterable(column)) for column in zip(*texts, strict=True))
        starts = [one for one in range(0, len(tokens) - 15, 16) if set(labels[one + 1 : one + 16]) != {-100}]
        assert blocks[name]["input_ids"][:] == [tokens[one : one + 16] for one in starts]
        if "labels" in blocks[name].column_names:
            assert blocks[name]["labels"][:] == [labels[one : one + 16] for one in starts]
    held_out = mixed(tmp_path, chat_tokenizer, split="validation")
    assert {name: len(rows) for name, rows in held_out.items()} == dict.fromkeys(found, 10)
    assert found["prose"]["labels"][:] == found["prose"]["input_ids"][:]


def test_all_domains_of_a_mixture_in_python_have_the_same_columns(tmp_path, chat_tokenizer):
    found = mixed(tmp_path, chat_tokenizer)
    assert len({str(rows.features) for rows in found.values()}) == 1
    assert set(found["prose"].column_names) == {"input_ids", "labels"}


def test_a_mixture_in_python_is_refused_as_the_commands_refuse_it(tmp_path, chat_tokenizer):
    with pytest.raises(ValueError, match="`split` must be one of"):
        mixed(tmp_path, chat_tokenizer, split="test")
    with pytest.raises(FileNotFoundError, match="must be a YAML file"):
        load_mixture(tmp_path / "none.yaml", chat_tokenizer)
    for tokenizer in ("gpt2", None):
        with pytest.raises(ValueError, match="`processing_class` must be a tokenizer"):
            load_mixture(tmp_path / "none.yaml", tokenizer)
    with pytest.raises(ValueError, match="`num_proc` must be"):
        load_mixture(tmp_path / "none.yaml", chat_tokenizer, num_proc=0)
    other = get_tokenizer(None, 300, documents=[lambda: ["a b"]], save_directory=tmp_path / "other")
    with pytest.raises(ValueError, match="must have a chat template"):
        mixed(tmp_path, other)
    other.eos_token = None
    with pytest.raises(ValueError, match="end-of-text token to set documents apart, but `processing_class` has none"):
        mixed(tmp_path, other)


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"datasets": [{"path": "a", "colums": ["x"]}]},
            "Data set 1 has an unknown key 'colums'; allowed are .*Did you",
        ),
        ({"datasets": [{"path": "a", "fraction": 0.5}]}, "unknown key 'fraction'.* here `weight` is the share"),
        (
            {"datasets": [{"path": "a"}], "seed": 1},
            "It has an unknown key 'seed'; allowed are datasets, streaming, test",
        ),
        ({"datasets": [{"name": "a"}]}, "Data set 1 must map keys to values, `path` among them"),
        ({"datasets": []}, "A mixture must hold data sets"),
        ({"data": []}, "must hold a list `datasets`"),
        ([], "must hold a list `datasets`"),
        ({"datasets": [{"path": "x/a.jsonl"}, {"path": "y/a.parquet"}]}, r"\['a'\] are names of more than one"),
        ({"datasets": [{"path": "a", "weight": 1}, {"path": "b"}]}, r"a `weight` or none, but \['b'\] have none"),
        ({"datasets": [{"path": "a", "weight": -1}]}, "Data set 1: `weight` must be at least 0"),
        ({"datasets": [{"path": "a", "streaming": True}]}, "has no `max_examples`"),
        ({"datasets": [{"path": "a", "domain_column": "s", "weight": 1}]}, "neither `domain` nor `weight`"),
        ({"datasets": [{"path": "a", "columns": "text"}]}, "`columns` must be a list of columns"),
        ({"datasets": [{"path": "a", "streaming": "yes"}]}, "`streaming` must be True or False"),
        ({"datasets": [{"path": "json"}]}, "names a format, so `data_files` must name the files"),
        ({"datasets": [{"path": "a"}], "test_split_size": 1.5}, r"`test_split_size` must be in \(0, 1\)"),
    ],
)
def test_a_mixture_that_says_what_cannot_be_is_refused(content, message, tmp_path):
    (tmp_path / "m.yaml").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        MixtureConfig.from_file(tmp_path / "m.yaml")


ROWS = [{"text": "a b c", "source": "x"}] * 8


@pytest.mark.parametrize(
    ("rows", "entry", "message"),
    [
        (ROWS, {"columns": ["body"]}, r"'a' must have the column 'body', but its columns are \['text', 'source'\]"),
        (ROWS, {"domain_column": "kind"}, "must have the column 'kind'"),
        ([{"words": "a"}] * 8, {}, r"must have a column `text`, `messages`, or both .*are \['words'\]"),
        ([{"text": 1}] * 8, {}, "must hold texts in 'text', but holds Value"),
        ([{"prompt": "a", "completion": 1}] * 8, {}, "must hold texts, or lists of messages in 'prompt' and"),
        ([], {}, "'a'.* must be readable, but it is not: |must have rows"),
        (ROWS[:1], {}, "must have rows to train on and 0.05 of them to hold out, but it has 1"),
        (ROWS, {"split": "test"}, "(?s)'a' .'a.jsonl', split 'test'. must be readable.*Unknown split"),
        ([{"text": "a"}, {"text": None}] * 40, {}, "must have a text in every row"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 8, {"tokenizer": "plain"}, "must have a chat template"),
        ([{"messages": [{"content": "a"}]}] * 8, {}, "must be a list of messages|lists of messages with `role`"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 8, {"assistant_only_loss": True}, "marks none"),
        (ROWS, {"assistant_only_loss": True}, "needs messages, but data set 'a' holds texts in 'text'"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_by_name(rows, entry, message, tmp_path, chat_tokenizer, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", rows)
    tokenizer = tokenizer if entry.pop("tokenizer", None) else chat_tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "train_tokenizer_vocab": None}
    with pytest.raises(ValueError, match=message):
        load(tmp_path, {"path": "a.jsonl", **entry}, **options)


@pytest.mark.parametrize("path", ["none.jsonl", "./none", "/none/here", "a/b/c"])
def test_a_path_that_is_not_there_is_refused(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no '.*Check the path"):
        load(tmp_path, {"path": path, "domain": "a"})


def test_a_file_that_no_builder_reads_and_a_missing_mixture_are_refused(tmp_path):
    (tmp_path / "notes.pdf").write_text("x")
    with pytest.raises(ValueError, match="must end in one of"):
        load(tmp_path, {"path": "notes.pdf"})
    with pytest.raises(FileNotFoundError, match="is no file"):
        MixtureConfig.from_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "One of --mixture, --data_dir, --dataset must say where the data are, but got none of them"),
        ({"data_dir": "a", "mixture": "b"}, "but got --mixture and --data_dir"),
        ({"dataset": "a"}, "`--domain_column` is not given"),
        ({"data_dir": "a", "streaming": True}, "--streaming go with `--dataset` alone"),
        ({"mixture": "a", "domain_column": "b"}, "--domain_column go with `--dataset` alone"),
        ({"dataset": "a", "domain_column": "b", "streaming": True}, "has no `max_examples`"),
    ],
)
def test_flags_that_do_not_say_where_the_data_are_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**given).get_mixture()


def test_domains_of_a_column_and_data_sets_share_no_name(divided, tmp_path):
    write_jsonl(tmp_path / "chat.jsonl", rows_of("prose", 8))
    with pytest.raises(ValueError, match=r"'chat' is in 'chat\.jsonl' and in 'all\.parquet'"):
        load(tmp_path, {"path": "all.parquet", "domain_column": "source"}, {"path": "chat.jsonl"})


def test_the_cache_of_the_tests_is_their_own(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    dataset = load_dataset("json", data_files="a.jsonl", split="train")
    assert str(tmp_path / "cache") in dataset.cache_files[0]["filename"]
