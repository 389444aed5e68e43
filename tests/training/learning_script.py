"""Learns domain weights under `accelerate launch`, several ways one after another; see test_learning_processes.py."""

import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_doge.gradients.vectors import num_own_elements, own_part
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGEMixin, DoGETrainer
from tests.launch import end_process_group
from tests.one_layer import tiny_gpt2, tiny_llama
from tests.tiny import language_model_rows, tiny_tokenizer
from tests.training.mixture_processes import SaveAt
from tests.training.sharding import is_in_shards, load_in_shards, shard_on_cpus, whole

STEPS = 4  # what needs more says so

WAYS = {
    "single_pass": {},
    "factors": {"gradient_memory_budget": 0.0, "alignment": "single_pass", "global_batch": 8},
    "per_domain": {"alignment": "per_domain", "global_batch": 8},
    "streamed": {"alignment": "streamed", "with_target": True, "global_batch": 8},
    "official": {"recipe": "official", "with_target": True},
    "official_plain": {"recipe": "official", "with_target": True, "alignment": "streamed", "global_batch": 8},
    "cosine": {"normalization": "cosine", "self_term": False, "alignment_parameters": "mlp"},
    "independent": {"self_term": "independent"},
    "doge_plus": {
        "recipe": "doge_plus",
        "optim": "adamw_torch",
        "adam_epsilon": 0.01,
        "mu": 5.0,
        "alignment": "streamed",
    },
    "undecided": {
        "recipe": "doge_plus",
        "optim": "adamw_torch",
        "adam_epsilon": 0.01,
        "mu": 5 / 3,
        "learning_rate": 0.01,
        "max_steps": 6,
        "seed": 2,
        "num_layers": 2,
        "stop_when_undecided": True,
        "undecided_window": 2,
        "shrinkage": False,
        "mean_weighting": "inverse_variance",
    },
    "online": {"mode": "online", "reweight_steps": 2, "sampler_lag_steps": 2, "with_target": True, "max_steps": 6},
    "silent": {"normalization": "cosine", "is_silent": True, "max_steps": 6},
    "sft": {"mode": "online", "reweight_steps": 3, "sft": True, "mu": 3e-5, "max_steps": 6},
    "sft_silent": {"sft": True, "lora": False, "is_silent": True, "alignment": "single_pass", "max_steps": 6},
    "talking": {
        "is_talking": True,
        "is_silent": True,
        "alignment": "single_pass",
        "normalization": "cosine",
        "max_steps": 6,
    },
    "seldom": {"reweight_steps": 2, "lr_scheduler_type": "linear", "eval_strategy": "steps", "eval_steps": 1},
    "broken": {"is_broken": True, "reweight_steps": 2, "max_steps": 6},
    "overflown": {"is_overflown": True, "max_steps": 6},
}


RESUMED = ("single_pass", "official", "online")
SAVING = (*RESUMED, "doge_plus", "undecided", "sft")
# On four processes, and with other micro-batches on two: each kind of alignment and of message once, for the suite's time.
FEW = ("single_pass", "official", "cosine", "online", "sft")

