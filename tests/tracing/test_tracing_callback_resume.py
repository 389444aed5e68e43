"""Interrupted recordings go on where they stopped, and saved checkpoints can be recorded afterwards."""

import errno
import json
import shutil
import signal

import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hf_doge.artifacts.influence import IndexReader
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.settings import RecordingSettings
from tests.forks import Fork
from tests.launch import launch_environment
from tests.tiny import tiny_classifier
from tests.tracing.recorded_training import (
    assert_rows_are_autograd,
    classification_data,
    make_trainer,
    segments,
    train,
)

# About two examples each.
SEGMENT = {"max_segment_bytes": 10 * 16 * 4, "batch_size": 3, "dtype": "float32", "layers": "embedding"}
RATES = [0.05 / 6, 0.03 / 6, 0.01 / 6]  # of steps 2, 4 and 6 of 6, falling from 0.01


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return segments(train(folder, tokenizer=None, collator=pad, recording=SEGMENT, max_steps=6))


def pad(examples):
    width = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] + [0] * (width - len(example["input_ids"])) for example in examples]
    labels = torch.tensor([example["label"] for example in examples])
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(rows).ne(0).long(), "labels": labels}


def start(folder, *, recording=None, **options):
    callback = TracInWECallback(folder / "index", **{**SEGMENT, **(recording or {})})
    return make_trainer(folder / "run", callback, tokenizer=None, collator=pad, **{"max_steps": 6, **options})


def resume(folder, *, at=True, recording=None, **options):
    return train(
        folder,
        tokenizer=None,
        collator=pad,
        recording={**SEGMENT, **(recording or {})},
        resume=at,
        **{"max_steps": 6, **options},
    )


def masked_at_random(examples):
    batch = pad(examples)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.3, 1)}


@pytest.mark.filterwarnings("ignore:The collator or dataset draws at random")
def test_a_resumed_run_whose_collator_draws_at_random_keeps_its_seed(tmp_path):
    options = {"tokenizer": None, "collator": masked_at_random}
    train(tmp_path, recording={**SEGMENT, "seed": 3}, max_steps=4, **options)
    with pytest.raises(ValueError, match=r"with one `seed`.* was begun with 3, but got 9\. Pass `seed=3`"):
        train(tmp_path, recording={**SEGMENT, "seed": 9}, max_steps=6, resume=True, **options)
    reader = train(tmp_path, recording={**SEGMENT, "seed": 3}, max_steps=6, resume=True, **options)
    assert len(reader.checkpoints) == 3


@pytest.fixture
def recorded_batches(monkeypatch):
    """Counts batches that are recorded, and fails at one of them."""

    class Count:
        number, fail_at, error = 0, None, KeyboardInterrupt("stopped by the test")

    record = EmbeddingGradientRecorder.record

    def counted(self, batch):
        Count.number += 1
        if Count.number == Count.fail_at:
            raise Count.error
        return record(self, batch)

    monkeypatch.setattr(EmbeddingGradientRecorder, "record", counted)
    return Count


@pytest.mark.parametrize("error", [KeyboardInterrupt("stopped by the test"), RuntimeError("CUDA out of memory")])
def test_an_interrupted_recording_goes_on_after_its_last_segment(tmp_path, uninterrupted, recorded_batches, error):
    recorded_batches.fail_at, recorded_batches.error = 1 + 4 + 3, error  # a trial, checkpoint-2, half of checkpoint-4
    with pytest.raises(type(error), match=str(error)):
        start(tmp_path).train()
    stopped = json.loads((tmp_path / "index" / "config.json").read_text())
    assert [checkpoint["name"] for checkpoint in stopped["checkpoints"]] == ["checkpoint-2"]
    journal = json.loads((tmp_path / "index" / "gradients" / "checkpoint-4.partial" / "journal.json").read_text())
    num_done = sum(segment["num_examples"] for segment in journal["segments"])
    assert 0 < num_done < 11

    recorded_batches.number = 0
    reader = resume(tmp_path)
    assert segments(reader) == uninterrupted
    assert recorded_batches.number == 1 + 4 - num_done // 3 + 4  # a trial, the batches that were left, checkpoint-6
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "index" / "recording.json").exists()


def test_the_learning_rate_of_an_interrupted_checkpoint_is_not_forgotten(tmp_path, recorded_batches):
    """The Trainer logs too seldom to know it."""
    recorded_batches.fail_at = 1 + 4 + 3
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        start(tmp_path, logging_steps=100).train()
    reader = resume(tmp_path, logging_steps=100)
    assert [checkpoint["learning_rate"] for checkpoint in reader.checkpoints] == pytest.approx(RATES)


