"""Models of recorded checkpoints: which weights they have, saving them, where they lie, and loading the one that was recorded."""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_doge.files import staged_folder
from hf_doge.tracing.pretrained import ADAPTER_FILE, fill_adapter, parameter_pattern, read_weights
from hf_doge.tracing.pretrained import load_model as load_pretrained

LoadModel = Callable[[str], nn.Module]
MODELS = "models"  # the folder of an index for weights that are kept nowhere else
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
    """As [`model_fingerprint`], of what the model holds besides its parameters: batch norm's means, say."""
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


def describe_dtypes(model: nn.Module) -> dict[str, Any] | None:
    """
    In which dtypes to load a model again so that its weights are those in memory; None where they are as saved.

    Args:
        model (`nn.Module`): Of one dtype, which `save_pretrained` keeps, or of several, or an adapter, whose base is not
            saved with it and may have been loaded in another dtype than it has on disk, or cast since.

    Returns:
        `dict`: `loaded`, the dtype to load the whole model (or base) in; `default`, the one to bring parameters to; and
        `parameters`, those that have another, by name with a `*` for the number of a layer.
    """
    model = unwrap_model(model)
    kinds = {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in model.named_parameters()}
    is_adapter = hasattr(model, "get_base_model")
    if not is_adapter and len(set(kinds.values())) < 2:
        return None
    floating = [kind for kind in kinds.values() if getattr(torch, kind).is_floating_point]
    default = max(sorted(set(kinds.values())), key=list(kinds.values()).count)
    loaded = max(floating, key=lambda kind: getattr(torch, kind).itemsize)
    if is_adapter:
        loaded = str(getattr(model.get_base_model().config, "dtype", None) or loaded).removeprefix("torch.")
    by_pattern: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        by_pattern.setdefault(parameter_pattern(name), set()).add(kind)
    others = {
        parameter_pattern(name) if len(by_pattern[parameter_pattern(name)]) == 1 else name: kind
        for name, kind in kinds.items()
        if by_pattern[parameter_pattern(name)] != {default}
    }
    return {"loaded": loaded, "default": default, "parameters": others}


def warn_if_unsearchable(model: nn.Module) -> None:
    """Say at train begin what a search of an adapter will lack: its checkpoints have no base, and must lead to one."""
    model = unwrap_model(model)
    if not hasattr(model, "get_base_model"):
        return
    base, name = model.get_base_model(), getattr(model.active_peft_config, "base_model_name_or_path", None)
    cause = f"adapts a model that was saved nowhere (its base_model_name_or_path is {name!r})"
    if getattr(base, "is_quantized", False):
        cause = f"adapts a quantized model, {name!r}, which is not loaded again in the same way"
    elif name and (Path(name).exists() or (not Path(name).is_absolute() and str(name).count("/") <= 1)):
        return
    warnings.warn(
        f"The adapter that is trained {cause}. A search of this index will need `model=` or `load_model=` in"
        " `InfluenceIndex.from_pretrained`.",
        stacklevel=3,
    )


def save_model(model: nn.Module, path: Path, *, processing_class: Any | None = None) -> None:
    """
    Save weights (safetensors) and configuration, all or nothing.

    Args:
        model (`nn.Module`): Any; one with `save_pretrained` can be loaded again by its class.
        path (`Path`): A folder; replaced if it is there.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Saved next to it.
    """
    model = unwrap_model(model)
    with staged_folder(path) as staged:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(staged)
        else:
            from safetensors.torch import save_model as save_state

            save_state(model, str(staged / "model.safetensors"))
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(staged)


def has_weights(path: Path) -> bool:
    """Whether a folder holds weights in safetensors, of a whole model or an adapter."""
    return path.is_dir() and any(path.glob("*.safetensors"))


