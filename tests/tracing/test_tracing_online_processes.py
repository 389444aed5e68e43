"""`record="online"` on two processes: each keeps the rows of its own batches, the main one makes one index of them."""

import json
import signal

import pytest
import torch

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.online import PARTIAL
from tests.launch import run_processes, start_without_launcher
from tests.tiny import tiny_gpt2
from tests.tracing.online_training import MODELS, assert_rows, dense, index_rows, language_dataset, pad, train

SCRIPT = """
import json
import os
import signal
import sys
from pathlib import Path

from hf_doge.tracing import processes
from hf_doge.tracing.online import OnlineRecording
from tests.launch import end_process_group
from tests.tracing.online_training import MODELS, record, still
from tests.tracing.test_tracing_online_processes import train_online

folder, case = Path(sys.argv[1]), sys.argv[2]
if case == "still":
    for name in ("classifier", "gpt2"):
        make_model, make_dataset = MODELS[name]
        model = make_model()
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
        record(model, make_dataset(num_examples=11), folder / name, **options, **still(model))
    for accumulation in (1, 2, 4):
        train_online(folder / str(accumulation), num_processes=2, accumulation=accumulation)
else:
    save = OnlineRecording.save

    def killed_at_a_save(self, facts, **options):
        if facts["step"] == 4 and processes.process_index() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, facts, **options)

    OnlineRecording.save = killed_at_a_save
    try:
        train_online(folder, num_processes=2, accumulation=2)
    except RuntimeError as error:
        (folder / "told.json").write_text(json.dumps(f"{type(error).__name__}: {error}"))
end_process_group()
"""


def train_online(folder, *, num_processes=1, accumulation=1, resume=None):
    """Six steps of 8 examples each, however they are shared out."""
    return train(
        tiny_gpt2(),
        language_dataset(num_examples=24),
        folder / "out",
        callbacks=[TracInWECallback(folder / "index", record="online", dtype="float32")],
        resume=resume,
        per_device_train_batch_size=8 // num_processes // accumulation,
        gradient_accumulation_steps=accumulation,
        ddp_backend="gloo" if num_processes > 1 else None,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train_online(folder)
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    (folder / "script.py").write_text(SCRIPT)
    run_processes(folder / "script.py", folder, "still")
    return folder


def assert_same_index(folder, expected):
    steps = []
    for place in (folder, expected):
        checkpoints = json.loads((place / "index" / "config.json").read_text())["checkpoints"]
        steps.append([checkpoint["step"] for checkpoint in checkpoints])
    assert steps[0] == steps[1] == [2, 4, 6]
    for number in range(3):
        assert_rows(index_rows(folder, checkpoint=number), index_rows(expected, checkpoint=number), rtol=1e-3)


def test_rows_of_two_processes_have_the_scale_of_one(launched):
    for name in ("classifier", "gpt2"):
        make_model, make_dataset = MODELS[name]
        uses = []
        with EmbeddingGradientRecorder(make_model()) as recorder:
            for example, found in zip(make_dataset(num_examples=11), index_rows(launched / name), strict=True):
                alone = 0.5 * dense(*recorder.record(pad([example]))[0], 16)  # the learning rate is 0.5
                uses.append(round(float((found * alone).sum() / (alone * alone).sum())))
                torch.testing.assert_close(found, uses[-1] * alone, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))
        # eleven examples on two processes: accelerate fills the last batch with one that was used before
        assert sorted(uses) == [1] * 10 + [2]
        assert not (launched / name / "index" / PARTIAL).exists()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_same_global_batch_makes_the_same_index_on_two_processes(launched, alone, accumulation):
    assert_same_index(launched / str(accumulation), alone)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A training of two processes; the main one was killed when the Trainer had saved and the index had not."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "script.py").write_text(SCRIPT)
    processes = start_without_launcher(folder / "script.py", folder, "killed")
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0], outputs[1][-3000:]
    return folder


def test_a_killed_process_ends_the_other_and_one_process_finishes_what_two_began(killed, alone):
    error = json.loads((killed / "told.json").read_text())
    assert error.startswith(
        "ProcessFailedError: The store of the process group is gone, and with it the process that holds it"
    )
    checkpoints = json.loads((killed / "index" / "config.json").read_text())["checkpoints"]
    assert [checkpoint["step"] for checkpoint in checkpoints] == [2]
    assert not list((killed / "index" / "gradients").rglob("checkpoint-4*/*.parquet"))
    # with the batches of the two, as transformers 5.0 goes on with the batch size of the checkpoint
    train_online(killed, accumulation=4, resume=True)
    assert_same_index(killed, alone)
    assert not (killed / "index" / PARTIAL).exists()
