"""`record="online"` on two processes: each keeps the rows of its own batches, the main one makes one index of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from tests.online_training import MODELS, dense, index_rows, pad

SCRIPT = """
import sys
from pathlib import Path

from tests.online_training import MODELS, record, still

for name in ("classifier", "gpt2"):
    make_model, make_dataset = MODELS[name]
    model = make_model()
    record(
        model,
        make_dataset(num_examples=11),
        Path(sys.argv[1]) / name,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        **still(model),
    )
"""


def launch(folder):
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    # what `accelerate launch` runs for several processes on one machine; its `--cpu` asks for MPI
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [*launcher, str(folder / "script.py"), str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_rows_of_two_processes_have_the_scale_of_one(tmp_path):
    result = launch(tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("classifier", "gpt2"):
        make_model, make_dataset = MODELS[name]
        uses = []
        with EmbeddingGradientRecorder(make_model()) as recorder:
            for example, found in zip(make_dataset(num_examples=11), index_rows(tmp_path / name), strict=True):
                alone = 0.5 * dense(*recorder.record(pad([example]))[0], 16)  # the learning rate is 0.5
                uses.append(round(float((found * alone).sum() / (alone * alone).sum())))
                torch.testing.assert_close(found, uses[-1] * alone, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))
        # eleven examples on two processes: accelerate fills the last batch with one that was used before
        assert sorted(uses) == [1] * 10 + [2]
        assert not (tmp_path / name / "index" / "online.partial").exists()
