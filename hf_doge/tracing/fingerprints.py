"""Fingerprints: which weights were recorded, and of which examples."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

_NUM_SAMPLES = 1024


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model that the user made, out of `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def model_fingerprint(model: nn.Module) -> str:
    """
    Checksum by which a checkpoint is recognised: of the name, shape, dtype and up to 1024 values of each parameter.

    The values are evenly spaced over the flattened parameter, its first and last among them, as float32. A weight that
    is shared counts once. Loading a checkpoint in another dtype gives another fingerprint.

    Args:
        model (`nn.Module`): Unwrapped first where it is wrapped.

    Returns:
        `str`: sha256 in hexadecimal.
    """
    parameters = dict(unwrap_model(model).named_parameters())
    # An adapter puts a trained copy in the place of a head, and keeps the head, which is neither used nor saved with it.
    copied = {name.partition(".modules_to_save.")[0] for name in parameters if ".modules_to_save." in name}
    return _fingerprint(
        (name, tensor) for name, tensor in parameters.items() if name.partition(".original_module.")[0] not in copied
    )


def has_fingerprint(model: nn.Module, recorded: str) -> bool:
    """Whether a model is the one of a fingerprint, also one that was recorded by an older version of this package."""
    return recorded in (model_fingerprint(model), _fingerprint(unwrap_model(model).named_parameters()))


def buffer_fingerprint(model: nn.Module) -> str:
    """As [`model_fingerprint`], of what the model holds beside its parameters: batch norm's means, say."""
    return _fingerprint(unwrap_model(model).named_buffers())


def tensor_fingerprint(name: str, tensor: torch.Tensor) -> str:
    """As [`model_fingerprint`], of one tensor."""
    return _fingerprint([(name, tensor)])


def _fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        header = [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        digest.update(json.dumps(header).encode())
        digest.update(_evenly_spaced(tensor).astype("<f4").tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _evenly_spaced(parameter: torch.Tensor) -> np.ndarray:
    values, count = parameter.detach().reshape(-1), parameter.numel()
    if count > _NUM_SAMPLES:
        positions = torch.arange(_NUM_SAMPLES, device=values.device) * (count - 1) // (_NUM_SAMPLES - 1)
        values = values[positions]
    return values.float().cpu().numpy()


def content_hash(*parts: np.ndarray) -> str:
    """
    Checksum of one example, the same for equal examples however they are padded or batched.

    Args:
        *parts (`np.ndarray`): Its token ids and labels, without padding. Whole numbers are hashed as int64.

    Returns:
        `str`: sha256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for part in parts:
        part = part.astype("<f8" if part.dtype.kind == "f" else "<i8")
        digest.update(f"{part.dtype.str}{part.shape}".encode())
        digest.update(part.tobytes())
    return digest.hexdigest()


def dataset_fingerprint(content_hashes: list[str]) -> str:
    """Checksum of a dataset: of its examples' [`content_hash`]es, in order."""
    return hashlib.sha256("".join(content_hashes).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Checksum of the vocabulary: which id each token has."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