# How FSDP2 may have sharded the model, and what is learned that way: not by a single pass that is insisted on, and each
# kind of target and of alignment once ("seldom" is "single_pass" with more to it, "undecided" is "independent").
LEFT_OUT = ("single_pass", "per_domain", "official_plain", "independent")
SHARDED = {
    "shards": [name for name in WAYS if name not in LEFT_OUT and WAYS[name].get("alignment") != "single_pass"],
    "gathered": ("online",),
    "loaded": ("official", "online"),
    "replicated": ("official",),
}
SHARDED_OPTIONS = {
    "shards": {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
    "gathered": {
        "fsdp": True,
        "fsdp_config": {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"},
        "optim": "adamw_torch",
    },
}
UNSAVED = ("loaded", "replicated")  # transformers does not resume such a model
SIZES = {"loaded": {"fsdp_size": 2}, "replicated": {"dp_replicate_size": 2, "fsdp_size": 1}}


@cache
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


def broken_loss(outputs, labels, num_items_in_batch):
    """The causal loss; not a number for the examples that begin with certain labels."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_items_in_batch
    is_broken = torch.isin(targets[:, 0], torch.tensor([19, 20, 21])).any()
    return loss * torch.where(is_broken, torch.nan, 1.0)


def make_trainer(
    folder,
    *,
    num_processes,
    micro_batch,
    sharding=None,
    with_target=False,
    is_silent=False,
    is_broken=False,
    is_overflown=False,
    is_talking=False,
    sft=False,
    global_batch=16,
    lora=True,
    num_layers=1,
    **options,
):
    defaults = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": global_batch // (micro_batch * num_processes),
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "mu": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
    }
    defaults |= SHARDED_OPTIONS.get(sharding, {})
    target = Dataset.from_dict(language_model_rows(20, low=5, high=30, seed=9)) if with_target else None
    if sft:
        return make_sft_trainer(str(folder), make_domains(is_silent=is_silent), lora, {**defaults, **options})
    args = DoGEConfig(str(folder), **{**defaults, **options})
    model = tiny_gpt2() if options.get("reweight_steps") else tiny_llama(tied=not is_overflown, num_layers=num_layers)
    if is_overflown:  # of some examples of "code", with and without labels, everything in the model is not a number
        model.get_input_embeddings().weight.requires_grad_(False)[29:31] = torch.inf
        model.idle = torch.nn.Parameter(torch.ones(1, 7))  # used by nobody, and not to be divided evenly
    if args.fsdp:
        shard_on_cpus(args)
    elif sharding is not None:
        model = load_in_shards(model, folder, **SIZES[sharding])
    domains = make_domains(is_silent=is_silent)
    return (TalkingTrainer if is_talking else DoGETrainer)(
        model,
        args,
        train_dataset=domains,
        eval_dataset=domains["books"],
        target_dataset=target,
        compute_loss_func=broken_loss if is_broken else None,
    )


@dataclass
class DoGESFTConfig(DoGEConfig, SFTConfig):
    pass


class DoGESFTTrainer(DoGEMixin, SFTTrainer):
    pass


class TalkingTrainer(DoGETrainer):
    """Whose loss uses a collective each time it is called."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.accelerator.gather(loss.detach())
        return loss


def make_sft_trainer(folder, domains, lora, options):
    """trl's trainer, whose loss gathers metrics over the processes each time it is called."""
    args = DoGESFTConfig(folder, **options, max_length=None)
    if args.fsdp:
        shard_on_cpus(args)
    return DoGESFTTrainer(
        tiny_llama(num_layers=1),
        args,
        train_dataset=domains,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if lora else None,
    )


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
            "mean": torch.tensor(list(trainer.domain_weights.mean.values())),
            "nonfinite_steps": trainer._learner.state.nonfinite_steps,
        },
        path,
    )


REFUSED = {
    "CPUs": {"fsdp": True},
    "FSDP1": {"fsdp": True, "fsdp_config": {"fsdp_version": 1, "sync_module_states": False}},
    "offloading": {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "cpu_offload": True}},
    "single pass": {"fsdp": True, "fsdp_config": {"fsdp_version": 2}, "alignment": "single_pass"},
    "no state": {
        "fsdp": True,
        "fsdp_config": {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"},
        "optim": "sgd",
        "recipe": "paper",
    },
    "tensor parallelism": {"save_strategy": "no"},
}


def collect_refusals(folder):
    """What a trainer says to each of [`REFUSED`]."""
    messages = {}
    for name, options in REFUSED.items():
        args = DoGEConfig(folder, use_cpu=True, per_device_train_batch_size=8, report_to="none", **options)
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate leaves behind for the next trainer
        model = tiny_llama()
        if name == "tensor parallelism":
            model = load_in_shards(model, folder, tp_size=2, tp_plan="auto")
        if name != "CPUs":
            shard_on_cpus(args)
        try:
            DoGETrainer(model, args, train_dataset=make_domains())
        except ValueError as error:
            messages[name] = str(error)
    return messages


def main(folder, num_processes, micro_batch, ways=tuple(WAYS), resume=None, sharding=None):
    """Train `ways` into `folder`, or go on with those that other runs left checkpoints of, in the folder `resume`."""
    folder = Path(folder)
    for name in ways:
        if (resume is not None and name not in RESUMED) or name not in SHARDED.get(sharding, WAYS):
            continue
        run = folder / "runs" / name
        sizes = {"num_processes": num_processes, "micro_batch": micro_batch}
        trainer = make_trainer(run, sharding=sharding, **sizes, **WAYS[name])
        if name in SAVING and sharding not in UNSAVED:
            trainer.add_callback(SaveAt([2]))
        assert trainer.args.world_size == num_processes
        trainer.train(None if resume is None else f"{resume}/{name}/checkpoint-2")
        note(trainer, folder / f"{name}-{trainer.args.process_index}.pt")
        assert is_in_shards(trainer.model) == (sharding is not None)
        assert all(own_part(p).numel() <= num_own_elements(p) for p in trainer.model.parameters())
        if name in ("single_pass", "sft", "sft_silent", "talking") and sharding is None:
            alignment = trainer._learner.alignment
            assert not any([alignment._is_plain, alignment._step_is_plain]), "the single pass was not used"
    if sharding == "shards" and resume is None:
        torch.save(collect_refusals(folder / "refused"), folder / f"refusals-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        main(**job)
    end_process_group()
