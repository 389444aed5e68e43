"""Queries as a user means them: what a model says next, and a part of its answer."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from hf_doge import InfluenceIndex
from hf_doge.cli import main
from hf_doge.cli.search import _text_of
from hf_doge.gradients.example_losses import IGNORE_INDEX
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.queries import check_options
from hf_doge.tracing.settings import RecordingSettings
from tests.tracing.influence_tools import (
    byte_level_tokenizer,
    classifier,
    language_model,
    sentences,
    tokenised,
    train,
    wordpiece_tokenizer,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["The stocks", "A new rocket is", "Goal"]
NUM = 5


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def dataset(tokenizer):
    rows = [{"text": row["text"]} for row in sentences(12)]
    return tokenised(rows, tokenizer)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tokenizer, dataset):
    folder = tmp_path_factory.mktemp("said")
    train(folder, language_model(tokenizer), tokenizer, dataset, language=True, epochs=4)
    return folder


@pytest.fixture(scope="module")
def index(recorded):
    return InfluenceIndex.from_pretrained(recorded / "index", cache_dir=recorded / "maps", masking="completion")


@pytest.fixture(scope="module")
def said(index, tokenizer):
    """Token ids of prompts, and what a greedy loop says: the likeliest token of a forward, again and again."""
    model = AutoModelForCausalLM.from_pretrained(index.reader.checkpoints[-1]["path"]).eval()
    found = []
    for prompt in PROMPTS:
        ids = list(tokenizer(prompt)["input_ids"])
        begin = len(ids)
        for _ in range(NUM):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        found.append((ids[:begin], ids[begin:]))
    return found


def asked(prompt, answer, kept=None):
    """A query whose labels are the answer's tokens, or those of its places `kept`."""
    labels = [token if kept is None or place in kept else IGNORE_INDEX for place, token in enumerate(answer)]
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + labels}


def gradient(model, ids, labels):
    """`(vocabulary, width)`, by autograd on what is read from the embeddings: the loss is that of the labels alone."""
    ids, labels = torch.tensor(ids), torch.tensor(labels)
    read = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=read[None]).logits[0]
    loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
    (grads,) = torch.autograd.grad(loss, [read])
    return torch.zeros_like(model.get_input_embeddings().weight).index_add(0, ids, grads)


def brute_force(index, dataset, queries):
    total = 0
    for checkpoint in index.reader.checkpoints:
        model = AutoModelForCausalLM.from_pretrained(checkpoint["path"]).eval()
        own = torch.stack([gradient(model, one["input_ids"], one["labels"]).flatten() for one in queries])
        rows = [gradient(model, ids, ids).flatten() for ids in dataset["input_ids"]]
        total = total + checkpoint["learning_rate"] * own @ torch.stack(rows).T
    return total.detach().numpy()


