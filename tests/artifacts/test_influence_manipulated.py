"""Files of an index that are not what they must be, although every checksum is right: told by name, before harm is done."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_doge.artifacts.cards.html import index_html
from hf_doge.artifacts.cards.index import index_card
from hf_doge.artifacts.influence import IndexReader, segment_reader
from hf_doge.artifacts.influence.manifest import parse_config
from hf_doge.files import sha256
from hf_doge.tracing.encoding import Encoding
from tests.artifacts.influence_rows import FACTS, NUM_EXAMPLES, WIDTH, open_writer, random_rows, write_index
from tests.artifacts.odd_json import ODD, places, put_in
from tests.test_text import is_harmless


@pytest.fixture
def folder(tmp_path):
    return write_index(tmp_path / "index", random_rows(NUM_EXAMPLES), random_rows(NUM_EXAMPLES, seed=1))


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def sign_anew(folder):
    """Make all checksums right."""

    def sign(config):
        def checksum(path):
            return hashlib.sha256((folder / path).read_bytes()).hexdigest()

        config["files"] = {path: checksum(path) for path in config["files"]}
        for checkpoint in config["checkpoints"]:
            for file in checkpoint["files"]:
                for key in ("", "offsets_"):
                    if file.get(f"{key}path"):
                        file[f"{key}sha256"] = checksum(file[f"{key}path"])

    change_config(folder, sign)


def rewrite(folder, kind, change):
    """Change the table of the second segment; its path."""
    config = json.loads((folder / "config.json").read_text())
    path = config["checkpoints"][0]["files"][1][kind]
    table = change(pq.read_table(folder / path, use_threads=False))
    pq.write_table(table, folder / path)
    sign_anew(folder)
    return path


def with_column(table, name, edit, *, kind=None):
    column = table[name].combine_chunks()
    values = column.to_numpy(zero_copy_only=False).copy()
    changed = edit(values)
    position = table.column_names.index(name)
    return table.set_column(position, name, pa.array(values if changed is None else changed, kind or column.type))


def with_grad(table, edit, *, kind=None, width=WIDTH):
    values = table["grad"].combine_chunks().flatten().to_numpy().copy()
    edit(values)
    array = pa.array(
        values[: len(table) * width].astype((kind or pa.float16()).to_pandas_dtype()), kind or pa.float16()
    )
    return table.set_column(3, "grad", pa.FixedSizeListArray.from_arrays(array, width))


def put(position, value):
    def edit(values):
        values[position] = value

    return edit


def exchange(values):
    values[[0, -1]] = values[[-1, 0]]


def shift_from(position):
    def edit(values):
        values[position:] += 16

    return edit


def move_one(values):
    """Another token, in order still."""
    gap = np.flatnonzero(np.diff(values) > 1)[0]
    values[gap] += 1


SEGMENTS = {
    "`grad` must be finite": lambda table: with_grad(table, put(3, np.nan)),
    "columns must be .*grad fixed_size_list<.*halffloat.*, but are": lambda table: with_grad(
        table, put(0, 1), kind=pa.float32()
    ),
    r"columns must be .*\[8\], scale float, but are .*\[4\]": lambda table: with_grad(table, put(0, 1), width=4),
    "columns must be checkpoint .*, but are checkpoint": lambda table: table.drop_columns(["scale"]),
    r"`token_id` must ascend within \[0, 50\)": lambda table: with_column(table, "token_id", exchange),
    r"`token_id` must ascend within": lambda table: with_column(table, "token_id", put(-1, 50)),
    r"`token_id` must ascend": lambda table: with_column(table, "token_id", put(0, -1)),
    r"`token_id` must ascend within .0": lambda table: with_column(table, "token_id", put(-1, -(2**31))),
    r"`example_id` must be in \[": lambda table: with_column(table, "example_id", put(0, 10**6)),
    "`example_id` must be in": lambda table: with_column(table, "example_id", put(0, -1)),
    "rows must be sorted by `token_id` and `example_id`, none twice": lambda table: pa.concat_tables(
        [table.slice(0, 1), table.slice(0, 1), table.slice(2)]
    ),
    "it must have .* rows, but has": lambda table: table.slice(1),
    "no value may be null": lambda table: with_column(table, "token_id", lambda values: [None, *values[1:].tolist()]),
    "`checkpoint` must be its own": lambda table: with_column(table, "checkpoint", put(0, 1)),
}


@pytest.mark.parametrize("law", SEGMENTS)
def test_a_manipulated_segment_is_named_with_what_is_wrong(folder, tmp_path, law):
    path = rewrite(folder, "path", SEGMENTS[law])
    reader = IndexReader.open(folder, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=f"{path}' are damaged or were manipulated: {law}"):
        reader.self_influence(0)
    assert list((tmp_path / "cache").iterdir()) == []
    assert reader.self_influence(1).any()


def test_a_row_that_is_there_twice_is_named_where_one_piece_that_is_read_ends_too(folder, tmp_path, monkeypatch):
    sizes = []

    def repeat(table):
        """The last row of the first piece once more, in place of the next one of its token."""
        tokens = table["token_id"].to_numpy()
        sizes.append(size := int(np.flatnonzero(tokens[1:] == tokens[:-1])[0]) + 1)
        return pa.concat_tables([table.slice(0, size), table.slice(size - 1, 1), table.slice(size + 1)])

    path = rewrite(folder, "path", repeat)
    monkeypatch.setattr(segment_reader, "ROW_GROUP_SIZE", sizes[0])
    for one in json.loads((folder / "config.json").read_text())["checkpoints"][0]["files"]:
        table = pq.read_table(folder / one["path"], use_threads=False)
        pq.write_table(table, folder / one["path"], row_group_size=sizes[0])
    sign_anew(folder)
    reader = IndexReader.open(folder, cache_dir=tmp_path / "cache")
    with pytest.raises(
        ValueError, match=f"{path}' are damaged or were manipulated: rows must be sorted .* none twice"
    ):
        reader.self_influence(0)


OFFSETS = {
    "`grad_byte` must ascend": lambda table: with_column(table, "grad_byte", exchange),
    "`grad_byte` must lie in the file of": lambda table: with_column(table, "grad_byte", put(-1, 10**9)),
    "`example_byte` must ascend": lambda table: with_column(table, "example_byte", put(0, -5)),
    "`num_rows` must be at least 1": lambda table: with_column(table, "num_rows", put(0, 0)),
    "`num_rows` must add up to": lambda table: with_column(table, "num_rows", put(0, 10**6)),
    r"`token_id` must ascend within \[0, 50\)": lambda table: with_column(table, "token_id", exchange),
    "columns must be .*, but are": lambda table: with_column(table, "num_rows", put(0, 1), kind=pa.int64()),
    "no value may be null": lambda table: with_column(table, "token_id", lambda values: [None, *values[1:].tolist()]),
    "`token_id` must ascend within .0": lambda table: with_column(table, "token_id", put(-1, -(2**31))),
    "`first_example` must be that of its segment": lambda table: with_column(
        table, "first_example", lambda values: values + 1
    ),
    "both places must leave something out between row groups alone": lambda table: with_column(
        table, "grad_byte", shift_from(3)
    ),
    "they must tell of the rows that": lambda table: with_column(table, "token_id", move_one),
}


@pytest.mark.parametrize("law", OFFSETS)
def test_manipulated_offsets_are_named_with_what_is_wrong(folder, tmp_path, law):
    path = rewrite(folder, "offsets_path", OFFSETS[law])
    reader = IndexReader.open(folder, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=f"{path}' are damaged or were manipulated: {law}"):
        reader.self_influence(0)


def test_an_index_that_tells_of_no_file_of_examples_is_refused_by_the_name_of_the_first(folder):
    change_config(folder, lambda config: config.update(files={}))
    with pytest.raises(ValueError, match=r"were altered .*\['examples/train-00000-of-00001.parquet'\]"):
        IndexReader.open(folder)
    (folder / "examples" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files: \['examples/train-00000-of-00001.parquet'\]"):
        IndexReader.open(folder)


def test_a_file_that_is_no_parquet_is_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for kind in ("path", "offsets_path"):
        path = config["checkpoints"][0]["files"][1][kind]
        content = (folder / path).read_bytes()
        for damaged in (b"no Parquet", content[: len(content) // 2], content[:-20] + bytes(20)):
            (folder / path).write_bytes(damaged)
            sign_anew(folder)
            with pytest.raises(ValueError, match=f"{path}' must be a Parquet file, but cannot be read"):
                IndexReader.open(folder, cache_dir=tmp_path / "cache").self_influence(0)
        (folder / path).write_bytes(content)


def set_in(*keys, value):
    return lambda config: put_in(config, keys, value)


FILE = ("checkpoints", 0, "files", 0)
CLAIMS = {
    r"must have `vocabulary_size` in \[1, ": set_in("vocabulary_size", value=2**40),
    r"must have `width` in \[1, ": set_in("width", value=2**40),
    "must store rows of `width`": set_in("stored_width", value=4),
    "must have the projection of `stored_width`": set_in("projection", value={"width": 3, "seed": 0, "sha256": ""}),
    "must hold examples 0 to": set_in("num_examples", value=2**36),
    "must have at most .* rows in": set_in(*FILE, "num_rows", value=2**40),
    "must have finite scales above 0": set_in(*FILE, "scale", value=0),
    "must have finite learning rates": set_in("checkpoints", 0, "learning_rate", value=-1),
    r"must lie in the folder, but got '\.\./x'": set_in(*FILE, "path", value="../x"),
    "must lie in the folder, but got '/etc/x'": set_in(*FILE, "offsets_path", value="/etc/x"),
    "must lie in the folder, but got 'C:x'": set_in(*FILE, "path", value="C:x"),
    "must lie in the folder, but got '//server/share/x'": set_in(*FILE, "path", value="//server/share/x"),
    r"must lie in the folder, but got '\.\.\\\\x'": set_in(*FILE, "path", value="..\\x"),
    r"must lie in the folder, but got 'a\\x00'": set_in(*FILE, "path", value="a\0"),
    "must lie in the folder, but got ''": set_in(*FILE, "path", value=""),
    r"must lie in the folder, but got '\.'": set_in("files", ".", value="0"),
    r"must lie in the folder, but got 'examples/\.\./\.\./x'": set_in("files", "examples/../../x", value="0"),
    "must not lead out of the folder by `path`": set_in("checkpoints", 0, "path", value="models/../../x"),
}


@pytest.mark.parametrize("law", CLAIMS)
def test_what_config_json_claims_is_checked_before_anything_is_read(folder, law):
    change_config(folder, CLAIMS[law])
    with pytest.raises(ValueError, match=law):
        IndexReader.open(folder)


def test_a_number_of_examples_that_the_files_do_not_have_is_refused(folder):
    """Each takes memory in every search."""

    def claim(config):
        config["num_examples"] = 2**36
        for checkpoint in config["checkpoints"]:
            last = checkpoint["files"][-1]
            last["num_examples"] = 2**36 - last["first_example"]

    change_config(folder, claim)
    with pytest.raises(ValueError, match="must have 68719476736 examples, as its config"):
        IndexReader.open(folder)


def test_examples_in_another_order_are_refused(folder):
    path = folder / "examples/train-00000-of-00001.parquet"
    table = pq.read_table(path, use_threads=False)
    pq.write_table(table.take([1, 0, *range(2, NUM_EXAMPLES)]), path)
    sign_anew(folder)
    with pytest.raises(ValueError, match="must have the examples 0 to 39 in this order"):
        len(IndexReader.open(folder).examples)


def test_examples_with_two_columns_of_one_name_are_refused(folder):
    path = folder / "examples/train-00000-of-00001.parquet"
    table = pq.read_table(path, use_threads=False)
    for name in table.column_names:
        pq.write_table(table.append_column(name, table[name]), path)
        sign_anew(folder)
        with pytest.raises(ValueError, match=f"train-00000-of-00001.parquet' must be different, but .*{name}"):
            len(IndexReader.open(folder).examples)


def measured_index(folder):
    writer = open_writer(folder, settings={"metric": "optimizer", "second_moment": True})
    with writer.checkpoint("checkpoint-0", step=0, **FACTS) as checkpoint:
        checkpoint.add(random_rows(NUM_EXAMPLES))
        writer.publish(checkpoint, divisors=lambda tokens: (tokens[:, None] + 1.0).expand(-1, WIDTH))
    return folder


METRICS = {
    "no rows": lambda table: table.slice(0, 0),
    "the first token gone": lambda table: table.slice(1),
    "the last token gone": lambda table: table.slice(0, len(table) - 1),
    "no file": None,
}


@pytest.mark.parametrize("case", METRICS)
def test_a_metric_without_a_token_that_has_rows_is_refused_and_not_taken_for_no_influence(tmp_path, case):
    folder = measured_index(tmp_path / "index")
    config = json.loads((folder / "config.json").read_text())
    (file,) = config["checkpoints"][0]["metric"]
    if METRICS[case] is None:
        change_config(folder, set_in("checkpoints", 0, "metric", value=[]))
    else:
        pq.write_table(METRICS[case](pq.read_table(folder / file["path"], use_threads=False)), folder / file["path"])
        change_config(folder, set_in("checkpoints", 0, "metric", 0, "sha256", value=sha256(folder / file["path"])))
    reader = IndexReader.open(folder, cache_dir=tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"metric of checkpoint 'checkpoint-0' .* must have the divisors of all tokens"
    ):
        reader.metric(0)


def test_files_of_a_metric_that_disagree_on_a_token_are_refused(tmp_path):
    folder = measured_index(tmp_path / "index")
    config = json.loads((folder / "config.json").read_text())
    (file,) = config["checkpoints"][0]["metric"]
    table = pq.read_table(folder / file["path"], use_threads=False)
    other = file["path"].replace("tokens", "others")

    def add(name, factor):
        values = table["divisor"].combine_chunks().flatten().to_numpy() * np.float16(factor)
        changed = table.set_column(2, "divisor", pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH))
        pq.write_table(changed, folder / name)
        entry = {**file, "path": name, "sha256": sha256(folder / name)}
        change_config(folder, set_in("checkpoints", 0, "metric", value=[file, entry]))

    add(other, 1)
    IndexReader.open(folder, cache_dir=tmp_path / "cache").metric(0)
    add(other, 2)
    with pytest.raises(ValueError, match=r"metric of checkpoint 'checkpoint-0' .* must agree on the divisors"):
        IndexReader.open(folder, cache_dir=tmp_path / "cache").metric(0)


def test_a_scale_other_than_the_one_of_the_rows_is_told(folder, tmp_path):
    def double(config):
        config["checkpoints"][0]["files"][1]["scale"] *= 2

    change_config(folder, double)
    path = json.loads((folder / "config.json").read_text())["checkpoints"][0]["files"][1]["path"]
    with pytest.raises(ValueError, match=f"The rows of '{path}' were written with the scale .*, but config.json"):
        IndexReader.open(folder, cache_dir=tmp_path / "cache")


METADATA = {
    "model": {"name_or_path": "a/b", "class": "X", "num_parameters": 5, "revision": "r"},
    "dataset": {"sources": ["a/b"]},
    "encoding": {"inputs": ["input_ids"], "masks": ["completion"], "ends": True, "max_length": 5, "truncation": "keep_end"},
    "search": {"cosine": True, "sentence_end_ids": [4], "special_tokens": "hide"},
    **{"versions": {"torch": "2"}, "command": "x", "date": "2024", "virtual_parts": ["x"], "metric": "x"},
}  # fmt: skip
RECORDED = {
    **{"loss_fn": "f", "loss_reduction": "sum", "tied": "own", "top_k": 5, "top_k_unit": "token"},
    **{"special_token_ids": [1, 2], "tokenizer": {"name": "a/b", "vocabulary_size": 50, "fingerprint": "f"}},
    **{"dataset": {"num_rows": 40, "fingerprint": "f"}, "redacted": False},
}


def test_whatever_config_json_holds_is_refused_by_name_or_shown(folder):
    """Each of its values replaced by each odd one."""
    config = {**json.loads((folder / "config.json").read_text()), **RECORDED, "metadata": METADATA}
    wrong, text = [], json.dumps(config)
    for place in places(config):
        for odd in ODD:
            changed = put_in(json.loads(text), place, odd)
            try:
                parsed = parse_config(json.dumps(changed).encode(), source="config.json")
            except ValueError as error:
                wrong += [] if "config.json" in str(error) and is_harmless(str(error)) else [(place, odd, error)]
                continue
            try:
                shown = [index_html(parsed), index_card(parsed, folder, repo_id="a/b").block]
                Encoding.of(parsed)
            except ValueError as error:
                wrong += [] if "config.json" in str(error) and is_harmless(str(error)) else [(place, odd, error)]
            except FileNotFoundError:  # a path that is in the folder, where nothing is
                pass
            except Exception as error:  # what this test looks for
                wrong.append((place, odd, repr(error)))
            else:
                wrong += [] if all(map(is_harmless, shown)) and "<b>" not in shown[0] else [(place, odd, "shown")]
    assert not wrong, "\n".join(map(str, wrong))
