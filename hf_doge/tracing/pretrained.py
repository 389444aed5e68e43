"""
Loading models and tokenizers of transformers, and adapters of peft, that anybody may have made.

Nothing of them runs: no code that they name or bring along, and no weights but those of safetensors, which hold no pickle.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging

from hf_doge.text import parse_json, printable

ADAPTER_FILE = "adapter_config.json"
# Entries of an adapter's configuration under which peft would fetch others.
_OTHER_MODELS = ("adapters", "shadow_model", "prompt_tuning_init_state_dict_path")
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_AUTO_CLASSES = {  # task of an adapter -> what chooses the class of its base
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_HEAD = re.compile(r"\.(score|classifier(\.out_proj)?)\.weight$")
_ONE_LINE = re.compile(r"\s+")
_PLAIN_IMPLEMENTATIONS = {None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}  # of torch alone
_MOST = {
    r"layers?$": 10_000,
    r"experts$": 100_000,
    r"^num_labels$": 1_000_000,
}  # of a model, by the names in its config.json


def read_weights(folder: Path) -> dict[str, Tensor] | None:
    """
    The weights of a whole model by name, in one safetensors file or several; `None` if a folder has none.

    Raises:
        ValueError: A file is damaged, or one that the others are listed in names no file of the folder.
    """
    single, listed = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not listed.is_file():
        return None
    with foreign_files(str(folder)):
        names = (
            [single.name] if single.is_file() else sorted(set(json.loads(listed.read_text())["weight_map"].values()))
        )
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{listed.name} must name files of the folder, but names {names}")
        return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}


def fill_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """An adapted model with the weights of the adapter in a folder."""
    from peft import set_peft_model_state_dict

    with foreign_files(str(folder)):
        set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))
    return model


def load_model(
    path: str | Path,
    *,
    model_class: str | None = None,
    dtypes: Mapping[str, Any] | None = None,
    vocabulary_size: int | None = None,
    device: str | torch.device | None = None,
    trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """
    The model of a checkpoint, of a class of transformers, perhaps within an adapter of peft.

    Whoever made it, nothing of it runs: no code that comes with it, and no weights but those of safetensors.

    Args:
        path (`str` or `os.PathLike`): Its folder, or its name on the Hub.
        model_class (`str`, *optional*): What the model was; the class that its config.json names if left out.
        dtypes (`Mapping`, *optional*): From [`describe_dtypes`]. That it was saved in if left out.
        vocabulary_size (`int`, *optional*): Number of tokens that the base of an adapter was resized to.
        device (`str` or `torch.device`, *optional*): Where to put it.
        trainable (`bool`): Whether what an adapter trains requires gradients, as in training; else nothing of it does.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): Of a model on the Hub.

    Raises:
        FileNotFoundError: There is no model of transformers and no adapter of peft, or no base of the adapter.
        ValueError: Its class is not of transformers, its files are damaged or of another model, or it needs what is never
            run.
    """
    path, hub = str(path), _given({"revision": revision, "token": token})
    is_adapter = (Path(path) / ADAPTER_FILE).is_file() or (model_class or "").startswith("Peft")
    if not is_adapter and Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        if model_class is not None:
            _native_class(model_class, path)
        raise FileNotFoundError(
            f"A checkpoint must be a folder with config.json or {ADAPTER_FILE}, but {path!r} has neither. Name the"
            " checkpoint folders that the Trainer wrote."
        )
    dtypes = dtypes or {}
    loaded_in = dtypes.get("loaded")
    with foreign_files(path):
        if is_adapter:
            model = _load_adapter(path, loaded_in, hub, vocabulary_size=vocabulary_size, trainable=trainable)
        else:
            model = _load_whole(path, model_class, loaded_in, hub)
    others, default = dtypes.get("parameters", {}), dtypes.get("default")
    for name, parameter in model.named_parameters() if default is not None else ():
        kind = others.get(name) or others.get(parameter_pattern(name), default)
        parameter.data = parameter.data.to(getattr(torch, kind))
    return model if device is None else model.to(device)


def saved_model(path: str | Path) -> tuple[Any, Any]:
    """
    The class of transformers and the configuration of the model in a checkpoint's folder; those of its base in an adapter.

    Raises:
        FileNotFoundError, ValueError: As [`load_model`].
    """
    path = str(path)
    with foreign_files(path):
        if (Path(path) / ADAPTER_FILE).is_file():
            return _adapter_base(path, {})[:0:-1]
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        return _native_class((config.architectures or [None])[0], path), config


def tokenizer_place(checkpoint: Path) -> Path | str | None:
    """Where the tokenizer of a checkpoint lies: in its folder, or with the base of an adapter; `None` if it has none."""
    if (checkpoint / "tokenizer_config.json").is_file():
        return checkpoint
    if not (checkpoint / ADAPTER_FILE).is_file():
        return None
    base = saved_model(checkpoint)[1].name_or_path
    return base if not Path(base).is_dir() or (Path(base) / "tokenizer_config.json").is_file() else None


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """
    The tokenizer of a folder or a name on the Hub, without running any code of it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Its files are damaged, or it needs code of its own.
    """
    with foreign_files(str(path), what="tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)


def parameter_pattern(name: str) -> str:
    """The name of a parameter with `*` for the number of a layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _load_whole(path: str, model_class: str | None, dtype: str | None, hub: dict[str, Any]) -> nn.Module:
    facts, _ = transformers.PretrainedConfig.get_config_dict(path, **hub)
    loader = _native_class(model_class or (facts.get("architectures") or [None])[0], path)
    own, told = loader.config_class.model_type, facts.get("model_type")
    nested = [part.get("model_type") for part in facts.values() if isinstance(part, dict)]
    if told != own and own not in nested:
        raise ValueError(
            f"the model is a {loader.__name__}, whose `model_type` is {own!r}, but its config.json is of {told!r}"
        )
    return _from_pretrained(loader, path, dtype, hub)


