"""Small files that would unfold to gigabytes, or hang or end the process that reads them, are refused by name."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_doge import DomainWeights
from hf_doge.artifacts.cards.card import HeaderError, parse_header
from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.parquet import read_parquet
from tests.artifacts.influence_rows import random_rows, write_index
from tests.artifacts.test_domain_weights import make_weights

LAUGHS = "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(10))
BOMBS = {
    "aliases": f"a: &a [x, x]\n{LAUGHS}",
    "merges": "a: &a {x: 1}\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [*{chr(97 + n)}, *{chr(97 + n)}]}}\n" for n in range(24)),
    "itself": "a: &a [*a]\n",
    "levels": "a: " + "[" * 100_000 + "]" * 100_000,
    "digits": "a: " + "9" * 5000,
    "a date that is none": "a: 2024-13-45",
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_yaml_bomb_is_refused_by_name(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_text(BOMBS[kind])
    with pytest.raises(ValueError, match=rf"{suffix}' must be YAML in UTF-8, but it is not|weights{suffix}'"):
        DomainWeights.from_file(path)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_in_the_yaml_of_a_card_is_kept_and_told(tmp_path, kind):
    with pytest.raises(HeaderError, match="cannot be read"):
        parse_header(BOMBS[kind])
    make_weights(0).save_pretrained(tmp_path / "artifact")
    card = tmp_path / "artifact" / "README.md"
    card.write_text(f"---\n{BOMBS[kind]}\n---\nmine\n")
    with pytest.warns(UserWarning, match="YAML at its head cannot be read"):
        make_weights(1).save_pretrained(tmp_path / "artifact")
    assert card.read_text().endswith("\n---\nmine\n")


def test_honest_references_are_read(tmp_path):
    (tmp_path / "w.yaml").write_text("train: &t\n  wiki: 3\n  web: 1\nvalid: *t\nmore: {<<: *t, web: 2}\n")
    assert DomainWeights.from_file(tmp_path / "w.yaml").mean == {"wiki": 0.75, "web": 0.25}


JSON_BOMBS = {"levels": "[" * 100_000 + "]" * 100_000, "fewer": "[" * 500 + "]" * 500, "digits": "9" * 5000}


@pytest.mark.parametrize("kind", JSON_BOMBS)
def test_a_json_bomb_is_refused_by_name_in_artifacts_too(tmp_path, kind):
    make_weights().save_pretrained(tmp_path / "weights")
    write_index(tmp_path / "index", random_rows(8))
    (tmp_path / "weights.json").write_text(f'{{"a": {JSON_BOMBS[kind]}}}')
    for place in ("weights/domain_weights.json", "index/config.json"):
        content = json.loads((tmp_path / place).read_text()) | {"metadata": {"x": "BOMB"}}
        (tmp_path / place).write_text(json.dumps(content).replace('"BOMB"', JSON_BOMBS[kind]))
    for name, read in (
        ("weights.json", lambda: DomainWeights.from_file(tmp_path / "weights.json")),
        ("domain_weights.json", lambda: DomainWeights.from_pretrained(tmp_path / "weights")),
        ("config.json", lambda: IndexReader.open(tmp_path / "index")),
    ):
        with pytest.raises(ValueError, match=f"{name}' must be JSON"):
            read()


@pytest.mark.parametrize("version", ["9" * 5000, "9" * 5000 + ".0", "1\u0660" * 50])
def test_a_version_without_end_is_refused_by_name(tmp_path, version):
    make_weights().save_pretrained(tmp_path / "weights")
    manifest = tmp_path / "weights" / "domain_weights.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": version}))
    with pytest.raises(ValueError, match=r"domain_weights.json' must have a `format_version`"):
        DomainWeights.from_pretrained(tmp_path / "weights")


def write_bomb(path, schema, kind):
    """Constant rows that no file would need, or one long text in many rows."""
    piece, copies = (1_000_000, 40) if kind == "rows" else (10_000, 1)
    text = "a" if kind == "rows" else "a" * 200_000
    columns = {
        field.name: pa.DictionaryArray.from_arrays(pa.array(np.zeros(piece, np.int32)), pa.array([text])).cast(
            pa.dictionary(pa.int32(), pa.string())
        )
        if field.type == pa.string()
        else pa.array(np.zeros(piece)).cast(field.type)
        for field in schema
    }
    table = pa.table(columns)
    with pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False) as writer:
        for _ in range(copies):
            writer.write_table(table, row_group_size=piece)


@pytest.mark.parametrize("kind", ["rows", "text"])
def test_a_trajectory_that_unpacks_to_gigabytes_is_refused_before_it_is_read(tmp_path, kind):
    make_weights().save_pretrained(tmp_path / "weights")
    (path,) = (tmp_path / "weights" / "trajectory").iterdir()
    write_bomb(path, pq.read_schema(path), kind)
    assert path.stat().st_size < 2_000_000
    manifest = tmp_path / "weights" / "domain_weights.json"
    content = json.loads(manifest.read_text())
    content["files"][f"trajectory/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match=r"trajectory/.*' must need at most 0.25 GiB of memory, .* but claims"):
        DomainWeights.from_pretrained(tmp_path / "weights")
    assert pa.total_allocated_bytes() - before < 2**26


@pytest.mark.parametrize("kind", ["rows", "text"])
def test_examples_of_an_index_that_unpack_to_gigabytes_are_refused(tmp_path, kind):
    folder = write_index(tmp_path / "index", random_rows(8))
    (path,) = (folder / "examples").iterdir()
    write_bomb(path, pq.read_schema(path), kind)
    config = json.loads((folder / "config.json").read_text())
    config["files"][f"examples/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    config["num_examples"] = num_rows = pq.read_metadata(path).num_rows
    for checkpoint in config["checkpoints"]:
        checkpoint["files"] = [{**checkpoint["files"][0], "num_examples": num_rows}]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"examples/.*' must need at most 0.25 GiB of memory, .* but claims"):
        IndexReader.open(folder, cache_dir=tmp_path / "maps").examples.to_dict()


def test_columns_of_columns_are_read_and_count_with_all_that_is_in_them(tmp_path):
    kind = pa.struct({"a": pa.int64(), "b": pa.struct({"c": pa.list_(pa.float32(), 3)})})
    table = pa.table({"x": pa.array([{"a": 1, "b": {"c": [1.0, 2.0, 3.0]}}], kind)})
    pq.write_table(table, tmp_path / "honest.parquet")
    assert read_parquet(tmp_path / "honest.parquet", "honest").equals(table)
    rows = table.take(pa.array(np.zeros(1_000_000, np.int64)))
    with pq.ParquetWriter(tmp_path / "bomb.parquet", table.schema, compression="zstd") as writer:
        for _ in range(14):
            writer.write_table(rows)
    with pytest.raises(ValueError, match=r"'bomb' must need at most 0.25 GiB .* but claims 0.261 GiB"):
        read_parquet(tmp_path / "bomb.parquet", "bomb")


NAMES = ["no", "on", "Yes", "null", "~", "1e3", "2019", "007", "2024-01-01", ".5", "0x1F", "1:30", "true"]


def test_names_in_yaml_are_read_as_they_are_written_and_come_back(tmp_path):
    (tmp_path / "w.yaml").write_text("train: &t\n" + "".join(f"  {name}: 1\n" for name in NAMES))
    (tmp_path / "merged.yaml").write_text((tmp_path / "w.yaml").read_text() + "  <<: {off: 1}\n")
    weights = DomainWeights.from_file(tmp_path / "w.yaml")
    assert list(weights.names) == NAMES
    assert set(DomainWeights.from_file(tmp_path / "merged.yaml").names) == {*NAMES, "off"}
    weights.save_pretrained(tmp_path / "artifact")
    assert list(DomainWeights.from_pretrained(tmp_path / "artifact").names) == NAMES
    (tmp_path / "w.yaml").write_text("no: 1\n'no': 2\n")
    with pytest.raises(ValueError, match="'no' stands twice"):
        DomainWeights.from_file(tmp_path / "w.yaml")
