import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from hf_doge.tracing.hits import add_example_columns
from hf_doge.tracing.html import example_reading, query_reading
from hf_doge.tracing.scoring import select_extremes
from hf_doge.tracing.words import Reading, position_parts, read_ids, read_text, word_parts
from tests.tracing.influence_tools import byte_level_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer

TEXT = "The runner, don't çafé! 日本 😀 हिन्दी winning The"
CORPUS = ["The runner was running, don't stop! winning team Ünïcode çafé 日本語 हिन्दी भाषा 😀 مرحبا"] * 4
TOKENIZERS = {
    "byte-level BPE": lambda: byte_level_tokenizer(CORPUS, vocab_size=290),
    "WordPiece": lambda: wordpiece_tokenizer(CORPUS, vocab_size=75),
    "SentencePiece": lambda: sentencepiece_tokenizer(CORPUS),
    "SentencePiece without words": lambda: sentencepiece_tokenizer(CORPUS, pre_tokenized=False),
}


@pytest.fixture(params=list(TOKENIZERS), scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


def words_of(reading):
    return [reading.word(group) for group in reading.groups]


def parts_of(token_ids, seed=0):
    generator = np.random.default_rng(seed)
    return {token: float(generator.normal()) for token in set(token_ids)}


# Words


def test_pieces_are_joined_into_words_of_the_text(tokenizer):
    words = words_of(read_text(tokenizer, [TEXT]))
    joined = " ".join(words)
    for word in ("çafé", "winning", "runner", "हिन्दी"):
        assert any(word in found for found in words), words
    for character in TEXT.replace(" ", ""):
        assert character in joined
    assert not any("\N{REPLACEMENT CHARACTER}" in word for word in words)


def test_every_position_is_in_one_word(tokenizer):
    for reading in (
        read_text(tokenizer, [TEXT]),
        read_text(tokenizer, [TEXT, "the team"]),
        read_ids(tokenizer, tokenizer(TEXT)["input_ids"]),
    ):
        positions = [position for group in reading.groups for position in group]
        assert positions == list(range(len(reading.token_ids)))


def test_parts_of_words_add_up_to_those_of_tokens(tokenizer):
    reading = read_text(tokenizer, [TEXT])
    parts = parts_of(reading.token_ids)
    words, scores = word_parts(reading, parts, tokenizer=tokenizer)
    assert len(set(words)) == len(words)
    assert sum(scores) == pytest.approx(sum(parts.values()))
    assert [abs(score) for score in scores] == sorted((abs(score) for score in scores), reverse=True)
    sizes = {token: parts[token] / reading.token_ids.count(token) for token in parts}
    for group, part in position_parts(reading, parts):
        assert part == pytest.approx(sum(sizes[reading.token_ids[position]] for position in group))


def test_a_pair_reads_as_two_texts(tokenizer):
    reading = read_text(tokenizer, ["The runner", "stop"])
    assert reading.text == "The runner\nstop"
    assert "stop" in words_of(reading)


def test_a_token_that_repeats_shares_its_part_equally():
    tokenizer = wordpiece_tokenizer(["a b c"], vocab_size=20)
    reading = read_text(tokenizer, ["a b a"])
    (token,) = {reading.token_ids[1]}
    assert [part for _, part in position_parts(reading, {token: 3.0})] == [1.5, 1.5]
    assert word_parts(reading, {token: 3.0}) == (["a"], [3.0])


def test_ids_alone_read_as_their_text(tokenizer):
    ids = tokenizer("The runner, winning")["input_ids"]
    words = [word.lower() for word in words_of(read_ids(tokenizer, ids)) if word not in tokenizer.all_special_tokens]
    assert "".join(words).replace(" ", "") == "therunner,winning"


def test_without_a_tokenizer_tokens_are_words():
    reading = read_ids(None, [5, 7, 5])
    assert words_of(reading) == ["#5", "#7", "#5"]
    assert word_parts(reading, {5: -2.0, 9: 1.0}) == (["#5", "#9"], [-2.0, 1.0])


def test_text_is_cut_as_the_model_reads_it(tokenizer):
    assert len(read_text(tokenizer, [TEXT], max_length=6).token_ids) == 6


def test_tokens_that_the_text_does_not_hold_are_words_of_their_own():
    tokenizer = wordpiece_tokenizer()
    reading = read_text(tokenizer, ["goal"])
    team = tokenizer("team", add_special_tokens=False)["input_ids"][0]
    words, scores = word_parts(reading, {team: 2.0}, tokenizer=tokenizer)
    assert words == tokenizer.convert_ids_to_tokens([team])
    assert scores == [2.0]


def test_a_slow_tokenizer_is_read_by_what_it_decodes():
    class Slow:
        is_fast = False

        def __call__(self, text, **kwargs):
            return {"input_ids": [1, 2, 3]}

        def decode(self, ids, **kwargs):
            return "".join(["new", " moo", "n"][i - 1] for i in ids)

        def convert_ids_to_tokens(self, ids):
            return [str(i) for i in ids]

    assert words_of(read_text(Slow(), ["new moon"])) == ["new", "moon"]


# Which examples


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_extremes_are_those_of_a_full_sort(top_k):
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(-3, 4, size=30).astype(np.float32)  # with ties and zeros
        positive = sorted((i for i in range(30) if scores[i] > 0), key=lambda i: (-scores[i], i))[:top_k]
        negative = sorted((i for i in range(30) if scores[i] < 0), key=lambda i: (scores[i], i))[:top_k]
        assert select_extremes(scores, top_k).tolist() == positive + negative


def test_examples_stand_next_to_their_rows_whatever_their_columns_are_called():
    examples = Dataset.from_dict(
        {"example_id": [0, 1], "content_hash": ["a", "b"], "text": ["x", "y"], "score": [7, 8], "label": [0, 1]}
    )
    examples = examples.cast_column("label", ClassLabel(names=["no", "yes"]))
    rows = add_example_columns(
        Dataset.from_dict({"example_id": [1, 0, 1], "score": [0.5, 0.25, 0.125]}), examples.select([1, 0, 1])
    )
    assert rows["text"][:] == ["y", "x", "y"]
    assert rows["example_score"][:] == [8, 7, 8]
    assert rows["score"][:] == [0.5, 0.25, 0.125]
    assert rows.features["label"].names == ["no", "yes"]
    assert "content_hash" not in rows.column_names


def test_columns_of_examples_get_a_free_name():
    columns = {"score": [7], "example_score": ["a"], "example_example_score": ["b"], "rank": [3]}
    examples = Dataset.from_dict({"example_id": [0], **columns})
    rows = add_example_columns(
        Dataset.from_dict({"example_id": [0], "score": [0.5], "rank": [1]}), examples.select([0])
    )
    expected = {"example_id": 0, "score": 0.5, "rank": 1, "example_score": "a", "example_example_score": "b"}
    assert rows[0] == {**expected, "example_example_example_score": 7, "example_rank": 3}


def test_readings_of_hits_keep_the_spelling(tokenizer):
    for texts in (["The Runner"], ["The Runner", "stop"]):
        reading = read_text(tokenizer, texts)
        hit = {"query_text": reading.text, "query_token_ids": reading.token_ids}
        assert query_reading(hit, tokenizer) == reading
    assert query_reading({"query_text": "?", "query_token_ids": [3, 3]}, tokenizer).token_ids == [3, 3]
    assert example_reading({"text": "The Runner"}, tokenizer, ["text"]).text == "The Runner"
    assert example_reading({"text": "The Runner"}, None, ["text"]) == Reading("The Runner", [], [], [])
    assert example_reading({"input_ids": [3, 3]}, tokenizer, []).token_ids == [3, 3]
    assert example_reading({"domain": "code"}, tokenizer, []) is None
