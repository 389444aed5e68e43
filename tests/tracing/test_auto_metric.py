"""Which metric `metric="auto"` comes to, what is said of it, and that one index never has two."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers import Trainer, TrainerCallback

from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.manifest import parse_config
from hf_doge.tracing import after_training
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.second_moments import NoSecondMoments
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import tiny_classifier, tiny_tokenizer
from tests.tracing.recorded_training import BATCH_SIZE, arguments, classification_data, make_trainer, segments, train

AUTO = {"metric": "auto", "dtype": "float32", "layers": "embedding"}


@pytest.fixture(scope="module")
def adam(tmp_path_factory):
    """Checkpoints of a training by AdamW, and its index in plain gradients."""
    folder = tmp_path_factory.mktemp("adam")
    train(folder, tokenizer=tiny_tokenizer(), recording={"metric": "gradient"})
    return folder


def saved(folder):
    return sorted((folder / "run").glob("checkpoint-*"))


def record(folder, checkpoints, **options):
    record_dataset(
        folder,
        checkpoints,
        classification_data(),
        tokenizer=tiny_tokenizer(),
        settings=RecordingSettings(**{**AUTO, **options}),
        learning_rates=[0.0075, 0.0025][: len(checkpoints)],
        batch_size=BATCH_SIZE,
        progress=False,
    )
    return IndexReader.open(folder, cache_dir=folder.with_name(f"{folder.name}-cache"))


def decision(reader):
    return reader.config["metric"], reader.config["metadata"].get("metric")


def test_what_adam_trained_is_in_its_metric(tmp_path, adam):
    reader = train(tmp_path, tokenizer=tiny_tokenizer(), recording=AUTO)
    assert decision(reader) == ("optimizer", None)
    assert (reader.config["second_moment"], reader.config["format_version"]) == (True, "2.0")
    card = (tmp_path / "index" / "README.md").read_text()
    assert "- Metric: inner products divided by `sqrt(v) + eps` of Adam, which trained the model" in card
    assert "| `metric` | a row for each checkpoint and token" in card
    table = load_dataset(str(tmp_path / "index"), "metric", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == sum(entry["metric"][0]["num_tokens"] for entry in reader.config["checkpoints"]) > 0
    again = record(tmp_path / "again", saved(tmp_path))
    assert decision(again) == ("optimizer", None)
    assert segments(again) == segments(reader)
    explicit = record(tmp_path / "explicit", saved(tmp_path), metric="optimizer")
    assert segments(explicit) == segments(reader)
    assert segments(explicit) != segments(IndexReader.open(adam / "index"))


def test_the_metric_of_sgd_is_the_plain_one_and_nothing_is_said(tmp_path, recwarn):
    """Neither in training nor afterwards; the rows are those of `metric="gradient"`, to the byte."""
    reader = train(tmp_path, tokenizer=tiny_tokenizer(), recording=AUTO, optim="sgd")
    assert decision(reader) == ("gradient", "SGD steps along the plain gradient")
    assert reader.config["format_version"] == "1.0"
    card = (tmp_path / "index" / "README.md").read_text()
    assert "- Metric: plain inner products of gradients, as SGD steps along the plain gradient" in card
    again = record(tmp_path / "again", saved(tmp_path))
    assert decision(again) == decision(reader)
    plain = record(tmp_path / "plain", saved(tmp_path), metric="gradient")
    assert decision(plain) == ("gradient", None)
    assert segments(again) == segments(reader) == segments(plain)
    assert not [one for one in recwarn if "metric" in str(one.message)]


def test_another_optimizer_is_recorded_plainly_with_a_warning(tmp_path):
    with pytest.warns(
        UserWarning, match="records plain gradients, as Adafactor keeps no second moments of the input emb"
    ) as told:
        reader = train(tmp_path, tokenizer=tiny_tokenizer(), recording=AUTO, optim="adafactor")
    assert len([one for one in told if "plain gradients" in str(one.message)]) == 1
    assert decision(reader) == ("gradient", "Adafactor keeps no second moments of the input embeddings")
    with pytest.warns(UserWarning, match="as the optimizer keeps no second moments"):
        assert record(tmp_path / "again", saved(tmp_path)).config["metric"] == "gradient"


class OwnStep(torch.optim.Adam):
    """Adam by name, and another optimizer."""

    def step(self, closure=None):
        return super().step(closure)


def told_of_steps(warnings):
    return [str(one.message) for one in warnings if "for the second moments of" in str(one.message)]


@pytest.mark.parametrize("metric", ["auto", "optimizer", "gradient"])
def test_an_optimizer_that_may_step_otherwise_than_adam_is_told_once(tmp_path, metric, recwarn):
    model, recording = tiny_classifier(), {**AUTO, "metric": metric}
    optimizer = OwnStep(model.parameters(), lr=0.01)
    train(tmp_path, tokenizer=tiny_tokenizer(), model=model, recording=recording, optimizers=(optimizer, None))
    told = told_of_steps(recwarn)
    assert len(told) == (metric != "gradient")
    assert all(f"`metric='{metric}'` takes what OwnStep keeps" in one for one in told)


def test_a_saved_optimizer_that_may_step_otherwise_than_adam_is_told_once(tmp_path, adam, recwarn):
    record(tmp_path / "known", saved(adam))
    assert not told_of_steps(recwarn)
    checkpoints = [shutil.copytree(path, tmp_path / path.name) for path in saved(adam)]
    for path in checkpoints:
        content = torch.load(path / "optimizer.pt", weights_only=True)
        for state in content["state"].values():
            state["trust_ratio"] = torch.tensor(0.5)
        torch.save(content, path / "optimizer.pt")
    record(tmp_path / "plain", checkpoints, metric="gradient")
    assert not told_of_steps(recwarn)
    record(tmp_path / "index", checkpoints)
    (told,) = told_of_steps(recwarn)
    assert "checkpoint-2" in told
    assert "it keeps ['exp_avg', 'exp_avg_sq', 'step', 'trust_ratio']" in told


def test_rows_in_the_metric_of_radam_are_the_same_in_training_and_afterwards(tmp_path, recwarn):
    model = tiny_classifier()
    groups = Trainer(model, arguments(tmp_path)).create_optimizer().param_groups
    optimizer = torch.optim.RAdam([{"params": group["params"]} for group in groups], lr=0.01)
    options = {"optimizers": (optimizer, None), "max_steps": 12, "save_steps": 6}
    reader = train(tmp_path, tokenizer=tiny_tokenizer(), model=model, recording=AUTO, **options)
    again = record(tmp_path / "again", saved(tmp_path))
    assert decision(again) == ("optimizer", None)
    assert segments(again) == segments(reader)
    content = torch.load(saved(tmp_path)[0] / "optimizer.pt", weights_only=True)
    assert "amsgrad" not in content["param_groups"][0]
    assert not told_of_steps(recwarn)


def test_frozen_embeddings_are_recorded_plainly_with_a_warning(tmp_path):
    model = tiny_classifier()
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="as the input embeddings are frozen, so no optimizer"):
        reader = train(tmp_path, tokenizer=tiny_tokenizer(), recording=AUTO, model=model)
    assert reader.config["metric"] == "gradient"


def test_sgd_is_refused_before_the_first_step_where_a_metric_was_asked_for(tmp_path):
    callback = TracInWECallback(tmp_path / "index", metric="optimizer")
    trainer = make_trainer(tmp_path / "run", callback, tokenizer=tiny_tokenizer(), optim="sgd")
    with pytest.raises(NoSecondMoments, match=r"needs an optimizer that keeps `exp_avg_sq`.*`SGD` does not"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_online_rows_are_plain(tmp_path):
    assert TracInWECallback(tmp_path, metric="auto", record="online").settings.metric == "gradient"


def test_where_one_checkpoint_has_no_optimizer_all_are_plain(tmp_path, adam):
    checkpoints = [shutil.copytree(path, tmp_path / path.name) for path in saved(adam)]
    (checkpoints[1] / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="as no optimizer was saved with the checkpoint: .*checkpoint-4' has none"):
        reader = record(tmp_path / "index", checkpoints)
    assert decision(reader) == ("gradient", "no optimizer was saved with the checkpoint")
    assert str(tmp_path) not in json.dumps(reader.config["metadata"])
    assert segments(reader) == segments(record(tmp_path / "plain", checkpoints, metric="gradient"))


def test_a_checkpoint_without_moments_is_not_added_to_an_index_of_others(tmp_path, adam):
    first, second = (shutil.copytree(path, tmp_path / path.name) for path in saved(adam))
    record(tmp_path / "index", [first])
    (second / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs optimizer\.pt in every checkpoint"):
        record(tmp_path / "index", [first, second])
    shutil.copy(saved(adam)[1] / "optimizer.pt", second)
    both = record(tmp_path / "index", [first, second])
    assert segments(both) == segments(record(tmp_path / "whole", saved(adam)))


def test_an_index_continues_with_its_own_metric(tmp_path, adam):
    folder = record(tmp_path / "index", saved(adam), metric="gradient").folder
    config = json.loads((folder / "config.json").read_text())
    del config["metric"]  # as earlier versions wrote it
    (folder / "config.json").write_text(json.dumps(config))
    more = shutil.copytree(saved(adam)[1], tmp_path / "run" / "checkpoint-6")
    (more / "trainer_state.json").unlink()  # its name says the step
    reader = record(folder, [more])
    assert [len(reader.checkpoints), reader.config["second_moment"], reader.config.get("metric")] == [3, False, None]
    plain = record(tmp_path / "plain", [more], metric="gradient")
    for (_, rows), (_, expected) in zip(
        reader.example_rows(2, range(11)), plain.example_rows(0, range(11)), strict=True
    ):
        assert torch.equal(rows, expected)
    with pytest.raises(ValueError, match="are recorded with `metric='gradient'`, but got 'optimizer'"):
        record(folder, [more], metric="optimizer")


def metric_files(reader):
    return [[file["sha256"] for file in entry["metric"]] for entry in reader.config["checkpoints"]]


def test_a_training_that_is_resumed_goes_on_in_the_metric(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt("stopped by the test")

    whole = train(tmp_path / "whole", tokenizer=tiny_tokenizer(), recording=AUTO)
    folder = tmp_path / "resumed"
    callback = TracInWECallback(folder / "index", **AUTO)
    trainer = make_trainer(folder / "run", callback, tokenizer=tiny_tokenizer())
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        trainer.train()
    resumed = train(folder, tokenizer=tiny_tokenizer(), recording=AUTO, resume=True)
    assert resumed.config["metric"] == "optimizer"
    assert (segments(resumed), metric_files(resumed)) == (segments(whole), metric_files(whole))


def begin(folder, checkpoints, **options):
    """An index whose first recording is interrupted before its first row."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt("stopped by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after_training, "record_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
            record(folder, checkpoints, **options)
    return json.loads((folder / "config.json").read_text())


