"""What was fetched of a file in parts is known by its checksum: whatever part is damaged, that part alone is fetched again."""

import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_doge.artifacts.influence.manifest import read_config
from hf_doge.artifacts.influence.remote_examples import RemoteExamples
from hf_doge.artifacts.influence.remote_map import RemoteMap
from hf_doge.files import sha256
from tests.artifacts.influence_rows import random_rows, write_index

NUM_EXAMPLES, GROUP = 12_000, 1000


class LocalFile:
    """What reads a file on the Hub by ranges, of one that is here; remembers what was asked for."""

    repo_id = "doge/index"

    def __init__(self, path):
        self.path, self._content = path.name, path.read_bytes()
        self.size, self.asked = len(self._content), []

    def read(self, start, stop):
        self.asked.append((start, stop))
        return self._content[start:stop]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "train.parquet"
    noise = np.random.default_rng(0).bytes(16 * NUM_EXAMPLES).hex()
    texts = [noise[32 * number : 32 * number + 32] for number in range(NUM_EXAMPLES)]
    pq.write_table(pa.table({"example_id": range(NUM_EXAMPLES), "text": texts}), path, row_group_size=GROUP)
    assert path.stat().st_size > 4 * 2**16
    return path


def open_examples(source, cache_dir):
    file = LocalFile(source)
    return file, RemoteExamples([file], [sha256(source)], cache_dir=cache_dir)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def place_of(source, group):
    """The first and the last byte of a row group."""
    columns = [pq.read_metadata(source).row_group(group).column(number) for number in range(2)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    return min(starts), max(s + column.total_compressed_size for s, column in zip(starts, columns, strict=True)) - 1


@pytest.mark.parametrize("end", [0, 1], ids=["first byte", "last byte"])
def test_a_row_group_of_examples_that_was_damaged_is_fetched_again_and_no_other(tmp_path, source, end):
    ids = [0, 5 * GROUP]
    expected = pq.read_table(source).take(ids)
    open_examples(source, tmp_path)[1].take(ids)
    (kept,) = tmp_path.glob("examples-*.parquet")
    place = place_of(source, 5)
    flip(kept, place[end])
    file, examples = open_examples(source, tmp_path)
    assert examples.take(ids).equals(expected)
    assert file.asked == [(place[0], place[1] + 1)]
    file, examples = open_examples(source, tmp_path)
    assert examples.take(ids).equals(expected)
    assert file.asked == []


@pytest.mark.parametrize("damage", ["end", "cut", "journal", "no journal"])
def test_examples_whose_end_or_journal_was_damaged_are_fetched_again(tmp_path, source, damage):
    open_examples(source, tmp_path)[1].take([0])
    (kept,), (journal,) = tmp_path.glob("examples-*.parquet"), tmp_path.glob("examples-*.json")
    match damage:
        case "end":
            flip(
                kept, kept.read_bytes().find(b"text", source.stat().st_size - 2**14)
            )  # still Parquet, with another name
        case "cut":
            kept.write_bytes(kept.read_bytes()[:-1])
        case "journal":
            journal.write_bytes(journal.read_bytes()[:-20])
        case "no journal":
            journal.unlink()
    file, examples = open_examples(source, tmp_path)
    assert examples.take([0, NUM_EXAMPLES - 1]).equals(pq.read_table(source).take([0, NUM_EXAMPLES - 1]))
    assert file.asked[0][1] == file.size


@pytest.mark.parametrize("name", ["rows", "examples"])
def test_a_token_whose_rows_were_damaged_is_fetched_again_and_no_other(tmp_path, name):
    folder = write_index(tmp_path / "index", random_rows(40), dtype="float32")
    config = read_config(folder)
    files = config["checkpoints"][0]["files"]

    def open_map():
        segments = [LocalFile(folder / file["path"]) for file in files]
        offsets = [folder / file["offsets_path"] for file in files]
        return segments, RemoteMap(config, 0, segments=segments, offsets=offsets, cache_dir=tmp_path / "cache")

    def asked(segments):
        return sum(stop - start for segment in segments for start, stop in segment.asked)

    _, remote = open_map()
    counts = np.diff(remote.row_map.offsets)
    tokens = np.flatnonzero(counts)[[0, 3, 7]]
    remote.fetch(tokens)
    before = {
        token: zlib.crc32(remote.row_map.rows[slice(*remote.row_map.offsets[token : token + 2])]) for token in tokens
    }
    (kept,) = (tmp_path / "cache").glob(f"*-remote/{name}.bin")
    width = {"rows": 4 * config["stored_width"], "examples": 4}[name]
    flip(kept, int(remote.row_map.offsets[tokens[1] + 1]) * width - 1)
    segments, remote = open_map()
    remote.fetch(tokens[[0, 2]])
    assert asked(segments) == 0
    remote.fetch(tokens)
    assert asked(segments) > 0
    rows, offsets = remote.row_map.rows, remote.row_map.offsets
    assert {token: zlib.crc32(rows[slice(*offsets[token : token + 2])]) for token in tokens} == before
