"""Several writers of one checkpoint, each with other ranges of examples: the files of one writer, in whatever order."""

import json
import random

import numpy as np
import pytest
import torch

from hf_doge.artifacts.influence import IndexReader, IndexWriter
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.opening import expected_rows, plan_borders
from hf_doge.tracing.recording import share_ranges
from hf_doge.tracing.settings import RecordingSettings
from tests.artifacts.influence_rows import (
    FACTS,
    NUM_EXAMPLES,
    WIDTH,
    batches,
    open_writer,
    publish,
    random_rows,
    write_checkpoint,
)

BORDERS = [2, 9, 20, 23, 31]
BYTES = 2000


def without_rows(rows, *ranges):
    """The same examples, but those of some ranges have no row."""
    parts = [rows.between(example, example + 1) for example in range(len(rows))]
    empty = {example for first, last in ranges for example in range(first, last)}
    parts = [part.between(0, 0) if example in empty else part for example, part in enumerate(parts)]
    lengths = torch.tensor([len(part.tokens) for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens, values = torch.cat([part.tokens for part in parts]), torch.cat([part.rows for part in parts])
    return TokenRows(offsets, tokens, values, False)


ROWS = {
    "rows": random_rows(NUM_EXAMPLES),
    "some without": without_rows(random_rows(NUM_EXAMPLES), (0, 3), (20, 23), (25, NUM_EXAMPLES)),
    "none": without_rows(random_rows(NUM_EXAMPLES), (0, NUM_EXAMPLES)),
}


def add(writer, rows, first, last):
    writer.begin(first, last)
    for batch in batches(rows.between(first, last), 4):
        writer.add(batch)


def begin(folder):
    return open_writer(folder).checkpoint("checkpoint-1", step=1, **FACTS, borders=BORDERS)


def part(folder, checkpoint, number):
    writer = IndexWriter.join(folder, max_segment_bytes=BYTES)
    return writer.checkpoint_part(json.loads(json.dumps(checkpoint.facts)), part=number, borders=BORDERS)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", params=list(ROWS))
def whole(request, tmp_path_factory):
    """Rows, and the index of them that one writer makes in one go."""
    folder, rows = tmp_path_factory.mktemp("whole"), ROWS[request.param]
    with begin(folder / "index") as checkpoint:
        add(checkpoint, rows, 0, NUM_EXAMPLES)
        publish(checkpoint)
    return rows, folder / "index"


@pytest.mark.parametrize("seed", range(4))
def test_any_writers_in_any_order_make_the_same_files(tmp_path, whole, seed):
    rows, expected = whole
    draw = random.Random(seed)
    with begin(tmp_path / "index") as checkpoint:
        parts = [checkpoint, *(part(tmp_path / "index", checkpoint, number) for number in (1, 2))]
        ranges = checkpoint.missing()
        assert [first for first, _ in ranges] == [0, *BORDERS]
        draw.shuffle(ranges)
        for first, last in ranges:
            add(draw.choice(parts), rows, first, last)
        publish(checkpoint)
    assert contents(tmp_path / "index") == contents(expected)


@pytest.mark.parametrize("seed", range(4))
def test_what_some_writers_left_others_finish(tmp_path, whole, seed):
    rows, expected = whole
    draw = random.Random(seed)
    with begin(tmp_path / "index") as checkpoint:
        parts = [checkpoint, *(part(tmp_path / "index", checkpoint, number) for number in (1, 2))]
        for first, last in draw.sample(checkpoint.missing(), 3):
            writer = draw.choice(parts)
            if not writer._num_buffered:
                add(writer, rows, first, draw.choice([last, max(first + 1, last - 2)]))
    (tmp_path / "index" / "gradients" / "checkpoint-1.partial" / "segment-99.parquet").write_bytes(b"half")
    with begin(tmp_path / "index") as checkpoint:
        other = part(tmp_path / "index", checkpoint, 1)
        for number, (first, last) in enumerate(checkpoint.missing()):
            add((checkpoint, other)[number % 2], rows, first, last)
        publish(checkpoint)
    found, whole_reader = (
        IndexReader.open(place, cache_dir=tmp_path / "maps") for place in (tmp_path / "index", expected)
    )
    everything = range(NUM_EXAMPLES)
    pairs = zip(found.example_rows(0, everything), whole_reader.example_rows(0, everything), strict=True)
    for (tokens, values), (other_tokens, other_values) in pairs:
        assert torch.equal(tokens, other_tokens)
        assert torch.allclose(values, other_values, rtol=1e-3, atol=1e-9)


def test_a_file_of_another_writer_that_is_damaged_is_not_published(tmp_path):
    rows = ROWS["rows"]
    with begin(tmp_path / "index") as checkpoint:
        other = part(tmp_path / "index", checkpoint, 1)
        add(checkpoint, rows, 0, 20)
        add(other, rows, 20, NUM_EXAMPLES)
        path = max((tmp_path / "index" / "gradients" / "checkpoint-1.partial").glob("*.parquet"))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"must hold all 40 examples, but \d+ were added"):
            publish(checkpoint)
    assert not (tmp_path / "index" / "gradients" / "checkpoint-1").exists()
    with begin(tmp_path / "index") as checkpoint:
        ((first, last),) = checkpoint.missing()
        assert first >= 31
        add(checkpoint, rows, first, last)
        publish(checkpoint)


def test_ranges_that_cannot_be_are_refused(tmp_path):
    with begin(tmp_path / "index") as checkpoint:
        with pytest.raises(ValueError, match=r"in \[0, 40\) and not be empty, but got \[5, 41\)"):
            checkpoint.begin(5, 41)
        checkpoint.begin(5, 9)
        checkpoint.add(ROWS["rows"].between(5, 6))
        with pytest.raises(ValueError, match="must be added to its end first, example 9"):
            checkpoint.begin(9, 20)
        with pytest.raises(ValueError, match="up to example 9, but 10 were added"):
            checkpoint.add(ROWS["rows"].between(6, 10))


# Planning


def test_planned_borders_are_where_full_segments_end(tmp_path):
    rows = ROWS["rows"]
    writer = open_writer(tmp_path / "index")
    write_checkpoint(writer, rows)
    firsts = [file["first_example"] for file in writer.config["checkpoints"][0]["files"]]
    assert [0, *plan_borders(rows.offsets.diff().numpy(), BYTES // (4 * WIDTH))] == firsts


def test_expected_rows_follow_the_settings():
    counts, words = np.array([3, 12, 7]), {"vocabulary_size": 50, "width": 4}
    assert expected_rows(counts, RecordingSettings(), words).tolist() == [3, 12, 7]
    assert expected_rows(counts, RecordingSettings(top_k_tokens=5), words).tolist() == [3, 5, 5]
    assert expected_rows(counts, RecordingSettings(tied="full"), words).tolist() == [50, 50, 50]
    assert expected_rows(counts, RecordingSettings(tied="own"), words).tolist() == [3, 12, 7]


@pytest.mark.parametrize(("num_ranges", "num_shares"), [(0, 2), (1, 3), (7, 3), (9, 1), (4, 8)])
def test_shares_are_contiguous_even_and_complete(num_ranges, num_shares):
    ranges = [(3 * number, 3 * number + 3) for number in range(num_ranges)]
    shares = share_ranges(ranges, num_shares)
    assert len(shares) == num_shares
    sizes = [sum((last - first) // 3 for first, last in share) for share in shares]
    assert sum(sizes) == num_ranges
    assert max(sizes) - min(sizes) <= 1
    assert all(len(share) <= 1 for share in shares)  # joined
    assert [first for share in shares for first, _ in share] == sorted(first for share in shares for first, _ in share)
    assert share_ranges([(0, 3), (6, 9)], 1) == [[(0, 3), (6, 9)]]  # but not over a gap
