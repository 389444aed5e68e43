"""Exported weights are read back: as JSON and YAML, and by the framework's own loader where it is installed."""

import inspect
import json

import pytest
import yaml
from datasets import Dataset, interleave_datasets

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.export import FORMS
from hf_doge.cli import main

RATIOS = {"wiki": 5, "no": 2, "1e3": 1, "zero": 0}
SHARES = {"wiki": 0.625, "no": 0.25, "1e3": 0.125}
PATHS = {"wiki": "/data/wiki.jsonl.gz", "no": "owner/no", "1e3": "/data/1e3.parquet"}
ROWS = {"wiki": 1000, "no": 1000, "1e3": 100}


def weights():
    return DomainWeights.from_mapping(RATIOS)


def export(form, **changes):
    arguments = {"paths": PATHS} if FORMS[form].holds_paths else {}
    arguments |= {"num_rows": ROWS} if FORMS[form].needs_rows else {}
    return weights().export(form, **{**arguments, **changes})


# What each framework reads. An independent reader of each form: our weights by domain or by path.


def by_path(pairs):
    names = {path: name for name, path in PATHS.items()}
    return {names[path]: float(weight) for path, weight in pairs}


def of_blend(words):
    return by_path(zip(words[1::2], words[::2], strict=True))


def of_trl(text):
    entries = yaml.safe_load(text)["datasets"]
    return by_path((entry.get("data_files", [entry["path"]])[0], entry["fraction"]) for entry in entries)


def of_axolotl(text):
    entries = yaml.safe_load(text)["datasets"]
    rows = {entry["path"]: int(entry["split"].removeprefix("train[:").removesuffix("]")) for entry in entries}
    return by_path((path, count / sum(rows.values())) for path, count in rows.items())


def of_named(content, names, weights):
    return dict(zip(content[names], content[weights], strict=True))


def of_llama_factory(text):
    content = yaml.safe_load(text)
    assert content["mix_strategy"] == "interleave_over"
    return dict(zip(content["dataset"].split(","), map(float, content["interleave_probs"].split(",")), strict=True))


def of_swift(text):
    content = yaml.safe_load(text)
    return by_path(zip(content["dataset"], content["interleave_prob"], strict=True))


def of_streams(text):
    streams = yaml.safe_load(text)["streams"]
    assert by_path((stream["local"], stream["proportion"]) for stream in streams.values()) == SHARES
    return {name: stream["proportion"] for name, stream in streams.items()}


def of_sources(text):
    sources = yaml.safe_load(text)["sources"]
    assert {source["source_name"]: source["paths"] for source in sources} == {
        name: [path] for name, path in PATHS.items()
    }
    return {source["source_name"]: source["target_ratio"] for source in sources}


def of_levanter(text):
    data = yaml.safe_load(text)["data"]
    assert data["components"]["no"]["source"] == {"type": "hf", "id": "owner/no"}
    assert data["components"]["wiki"]["source"] == {"type": "url", "train_urls": ["/data/wiki.jsonl.gz"]}
    assert set(data["components"]) == set(data["train_weights"])
    return data["train_weights"]


