"""Cards: what they say is true, what they show works, and what a person wrote into them stays."""

import json
import re
import warnings
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, load_dataset
from huggingface_hub import DatasetCardData

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.cards.card import (
    BEGIN,
    END,
    Card,
    TableFacts,
    dump_header,
    parse_header,
    size_category,
    split_card,
    update_header,
)
from hf_doge.artifacts.cards.index import index_card
from hf_doge.artifacts.cards.text import code_block, escape, table
from hf_doge.artifacts.cards.weights import draw_plot, weights_card
from hf_doge.artifacts.influence.manifest import read_config
from hf_doge.training.config import RECIPES
from hf_doge.training.sweep import RECIPE as SWEEP
from tests.artifacts.influence_rows import (
    batches,
    dense_scores,
    open_writer,
    random_rows,
    write_checkpoint,
    write_index,
)
from tests.artifacts.test_domain_weights import make_weights
from tests.forks import Fork
from tests.launch import REPOSITORY, launch_environment

SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
SIZES += ["10B<n<100B", "100B<n<1T", "n>1T"]
TRAPS = ["yes", "no", "null", "~", "1e3", "1_000", "0o17", "a: b", "- x", "#x", "a | b", "`a`", "a``b", "2001-01-01"]
TRAPS += [
    "*a*",
    "_a_",
    "[x](y)",
    "<b>",
    END,
    BEGIN,
    "<!-- begin hf_doge -->",
    "https://a.example",
    "www.a.example",
    "a\\|b",
    "ü",
    "'",
    '"',
    "---",
    "$x$",
]


def block_of(card):
    """What stands between the markers of a card."""
    return card.partition(BEGIN)[2].partition(END)[0].strip()


def read(folder):
    return (Path(folder) / "README.md").read_bytes().decode()


def header_of(folder):
    """As the Hub's client parses it."""
    return DatasetCardData(**yaml.safe_load(split_card(read(folder))[0])).to_dict()


def code_of(card, language):
    return re.findall(rf"```{language}\n(.*?)\n```", card, flags=re.DOTALL)


def run_sql(folder, sql, monkeypatch):
    monkeypatch.chdir(folder)
    return duckdb.sql(sql).fetchall()


def weights_of(folder, *, seed=0, **options):
    make_weights(seed, **options).save_pretrained(folder)
    return folder


def index_of(folder, **options):
    rows = [random_rows(40, seed=seed, size=1.0) for seed in range(2)]
    return write_index(folder, *rows, **options), rows


INDICES = {
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "int8": {"dtype": "int8"},
    "projected": {"dtype": "float32", "projection_width": 4},
}


@pytest.fixture(params=["weights", "baseline", *INDICES])
def artifact(request, tmp_path):
    if request.param == "weights":
        return weights_of(tmp_path / "artifact")
    if request.param == "baseline":
        DomainWeights.uniform(["wiki", "web"]).save_pretrained(tmp_path / "artifact")
        return tmp_path / "artifact"
    return index_of(tmp_path / "artifact", **INDICES[request.param])[0]


# What the YAML says is so


def test_the_yaml_agrees_with_what_load_dataset_finds_without_it(artifact, tmp_path):
    header = header_of(artifact)
    told = {entry["config_name"]: entry for entry in header["dataset_info"]}
    assert [entry["config_name"] for entry in header["configs"]] == list(told)
    assert [entry["config_name"] for entry in header["configs"] if entry.get("default")] == [next(iter(told))]
    loaded = {name: load_dataset(str(artifact), name, split="train", cache_dir=str(tmp_path / "1")) for name in told}
    card = artifact / "README.md"
    card.write_text(f"---\n{dump_header({'configs': header['configs']})}---\n", encoding="utf-8")
    for name, entry in told.items():
        found = load_dataset(str(artifact), name, split="train", cache_dir=str(tmp_path / "2"))
        split = found.info.splits["train"]
        assert Features.from_arrow_schema(found.data.schema) == loaded[name].features == found.features
        (told_split,) = entry["splits"]
        assert (told_split["name"], told_split["num_examples"]) == ("train", split.num_examples)
        assert told_split["num_bytes"] == entry["dataset_size"]
        tolerance = 0.02 if name in ("gradients", "offsets") else 0  # of many small files
        assert told_split["num_bytes"] == pytest.approx(split.num_bytes, rel=tolerance, abs=0), name
        (files,) = next(one["data_files"] for one in header["configs"] if one["config_name"] == name)
        patterns = [files["path"]] if isinstance(files["path"], str) else files["path"]
        paths = [path for pattern in patterns for path in artifact.glob(pattern)]
        assert paths
        assert entry["download_size"] == sum(path.stat().st_size for path in paths)
        assert len(found) == len(loaded[name]) == sum(pq.read_metadata(path).num_rows for path in paths)