def stored_path(path: Path, folder: Path) -> str:
    """A path as the index keeps it: relative to the index within it, so that the folder can move, else absolute."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def keep_weights(
    model: nn.Module, own: Path, *, kept: Path | None, index: Path, replace: bool, processing_class: Any | None
) -> str:
    """
    Make sure that the weights of a checkpoint are somewhere.

    Args:
        model (`nn.Module`), processing_class (`PreTrainedTokenizerBase`, *optional*): What is saved where it is needed.
        own (`Path`): Where to.
        kept (`Path`, *optional*): A folder that may have them, and keeps them.
        index (`Path`): The folder of the index.
        replace (`bool`): Whether other weights may lie in `own`.

    Returns:
        `str`: where they are, see [`stored_path`].
    """
    if kept is not None and has_weights(kept):
        return stored_path(kept, index)
    if replace or not has_weights(own):
        save_model(model, own, processing_class=processing_class)
    return stored_path(own, index)


def checkpoint_folders(checkpoint: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """
    Where a checkpoint may lie on this machine: where it was recorded, or where it lies to the index as it did then, if both
    have moved. Whatever is found is used for its fingerprint only.
    """
    if not checkpoint["path"]:
        return
    path = Path(checkpoint["path"])
    moved = [folder.absolute().parent / Path(*path.parts[-depth:]) for depth in (2, 1)] if path.is_absolute() else []
    yield from (place for place in (folder / path, path, *moved) if place.is_dir())


def load_checkpoint(
    checkpoint: Mapping[str, Any],
    *,
    folder: Path,
    model: nn.Module | None = None,
    load_model: LoadModel | None = None,
    vocabulary_size: int | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """
    The model as it was when a checkpoint was recorded.

    Args:
        checkpoint (`Mapping`): Its entry in the index: name, path, revision, model class and fingerprint.
        folder (`Path`): The index. A relative path is looked for in here first, then where Python runs, then on the Hub.
        model (`nn.Module`, *optional*):
            A model of the right shape. A copy of it takes the weights from the checkpoint's folder, safetensors in one
            file or several.
        load_model (`Callable`, *optional*): `load_model(path)` makes the model instead, for classes of your own.
        vocabulary_size (`int`, *optional*): Of the index, see [`~hf_doge.tracing.pretrained.load_model`].
        token (`str` or `bool`, *optional*): For a private repository on the Hub.

    Raises:
        FileNotFoundError: The checkpoint is nowhere to be found. Names it.
        ValueError: What was found is another model than the recorded one, or of a class that cannot be found.
    """
    path = _find(checkpoint, folder, required=load_model is None)
    if load_model is not None:
        loaded = load_model(path)
        if not isinstance(loaded, nn.Module):
            raise ValueError(f"`load_model` must return a model, but for {path!r} it returned {loaded!r:.80}.")
    elif model is not None:
        loaded = _fill(model, checkpoint, path)
    else:
        loaded = _load(checkpoint, path, vocabulary_size=vocabulary_size, token=token)
    if not has_fingerprint(loaded, checkpoint["fingerprint"]):
        raise _differs(loaded, checkpoint, path)
    return loaded.to("cuda") if torch.cuda.is_available() else loaded


def _find(checkpoint: Mapping[str, Any], folder: Path, *, required: bool) -> str:
    """A folder, or the name on the Hub that was recorded; where not `required`, what was recorded if nothing is there."""
    found = next(checkpoint_folders(checkpoint, folder), None)
    path = checkpoint["path"] or ""
    own = path.startswith((f"{MODELS}/", ".", "/", "~")) or path.count("/") > 1
    if required and found is None and (not path or own or Path(path).is_absolute()):
        raise _missing(checkpoint, folder)
    return str(found or path)


def _missing(checkpoint: Mapping[str, Any], folder: Path) -> FileNotFoundError:
    """What to say of a checkpoint that is nowhere on this machine."""
    path = checkpoint["path"]
    cause = (
        "the index was published without it"
        if not path
        else f"{str(folder / path)!r} was moved or deleted since it was recorded"
    )
    return FileNotFoundError(
        f"Checkpoint {checkpoint['name']!r} of the index must be there to compute the gradients of queries, but {cause}. Put"
        f" it back, or next to {str(folder)!r} as it was, or pass `load_model`, a function that gets {path!r} and returns"
        " the model from where it is now (`hf_doge.InfluenceIndex.from_pretrained(..., load_model=...)`)."
    )


def _fill(model: nn.Module, checkpoint: Mapping[str, Any], path: str) -> nn.Module:
    if hasattr(model, "get_base_model") and (Path(path) / ADAPTER_FILE).is_file():
        return fill_adapter(copy.deepcopy(model), Path(path))
    weights = read_weights(Path(path))
    if weights is None:
        raise FileNotFoundError(
            f"Checkpoint {checkpoint['name']!r} must have its weights in safetensors to fill `model` with, but {path!r} has "
            "none of a whole model. Pass `load_model`, which gets this path and returns the model."
        )
    filled = copy.deepcopy(model)
    # BERT's old names: transformers 5.0 writes them for a model that it has loaded.
    names = filled.state_dict().keys()
    for name in set(weights) - names:
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        weights[new] = weights.pop(name)
    try:
        missing, unexpected = filled.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # what torch raises where shapes differ
        raise _does_not_fit(model, checkpoint, path, str(error)) from error
    # Of tensors that share their memory one is saved.
    own = filled.state_dict()
    given = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name in missing if own[name].data_ptr() not in given]
    if missing or unexpected:
        raise _does_not_fit(model, checkpoint, path, f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    return filled


def _does_not_fit(model: nn.Module, checkpoint: Mapping[str, Any], path: str, how: str) -> ValueError:
    return ValueError(
        f"`model` must have the shape of the recorded one, but the weights of checkpoint {checkpoint['name']!r} in "
        f"{path!r} do not fit `{type(model).__name__}`: {how:.200}"
    )


def _load(
    checkpoint: Mapping[str, Any], path: str, *, vocabulary_size: int | None, token: str | bool | None
) -> nn.Module:
    name = str(checkpoint["model_class"]).rpartition(".")[2]
    hub = {"revision": checkpoint.get("revision"), "token": token}
    options = {"model_class": name, "vocabulary_size": vocabulary_size, **hub}
    dtypes = checkpoint.get("dtypes")
    loaded = load_pretrained(path, dtypes=dtypes, **options)
    if dtypes is None and name.startswith("Peft") and not has_fingerprint(loaded, checkpoint["fingerprint"]):
        # An older index does not tell which dtype the base of the adapter was loaded in.
        for dtype in ("bfloat16", "float16", "float32"):
            other = load_pretrained(path, dtypes={"loaded": dtype}, **options)
            if has_fingerprint(other, checkpoint["fingerprint"]):
                return other
    return loaded


def _differs(loaded: nn.Module, checkpoint: Mapping[str, Any], path: str) -> ValueError:
    """The weights are others; whether the dtype is, or what an adapter was put on, depends on what was found."""
    found = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in loaded.parameters()})
    base = getattr(getattr(loaded, "active_peft_config", None), "base_model_name_or_path", None)
    return ValueError(
        f"Checkpoint {checkpoint['name']!r} must hold the weights that were recorded, but those of {path!r} differ: "
        f"their fingerprint is {model_fingerprint(loaded)[:12]} ({', '.join(found)}), the recorded one "
        f"{str(checkpoint['fingerprint'])[:12]}. "
        + (
            "Bring the recorded checkpoint back, in the dtype of its training, or record the index again."
            if base is None
            else f"It is an adapter: its base, {base!r}, must be the one of the training too, unchanged since and loaded as"
            " then. Bring both back, or pass `load_model`, which gets the path of the adapter and returns the model."
        )
    )