READERS = {
    "axolotl": of_axolotl,
    "datasets": lambda text: of_named(json.loads(text), "names", "probabilities"),
    "levanter": of_levanter,
    "llama-factory": of_llama_factory,
    "megatron": lambda text: of_blend(text.split()),
    "mosaic-streaming": of_streams,
    "ms-swift": of_swift,
    "nemo": lambda text: of_blend(json.loads(text)),
    "olmo-core": of_sources,
    "trl": of_trl,
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_back_are_the_weights_without_those_that_are_0(form):
    read = READERS[form](export(form))
    assert list(read) == list(SHARES)
    assert read == pytest.approx(SHARES, rel=0.01 if form == "axolotl" else 1e-15)  # axolotl's are whole rows


@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_what_is_returned(form, tmp_path):
    text = export(form, path=tmp_path / "mixture.txt")
    assert (tmp_path / "mixture.txt").read_text(encoding="utf-8") == text
    assert text.endswith("\n")


@pytest.mark.parametrize("form", FORMS)
def test_the_form_says_where_it_is_published(form):
    source = inspect.getdoc(FORMS[form].write)
    assert ".py" in source or "https://" in source


def test_names_stay_text_for_readers_of_yaml_1_2():
    assert "'1e3':" in export("levanter")  # OmegaConf would read 1e3 as 1000.0, PyYAML does not


def test_datasets_draws_by_what_is_exported():
    arguments = json.loads(export("datasets"))
    names = arguments.pop("names")
    mixed = interleave_datasets([Dataset.from_dict({"d": [name] * 400}) for name in names], seed=0, **arguments)
    drawn = mixed["d"][:1000]
    assert {name: drawn.count(name) / 1000 for name in names} == pytest.approx(SHARES, abs=0.05)


def test_trl_loads_what_is_exported(tmp_path):
    utils = pytest.importorskip("trl.scripts.utils")
    if "fraction" not in utils.DatasetConfig.__dataclass_fields__:
        pytest.skip("this version of trl has no fractions")
    paths = {}
    for name in SHARES:
        paths[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name}) + "\n" for _ in range(400)))
    config = utils.DatasetMixtureConfig(**yaml.safe_load(weights().export("trl", paths=paths)))
    texts = utils.get_dataset(config)["train"]["text"]
    assert {name: texts.count(name) for name in SHARES} == {"wiki": 400, "no": 160, "1e3": 80}


def test_axolotl_repeats_no_row_and_uses_up_one_domain():
    rows = [entry["split"] for entry in yaml.safe_load(export("axolotl"))["datasets"]]
    assert rows == ["train[:500]", "train[:200]", "train[:100]"]  # the third has 100 rows


def test_domains_may_have_several_files_where_the_form_holds_them():
    several = {**PATHS, "wiki": ["/data/a.jsonl", "/data/b.jsonl"]}
    (wiki, *_) = yaml.safe_load(export("olmo-core", paths=several))["sources"]
    assert wiki["paths"] == ["/data/a.jsonl", "/data/b.jsonl"]
    (wiki, *_) = yaml.safe_load(export("trl", paths=several))["datasets"]
    assert wiki["data_files"] == ["/data/a.jsonl", "/data/b.jsonl"]
    with pytest.raises(ValueError, match="'megatron' holds one path of each domain, but `paths` has 2 of 'wiki'"):
        export("megatron", paths=several)


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].holds_paths])
def test_a_missing_path_is_told_by_its_domain(form):
    with pytest.raises(ValueError, match=rf"'{form}' needs the path .* but `paths` lacks \['no', '1e3'\]"):
        export(form, paths={"wiki": "/data/wiki"})


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("megatrom", {"paths": PATHS}, "`format` must be one of"),
        (
            "megatron",
            {"paths": {**PATHS, "no": "/my data/no"}},
            r"white space, so none may hold any, but those of \['no'\]",
        ),
        ("megatron", {"paths": {**PATHS, "other": "/x"}}, "must be of the domains .* but has .*'other'"),
        ("megatron", {"paths": {**PATHS, "no": ""}}, r"`paths\['no'\]` must be a path"),
        ("megatron", {"paths": {**PATHS, "no": []}}, "but `paths` has 0 of 'no'"),
        ("megatron", {"paths": ["/x"]}, "`paths` must be a dict"),
        ("megatron", {"paths": PATHS, "num_rows": ROWS}, "Leave out `num_rows`"),
        ("datasets", {"paths": PATHS}, "Leave out `paths`"),
        ("llama-factory", {"paths": PATHS}, "Leave out `paths`"),
        ("axolotl", {"paths": PATHS}, r"needs the number of rows .* `num_rows` lacks \['wiki', 'no', '1e3'\]"),
        ("axolotl", {"paths": PATHS, "num_rows": {**ROWS, "no": 0}}, r"`num_rows\['no'\]` must be at least 1"),
        ("axolotl", {"paths": PATHS, "num_rows": {"wiki": 1, "no": 1, "1e3": 1}}, r"\['no', '1e3'\] would have none"),
        ("trl", {"paths": {**PATHS, "no": ["a/b", "c/d"]}}, "files or one data set of the Hub"),
        ("axolotl", {"paths": {**PATHS, "no": ["a/b", "c/d"]}, "num_rows": ROWS}, "files or one data set of the Hub"),
        ("levanter", {"paths": {**PATHS, "no": ["a/b", "c/d"]}}, "files or one data set of the Hub"),
    ],
)
def test_what_cannot_be_exported_is_refused(form, changes, message):
    with pytest.raises(ValueError, match=message):
        weights().export(form, **changes)


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("llama-factory", "a,b", r"separates names by commas .* \['a,b'\]"),
        ("llama-factory", " a", r"begin or end with a space"),
        ("levanter", "a/b", r"none may hold a slash, but \['a/b'\]"),
        ("levanter", "..", r"none may hold a slash, but \['..'\]"),
    ],
)
def test_a_name_that_the_form_cannot_hold_is_refused(form, name, message):
    mixture = DomainWeights.uniform([name, "other"])
    paths = {"paths": {name: "/x", "other": "/y"}} if FORMS[form].holds_paths else {}
    with pytest.raises(ValueError, match=message):
        mixture.export(form, **paths)