def close(found, expected, tolerance=1e-4):
    return np.abs(expected).max() > 0 and np.allclose(
        found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


# What the model says next


def test_what_the_model_says_next_is_traced_by_its_own_tokens(index, said, dataset):
    expected = [asked(*one) for one in said]
    found = index.scores(PROMPTS, next_tokens=NUM)
    assert close(found, brute_force(index, dataset, expected))
    assert np.allclose(found, index.scores(expected), rtol=1e-5, atol=1e-7)


def test_it_is_a_search_of_the_prompt_with_the_completion(index, said, tokenizer):
    pairs = [
        {"prompt": prompt, "completion": tokenizer.decode(answer)}
        for prompt, (_, answer) in zip(PROMPTS, said, strict=True)
    ]
    same = [
        tokenizer(pair["prompt"] + pair["completion"])["input_ids"] == [*one, *two]
        for pair, (one, two) in zip(pairs, said, strict=True)
    ]
    assert any(same)
    found, expected = index.scores(PROMPTS, next_tokens=NUM), index.scores(pairs)
    assert np.allclose(found[same], expected[same], rtol=1e-5, atol=1e-7)
    hits = index.search(PROMPTS, next_tokens=NUM, top_k=1)
    by_query = dict(zip(hits["query"], zip(hits["query_text"], hits["query_target"], strict=True), strict=True))
    for position, pair in enumerate(pairs):
        assert by_query[position] == (pair["prompt"] + pair["completion"], pair["completion"])


def test_a_text_a_prompt_and_tokens_say_the_same_and_messages_end_where_the_assistant_begins(index, tokenizer):
    prompt = PROMPTS[0]
    asked_alike = [prompt, {"prompt": prompt}, {"input_ids": tokenizer(prompt)["input_ids"]}]
    scores = [index.scores([one], next_tokens=NUM) for one in asked_alike]
    assert all(np.array_equal(one, scores[0]) for one in scores)
    chat = [{"role": "user", "content": prompt}]
    asked_alike = [{"messages": chat}, {"prompt": chat}, f"<user>{prompt}<assistant>"]
    scores = [index.scores([one], next_tokens=NUM) for one in asked_alike]
    assert all(np.array_equal(one, scores[0]) for one in scores)
    assert index.search([{"messages": chat}], next_tokens=NUM)[0]["query_text"].startswith(
        f"<user>{prompt}<assistant>"
    )


def test_how_a_model_samples_changes_nothing(recorded, index):
    model = AutoModelForCausalLM.from_pretrained(index.reader.checkpoints[-1]["path"])
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.9, num_beams=2)
    other = InfluenceIndex.from_pretrained(
        recorded / "index", cache_dir=recorded / "maps", masking="completion", model=model
    )
    assert np.array_equal(other.scores(PROMPTS, next_tokens=NUM), index.scores(PROMPTS, next_tokens=NUM))


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ({"prompt": "Goal", "completion": " is"}, {"next_tokens": 3}, "query 0 has its answer in `completion`"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, {"next_tokens": 3}, "has its answer in `messages`"),
        ({"text": "Goal", "label": 1}, {"next_tokens": 3}, "has its answer in `label`"),
        ("Goal " * 10, {"next_tokens": 60}, r"needs room behind the prompt, .* the model reads 64 at most"),
        ("Goal", {"next_tokens": 0}, "`next_tokens` must be at least 1"),
        ({"prompt": [{"role": "user", "content": "x"}]}, {}, "have a `completion`, or be asked with `next_tokens`"),
        ({"prompt": [{"content": "x"}]}, {"next_tokens": 2}, "lists of messages with `role` and `content`"),
        ("Goal is", {"target": "rocket"}, r"'rocket' of query 0, whose answer is 'Goal is', is no part of it"),
        ("is is", {"target": "is"}, r"stands there at the characters \[0, 3\]: pass `\(start, stop\)`"),
        ("Goal is", {"target": (3, 99)}, r"has 7 characters and the target is \(3, 99\)"),
        ("Goal is", {"target": (3, 2)}, "`0 <= start < stop`, but got"),
        ("Goal is", {"target": ""}, "a part of the answer"),
        ("Goal is", {"target": ["is", "is"]}, "one for each of the 1, but got 2"),
        ("Goal is", {"target": (0, 1)}, "the first token of a text is not predicted"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_words(index, query, options, message):
    with pytest.raises(ValueError, match=message):
        index.scores([query], **options)


def test_a_model_from_text_to_text_is_traced_for_what_its_decoder_says(tmp_path, tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, initializer_factor=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "checkpoint-1")
    tokenizer.save_pretrained(tmp_path / "checkpoint-1")
    rows = [{"input_ids": tokenizer(text)["input_ids"], "labels": [7, 9, 5]} for text in PROMPTS]
    settings = RecordingSettings(recipe="paper", dtype="float32")
    data, checkpoints = Dataset.from_list(rows), [tmp_path / "checkpoint-1"]
    options = {"tokenizer": tokenizer, "settings": settings, "learning_rates": [1.0], "progress": False}
    record_dataset(tmp_path / "index", checkpoints, data, **options)
    index = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    ids, said = rows[0]["input_ids"], [1]
    for _ in range(4):
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([said]))
        said.append(int(outputs.logits[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    expected = index.scores([{"input_ids": ids, "labels": said[1:]}])
    assert close(index.scores([PROMPTS[0]], next_tokens=4), expected)
    assert index.search([PROMPTS[0]], next_tokens=4)[0]["query_target"] == tokenizer.decode(said[1:])


def test_a_classifier_says_nothing(tmp_path):
    tokenizer = wordpiece_tokenizer()
    folder = train(tmp_path, classifier(tokenizer), tokenizer, tokenised(sentences(6), tokenizer), epochs=1)
    index = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
    for options, name in (({"next_tokens": 3}, "next_tokens"), ({"target": "goal"}, "target")):
        with pytest.raises(ValueError, match=f"`{name}` is about models that write texts, but `BertFor"):
            index.scores(["The goal."], **options)


# A part of the answer


PAIR = {"prompt": "The stocks", "completion": " is winning the new market."}


def places_of(tokenizer, part):
    """Places of the tokens of the completion that hold some of its characters."""
    whole = tokenizer(PAIR["prompt"] + PAIR["completion"], return_offsets_mapping=True)
    begin = len(tokenizer(PAIR["prompt"])["input_ids"])
    start = len(PAIR["prompt"]) + PAIR["completion"].index(part)
    offsets = whole["offset_mapping"][begin:]
    kept = {at for at, (low, high) in enumerate(offsets) if low < start + len(part) and high > start}
    return whole["input_ids"][:begin], whole["input_ids"][begin:], kept


@pytest.mark.parametrize("part", ["winning", "new market", "."])
def test_a_part_of_an_answer_has_the_gradient_of_the_loss_on_its_tokens(index, dataset, tokenizer, part):
    prompt, answer, kept = places_of(tokenizer, part)
    assert 0 < len(kept) < len(answer)
    expected = brute_force(index, dataset, [asked(prompt, answer, kept)])
    start = PAIR["completion"].index(part)
    for target in (part, (start, start + len(part)), [part], np.array([start, start + len(part)])):
        assert close(index.scores([PAIR], target=target), expected)
    assert index.search([PAIR], target=part)[0]["query_target"] == part
    tokens = {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}
    assert close(index.scores([tokens], target=part), expected)


def test_each_query_has_a_target_of_its_own_and_parts_add_up(index):
    parts = [" is", " winning", " the new market", "."]
    starts = [PAIR["completion"].index(part) for part in parts]
    spans = [(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
    whole = index.scores([PAIR])
    assert close(index.scores([PAIR] * 4, target=spans).sum(axis=0), whole[0])
    assert np.array_equal(index.scores([PAIR], target="all"), whole)
    mixed = index.scores([PAIR, PAIR], target=["all", "winning"])
    assert close(mixed, np.concatenate([whole, index.scores([PAIR], target="winning")]))


def test_a_process_has_the_targets_of_its_share_of_the_queries(index):
    options = {"target": ["winning", "market", "new"]}
    records = index._records([PAIR] * 3, options)
    options = check_options(options, index.reader)
    shares = [index._scorer(records[at : at + 1], options, first_position=at) for at in range(3)]
    targets = [share.queries[0].target for share in shares]
    assert targets == ["winning", "market", "new"]


def test_a_part_of_the_last_message_and_of_what_the_model_says(recorded, index, said, tokenizer):
    plain = InfluenceIndex.from_pretrained(recorded / "index", cache_dir=recorded / "maps", masking="none")
    chat = {"messages": [{"role": "user", "content": "new goal"}, {"role": "assistant", "content": "new goal is"}]}
    text = "<user>new goal<assistant>new goal is"
    begin = text.rindex("goal")
    expected = plain.scores([text], target=(begin, begin + 4))
    assert close(plain.scores([chat], target="goal"), expected)
    assert close(plain.scores([chat], target=(4, 8)), expected)
    answer = tokenizer.decode(said[0][1])
    first = index.search([PROMPTS[0]], next_tokens=NUM, target=(0, len(answer)), top_k=1)[0]
    assert first["query_target"] == answer.strip()
    assert np.array_equal(
        index.scores([PROMPTS[0]], next_tokens=NUM, target=(0, len(answer))),
        index.scores([PROMPTS[0]], next_tokens=NUM),
    )


# From the shell


def test_the_command_traces_what_the_model_says_next(recorded, index, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    argv = ["search", "--index", str(recorded / "index"), "--top_k", "1"]
    assert main([*argv, "--query", PROMPTS[0], "--next_tokens", str(NUM)]) == 0
    hit = index.search([PROMPTS[0]], next_tokens=NUM, top_k=1)[0]
    assert f"  traced: {' '.join(hit['query_target'].split())}" in capsys.readouterr().out
    (tmp_path / "queries.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "id": "a"}) + "\n")
    assert main([*argv, "--queries", str(tmp_path / "queries.jsonl"), "--next_tokens", str(NUM), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["example_id"] == hit["example_id"]
    (tmp_path / "queries.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "label": "x"}) + "\n")
    assert main([*argv, "--queries", str(tmp_path / "queries.jsonl"), "--next_tokens", str(NUM)]) != 0
    assert "has its answer in `label`" in capsys.readouterr().err
    shown = {"prompt": "Say", "completion": " it."}
    assert (_text_of(shown), _text_of({**shown, "text": "All"}), _text_of({"label": 1})) == ("Say  it.", "All", "")
    (tmp_path / "queries.jsonl").write_text(json.dumps({**PAIR, "part": "winning"}) + "\n")
    more = ["--masking", "completion", "--json"]
    scores = []
    for options in (["--target", "winning"], ["--target_field", "part"]):
        assert main([*argv, "--queries", str(tmp_path / "queries.jsonl"), *options, *more]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[0])["score"])
    expected = index.search([PAIR], target="winning", top_k=1)[0]["score"]
    assert scores == pytest.approx([expected, expected], rel=1e-5)
    for options, reason in ((["--target_field", "prat"], "no line has 'prat'"), (["--target", ""], "`target` must")):
        assert main([*argv, "--queries", str(tmp_path / "queries.jsonl"), *options, *more]) == 2
        assert reason in capsys.readouterr().err