def test_the_yaml_is_of_keys_that_the_hub_knows(artifact):
    header = header_of(artifact)
    known = set(DatasetCardData().__dict__) | {"tags", "configs", "dataset_info", "library_name"}
    assert set(header) <= known
    assert header["size_categories"] == ["n<1K"]
    assert {"hf_doge"} <= set(header["tags"])


def test_size_categories_are_the_hubs():
    assert [size_category(10**power) for power in range(2, 14)] == [*SIZES[:1], *SIZES[1:], SIZES[-1]]
    assert size_category(999) == "n<1K"
    assert size_category(0) == "n<1K"


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "ü"]),
        pa.array([1, None, 3]),
        pa.array([1, 2, 3], type=pa.int32()),
        pa.array([True, False, None]),
        pa.array([[1, 2], [], [3]], type=pa.list_(pa.int32())),
        pa.array([["a"], ["b", "c"], []]),
        pa.array([[1.0, 2.0]] * 3, type=pa.list_(pa.float32(), 2)),
        pa.array([{"x": 1}] * 3),
        pa.array([[["a"]]] * 3),
    ],
    ids=lambda column: str(column.type),
)
def test_any_column_is_described_as_datasets_describes_it(tmp_path, column):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"yes": column}), path)
    facts = TableFacts.of([path])
    found = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    entry = yaml.safe_load(dump_header(facts.to_dataset_info("x")))
    assert Features._from_yaml_list(entry["features"]) == found.features
    assert (facts.num_rows, facts.num_bytes) == (3, found.info.splits["train"].num_bytes)


def test_column_facts_of_labels_name_their_classes():
    from datasets import ClassLabel

    dataset = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["no", "yes"])}))
    sink = pa.BufferOutputStream()
    pq.write_table(dataset.data.table, sink)
    (column,) = TableFacts.of([sink.getvalue().to_pybytes()]).to_dataset_info("x")["features"]
    assert column == {"name": "label", "dtype": {"class_label": {"names": {"0": "no", "1": "yes"}}}}


@pytest.mark.parametrize("trap", TRAPS)
def test_names_that_are_traps_of_yaml_come_back_as_they_are(trap):
    content = {"pretty_name": trap, "configs": [{"config_name": trap}], trap: 1}
    assert parse_header(dump_header(content)) == content


def test_what_yaml_1_2_reads_as_a_number_is_quoted():
    for text in ("1e3", "1E-3", ".5", "0o17", "12e03"):
        assert dump_header({"a": text}) == f"a: '{text}'\n"


# What the card shows works


def test_the_code_of_the_card_of_weights_works(tmp_path, monkeypatch):
    folder = weights_of(tmp_path / "artifact")
    with_us, without_us = code_of(read(folder), "python")
    domains = {name: Dataset.from_dict({"text": [name] * 5}) for name in ("wiki", "web", "code")}
    names = {"dataset": {"domain": ["wiki", "web", "code"] * 4}, "domains": domains}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    exec(with_us.replace("path/or/name", str(folder)), names)
    assert sorted({names["dataset"]["domain"][row] for row in names["sampler"]}) == ["code", "web", "wiki"]
    exec(without_us.replace("path/or/name", str(folder)), names)
    assert len(names["mixed"]) >= 5
    (sql,) = code_of(read(folder), "sql")
    found = run_sql(folder, sql, monkeypatch)
    weights = make_weights()
    assert [row[0] for row in found] == sorted(weights.names, key=weights.mean.get, reverse=True)
    for name, weight, times_natural in found:
        assert weight == weights.mean[name]
        assert times_natural == pytest.approx(weight / weights.natural_proportions[name], rel=1e-12)


