"""The weights of recorded checkpoints: where they are, saving and loading them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_doge.artifacts.files import staged_folder
from hf_doge.tracing.fingerprints import unwrap_model

MODELS = "models"


def has_weights(path: Path) -> bool:
    """Whether a folder holds weights in safetensors, of a whole model or an adapter."""
    return path.is_dir() and any(path.glob("*.safetensors"))


def stored_path(path: Path, folder: Path) -> str:
    """A path as the index keeps it: relative to the index within it, so that the folder can move, else absolute."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def save_model(model: nn.Module, path: Path, *, processing_class: Any | None = None) -> None:
    """
    Save weights (safetensors) and configuration, all or nothing.

    Args:
        model (`nn.Module`): Any; one with `save_pretrained` can be loaded again by its class.
        path (`Path`): A folder; replaced if it is there.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Saved beside it.
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


def load_model(
    path: str | os.PathLike, *, device: str | torch.device | None = None, trainable: bool = False
) -> nn.Module:
    """
    The model of a checkpoint folder, of the class that its config.json names, in the dtype it was saved in.

    Args:
        path (`str` or `os.PathLike`): The folder.
        device (`str` or `torch.device`, *optional*): Where to put it.
        trainable (`bool`): Whether what an adapter trains requires gradients, as in training; else nothing of it does.

    Raises:
        FileNotFoundError: The folder has no model of transformers and no adapter of peft.
        ValueError: Its class is unknown to transformers.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        model = _load_adapter(path, trainable=trainable)
    elif (path / "config.json").is_file():
        names = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or [None]
        model_class = getattr(transformers, names[0] or "", None)
        if model_class is None:
            raise ValueError(
                f"{str(path / 'config.json')!r} must name a class of transformers under `architectures`, but it names"
                f" {names[0]!r}. Save the model by `save_pretrained`, or record it with `TracInWECallback` in training."
            )
        model = model_class.from_pretrained(path)
    else:
        raise FileNotFoundError(
            f"A checkpoint must be a folder with config.json or adapter_config.json, but {str(path)!r} has neither. Name"
            " the checkpoint folders that the Trainer wrote."
        )
    return model if device is None else model.to(device)


def describe_checkpoint(path: Path, *, learning_rate: float | None = None) -> dict[str, Any]:
    """
    Name, step, epoch and learning rate of a checkpoint that a Trainer saved, from its `trainer_state.json`.

    Args:
        path (`Path`): Its folder.
        learning_rate (`float`, *optional*): In force there; read from the log if left out.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The learning rate is not given, and the Trainer logged none at that step.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"A checkpoint must be a folder, but {str(path)!r} is none. Look at its name.")
    state_file = path / "trainer_state.json"
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
    number = path.name.rpartition("-")[2]
    step = state.get("global_step", int(number) if number.isdecimal() else 0)
    if learning_rate is None:
        learning_rate = logged_learning_rate(state.get("log_history", ()), step)
    if learning_rate is None:
        raise ValueError(
            f"The learning rate in force at {str(path)!r} must be known, but its trainer_state.json has none logged at step"
            f" {step}. Pass `learning_rates`, one for each checkpoint (all 1 weighs them alike)."
        )
    return {"name": path.name, "step": step, "epoch": state.get("epoch"), "learning_rate": float(learning_rate)}


def logged_learning_rate(log_history: Any, step: int) -> float | None:
    """The learning rate that made step `step`, if the Trainer logged at that step. (It logs the one before the scheduler.)"""
    rates = [entry["learning_rate"] for entry in log_history if entry.get("step") == step and "learning_rate" in entry]
    return rates[-1] if rates else None


def _load_adapter(path: Path, *, trainable: bool) -> nn.Module:
    from peft import PeftConfig, PeftModel  # an extra: only who trained with it has it

    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    return PeftModel.from_pretrained(load_model(base), path, is_trainable=trainable)
