"""DomainWeights: what it accepts, how it survives crashes, and whose files it reads."""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_doge.artifacts import DomainWeights, Trajectory
from hf_doge.artifacts.cards.weights import weights_card
from hf_doge.artifacts.domain_weights import artifact_files
from tests.artifacts.odd_json import ODD, places, put_in
from tests.forks import Fork
from tests.launch import REPOSITORY, launch_environment
from tests.test_text import is_harmless

TABLES = ["weights/train-00000-of-00001.parquet", "trajectory/train-00000-of-00001.parquet"]


def make_trajectory(names=("wiki", "web", "code"), *, num_steps=5, seed=0):
    generator = np.random.default_rng(seed)
    shape = (num_steps, len(names))
    weights = generator.dirichlet(np.ones(len(names)), size=num_steps)
    scores, losses = generator.normal(size=shape), generator.exponential(size=shape)
    scores[1, 0] = losses[1, 0] = np.nan
    return Trajectory(
        names, np.arange(1, num_steps + 1) * 10, generator.uniform(size=num_steps), weights, scores, losses
    )


def test_weights_are_read_like_the_dict_of_their_means():
    weights = DomainWeights({"wiki": 0.75, "web": 0.25}, last={"wiki": 0.5, "web": 0.5})
    assert (weights["web"], list(weights), len(weights), "wiki" in weights) == (0.25, ["wiki", "web"], 2, True)
    assert dict(weights) == weights.mean
    assert dict(weights) is not weights.mean
    with pytest.raises(KeyError, match="code"):
        weights["code"]


def make_weights(seed=0, *, names=("wiki", "web", "code"), with_trajectory=True):
    trajectory = make_trajectory(names, seed=seed)
    return DomainWeights(
        dict(zip(names, trajectory.weights.mean(axis=0).tolist(), strict=True)),
        last=dict(zip(names, trajectory.weights[-1].tolist(), strict=True)),
        trajectory=trajectory if with_trajectory else None,
        recipe={"name": "paper", "mu": 0.01, "score_max": None},
        domains={name: {"num_rows": 10 * (i + 1), "num_tokens": 1000 * (i + 1)} for i, name in enumerate(names)},
        metadata={"model": "proxy", "seed": seed},
    )


# What is a mixture


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "0.5", None, True])
def test_a_weight_that_is_no_finite_number_of_at_least_0_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"`mean` must be finite numbers >= 0, but domain 'web' has"):
        DomainWeights({"wiki": 0.5, "web": bad})


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        ({}, "Domain names must be given, but got none"),
        ({"wiki": 0.0, "web": 0.0}, r"positive sum, but all of \['wiki', 'web'\] are 0"),
        ({"wiki": 0.5, "web": 0.6}, r"must sum to 1, but it sums to 1.1.*from_mapping"),
        ({"wiki": 0.5, "web": 0.5 + 2e-6}, "must sum to 1"),
        ({"": 1.0}, "non-empty strings, but got ''"),
        ({3: 1.0}, r"non-empty strings, but got 3 \(int\)"),
    ],
)
def test_a_mean_off_the_simplex_is_refused(mean, message):
    with pytest.raises(ValueError, match=message):
        DomainWeights(mean)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("last", {"wiki": 0.5, "books": 0.5}),
        ("domains", {"wiki": {}, "books": {}}),
        ("trajectory", make_trajectory(("wiki", "books"))),
    ],
)
def test_another_set_of_domains_is_refused_by_name(argument, value):
    with pytest.raises(
        ValueError, match=rf"`{argument}` must have the domains .* lacks \['web'\] and adds \['books'\]"
    ):
        DomainWeights({"wiki": 0.5, "web": 0.5}, **{argument: value})


@pytest.mark.parametrize("key", ["num_rows", "num_tokens"])
@pytest.mark.parametrize("bad", [-1, 2.5, "7"])
def test_a_count_that_is_no_integer_of_at_least_0_is_refused_by_name(key, bad):
    with pytest.raises(ValueError, match=f"`{key}` of domain 'wiki' must be an integer >= 0"):
        DomainWeights({"wiki": 1.0}, domains={"wiki": {key: bad}})


@pytest.mark.parametrize("bad", [math.inf, {1, 2}, Path("x"), b"x"])
def test_a_recipe_that_json_cannot_hold_is_refused_before_there_is_anything_to_save(bad):
    with pytest.raises(ValueError, match="`recipe` must hold strings, finite numbers"):
        DomainWeights({"wiki": 1.0}, recipe={"name": "paper", "bound": bad})


def test_weights_on_the_simplex_stay_exactly_as_they_are():
    mean = {"b": 0.1 + 0.2, "a": 0.7, "c": 1e-9}
    assert DomainWeights(mean).mean == mean
    assert DomainWeights(mean).names == ("b", "a", "c")
    assert DomainWeights(mean).last == mean


