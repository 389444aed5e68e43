"""Learning rates of checkpoints whose log has none at their step: from the schedule of the training."""

import json
import math
import os
import pickle
import re
import resource
import zipfile

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_doge import TracInWECallback
from hf_doge.artifacts.influence import IndexReader
from hf_doge.cli import main
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.inert_pickle import read_state
from hf_doge.tracing.saved_checkpoints import describe_checkpoint
from hf_doge.tracing.saved_moments import saved_group_rate
from tests.tiny import tiny_classifier, tiny_tokenizer
from tests.tracing.recorded_training import classification_data
from tests.tracing.test_second_moments import lone_classifier

ROWS = [{"text": f"w{number + 3} w{number + 4}", "label": number % 2} for number in range(9)]
SCHEDULES = {
    "linear": {},
    "linear, warmed up": {"warmup_steps": 1},
    "warmed up for a part": {"warmup_steps": 0.1},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    "constant": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    "no optimizer, but a log": {"save_only_model": True, "logging_strategy": "steps", "logging_steps": 2},
    "some are logged": {"logging_strategy": "steps", "logging_steps": 3},
}


def train(folder, *, optimizers=(None, None), **options):
    """Returns the checkpoints, and the rates that the callback has seen."""
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(
        folder / "run",
        **{
            "learning_rate": 3e-3,
            "max_steps": 6,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            **quiet,
            **options,
        },
    )
    callback = TracInWECallback(folder / "index", dataset=classification_data())
    trainer = Trainer(
        tiny_classifier() if optimizers[0] is None else optimizers[2],
        args,
        train_dataset=classification_data().remove_columns(["text", "domain"]),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
        optimizers=optimizers[:2],
    )
    trainer.train()
    reader = IndexReader.open(folder / "index")
    paths = [folder / "run" / f"checkpoint-{step}" for step in (2, 4, 6)]
    return paths, [one["learning_rate"] for one in reader.checkpoints]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_of_the_training_tells_the_rate_of_each_step(tmp_path, name, caplog):
    paths, expected = train(tmp_path, **SCHEDULES[name])
    assert [describe_checkpoint(path)["learning_rate"] for path in paths] == pytest.approx(expected, rel=1e-9)
    assert len(set(expected)) > 1
    assert not [one for one in caplog.records if one.name.startswith("hf_doge")]


def own_schedule(factor):
    model = tiny_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor), model


def test_a_schedule_of_ones_own_is_told_by_what_comes_next(tmp_path, caplog):
    paths, expected = train(tmp_path, optimizers=own_schedule(lambda step: 1 / (step + 1)))
    found = [describe_checkpoint(path)["learning_rate"] for path in paths]
    assert found == pytest.approx([0.02 / 3, 0.02 / 5, 0.02 / 7])
    assert expected == pytest.approx([0.02 / 2, 0.02 / 4, 0.02 / 6])
    assert len([one for one in caplog.records if "that of the next step" in one.getMessage()]) == 3
    for path in paths:
        (path / "scheduler.pt").unlink()
        (path / "training_args.bin").unlink()
    assert [describe_checkpoint(path)["learning_rate"] for path in paths] == pytest.approx(found)  # of optimizer.pt


def of_hf_doge(caplog):
    return [one.getMessage() for one in caplog.records if one.name.startswith("hf_doge")]


