"""Which model: one that exists, or a new one of a given shape."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_doge.cli.arguments import ModelArguments
from hf_doge.text import parse_json
from hf_doge.tracing.pretrained import foreign_files, plain_config

# Layers, attention heads and hidden size. The last four are the sizes of the DoGE paper (60M, 82M, 124M and 210M with
# GPT-2's vocabulary); the others run on a laptop.
MODEL_SIZES = {
    "nano": (2, 2, 64),
    "micro": (2, 4, 128),
    "tiny": (4, 4, 128),
    "mini": (4, 4, 256),
    "small": (8, 8, 512),
    "60m": (3, 12, 768),
    "82m": (6, 12, 768),
    "124m": (12, 12, 768),
    "210m": (24, 12, 768),
}
MODEL_TYPES = ("llama", "gpt2")
_NUM_TOKENS = 4  # of a text to try a model out with
_ADVICE = (
    "Give a decoder, such as one of GPT-2 or Llama; masked language models, classifiers and models of two parts are trained with "
    "`DoGETrainer` or `DomainWeightedTrainer` in Python."
)


def get_config(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PretrainedConfig | None:
    """
    Configuration of a new model that takes the tokenizer's ids and the blocks' length; `None` for a saved model.

    Args:
        model_args (`ModelArguments`): What was asked for.
        tokenizer (`PreTrainedTokenizerBase`): It sets `vocab_size`.
        block_size (`int`): Tokens of a training example.

    Raises:
        `ValueError`: for an unknown size or type, and a configuration too small for tokenizer or block.
    """
    if model_args.model_name_or_path is not None:
        return None
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if model_args.model_config is not None:
        config = _read_config(Path(model_args.model_config), {"vocab_size": len(tokenizer), **special})
    else:
        config = _size_config(
            model_args.model_size,
            model_args.model_type,
            vocab_size=len(tokenizer),
            block_size=block_size,
            special=special,
        )
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"The model must have an embedding for each of the tokenizer's {len(tokenizer)} entries, but its "
            f"`vocab_size` is {config.vocab_size}. Raise it or leave it out of the JSON file."
        )
    max_positions = getattr(config, "max_position_embeddings", block_size)
    if max_positions < block_size:
        raise ValueError(
            f"The model must take blocks of {block_size} tokens, but its `max_position_embeddings` is {max_positions}. "
            "Lower `--block_size` or raise it in the JSON file."
        )
    return config


def make_model(
    name_or_path: str | None, config: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """
    The model saved under a name or path, or a new one drawn from torch's generator.

    Raises:
        ValueError: for a model that is no causal language model: what the commands train predicts each token from those
            before it; and for a saved one that has fewer embeddings than the tokenizer has entries, or code of its own.
    """
    given = f"`--model_name_or_path` {name_or_path!r}" if name_or_path is not None else "`--model_config`"
    try:
        if name_or_path is None:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        else:
            with foreign_files(name_or_path):
                config = _find_config(name_or_path)
                options = {} if config is None else {"config": plain_config(config)}
                model = AutoModelForCausalLM.from_pretrained(name_or_path, trust_remote_code=False, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{given} must be a causal language model, but is a {_kind(config)}. {_ADVICE}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{given} must be a causal language model, but is an encoder and decoder. {_ADVICE}")
    if _looks_ahead(model):
        raise ValueError(
            f"{given} must be a causal language model, but in a {_kind(model.config)} tokens see those behind them, which they "
            f"are to predict. {_ADVICE}"
        )
    num_embeddings = len(model.get_input_embeddings().weight)
    if tokenizer is not None and num_embeddings < len(tokenizer):
        raise ValueError(
            f"The model must have an embedding for each of the tokenizer's {len(tokenizer)} entries, but that of "
            f"{name_or_path!r} has {num_embeddings}. Give its own tokenizer as `--tokenizer`, or resize it by "
            "`resize_token_embeddings` and save it."
        )
    return model


def _find_config(name_or_path: str) -> PretrainedConfig | None:
    """`None` for a folder of adapters."""
    if (Path(name_or_path) / "adapter_config.json").is_file():
        return None
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)


def _kind(config: PretrainedConfig | None) -> str:
    return f"model of type {getattr(config, 'model_type', None)!r}"


@torch.no_grad()
def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether what is predicted from the first token changes with the tokens behind it."""
    embedding: Any = model.get_input_embeddings()
    was_training, size = model.training, embedding.weight.shape[0]
    model.eval()
    with torch.random.fork_rng(devices=[]):
        texts = torch.arange(2 * _NUM_TOKENS, device=model.device).reshape(2, -1) % size
        texts[:, 0] = 0
        first, second = (model(input_ids=text[None], use_cache=False).logits[0, 0].float() for text in texts)
    model.train(was_training)
    return bool((first - second).norm() > 1e-4 * (first - first.mean()).norm())


def _read_config(path: Path, defaults: dict) -> PretrainedConfig:
    try:
        values = parse_json(path.read_bytes(), source=str(path))
    except ValueError as error:
        raise ValueError(f"`--model_config` must be a JSON file, but: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(
            f"`--model_config` must hold an object with a `model_type`, but {str(path)!r} does not. "
            'Add for example "model_type": "llama".'
        )
    values = {**defaults, **values}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _size_config(size: str, model_type: str, *, vocab_size: int, block_size: int, special: dict) -> PretrainedConfig:
    if size not in MODEL_SIZES:
        raise ValueError(f"`--model_size` must be one of {list(MODEL_SIZES)}, but got {size!r}.")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"`--model_type` must be one of {list(MODEL_TYPES)}, but got {model_type!r}. "
            "Describe any other architecture in a JSON file and give it as `--model_config`."
        )
    num_layers, num_heads, hidden_size = MODEL_SIZES[size]
    if model_type == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            vocab_size=vocab_size,
            n_positions=max(512, block_size),
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=num_heads,
            **special,
        )
    return AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        max_position_embeddings=max(512, block_size),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 8 * 8,  # as many parameters as the usual 4 x two-matrix layer
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        tie_word_embeddings=True,
        **special,
    )