def test_a_partial_recording_of_other_weights_is_thrown_away(tmp_path, recorded_batches):
    recorded_batches.fail_at = 1 + 4 + 3
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        start(tmp_path).train()
    recorded_batches.fail_at, recorded_batches.number = None, 0
    # resumed one checkpoint earlier and trained on otherwise
    reader = resume(
        tmp_path, at=str(tmp_path / "run" / "checkpoint-2"), learning_rate=0.3, lr_scheduler_type="constant"
    )
    assert recorded_batches.number == 1 + 4 + 4
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert_rows_are_autograd(reader, 1, model, classification_data())


def test_whole_checkpoints_are_not_recorded_twice(tmp_path, uninterrupted, recorded_batches):
    start(tmp_path).train()
    assert recorded_batches.number == 1 + 3 * 4
    recorded_batches.number = 0
    for at in ("checkpoint-6", "checkpoint-2"):  # nothing left to train, and four steps to train again
        assert segments(resume(tmp_path, at=str(tmp_path / "run" / at))) == uninterrupted
    assert recorded_batches.number == 2  # trials


ENDED = {
    "middle of an epoch": {"max_steps": 4, "save_steps": 2},
    "accumulation": {"max_steps": 2, "save_steps": 2, "gradient_accumulation_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.4, "save_strategy": "epoch"},
    "online": {"max_steps": 4, "save_steps": 2, "recording": {"record": "online"}},
    "stream": {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.parametrize("kind", ENDED)
@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed before its end was recorded"])
def test_a_training_that_had_ended_moves_and_records_nothing_when_it_is_resumed(tmp_path, kind, killed):
    """A Trainer by itself makes a step more; ours it is not, so the callback makes that step an empty one."""
    options = dict(ENDED[kind])
    recording = {"dtype": "float32", **options.pop("recording", {})}
    if kind == "stream":
        rows = classification_data()
        options |= {"dataset": rows.remove_columns(["text", "domain"]).to_iterable_dataset()}
        recording["dataset"] = rows
        options["eval_strategy"] = "no"

    def make():
        callback = TracInWECallback(tmp_path / "index", **recording)
        return make_trainer(
            tmp_path / "run", callback, tokenizer=None, collator=pad, model=tiny_classifier(), **options
        )

    whole = make()
    whole.train()
    expected = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "models" not in path.parts
    }
    if killed and recording.get("record") != "online":
        last = max((tmp_path / "index" / "gradients").glob("checkpoint-*"), key=lambda path: path.name)
        config = json.loads((tmp_path / "index" / "config.json").read_text())
        config["checkpoints"] = config["checkpoints"][:-1]
        (tmp_path / "index" / "config.json").write_text(json.dumps(config))
        shutil.rmtree(last)
    resumed = make()
    result = resumed.train(resume_from_checkpoint=True)
    assert result.global_step == resumed.state.global_step == resumed.state.max_steps == whole.state.global_step
    assert resumed.state.epoch == whole.state.epoch
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    found = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "models" not in path.parts}
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []


def test_steps_that_come_out_differently_the_second_time_are_recorded_again(tmp_path):
    start(tmp_path, recording={"record_steps": 1}).train()
    reader = resume(
        tmp_path,
        at=str(tmp_path / "run" / "checkpoint-2"),
        recording={"record_steps": 1},
        learning_rate=0.3,
        lr_scheduler_type="constant",
    )
    assert [checkpoint["step"] for checkpoint in reader.checkpoints] == [1, 2, 3, 4, 5, 6]
    rates = [checkpoint["learning_rate"] for checkpoint in reader.checkpoints]
    # step 3 is made with what the scheduler had left behind, and so comes out the same
    assert rates == pytest.approx([0.06 / 6, 0.05 / 6, 0.04 / 6, 0.01, 0.01, 0.01])
    for position, checkpoint in enumerate(reader.checkpoints):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "index" / checkpoint["path"])
        assert_rows_are_autograd(reader, position, model, classification_data())


def test_a_checkpoint_that_was_saved_before_the_callback_came_is_recorded_with_its_logged_rate(tmp_path):
    trainer = make_trainer(tmp_path / "run", None, tokenizer=None, collator=pad, max_steps=6)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer.add_callback(Stop())
    trainer.train()
    reader = resume(tmp_path)
    assert [checkpoint["step"] for checkpoint in reader.checkpoints] == [2, 4, 6]
    rates = [checkpoint["learning_rate"] for checkpoint in reader.checkpoints]
    assert rates == pytest.approx(RATES)