def _from_pretrained(loader: Any, path: str, dtype: str | None, hub: dict[str, Any], **options: Any) -> Any:
    config = plain_config(loader.config_class.from_pretrained(path, **options, **hub))
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    return loader.from_pretrained(path, config=config, trust_remote_code=False, use_safetensors=True, **options, **hub)


def plain_config(config: Any) -> Any:
    """
    A configuration that asks for no kernel: by the name of one, as `attn_implementation`, transformers fetches code from the
    Hub and runs it. What computes attention and experts is then chosen as for a configuration that says nothing.
    """
    for name in ("_attn_implementation", "_experts_implementation"):
        asked = getattr(config, name, None)
        parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
        if {asked, *(getattr(part, name, None) for part in parts)} - _PLAIN_IMPLEMENTATIONS:
            setattr(config, name, None)  # in its parts too
    return config


def _refuse_impossible(path: Path) -> None:
    """What a configuration claims is made one by one, also for its tokenizer, before any weight is read: it must be possible."""
    if not path.is_file():
        return
    left = [parse_json(path.read_bytes(), source=path.name)]
    while left:
        for name, value in left.pop().items():
            left += [value] if isinstance(value, dict) else []
            most = next((most for pattern, most in _MOST.items() if re.search(pattern, name)), None)
            if most is not None and isinstance(value, int) and value > most:
                raise ValueError(f"{path.name} must claim at most {most:,} under `{name}`, but claims {value:,}")


def _native_class(name: Any, path: str) -> Any:
    """A class of transformers that is a model; an Auto class would follow what config.json tells it to load."""
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"The class of the model in {path!r} must be one of transformers, but it is {name!r}. Pass `load_model`, which"
            " gets its path and returns the model, or `model`, whose copy takes its weights."
        )
    return found


def _load_adapter(
    path: str, dtype: str | None, hub: dict[str, Any], *, vocabulary_size: int | None, trainable: bool
) -> nn.Module:
    from peft import PeftModel  # an extra: only who trained with it has it

    if Path(path).is_dir() and not (Path(path) / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"its weights must be in {ADAPTER_WEIGHTS}, which is not there")
    config, _, loader = _adapter_base(path, hub)
    num_labels = _num_labels(Path(path) / ADAPTER_WEIGHTS)
    options = {} if num_labels is None else {"num_labels": num_labels}
    base, base_hub = config.base_model_name_or_path, _given({**hub, "revision": config.revision})
    with foreign_files(base):
        model = _from_pretrained(loader, base, dtype, base_hub, **options)
    if vocabulary_size not in (None, len(model.get_input_embeddings().weight)):
        model.resize_token_embeddings(vocabulary_size)
    return PeftModel.from_pretrained(model, path, is_trainable=trainable, **hub)


def _adapter_base(path: str, hub: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The configuration of an adapter, that of the model it adapts, and the class of that."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(path, **hub)
    if getattr(config, "megatron_config", None) is not None:
        raise ValueError("it asks to import `megatron_core`, and code that a checkpoint names is never run")
    others = [name for name in _OTHER_MODELS if getattr(config, name, None)]
    if others:
        raise ValueError(
            f"it names others under `{others[0]}`, and beside its base model nothing that an adapter names is fetched"
        )
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{ADAPTER_FILE} must name the model that it adapts under `base_model_name_or_path`, but names none: save the"
            " base by `save_pretrained` before the training, and load it from there"
        )
    with foreign_files(base):
        base_config = transformers.AutoConfig.from_pretrained(
            base, trust_remote_code=False, **_given({**hub, "revision": config.revision})
        )
        return config, base_config, _base_class(config, base_config, base)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _base_class(config: Any, base_config: Any, base: str) -> Any:
    """The class of the model that an adapter was trained in."""
    mapping = config.auto_mapping or {}
    if config.task_type in _AUTO_CLASSES:
        kinds = getattr(transformers, _AUTO_CLASSES[config.task_type])._model_mapping
        if type(base_config) in kinds:
            found = kinds[type(base_config)]
            names = [kind.__name__ for kind in (found if isinstance(found, tuple | list) else (found,))]
            saved = [name for name in base_config.architectures or () if name in names]
            return _native_class((saved or names)[0], base)
    return _native_class(mapping.get("base_model_class") or (base_config.architectures or [None])[0], base)


def _num_labels(weights: Path) -> int | None:
    """How many classes the trained head of an adapter tells apart; its base knows nothing of them."""
    if not weights.is_file():
        return None
    with safe_open(weights, framework="pt") as file:
        heads = [name for name in file.keys() if _HEAD.search(name)]  # noqa: SIM118
        return file.get_slice(heads[0]).get_shape()[0] if heads else None


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bar that transformers shows for each model that it loads, where one bar is for many."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def foreign_files(path: str, what: str = "model") -> Iterator[None]:
    """
    What a library makes of files that are not what they must be, in words and with the name of their folder.

    Whoever made a folder can write anything into it, and the libraries have no one error for that: tokenizers raise a bare
    `Exception`, transformers whatever the first wrong value leads to.
    """
    try:
        _refuse_impossible(Path(path) / "config.json")
        yield
    except Exception as error:
        cause = printable(_ONE_LINE.sub(" ", str(error)).strip())
        if "trust_remote_code" in cause:
            cause = "it needs code of its own (`auto_map`), which is never run"
        if isinstance(error, OSError):
            raise FileNotFoundError(f"The {what} in {path!r} cannot be loaded: {cause:.500}") from error
        raise ValueError(f"The {what} in {path!r} cannot be loaded: {type(error).__name__}: {cause:.500}") from error
