"""`hf-doge index` takes its examples from the same mixture as the training."""

import json

import datasets
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_doge import InfluenceIndex
from hf_doge.cli import main
from hf_doge.data.tokenizer import get_tokenizer
from tests.data.made import rows_of, write_jsonl
from tests.tiny import tiny_bert

CHAT = list(rows_of("chat", 8))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model with its tokenizer, and a mixture of a chat and texts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tokenizer = get_tokenizer(
        None, 300, documents=[lambda: map(json.dumps, CHAT)], save_directory=tmp_path / "model", for_chat=True
    )
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_jsonl(tmp_path / "chat.jsonl", CHAT)
    write_jsonl(tmp_path / "prose.jsonl", [{**row, "author": "me"} for row in rows_of("prose", 8)])
    entries = [{"path": "chat.jsonl", "assistant_only_loss": True}, {"path": "prose.jsonl"}]
    (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": entries, "test_split_size": 2}))
    return tmp_path, tokenizer


def index(*flags, output="index"):
    shared = ["--checkpoints", "model", "--learning_rates", "1", "--max_length", "120", "--output_dir", output]
    return main(["index", *shared, *flags])


def test_the_examples_are_the_train_rows_as_training_encodes_them(place):
    folder, tokenizer = place
    assert index("--mixture", "mixture.yaml") == 0
    found = InfluenceIndex.from_pretrained("index", cache_dir=folder / "maps")
    examples = datasets.load_dataset("index", "examples", split="train")
    assert examples["domain"] == ["chat"] * 6 + ["prose"] * 6
    assert examples["author"] == [None] * 6 + ["me"] * 6
    answers = {row["messages"][1]["content"]: row for row in CHAT}
    asked = [answers[text.splitlines()[1]] for text in examples["text"][:6]]

    rows = []  # the same by hand: the assistant's turn alone has labels, the first 120 tokens count
    for row in asked:
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        labels = [token if own else -100 for token, own in pairs]
        rows.append({"input_ids": encoded["input_ids"][:120], "labels": labels[:120]})
    for text in examples["text"][6:]:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:120]
        rows.append({"input_ids": ids, "labels": ids})
    write_jsonl(folder / "rows.jsonl", rows)
    assert index("--data", "rows.jsonl", output="by_hand") == 0
    by_hand = InfluenceIndex.from_pretrained("by_hand", cache_dir=folder / "maps")
    scores = found.scores(rows)
    np.testing.assert_allclose(scores, by_hand.scores(rows), rtol=1e-5)
    assert (scores.diagonal() > 0).all()
    assert {row["domain"] for row in found.domain_influence(rows[:1], "domain")} == {"chat", "prose"}


def test_a_data_folder_needs_no_file_to_evaluate_on(place):
    folder, _ = place
    for name, splits in (("a", ("train", "validation")), ("b", ("train",)), ("c", ("validation",))):
        for split in splits:
            write_jsonl(folder / "data" / f"{name}.{split}.jsonl", rows_of("prose", 3))
    assert index("--data_dir", "data") == 0
    examples = datasets.load_dataset("index", "examples", split="train")
    assert examples["domain"] == ["a"] * 3 + ["b"] * 3


def test_a_mixture_needs_no_split_to_evaluate_on(place):
    folder, _ = place
    rows = [{**row, "kind": kind} for kind in ("a", "b") for row in rows_of("prose", 3)]
    write_jsonl(folder / "divided.jsonl", rows)
    write_jsonl(folder / "held_out.jsonl", rows[:3])
    shared = {"path": "json", "domain_column": "kind", "columns": {"text": "text"}}
    divided = {
        **shared,
        "data_files": {"train": "divided.jsonl", "test": "held_out.jsonl"},
        "validation_split": "test",
    }
    whole = {"path": "prose.jsonl", "domain": "c", "validation_split": "none"}
    (folder / "split.yaml").write_text(json.dumps({"datasets": [divided, whole]}))
    assert index("--mixture", "split.yaml") == 0
    examples = datasets.load_dataset("index", "examples", split="train")
    assert examples["domain"] == ["a"] * 3 + ["b"] * 3 + ["c"] * 8


def test_a_text_next_to_a_prompt_is_no_silent_choice(place, capsys):
    folder, _ = place
    write_jsonl(folder / "both.jsonl", [{"prompt": "Say it.", "text": "Say it. Now."}] * 2)
    assert index("--data", "both.jsonl") == 2
    assert "Line 1 of 'both.jsonl': A record must say in one place" in capsys.readouterr().err
    assert index("--data", "both.jsonl", "--text_field", "text") == 0
    search = ["search", "--index", "index", "--queries", "both.jsonl"]
    for flags in ([], ["--next_tokens", "2"]):
        assert main([*search, *flags]) == 2
        assert "has both `prompt` and" in capsys.readouterr().err
    assert main([*search, "--text_field", "text"]) == 0
    with pytest.raises(
        ValueError, match="A record must say in one place what the model reads, but it has both `prompt`"
    ):
        InfluenceIndex.from_pretrained("index", cache_dir=folder / "maps").scores([{"prompt": "x", "text": "y"}])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "One of --data, --mixture, --data_dir, --dataset must say where the data are"),
        (["--data", "chat.jsonl", "--mixture", "mixture.yaml"], "but got --data and --mixture"),
        (["--mixture", "mixture.yaml", "--max_length", "3"], "has none among its first 3"),
        (
            ["--mixture", "mixture.yaml", "--checkpoints", "bert"],
            "A mixture is of language models, but 'bert' holds a",
        ),
    ],
)
def test_what_cannot_be_indexed_is_refused(flags, message, place, capsys):
    _, tokenizer = place
    if "bert" in flags:
        tiny_bert().save_pretrained("bert")
        tokenizer.save_pretrained("bert")
    shared = {"--checkpoints": "model", "--learning_rates": "1", "--output_dir": "index"}
    shared = {name: value for name, value in shared.items() if name not in flags}
    assert main(["index", *(word for pair in shared.items() for word in pair), *flags]) == 2
    assert message in capsys.readouterr().err