def test_a_checkpoint_of_unknown_learning_rate_is_left_out_with_a_warning(tmp_path):
    make_trainer(tmp_path / "run", None, tokenizer=None, collator=pad, logging_steps=100, max_steps=6).train()
    with pytest.warns(UserWarning, match="its learning rate is unknown"):
        reader = resume(tmp_path, at=str(tmp_path / "run" / "checkpoint-2"), logging_steps=100)
    assert [checkpoint["step"] for checkpoint in reader.checkpoints] == [4, 6]


def test_resuming_other_weights_than_those_recorded_is_refused(tmp_path):
    start(tmp_path).train()
    expected = segments(IndexReader.open(tmp_path / "index"))
    other = tmp_path / "other"
    make_trainer(other / "run", None, tokenizer=None, collator=pad, seed=8, max_steps=6).train()
    callback = TracInWECallback(tmp_path / "index", **SEGMENT)
    trainer = make_trainer(other / "run", callback, tokenizer=None, collator=pad, seed=8, max_steps=6)
    with pytest.raises(ValueError, match="resumes at step 2 with other weights than 'checkpoint-2'"):
        trainer.train(resume_from_checkpoint=str(other / "run" / "checkpoint-2"))
    assert segments(IndexReader.open(tmp_path / "index")) == expected


def test_a_full_disk_leaves_what_was_recorded(tmp_path, uninterrupted, monkeypatch):
    from hf_doge.artifacts.influence import checkpoint_writer

    write, written = checkpoint_writer.write_atomically, []

    def fill_up(path, content):
        written.extend([path] if "checkpoint-4.partial" in str(path) else [])
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint_writer, "write_atomically", fill_up)
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path).train()
    monkeypatch.undo()
    assert segments(IndexReader.open(tmp_path / "index")) == {"checkpoint-2": uninterrupted["checkpoint-2"]}
    assert segments(resume(tmp_path)) == uninterrupted


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from tests.tracing.test_tracing_callback_resume import start

record, calls = EmbeddingGradientRecorder.record, []
def killed(self, batch):
    calls.append(batch)
    if len(calls) == 1 + 4 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return record(self, batch)
