"""The influence index: what is searched equals the dense gradients of the embedding matrix."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hf_doge.artifacts.influence import IndexReader, row_map
from hf_doge.artifacts.influence import reader as reader_module
from hf_doge.functional.synonyms import synonym_neighbours, synonym_scores, synonym_similarity
from hf_doge.gradients.token_rows import TokenRows
from tests.artifacts.influence_rows import (
    NUM_EXAMPLES,
    VOCABULARY_SIZE,
    WIDTH,
    batches,
    dense,
    dense_scores,
    one_example,
    open_writer,
    random_rows,
    write_checkpoint,
    write_index,
)

TOLERANCES = {"float32": 1e-6, "float16": 1e-3, "int8": 2e-2}


@pytest.fixture
def rows():
    return [random_rows(NUM_EXAMPLES, seed=0), random_rows(NUM_EXAMPLES, seed=1, size=1e-9)]


@pytest.fixture
def open_index(tmp_path):
    def open_index(*checkpoints, folder="index", **options):
        write_index(tmp_path / folder, *checkpoints, **options)
        return IndexReader.open(tmp_path / folder, cache_dir=tmp_path / "cache")

    return open_index


def assert_near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_scores_are_the_inner_products_of_the_dense_gradients(open_index, rows, dtype):
    reader = open_index(*rows, dtype=dtype)
    queries = random_rows(6, seed=2)
    for checkpoint in range(2):
        assert_near(reader.scores(checkpoint, queries), dense_scores(queries, rows[checkpoint]), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_threads_change_no_score(open_index, rows, dtype, monkeypatch):
    reader = open_index(rows[0], dtype=dtype)
    queries = random_rows(6, seed=2)
    expected = reader.scores(0, queries)
    monkeypatch.setattr(reader_module, "_WORTH_A_THREAD", 1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        np.testing.assert_allclose(reader.scores(0, queries), expected, rtol=1e-5, atol=1e-15)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)


def test_rows_wider_than_a_piece_are_scored_piece_by_piece(open_index, monkeypatch):
    everywhere = TokenRows(
        torch.arange(301), torch.full((300,), 3), torch.randn(300, WIDTH, dtype=torch.float64), False
    )
    reader = open_index(everywhere, dtype="float32")
    monkeypatch.setattr(reader_module, "_PIECE_BYTES", 1)  # at least 64 rows
    queries = one_example([3], torch.ones(1, WIDTH))
    assert_near(reader.scores(0, queries), dense_scores(queries, everywhere), 1e-6)


def test_a_proponent_is_positive(open_index):
    gradient = torch.ones(1, WIDTH)
    same, opposite = one_example([4], gradient), one_example([4], -gradient)
    both = TokenRows(torch.tensor([0, 1, 2]), torch.tensor([4, 4]), torch.cat([same.rows, opposite.rows]), False)
    reader = open_index(both)
    assert reader.scores(0, same).tolist() == [[WIDTH, -WIDTH]]


def test_tiny_gradients_do_not_vanish_in_float16(open_index):
    tiny = random_rows(NUM_EXAMPLES, size=1e-11)
    reader = open_index(tiny, dtype="float16")
    assert_near(reader.self_influence(0), dense(tiny).square().sum(1).numpy(), 1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_self_influence_is_the_squared_norm(open_index, rows, dtype):
    reader = open_index(*rows, dtype=dtype)
    for checkpoint in range(2):
        assert_near(
            reader.self_influence(checkpoint), dense(rows[checkpoint]).square().sum(1).numpy(), TOLERANCES[dtype]
        )


def test_excluded_tokens_do_not_count(open_index, rows):
    reader = open_index(rows[0], dtype="float32")
    queries, excluded = random_rows(6, seed=2), [0, 7, VOCABULARY_SIZE - 1]
    beyond = [*excluded, VOCABULARY_SIZE + 9]  # special tokens of a tokenizer may lie beyond the model's vocabulary
    expected = dense_scores(queries, rows[0], exclude=excluded)
    assert_near(reader.scores(0, queries, exclude_tokens=beyond), expected, 1e-6)
    norms = dense(rows[0], exclude=excluded).square().sum(1).numpy()
    assert_near(reader.self_influence(0, exclude_tokens=beyond), norms, 1e-6)


def test_word_scores_add_up_to_the_score(open_index, rows):
    reader = open_index(rows[0], dtype="float32")
    queries = random_rows(3, seed=2)
    ids = [5, 0, 39, 5]
    scores = reader.scores(0, queries)
    for number, (tokens, values) in enumerate(queries):
        parts = reader.word_scores(0, tokens, values, ids)
        assert parts.shape == (4, len(tokens))
        np.testing.assert_allclose(parts.sum(1), scores[number, ids], rtol=1e-4, atol=1e-13)
        for example, part in zip(ids, parts, strict=True):
            lacking = ~np.isin(tokens.numpy(), rows[0][example][0].numpy())
            assert (part[lacking] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_example_rows_are_those_written(open_index, rows, dtype):
    reader = open_index(*rows, dtype=dtype)
    ids = [7, 0, 39, 7]
    largest = float(rows[1].rows.abs().max())
    for example, (tokens, values) in zip(ids, reader.example_rows(1, ids), strict=True):
        assert torch.equal(tokens, rows[1][example][0])
        assert values.dtype == torch.float32
        torch.testing.assert_close(
            values.double(), rows[1][example][1], rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * largest
        )
    assert reader.example_rows(1, []) == []


def test_queries_without_known_tokens_score_zero(open_index):
    reader = open_index(one_example([1, 2], torch.ones(2, WIDTH)))
    queries = TokenRows(torch.tensor([0, 0, 1]), torch.tensor([9]), torch.ones(1, WIDTH), False)
    assert reader.scores(0, queries).tolist() == [[0.0], [0.0]]
    assert reader.word_scores(0, queries.tokens, queries.rows, [0]).tolist() == [[0.0]]
    none = TokenRows(torch.tensor([0]), torch.zeros(0, dtype=torch.long), torch.zeros(0, WIDTH), False)
    assert reader.scores(0, none).shape == (0, 1)


def test_an_index_of_examples_without_tokens_can_be_searched(open_index):
    nothing = TokenRows(
        torch.zeros(3, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, WIDTH), False
    )
    reader = open_index(nothing)
    assert reader.scores(0, random_rows(2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert reader.self_influence(0).tolist() == [0.0, 0.0]
    assert [len(tokens) for tokens, _ in reader.example_rows(0, [0, 1])] == [0, 0]


def test_projected_rows_score_as_projected_gradients(open_index, rows):
    reader = open_index(rows[0], dtype="float32", projection_width=5, projection_seed=3)
    queries = random_rows(6, seed=2)
    matrix = reader.project(0, torch.eye(WIDTH, dtype=torch.float64))
    assert matrix.shape == (WIDTH, 5)
    assert (matrix.abs() - 5**-0.5).abs().max() < 1e-12
    projected = [TokenRows(r.offsets, r.tokens, r.rows @ matrix, False) for r in (queries, rows[0])]
    assert_near(reader.scores(0, queries), dense_scores(*projected), 1e-6)
    tokens, _ = projected[0][0]
    parts = reader.word_scores(0, tokens, reader.project(0, queries[0][1]), range(NUM_EXAMPLES))
    assert_near(parts.sum(1), dense_scores(*projected)[0], 1e-6)


def test_the_projection_is_the_same_on_every_machine(open_index):
    reader = open_index(random_rows(2), projection_width=4, projection_seed=3)
    signs = (reader.project(0, torch.eye(WIDTH)) > 0).int()
    assert signs[:3].tolist() == EXPECTED_SIGNS
    assert json.loads((reader.folder / "config.json").read_bytes())["projection"]["seed"] == 3


EXPECTED_SIGNS = [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1]]


def test_a_projection_that_cannot_be_drawn_again_is_refused(open_index, tmp_path):
    open_index(random_rows(2), projection_width=4)
    change_config(tmp_path / "index", lambda config: config["projection"].update(sha256="0" * 64))
    with pytest.raises(ValueError, match="must be drawn again for queries"):
        IndexReader.open(tmp_path / "index")


def test_long_projections_keep_inner_products_on_average():
    from hf_doge.artifacts.influence.segments import projection_matrix

    a, b = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    estimates = torch.stack([(a @ (p := projection_matrix(64, 16, seed))) @ (b @ p) for seed in range(400)])
    bound = a.norm() * b.norm() * (2 / 16) ** 0.5
    assert estimates.std() <= bound
    assert (estimates.mean() - a @ b).abs() <= 4 * bound / 20


def test_the_readers_facts_are_those_written(open_index, rows):
    reader = open_index(*rows)
    assert (reader.num_examples, reader.width, reader.stored_width) == (NUM_EXAMPLES, WIDTH, WIDTH)
    assert [entry["name"] for entry in reader.checkpoints] == ["checkpoint-0", "checkpoint-1"]
    assert reader.checkpoints[1]["step"] == 1
    assert "files" not in reader.checkpoints[0]
    assert reader.examples[3] == {"example_id": 3, "text": "text 3"}


# The memory map


def test_the_map_is_the_same_however_many_rows_are_merged_at_a_time(open_index, rows, tmp_path, monkeypatch):
    expected = open_index(rows[0], dtype="int8").scores(0, rows[1])
    monkeypatch.setattr(row_map, "_GROUP_BYTES", 1)
    reader = IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "other")
    np.testing.assert_array_equal(reader.scores(0, rows[1]), expected)


def map_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def test_the_map_is_built_once_and_reused(open_index, rows, tmp_path, monkeypatch):
    queries = random_rows(3, seed=2)
    expected = open_index(rows[0]).scores(0, queries)
    monkeypatch.setattr(row_map, "_build", lambda *arguments: pytest.fail("built twice"))
    again = IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(again.scores(0, queries), expected)


@pytest.mark.parametrize("damage", ["cut", "missing", "no sizes", "not json"])
def test_a_damaged_map_is_rebuilt(open_index, rows, tmp_path, damage):
    queries = random_rows(3, seed=2)
    expected = open_index(rows[0]).scores(0, queries)
    folder = map_folder(tmp_path)
    if damage == "cut":
        os.truncate(folder / "rows.bin", 100)
    elif damage == "missing":
        (folder / "offsets.npy").unlink()
    else:
        (folder / "map.json").write_text("{}" if damage == "no sizes" else "x")
    again = IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(again.scores(0, queries), expected)
    assert map_folder(tmp_path) == folder  # and nothing else is left


def test_other_gradients_have_another_map(open_index, rows, tmp_path):
    open_index(rows[0]).scores(0, rows[0])
    reader = open_index(rows[1], folder="other")
    assert_near(reader.scores(0, rows[0]), dense_scores(rows[0], rows[1]), 1e-3)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_who_loses_the_race_to_build_takes_the_winners_map(open_index, rows, tmp_path, monkeypatch):
    reader, build = open_index(rows[0]), row_map._build

    def build_second(building, *arguments):
        arrays = build(building, *arguments)
        monkeypatch.setattr(row_map, "_build", build)
        IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "cache").self_influence(0)  # another process
        return arrays

    monkeypatch.setattr(row_map, "_build", build_second)
    assert_near(reader.scores(0, rows[1]), dense_scores(rows[1], rows[0]), 1e-3)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_readers_that_build_at_once_agree(open_index, rows, tmp_path):
    open_index(rows[0])
    readers = [IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "cache") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda reader: reader.scores(0, rows[1]), readers))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk_while_the_map_is_built_is_an_os_error(open_index, rows, tmp_path, monkeypatch):
    reader = open_index(rows[0])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(row_map, "_write_runs", full)
        with pytest.raises(OSError, match="No space left"):
            reader.scores(0, rows[1])
    assert list((tmp_path / "cache").iterdir()) == []
    assert reader.scores(0, rows[1]).any()


def test_maps_unused_for_longest_make_room_for_new_ones(open_index, rows, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    names = []

    def build(number):
        reader = open_index(random_rows(NUM_EXAMPLES, seed=number), folder=f"index-{number}")
        reader.self_influence(0)
        names.extend(sorted({path.name for path in cache.iterdir()} - set(names)))
        return reader

    def age(hours):
        for path in cache.glob("*/map.json"):
            os.utime(path, (path.stat().st_mtime - hours * 3600,) * 2)

    for number in range(3):
        build(number)
        age(1)
    size = max(sum(path.stat().st_size for path in (cache / name).iterdir()) for name in names)
    monkeypatch.setattr("hf_doge.artifacts.influence.row_map._KEPT_BYTES", int(2.5 * size))
    (cache / "models--of--others").mkdir()
    (cache / f".{names[0]}-killed").mkdir()
    os.utime(cache / f".{names[0]}-killed", (0, 0))
    first = IndexReader.open(tmp_path / "index-0", cache_dir=cache)
    expected = first.self_influence(0)  # opened again, so no longer the oldest
    build(3)
    assert sorted(path.name for path in cache.iterdir()) == sorted([names[0], names[3], "models--of--others"])
    age(1)
    build(4)
    build(5)  # both opened within the hour
    assert {path.name for path in cache.iterdir()} == {*names[4:], "models--of--others"}
    np.testing.assert_array_equal(first.self_influence(0), expected)  # its map was open


def test_the_holes_of_a_map_that_is_filled_bit_by_bit_take_no_room(open_index, rows, tmp_path, monkeypatch):
    open_index(rows[0]).self_influence(0)
    (place,) = (tmp_path / "cache").iterdir()
    with open(place / "holes", "wb") as file:
        file.write(b"x" * 4096)
        file.truncate(2**30)
    os.utime(place / "map.json", (0, 0))
    monkeypatch.setattr("hf_doge.artifacts.influence.row_map._KEPT_BYTES", 2**29)
    open_index(rows[1], folder="other").self_influence(0)
    assert place.exists()


def test_the_map_goes_to_hf_home(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    write_index(tmp_path / "index", rows[0])
    IndexReader.open(tmp_path / "index").self_influence(0)
    assert len(list((tmp_path / "home" / "hf_doge").iterdir())) == 1


def test_opening_an_index_imports_neither_datasets_nor_transformers(open_index, rows, tmp_path):
    open_index(rows[0])
    code = (
        "import sys\nfrom hf_doge.artifacts.influence import IndexReader\n"
        f"IndexReader.open({str(tmp_path / 'index')!r}, cache_dir={str(tmp_path / 'cache')!r}).self_influence(0)\n"
        "print(*(m for m in ('transformers', 'accelerate', 'datasets') if m in sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
    )


# Bad input


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_bytes())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_bad_queries_are_refused(open_index, rows):
    reader = open_index(rows[0])
    with pytest.raises(
        ValueError, match=r"must be in \[0, 50\), the vocabulary of the index, but they go from 50 to 50"
    ):
        reader.scores(0, one_example([50], torch.ones(1, WIDTH)))
    with pytest.raises(ValueError, match=r"width of the index, 8, but their shape is \(1, 9\)"):
        reader.scores(0, one_example([3], torch.ones(1, 9)))
    with pytest.raises(ValueError, match=r"must have shape \(1, 8\), but got \(2, 8\)"):
        reader.word_scores(0, [3], torch.ones(2, WIDTH), [0])
    with pytest.raises(ValueError, match="Tokens must be in"):
        reader.word_scores(0, [-1], torch.ones(1, WIDTH), [0])
    with pytest.raises(ValueError, match=r"Examples must be in \[0, 40\), but go from 40 to 40"):
        reader.example_rows(0, [40])
    with pytest.raises(ValueError, match=r"`checkpoint` must be in \[0, 1\), but got 1"):
        reader.scores(1, rows[0])


@pytest.mark.parametrize("name", ["gradients/checkpoint-1/segment-*.parquet", "examples/train-00000-of-00001.parquet"])
def test_an_altered_or_missing_file_is_named(open_index, rows, tmp_path, name):
    open_index(*rows)
    path = max((tmp_path / "index").glob(name))
    name = path.relative_to(tmp_path / "index").as_posix()
    content = path.read_bytes()
    for altered in (content[:-10], content[:50] + bytes([content[50] ^ 1]) + content[51:]):
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=f"altered or cut short.*{name}"):
            IndexReader.open(tmp_path / "index")
        IndexReader.open(tmp_path / "index", verify=False)
    path.unlink()
    for verify in (True, False):
        with pytest.raises(FileNotFoundError, match=f"lacks 1 files.*{name}"):
            IndexReader.open(tmp_path / "index", verify=verify)


def test_a_folder_that_is_no_index_is_refused(tmp_path, rows):
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        IndexReader.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="does not belong to an influence index"):
        IndexReader.open(tmp_path)
    open_writer(tmp_path / "empty")
    with pytest.raises(ValueError, match="no whole checkpoint yet"):
        IndexReader.open(tmp_path / "empty")


CHANGES = {
    "has format 5.0, but hf_doge": lambda config: config.update(format_version="5.0"),
    "must have int under 'width', but got '8'": lambda config: config.update(width="8"),
    "must have int under 'num_examples', but got None": lambda config: config.pop("num_examples"),
    "must have list under 'checkpoints'": lambda config: config.update(checkpoints={}),
    "must be a JSON object, but got 3": lambda config: config.update(checkpoints=[3]),
    "must have str under 'sha256'": lambda config: config["checkpoints"][0]["files"][0].pop("sha256"),
    "must lie in the folder": lambda config: config["checkpoints"][0]["files"][0].update(path="../x"),
    "`dtype` in .* must be one of": lambda config: config.update(dtype="float64"),
    "files of checkpoint .* must hold examples": lambda config: config["checkpoints"][0]["files"].pop(0),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_malformed_config_is_refused(open_index, rows, tmp_path, message):
    open_index(rows[0])
    change_config(tmp_path / "index", CHANGES[message])
    with pytest.raises(ValueError, match=message):
        IndexReader.open(tmp_path / "index")


def test_a_config_that_is_no_json_is_refused(open_index, rows, tmp_path):
    open_index(rows[0])
    (tmp_path / "index" / "config.json").write_text('{"format_version": "1.0",')
    with pytest.raises(ValueError, match="must be JSON"):
        IndexReader.open(tmp_path / "index")


def test_unknown_keys_of_a_newer_version_are_named_once(open_index, rows, tmp_path):
    open_index(rows[0])
    change_config(tmp_path / "index", lambda config: config.update(shiny=1, format_version="1.7"))
    with pytest.warns(UserWarning, match=r"keys \['shiny'\]"):
        IndexReader.open(tmp_path / "index")


def test_an_index_can_be_moved(open_index, rows, tmp_path):
    expected = open_index(rows[0]).scores(0, rows[1])
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    reader = IndexReader.open(tmp_path / "elsewhere", cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(reader.scores(0, rows[1]), expected)


def test_batches_of_queries_score_as_single_queries(open_index, rows):
    reader = open_index(rows[0], dtype="float32")
    queries = random_rows(9, seed=5)
    single = np.concatenate([reader.scores(0, query) for query in batches(queries, 1)])
    np.testing.assert_allclose(reader.scores(0, queries), single, rtol=1e-4, atol=1e-14)


def test_a_later_checkpoint_keeps_the_maps_of_earlier_ones(tmp_path, rows, monkeypatch):
    writer = open_writer(tmp_path / "index")
    write_checkpoint(writer, rows[0])
    IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "cache").self_influence(0)
    write_checkpoint(writer, rows[1], name="checkpoint-2", step=2)
    reader = IndexReader.open(tmp_path / "index", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(row_map, "_build", lambda *arguments: pytest.fail("built twice"))
    assert reader.self_influence(0).shape == (NUM_EXAMPLES,)


# Synonyms


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.6, 1.1])
@pytest.mark.parametrize("excluded", [(), (3, 7, 11)])
def test_synonym_parts_are_those_of_pair_by_pair_matching(open_index, rows, threshold, excluded):
    reader = open_index(*rows)
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn(VOCABULARY_SIZE, 3, generator=generator, dtype=torch.float64)
    examples = reader.example_rows(0, range(NUM_EXAMPLES))
    for tokens, query in random_rows(4, seed=9):
        kept = ~torch.isin(tokens, torch.tensor(excluded, dtype=torch.long))
        tokens, query = tokens[kept], query[kept].float()
        found = synonym_neighbours(tokens, embeddings, threshold=threshold)
        neighbours = {
            token: (ids.numpy(), near.numpy()) for token, (ids, near) in zip(tokens.tolist(), found, strict=True)
        }
        parts = np.zeros((NUM_EXAMPLES, len(tokens)))
        others = np.zeros((NUM_EXAMPLES, VOCABULARY_SIZE))
        for position, token, ids, values in reader.synonym_scores(
            0, tokens, query, neighbours, exclude_tokens=excluded
        ):
            parts[ids, position] += values
            others[ids, token] += values
        for number, (example_tokens, example_rows) in enumerate(examples):
            counted = ~torch.isin(example_tokens, torch.tensor(excluded, dtype=torch.long))
            example_tokens, example_rows = example_tokens[counted], example_rows[counted]
            matched = synonym_similarity(tokens, example_tokens, embeddings, threshold=threshold)
            matched[tokens[:, None] == example_tokens] = 0  # what `scores` has already
            expected = synonym_scores(query, example_rows, matched)
            np.testing.assert_allclose(parts[number], expected.sum(dim=1), rtol=1e-4, atol=1e-14)
            by_token = np.zeros(VOCABULARY_SIZE)
            by_token[example_tokens] = expected.sum(dim=0)
            np.testing.assert_allclose(others[number], by_token, rtol=1e-4, atol=1e-14)
        few = [7, 2, 30]
        alone = np.zeros((NUM_EXAMPLES, len(tokens)))
        for position, _, ids, values in reader.synonym_scores(
            0, tokens, query, neighbours, exclude_tokens=excluded, only=few
        ):
            alone[ids, position] += values
        np.testing.assert_allclose(alone[few], parts[few], rtol=1e-5, atol=1e-14)
        assert not np.delete(alone, few, axis=0).any()
