"""Learns domain weights under `accelerate launch`, several ways one after another; see test_learning_processes.py."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from trl import SFTConfig, SFTTrainer

from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGEMixin, DoGETrainer
from tests.launch import end_process_group
from tests.tiny import language_model_rows, tiny_gpt2, tiny_llama, tiny_tokenizer

GLOBAL_BATCH = 16

WAYS = {
    "single_pass": {},
    "factors": {"gradient_memory_budget": 0.0, "alignment": "single_pass"},
    "per_domain": {"alignment": "per_domain"},
    "streamed": {"alignment": "streamed", "with_target": True},
    "official": {"recipe": "official", "with_target": True},
    "official_plain": {"recipe": "official", "with_target": True, "alignment": "streamed"},
    "cosine": {"normalization": "cosine", "self_term": False},
    "online": {"mode": "online", "reweight_steps": 2, "sampler_lag_steps": 2, "with_target": True},
    "silent": {"normalization": "cosine", "is_silent": True},
    "sft": {"mode": "online", "reweight_steps": 3, "sft": True, "mu": 1e-4},
    "seldom": {"reweight_steps": 2, "lr_scheduler_type": "linear"},
}


RESUMED = ("single_pass", "official", "online")
SHARDED = tuple(name for name in WAYS if name != "factors")  # all but a single pass that is insisted on


def make_domains(*, is_silent=False):
    """
    Of unequal sizes and lengths; the last one has no label in most of its examples. With `is_silent` that is so of all
    domains, and some steps have no label at all on one process or on any.
    """
    sizes = {"arxiv": 40, "books": 23, "code": 12}
    domains = {
        name: language_model_rows(size, low=1 + 9 * i, high=13 + 9 * i, masked=0.3, seed=i)
        for i, (name, size) in enumerate(sizes.items())
    }
    for row, labels in enumerate(domains["code"]["labels"]):
        if row % 3:
            domains["code"]["labels"][row] = [-100] * len(labels)
    for rows in domains.values() if is_silent else ():
        rows["labels"] = [
            labels if row % 20 == 0 else [-100] * len(labels) for row, labels in enumerate(rows["labels"])
        ]
    return {name: Dataset.from_dict(rows) for name, rows in domains.items()}


def shard_on_cpus(args):
    """
    Let accelerate shard the model by FSDP2 on CPUs: by itself it does on accelerators only, and goes by this one word.
    """
    assert args.device.type == "cpu"  # which sets its state up, too
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return args


def make_trainer(
    folder,
    *,
    num_processes,
    micro_batch,
    state_dict=None,
    with_target=False,
    is_silent=False,
    sft=False,
    **options,
):
    defaults = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": GLOBAL_BATCH // (micro_batch * num_processes),
        "max_steps": 6,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "mu": 0.1,
        "report_to": "none",
        "save_steps": 2,
        "save_total_limit": 3,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
    }
    if state_dict is not None:
        defaults |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "state_dict_type": f"{state_dict}_STATE_DICT"}}
    target = Dataset.from_dict(language_model_rows(20, low=5, high=30, seed=9)) if with_target else None
    if sft:
        return make_sft_trainer(str(folder), {**defaults, **options})
    args = DoGEConfig(str(folder), **{**defaults, **options})
    if state_dict is not None:
        shard_on_cpus(args)
    model = tiny_gpt2() if options.get("reweight_steps") else tiny_llama()
    return DoGETrainer(model, args, train_dataset=make_domains(is_silent=is_silent), target_dataset=target)


@dataclass
class DoGESFTConfig(DoGEConfig, SFTConfig):
    pass


class DoGESFTTrainer(DoGEMixin, SFTTrainer):
    pass


def make_sft_trainer(folder, options):
    """trl's trainer, whose loss gathers metrics over the processes each time it is called."""
    args = DoGESFTConfig(folder, **options, max_length=None)
    if args.fsdp:
        shard_on_cpus(args)
    return DoGESFTTrainer(
        tiny_llama(),
        args,
        train_dataset=make_domains(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )


def whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def note(trainer, path):
    """What must not depend on the number of processes."""
    trajectory = trainer.domain_weights.trajectory
    torch.save(
        {
            "weights": torch.from_numpy(trajectory.weights),
            "scores": torch.from_numpy(trajectory.scores),
            "losses": torch.from_numpy(trajectory.losses),
            "parameters": torch.cat([whole(p).flatten() for p in trainer.model.parameters()]),
            "logged": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "tokens": trainer._learner.state.num_tokens,
            "examples": trainer._learner.state.num_examples,
        },
        path,
    )


def main(folder, num_processes, micro_batch, resume, state_dict=None):
    """Train every way into `folder`, or those that are resumed from the checkpoints that lie there."""
    folder = Path(folder)
    for name, options in WAYS.items():
        if (resume and name not in RESUMED) or (state_dict is not None and name not in SHARDED):
            continue
        run = folder / "runs" / name
        trainer = make_trainer(
            run, num_processes=num_processes, micro_batch=micro_batch, state_dict=state_dict, **options
        )
        assert trainer.args.world_size == num_processes
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2") if resume else None)
        note(trainer, folder / f"{name}-{trainer.args.process_index}.pt")
        assert (state_dict is not None) == any(isinstance(p, DTensor) for p in trainer.model.parameters())
        if name == "single_pass" and state_dict is None:
            assert not trainer._learner.alignment._step_is_plain, "the single pass was not used"


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        main(**job)
    end_process_group()