def test_an_index_without_a_row_can_be_begun_in_another_metric(tmp_path, adam):
    found = [begin(tmp_path / "index", saved(adam)[:1], metric=metric) for metric in ("auto", "gradient", "optimizer")]
    assert [(one["metric"], one["second_moment"], one["format_version"]) for one in found] == [
        ("optimizer", True, "2.0"),
        ("gradient", False, "1.0"),
        ("optimizer", True, "2.0"),
    ]


@pytest.fixture(scope="module")
def one_sided(tmp_path_factory, adam):
    """An index that an earlier version began with `second_moment=True`, and this one recorded."""
    folder = tmp_path_factory.mktemp("earlier") / "index"
    config = begin(folder, saved(adam), metric="optimizer")
    del config["metric"]
    (folder / "config.json").write_text(json.dumps({**config, "format_version": "1.0"}))
    record(folder, saved(adam))
    return folder


def test_an_index_of_an_earlier_version_continues_one_sided(adam, one_sided):
    """Its rows are `g / (sqrt(v) + eps)`, as they were."""
    reader, plain = (IndexReader.open(folder) for folder in (one_sided, adam / "index"))
    assert (reader.config["second_moment"], reader.config.get("metric"), reader.config["format_version"]) == (
        True,
        None,
        "1.0",
    )
    assert not (one_sided / "metric").exists()
    for position, path in enumerate(saved(adam)):
        state = torch.load(path / "optimizer.pt", weights_only=True)["state"][0]
        metric = (state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8
        pairs = [one.example_rows(position, range(11)) for one in (reader, plain)]
        for (tokens, rows), (_, values) in zip(*pairs, strict=True):
            torch.testing.assert_close(rows, values / metric[tokens], rtol=1e-5, atol=0)


def test_an_index_of_an_earlier_version_answers_what_it_can_know(tmp_path, adam, one_sided):
    earlier = InfluenceIndex.from_pretrained(one_sided, cache_dir=tmp_path / "maps")
    now = record(tmp_path / "now", saved(adam))
    now = InfluenceIndex.from_pretrained(now.folder, cache_dir=tmp_path / "maps")
    queries = classification_data(3, seed=7).remove_columns(["text", "domain"])
    for options in (
        {"special_tokens": "count"},
        {"special_tokens": "drop"},
        {"kernel": "synonym", "synonym_threshold": 0.0},
    ):
        found, expected = (one.scores(queries, cosine=False, **options) for one in (earlier, now))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    for ask in (earlier.self_influence, lambda: earlier.search(queries, cosine=True)):
        with pytest.raises(
            ValueError, match=r"of an earlier version.*Record the checkpoints again with `metric='optimizer'`"
        ):
            ask()
    with pytest.raises(ValueError, match="are recorded with `metric='optimizer'`, but got 'gradient'"):
        record(one_sided, saved(adam), metric="gradient")


def test_a_claimed_metric_must_be_one(adam):
    config = json.loads((adam / "index" / "config.json").read_text())
    for claim in ({"metric": "adam"}, {"metric": "optimizer"}):
        with pytest.raises(ValueError, match=r"under .metric."):
            parse_config(json.dumps({**config, **claim}).encode(), source="config.json")
