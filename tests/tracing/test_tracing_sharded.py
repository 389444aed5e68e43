"""A model that no process has whole is refused, by whatever it was sharded, and before anything is written."""

from tests.launch import run_processes

SCRIPT = """
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from hf_doge.tracing.callback import TracInWECallback
from tests.launch import end_process_group
from tests.tracing.online_training import arguments, classifier_dataset, pad
from tests.tiny import tiny_classifier

folder = Path(sys.argv[1])
data = classifier_dataset()


def refused(name, work):
    try:
        work()
    except ValueError as error:
        assert "record the saved checkpoints by `hf-doge index`" in str(error), error
        (folder / f"{name} refused on {dist.get_rank()}").touch()


for record in ("checkpoint", "online"):
    args = arguments(folder / record, fsdp="full_shard", fsdp_config={"fsdp_version": 2}, ddp_backend="gloo")
    callback = TracInWECallback(folder / record / "index", record=record)
    trainer = Trainer(tiny_classifier(), args, train_dataset=data, data_collator=pad, callbacks=[callback])
    refused(f"trainer {record}", trainer.train)
    # `accelerate launch --use_fsdp` shards without a word in the arguments
    model = fully_shard(tiny_classifier())
    args = arguments(folder / record, ddp_backend="gloo")
    loader = DataLoader(data, batch_size=4, collate_fn=pad)
    recording = callback._make_recording(args, loader, None, None)
    start = {"model": model, "train_dataloader": loader, "args": args, "state": TrainerState()}
    refused(f"model {record}", lambda: recording.start(**start))
    assert not (folder / record / "index").exists()
end_process_group()
"""


def test_sharded_models_are_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_processes(script, tmp_path)
    found = sorted(path.name for path in tmp_path.glob("* refused on *"))
    asked = [f"{how} {record}" for how in ("model", "trainer") for record in ("checkpoint", "online")]
    assert found == [f"{name} refused on {rank}" for name in asked for rank in (0, 1)]
