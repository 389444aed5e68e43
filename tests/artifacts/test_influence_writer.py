"""The folder of an influence index: what is written, and what a crash leaves of it."""

import gc
import json
import os
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_doge.artifacts.influence import IndexReader, segments
from hf_doge.gradients.token_rows import TokenRows
from tests.artifacts.influence_rows import (
    FACTS,
    NUM_EXAMPLES,
    VOCABULARY_SIZE,
    WIDTH,
    batches,
    dense_scores,
    examples_table,
    one_example,
    open_writer,
    publish,
    random_rows,
    some,
    write_checkpoint,
    write_index,
)
from tests.forks import Fork
from tests.launch import launch_environment

PARTIAL = "gradients/checkpoint-1.partial"


@pytest.fixture
def rows():
    return random_rows(NUM_EXAMPLES)


def contents(folder):
    """Path inside the folder -> bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def config_of(folder):
    return json.loads((folder / "config.json").read_bytes())


def scores(folder, queries, tmp_path):
    return IndexReader.open(folder, cache_dir=tmp_path / "cache").scores(0, queries)


# What is written


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_load_dataset_opens_every_configuration(tmp_path, rows, dtype, recwarn):
    folder = write_index(tmp_path / "index", rows, random_rows(NUM_EXAMPLES, seed=1), dtype=dtype)
    (folder / "gradients/checkpoint-2.partial").mkdir()
    (folder / "gradients/checkpoint-2.partial/segment-00000.parquet").write_bytes(b"half")
    loaded = {
        name: datasets.load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "datasets"))
        for name in ("gradients", "examples", "checkpoints", *(["offsets"] if dtype != "int8" else []))
    }
    assert loaded["examples"][3] == {"example_id": 3, "text": "text 3"}
    assert loaded["checkpoints"]["name"] == ["checkpoint-0", "checkpoint-1"]
    assert loaded["checkpoints"][1] == {**FACTS, "name": "checkpoint-1", "step": 1, "revision": None}
    gradients = loaded["gradients"].with_format("numpy")
    first = gradients.filter(lambda one: one == 0, input_columns="checkpoint")
    values = first["grad"][:].astype(np.float64)
    if dtype != "float32":
        values = values / first["scale"][:][:, None]
    matrix = np.zeros((NUM_EXAMPLES, VOCABULARY_SIZE, WIDTH))
    matrix[first["example_id"][:], first["token_id"][:]] = values
    matrix = matrix.reshape(NUM_EXAMPLES, -1)
    np.testing.assert_allclose(matrix @ matrix.T, dense_scores(rows, rows), atol=2e-2 * (matrix @ matrix.T).max())


def test_segments_are_sorted_by_token_and_hold_ranges_of_examples(tmp_path, rows):
    folder = write_index(tmp_path / "index", rows)
    files = config_of(folder)["checkpoints"][0]["files"]
    assert len(files) > 3
    assert [file["first_example"] for file in files] == np.cumsum(
        [0] + [file["num_examples"] for file in files[:-1]]
    ).tolist()
    for file in files:
        table = pq.read_table(folder / file["path"], use_threads=False)
        assert table.num_rows == file["num_rows"]
        assert table["example_id"].type == table["token_id"].type == table["checkpoint"].type == pa.int32()
        assert table["grad"].type == pa.list_(pa.float16(), WIDTH)
        keys = table["token_id"].to_numpy().astype(np.int64) * NUM_EXAMPLES + table["example_id"].to_numpy()
        assert (np.diff(keys) > 0).all()
        ids = table["example_id"].to_numpy()
        assert file["first_example"] <= ids.min() <= ids.max() < file["first_example"] + file["num_examples"]
        metadata = pq.read_metadata(folder / file["path"])
        assert json.loads(metadata.metadata[b"hf_doge"])["scale"] == file["scale"]
        assert [column.column_index for column in metadata.row_group(0).sorting_columns] == [1, 2]
        offsets = pq.read_metadata(folder / file["offsets_path"]).row_group(0)
        (sorted_by,) = offsets.sorting_columns
        assert offsets.column(sorted_by.column_index).path_in_schema == "token_id"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_offsets_tell_where_in_the_file_the_rows_of_each_token_lie(tmp_path, rows, dtype, monkeypatch):
    monkeypatch.setattr(segments, "ROW_GROUP_SIZE", 16)  # tokens whose rows lie in several groups
    folder = write_index(tmp_path / "index", rows, dtype=dtype, max_segment_bytes=4000)
    files = config_of(folder)["checkpoints"][0]["files"]
    assert len(files) > 1
    for file in files:
        content = (folder / file["path"]).read_bytes()
        table = pq.read_table(folder / file["path"], use_threads=False)
        assert pq.read_metadata(folder / file["path"]).num_row_groups > 1
        offsets = pq.read_table(folder / file["offsets_path"], use_threads=False)
        assert file["offsets_path"] == file["path"].replace("gradients", "offsets")
        assert offsets["first_example"].unique().to_pylist() == [file["first_example"]]
        covered = 0
        for run in offsets.to_pylist():
            first, last = run["first_row"], run["first_row"] + run["num_rows"]
            assert first == covered
            piece = table.slice(first, last - first)
            assert piece["token_id"].unique().to_pylist() == [run["token_id"]]
            grads = np.frombuffer(content, dtype, (last - first) * WIDTH, run["grad_byte"]).reshape(-1, WIDTH)
            np.testing.assert_array_equal(grads, np.stack(piece["grad"].to_numpy()))
            examples = np.frombuffer(content, np.int32, last - first, run["example_byte"])
            np.testing.assert_array_equal(examples, piece["example_id"].to_numpy())
            covered = last
        assert covered == table.num_rows
        assert offsets["token_id"].to_pylist() == sorted(offsets["token_id"].to_pylist())


def test_an_int8_index_has_no_offsets(tmp_path, rows):
    folder = write_index(tmp_path / "index", rows, dtype="int8")
    assert not (folder / "offsets").exists()
    assert "offsets" not in (folder / "README.md").read_text()


def test_the_scale_is_a_power_of_two_that_fills_float16(tmp_path):
    folder = write_index(tmp_path / "index", random_rows(NUM_EXAMPLES, size=1e-12))
    files = config_of(folder)["checkpoints"][0]["files"]
    assert files
    for file in files:
        assert np.log2(file["scale"]) % 1 == 0
        largest = np.abs(np.stack(pq.read_table(folder / file["path"], use_threads=False)["grad"].to_numpy())).max()
        assert 2**14 <= largest <= 2**15


def test_examples_without_rows_at_the_end_need_no_file(tmp_path):
    rows = random_rows(NUM_EXAMPLES)
    some = int(rows.offsets[30])
    rows = TokenRows(rows.offsets.clamp(max=some), rows.tokens[:some], rows.rows[:some], False)
    folder = write_index(tmp_path / "index", rows, max_segment_bytes=4 * WIDTH * some)  # full with the last row
    (file,) = config_of(folder)["checkpoints"][0]["files"]
    assert (file["num_rows"], file["num_examples"]) == (some, NUM_EXAMPLES)
    assert len(datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "datasets"))) == some
    expected = dense_scores(rows, rows)
    assert np.abs(scores(folder, rows, tmp_path) - expected).max() <= 1e-3 * expected.max()


def test_how_examples_come_in_batches_changes_no_byte(tmp_path, rows):
    for batch_size in (1, 7, NUM_EXAMPLES):
        writer = open_writer(tmp_path / str(batch_size))
        write_checkpoint(writer, rows, batch_size=batch_size)
    assert contents(tmp_path / "1") == contents(tmp_path / "7") == contents(tmp_path / str(NUM_EXAMPLES))


def test_500_examples_of_64_tokens_take_at_most_5_5_mib(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randperm(30_522, generator=generator)[:42].sort().values for _ in range(500)]
    gradients = TokenRows(
        torch.arange(501) * 42, torch.cat(tokens), torch.randn(500 * 42, 128, generator=generator), False
    )
    writer = open_writer(tmp_path / "index", examples=False, width=128, vocabulary_size=30_522, num_examples=500)
    writer.write_examples(pa.table({"example_id": range(500), "text": ["word " * 64] * 500}))
    writer = open_writer(
        tmp_path / "index",
        examples=False,
        width=128,
        vocabulary_size=30_522,
        num_examples=500,
        max_segment_bytes=64 * 2**20,
    )
    write_checkpoint(writer, gradients, batch_size=32)
    assert sum(map(len, contents(tmp_path / "index").values())) <= 5.5 * 2**20


def test_int8_takes_one_byte_for_each_number(tmp_path):
    gradients = TokenRows(torch.arange(2001), torch.arange(2000) % 50, torch.randn(2000, 64), False)
    for dtype in ("int8", "float32"):
        write_index(tmp_path / dtype, gradients, width=64, dtype=dtype, max_segment_bytes=2**22)
    assert sum(map(len, contents(tmp_path / "int8").values())) <= 2000 * 64 * 1.25
    assert sum(map(len, contents(tmp_path / "float32").values())) >= 2000 * 64 * 3


def test_the_config_says_how_the_rows_were_made(tmp_path, rows):
    settings = {
        "loss_reduction": "mean",
        "special_token_ids": [0, 1],
        "tokenizer": {"name": "t"},
        "metadata": {"a": 1},
    }
    folder = write_index(tmp_path / "index", rows, settings=settings)
    config = config_of(folder)
    assert {key: config[key] for key in settings} == settings
    assert (config["record"], config["second_moment"], config["virtual"]) == ("checkpoint", False, False)
    assert config["checkpoints"][0].items() >= {**FACTS, "name": "checkpoint-0", "step": 0, "revision": None}.items()
    assert config["format_version"] == "1.0"


def test_the_card_tells_how_to_load_and_whom_to_cite(tmp_path, rows):
    card = (write_index(tmp_path / "index", rows) / "README.md").read_text()
    for words in ("load_dataset(", "InfluenceIndex.from_pretrained(", "papers/2202.11844", "papers/2002.08484", "0.1"):
        assert words in card


def test_an_edited_card_is_kept(tmp_path, rows):
    writer = open_writer(tmp_path / "index")
    write_checkpoint(writer, rows)
    card = tmp_path / "index" / "README.md"
    card.write_text("# Mine")
    with pytest.warns(UserWarning, match="(?s)was edited.*it is kept as it is"):
        write_checkpoint(writer, rows, name="checkpoint-2", step=2)
    assert card.read_text() == "# Mine"


def test_no_file_is_a_pickle(tmp_path, rows):
    folder = write_index(tmp_path / "index", rows)
    IndexReader.open(folder, cache_dir=tmp_path / "cache").self_influence(0)
    for content in [*contents(folder).values(), *contents(tmp_path / "cache").values()]:
        assert not content.startswith((b"\x80", b"PK"))


# Interrupted and continued


def uninterrupted(tmp_path, *checkpoints):
    writer = open_writer(tmp_path / "whole")
    for number, rows in enumerate(checkpoints):
        write_checkpoint(writer, rows, name=f"checkpoint-{number}", step=number)
    return tmp_path / "whole"


def continue_checkpoint(folder, rows, *, name="checkpoint-1", step=1):
    """As a new process would; the number of examples that were there already."""
    with open_writer(folder).checkpoint(name, step=step, **FACTS) as checkpoint:
        done = checkpoint.num_done
        for batch in list(batches(rows, 1))[done:]:
            checkpoint.add(batch)
        publish(checkpoint)
    return done


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "left"])
def test_an_abandoned_checkpoint_continues_after_its_last_segment(tmp_path, rows, killed):
    first = random_rows(NUM_EXAMPLES, seed=1)
    folder = tmp_path / "index"
    writer = open_writer(folder)
    write_checkpoint(writer, first, name="checkpoint-0", step=0)
    before = contents(folder)
    checkpoint = writer.checkpoint("checkpoint-1", step=1, **FACTS)
    for batch in list(batches(rows, 5))[:6]:
        checkpoint.add(batch)
    assert checkpoint.num_done == 30
    if killed:
        (folder / PARTIAL / ".segment-00099.parquet.tmp").write_bytes(b"half a segment")
        (folder / PARTIAL / "segment-00098.parquet").write_bytes(b"a segment that the journal does not know")
    else:
        checkpoint.__exit__(None, None, None)
        with pytest.raises(ValueError, match=r"is closed\. Continue it by a new"):
            checkpoint.add(batch)

    after = contents(folder)
    assert {path: after[path] for path in before} == before  # nothing earlier was touched
    reader = IndexReader.open(folder, cache_dir=tmp_path / "cache")
    assert [entry["name"] for entry in reader.checkpoints] == ["checkpoint-0"]  # nothing half is shown

    assert 20 <= continue_checkpoint(folder, rows) <= 30
    assert contents(folder) == contents(uninterrupted(tmp_path, first, rows))


def test_a_full_disk_keeps_what_was_written_and_can_be_continued(tmp_path, rows, monkeypatch):
    folder = tmp_path / "index"
    writer = open_writer(folder)
    write_checkpoint(writer, rows, name="checkpoint-0", step=0)
    before = contents(folder)
    written = []

    def fill_up(descriptor):
        written.append(descriptor)
        if len(written) == 6:  # two segments and journals are whole
            raise OSError(28, "No space left on device")

    with writer.checkpoint("checkpoint-1", step=1, **FACTS) as checkpoint, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_up)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.add(rows)
        with pytest.raises(ValueError, match="is closed"):
            publish(checkpoint)
    after = contents(folder)
    assert {path: after[path] for path in before} == before
    assert [path for path in after if path not in before and path.endswith(".tmp")] == []
    IndexReader.open(folder)

    assert continue_checkpoint(folder, rows) > 0
    assert contents(folder) == contents(uninterrupted(tmp_path, rows, rows))


def test_a_file_that_cannot_grow_is_a_full_disk(tmp_path, rows):
    resource = pytest.importorskip("resource")
    writer = open_writer(tmp_path / "index", max_segment_bytes=2**20)
    before = contents(tmp_path / "index")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writer.checkpoint("checkpoint-1", step=1, **FACTS) as checkpoint:
        checkpoint.add(rows)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                publish(checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "index") == before
    assert continue_checkpoint(tmp_path / "index", rows) == 0


@pytest.mark.parametrize("step", ["rename", "register"])
def test_a_crash_inside_finish_is_completed(tmp_path, rows, monkeypatch, step):
    folder = tmp_path / "index"
    writer = open_writer(folder)

    def crash(*arguments, **options):
        raise OSError("power cut")

    with writer.checkpoint("checkpoint-0", step=0, **FACTS) as checkpoint:
        checkpoint.add(rows)
        with monkeypatch.context() as patch:
            if step == "rename":
                patch.setattr("pathlib.Path.rename", crash)
            else:
                patch.setattr("hf_doge.artifacts.influence.writer.replace_files", crash)
            with pytest.raises(OSError, match="power cut"):
                publish(checkpoint)
    assert config_of(folder)["checkpoints"] == []
    assert continue_checkpoint(folder, rows, name="checkpoint-0", step=0) == NUM_EXAMPLES
    assert contents(folder) == contents(uninterrupted(tmp_path, rows))


def test_a_damaged_segment_of_an_unfinished_checkpoint_is_written_again(tmp_path, rows):
    folder = tmp_path / "index"
    with open_writer(folder).checkpoint("checkpoint-0", step=0, **FACTS) as checkpoint:
        checkpoint.add(rows)
    path = sorted((folder / "gradients/checkpoint-0.partial").glob("segment-*.parquet"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert continue_checkpoint(folder, rows, name="checkpoint-0", step=0) < NUM_EXAMPLES / 2
    assert contents(folder) == contents(uninterrupted(tmp_path, rows))


@pytest.mark.parametrize("reason", ["weights", "journal"])
def test_an_unfinished_checkpoint_of_other_weights_starts_anew(tmp_path, rows, reason):
    folder = tmp_path / "index"
    facts = {**FACTS, "fingerprint": "other"} if reason == "weights" else FACTS
    with open_writer(folder).checkpoint("checkpoint-0", step=0, **facts) as checkpoint:
        checkpoint.add(random_rows(NUM_EXAMPLES, seed=9))
    if reason == "journal":
        (folder / "gradients/checkpoint-0.partial/journal.json").write_text("{")
    assert continue_checkpoint(folder, rows, name="checkpoint-0", step=0) == 0
    assert contents(folder) == contents(uninterrupted(tmp_path, rows))


def test_memory_holds_no_more_than_a_segment(tmp_path, rows):
    capacity = 2000 // (4 * WIDTH)
    with open_writer(tmp_path / "index").checkpoint("checkpoint-1", step=1, **FACTS) as checkpoint:
        for batch in batches(rows, 20):
            checkpoint.add(batch)
            assert checkpoint._num_rows < capacity


# Bad input


def test_a_folder_of_another_configuration_is_refused(tmp_path, rows):
    folder = write_index(tmp_path / "index", rows)
    open_writer(folder, settings={"metadata": {"date": "later"}})  # is no difference
    with pytest.raises(ValueError, match="another configuration: `dtype` is 'float16', not 'int8'"):
        open_writer(folder, dtype="int8")
    with pytest.raises(ValueError, match="`vocabulary_size` is 50, not 51"):
        open_writer(folder, vocabulary_size=51)
    with pytest.raises(ValueError, match="`projection` is None, not"):
        open_writer(folder, projection_width=4)
    with pytest.raises(ValueError, match=r"`tokenizer` is None, not \{'name': 'x'\}"):
        open_writer(folder, settings={"tokenizer": {"name": "x"}})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="holds"):
        open_writer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="does not belong to an influence index"):
        open_writer(tmp_path)


BAD_OPTIONS = {
    "`width` must be at least 1": {"width": 0},
    "`num_examples` must be a whole number": {"num_examples": 1.5},
    "`dtype` must be one of": {"dtype": "bfloat16"},
    r"`projection_width` must be in \[1, 8\]": {"projection_width": 9},
    r"`settings` must be among .* got \['colour'\]": {"settings": {"colour": 1}},
    "`settings` must hold strings, finite numbers": {"settings": {"metadata": {"a": float("nan")}}},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_are_refused(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        open_writer(tmp_path / "index", **BAD_OPTIONS[message])
    assert not (tmp_path / "index").exists()


BAD_EXAMPLES = {
    r"be there once, but \[1\] repeat": [0, 1, 1],
    r"be there once, but \[2\] are missing": [0, 1],
    r"must be in \[0, 3\), but got \[3\]": [0, 1, 3],
}


@pytest.mark.parametrize("message", BAD_EXAMPLES)
def test_repeated_missing_or_unknown_examples_are_refused(tmp_path, message):
    writer = open_writer(tmp_path / "index", examples=False, num_examples=3)
    with pytest.raises(ValueError, match=message):
        writer.write_examples(pa.table({"example_id": BAD_EXAMPLES[message]}))
    with pytest.raises(ValueError, match="must have a column `example_id`"):
        writer.write_examples(pa.table({"id": [0, 1, 2]}))


def test_examples_are_ordered_and_cannot_change(tmp_path):
    writer = open_writer(tmp_path / "index", examples=False, num_examples=3)
    with pytest.raises(ValueError, match="Call `write_examples`"):
        writer.checkpoint("checkpoint-1", step=1, **FACTS)
    writer.write_examples(pa.table({"example_id": [2, 0, 1], "text": ["c", "a", "b"]}))
    path = tmp_path / "index/examples/train-00000-of-00001.parquet"
    assert pq.read_table(path, use_threads=False)["text"].to_pylist() == ["a", "b", "c"]
    writer = open_writer(tmp_path / "index", examples=False, num_examples=3)
    same = pa.table({"example_id": [0, 1, 2], "text": ["a", "b", "c"]})
    writer.write_examples(same)
    with pytest.raises(ValueError, match="has other examples already"):
        writer.write_examples(pa.table({"example_id": [0, 1, 2], "text": ["a", "b", "d"]}))
    path.unlink()
    writer.write_examples(same)
    assert path.is_file()


def test_bad_checkpoints_are_refused(tmp_path, rows):
    writer = open_writer(tmp_path / "index")
    write_checkpoint(writer, rows)
    names, writer = writer.checkpoint_names, open_writer(tmp_path / "index")
    assert writer.checkpoint_names == names == ["checkpoint-1"]
    with pytest.raises(ValueError, match=r"'checkpoint-1' is in .* already, and whole"):
        writer.checkpoint("checkpoint-1", step=1, **FACTS)
    for name in ("", "a/b", ".hidden", "x.partial", "a*"):
        with pytest.raises(ValueError, match="name of a checkpoint must be"):
            writer.checkpoint(name, step=1, **FACTS)
    with pytest.raises(ValueError, match=r"`learning_rate` must be in \[0, 1e\+30\]"):
        writer.checkpoint("checkpoint-2", step=1, **{**FACTS, "learning_rate": float("nan")})
    both = [writer.checkpoint(name, step=2, **FACTS) for name in ("a", "b")]
    for checkpoint in both:
        checkpoint.add(rows)
    publish(both[0])
    with pytest.raises(ValueError, match="one after the other"):
        publish(both[1])


BAD_ROWS = {
    "width of the index, 8": one_example([1], torch.ones(1, 7)),
    r"must be in \[0, 50\).*from 50 to 50": one_example([50], torch.ones(1, WIDTH)),
    "must be distinct and ascending": one_example([3, 3], torch.ones(2, WIDTH)),
    "finite in float32, but those of example 7": one_example([3], torch.full((1, WIDTH), torch.nan)),
    "finite in float32, but those": one_example([3], torch.full((1, WIDTH), 1e300, dtype=torch.float64)),
    "opened for 40 examples, but 41": random_rows(34),
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows_are_refused_and_leave_nothing(tmp_path, rows, message):
    folder = tmp_path / "index"
    ones = list(batches(rows, 1))
    with open_writer(folder).checkpoint("checkpoint-0", step=0, **FACTS) as checkpoint:
        for batch in ones[:7]:
            checkpoint.add(batch)
        with pytest.raises(ValueError, match=message):
            checkpoint.add(BAD_ROWS[message])
        for batch in ones[7:]:
            checkpoint.add(batch)
        publish(checkpoint)
    assert contents(folder) == contents(uninterrupted(tmp_path, rows))


def test_a_checkpoint_without_all_examples_is_refused(tmp_path, rows):
    with open_writer(tmp_path / "index").checkpoint("checkpoint-1", step=1, **FACTS) as checkpoint:
        checkpoint.add(next(batches(rows, 39)))
        with pytest.raises(ValueError, match="must hold all 40 examples, but 39 were added"):
            publish(checkpoint)


def test_half_and_double_precision_rows_are_taken(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rows = random_rows(NUM_EXAMPLES, size=1.0, dtype=dtype)
        folder = write_index(tmp_path / str(dtype), rows)
        expected = dense_scores(rows, rows)
        assert np.abs(scores(folder, rows, tmp_path) - expected).max() <= 1e-3 * expected.max()


def test_examples_of_another_table_type_are_kept(tmp_path):
    writer = open_writer(tmp_path / "index", examples=False, num_examples=2)
    table = pa.table({"example_id": pa.array([0, 1], pa.int32()), "label": pa.array([1, 0], pa.int8())})
    writer.write_examples(table)
    assert examples_table(2).schema.field("example_id").type == pa.int64()
    kept = pq.read_table(tmp_path / "index/examples/train-00000-of-00001.parquet", use_threads=False)
    assert kept.schema.field("example_id").type == pa.int64()
    assert kept.schema.field("label").type == pa.int8()


# What Parquet keeps otherwise than Arrow has it, and what does not equal itself.
DIFFICULT = {
    "seconds": pa.timestamp("s"),
    "milliseconds": pa.date64(),
    "time of day": pa.time32("s"),
    "nested seconds": pa.list_(pa.timestamp("s")),
    "missing number": pa.float64(),
}


@pytest.mark.parametrize("name", DIFFICULT)
@pytest.mark.parametrize("add_examples", [False, True])
def test_an_index_continues_with_the_examples_it_was_given_whatever_they_hold(tmp_path, rows, name, add_examples):
    values = {"nested seconds": [[1], [2], [3]], "missing number": [1.0, float("nan"), 2.0]}.get(name, [0, None, 0])
    table = pa.table({"example_id": [0, 1, 2], name: pa.array(values, DIFFICULT[name])})
    begun = table.slice(0, 2) if add_examples else table
    writer = open_writer(tmp_path / "index", examples=False, num_examples=len(begun))
    writer.write_examples(begun)
    write_checkpoint(writer, some(rows, 0, len(begun)))
    writer = open_writer(tmp_path / "index", examples=False, num_examples=3, add_examples=add_examples)
    writer.write_examples(table)
    other = pa.array([values[1], *values[1:]], DIFFICULT[name])
    with pytest.raises(ValueError, match="other"):
        writer.write_examples(table.set_column(1, name, other))


# Two writers at once

OTHER_PROCESS = """
import sys
import time
from hf_doge.artifacts.influence import lock
from tests.artifacts.influence_rows import open_writer

