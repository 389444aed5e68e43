"""`hf-doge index` on each kind of model: its labels are those of the training, or it says in words what it needs."""

import json

import pytest
from datasets import Dataset
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
)

from hf_doge import InfluenceIndex
from hf_doge.cli import index_data, main
from hf_doge.cli.models import make_model
from hf_doge.data.records import readable
from tests.tiny import _bert_config, tiny_bert, tiny_llama, tiny_t5, tiny_tokenizer

TEXTS = ["w1 w2 w3", "w4 w2", "w5 w2 w7 w8"]
NAMED = {"id2label": {0: "false", 1: "true"}, "label2id": {"false": 0, "true": 1}}


def llama_classifier():
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 2, None
    return LlamaForSequenceClassification(config)


MODELS = {
    "language model": tiny_llama,
    "masked": tiny_bert,
    "text to text": tiny_t5,
    "two classes": lambda: BertForSequenceClassification(_bert_config(num_labels=2)),
    "true or false": lambda: BertForSequenceClassification(_bert_config(num_labels=2, **NAMED)),
    "several classes": lambda: BertForSequenceClassification(
        _bert_config(num_labels=3, problem_type="multi_label_classification")
    ),
    "a number": lambda: BertForSequenceClassification(_bert_config(num_labels=1)),
    "without padding": llama_classifier,
    "tagger": lambda: BertForTokenClassification(_bert_config(num_labels=3)),
    "answers": lambda: BertForQuestionAnswering(_bert_config()),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name.replace(" ", "-"))
        tiny_tokenizer().save_pretrained(folder / name.replace(" ", "-"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tiny_llama().save_pretrained(folder / "chats")
    tokenizer.save_pretrained(folder / "chats")
    return folder


@pytest.fixture
def index(checkpoints, tmp_path, monkeypatch):
    """Index records at a model; the exit status."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def run(kind, records, *options):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        argv = ["--checkpoints", str(checkpoints / kind.replace(" ", "-")), "--data", str(tmp_path / "data.jsonl")]
        options = options or ("--output_dir", str(tmp_path / "index"))
        rates = () if "--add_examples" in options else ("--learning_rates", "1")
        return main(["index", *argv, *rates, *options])

    return run


def labelled(labels, **columns):
    return [{"text": text, "label": label, "source": text[:2]} for text, label in zip(TEXTS, labels, strict=True)]


TOKENS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 6], "labels": [-100, 6]}]
TAGS = [{"input_ids": [5, 6, 7], "labels": [0, 1, 2]}, {"input_ids": [8, 6], "labels": [0, -100]}]
PAIRS = [{"prompt": "w1 w2", "completion": " w3"}, {"prompt": "w1 w2", "completion": " w4 w2"}]
GOOD = {
    "texts": ("language model", [{"text": text} for text in TEXTS]),
    "tokens": ("language model", TOKENS),
    "tokens without labels": ("language model", [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 6]}]),
    "prompts with completions": ("language model", PAIRS),
    "texts that are written": ("text to text", labelled(["w1", "w2 w3", "w4"])),
    "true and false": ("two classes", labelled([True, False, True])),
    "true and false by name": ("true or false", labelled([True, "false", "true"])),
    "whole numbers as floats": ("two classes", labelled([1.0, 0.0, 1])),
    "several classes": ("several classes", labelled([[1, 0, 1], [0, 0, 1], [1, 1, 1]])),
    "numbers": ("a number", labelled([0.5, 1, -2])),
    "texts that cannot be padded": ("without padding", labelled([0, 1, 1])),
    "tags": ("tagger", TAGS),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_indexed_is_its_own_strongest_proponent(case, index, tmp_path):
    kind, records = GOOD[case]
    assert index(kind, records) == 0
    found = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    scores = found.scores(records)
    assert (scores.diagonal() > 0).all()
    if case == "prompts with completions":
        assert found.config["metadata"]["encoding"]["masks"] == ["completion"]
    if "source" in records[0]:
        assert set(found.domain_influence(records, "source")["domain"]) == {"w1", "w4", "w5"}


CHATS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in (("w1 w2", "w3"), ("w4 w5", "w6 w7"), ("w1 w8", "w9"))
]


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_the_hits_of_an_index_of_chats_have_texts_to_read_and_to_find_words_in(form, index, tmp_path):
    whole = form == "messages"
    records = [{"messages": chat} if whole else {"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS]
    assert index("chats", records) == 0
    found = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    texts = ["\n".join(turn["content"] for turn in chat) for chat in CHATS]
    assert list(found.examples["text"]) == texts
    first = found.search(records[1:2])[0]
    assert (first["example_id"], first["text"]) == (1, texts[1])
    assert found.scores(records[1:2], scorer="bm25").argmax() == 1
    place = ("--output_dir", str(tmp_path / "index"))
    assert index("chats", records, *place) == 0  # the same again
    more = [{name: chat[::-1] if len(chat) == 1 else chat for name, chat in records[0].items()}]
    assert index("chats", [*records, *more], *place, "--add_examples") == 0
    grown = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    assert list(grown.examples["text"]) == [*texts, texts[0]]


def test_chats_in_parts_beside_empty_columns_and_texts_of_other_kinds_are_read(index, tmp_path):
    parts = [{"type": "text", "text": "w1 "}, {"type": "image"}, {"type": "text", "text": "w2"}]
    records = [
        {"messages": None, "prompt": chat[:1], "completion": chat[1:], "text": text}
        for chat, text in zip(CHATS, ["its own", 3, None], strict=True)
    ]
    assert index("chats", records) == 0
    found = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    assert list(found.examples["text"]) == ["\n".join(turn["content"] for turn in chat) for chat in CHATS]
    assert found.config["metadata"]["encoding"]["masks"] == ["completion"]
    assert readable({"messages": [{"role": "user", "content": parts}, {"content": None}]}, ("messages",)) == "w1 w2\n"


def test_messages_and_prompts_with_completions_in_one_file_have_their_texts_each(index, tmp_path):
    assert index("chats", [{"messages": CHATS[0]}, {"prompt": CHATS[1][:1], "completion": CHATS[1][1:]}]) == 0
    found = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    assert list(found.examples["text"]) == ["\n".join(turn["content"] for turn in chat) for chat in CHATS[:2]]


def test_an_index_of_chats_that_was_begun_without_texts_grows_without_them(index, tmp_path, monkeypatch):
    records = [{"messages": chat} for chat in CHATS]
    place = ("--output_dir", str(tmp_path / "index"))
    with monkeypatch.context() as older:
        older.setattr(index_data, "readable", lambda row, kind: None)
        older.setattr(index_data, "_dataset", lambda rows, args: Dataset.from_list(rows).remove_columns("text"))
        assert index("chats", records[:2], *place) == 0
    assert index("chats", records[:2], *place) == 0
    assert index("chats", records, *place, "--add_examples") == 0
    found = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    assert len(found) == 3
    assert "text" not in found.examples.column_names


def test_an_older_index_of_prompts_and_completions_is_continued_as_it_was_begun(index, tmp_path, capsys):
    as_begun = ("--output_dir", str(tmp_path / "index"), "--text_field", "prompt", "completion")
    assert index("language model", PAIRS, *as_begun) == 0
    path = tmp_path / "index" / "config.json"
    config = json.loads(path.read_text())
    config["metadata"].pop("encoding", None)  # which 27c6364 did not write
    path.write_text(json.dumps(config))
    for grows in ((), ("--add_examples",)):
        assert index("language model", PAIRS, *as_begun[:2], *grows) == 2
        assert "Pass `--text_field prompt completion` to continue it as it was begun" in capsys.readouterr().err
    assert index("language model", PAIRS, *as_begun) == 0


BAD = {
    "masked": ([{"text": "w1"}], "holds a `BertForMaskedLM`. Give records with `input_ids`"),
    "tagger": ([{"text": "w1"}], "holds a `BertForTokenClassification`. Give records with"),
    "answers": ([{"text": "w1"}], "holds a `BertForQuestionAnswering`. Give records with"),
    "text to text": (labelled([1, 2, 3]), "line 1 of .* has 1"),
    "two classes": (labelled([0, 2, 1]), "from 0 to 1 or names that the model knows.* line 2 of .* has 2"),
    "true or false": (labelled(["no", "yes", "no"]), r"\['false', 'true'\], but line 1 of .* has 'no'"),
    "several classes": (labelled([[1, 0], [0, 1], [1, 1]]), r"must be 3 number.* line 1 of .* has \[1, 0\]"),
    "a number": (labelled(["much", 1, 2]), "must be 1 number.* line 1 of .* has 'much'"),
    "language model": ([{"input_ids": [5, 6, 7], "labels": [5, 6]}], "as many as its 3 tokens, but there are 2"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_indexed_is_told_in_words(kind, index, capsys):
    records, message = BAD[kind]
    assert index(kind, records) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    with pytest.raises(ValueError, match=message):
        raise ValueError(told.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "records", "message"),
    [
        ("tagger", [{"input_ids": [5, 6], "labels": [0, 3]}], "must be from 0 to 2, or -100, but hold 3"),
        ("language model", [{"input_ids": [5, 6], "labels": [5, 99]}], "must be from 0 to 31, or -100, but hold 99"),
        ("language model", [{"messages": []}], "lists of messages with `role` and `content`"),
        ("language model", [{"messages": [{"role": "user", "content": "w1"}]}], "chat template of the training"),
        ("language model", [{"prompt": "w1", "completion": "w2"}, {"text": "w1"}], "line 2 of"),
        ("language model", [{"input_ids": "w1"}], "whole numbers under `input_ids`"),
    ],
)
def test_a_record_that_cannot_be_indexed_is_named(kind, records, message, index, capsys):
    assert index(kind, records) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "query", "message"),
    [
        ("language model", {"text": "w1 w2", "label": 1}, "one whole number for each token of a `LlamaForCausalLM`"),
        ("language model", {"input_ids": [5, 6, 7], "labels": [5, 6]}, "as many as its 3 tokens, but there are 2"),
        ("language model", {"input_ids": [5, 6], "labels": [5, 32]}, "from 0 to 31, or -100, but hold 32"),
        ("tagger", {"input_ids": [5, 6], "labels": [0, 3]}, "from 0 to 2, or -100, but hold 3"),
        ("several classes", {"text": "w1", "label": 1}, "be 3 numbers"),
        ("two classes", {"text": "w1", "label": [0, 1]}, "must be a whole number from 0 to 1"),
        ("two classes", {"text": "w1", "label": "no"}, "one of the model's labels"),
    ],
)
def test_a_query_with_labels_of_another_kind_is_refused(kind, query, message, index, tmp_path):
    records = next(records for one, records in GOOD.values() if one == kind)
    assert index(kind, records) == 0
    with pytest.raises(ValueError, match=message):
        InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps").scores([query])


def test_a_tokenizer_without_padding_is_padded_for(checkpoints, index, tmp_path):
    folder = checkpoints / "no-padding"
    tiny_llama().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    records = [{"text": text} for text in TEXTS]
    assert index("no-padding", records) == 0
    found = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps").scores(records)
    assert index("language model", records, "--output_dir", str(tmp_path / "padded")) == 0
    padded = InfluenceIndex.from_pretrained(tmp_path / "padded", cache_dir=tmp_path / "maps")
    assert found == pytest.approx(padded.scores(records), rel=1e-3, abs=1e-9)


def test_a_model_of_fewer_tokens_than_its_tokenizer_is_told(checkpoints, index, tmp_path, capsys):
    model = tiny_llama()
    model.resize_token_embeddings(20)
    model.save_pretrained(checkpoints / "small")
    tiny_tokenizer().save_pretrained(checkpoints / "small")
    assert index("small", [{"text": "w1 w27"}]) == 2
    assert (
        "must have tokens from 0 to 19, the rows of the embedding matrix, but has 5 to 31" in capsys.readouterr().err
    )
    assert index("small", [{"text": "w1 w2"}]) == 0
    found = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "maps")
    with pytest.raises(ValueError, match="makes token 31 of query 1, but the model has embeddings for 20 tokens only"):
        found.scores(["w1", "w27"])
    with pytest.raises(ValueError, match=r"embedding for each of the tokenizer's 32 entries, but that of .* has 20"):
        make_model(str(checkpoints / "small"), None, tiny_tokenizer())


@pytest.mark.parametrize(
    ("later", "named"),
    [
        ({"text": "w4", "text_pair": "w5"}, "in the fields of the first, ['text'], but line 3"),
        ({"text": "w4", "prompt": "w5"}, "Line 3 of"),
    ],
)
def test_a_record_with_more_texts_than_the_first_is_refused_by_its_line(index, capsys, later, named):
    records = [{"text": "w1 w2", "title": "w3"}, {"text": "w3 w1"}, later]
    assert index("language model", records) == 2
    assert named in capsys.readouterr().err
    assert index("language model", records[:2]) == 0
