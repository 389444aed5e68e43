"""A model that no process has whole is refused, by whatever it was sharded, and before anything is written."""

from tests.launch import launch

SCRIPT = """
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerState

from hf_doge.tracing.callback import TracInWECallback
from tests.online_training import arguments, classifier_dataset, pad
from tests.tiny import tiny_classifier

folder = Path(sys.argv[1])
data = classifier_dataset()


def refused(name, work):
    try:
        work()
    except ValueError as error:
        assert "record the saved checkpoints by `hf-doge index`" in str(error), error
        print("refused", name, flush=True)


for record in ("checkpoint", "online"):
    args = arguments(folder / record, fsdp="full_shard", fsdp_config={"fsdp_version": 2}, ddp_backend="gloo")
    callback = TracInWECallback(folder / record / "index", record=record)
    trainer = Trainer(tiny_classifier(), args, train_dataset=data, data_collator=pad, callbacks=[callback])
    refused(f"trainer {record}", trainer.train)
    # `accelerate launch --use_fsdp` shards without a word in the arguments
    model = fully_shard(tiny_classifier())
    args = arguments(folder / record, ddp_backend="gloo")
    recording = callback._make_recording(args, trainer.get_train_dataloader(), None, None)
    start = {"model": model, "train_dataloader": trainer.get_train_dataloader(), "args": args, "state": TrainerState()}
    refused(f"model {record}", lambda: recording.start(**start))
    assert not (folder / record / "index").exists()
dist.destroy_process_group()
"""


def test_sharded_models_are_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    said = launch(script, tmp_path).stdout
    for how in ("trainer", "model"):
        for record in ("checkpoint", "online"):
            assert said.count(f"refused {how} {record}") == 2, said[-3000:]