@pytest.mark.parametrize("kind", INDICES)
def test_the_sql_of_the_card_of_an_index_gives_the_scores_of_an_example(tmp_path, monkeypatch, kind):
    folder, rows = index_of(tmp_path / "artifact", **INDICES[kind])
    (sql,) = code_of(read(folder), "sql")
    found = dict(run_sql(folder, sql.replace("example_id = 0", "example_id = 3"), monkeypatch))
    if kind == "projected":
        rows = [projected(one, folder) for one in rows]
    exact = sum(0.1 * dense_scores(next(iter(list(batches(one, 1))[3:])), one)[0] for one in rows)
    assert list(found) == sorted(found, key=found.get, reverse=True)
    assert next(iter(found)) == 3
    tolerance = {"float32": 1e-5, "projected": 1e-5, "float16": 1e-2, "int8": 0.1}[kind]
    for example, score in found.items():
        assert score == pytest.approx(exact[example], abs=tolerance * exact[3])
    assert len(found) == 10
    best = np.sort(exact[exact != 0])[-10:]  # of the examples that share a token
    assert exact[list(found)].min() >= best[0] - 2 * tolerance * exact[3]


def projected(rows, folder):
    from hf_doge.artifacts.influence.segments import recorded_projection
    from hf_doge.gradients.token_rows import TokenRows

    matrix = recorded_projection(read_config(folder))
    return TokenRows(rows.offsets, rows.tokens, rows.rows @ matrix, False)


def test_the_sql_of_an_index_of_scaled_rows_ranks_examples_by_size(tmp_path, monkeypatch):
    folder, _ = index_of(tmp_path / "artifact", settings={"second_moment": True})
    (sql,) = code_of(read(folder), "sql")
    sizes = [size for _, size in run_sql(folder, sql, monkeypatch)]
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)


def test_the_code_of_the_card_of_an_index_works(tmp_path, monkeypatch):
    folder, rows = index_of(tmp_path / "artifact")
    _, without_us = code_of(
        read(folder), "python"
    )  # tests/tracing/test_influence_index.py runs the first, which needs a model
    names = {}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    exec(without_us.replace("path/or/name", str(folder)), names)
    assert names["examples"]["text"][:] == [f"text {number}" for number in range(40)]
    found = {(row["checkpoint"], row["example_id"], row["token_id"]): row for row in names["gradients"]}
    assert len(found) == sum(len(one.tokens) for one in rows)
    for checkpoint, one in enumerate(rows):
        for example, (tokens, values) in enumerate(one):
            for token, value in zip(tokens.tolist(), values, strict=True):
                row = found[checkpoint, example, token]
                assert np.array(row["grad"]) / row["scale"] == pytest.approx(value.numpy(), abs=2e-3)


def test_with_a_repository_all_code_names_it(tmp_path):
    folder = weights_of(tmp_path / "weights")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.parquet")}
    card = weights_card(make_weights(), files, repo_id="me/mixture", model_id="me/proxy").merged_with(None)
    assert "path/or/name" not in card
    assert 'from_pretrained("me/mixture")' in card
    assert "FROM 'hf://datasets/me/mixture/weights/*.parquet'" in card
    assert "[me/proxy](https://huggingface.co/me/proxy)" in card
    assert "# Domain weights: mixture" in card
    folder, _ = index_of(tmp_path / "index")
    card = index_card(read_config(folder), folder, repo_id="me/index").merged_with(None)
    assert "path/or/name" not in card
    assert "'hf://datasets/me/index/gradients/*/*.parquet'" in card


