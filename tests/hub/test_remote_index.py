"""An index that stays on the Hub: read in parts, it answers as the whole one does."""

from pathlib import Path

import pytest

from tests.hub import HubServer, last_json, run_client

SCRIPT = Path(__file__).with_name("remote_index_script.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a client with an unmodified huggingface_hub saw."""
    folder = tmp_path_factory.mktemp("remote")
    with HubServer(folder / "hub") as hub:
        return last_json(run_client(hub, SCRIPT, folder / "work", timeout=240))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_remote_numbers_are_the_local_ones_bit_for_bit(seen, dtype):
    assert {what: same for what, same in seen[dtype].items() if not same} == {}
    assert len(seen[dtype]) == 8


def test_a_query_reads_the_rows_of_its_tokens_once(seen):
    reading = seen["reading"]
    assert reading["first"] > 0
    assert reading["first bytes"] < reading["index bytes"] / 4
    assert reading["again"] == reading["another"] == 0
    assert reading["same"]


def test_an_open_index_stays_at_its_commit(seen):
    assert seen["reading"]["keeps its commit"]
    assert seen["reading"]["sees the newer"]


def test_the_place_of_a_file_is_asked_for_once_and_the_token_goes_to_the_hub_alone(seen):
    reading = seen["reading"]
    assert reading["requests to the storage"] > reading["heads"] > 0
    assert reading["tokens to the storage"] == 0


@pytest.mark.parametrize("way", ["503", "429", "cut before", "cut in the body", "address expired"])
def test_a_fault_of_the_storage_is_overcome(seen, way):
    assert seen["faults"][f"{way} hits"] == 1
    assert seen["faults"][way] == "none"


def test_a_storage_that_stays_away_is_told_and_the_same_query_goes_on(seen):
    assert "FetchError: 'gradients/checkpoint-0/segment-" in seen["faults"]["all"]
    assert "HTTP status 503" in seen["faults"]["all"]
    assert seen["faults"]["after all"] == "none"


def test_rows_that_were_lost_from_the_cache_are_read_again(seen):
    assert seen["damaged"]["same"]
    assert seen["damaged"]["read again"]


def test_a_cache_that_was_deleted_under_an_open_index_is_made_again(seen):
    assert seen["damaged"]["deleted"] == "none"
    assert seen["damaged"]["same after that"]


MANIPULATED = {
    "another file": "is not the file that its config.json tells of: its sha256 is [0-9a-f]{64}, not 0{64}",
    "NaN": "gradients/checkpoint-0/segment-00000000.parquet' in 'doge/manipulated' is damaged .* must be finite",
    "example out of range": r"segment-00000000.parquet' .* the examples of a token must ascend within \[0, ",
    "offsets beyond the file": "segment-00000000.parquet' .* but it has ",
    "offsets not ascending": "offsets/checkpoint-0/segment-00000000.parquet' .* `grad_byte` must ascend",
    "tokens not ascending": r"offsets/checkpoint-0/segment-00000000.parquet' .* `token_id` must ascend within \[0, 50\)",
}


@pytest.mark.parametrize("what", MANIPULATED)
def test_a_manipulated_file_is_named(seen, what):
    with pytest.raises(ValueError, match=MANIPULATED[what]):
        raise ValueError(seen["manipulated"][what])


REFUSALS = {
    "int8": "int8 cannot be read in parts.*`streaming=False`",
    "self_influence": "needs all rows of the index, but .* `streaming=True`. Download it",
    "example_rows": "needs all rows of the index",
    "nowhere": "FileNotFoundError: .*no such folder",
    "nothing": "FileNotFoundError: There is no such branch",
    "checkpoint": r"must be in \[0, 2\), but got 2",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_read_in_parts_is_refused(seen, what):
    with pytest.raises(ValueError, match=REFUSALS[what]):
        raise ValueError(seen["refusals"][what])


def test_of_many_examples_only_those_that_are_asked_for_are_fetched(seen):
    many = seen["many examples"]
    for attempt in ("first", "again", "damaged"):
        assert many[attempt]["same"]
        assert many[attempt]["whole"] == 0
    assert 0 < many["first"]["sent"] < many["size"] / 2
    assert many["again"]["sent"] == 0
    assert many["damaged"]["sent"] > 0
    assert many["all"]


def test_several_can_fetch_the_same_examples_at_once(seen):
    assert seen["many examples"]["at once"] == "none"


def test_1_percent_more_examples_upload_about_1_percent_more_bytes(seen):
    first, second = seen["growth"]["sent"]
    assert 0.009 <= second / first <= 0.015
    assert seen["growth"]["finds the new"] == 2010
    assert seen["growth"]["numbers"]


def test_an_index_and_its_models_are_used_from_the_hub(seen):
    journey = seen["journey"]
    assert journey["models at opening"] == 0
    assert journey["whole files"] == []
    assert journey["hits"]
    assert journey["synonyms"]
    assert journey["domains"]
    assert journey["viewer"]
    assert "needs all rows of the index" in journey["viewer's labels"]
    assert journey["a folder"] == "IndexReader"
    for what in ("cosine", "self_influence", "save_pretrained"):
        assert "needs all rows of the index" in journey[what]
    assert "does not go with `local_files_only`" in journey["local_files_only"]