def test_what_is_refused_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "mixture.yaml").write_text("mine")
    with pytest.raises(ValueError, match="lacks"):
        weights().export("trl", path=tmp_path / "mixture.yaml")
    assert (tmp_path / "mixture.yaml").read_text() == "mine"


# The command


def test_the_command_prints_and_writes_what_the_method_returns(tmp_path, capsys):
    weights().save_pretrained(tmp_path / "domain_weights")
    paths = [f"{name}={path}" for name, path in PATHS.items()]
    assert main(["export", str(tmp_path), "--format", "trl", "--paths", *paths]) == 0
    assert capsys.readouterr().out == export("trl")
    written = ["--output", str(tmp_path / "out" / "blend.txt")]
    assert main(["export", str(tmp_path), "--format", "megatron", "--paths", *paths, *written]) == 0
    assert (tmp_path / "out" / "blend.txt").read_text() == export("megatron")


def test_the_command_takes_several_files_and_numbers_of_rows(tmp_path, capsys):
    (tmp_path / "w.json").write_text('{"a": 1, "b": 1}')
    command = [
        "export",
        str(tmp_path / "w.json"),
        "--format",
        "axolotl",
        "--paths",
        "a=/x.jsonl",
        "a=/y.jsonl",
        "b=c/d",
    ]
    assert main([*command, "--num_rows", "a=10", "b=20"]) == 0
    first, _ = yaml.safe_load(capsys.readouterr().out)["datasets"]
    assert first["data_files"] == ["/x.jsonl", "/y.jsonl"]
    assert first["split"] == "train[:10]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paths", "wiki"], "NAME=VALUE, but got 'wiki'"),
        (["--paths", "wiki=/x"], "needs the path of its data"),
        (["--paths", "a=/x", "b=/y", "--num_rows", "a=ten"], "Leave out `num_rows`"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, words, message):
    (tmp_path / "w.json").write_text('{"a": 1, "b": 1}')
    assert main(["export", str(tmp_path / "w.json"), "--format", "megatron", *words]) == 2
    assert message in capsys.readouterr().err


# Results of others


def test_the_result_of_olmix_is_read(tmp_path):
    rows = [{"domain": "dclm:science", "weight": 0.75}, {"domain": "wiki", "weight": 0.25}]
    (tmp_path / "opt_avg_all_metrics_log_linear_reg_optimal.json").write_text(json.dumps(rows))
    found = DomainWeights.from_file(tmp_path / "opt_avg_all_metrics_log_linear_reg_optimal.json")
    assert found.mean == {"dclm:science": 0.75, "wiki": 0.25}
    assert found.metadata["source_format"] == "olmix"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"domain": "a", "weight": 1}, {"domain": "a", "weight": 2}]', "'a' stands twice"),
        ('[{"domain": "a", "weight": -1}, {"domain": "b", "weight": 2}]', "domain 'a' has -1"),
        ('[{"domain": "a"}]', "must map domain names to ratios"),
        ('[{"domain": 3, "weight": 1}]', "must map domain names to ratios"),
        ("[]", "must map domain names to ratios"),
    ],
)
def test_a_bad_result_of_olmix_is_refused(tmp_path, text, message):
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DomainWeights.from_file(tmp_path / "w.json")


def test_every_form_is_named_in_the_docstring_of_export():
    named = inspect.getdoc(DomainWeights.export)
    assert all(f"`{form}`" in named for form in FORMS)