def test_a_card_tells_of_limits_and_whom_to_cite(artifact):
    card = read(artifact)
    assert "## Limits" in card
    if (artifact / "config.json").exists():
        assert "reveals training data" in card
        for words in ("yeh2022first", "pruthi2020estimating", "papers/2202.11844", "papers/2002.08484", "redact_text"):
            assert words in card
    elif (artifact / "trajectory").exists():
        assert "fan2024doge" in card


@pytest.mark.parametrize("name", [*RECIPES, SWEEP, "uniform", "natural", "temperature", "unimax", "ngram_em"])
def test_the_card_says_how_weights_of_each_recipe_came_about(tmp_path, name):
    weights = DomainWeights({"wiki": 0.75, "web": 0.25}, recipe={"name": name})
    weights.save_pretrained(tmp_path)
    card = read(tmp_path)
    assert "as far as it was recorded" not in card
    is_learned = name in RECIPES
    assert ("Learned with a small proxy model by [DoGE]" in card) is is_learned
    assert ("  - doge\n" in card) is is_learned
    assert ("fan2024doge" in card) is is_learned


def test_a_redacted_index_says_so_and_does_not_offer_it(tmp_path):
    folder, _ = index_of(tmp_path / "index")
    card = index_card(read_config(folder), folder, redacted=True).merged_with(None)
    assert "were taken out" in card
    assert "redact_text" not in card
    assert "as they were" not in card


# The table and the plot


def test_every_name_keeps_to_its_cell_and_our_block_stays_whole(tmp_path):
    weights = DomainWeights.uniform(TRAPS)
    weights.save_pretrained(tmp_path / "artifact")
    card = read(tmp_path / "artifact")
    rows = [line for line in block_of(card).splitlines() if line.startswith("| ")][2 : 2 + len(TRAPS)]
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", row) for row in rows]
    assert {len(row) for row in cells} == {5}
    assert not any("<" in row for row in rows)
    DomainWeights.uniform(["a", *TRAPS]).save_pretrained(tmp_path / "artifact")  # without a warning
    assert "| a | " in read(tmp_path / "artifact")
    assert DomainWeights.from_pretrained(tmp_path / "artifact").names == ("a", *TRAPS)


def test_markup_of_others_is_shown_as_text():
    assert escape("a|b\\c <x> [l](u) *b* `c` _d_ e_f") == r"a\|b\\c &lt;x&gt; \[l\](u) \*b\* \`c\` \_d\_ e_f"
    assert escape(" a \n\t b ") == "a b"
    assert table({"x": ["a|b"], "y": [1]}) == "| x | y |\n| --- | ---: |\n| a\\|b | 1 |"
    assert code_block("a\n```\nb", "bash") == "````bash\na\n```\nb\n````"
    assert END not in code_block(END)


def test_arguments_in_the_card_cannot_end_our_block(tmp_path):
    weights = DomainWeights(
        {"a": 1.0},
        recipe={"name": "paper", "note": f"{END}\n```\n{BEGIN}", "arguments": {"mode": END}},
        metadata={"command": f"learn '{END}' ```", "model": {"config": {"x": BEGIN}}, "versions": {END: END}},
    )
    for _ in range(2):
        weights.save_pretrained(tmp_path / "artifact")  # the second merges with the first, without a warning
    assert block_of(read(tmp_path / "artifact")).endswith("```")
    (recipe, *_) = map(json.loads, code_of(read(tmp_path / "artifact"), "json"))
    assert recipe == {"name": "paper", "note": f"{END}\n```\n{BEGIN}"}


@pytest.mark.parametrize(
    "odd",
    [
        {"metadata": {"model": "proxy", "training": [], "versions": 3, "tokenizer": None, "dataset": "x"}},
        {"metadata": {"training": {"seconds": "long", "total_flos": "many", "num_tokens_seen": None}}},
        {"recipe": {"name": "paper", "arguments": 3}},
        {"recipe": {"arguments": []}},
        {"domains": {"a": {"fingerprint": 3, "num_rows": None}}},
    ],
)
def test_metadata_of_any_shape_makes_a_card(tmp_path, odd):
    DomainWeights({"a": 1.0}, **odd).save_pretrained(tmp_path / "artifact")
    assert "## Cost" in read(tmp_path / "artifact")


