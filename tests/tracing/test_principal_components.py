"""Rows projected to the principal components of a sample, a basis for each checkpoint: what they keep, and that nothing else changes."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.checkpoint_writer import CheckpointWriter
from hf_doge.artifacts.influence.fitted_writer import FittedCheckpointWriter
from hf_doge.evaluation.influence.rank_metrics import spearman
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.basis import NUM_SAMPLED, fit_basis, sampled
from hf_doge.tracing.batches import SequentialBatches
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.settings import RecordingSettings
from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer
from tests.tracing.test_optimizer_metric import again, asked, assert_near, checkpoints, self_influences

WIDTH = 16
FULL = {"projection": "pca", "projection_width": WIDTH}
FEW = {"projection": "pca", "projection_width": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    return tokenised(sentences(24), tokenizer), tokenised(sentences(5, seed=9), tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, data):
    """A classifier trained by AdamW, recorded in training to its principal components."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, classifier(tokenizer), tokenizer, data[0], metric="optimizer", **FEW)
    return folder


def files_of(folder, *tables):
    """Path -> content of the files of an index, without what names its folder."""
    found = [path for table in tables for path in (folder / table).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def index_at(tmp_path, name, run, examples, tokenizer, **settings):
    (tmp_path / name).mkdir()
    return again(
        tmp_path / name, run, examples, tokenizer, **{"metric": "gradient", "layers": "embedding", **settings}
    )


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
def test_all_components_together_answer_as_whole_rows(tmp_path, run, data, tokenizer, metric):
    whole = index_at(tmp_path, "whole", run, data[0], tokenizer, metric=metric)
    fitted = index_at(tmp_path, "fitted", run, data[0], tokenizer, metric=metric, **FULL)
    for options in (asked(), asked(cosine=True), asked(kernel="synonym", synonym_threshold=0.3)):
        assert_near(fitted.scores(data[1], **options), whole.scores(data[1], **options), 1e-5)
    assert_near(self_influences(fitted), self_influences(whole), 1e-5)
    hits = [index.search(data[1], top_k=3, **asked()) for index in (whole, fitted)]
    assert hits[0]["words"][:] == hits[1]["words"][:]
    for one, other in zip(*(found["word_scores"][:] for found in hits), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
def test_the_basis_of_each_checkpoint_is_that_of_the_singular_vectors_of_its_rows_as_they_are_stored(
    tmp_path, run, data, tokenizer, metric
):
    whole = index_at(tmp_path, "whole", run, data[0], tokenizer, metric=metric).reader
    fitted = index_at(tmp_path, "fitted", run, data[0], tokenizer, metric=metric, **FEW).reader
    bases = []
    for checkpoint in range(2):
        rows = torch.cat([rows for _, rows in whole.example_rows(checkpoint, range(24))]).double()
        right = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True))[2][:4]
        basis = fitted.basis(checkpoint).double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(4).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(basis @ basis.T, right.T @ right, rtol=0, atol=1e-4)
        stored = torch.cat([rows for _, rows in fitted.example_rows(checkpoint, range(24))]).double()
        torch.testing.assert_close(stored, rows @ basis, rtol=1e-4, atol=1e-6 * float(rows.abs().max()))
        bases.append(basis)
    assert (bases[0] @ bases[0].T - bases[1] @ bases[1].T).abs().max() > 1e-3  # each has its own


def test_components_keep_the_order_of_scores_better_than_as_many_random_numbers(tmp_path, run, data, tokenizer):
    whole = index_at(tmp_path, "whole", run, data[0], tokenizer).scores(data[1], **asked())
    kept = []
    for number, settings in enumerate(({}, {"projection": "random"}, {"projection": "random", "projection_seed": 1})):
        options = {"projection": "pca", "projection_width": 6, "dtype": "int8", **settings}
        found = index_at(tmp_path, str(number), run, data[0], tokenizer, **options).scores(data[1], **asked())
        kept.append(spearman(whole, found).mean())
    assert kept[0] > 0.98
    assert 1 - kept[0] < 0.5 * (1 - max(kept[1:]))