def saved(folder, step, *, rate=None, logged=(), max_steps=6, lambdas=({},), **options):
    """A checkpoint of 3e-3 in which the scheduler has `rate` next."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "max_steps": max_steps, "log_history": logged}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    args = {"learning_rate": 3e-3, "report_to": [], "use_cpu": True, **options}
    torch.save(TrainingArguments(folder / "run", **args), folder / "training_args.bin")
    if rate is not None:
        scheduler = {"base_lrs": [3e-3], "last_epoch": step, "_last_lr": [rate], "lr_lambdas": [*lambdas]}
        torch.save(scheduler, folder / "scheduler.pt")
    return folder


UNCERTAIN = {
    "nothing confirms it": ({"step": 3}, 2e-3, "no scheduler.pt is there to confirm it"),
    "half is that of a cosine too": ({"step": 3, "rate": 1.5e-3}, 2e-3, "'cosine' would agree .* and give 0.00225"),
    "0 is the end of many": ({"step": 6, "rate": 0.0}, 5e-4, "'cosine' would agree .* and give 0.000200962"),
    "made by oneself": ({"step": 2, "rate": 2e-3, "lambdas": (None,)}, 2.5e-3, "was not made of it"),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_a_rate_that_is_not_certain_is_named_in_a_warning(tmp_path, name, caplog):
    options, expected, why = UNCERTAIN[name]
    path = saved(tmp_path / f"checkpoint-{options['step']}", **options)
    assert describe_checkpoint(path)["learning_rate"] == pytest.approx(expected)
    (message,) = of_hf_doge(caplog)
    assert str(path) in message
    assert f"{expected:g} is taken" in message
    assert "`hf-doge index --learning_rates`" in message
    assert re.search(why, message)


def test_the_checkpoint_before_tells_the_rate_of_the_next_step(tmp_path, caplog):
    """Where a training was resumed for longer, that is not the rate of its schedule."""
    saved(tmp_path / "checkpoint-3", 3, rate=0.0, max_steps=3)
    found = [
        describe_checkpoint(saved(tmp_path / f"checkpoint-{step}", step, rate=3e-3 * (1 - step / 6)))
        for step in (4, 5)
    ]
    assert [one["learning_rate"] for one in found] == pytest.approx([0.0, 1e-3])
    assert len(of_hf_doge(caplog)) == 1


def test_a_log_of_the_next_step_is_read_as_such(tmp_path, caplog):
    """Older Trainers logged after the scheduler."""
    logged = [{"step": step, "learning_rate": 3e-3 * (1 - step / 6)} for step in (1, 2)]
    for rate in (2e-3, None):
        path = saved(tmp_path / f"{rate}" / "checkpoint-2", 2, rate=rate, logged=logged)
        assert describe_checkpoint(path)["learning_rate"] == pytest.approx(2.5e-3)
    assert not of_hf_doge(caplog)
    own = [{"step": 1, "learning_rate": 1e-3}, {"step": 2, "learning_rate": 5e-4}]
    path = saved(tmp_path / "own" / "checkpoint-2", 2, rate=5e-4, logged=own, lambdas=(None,))
    assert describe_checkpoint(path)["learning_rate"] == 5e-4
    assert "may be that of the next step" in of_hf_doge(caplog)[0]


LATE = {
    "no scheduler": {"logged": [{"step": 1, "learning_rate": 1e-3}, {"step": 2, "learning_rate": 5e-4}]},
    "one log alone": {"logged": [{"step": 2, "learning_rate": 5e-4}]},
    "one log, which is what comes next": {"logged": [{"step": 2, "learning_rate": 5e-4}], "rate": 5e-4},
}


@pytest.mark.parametrize("name", LATE)
def test_a_log_that_may_be_of_the_next_step_is_named_unless_a_trainer_of_today_wrote_it(tmp_path, name, caplog):
    path = saved(tmp_path / "checkpoint-2", 2, lambdas=(None,), **LATE[name])
    assert describe_checkpoint(path)["learning_rate"] == 5e-4
    (message,) = of_hf_doge(caplog)
    assert "may be that of the next step, as older Trainers logged it" in message
    caplog.clear()
    for version in ("4.57.1", "x", 5):
        (path / "config.json").write_text(json.dumps({"transformers_version": version}))
        describe_checkpoint(path)
        assert len(of_hf_doge(caplog)) == (version != 5)
        caplog.clear()
    (path / "config.json").write_text('{"transformers_version": "5.0.0"}')
    assert describe_checkpoint(path)["learning_rate"] == 5e-4
    assert not of_hf_doge(caplog)
    (path / "config.json").rename(path / "adapter_config.json")  # an adapter has no other; then the arguments tell
    torch.save(TrainingArguments("run", report_to=[], use_cpu=True), path / "training_args.bin")
    assert describe_checkpoint(path)["learning_rate"] == 5e-4
    assert not of_hf_doge(caplog)


def own_groups():
    """The embeddings in a group of their own, with a tenth of the rate."""
    model = lone_classifier()
    matrix = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not matrix]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": [matrix], "lr": 3e-4}], lr=3e-3)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6), model


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_rate_that_may_be_of_another_parameter_group_is_named(tmp_path, is_whole, caplog):
    options = {"save_only_model": not is_whole, "logging_strategy": "steps", "logging_steps": 2}
    paths, expected = train(tmp_path, optimizers=own_groups(), **options)
    caplog.clear()

    def record(folder, **options):
        reader = record_dataset(
            folder, paths, classification_data(), tokenizer=tiny_tokenizer(), progress=False, **options
        )
        return [one["learning_rate"] for one in reader.config["checkpoints"]]

    found = record(tmp_path / "again")
    told = [one for one in of_hf_doge(caplog) if "those of the first parameter group" in one]
    if is_whole:
        assert not told
        assert found == pytest.approx(expected)
        return
    assert found == pytest.approx([10 * rate for rate in expected])
    assert len(told) == 1
    assert "['checkpoint-2', 'checkpoint-4', 'checkpoint-6']" in told[0]
    caplog.clear()
    assert record(tmp_path / "given", learning_rates=expected) == pytest.approx(expected)
    assert not of_hf_doge(caplog)
    for path in paths:
        (path / "optimizer.pt").write_bytes(b"of another kind")
    record(tmp_path / "unread")
    assert [one for one in of_hf_doge(caplog) if "there is no optimizer.pt that can be read" in one]


@pytest.mark.parametrize("kind", ["one checkpoint", "one rate"])
def test_another_parameter_group_is_not_told_of_where_it_changes_no_rank(tmp_path, kind, caplog):
    """The rate of one checkpoint scales all scores; a scheduler of one rate for all groups tells that there is no other."""
    options = {"save_only_model": kind == "one checkpoint", "logging_strategy": "steps", "logging_steps": 2}
    paths, _ = train(tmp_path, **options)
    if kind == "one rate":
        for path in paths:
            (path / "optimizer.pt").unlink()
    caplog.clear()
    chosen = paths[:1] if kind == "one checkpoint" else paths
    record_dataset(tmp_path / "again", chosen, classification_data(), tokenizer=tiny_tokenizer(), progress=False)
    assert not of_hf_doge(caplog)


BAD_ARGUMENTS = {
    "a warmup of text": {"warmup_steps": "abc"},
    "a warmup without end": {"warmup_steps": math.inf},
    "a ratio of text": {"warmup_ratio": "x"},
    "a kind that is none": {"lr_scheduler_type": {"a": 1}},
    "a rate too large": {"learning_rate": 10**400},
    "a rate below 0": {"learning_rate": -1.0},
    "a rate that is no number": {"learning_rate": math.nan},
    "a power of text": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}},
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_as_good_as_none(tmp_path, name):
    path = saved(tmp_path / "checkpoint-2", 2)
    args = TrainingArguments(path, report_to=[], use_cpu=True)
    args.__dict__.update(BAD_ARGUMENTS[name])
    torch.save(args, path / "training_args.bin")
    with pytest.raises(ValueError, match="none logged at step 2, and neither training_args"):
        describe_checkpoint(path)


@pytest.mark.parametrize("bad", ["x", None, math.nan, math.inf, -1.0, True, 10**400])
def test_a_bad_rate_in_a_file_is_as_good_as_none(tmp_path, bad):
    logged = [{"step": 2, "learning_rate": bad}, {"step": 10**400, "learning_rate": 1.0}, {"step": 1}]
    path = saved(tmp_path / "checkpoint-2", 2, rate=bad, logged=logged)
    assert describe_checkpoint(path)["learning_rate"] == pytest.approx(2.5e-3)
    (path / "training_args.bin").unlink()
    torch.save({"param_groups": [{"lr": bad}]}, path / "optimizer.pt")
    with pytest.raises(ValueError, match="none logged at step 2"):
        describe_checkpoint(path)


@pytest.mark.parametrize("history", [5, "abc", {"a": 1}, [5]])
def test_a_log_of_another_kind_is_refused_by_name(tmp_path, history):
    with pytest.raises(ValueError, match=r"`log_history` in .* must be a list of what was logged"):
        describe_checkpoint(saved(tmp_path, 2, logged=history))


def test_no_log_at_all_is_an_empty_one(tmp_path):
    assert describe_checkpoint(saved(tmp_path, 2, rate=2e-3, logged=None))["learning_rate"] == pytest.approx(2.5e-3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04aaaa", b"hello"])
def test_a_damaged_scheduler_is_as_good_as_none(tmp_path, content):
    path = saved(tmp_path, 2)
    (path / "scheduler.pt").write_bytes(content)
    assert describe_checkpoint(path)["learning_rate"] == pytest.approx(2.5e-3)


@pytest.mark.parametrize(
    "first", [{}, {"lr": "x"}, {"lr": math.nan}, {"lr": 0.1, "initial_lr": 10**400}, {"lr": -1.0}]
)
def test_bad_rates_of_groups_are_refused_by_name(tmp_path, first):
    model = tiny_classifier()
    matrix = model.get_input_embeddings().weight
    state = {1: {"exp_avg": torch.zeros_like(matrix)}}
    groups = [{"params": [0], **first}, {"params": [1], "lr": 0.2}]
    torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"The learning rate of the input embeddings at .* must be known"):
        saved_group_rate(tmp_path, 0.1, lambda: model)
    torch.save({"state": state, "param_groups": [5, {"lr": 1}]}, tmp_path / "optimizer.pt")
    assert saved_group_rate(tmp_path, 0.1, lambda: model) == 0.1  # of another kind


def test_what_the_optimizer_began_with_counts_and_not_the_arguments(tmp_path):
    paths, expected = train(tmp_path, optimizers=own_schedule(lambda step: (6 - step) / 6))
    found = [describe_checkpoint(path)["learning_rate"] for path in paths[:2]]  # behind the last one the rate is 0
    assert found == pytest.approx(expected[:2], rel=1e-9)


def test_a_rate_that_no_file_tells_is_asked_for(tmp_path):
    paths, _ = train(tmp_path, optimizers=own_schedule(lambda step: max(0.0, 1 - step / 3)))
    message = "has none logged at step 6, and neither training_args.bin nor scheduler.pt tells it"
    with pytest.raises(ValueError, match=re.escape(message)):
        describe_checkpoint(paths[-1])
    for name in ("scheduler.pt", "training_args.bin", "optimizer.pt"):
        (paths[0] / name).write_bytes(b"no file of torch")
    with pytest.raises(ValueError, match="none logged at step 2"):
        describe_checkpoint(paths[0])


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_of_the_arguments_file_runs(tmp_path):
    torch.save(Harmful(tmp_path / "made"), tmp_path / "training_args.bin")
    assert read_state(tmp_path / "training_args.bin") == {}
    args = TrainingArguments(
        tmp_path / "run", learning_rate=0.25, lr_scheduler_type="cosine", report_to=[], use_cpu=True
    )
    args.harm = Harmful(tmp_path / "made")
    torch.save(args, tmp_path / "training_args.bin")
    state = read_state(tmp_path / "training_args.bin")
    assert (state["learning_rate"], state["lr_scheduler_type"]) == (0.25, "cosine")
    assert not (tmp_path / "made").exists()
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(args.to_dict()))
    assert read_state(tmp_path / "training_args.bin") == {}
    assert read_state(tmp_path / "nothing.bin") == {}


FLOODS = {
    "a large memo": b"\x80\x02}r\x00\x00\x00\x08.",
    "a large memo, as text": b"}p134217728\n.",
    "a length that is not there": b"\x80\x04\x8e\x00\x00\x00\x00\x01\x00\x00\x00.",
    "tuples without end, to be hashed": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_small_arguments_file_cannot_ask_for_much_memory(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "training_args.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", FLOODS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_state(tmp_path / "training_args.bin") == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB; they ask for 2 GiB and more


def test_an_ordinary_run_is_indexed_with_one_bar_for_all(tmp_path, capsys):
    """By epoch, with nothing logged and no learning rate given; what was recorded in training is what is recorded again."""
    _, expected = train(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = ["index", "--data", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "again"), "--checkpoints"]
    capsys.readouterr()
    for steps in ([2], [2, 4, 6]):
        assert main([*argv, *(str(tmp_path / "run" / f"checkpoint-{step}") for step in steps)]) == 0
        shown = capsys.readouterr().err
        total = len(ROWS) * (1 if steps == [2] else 2)
        assert f"/{total} [" in shown
        assert "Loading weights" not in shown
        assert set(re.findall(r"Recording[^:]*:.*?/(\d+) \[", shown)) == {str(total)}
    assert [one["learning_rate"] for one in IndexReader.open(tmp_path / "again").checkpoints] == pytest.approx(
        expected
    )
    assert logging.is_progress_bar_enabled()