def test_the_card_tells_cost_data_and_command(tmp_path):
    weights = DomainWeights(
        {"a": 1.0},
        recipe={"name": "official", "arguments": {"mode": "proxy"}},
        domains={"a": {"num_rows": 7, "num_tokens": 700, "fingerprint": "abc"}},
        metadata={
            "command": "hf-doge learn --mu 0.1",
            "hf_doge_commit": "0123abc",
            "model": {"class": "Llama", "name_or_path": "me/proxy", "revision": "deadbeef", "num_parameters": 1234567},
            "dataset": {"sources": ["datasets/me/corpus@cafe"]},
            "training": {"seconds": 5400.0, "total_flos": 1.5e18, "num_tokens_seen": 12345, "global_step": 10},
            "objective": "target",
        },
    )
    weights.save_pretrained(tmp_path / "artifact")
    card = read(tmp_path / "artifact")
    for words in (
        "90 minutes", "1.5e+18 FLOPs", "12,345 tokens", "10 steps", "0123abc", "hf-doge learn --mu 0.1", "1,234,567 parameters",
        "[me/proxy](https://huggingface.co/me/proxy)", "deadbeef", "fingerprint abc", "the target that they were learned for",
        "[me/corpus@cafe](https://huggingface.co/datasets/me/corpus/tree/cafe)",
    ):  # fmt: skip
        assert words in card, words


def test_the_card_tells_of_the_data_where_nothing_else_is_known(tmp_path):
    DomainWeights({"a": 1.0}, domains={"a": {"num_rows": 7, "num_tokens": 700}}).save_pretrained(tmp_path / "told")
    assert "700 tokens" in read(tmp_path / "told")
    DomainWeights({"a": 1.0}).save_pretrained(tmp_path / "untold")
    assert "Nothing was recorded of where these weights come from." in read(tmp_path / "untold")


@pytest.mark.parametrize(("num_parts", "ends"), [(12, "`layer 11` (frozen"), (13, "`layer 11`, ... (frozen")])
def test_the_card_of_an_index_lists_a_dozen_frozen_layers(tmp_path, num_parts, ends):
    folder = write_index(tmp_path / "index", random_rows(8))
    config = read_config(folder)
    config["metadata"]["virtual_parts"] = [f"layer {number}" for number in range(num_parts)]
    assert ends in index_card(config, folder).merged_with(None)


