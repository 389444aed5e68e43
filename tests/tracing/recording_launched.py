"""What the processes of tests/tracing/test_tracing_callback_processes.py run: `python recording_launched.py FOLDER CASE`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing import processes
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.processes import process_index
from tests.launch import end_process_group
from tests.tracing.recorded_training import make_trainer
from tests.tracing.test_tracing_callback_resume import SEGMENT, pad

FAULT = 1 + 2 + 2  # a trial, checkpoint-2, the second batch of a share of checkpoint-4
BATCHES = {"per_device_train_batch_size": 2}  # on two processes, 4 together
record, calls, faults = EmbeddingGradientRecorder.record, [], {}


def counted(self, batch):
    calls.append(batch)
    fault = faults.get(len(calls))
    if fault is not None:
        fault()
    return record(self, batch)


EmbeddingGradientRecorder.record = counted


def train(folder, *, index=None, resume=None, collator=None, recording=None, **options):
    callback = TracInWECallback(index or folder / "index", **{**SEGMENT, **(recording or {})})
    trainer = make_trainer(
        folder / "run",
        callback,
        tokenizer=None,
        collator=collator or pad,
        **{**BATCHES, "ddp_backend": "gloo", "max_steps": 6, **options},
    )
    calls.clear()
    told = {"error": None}
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (RuntimeError, ValueError) as error:
        told["error"] = f"{type(error).__name__}: {error}"
    return {**told, "calls": len(calls), "seconds": time.monotonic() - start}


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("a bad example")


def main(folder, case):
    if case == "together":  # several trainings in one start
        told = {"whole": train(folder / "whole")}
        float16 = {"dtype": "float16", "top_k_tokens": 2, "layers": "auto"}
        told["float16"] = train(folder / "float16", recording=float16, max_steps=2)
        told["moments"] = train(folder / "moments", recording={"metric": "optimizer"}, max_steps=2)
        components = {"projection": "pca", "projection_width": 4, "metric": "optimizer"}
        told["components"] = train(folder / "components", recording=components, max_steps=2)
        told["random"] = train(folder / "random", collator=MaskingCollator(), max_steps=2)
        faults.update({FAULT: fail} if process_index() == 1 else {})
        told["fails"] = train(folder / "fails")
        faults.clear()
        told["mended"] = train(folder / "fails", resume=True)
        own_disk = folder / "own-disk" / f"machine-{process_index()}"
        processes._SECONDS_TO_BE_SEEN = 1.0
        told["own disk"] = train(folder / "own-disk", index=own_disk, max_steps=2)
    else:
        processes.SECONDS_WITHOUT_HEARTBEAT = 6.0
        faults.update({FAULT: kill_myself} if case == f"kill {os.environ['RANK']}" else {})
        told = train(folder)
    (folder / f"told-{process_index()}.json").write_text(json.dumps(told))


class MaskingCollator:
    """Pads, and hides words at random, by torch's own generator."""

    def __call__(self, examples):
        import torch

        batch = pad(examples)
        hidden = torch.rand(batch["input_ids"].shape) < 0.3
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden & batch["attention_mask"].bool(), 3)
        return batch


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    end_process_group()
