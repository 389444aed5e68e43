"""Prompts with completions, and chats, asked of what trl's SFTTrainer was recorded training: scored as it trains on them."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import default_data_collator
from trl import SFTConfig, SFTTrainer

from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.tracing.batches import SequentialBatches
from hf_doge.tracing.recording import encoding_of
from tests.tiny import tiny_tokenizer
from tests.tracing.influence_tools import byte_level_tokenizer, language_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|endoftext|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["match", "goal", "team", "runner", "winning", "stadium", "coach", "cup"]
PAIRS = [
    {"prompt": f"Who saw the {WORDS[i]}?", "completion": f" The {WORDS[i * 3 % 8]} {WORDS[(i * 7 + 1) % 8]}."}
    for i in range(6)
]
CHATS = [
    [
        {"role": "user", "content": pair["prompt"]},
        {"role": "assistant", "content": pair["completion"]},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It won."},
    ]
    for pair in PAIRS
]
MESSAGES = [{"messages": chat} for chat in CHATS]
CHAT_PAIRS = [{"prompt": chat[:1], "completion": chat[1:2]} for chat in CHATS]
TEXTS = [{"text": pair["prompt"] + pair["completion"]} for pair in PAIRS]

FORMS = {
    "completion": (PAIRS, {}),
    "completion, not masked": (PAIRS, {"completion_only_loss": False}),
    "completion, cut from the start": (PAIRS, {"max_length": 14, "truncation_mode": "keep_end"}),
    "chat": (MESSAGES, {}),
    "chat, assistant alone": (MESSAGES, {"assistant_only_loss": True}),
    "chat, completion": (CHAT_PAIRS, {}),
    "chat, completion and assistant": (CHAT_PAIRS, {"assistant_only_loss": True}),
    "text": (TEXTS, {}),
    "text, cut": (TEXTS, {"max_length": 14}),
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def record(folder, tokenizer, rows, **options):
    defaults = {"max_steps": 1, "save_steps": 1, "max_length": 60, "use_cpu": True, "bf16": False, "report_to": []}
    quiet = {"disable_tqdm": True, "logging_strategy": "no"}
    trainer = SFTTrainer(
        language_model(tokenizer),
        SFTConfig(str(folder / "run"), **{**defaults, **quiet, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[TracInWECallback(folder / "index", dtype="float32")],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("form", FORMS)
def test_a_query_is_scored_as_the_trainer_trains_on_it(form, tmp_path, tokenizer):
    rows, options = FORMS[form]
    if not all(hasattr(SFTConfig, name) for name in options):
        pytest.skip(f"trl 0.26 has none of {list(options)}")
    trainer = record(tmp_path, tokenizer, rows, **options)
    index = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path)
    if sum(1 - kept for kept in trainer.train_dataset[0].get("completion_mask", [])) == 2:
        pytest.skip(
            "trl 0.26 takes a prompt of messages for two tokens, as transformers 5 returns a dictionary of two"
        )
    columns = {"input_ids", "labels", "completion_mask", "assistant_masks"} & set(trainer.train_dataset.column_names)
    trained = [trainer.data_collator([row]) for row in trainer.train_dataset.select_columns(sorted(columns))]
    expected = index.scores([{"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]} for batch in trained])
    found = index.scores(rows)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert np.abs(np.diag(found)).min() > 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("completions")
    record(folder, tokenizer, PAIRS)
    return folder / "index"


def test_the_user_may_say_what_is_masked(recorded, tmp_path):
    asked = {masking: InfluenceIndex.from_pretrained(recorded, cache_dir=tmp_path, masking=masking).scores(PAIRS)
             for masking in (None, "completion", "none")}  # fmt: skip
    assert (asked[None] == asked["completion"]).all()
    assert not np.allclose(asked[None], asked["none"], rtol=0.01)
    with pytest.raises(ValueError, match="`masking` must be one of"):
        InfluenceIndex.from_pretrained(recorded, cache_dir=tmp_path, masking="prompt")


def test_texts_and_dialogues_may_be_asked_together(recorded, tmp_path):
    index = InfluenceIndex.from_pretrained(recorded, cache_dir=tmp_path)
    asked = [PAIRS[0], "Who saw the cup?", PAIRS[1], CHAT_PAIRS[2]]
    together = index.scores(asked)
    alone = np.concatenate([index.scores([one]) for one in asked])
    assert np.allclose(together, alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (MESSAGES[0], "do not tell what the completion is"),
        ({"messages": "Who?"}, "must be a list of messages"),
        ({"messages": []}, "lists of messages with `role` and `content`"),
        ({"messages": [{"text": "Who?"}]}, "lists of messages with `role` and `content`"),
        ({"prompt": "Who?", "completion": CHATS[0]}, "two texts, or lists of messages"),
        ({"prompt": "Who saw it?", "completion": [{"role": "assistant", "content": ""}]}, "two texts, or lists"),
        ({"prompt": "Who saw the " + "cup " * 60, "completion": "He."}, "lies beyond the 60 tokens"),
    ],
)
def test_a_dialogue_that_cannot_be_scored_is_refused_in_words(recorded, tmp_path, query, message):
    with pytest.raises(ValueError, match=message):
        InfluenceIndex.from_pretrained(recorded, cache_dir=tmp_path).scores([query])


def test_what_the_index_does_not_know_is_asked_of_the_user(recorded, tmp_path, tokenizer):
    index = InfluenceIndex.from_pretrained(recorded, cache_dir=tmp_path)
    del index.config["metadata"]["encoding"]  # as an older index
    older = InfluenceIndex(index.reader)
    with pytest.raises(ValueError, match=r"the index does not tell how\. Pass `masking=`"):
        older.scores(PAIRS)
    plain = byte_level_tokenizer()
    with pytest.raises(ValueError, match=r"the tokenizer has none\. Set its `chat_template`"):
        InfluenceIndex(index.reader, processing_class=plain, masking="none").scores(MESSAGES)
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template marks none"):
        InfluenceIndex(index.reader, processing_class=plain, masking="assistant").scores(MESSAGES)


def test_how_examples_were_masked_is_known_where_few_of_them_are():
    """One of 600, none of the first thirty-two that are evenly spaced."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(600)]
    rows[300]["labels"] = [-100, -100, 7, 8]
    batches = SequentialBatches(rows, default_data_collator, batch_size=8)
    assert encoding_of(batches, tiny_tokenizer())["encoding"]["masks"] == ["completion"]
