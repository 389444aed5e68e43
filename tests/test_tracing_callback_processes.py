"""Two processes on the CPU: the main one records, the other waits."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertForSequenceClassification

from hf_doge.artifacts.influence import IndexReader
from tests.recorded_training import assert_rows_are_autograd, classification_data, segments, train
from tests.test_tracing_callback_resume import pad

SCRIPT = """
import sys
from pathlib import Path

import torch.distributed as dist

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing import processes
from hf_doge.tracing.callback import TracInWECallback
from tests.recorded_training import make_trainer
from tests.test_tracing_callback_resume import pad

folder, fails = Path(sys.argv[1]), sys.argv[2] == "fails"
processes._SECONDS_BETWEEN_SIGNS = 0.0  # a sign of life after each batch
record, calls = EmbeddingGradientRecorder.record, []


def counted(self, batch):
    calls.append(batch)
    if fails and len(calls) == 3:
        raise ValueError("a bad example")
    return record(self, batch)


EmbeddingGradientRecorder.record = counted
callback = TracInWECallback(folder / "index", dtype="float32", batch_size=2)
trainer = make_trainer(folder / "run", callback, tokenizer=None, collator=pad, ddp_backend="gloo", per_device_train_batch_size=2)
try:
    trainer.train()
finally:
    (folder / f"process-{dist.get_rank()}").write_text(f"{dist.get_world_size()} {len(calls)} {sys.exc_info()[1]}")
"""


def launch(folder, how):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    repository = Path(__file__).parent.parent
    result = subprocess.run(
        [*launcher, *options, str(folder / "script.py"), str(folder), how],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return result, [(folder / f"process-{rank}").read_text().split(maxsplit=2) for rank in (0, 1)]


def test_the_main_process_records_all_examples_once(tmp_path):
    result, told = launch(tmp_path, "works")
    assert result.returncode == 0, result.stderr[-3000:]
    assert told == [["2", "13", "None"], ["2", "0", "None"]]  # a trial and two times six batches
    reader = IndexReader.open(tmp_path / "index")
    for position, step in enumerate((2, 4)):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        assert_rows_are_autograd(reader, position, model, classification_data())
    assert [checkpoint["learning_rate"] for checkpoint in reader.checkpoints] == pytest.approx([0.0075, 0.0025])
    # two processes with batches of two train as one with batches of four, but for rounding
    alone = train(tmp_path / "alone", tokenizer=None, collator=pad)
    assert set(segments(alone)) == set(segments(reader))


def test_an_error_of_the_main_process_ends_the_others_too(tmp_path):
    result, told = launch(tmp_path, "fails")
    assert result.returncode != 0
    assert told[0] == ["2", "3", "a bad example"]
    assert told[1] == ["2", "0", "The main process failed while this one waited for it: ValueError: a bad example"]