EmbeddingGradientRecorder.record = killed
start(Path(sys.argv[1])).train()
"""


def test_a_killed_recording_goes_on(tmp_path, uninterrupted):
    process = Fork(["-c", KILLED_RUN, tmp_path], env=launch_environment())
    assert process.wait(timeout=200) == -signal.SIGKILL, process.output
    assert (tmp_path / "index" / "gradients" / "checkpoint-4.partial").exists()
    assert segments(resume(tmp_path)) == uninterrupted


# After training


def settings(**options):
    return RecordingSettings(
        dtype="float32", layers="embedding", max_segment_bytes=SEGMENT["max_segment_bytes"], **options
    )


@pytest.fixture
def checkpoints(tmp_path):
    make_trainer(tmp_path / "run", None, tokenizer=None, collator=pad, max_steps=6).train()
    return [tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4, 6)]


def test_saved_checkpoints_recorded_afterwards_are_those_of_the_callback(tmp_path, uninterrupted, checkpoints):
    options = {"collator": pad, "settings": settings(), "batch_size": 3, "progress": False}
    data = classification_data()
    for given in (checkpoints[:1], checkpoints):  # the second time one is there already
        record_dataset(tmp_path / "index", given, data, **options)
    reader = IndexReader.open(tmp_path / "index")
    assert segments(reader) == uninterrupted
    assert [checkpoint["learning_rate"] for checkpoint in reader.checkpoints] == pytest.approx(RATES)
    assert [checkpoint["step"] for checkpoint in reader.checkpoints] == [2, 4, 6]
    assert [checkpoint["epoch"] for checkpoint in reader.checkpoints] == pytest.approx([2 / 3, 4 / 3, 2])
    assert reader.examples["text"] == data["text"]


def test_the_default_collator_pads_by_the_tokenizer(tmp_path, checkpoints, tokenizer):
    record_dataset(
        tmp_path / "index",
        checkpoints,
        classification_data(),
        tokenizer=tokenizer,
        settings=settings(),
        progress=False,
    )
    model = BertForSequenceClassification.from_pretrained(checkpoints[1])
    assert_rows_are_autograd(IndexReader.open(tmp_path / "index"), 1, model, classification_data())


def test_given_learning_rates_are_taken(tmp_path, checkpoints):
    for name in ("trainer_state.json", "scheduler.pt", "optimizer.pt"):
        (checkpoints[0] / name).unlink()
    options = {"collator": pad, "settings": settings(), "progress": False}
    with pytest.raises(ValueError, match=r"none logged at step 2, .* Pass `learning_rates`"):
        record_dataset(tmp_path / "index", checkpoints, classification_data(), **options)
    assert not (tmp_path / "index").exists()
    writer = record_dataset(
        tmp_path / "index", checkpoints, classification_data(), learning_rates=[1, 0.5, 0], **options
    )
    assert writer.checkpoint_names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [entry["learning_rate"] for entry in writer.config["checkpoints"]] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rates": [1]}, "one number for each checkpoint, but there are 1 for 3"),
        ({"settings": RecordingSettings(record="online")}, "with `record='checkpoint'`"),
        ({"learning_rates": 0.1}, "one number for each checkpoint, but there are 1 for 3"),
        ({"learning_rates": [1, 1, "x"]}, "`learning_rates` must be a number, but got .x."),
        ({"learning_rates": [1, 1, float("inf")]}, "`learning_rates` must be in .*, but got inf"),
        ({"batch_size": 1.5}, "`batch_size` must be a whole number, but got"),
        ({"batch_size": "2"}, "`batch_size` must be a whole number, but got"),
        ({"seed": "a"}, "`seed` must be a whole number"),
        ({"collator": lambda examples: None}, "must return a dictionary .* returned a NoneType"),
    ],
)
def test_what_cannot_be_recorded_afterwards_is_refused(tmp_path, checkpoints, options, match):
    with pytest.raises(ValueError, match=match):
        record_dataset(tmp_path / "index", checkpoints, classification_data(), **options)


def test_a_checkpoint_of_the_same_name_has_the_recorded_weights_and_rate(tmp_path, checkpoints):
    options = {"collator": pad, "settings": settings(), "progress": False}
    data, folder = classification_data(), tmp_path / "index"
    record_dataset(folder, checkpoints[:2], data, learning_rates=[1, 0.5], **options)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record_dataset(folder, checkpoints[:2], data, learning_rates=(rate for rate in (1, 0.5)), **options)
    with pytest.raises(ValueError, match=r"give 'checkpoint-4' the rate that the index has, 0.5, but got 0.7"):
        record_dataset(folder, checkpoints[:2], data, learning_rates=[1, 0.7], **options)
    for place in (1, 0):
        other = shutil.copytree(checkpoints[place], tmp_path / "other" / checkpoints[place].name)
        tiny_classifier(seed=5).save_pretrained(other)
        paths = [checkpoints[0], other] if place else [other, *checkpoints[1:]]
        with pytest.raises(ValueError, match=rf"'{other.name}' must have the weights .* Record another training in"):
            record_dataset(folder, paths, data, **options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("given", [None, 5, [5], [None]])
def test_checkpoints_that_are_no_folders_are_refused_by_the_argument(tmp_path, given):
    with pytest.raises(ValueError, match=r"`checkpoints` must be a list of folders, but got "):
        record_dataset(tmp_path / "index", given, classification_data())


def test_a_list_of_examples_may_hold_text_too(tmp_path, checkpoints, tokenizer):
    options = {"tokenizer": tokenizer, "settings": settings(), "progress": False}
    for name, data in (("columns", classification_data()), ("list", classification_data().to_list())):
        record_dataset(tmp_path / name, checkpoints, data, **options)
    readers = [IndexReader.open(tmp_path / name) for name in ("columns", "list")]
    assert segments(readers[0]) == segments(readers[1])
    assert readers[1].examples["text"] == classification_data()["text"]


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path, checkpoints):
    options = {"collator": pad, "settings": settings(), "progress": False}
    with pytest.raises(ValueError, match=r"must be a list of folders, but got .*checkpoint-2' alone"):
        record_dataset(tmp_path / "index", str(checkpoints[0]), classification_data(), **options)
    with pytest.raises(ValueError, match="at least one folder"):
        record_dataset(tmp_path / "index", [], classification_data(), **options)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-9.* is none"):
        record_dataset(tmp_path / "index", [tmp_path / "checkpoint-9"], classification_data(), **options)
    with pytest.raises(ValueError, match="names of their own"):
        record_dataset(tmp_path / "index", [checkpoints[0], checkpoints[0]], classification_data(), **options)
    with pytest.raises(ValueError, match="Add labels"):
        record_dataset(
            tmp_path / "index",
            checkpoints,
            classification_data().remove_columns("label"),
            **{**options, "collator": unlabelled},
        )
    shutil.rmtree(tmp_path / "index")
    model = tiny_classifier()
    model.resize_token_embeddings(40, mean_resizing=False)
    model.save_pretrained(checkpoints[1])
    with pytest.raises(ValueError, match=r"one shape of embeddings, \(32, 16\) here, but .* has \(40, 16\)"):
        record_dataset(tmp_path / "index", checkpoints, classification_data(), **options)
    assert list(segments(IndexReader.open(tmp_path / "index"))) == ["checkpoint-2"]


def unlabelled(examples):
    batch = pad([{**example, "label": 0} for example in examples])
    return {key: batch[key] for key in ("input_ids", "attention_mask")}
