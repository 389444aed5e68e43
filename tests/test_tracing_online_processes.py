"""`record="online"` on two processes: each keeps the rows of its own batches, the main one makes one index of them."""

import torch

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from tests.launch import launch
from tests.online_training import MODELS, dense, index_rows, pad

SCRIPT = """
import sys
from pathlib import Path

import torch

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
# A thread of gloo that still lets go of its last work while Python ends is aborted, and the process with it.
torch.distributed.destroy_process_group()
"""


def test_rows_of_two_processes_have_the_scale_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch(script, tmp_path)
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