def test_the_plot_is_in_the_folder_when_asked_for_and_goes_with_the_weights_it_shows(tmp_path):
    folder = tmp_path / "artifact"
    make_weights(0).save_pretrained(folder, plot=True)
    picture = (folder / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert b"matplotlib" not in picture.lower()
    assert picture == draw_plot(make_weights(0))
    assert "](plot.png)" in read(folder)
    assert DomainWeights.from_pretrained(folder) == make_weights(0)
    make_weights(1).save_pretrained(folder)
    assert not (folder / "plot.png").exists()
    assert "plot.png" not in read(folder)


def test_a_picture_of_that_name_that_is_not_ours_stays(tmp_path):
    folder = weights_of(tmp_path / "artifact")
    (folder / "plot.png").write_bytes(b"mine")
    make_weights(1).save_pretrained(folder)
    assert (folder / "plot.png").read_bytes() == b"mine"


def test_without_matplotlib_there_is_no_plot_and_no_error(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tests.artifacts.test_domain_weights import make_weights\n"
        f"make_weights().save_pretrained({str(tmp_path / 'artifact')!r}, plot=True)"
    )
    process = Fork(["-c", code], env=launch_environment())
    assert process.wait(timeout=120) == 0, process.output
    assert not (tmp_path / "artifact" / "plot.png").exists()


@pytest.mark.parametrize(
    "name", ["domain_weights", "influence_index", "universal_weights", "out_of_domain_weights", "case_deletion_index"]
)
def test_the_rendered_examples_have_the_sections_of_the_templates(tmp_path, name):
    example = (REPOSITORY / "model_cards" / name / "README.md").read_text(encoding="utf-8")
    fresh = weights_of(tmp_path / "artifact") if name.endswith("weights") else index_of(tmp_path / "artifact")[0]
    sections = re.findall(r"^## .*$", block_of(read(fresh)), flags=re.MULTILINE)
    assert re.findall(r"^## .*$", block_of(example), flags=re.MULTILINE) == sections
    assert {"configs", "dataset_info", "size_categories"} <= set(
        DatasetCardData(**parse_header(split_card(example)[0])).to_dict()
    )
    assert "/home/" not in example
    assert "hf_doge 0." in example


# What a person wrote stays


@pytest.fixture
def folder(tmp_path):
    return weights_of(tmp_path / "artifact")


OTHERS = make_weights(1, names=("wiki", "web", "law", "art"))


def rewrite(folder, change, *, weights=OTHERS):
    """Save other weights after a person's change of the card; the card before and after."""
    card = folder / "README.md"
    edited = change(read(folder))
    card.write_bytes(edited if isinstance(edited, bytes) else edited.encode())
    before = card.read_bytes()
    weights.save_pretrained(folder)
    return before, card.read_bytes()


def test_the_same_artifact_changes_no_byte_of_its_card(artifact):
    before = read(artifact)
    if (artifact / "config.json").exists():
        assert index_card(read_config(artifact), artifact).merged_with(before) == before
        return
    weights = DomainWeights.from_pretrained(artifact)
    weights.save_pretrained(artifact)
    assert read(artifact) == before


def test_lines_keys_and_configs_of_a_person_stay_in_the_yaml(folder):
    def edit(card):
        card = card.replace(
            "pretty_name: Domain weights", "# about me\nlicense: mit  # really\npretty_name: 'Mine: all'"
        )
        card = card.replace("  - data-mixing\n", "  - data-mixing\n  - mine\n").replace(
            "task_categories:\n  - text-generation\n", ""
        )
        own = "  - config_name: notes\n    data_files: notes/*.txt\nlanguage: [en, 'no']  # Norwegian\n\n# the end\n"
        return card.replace("dataset_info:\n", own + "dataset_info:\n", 1)

    (folder / "notes").mkdir()
    before, after = rewrite(folder, edit)
    text = after.decode()
    for line in (
        "# about me\nlicense: mit  # really\npretty_name: 'Mine: all'\n",
        "language: [en, 'no']  # Norwegian\n\n# the end\n",
    ):
        assert line in text
    header = yaml.safe_load(split_card(text)[0])
    assert [entry["config_name"] for entry in header["configs"]] == ["weights", "trajectory", "notes"]
    assert {"mine", "doge"} <= set(header["tags"])
    assert header["language"] == ["en", "no"]
    assert "task_categories" not in header  # a person took it out
    make_weights(1, with_trajectory=False).save_pretrained(folder)
    header = yaml.safe_load(split_card(read(folder))[0])
    assert [entry["config_name"] for entry in header["configs"]] == ["weights", "notes"]
    assert [entry["config_name"] for entry in header["dataset_info"]] == ["weights"]
    assert before != after


def test_a_persons_default_configuration_stays_the_only_one(folder):
    own = "configs:\n  - config_name: mine\n    default: true\n    data_files: x.csv\n"
    rewrite(folder, lambda card: card.replace("configs:\n", own, 1))
    header = yaml.safe_load(split_card(read(folder))[0])
    assert [entry["config_name"] for entry in header["configs"] if entry.get("default")] == ["mine"]


@pytest.mark.parametrize(
    "yaml_part", ["license: mit\n", "", "# only words\n", "tags: mine\n", "{license: mit, tags: [a]}\n"]
)
def test_a_card_of_yaml_alone_gets_the_rest(folder, yaml_part):
    rewrite(folder, lambda card: f"---\n{yaml_part}---\n")
    header = yaml.safe_load(split_card(read(folder))[0])
    assert header.get("license") == ("mit" if "mit" in yaml_part else None)
    assert "hf_doge" in header["tags"]
    assert header["tags"][0] in ("mine", "a", "hf_doge")
    assert block_of(read(folder))


def test_a_card_without_yaml_gets_it(folder):
    rewrite(folder, lambda card: f"# Mine\n\n{BEGIN}\nold\n{END}\nbelow")
    assert read(folder).startswith("---\nconfigs:")
    assert read(folder).endswith(f"{END}\nbelow")
    assert "# Mine" in read(folder)


def test_line_ends_and_bytes_of_a_person_stay(folder):
    _, after = rewrite(folder, lambda card: card.replace("\n", "\r\n").encode() + b"caf\xe9")
    assert after.endswith(b"caf\xe9")
    assert after.count(b"\n") == after.count(b"\r\n")


def test_a_byte_order_mark_does_not_hide_the_yaml(folder):
    rewrite(folder, lambda card: "\ufeff" + card)
    assert read(folder).startswith("---\n")
    assert read(folder).count("configs:") == 1


def without_digests(card):
    return re.sub(rb"Content [0-9a-f]{32}", b"", card)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda card: card.replace(END, ""), "markers are gone"),
        (lambda card: card.replace(BEGIN, ""), "markers are gone"),
        (lambda card: card + BEGIN, "markers are gone"),
        (lambda card: card.replace(END, BEGIN).replace(BEGIN, END, 1), "markers are gone"),
        (lambda card: "Mine alone.", "markers are gone"),
        (lambda card: card.replace("configs:", "configs: [", 1), "the YAML at its head cannot be read"),
        (lambda card: card.replace("---\n", "---\n- a\n- b\n---\n", 1), "no mapping of names"),
        (lambda card: card.replace("---\n", "---\n1: 2\n", 1), "no mapping of names"),
        (lambda card: card.replace("---\n", "---\nx: !!python/object/apply:os.getcwd []\n", 1), "cannot be read"),
    ],
)
def test_a_card_that_is_not_understood_is_kept_whole_with_the_yaml_it_needs(folder, change, reason):
    with pytest.warns(UserWarning, match=rf"(?s){reason}.*config_name: trajectory") as caught:
        before, after = rewrite(folder, change)
    assert without_digests(after) == without_digests(before)
    assert [Path(warning.filename).name for warning in caught] == ["test_cards.py"]
    assert DomainWeights.from_pretrained(folder) == OTHERS


