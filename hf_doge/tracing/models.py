"""Loading the model of a recorded checkpoint, and making sure that it is the one that was recorded."""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_doge.tracing.fingerprints import has_fingerprint, model_fingerprint
from hf_doge.tracing.pretrained import ADAPTER_FILE, fill_adapter, read_weights
from hf_doge.tracing.pretrained import load_model as load_pretrained
from hf_doge.tracing.weights import MODELS

LoadModel = Callable[[str], nn.Module]


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
        vocabulary_size (`int`, *optional*): Of the index, see [`~hf_doge.tracing.weights.load_model`].
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
