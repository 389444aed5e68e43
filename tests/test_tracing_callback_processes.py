"""Two processes on the CPU: the main one records, the other waits."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertForSequenceClassification

from hf_doge.artifacts.influence import IndexReader
from tests.recorded_training import assert_rows_are_autograd, classification_data

SCRIPT = """
import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing import processes
from hf_doge.tracing.callback import TracInWECallback
from tests.recorded_training import make_trainer
from tests.test_tracing_callback_resume import pad

folder = Path(sys.argv[1])
processes._SECONDS_BETWEEN_SIGNS = 0.0  # a sign of life after each batch
record, calls, fail_at = EmbeddingGradientRecorder.record, [], None


def counted(self, batch):
    calls.append(batch)
    if len(calls) == fail_at:
        raise ValueError("a bad example")
    return record(self, batch)


EmbeddingGradientRecorder.record = counted


def train(name):
    calls.clear()
    callback = TracInWECallback(folder / name / "index", dtype="float32", batch_size=2)
    trainer = make_trainer(
        folder / name / "run",
        callback,
        tokenizer=None,
        collator=pad,
        ddp_backend="gloo",
        per_device_train_batch_size=2,
    )
    try:
        trainer.train()
    except Exception as error:
        return [len(calls), str(error)]
    return [len(calls), None]


told = {"works": train("works")}
fail_at = 3
told["fails"] = train("fails")
(folder / f"process-{dist.get_rank()}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A training that is recorded, then one whose recording fails; what each process has to tell of them."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `accelerate launch` runs for several processes on one machine; its `--cpu` asks for MPI
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    repository = Path(__file__).parent.parent
    result = subprocess.run(
        [*launcher, str(folder / "script.py"), str(folder)],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, [json.loads((folder / f"process-{rank}.json").read_text()) for rank in (0, 1)]


def test_the_main_process_records_all_examples_once(launched):
    folder, told = launched
    assert [told[rank]["works"] for rank in (0, 1)] == [[1 + 2 * 6, None], [0, None]]  # a trial and two recordings
    reader = IndexReader.open(folder / "works" / "index", cache_dir=folder / "cache")
    assert [checkpoint["learning_rate"] for checkpoint in reader.checkpoints] == pytest.approx([0.0075, 0.0025])
    for position, step in enumerate((2, 4)):
        model = BertForSequenceClassification.from_pretrained(folder / "works" / "run" / f"checkpoint-{step}")
        assert_rows_are_autograd(reader, position, model, classification_data())


def test_an_error_of_the_main_process_is_one_of_the_others_too(launched):
    _, told = launched
    assert told[0]["fails"] == [3, "a bad example"]
    assert told[1]["fails"] == [0, "The main process failed while this one waited for it: ValueError: a bad example"]