def test_the_callback_and_the_command_afterwards_record_the_same(run, data, tokenizer, tmp_path):
    later = index_at(tmp_path, "later", run, data[0], tokenizer, metric="optimizer", **FEW)
    one, other = (files_of(folder, "gradients", "basis", "metric") for folder in (run / "index", later.reader.folder))
    assert one.keys() == other.keys()
    assert {name: one[name] == other[name] for name in one} == dict.fromkeys(one, True)
    assert "basis/checkpoint-3/basis.parquet" in one
    assert later.config["projection"] == {"kind": "pca", "width": 4, "seed": 0}
    assert later.config["format_version"] == "4.0"
    card = (later.reader.folder / "README.md").read_text()
    assert "projected to 4 numbers: times `direction` of the 4 components in `basis`" in card


def test_an_index_without_components_has_nothing_of_them(tmp_path, run, data, tokenizer):
    index = index_at(tmp_path, "random", run, data[0], tokenizer, projection_width=4)
    assert not (index.reader.folder / "basis").exists()
    assert all("basis" not in entry for entry in index.config["checkpoints"])
    assert index.config["format_version"] == "1.0"
    assert sorted(index.config["projection"]) == ["seed", "sha256", "width"]


def test_the_lengths_of_rows_do_not_decide_which_directions_are_kept():
    """One example of large loss would else have the basis for itself."""
    common, loud = torch.eye(WIDTH)[:2]
    rows = torch.cat([common.repeat(5, 1) * 1e-6, loud.repeat(2, 1) * 1e6, torch.zeros(1, WIDTH)])
    basis = fit_basis([TokenRows(torch.tensor([0, 8]), torch.arange(8), rows, False)], width=1)
    torch.testing.assert_close(basis[:, 0].abs(), common)


def test_rows_of_as_many_dimensions_as_are_kept_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(3, WIDTH, generator=generator)
    rows = torch.randn(20, 3, generator=generator) @ span
    basis = fit_basis(
        [TokenRows(torch.tensor([0, 5]), torch.arange(5), one, False) for one in rows[:15].split(5)], width=3
    )
    queries = torch.randn(4, WIDTH, generator=generator)  # of any direction
    expected = queries @ rows.T
    torch.testing.assert_close((queries @ basis) @ (rows @ basis).T, expected, rtol=1e-5, atol=1e-5)


# The sample


class Places:
    """A dataset of which each example is its position."""

    def __len__(self):
        return 1000

    def __getitem__(self, position):
        return {"input_ids": [position]}


def collate(examples):
    return {"input_ids": torch.tensor([one["input_ids"] for one in examples])}