def test_from_mapping_keeps_ratios_and_sums_to_one():
    generator = np.random.default_rng(0)
    for _ in range(50):
        ratios = {f"d{i}": float(10 ** generator.uniform(-8, 8)) for i in range(generator.integers(1, 30))}
        mean = DomainWeights.from_mapping(ratios).mean
        assert math.fsum(mean.values()) == pytest.approx(1.0, abs=1e-12)
        scale = next(iter(ratios.values())) / next(iter(mean.values()))
        assert {name: weight * scale for name, weight in mean.items()} == pytest.approx(ratios, rel=1e-12)


def test_entropy_is_zero_for_one_domain_and_log_k_for_uniform_weights():
    assert DomainWeights({"wiki": 1.0, "web": 0.0}).entropy == 0.0
    uniform = DomainWeights.uniform(["a", "b", "c"])
    assert uniform.entropy == pytest.approx(math.log(3)) == pytest.approx(uniform.max_entropy)
    assert DomainWeights.from_mapping(SLIMPAJAMA).entropy == pytest.approx(
        1.804, abs=5e-4
    )  # as the paper's weights have


SLIMPAJAMA = {
    "arxiv": 0.088, "book": 0.045, "c4": 0.269, "cc": 0.214, "github": 0.070, "stackexchange": 0.166, "wikipedia": 0.148,
}  # fmt: skip


def test_natural_weights_are_proportional_to_tokens():
    weights = make_weights()
    assert DomainWeights.natural(weights.domains).mean == pytest.approx({"wiki": 1 / 6, "web": 2 / 6, "code": 3 / 6})
    assert weights.natural_proportions == DomainWeights.natural(weights.domains).mean
    assert DomainWeights.uniform(weights.domains).domains == weights.domains
    assert DomainWeights({"wiki": 1.0}).natural_proportions is None
    with pytest.raises(ValueError, match=r"domains \['web'\] have none"):
        DomainWeights.natural({"wiki": {"num_tokens": 3}, "web": {}})


def test_natural_weights_repeat_every_domain_equally_often():
    weights = DomainWeights.natural(make_weights().domains)
    assert weights.expected_epochs(12_000) == pytest.approx({"wiki": 2.0, "web": 2.0, "code": 2.0})


def test_expected_epochs_refuses_a_weighted_domain_without_tokens():
    domains = {"wiki": {"num_tokens": 100}, "web": {"num_tokens": 0}, "code": {}}
    assert DomainWeights({"wiki": 1.0, "web": 0.0, "code": 0.0}, domains=domains).expected_epochs(50) == {
        "wiki": 0.5, "web": 0.0, "code": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"must have `num_tokens` > 0, but \['web', 'code'\] have \[0, None\]"):
        DomainWeights({"wiki": 0.2, "web": 0.4, "code": 0.4}, domains=domains).expected_epochs(50)
    with pytest.raises(ValueError, match="at least 0, but got -1"):
        DomainWeights({"wiki": 1.0}).expected_epochs(-1)


def test_weights_are_equal_when_all_they_know_is_equal():
    assert make_weights(0) == make_weights(0)
    assert make_weights(0) != make_weights(1)
    assert make_weights(0) != make_weights(0, with_trajectory=False)
    assert make_weights(0) != "weights"


def test_repr_names_the_heaviest_domains_first():
    assert repr(DomainWeights({"wiki": 0.25, "web": 0.75})) == "DomainWeights(web: 0.7500, wiki: 0.2500)"
    assert repr(DomainWeights.uniform([f"d{i}" for i in range(11)])).endswith(", and 3 more)")


# The trajectory


def test_a_trajectory_survives_the_table_bit_for_bit_in_any_row_order():
    for seed in range(10):
        trajectory = make_trajectory([f"d{i}" for i in range(1 + seed)], num_steps=2 + seed, seed=seed)
        table = trajectory.to_table()
        assert table.column_names == ["step", "domain", "weight", "score", "loss", "learning_rate"]
        assert table.num_rows == trajectory.weights.size
        assert Trajectory.from_table(table) == trajectory
        order = np.random.default_rng(seed).permutation(table.num_rows)
        shuffled = Trajectory.from_table(table.take(order))
        columns = [shuffled.domains.index(name) for name in trajectory.domains]
        for name in ("weights", "scores", "losses"):
            np.testing.assert_array_equal(getattr(shuffled, name)[:, columns], getattr(trajectory, name))
        np.testing.assert_array_equal(shuffled.learning_rates, trajectory.learning_rates)


