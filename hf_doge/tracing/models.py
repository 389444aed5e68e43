"""Loading the model of a recorded checkpoint, and making sure that it is the one that was recorded."""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_model as load_weights
from torch import nn

from hf_doge.text import printable
from hf_doge.tracing.fingerprints import model_fingerprint

LoadModel = Callable[[str], nn.Module]

_WEIGHTS_FILE = "model.safetensors"
_ADAPTER_FILE = "adapter_config.json"


def load_checkpoint(
    checkpoint: Mapping[str, Any],
    *,
    folder: Path,
    model: nn.Module | None = None,
    load_model: LoadModel | None = None,
    token: str | bool | None = None,
    fetch: Callable[[], None] = lambda: None,
) -> nn.Module:
    """
    The model as it was when a checkpoint was recorded.

    Args:
        checkpoint (`Mapping`): Its entry in the index: name, path, revision, model class and fingerprint.
        folder (`Path`): The index. A relative path is looked for in here first, then where Python runs, then on the Hub.
        model (`nn.Module`, *optional*):
            A model of the right shape. Taken itself where it is the recorded one; else a copy of it takes the weights
            from the `model.safetensors` of the checkpoint's folder.
        load_model (`Callable`, *optional*): `load_model(path)` makes the model instead, for classes of your own.
        token (`str` or `bool`, *optional*): For a private repository on the Hub.
        fetch (`Callable`): Called before the folder is looked into.

    Raises:
        FileNotFoundError: The checkpoint is nowhere to be found. Names it.
        ValueError: What was found is another model than the recorded one, or of a class that cannot be found.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` must be a torch.nn.Module, but got {model!r:.80}. Leave it out for classes of transformers."
        )
    if model is not None and model_fingerprint(model) == checkpoint["fingerprint"]:
        return model
    fetch()
    path = _find(checkpoint, folder)
    if load_model is not None:
        loaded = load_model(path)
        if not isinstance(loaded, nn.Module):
            raise ValueError(f"`load_model` must return a model, but for {path!r} it returned {loaded!r:.80}.")
    elif model is not None:
        loaded = _fill(model, checkpoint, path)
    else:
        loaded = _load(checkpoint, path, token=token)
    fingerprint = model_fingerprint(loaded)
    if fingerprint != checkpoint["fingerprint"]:
        raise ValueError(
            f"Checkpoint {checkpoint['name']!r} must hold the weights that were recorded, but those of {path!r} differ: "
            f"their fingerprint is {fingerprint[:12]}, the recorded one {str(checkpoint['fingerprint'])[:12]}. Bring the "
            "recorded checkpoint back, in the dtype of its training, or record the index again."
        )
    return loaded.to("cuda") if torch.cuda.is_available() else loaded


def checkpoint_folders(checkpoint: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Where a checkpoint may lie on this machine."""
    path = Path(checkpoint["path"] or "")
    yield from (place for place in (folder / path, path) if checkpoint["path"] and place.is_dir())


def _find(checkpoint: Mapping[str, Any], folder: Path) -> str:
    """A folder, or the path as it was recorded."""
    found = next(checkpoint_folders(checkpoint, folder), None)
    if found is None and (not checkpoint["path"] or Path(checkpoint["path"]).is_absolute()):
        raise _missing(checkpoint, folder)
    return str(found or checkpoint["path"])


def _missing(checkpoint: Mapping[str, Any], folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"Checkpoint {checkpoint['name']!r} of the index must be there to compute the gradients of queries, but "
        f"{checkpoint['path']!r} is neither a folder (here or in {str(folder)!r}) nor a model on the Hub. Put it back "
        "there, or pass `load_model`, which gets this path and returns the model."
    )


def _fill(model: nn.Module, checkpoint: Mapping[str, Any], path: str) -> nn.Module:
    weights = Path(path) / _WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(
            f"Checkpoint {checkpoint['name']!r} must have a {_WEIGHTS_FILE} to fill `model` with, but {path!r} has none. "
            "Pass `load_model`, which gets this path and returns the model."
        )
    filled = copy.deepcopy(model)
    try:
        load_weights(filled, weights)
    except RuntimeError as error:  # what torch raises where names or shapes differ
        raise ValueError(
            f"`model` must have the shape of the recorded one, but the weights of checkpoint {checkpoint['name']!r} in "
            f"{path!r} do not fit `{type(model).__name__}`: {error!s:.200}"
        ) from error
    return filled


def _load(checkpoint: Mapping[str, Any], path: str, *, token: str | bool | None) -> nn.Module:
    options = {"revision": checkpoint.get("revision"), "token": token}
    loader = _find_class(checkpoint, path)
    try:
        return loader.from_pretrained(path, **{name: value for name, value in options.items() if value is not None})
    except OSError as error:
        raise FileNotFoundError(
            f"Checkpoint {checkpoint['name']!r} of the index must be there to compute the gradients of queries, but "
            f"{path!r} cannot be loaded: {printable(error, keep=chr(10))}. Put it back, or pass `load_model`, which gets"
            " this path and returns the model."
        ) from error


def _find_class(checkpoint: Mapping[str, Any], path: str) -> Any:
    """What has the `from_pretrained` of the recorded class."""
    name = str(checkpoint["model_class"]).rpartition(".")[2]
    if (Path(path) / _ADAPTER_FILE).is_file() or name.startswith("Peft"):
        import peft  # an optional package, needed by indexes of its models alone

        return getattr(peft, f"Auto{name}", peft.AutoPeftModel)
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"The class of checkpoint {checkpoint['name']!r} must be one of transformers, but it is {name!r}. Pass "
            "`load_model`, which gets its path and returns the model, or `model`, whose copy takes its weights."
        )
    return found