def test_the_sample_is_of_the_whole_dataset_and_the_same_each_time():
    batches = SequentialBatches(Places(), collate, batch_size=7)
    drawn = [
        torch.cat([one["input_ids"] for one in sampled(batches, seed=seed)]).flatten().tolist() for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == NUM_SAMPLED
    assert drawn[0] == sorted(drawn[0])
    quarters = np.bincount(np.array(drawn[0]) // 250)
    assert quarters.min() > 40  # data that are sorted do no harm
    few = SequentialBatches(
        range(5), lambda positions: {"input_ids": torch.tensor([[one] for one in positions])}, batch_size=2
    )
    assert torch.cat([one["input_ids"] for one in sampled(few, seed=3)]).flatten().tolist() == [0, 1, 2, 3, 4]


def test_rows_that_are_not_finite_have_no_components():
    from tests.artifacts.influence_rows import random_rows

    rows = random_rows(3)
    rows.rows[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"must be finite.*Look at their losses"):
        fit_basis([random_rows(2), rows], width=2)


# Interrupted, grown, moved


@pytest.fixture
def fits(monkeypatch):
    """Counts how often a basis is fitted."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return fit_basis(*args, **kwargs)

    monkeypatch.setattr("hf_doge.tracing.recording.fit_basis", counted)
    return calls


@pytest.mark.parametrize("when", ["while it was fitted", "after the basis", "in the middle of the rows"])
def test_a_killed_recording_goes_on_to_the_same_bytes(tmp_path, run, data, tokenizer, monkeypatch, fits, when):
    options = {**FEW, "max_segment_bytes": 400}
    undisturbed = index_at(tmp_path, "undisturbed", run, data[0], tokenizer, **options)
    record, batches = EmbeddingGradientRecorder.record, []
    stop = {"while it was fitted": 2, "after the basis": 4, "in the middle of the rows": 6}[
        when
    ]  # 3 batches of 8, fitted first

    def stopped(self, batch):
        batches.append(batch)
        if len(batches) == stop:
            raise KeyboardInterrupt("stopped by the test")
        return record(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingGradientRecorder, "record", stopped)
        with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
            index_at(tmp_path, "stopped", run, data[0], tokenizer, **options)
    staged = tmp_path / "stopped" / "again" / "basis" / "checkpoint-3.partial" / "basis.parquet"
    assert staged.exists() == (when != "while it was fitted")
    fits.clear()
    batches.clear()
    resumed = again(tmp_path / "stopped", run, data[0], tokenizer, metric="gradient", **options)
    assert len(fits) == (
        2 if when == "while it was fitted" else 1
    )  # the other checkpoint has one to be fitted in any case
    one, other = (files_of(index.reader.folder, "gradients", "basis", "offsets") for index in (undisturbed, resumed))
    assert one == other
    assert not list(resumed.reader.folder.rglob("*.partial"))
    assert not list(resumed.reader.folder.rglob("journal*"))


def test_segments_of_a_basis_that_is_lost_are_recorded_again(tmp_path, run, data, tokenizer, monkeypatch, fits):
    options = {**FEW, "max_segment_bytes": 400}
    record, batches = EmbeddingGradientRecorder.record, []

    def stopped(self, batch):
        batches.append(batch)
        if len(batches) == 6:
            raise KeyboardInterrupt("stopped by the test")
        return record(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingGradientRecorder, "record", stopped)
        with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
            index_at(tmp_path, "stopped", run, data[0], tokenizer, **options)
    folder = tmp_path / "stopped" / "again"
    path = folder / "basis" / "checkpoint-3.partial" / "basis.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert list((folder / "gradients" / "checkpoint-3.partial").glob("segment-*"))
    monkeypatch.setattr("hf_doge.tracing.recording.fit_basis", lambda *args, **kwargs: torch.eye(WIDTH)[:, :4])
    resumed = again(tmp_path / "stopped", run, data[0], tokenizer, metric="gradient", **options).reader
    whole = index_at(tmp_path, "whole", run, data[0], tokenizer).reader
    for (_, stored), (_, rows) in zip(
        resumed.example_rows(0, range(24)), whole.example_rows(0, range(24)), strict=True
    ):
        torch.testing.assert_close(stored, rows[:, :4])


def test_examples_added_later_are_projected_to_the_basis_that_is_there(tmp_path, run, data, tokenizer, fits):
    few = index_at(tmp_path, "few", run, data[0].select(range(9)), tokenizer, metric="optimizer", **FEW)
    before = files_of(few.reader.folder, "gradients", "basis")
    scores = few.scores(data[1], **asked())
    assert len(fits) == 2
    record_dataset(
        few.reader.folder,
        checkpoints(run),
        data[0],
        tokenizer=tokenizer,
        settings=RecordingSettings(metric="optimizer", dtype="float32", **FEW),
        progress=False,
        add_examples=True,
    )
    assert len(fits) == 2
    grown = InfluenceIndex.from_pretrained(few.reader.folder, cache_dir=tmp_path / "grown")
    after = files_of(few.reader.folder, "gradients", "basis")
    assert {name: after[name] for name in before} == before
    assert [len(entry["basis"]) for entry in grown.config["checkpoints"]] == [1, 1]
    assert_near(grown.scores(data[1], **asked())[:, :9], scores, 1e-6)
    whole = index_at(tmp_path, "whole", run, data[0], tokenizer, metric="optimizer").reader
    for checkpoint in range(2):
        basis = grown.reader.basis(checkpoint)
        pairs = [one.example_rows(checkpoint, range(9, 24)) for one in (grown.reader, whole)]
        for (_, stored), (_, rows) in zip(*pairs, strict=True):
            torch.testing.assert_close(stored, rows @ basis, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))


def grow(index, run, examples, tokenizer):
    record_dataset(
        index.reader.folder,
        checkpoints(run),
        examples,
        tokenizer=tokenizer,
        settings=RecordingSettings(dtype="float32", **index_settings(index)),
        progress=False,
        add_examples=True,
    )


def index_settings(index):
    projection = index.config["projection"]
    return {} if projection is None else {"projection": projection["kind"], "projection_width": projection["width"]}


def told_of_few(warnings):
    return [str(one.message) for one in warnings if "principal components of" in str(one.message)]


@pytest.mark.parametrize(
    ("settings", "num_first", "num_told"),
    [
        pytest.param(FEW, 3, 1, id="fewer than the components"),
        pytest.param({**FEW, "projection_width": 1}, 2, 1, id="less than a tenth"),
        pytest.param(FEW, 9, 0, id="enough"),
        pytest.param({}, 2, 0, id="no components"),
    ],
)
def test_growing_from_a_basis_that_saw_few_examples_is_told_once(
    tmp_path, run, data, tokenizer, settings, num_first, num_told, recwarn
):
    few = index_at(tmp_path, "few", run, data[0].select(range(num_first)), tokenizer, **settings)
    recwarn.clear()
    grow(few, run, data[0], tokenizer)
    told = told_of_few(recwarn)
    assert len(told) == num_told
    for one in told:
        assert "['checkpoint-3', 'checkpoint-6']" in one
        assert f"made of {num_first} examples, and the index will have 24." in one


def test_an_index_that_grows_by_little_is_told_what_its_basis_saw_at_first(tmp_path, run, data, tokenizer, recwarn):
    index = index_at(tmp_path, "few", run, data[0].select(range(3)), tokenizer, **FEW)
    for count in (12, 24):
        recwarn.clear()
        grow(index, run, data[0].select(range(count)), tokenizer)
        (told,) = told_of_few(recwarn)
        assert f"made of 3 examples, and the index will have {count}." in told


def test_a_journal_that_a_kill_leaves_behind_is_removed_by_the_next_writer(
    tmp_path, run, data, tokenizer, monkeypatch
):
    whole = index_at(tmp_path, "whole", run, data[0], tokenizer, **FEW)
    expected = files_of(whole.reader.folder, "gradients", "basis", "offsets")

    def killed(self):
        raise KeyboardInterrupt("stopped by the test")

    folder = tmp_path / "stopped" / "again"
    for clean in (FittedCheckpointWriter, CheckpointWriter):  # before, and behind the journals of the rows
        with monkeypatch.context() as patch:
            patch.setattr(clean, "clean", killed)
            with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
                (index_at if clean is FittedCheckpointWriter else continued)(
                    tmp_path, "stopped", run, data[0], tokenizer, **FEW
                )
        assert list(folder.rglob("journal*.json"))
    continued(tmp_path, "stopped", run, data[0], tokenizer, **FEW)
    assert not list(folder.rglob("journal*.json"))
    assert files_of(folder, "gradients", "basis", "offsets") == expected


def continued(tmp_path, name, run, examples, tokenizer, **settings):
    return again(tmp_path / name, run, examples, tokenizer, **{"metric": "gradient", **settings})


def test_a_copy_answers_as_the_index(tmp_path, run, data):
    index = InfluenceIndex.from_pretrained(run / "index", cache_dir=tmp_path / "maps")
    index.save_pretrained(tmp_path / "copy")
    copied = InfluenceIndex.from_pretrained(tmp_path / "copy", cache_dir=tmp_path / "copied")
    np.testing.assert_array_equal(copied.scores(data[1]), index.scores(data[1]))
    assert files_of(tmp_path / "copy", "basis") == files_of(run / "index", "basis")


# What is refused

REFUSED = {
    "no width": ({"projection": "pca"}, r"needs a `projection_width`.*but it is None"),
    "online": ({**FEW, "record": "online"}, r"`record='online'` has no weights at which.*Use `projection='random'`"),
    "layers": ({**FEW, "layers": ["embedding", "classifier"]}, r"other principal components than those of `layers="),
    "unknown": ({"projection": "svd", "projection_width": 4}, r"`projection` must be one of \['random', 'pca'\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_that_cannot_have_components_are_refused_at_construction(tmp_path, kind):
    options, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        TracInWECallback(tmp_path / "index", **options)


def test_more_components_than_the_rows_are_wide_are_refused(tmp_path, run, data, tokenizer):
    with pytest.raises(ValueError, match=r"`projection_width` must .*16"):
        index_at(tmp_path, "wide", run, data[0], tokenizer, projection="pca", projection_width=17)


def test_an_index_is_not_continued_by_another_projection(tmp_path, run, data, tokenizer):
    index_at(tmp_path, "one", run, data[0], tokenizer, **FEW)
    with pytest.raises(ValueError, match=r"another configuration: `projection` is .*'kind': 'pca'"):
        again(tmp_path / "one", run, data[0], tokenizer, metric="gradient", projection_width=4)


def changed(folder, change):
    """A copy of an index whose first basis is another, with the right checksum."""
    from hf_doge.files import sha256

    config = json.loads((folder / "config.json").read_text())
    file = config["checkpoints"][0]["basis"][0]
    table = pq.read_table(folder / file["path"], use_threads=False)
    pq.write_table(change(table), folder / file["path"])
    file["sha256"] = sha256(folder / file["path"])
    (folder / "config.json").write_text(json.dumps(config))


MANIPULATED = {
    "it must have 4 components, but has 3": lambda table: table.slice(0, 3),
    "`component` must count from 0": lambda table: table.take([1, 0, 2, 3]),
    "columns must be": lambda table: table.drop_columns("component"),
    "components must be orthonormal": lambda table: table.set_column(
        2, "direction", table["direction"].take([0, 0, 2, 3])
    ),
    "`checkpoint` must be 0": lambda table: table.set_column(0, "checkpoint", table["component"]),
    "no value may be null": lambda table: table.set_column(1, "component", pa.array([0, 1, 2, None], pa.int32())),
}


@pytest.mark.parametrize("law", MANIPULATED)
def test_what_the_file_of_a_basis_says_is_not_believed(tmp_path, run, law):
    folder = shutil.copytree(run / "index", tmp_path / "index")
    changed(folder, MANIPULATED[law])
    reader = IndexReader.open(folder, cache_dir=tmp_path / "maps")
    with pytest.raises(ValueError, match=f"The basis in .*basis.parquet.*{law}"):
        reader.basis(0)


def test_a_basis_that_was_altered_or_lost_is_named(tmp_path, run):
    folder = shutil.copytree(run / "index", tmp_path / "index")
    path = next(folder.glob("basis/*/basis.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"altered or cut short.*basis/"):
        IndexReader.open(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files: \['basis/"):
        IndexReader.open(folder)


CLAIMS = {
    "1 files under `basis`": lambda config: config["checkpoints"][0].update(basis=[]),
    "a known `kind`": lambda config: config["projection"].update(kind="other"),
    "no more components than `width`": lambda config: (
        config.update(stored_width=2**12),
        config["projection"].update(width=2**12),
    ),
    "must lie in the folder": lambda config: config["checkpoints"][0]["basis"][0].update(path="../basis.parquet"),
    "0 files under `basis`": lambda config: config["projection"].pop("kind"),
    "must have list under 'basis'": lambda config: config["checkpoints"][0].update(basis=3),
    "must have str under 'sha256'": lambda config: config["checkpoints"][0]["basis"][0].pop("sha256"),
}


@pytest.mark.parametrize("law", CLAIMS)
def test_what_config_json_claims_of_a_basis_is_checked(tmp_path, run, law):
    folder = shutil.copytree(run / "index", tmp_path / "index")
    config = json.loads((folder / "config.json").read_text())
    CLAIMS[law](config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=law):
        IndexReader.open(folder)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_any_seed_of_64_bits_draws_the_sample(seed):
    class Batches:
        def __len__(self):
            return 300

        def of(self, positions):
            return [positions]

    (first,), (second,) = ([*sampled(Batches(), seed=seed)] for _ in range(2))
    assert first == second
    assert len(set(first)) == NUM_SAMPLED