def test_a_card_without_markers_but_with_all_the_yaml_is_no_reason_to_warn(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, after = rewrite(
            folder, lambda card: f"---\n{split_card(card)[0]}---\n# Mine alone\n", weights=make_weights(0)
        )
    assert after == before


def test_an_index_that_grows_keeps_a_persons_words_and_its_yaml_true(tmp_path):
    folder, rows = index_of(tmp_path / "index")
    card = folder / "README.md"
    card.write_text(read(folder).replace("# Influence index", "# Mine") + "\nbelow\n")
    writer = open_writer(folder)
    write_checkpoint(writer, rows[0], name="checkpoint-9", step=9)
    assert "# Mine" in read(folder)
    assert read(folder).endswith("\nbelow\n")
    assert "| checkpoint-9 |" in read(folder)
    loaded = load_dataset(str(folder), "gradients", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.info.splits["train"].num_examples == len(loaded)
    for name in ["checkpoint-9", "checkpoint-0"]:
        writer.forget(name)
        names = [one["config_name"] for one in header_of(folder)["configs"]]
    assert names == ["examples", "checkpoints"]


def test_references_in_a_persons_yaml_are_resolved_where_their_lines_cannot_stay():
    text = "tags: &t\n  - a\nother: *t\n"
    assert parse_header(update_header(text, {"tags": ["b"]})) == {"tags": ["b"], "other": ["a"]}


def test_a_new_key_comes_after_a_header_that_ends_without_a_line_break():
    assert update_header("a: 1", {"b": "2"}) == "a: 1\nb: '2'\n"
    assert update_header("a: 1\nb: |\n  x\n\n# c\nd: 2\n", {"b": "y"}) == "a: 1\nb: y\n\n# c\nd: 2\n"
    assert update_header("", {}) == ""


def test_a_card_of_nothing_is_a_new_card():
    card = Card({"tags": ["x"]}, "Title", "Body", ())
    assert (
        card.merged_with(None)
        == card.merged_with(" \n")
        == f"---\ntags:\n  - x\n---\n\n# Title\n\n{BEGIN}\n\nBody\n\n{END}\n"
    )


# What is saved over is never read old


def loaded_table(folder, name, cache):
    return load_dataset(str(folder), name, split="train", cache_dir=str(cache)).to_dict()


@pytest.mark.filterwarnings("ignore:README.md was edited")
@pytest.mark.parametrize(
    "edit", [str, lambda card: card.replace(END, ""), lambda card: "\r\n".join(card.splitlines())]
)
def test_what_is_saved_over_is_never_read_old(tmp_path, edit):
    folder, cache = tmp_path / "artifact", tmp_path / "cache"
    for seed in (0, 1, 2, 0):
        make_weights(seed).save_pretrained(folder)
        (folder / "README.md").write_bytes(edit(read(folder)).encode())
        for name in ("weights", "trajectory"):
            fresh = pq.read_table(next((folder / name).iterdir()), use_threads=False).to_pydict()
            assert loaded_table(folder, name, cache)["weight"] == fresh["weight"]


def test_folders_of_one_name_with_other_weights_are_read_apart(tmp_path):
    read_back = []
    for seed in (0, 1):
        make_weights(seed).save_pretrained(tmp_path / str(seed) / "artifact")
        read_back.append(loaded_table(tmp_path / str(seed) / "artifact", "weights", tmp_path / "cache"))
    assert read_back[0] != read_back[1]


def test_every_table_of_an_index_changes_its_card_with_its_content(tmp_path):
    folder = index_of(tmp_path / "index")[0]
    config = read_config(folder)
    before = {entry["config_name"]: entry for entry in header_of(folder)["configs"]}
    changed = json.loads(json.dumps(config))
    for file in changed["checkpoints"][-1]["files"]:
        file["sha256"], file["offsets_sha256"] = "0" * 64, "1" * 64
    changed["files"] = dict.fromkeys(changed["files"], "2" * 64)
    after = {
        entry["config_name"]: entry
        for entry in parse_header(split_card(index_card(changed, folder).merged_with(None))[0])["configs"]
    }
    assert before.keys() == after.keys() == {"gradients", "examples", "checkpoints", "offsets"}
    for name, entry in before.items():
        assert entry["data_files"] == after[name]["data_files"]
        assert entry != after[name]


def test_a_card_of_many_domains_is_short_and_says_what_it_leaves_out(tmp_path):
    names = [f"domain {number}" for number in range(20_000)]
    facts = {name: {"num_tokens": 5, "fingerprint": name} for name in names}
    recipe = {"name": "paper", "arguments": {"initial": dict.fromkeys(names, 1)}}
    weights = DomainWeights.from_mapping(dict.fromkeys(names, 1), domains=facts, recipe=recipe)
    weights.save_pretrained(tmp_path)
    card = read(tmp_path)
    assert len(card) < 50_000
    assert "19,800 more rows are left out here" in card
    assert "more lines are left out here" in card
    assert "and 19,992 more" in card
    assert pq.read_metadata(next((tmp_path / "weights").iterdir())).num_rows == 20_000


def test_the_picture_of_a_card_shows_the_heaviest_of_many_domains():
    from hf_doge.plots import plot_domain_weights

    weights = DomainWeights.from_mapping({f"domain {number}": number + 1 for number in range(300)})
    (axes,) = plot_domain_weights(weights, max_domains=50).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"domain {299 - n}" for n in range(50)]
    assert axes.get_xlabel() == "weight (250 lighter domains are not shown)"
    assert draw_plot(weights).startswith(b"\x89PNG")
