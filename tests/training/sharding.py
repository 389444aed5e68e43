"""Sharding models by FSDP2 on the CPU, under `accelerate launch`."""

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


def shard_on_cpus(args):
    """
    Let accelerate shard the model of a trainer, as `args.fsdp` asks for.

    By itself it does so on accelerators only, and on CPUs trains whole copies without a word. It goes by this one entry
    of its state; everything that follows is what it does on GPUs, with gloo in place of NCCL.
    """
    assert args.device.type == "cpu"  # which sets the state up, too
    PartialState().distributed_type = DistributedType.MULTI_GPU


def load_in_shards(model, folder, **sizes):
    """The same model as transformers shards it while loading, which it does on any device."""
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return type(model).from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def is_in_shards(model):
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(parameter):
    """The parameter itself, gathered from all processes."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
