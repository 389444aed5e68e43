"""Which tokens of a query a `target` keeps: the answer's own, or none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import GenerationConfig

from hf_doge.gradients.example_losses import IGNORE_INDEX
from hf_doge.tracing.answers import keep_targets, make_prompt, say_next
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.limits import ModelInputs
from hf_doge.tracing.queries import Query, check_queries
from hf_doge.tracing.query_rows import _make_query
from hf_doge.tracing.targets import targets_of
from hf_doge.tracing.words import read_ids
from tests.tracing.influence_tools import byte_level_tokenizer, language_model

TEMPLATE = (
    "{% if tools %}TOOLS{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if quiet %}<quiet>{% endif %}{% endif %}"
)
PLAIN = Encoding(masks=())
USER = {"role": "user", "content": "Which goal?"}


def chat(content):
    return {"messages": [USER, {"role": "assistant", "content": content}]}


@pytest.fixture(scope="module")
def tokenizer():
    return templated(TEMPLATE)


@pytest.fixture
def model(tokenizer):
    return language_model(tokenizer).eval()


def templated(template, normalizer=None):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def kept(record, target, tokenizer, model, encoding=PLAIN):
    """The query, and the places of the tokens that it keeps."""
    inputs = ModelInputs.of(model, tokenizer)
    (record,) = check_queries([record], tokenizer, vocabulary_size=len(tokenizer))
    query = _make_query(record, model, inputs, tokenizer, encoding)
    query.features.setdefault("labels", query.features["input_ids"].clone())
    asked = (model, inputs, tokenizer, encoding)
    keep_targets([query], [target], [record], asked=asked, first_position=3)
    return query, (query.features["labels"] != IGNORE_INDEX).nonzero().flatten().tolist()


@pytest.mark.parametrize("target", ["end", (0, 3)])
def test_a_target_is_never_the_marker_of_the_template(tokenizer, model, target):
    _, found = kept(chat("end"), target, tokenizer, model)
    begin = len(tokenizer(f"<user>{USER['content']}<|end|><assistant>")["input_ids"])
    assert found == list(range(begin, begin + len(tokenizer("end")["input_ids"])))


@pytest.mark.parametrize("record", [{"prompt": "Tell me ", "completion": "text"}, {"text": "Tell text"}])
def test_a_target_is_never_the_end_of_text(tokenizer, model, record):
    query, found = kept(record, "text", tokenizer, model, replace(PLAIN, ends=True))
    ids = query.features["input_ids"]
    assert int(ids[-1]) == tokenizer.eos_token_id
    assert len(ids) - 1 not in found
    assert tokenizer.decode(ids[found]).strip() == "text"


STRIPPING = TEMPLATE.replace("m['content'] }}", "m['content'].strip() }}")
THOUGHTLESS = TEMPLATE.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
LONG = {"prompt": "yes or no, they said to the old new man. ", "completion": "yes"}


@pytest.mark.parametrize(
    ("record", "target", "template", "normalizer", "max_length"),
    [
        (LONG, "yes", TEMPLATE, None, 12),
        (LONG, (0, 3), TEMPLATE, None, 12),
        ({"text": "cup moon the long star cup"}, "cup", TEMPLATE, None, 8),
        (chat(None), "goal", TEMPLATE, None, None),
        (chat([{"type": "text", "text": "The cup"}]), "goal", TEMPLATE, None, None),
        (chat("The cup"), "goal", TEMPLATE, None, None),
        (chat("<think>goal</think>yes"), "goal", THOUGHTLESS, None, None),
        (chat("  The cup"), (0, 2), STRIPPING, None, None),
        ({"prompt": "The Cup? ", "completion": "A Cup"}, "Cup", TEMPLATE, normalizers.Lowercase(), None),
    ],
)
def test_an_answer_that_is_not_in_the_tokens_is_refused(model, record, target, template, normalizer, max_length):
    encoding = replace(PLAIN, max_length=max_length, truncation="keep_start")
    with pytest.raises(ValueError, match=r"`target` must .* of query 3"):
        kept(record, target, templated(template, normalizer), model, encoding)


def test_what_a_template_leaves_of_an_answer_is_found(model):
    query, found = kept(chat("  The cup"), (2, 5), templated(STRIPPING), model)
    assert query.target == "The"
    assert torch.equal(query.features["labels"][found], query.features["input_ids"][found])


def test_a_target_is_never_the_end_of_what_the_model_says(tokenizer, model):
    begin, said = (tokenizer(text)["input_ids"] for text in ("Tell", " text<|endoftext|>"))
    ids = torch.tensor([*begin, *said])
    labels = torch.tensor([IGNORE_INDEX] * len(begin) + said)
    query = Query({"input_ids": ids, "labels": labels}, read_ids(tokenizer, ids.tolist()), target=" text<|endoftext|>")
    asked = (model, ModelInputs.of(model, tokenizer), tokenizer, PLAIN)
    keep_targets([query], ["text"], [{"text": "Tell"}], asked=asked, first_position=0)
    assert query.features["labels"].tolist() == [IGNORE_INDEX] * len(begin) + said[:-1] + [IGNORE_INDEX]


# What the model says next


def next_of(record, tokenizer, model, num_tokens=4):
    """The query with what the model says."""
    inputs = ModelInputs.of(model, tokenizer)
    (record,) = check_queries([record], tokenizer, vocabulary_size=len(tokenizer), continued=True)
    query = make_prompt(record, tokenizer, PLAIN, model, 3)
    say_next(query, num_tokens, model, inputs, tokenizer, 3)
    return query


def said_by(tokenizer, model, **settings):
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    found = next_of("The stocks", tokenizer, model).features["input_ids"].tolist()
    assert model.generation_config is own
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"token_healing": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2},
        {"max_length": 3},
        {"max_time": 1e-9},
    ],
)
def test_the_likeliest_token_is_said_whatever_the_model_is_set_to(tokenizer, model, settings):
    expected = tokenizer("The stocks")["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    first = expected[-4]
    assert tokenizer.eos_token_id not in expected
    for more in ({}, {"suppress_tokens": [first]}):
        assert said_by(tokenizer, model, **settings, **more) == expected
    assert said_by(tokenizer, model, **settings, eos_token_id=[first]) == expected[:-3]
    assert said_by(tokenizer, model, **settings, eos_token_id=50256) == expected  # of a vocabulary that was cut


@pytest.mark.parametrize("end", ["x", [1.5], True, {"a": 1}])
def test_an_end_of_text_that_is_no_token_is_refused(tokenizer, model, end):
    with pytest.raises(ValueError, match="`eos_token_id` of the model's generation_config must be"):
        said_by(tokenizer, model, eos_token_id=end)


def test_a_prompt_has_the_tools_and_arguments_of_its_template(tokenizer, model):
    more = {"tools": [{"type": "function"}], "chat_template_kwargs": {"quiet": True}}
    for name in ("messages", "prompt"):
        query = next_of({name: [USER], **more}, tokenizer, model, 1)
        expected = tokenizer(f"TOOLS<user>{USER['content']}<|end|><assistant><quiet>")["input_ids"]
        assert query.features["input_ids"].tolist()[:-1] == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "hi", "text": "the cup"}, "query 3 has both `prompt` and `text`"),
        ({"prompt": chat("The team")["messages"]}, "query 3 has its answer in `prompt`"),
    ],
)
def test_what_is_no_prompt_alone_is_refused(tokenizer, model, record, message):
    with pytest.raises(ValueError, match=message):
        next_of(record, tokenizer, model)


@pytest.mark.parametrize("rest", [{"prompt": "The", "completion": None}, {"text": "The", "messages": None}])
def test_an_answer_that_is_none_is_none(tokenizer, model, rest):
    said = [next_of(record, tokenizer, model).features["input_ids"].tolist() for record in (rest, {"text": "The"})]
    assert said[0] == said[1]
    with pytest.raises(ValueError, match="Query 0 must"):
        kept({"prompt": "The", "completion": None}, "The", tokenizer, model)


def test_a_text_next_to_messages_that_are_none_is_a_text(tokenizer, model):
    query, _ = kept({"text": "The cup", "messages": None}, "cup", tokenizer, model)
    assert query.features["input_ids"].tolist() == tokenizer("The cup")["input_ids"]


@pytest.mark.parametrize(
    "target", [(np.int64(0), np.int64(3)), np.array([0, 3]), torch.tensor([0, 3]), [(np.int32(0), 3)]]
)
def test_a_span_may_be_numbers_of_numpy(target):
    assert targets_of(target, 1) == [(0, 3)]


@pytest.mark.parametrize(
    "target", [np.array([0.5, 3]), np.array([True, True]), np.arange(3), np.array(["all"]), [0, 3]]
)
def test_what_is_no_target_is_refused(target):
    with pytest.raises(ValueError, match="`target` must be"):
        targets_of(target, 1)
