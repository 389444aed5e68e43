"""What artifacts say of where they come from: enough to make them again, and nothing of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.provenance import describe_dataset, describe_model, describe_process, public_command
from hf_doge.text import public_content, public_name
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.training.provenance import fingerprint_rows
from hf_doge.training.trainer import DoGETrainer
from tests.launch import REPOSITORY
from tests.tiny import tiny_classifier, tiny_llama
from tests.tracing.recorded_training import classification_data
from tests.tracing.recorded_training import train as train_recorded
from tests.training.test_doge_trainer import config, three_domains

TOKEN = "hf_" + "Secret0123456789abcdefghijklmnopqr"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gpt2", "gpt2"),
        ("me/model", "me/model"),
        ("me/model@v1.0", "me/model@v1.0"),
        ("datasets/me/corpus@0123", "datasets/me/corpus@0123"),
        ("/home/me/model", "model"),
        ("/home/my name/model/", "model"),
        ("./model", "model"),
        ("../runs/model", "model"),
        ("~/model", "model"),
        ("~me/model", "model"),
        ("runs/2/model", "model"),
        ("C:\\Users\\me\\model", "model"),
        ("file:///home/me/model", "model"),
        ("s3://bucket/model?signature=x", "model"),
        (Path("/home/me/model"), "model"),
        ("x" * 300 + "/" + "y" * 300, "x" * 300 + "/" + "y" * 300),
        ("/", "."),
        ("", None),
        (None, None),
    ],
)
def test_of_a_local_path_the_last_part_is_told_and_a_name_on_the_hub_as_it_is(name, shown):
    assert public_name(name) == shown


@pytest.mark.parametrize(("name", "shown"), [("me/model", "me/model"), ("/home/me/model", "model"), ("", "")])
def test_a_model_is_told_by_where_its_weights_began(name, shown):
    model = tiny_llama()
    model.config.name_or_path = name
    assert describe_model(model)["name_or_path"] == shown


def test_a_name_that_is_here_on_disk_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert public_name("runs/model") == "model"
    assert public_name("runs/other") == "runs/other"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/home/me/train.py", "--lr", "1e-3"], "train.py --lr 1e-3"),
        (["/usr/bin/hf-doge", "learn", "--data_dir", "/home/me/data"], "hf-doge learn --data_dir data"),
        (["/site-packages/hf_doge/__main__.py", "learn"], "hf-doge learn"),
        ([""], "python"),
        (["-c"], "-c"),
        (["x", "--data=wiki:/home/me/w.jsonl,/home/me/x y.jsonl"], "x '--data=wiki:w.jsonl,x y.jsonl'"),
        (["x", "../data", "~/data", "~me/data", "./x/y"], "x data data data y"),
        (["x", "me/model", "hf://datasets/me/x/*.parquet", "https://huggingface.co/me/x"],
         "x me/model 'hf://datasets/me/x/*.parquet' https://huggingface.co/me/x"),
        (["x", "https://me:secret@host/x", "file:///home/me/x"], "x https://host/x file://x"),
        (["x", "--hub_token", TOKEN, "--token=abc", "--num_tokens", "5"], "x --hub_token '***' '--token=***' --num_tokens 5"),
        (["x", "--note", f"it is {TOKEN}!"], "x --note 'it is hf_***!'"),
        (["x", "--api-key", "k", "--password=p", "--top_k_tokens", "3"], "x --api-key '***' '--password=***' --top_k_tokens 3"),
        (["x", "--pattern", "a/b|c", "1/2", "</s>"], "x --pattern 'a/b|c' 1/2 '</s>'"),
        (["x", "cannot open '/home/me/my x': gone"], "x 'cannot open '\"'\"'my x'\"'\"': gone'"),
    ],
)  # fmt: skip
def test_a_command_is_told_without_paths_and_tokens(arguments, shown):
    assert public_command(arguments) == shown


@pytest.mark.parametrize(("file", "module"), [("__main__.py", "tools.learn"), ("it.py", "tools.learn.it")])
def test_a_module_is_told_as_it_was_run(tmp_path, file, module):
    package = tmp_path / "tools" / "learn"
    package.mkdir(parents=True)
    (package / file).write_text("from hf_doge.artifacts.provenance import public_command; print(public_command())")
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    run = subprocess.run(
        [sys.executable, "-m", module, "--data_dir", "/home/me/data"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.stdout.strip() == f"python -m {module} --data_dir data"


def test_content_is_told_without_paths_at_any_depth():
    content = {"a": ["/home/me/x", {"b": f"see /home/me/y, {TOKEN}"}], "c": 1.5, "d": None, "eos": "</s>", "e": True}
    assert public_content(content) == {
        "a": ["x", {"b": "see y, hf_***"}],
        "c": 1.5,
        "d": None,
        "eos": "</s>",
        "e": True,
    }


def test_the_process_tells_its_command_commit_and_versions():
    told = describe_process()
    assert set(told) == {"command", "versions", "hf_doge_commit", "date"}
    assert set(told["versions"]) >= {"hf_doge", "torch", "transformers"}


def test_sources_on_the_hub_are_told_with_their_commit(tmp_path):
    (tmp_path / "x.csv").write_text("a\n1\n")
    dataset = load_dataset("csv", data_files=str(tmp_path / "x.csv"), split="train", cache_dir=str(tmp_path / "cache"))
    assert describe_dataset(dataset) == {"sources": []}
    dataset.info.download_checksums = {
        "hf://datasets/me/corpus@0a1b/data/1.parquet": {},
        "hf://datasets/me/corpus@0a1b/data/2.parquet": {},
        "hf://datasets/squad@ff/x": {},
        "/home/me/x.csv": {},
    }
    assert describe_dataset(dataset) == {"sources": ["datasets/me/corpus@0a1b", "datasets/squad@ff"]}
    assert describe_dataset(object()) == {"sources": []}


def test_the_fingerprint_of_rows_is_that_of_their_content_however_they_were_loaded(tmp_path):
    rows = [{"input_ids": [n, 2, 3], "text": f"row {n}", "score": n / 4, "domain": "a"} for n in range(3000)]
    plain = Dataset.from_list(rows)
    plain.to_json(tmp_path / "rows.jsonl")
    plain.to_parquet(tmp_path / "rows.parquet")
    narrow = plain.cast_column("input_ids", List(Value("int16"))).cast_column("text", Value("large_string"))
    torn = concatenate_datasets([plain.select(range(1000, 3000)), plain.select(range(1000))])
    loaded = {
        "json": Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache")),
        "parquet": Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")),
        "types": narrow,
        "order": torn.select([*range(2000, 3000), *range(2000)]),
        "columns": plain.select_columns(["domain", "text", "input_ids", "score"]),
        "domain": plain.rename_column("domain", "source").map(lambda row: {"domain": "b"}).remove_columns("source"),
        "transform": plain.with_transform(lambda batch: {"input_ids": [[0]] * len(batch["input_ids"])}),
    }
    expected = fingerprint_rows(plain, np.arange(3000), without="domain")
    for way, dataset in loaded.items():
        assert fingerprint_rows(dataset, np.arange(3000), without="domain") == expected, way
    assert fingerprint_rows(torn, np.roll(np.arange(3000), 1000), without="domain") == expected
    long = Dataset.from_dict({"text": ["x" * 200_000] * 200 + ["y"]})
    assert fingerprint_rows(long, np.arange(201), without="domain") != fingerprint_rows(
        long.select(range(200)), np.arange(200), without="domain"
    )
    one_other = [{**row, "input_ids": [n, 2, 2 if n == 1777 else 3]} for n, row in enumerate(rows)]
    for other in (torn, plain.select(range(2999)), Dataset.from_list(one_other)):
        assert fingerprint_rows(other, np.arange(len(other)), without="domain") != expected


def test_the_fingerprint_of_a_file_is_its_bytes_or_its_name_and_none_is_opened():
    def images(*values):
        return Dataset.from_dict({"image": list(values)}, features=Features({"image": Image()}))

    def digest(dataset):
        return fingerprint_rows(dataset, np.arange(len(dataset)), without="domain")

    assert digest(images({"bytes": b"a", "path": None})) == digest(images({"bytes": b"a", "path": "/home/me/x.png"}))
    assert digest(images({"bytes": b"a", "path": None})) != digest(images({"bytes": b"b", "path": None}))
    assert digest(images("/home/me/x.png")) == digest(images("/mnt/data/x.png")) != digest(images("/mnt/data/y.png"))


def find_secrets(folder, *secrets):
    """Files that hold one of the texts, in their bytes or in the columns of a table."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            content += repr((table.schema, table.to_pydict())).encode()
        found += [(path.name, secret) for secret in secrets if secret.encode() in content]
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder whose name must appear nowhere, in the command neither."""
    folder = tmp_path / "home-of-somebody" / "private"
    folder.mkdir(parents=True)
    command = [
        str(folder / "learn.py"),
        "--model",
        str(folder / "base"),
        f"--data=wiki:{folder}/w",
        "--hub_token",
        TOKEN,
    ]
    monkeypatch.setattr(sys, "argv", command)
    return folder


def test_learned_weights_hold_no_path_and_no_token(here, tokenizer):
    model = tiny_llama()
    model.save_pretrained(here / "base")
    tokenizer.save_pretrained(here / "base")
    tokenizer.name_or_path = str(here / "base")
    args = config(here / "run", max_steps=2, hub_token=TOKEN, save_strategy="steps", save_steps=1, warmup_steps=1)
    trainer = DoGETrainer(
        type(model).from_pretrained(here / "base"), args, train_dataset=three_domains(), processing_class=tokenizer
    )
    trainer.train()
    trainer.domain_weights.save_pretrained(here / "weights", plot=True)
    assert find_secrets(here / "weights", "home-of-somebody", TOKEN, str(Path.home())) == []
    saved = DomainWeights.from_pretrained(here / "run" / "checkpoint-2" / "domain_weights")
    assert find_secrets(here / "run" / "checkpoint-2" / "domain_weights", "home-of-somebody", TOKEN) == []
    metadata = saved.metadata
    assert metadata["model"]["name_or_path"] == metadata["tokenizer"]["name_or_path"] == "base"
    assert metadata["command"] == "learn.py --model base --data=wiki:w --hub_token '***'"
    assert metadata["objective"] == "universal"
    training = metadata["training"]
    assert training["arguments"] == {
        "per_device_train_batch_size": 12, "max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True, "seed": 0, "warmup_steps": 1,
    }  # fmt: skip
    assert training["seconds"] > 0
    assert training["num_tokens_seen"] == 2 * 12 * 7
    card = (here / "weights" / "README.md").read_text()
    assert "## Cost\n\n- Time: " in card


def test_seconds_and_tokens_of_a_resumed_run_are_those_of_all_of_it(tmp_path):
    def trainer(**options):
        args = config(tmp_path / "run", save_strategy="steps", save_steps=1, **options)
        return DoGETrainer(tiny_llama(), args, train_dataset=three_domains())

    first = trainer(max_steps=1)
    first.train()
    second = trainer(max_steps=3)
    second.train(resume_from_checkpoint=True)
    before, after = (one.domain_weights.metadata["training"] for one in (first, second))
    assert after["num_tokens_seen"] == 3 * before["num_tokens_seen"]
    assert after["seconds"] > before["seconds"]


def test_an_index_holds_no_path_and_no_token(here, tokenizer):
    model = tiny_classifier()
    model.save_pretrained(here / "base")
    tokenizer.name_or_path = str(here / "base")
    model = type(model).from_pretrained(here / "base")
    callback = TracInWECallback(here / "index", save_weights=True)
    reader = train_recorded(here, tokenizer=tokenizer, model=model, dataset=classification_data(), callback=callback)
    assert find_secrets(here / "index", "home-of-somebody", TOKEN, str(Path.home())) == []
    assert reader.config["tokenizer"]["name"] == "base"
    metadata = reader.config["metadata"]
    assert metadata["command"].startswith("learn.py --model base")
    assert metadata["model"] == {
        "class": "BertForSequenceClassification", "name_or_path": "base", "revision": None,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
    assert metadata["command"] in (here / "index" / "README.md").read_text()


def test_loading_and_describing_need_no_torch():
    code = (
        "import sys; from hf_doge.artifacts.provenance import public_command; from hf_doge.text import public_name;"
        "public_command(); public_name('x'); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert run.stdout.strip() == "False"