lock._PATIENCE_SECONDS = 0.2
try:
    writer = open_writer(sys.argv[1])
except BlockingIOError as error:
    sys.exit(f"refused: {error}")
print("writing", flush=True)
time.sleep(float(sys.argv[2]))
"""


def other_process(folder, *, seconds=0.0):
    return Fork(["-c", OTHER_PROCESS, folder, seconds], env=launch_environment(), separate_errors=True)


def test_a_second_process_that_writes_is_refused_until_the_first_one_closes(tmp_path, rows):
    folder = tmp_path / "index"
    writer = open_writer(folder)
    _, complaint = other_process(folder).communicate(timeout=60)
    assert "refused: One process at a time can write" in complaint
    assert str(folder) in complaint
    write_checkpoint(writer, rows)  # the first one goes on unharmed
    writer.close()
    said, complaint = other_process(folder).communicate(timeout=60)
    assert said == "writing\n", complaint
    assert [entry["name"] for entry in config_of(folder)["checkpoints"]] == ["checkpoint-1"]


def test_a_folder_that_was_closed_and_opened_again_is_locked_again(tmp_path):
    folder = tmp_path / "index"
    closed = open_writer(folder)
    closed.close()
    writer = open_writer(folder)
    _, complaint = other_process(folder).communicate(timeout=60)
    assert "refused: One process at a time can write" in complaint
    writer.close()


def test_the_lock_of_a_killed_process_does_not_block(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("hf_doge.artifacts.influence.lock._PATIENCE_SECONDS", 0.2)
    folder = tmp_path / "index"
    process = other_process(folder, seconds=60)
    while process.poll() is None and process.output != "writing\n":
        time.sleep(0.01)
    with pytest.raises(BlockingIOError, match=r"another one is writing .*index"):
        open_writer(folder)
    process.kill()
    process.wait()
    write_checkpoint(open_writer(folder), rows)
    assert [entry["name"] for entry in config_of(folder)["checkpoints"]] == ["checkpoint-1"]


def test_in_one_process_the_later_writer_takes_over(tmp_path, rows):
    folder = tmp_path / "index"
    first = open_writer(folder)
    begun = first.checkpoint("checkpoint-1", step=1, **FACTS)
    second = open_writer(folder)
    write_checkpoint(second, rows)
    first.close()  # which is not the second's end
    write_checkpoint(second, rows, name="checkpoint-2", step=2)
    for attempt in (
        lambda: begun.add(rows),
        lambda: first.checkpoint("checkpoint-3", step=3, **FACTS),
        lambda: first.forget("checkpoint-1"),
    ):
        with pytest.raises(ValueError, match="closed, or opened again since"):
            attempt()
    second.close()
    with pytest.raises(ValueError, match="closed, or opened again since"):
        second.checkpoint("checkpoint-3", step=3, **FACTS)
    assert [entry["name"] for entry in config_of(folder)["checkpoints"]] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("grows", [False, True])
def test_a_closed_writer_touches_nothing(tmp_path, rows, grows):
    folder = tmp_path / "index"
    write_index(folder, some(rows, 0, 30) if grows else rows)
    writer = open_writer(folder, add_examples=grows)
    name = "checkpoint-0" if grows else "checkpoint-1"
    facts = {**FACTS, "step": 0 if grows else 1}
    checkpoint = writer.checkpoint(name, **facts)
    checkpoint.add(some(rows, checkpoint.num_done, NUM_EXAMPLES))
    writer.close()
    before = contents(folder)
    texts = pa.table({"example_id": range(NUM_EXAMPLES), "text": ["other"] * NUM_EXAMPLES})
    for attempt in (
        lambda: checkpoint.add(rows),
        checkpoint.finish,
        lambda: writer.checkpoint(name, **facts),
        lambda: writer.write_examples(texts),
        lambda: writer.forget("checkpoint-0"),
    ):
        with pytest.raises(ValueError, match="closed, or opened again since"):
            attempt()
    assert contents(folder) == before


def test_a_writer_that_is_forgotten_holds_no_lock(tmp_path):
    folder = tmp_path / "index"
    writer = open_writer(folder)
    del writer
    gc.collect()
    said, complaint = other_process(folder).communicate(timeout=60)
    assert said == "writing\n", complaint