def test_each_row_of_the_table_is_one_point_of_the_trajectory():
    trajectory = make_trajectory()
    for number, row in enumerate(trajectory.to_table().to_pylist()):
        step, domain = divmod(number, 3)
        assert row["step"] == trajectory.steps[step]
        assert row["domain"] == trajectory.domains[domain]
        assert row["learning_rate"] == trajectory.learning_rates[step]
        expected = [trajectory.weights[step, domain], trajectory.scores[step, domain], trajectory.losses[step, domain]]
        np.testing.assert_array_equal([row["weight"], row["score"], row["loss"]], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["loss"]), r"must have the columns .*loss \(double\).*, but got"),
        (lambda table: table.set_column(2, "weight", pa.array(["x"] * table.num_rows)), "must have the columns"),
        (lambda table: table.slice(1), "domain 'wiki' is there 0 times at step 10"),
        (lambda table: pa.concat_tables([table, table.slice(4, 1)]), "domain 'web' is there 2 times at step 20"),
        (lambda table: table.set_column(1, "domain", pa.nulls(table.num_rows, pa.string())), "some have null"),
    ],
)
def test_a_table_that_is_no_trajectory_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Trajectory.from_table(change(make_trajectory().to_table()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": np.array([], dtype=int)}, "`steps` must be a flat array of at least one step"),
        ({"steps": np.array([1, 2, 2, 3, 4])}, "increasing, but got"),
        ({"scores": np.zeros((5, 2))}, r"`scores` must have the shape \(5, 3\) .*, but has \(5, 2\)"),
        ({"learning_rates": np.zeros(4)}, r"`learning_rates` must have the shape \(5,\)"),
        ({"weights": np.full((5, 3), np.nan)}, "domain 'wiki' has nan at step 10"),
        ({"mus": np.ones(4)}, r"`mus` must have the shape \(5,\)"),
        ({"mus": np.array([1, 1, 0, 1, 1])}, "`mus` must be above 0 and finite"),
        ({"mus": np.array([1, 1, np.nan, 1, 1])}, "`mus` must be above 0 and finite"),
        ({"domains": ("wiki", "web", "wiki")}, r"different, but \['wiki'\] appear more than once"),
        ({"domains": ("wiki", "web", " ")}, "non-empty strings, but got ' '"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(**(vars(make_trajectory()) | change))


def test_a_mu_that_is_no_number_is_refused_with_the_columns_of_a_trajectory_that_has_one():
    trajectory = make_trajectory()
    trajectory.mus = np.ones(5)
    table = trajectory.to_table()
    damaged = table.set_column(6, "mu", pa.array(["much"] * len(table)))
    with pytest.raises(ValueError, match=r"must have the columns .*, mu \(double\), but got .* mu \(string\)"):
        Trajectory.from_table(damaged)


# The folder


def test_what_is_saved_is_what_is_loaded(tmp_path):
    variants = [make_weights(), make_weights(with_trajectory=False), DomainWeights.uniform(["z", "a", "ü|`$"])]
    variants.append(make_weights())
    variants[-1].trajectory.mus = np.array([1.0, 0.5, 0.25, 0.2, 0.1])
    assert variants[-1] != variants[0]
    for number, weights in enumerate(variants):
        weights.save_pretrained(tmp_path / str(number))
        loaded = DomainWeights.from_pretrained(tmp_path / str(number))
        assert loaded == weights
        assert loaded.names == weights.names
    assert (tmp_path / "0" / TABLES[1]).exists()
    assert not (tmp_path / "1" / "trajectory").exists()


def test_the_output_folder_of_a_run_is_read_as_the_weights_in_it(tmp_path):
    run = tmp_path / "run"
    make_weights().save_pretrained(run / "domain_weights")
    assert DomainWeights.from_pretrained(run) == make_weights()
    with pytest.raises(FileNotFoundError, match=r"must hold domain_weights\.json, but"):
        DomainWeights.from_pretrained(tmp_path)
    make_weights(1).save_pretrained(tmp_path / "own")
    shutil.copytree(run / "domain_weights", tmp_path / "own" / "domain_weights")
    assert DomainWeights.from_pretrained(tmp_path / "own") == make_weights(1)


def test_plain_ratios_in_the_output_folder_of_a_run_do_not_hide_its_weights(tmp_path):
    make_weights().save_pretrained(tmp_path / "domain_weights")
    plain = tmp_path / "domain_weights.json"
    plain.write_text('{"wiki": 0.5, "web": 0.5}')
    assert DomainWeights.from_pretrained(tmp_path) == make_weights()
    assert DomainWeights.from_file(plain).mean == {"wiki": 0.5, "web": 0.5}
    for damaged in ('{"format_version": "1.0"}', "{"):
        plain.write_text(damaged)
        with pytest.raises(ValueError, match=r"domain_weights.json"):
            DomainWeights.from_pretrained(tmp_path)


def test_the_saved_json_is_readable_sorted_and_carries_versions_and_checksums(tmp_path):
    make_weights().save_pretrained(tmp_path / "artifact")
    text = (tmp_path / "artifact" / "domain_weights.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert text == json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert manifest["format_version"] == "1.0"
    assert manifest["hf_doge_version"]
    assert manifest["files"] == {
        name: hashlib.sha256((tmp_path / "artifact" / name).read_bytes()).hexdigest() for name in TABLES
    }
    assert str(tmp_path) not in text


def test_the_same_weights_make_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make_weights().save_pretrained(tmp_path / name)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_load_dataset_opens_weights_and_trajectory(tmp_path):
    from datasets import get_dataset_config_names, load_dataset

    weights = make_weights()
    weights.save_pretrained(tmp_path / "artifact")
    folder, cache = str(tmp_path / "artifact"), str(tmp_path / "cache")
    assert get_dataset_config_names(folder) == ["weights", "trajectory"]
    table = load_dataset(folder, "weights", split="train", cache_dir=cache)
    assert table["domain"][:] == ["wiki", "web", "code"]
    assert table["weight"][:] == list(weights.mean.values())
    assert table["last_weight"][:] == list(weights.last.values())
    assert table["natural_proportion"][:] == list(weights.natural_proportions.values())
    assert table["num_rows"][:] == [10, 20, 30]
    assert table["num_tokens"][:] == [1000, 2000, 3000]
    assert load_dataset(folder, split="train", cache_dir=cache)["domain"][:] == ["wiki", "web", "code"]  # the default
    trajectory = load_dataset(folder, "trajectory", split="train", cache_dir=cache)
    assert Trajectory.from_table(trajectory.data.table) == weights.trajectory


def test_load_dataset_knows_no_trajectory_where_none_was_recorded(tmp_path):
    from datasets import get_dataset_config_names, load_dataset

    weights = DomainWeights.uniform(["wiki", "web"])
    weights.save_pretrained(tmp_path / "artifact")
    assert get_dataset_config_names(str(tmp_path / "artifact")) == ["weights"]
    table = load_dataset(str(tmp_path / "artifact"), "weights", split="train", cache_dir=str(tmp_path / "cache"))
    assert table[0] == {
        "domain": "wiki", "weight": 0.5, "last_weight": 0.5,
        "natural_proportion": None, "num_rows": None, "num_tokens": None,
    }  # fmt: skip


def test_saving_again_replaces_the_artifact_and_leaves_other_files_alone(tmp_path):
    folder = tmp_path / "artifact"
    make_weights(0).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "trajectory" / "sketch.png").write_text("mine too")
    make_weights(1, with_trajectory=False).save_pretrained(folder)
    assert DomainWeights.from_pretrained(folder) == make_weights(1, with_trajectory=False)
    assert sorted(_contents(folder)) == [
        "README.md", "domain_weights.json", "notes.txt", "trajectory/sketch.png", TABLES[0],
    ]  # fmt: skip
    (folder / "trajectory" / "sketch.png").unlink()
    make_weights(1, with_trajectory=False).save_pretrained(folder)
    assert not (folder / "trajectory").exists()


def test_what_a_person_writes_around_our_block_of_the_readme_stays(tmp_path):
    folder = tmp_path / "artifact"
    make_weights(1).save_pretrained(folder)
    first = (folder / "README.md").read_text(encoding="utf-8")
    edited = first.replace("# Domain weights", "# The weights of our model") + "\nWritten below.\n"
    (folder / "README.md").write_text(edited, encoding="utf-8")
    make_weights(2).save_pretrained(folder)
    renewed = (folder / "README.md").read_text(encoding="utf-8")
    assert "# The weights of our model" in renewed
    assert renewed.endswith("\nWritten below.\n")
    make_weights(1).save_pretrained(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == edited


def test_an_edited_readme_that_names_other_files_is_kept_with_a_warning(tmp_path):
    folder = tmp_path / "artifact"
    make_weights(0).save_pretrained(folder)
    (folder / "README.md").write_text("Mine alone.", encoding="utf-8")
    with pytest.warns(UserWarning, match="(?s)README.md was edited.*it is kept as it is.*config_name: weights"):
        make_weights(1).save_pretrained(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "Mine alone."


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "report.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no domain_weights.json and holds \['report.txt'\]. Choose another"):
        make_weights().save_pretrained(tmp_path)
    assert _contents(tmp_path) == {"report.txt": b"years of work"}


def test_a_weights_file_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "domain_weights.json").write_text('{"wiki": 0.5, "web": 0.5}')
    with pytest.raises(ValueError, match=r"must have a `format_version`.*from_file"):
        make_weights().save_pretrained(tmp_path)
    assert _contents(tmp_path) == {"domain_weights.json": b'{"wiki": 0.5, "web": 0.5}'}


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(NotADirectoryError, match=r"must be a folder, but .* is a file"):
        make_weights().save_pretrained(tmp_path / "weights")


def test_files_behind_a_symbolic_link_are_never_touched(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train-00000-of-00001.parquet").write_text("years of work")
    folder = tmp_path / "artifact"
    make_weights(0).save_pretrained(folder)
    shutil.rmtree(folder / "trajectory")
    (folder / "trajectory").symlink_to(elsewhere)
    for with_trajectory in (True, False):
        with pytest.raises(FileExistsError, match="is a symbolic link"):
            make_weights(1, with_trajectory=with_trajectory).save_pretrained(folder)
    assert _contents(elsewhere) == {"train-00000-of-00001.parquet": b"years of work"}


def test_links_to_single_files_are_replaced_not_followed(tmp_path):
    # As in a snapshot of the Hub's cache.
    make_weights(0).save_pretrained(tmp_path / "blobs")
    before = _contents(tmp_path / "blobs")
    for name in before:
        (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert DomainWeights.from_pretrained(tmp_path / "snapshot") == make_weights(0)
    make_weights(1).save_pretrained(tmp_path / "snapshot")
    assert DomainWeights.from_pretrained(tmp_path / "snapshot") == make_weights(1)
    assert _contents(tmp_path / "blobs") == before


def test_a_linked_folder_and_one_with_only_hidden_files_are_saved_into(tmp_path):
    (tmp_path / "real" / ".git").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_weights().save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / ".git").is_dir()
    assert DomainWeights.from_pretrained(tmp_path / "real") == make_weights()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "was altered or cut short"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"wiki", b"wxki")), "was altered or cut short"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_table_is_refused_by_name(tmp_path, name, change, message):
    make_weights().save_pretrained(tmp_path / "artifact")
    change(tmp_path / "artifact" / name)
    with pytest.raises(ValueError, match=f"{name}' {message}"):
        DomainWeights.from_pretrained(tmp_path / "artifact")


def _edit_manifest(folder, **changes):
    path = folder / "domain_weights.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_major_format_is_refused_with_what_to_do(tmp_path):
    make_weights().save_pretrained(tmp_path / "artifact")
    _edit_manifest(tmp_path / "artifact", format_version="2.0")
    with pytest.raises(
        ValueError, match=r"has format 2.0, but .* reads up to 1.0. Update with `pip install -U hf-doge`"
    ):
        DomainWeights.from_pretrained(tmp_path / "artifact")


def test_unknown_keys_of_a_newer_minor_format_are_kept(tmp_path):
    make_weights().save_pretrained(tmp_path / "newer")
    _edit_manifest(tmp_path / "newer", format_version="1.9", budget=3, temperature={"t": 1})
    weights = DomainWeights.from_pretrained(tmp_path / "newer")
    assert weights.mean == make_weights().mean
    weights.save_pretrained(tmp_path / "again")
    manifest = json.loads((tmp_path / "again" / "domain_weights.json").read_text())
    assert (manifest["budget"], manifest["temperature"]) == (3, {"t": 1})
    assert DomainWeights.from_pretrained(tmp_path / "again") == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": None}, "must have a `format_version`"),
        ({"format_version": "new"}, "must have a `format_version`"),
        ({"mean": [0.5, 0.5]}, "must have a dict under 'mean'"),
        ({"mean": {"wiki": 0.5, "web": 0.2, "code": 0.2}}, "must sum to 1"),
        ({"domain_names": ["wiki", "web"]}, "domain_weights.json': `domain_names` must be the domains of `mean`"),
        ({"files": {TABLES[0]: "../x"}}, "altered or cut short"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, changes, message):
    make_weights().save_pretrained(tmp_path / "artifact")
    _edit_manifest(tmp_path / "artifact", **changes)
    with pytest.raises(ValueError, match=message):
        DomainWeights.from_pretrained(tmp_path / "artifact")


@pytest.mark.parametrize("content", [b"", b'{"format_version": "1.0"', b"\xff\xfe\x00", b"[]"])
def test_a_malformed_manifest_is_refused_by_name(tmp_path, content):
    make_weights().save_pretrained(tmp_path / "artifact")
    (tmp_path / "artifact" / "domain_weights.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"domain_weights.json"):
        DomainWeights.from_pretrained(tmp_path / "artifact")


def test_a_folder_without_weights_and_a_single_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold domain_weights.json"):
        DomainWeights.from_pretrained(tmp_path)
    (tmp_path / "weights.json").write_text('{"wiki": 1}')
    with pytest.raises(NotADirectoryError, match=r"is a file. Read a single file by `DomainWeights.from_file`"):
        DomainWeights.from_pretrained(tmp_path / "weights.json")


def test_a_name_that_is_neither_folder_nor_repository_says_both(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="must be a folder or a dataset repository on the Hub, but there is no"
    ):
        DomainWeights.from_pretrained(tmp_path / "a" / "missing" / "folder")


# Crashes


def _contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def _kill_at(operation):
    """SIGKILL this very process right before its n-th change of the file system, half-written where that can be."""
    countdown = itertools.count(operation, -1)

    def change(descriptor=None):
        if next(countdown) == 0:
            if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in (
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
        ):
            change()

    os.fsync = change  # a process that is killed loses nothing it has written, so the disk need not be waited for
    sys.addaudithook(audit)


def crash_at_every_operation(start, root, new):
    """Save `new` over a copy of the folder `start`, killed at operation 0, 1, 2, ... until one run is not killed."""
    for operation in itertools.count():
        folder = Path(root) / f"{operation:03}"
        if Path(start).exists():
            shutil.copytree(start, folder)
        if (child := os.fork()) == 0:
            _kill_at(operation)
            new.save_pretrained(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return


def crash_twice(root):
    """As above from version 0 to 1, and then to version 2 from every sixth of the folders this leaves."""
    make_weights(0).save_pretrained(f"{root}/start")
    crash_at_every_operation(f"{root}/start", f"{root}/once", make_weights(1))
    for crashed in sorted(Path(root, "once").iterdir())[::6]:
        crash_at_every_operation(crashed, f"{root}/twice/{crashed.name}", make_weights(2))


def _in_another_process(statement):
    # Forking wants a process without threads. What its first save imports and compiles, every child would else do again.
    first = "with tempfile.TemporaryDirectory() as folder: make_weights().save_pretrained(folder)"
    code = f"import tempfile\nfrom tests.artifacts.test_domain_weights import *\n{first}\n{statement}"
    process = Fork(["-c", code], env=launch_environment())
    assert process.wait(timeout=120) == 0, process.output


def _load_or_none(folder):
    try:
        return DomainWeights.from_pretrained(folder)
    except FileNotFoundError:
        return None


def _check_crashed(folders, old, new):
    """Old until some operation and new from there on; always whole; and saving again leaves nothing behind."""
    states = [_load_or_none(folder) for folder in folders]
    change = states.index(new)
    assert change > 0
    assert states[:change] == [old] * change
    assert states[change:] == [new] * (len(states) - change)
    for folder in folders:
        new.save_pretrained(folder)
        assert DomainWeights.from_pretrained(folder) == new
        assert not list(folder.rglob(".hf_doge-*"))


def test_a_kill_at_any_file_operation_of_a_first_save_leaves_nothing_or_all(tmp_path):
    _in_another_process(
        f"crash_at_every_operation({str(tmp_path / 'none')!r}, {str(tmp_path / 'new')!r}, make_weights(1))"
    )
    folders = sorted((tmp_path / "new").iterdir())
    complete = _contents(folders[-1])
    for folder in folders:
        if (folder / "domain_weights.json").exists():  # whoever reads it, with or without this package, reads all
            assert {name: content for name, content in _contents(folder).items() if name in complete} == complete
    _check_crashed(folders, None, make_weights(1))


@pytest.mark.parametrize("had_trajectory", [True, False])
@pytest.mark.parametrize("has_trajectory", [True, False])
def test_a_kill_at_any_file_operation_of_a_replacement_leaves_the_old_or_the_new(
    tmp_path, had_trajectory, has_trajectory
):
    old = make_weights(0, with_trajectory=had_trajectory)
    new = make_weights(1, with_trajectory=has_trajectory)
    old.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "notes.txt").write_text("mine")
    _in_another_process(
        f"crash_at_every_operation({str(tmp_path / 'start')!r}, {str(tmp_path / 'new')!r},"
        f" make_weights(1, with_trajectory={has_trajectory}))"
    )
    folders = sorted((tmp_path / "new").iterdir())
    assert len(folders) > 15
    whole = {name: {_contents(folder).get(name) for folder in (tmp_path / "start", folders[-1])} for name in TABLES}
    for folder in folders:
        assert (folder / "notes.txt").read_text() == "mine"
        # `load_dataset` never meets a card that names a missing file, nor a table in pieces.
        for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("path: "):
                assert (folder / line.split()[-1]).exists()
        for name in TABLES:
            assert _contents(folder).get(name) in whole[name]
    _check_crashed(folders, old, new)


def test_a_kill_in_the_save_after_a_killed_save_leaves_the_newest_whole_version(tmp_path):
    _in_another_process(f"crash_twice({str(tmp_path)!r})")
    folders = sorted((tmp_path / "twice").iterdir())
    assert len(folders) == len(sorted((tmp_path / "once").iterdir())[::6]) > 2
    for crashed in folders:
        before = DomainWeights.from_pretrained(tmp_path / "once" / crashed.name)
        _check_crashed(sorted(crashed.iterdir()), before, make_weights(2))


def test_weights_are_saved_into_folders_that_do_not_exist(tmp_path):
    make_weights(1).save_pretrained(tmp_path / "a" / "b" / "weights")
    assert DomainWeights.from_pretrained(tmp_path / "a" / "b" / "weights") == make_weights(1)


# Weights written by others


@pytest.mark.parametrize(
    ("name", "text", "shape"),
    [
        (
            "doremi.json",
            '{"train_domain_weights": {"wiki": 3, "web": 1}, "eval_domain_weights": {"wiki": 1}}',
            "doremi",
        ),
        ("regmix.yaml", "train:\n  wiki: 3\n  web: 1.0\nvalid:\n  wiki: 1.0\nmodel_name: tinyllama_1_1b\n", "regmix"),
        ("plain.json", '{"wiki": 0.75, "web": 0.25}', "plain"),
        ("bom.json", '\ufeff{"wiki": 0.75, "web": 0.25}', "plain"),
        ("plain.yml", "wiki: 3e-5\nweb: 1e-5\n", "plain"),
        ("train.yml", "train: 1\nwiki: 3\n", None),
    ],
)
def test_weights_of_others_are_read_and_normalised(tmp_path, name, text, shape):
    (tmp_path / name).write_text(text, encoding="utf-8")
    weights = DomainWeights.from_file(tmp_path / name)
    if shape is None:  # a domain that is called as the key of RegMix
        assert weights.mean == {"train": 0.25, "wiki": 0.75}
        return
    assert weights.mean == pytest.approx({"wiki": 0.75, "web": 0.25}, rel=1e-12)
    assert weights.metadata == {"source_file": name, "source_format": shape}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.json", '{"wiki": 1, "web": 2, "wiki": 3}', "Keys must be unique, but 'wiki' stands twice in '.*w.json'"),
        ("w.json", '{"train_domain_weights": {"wiki": 1, "wiki": 3}}', "'wiki' stands twice"),
        ("w.yaml", "wiki: 1\nweb: 2\nwiki: 3\n", "Keys must be unique, but 'wiki' stands twice in '.*w.yaml'"),
        ("w.yaml", "train:\n  wiki: 1\n  wiki: 3\n", "'wiki' stands twice"),
        ("w.json", '{"wiki": -1, "web": 2}', "w.json': .* domain 'wiki' has -1"),
        ("w.json", '{"wiki": NaN, "web": 2}', "domain 'wiki' has nan"),
        ("w.yaml", "wiki: .nan\nweb: 2\n", "domain 'wiki' has nan"),
        ("w.yaml", "wiki: lots\nweb: 2\n", "domain 'wiki' has 'lots'"),
        ("w.json", '{"wiki": 0, "web": 0}', r"all of \['wiki', 'web'\] are 0"),
        ("w.json", "{}", "must map domain names to ratios, but it holds {}"),
        ("w.json", '{"train_domain_weights": {}}', "must map domain names to ratios"),
        ("w.json", "[0.5, 0.5]", "must map domain names to ratios"),
        (
            "w.json",
            '{"train": {"wiki": 1}, "train_domain_weights": {"wiki": 2}}',
            "ratios under one key, .*'train_domain_weights', 'train'",
        ),
        *(
            ("w.yaml", f"wiki: {number}\nweb: 2\n", f"without leading zeros .* {number} .* line 1, column 7")
            for number in ("017", "-0_17", "1:30", "1:30.5")
        ),
        ("w.yaml", "", "must map domain names to ratios, but it holds None"),
        ("w.json", "wiki: 1", "must be JSON in UTF-8, but it is not"),
        ("w.yaml", "wiki: [1", "must be YAML in UTF-8, but it is not"),
        ("w.yaml", "wiki: !!python/object/apply:os.getcwd []", "must be YAML"),
        ("w.csv", "wiki,1", "must end in one of"),
    ],
)
def test_a_bad_weights_file_is_refused_by_file_and_domain(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        DomainWeights.from_file(tmp_path / name)


def test_a_file_of_an_artifact_is_refused_with_how_to_read_it(tmp_path):
    make_weights().save_pretrained(tmp_path / "artifact")
    with pytest.raises(
        ValueError, match=r"belongs to an artifact of hf_doge. Read it by `DomainWeights.from_pretrained"
    ):
        DomainWeights.from_file(tmp_path / "artifact" / "domain_weights.json")


# The summary


def test_the_summary_lists_every_domain_once_heaviest_first_in_aligned_columns():
    names = [f"domain_{'x' * (i % 17)}_{i}" for i in range(50)]
    weights = make_weights(names=names)
    lines = weights.summary().splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("domain "))
    assert lines[header].split("  ")[0] == "domain"
    for title in ("weight", "last", "uniform", "natural", "x natural", "rows", "tokens"):
        assert title in lines[header]
    rows = lines[header + 2 : header + 52]
    assert [row.split()[0] for row in rows] == sorted(names, key=weights.mean.get, reverse=True)
    assert len({len(row) for row in rows}) == 1
    assert lines[0] == "Recipe: paper (mu 0.01)"
    assert "50 domains, entropy" in lines[1]


def test_the_summary_leaves_out_what_is_not_known():
    summary = DomainWeights({"wiki": 0.75, "web": 0.25}).summary()
    assert summary == (
        "Recipe: not recorded\n"
        "2 domains, entropy 0.562 nats (uniform 0.693)\n"
        "\n"
        "domain  weight  uniform\n"
        "------  ------  -------\n"
        "wiki    0.7500   0.5000\n"
        "web     0.2500   0.5000"
    )


def test_a_domain_without_tokens_has_no_ratio_to_its_natural_share():
    domains = {"wiki": {"num_tokens": 10}, "web": {"num_tokens": 0}}
    assert DomainWeights({"wiki": 0.5, "web": 0.5}, domains=domains).summary().splitlines()[-1].split() == [
        "web", "0.5000", "0.5000", "0.0000", "0",
    ]  # fmt: skip


def test_the_artifact_loads_without_torch_datasets_transformers_matplotlib_and_hub_client(tmp_path):
    make_weights().save_pretrained(tmp_path / "artifact")
    code = (
        "import sys; from hf_doge.artifacts import DomainWeights;"
        f"DomainWeights.from_pretrained({str(tmp_path / 'artifact')!r}).summary();"
        "print([name for name in ('torch', 'datasets', 'transformers', 'matplotlib', 'huggingface_hub') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_a_process_that_ends_right_after_loading_ends_well(tmp_path):
    make_weights().save_pretrained(tmp_path / "artifact")
    load = (
        f"from hf_doge.artifacts import DomainWeights; DomainWeights.from_pretrained({str(tmp_path / 'artifact')!r})"
    )
    for _ in range(5):  # pyarrow's reading threads, if there were any, would abort some of these at exit
        assert subprocess.run([sys.executable, "-c", load], cwd=REPOSITORY, capture_output=True).returncode == 0


def test_a_save_leaves_no_file_open(tmp_path):
    make_weights().save_pretrained(tmp_path)
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        make_weights().save_pretrained(tmp_path)
    assert len(os.listdir("/dev/fd")) <= before


FACTS = {
    "name_or_path": "a/b",
    "class": "X",
    "num_parameters": 5,
    "revision": "r",
    "config": {"x": 1},
    "vocab_size": 3,
}
RUN = {
    **{"global_step": 5, "train_batch_size": 3, "learning_rate": 0.1, "seconds": 3.0, "num_tokens_seen": 5},
    **{"total_flos": 5.0, "num_processes": 1, "device": "cpu", "settled_after_updates": 5, "seed": 1},
}


def test_whatever_domain_weights_json_holds_is_refused_by_name_or_shown(tmp_path):
    """Each of its values replaced by each odd one."""
    metadata = {
        "model": FACTS,
        "tokenizer": FACTS,
        "training": RUN,
        "dataset": {"sources": ["a/b"]},
        "source_file": "x",
    }
    domains = {key: {"num_rows": 5, "num_tokens": 7, "fingerprint": "f"} for key in ("wiki", "web")}
    weights = DomainWeights(
        {"wiki": 0.5, "web": 0.5}, recipe={"name": "paper", "mu": 0.1}, domains=domains, metadata=metadata
    )
    weights.save_pretrained(tmp_path)
    manifest, files, wrong = tmp_path / "domain_weights.json", artifact_files(weights, plot=False), []
    text = manifest.read_text()
    for place in places(json.loads(text)):
        for odd in ODD:
            manifest.write_text(json.dumps(put_in(json.loads(text), place, odd)))
            try:
                read = DomainWeights.from_pretrained(tmp_path)
                shown = [
                    read.summary(),
                    repr(read),
                    read._repr_html_(),
                    weights_card(read, files, repo_id="a/b").block,
                ]
            except ValueError as error:
                named = any(name in str(error) for name in ("domain_weights.json", TABLES[0]))
                wrong += [] if named and is_harmless(str(error)) else [(place, odd, error)]
            except Exception as error:  # what this test looks for
                wrong.append((place, odd, repr(error)))
            else:
                wrong += [] if all(map(is_harmless, shown)) and "<b>" not in shown[2] else [(place, odd, "shown")]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_table_that_tells_other_weights_than_the_manifest_is_refused(tmp_path):
    make_weights().save_pretrained(tmp_path)
    (path,) = (tmp_path / "weights").iterdir()
    table = pq.read_table(path)
    for change, law in (
        (lambda: table.set_column(1, "weight", pa.array([1.0, 0.0, 0.0])), "must tell the same weights"),
        (lambda: table.drop_columns(["weight"]), "must have the columns domain and weight"),
    ):
        pq.write_table(change(), path)
        manifest = json.loads((tmp_path / "domain_weights.json").read_text())
        manifest["files"][f"weights/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / "domain_weights.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=f"weights/{path.name}.*{law}"):
            DomainWeights.from_pretrained(tmp_path)
