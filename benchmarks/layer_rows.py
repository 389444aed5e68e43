"""
What rows of layers cost next to rows of words: CPU seconds beside a training step, and bytes an example.

    OMP_NUM_THREADS=1 python -m benchmarks.layer_rows [--rounds 5]

Two models with random weights (time does not depend on them): a BERT classifier of MiniLM's shape (6 blocks, width 384), and a
Llama of SmolLM2-135M's (30 blocks, width 576, vocabulary 49,152, tied), alone and with LoRA of rank 8 on all attention
projections. Batches of 8 examples of 32 tokens. A training step is forward and backward for what is trained, in training mode,
without an optimizer. Each setting takes turns with the step; by setting the median over rounds of its CPU seconds over the step's,
the same over those of words, and how many bytes of float16 an example takes. The last line is JSON.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.layers import choose_layers

BATCH_SIZE, LENGTH = 8, 32


def minilm() -> nn.Module:
    """Six classes."""
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    return BertForSequenceClassification(BertConfig(**shape, num_labels=6))


def smollm2() -> nn.Module:
    """Its head is the embedding matrix."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, use_cache=False)
    return LlamaForCausalLM(config)


def smollm2_lora() -> nn.Module:
    """Rank 8 on all attention projections."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(smollm2(), LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


SETTINGS: dict[str, tuple[Callable[[], nn.Module], dict[str, dict[str, Any]]]] = {
    "minilm": (
        minilm,
        {
            "words": {},
            "words, last": {"wanted": ["embedding", "classifier"]},
            "words, attention outputs": {"wanted": ["embedding", "attention.output.dense"]},
            "attention outputs": {"wanted": ["attention.output.dense"]},
            "last": {"wanted": ["classifier"]},
            "middle": {"wanted": ["layer.3.output.dense"]},
        },
    ),
    "smollm2": (
        smollm2,
        {
            "words": {},
            "words, attention outputs": {"wanted": ["embedding", "o_proj"]},
            "attention outputs": {"wanted": ["o_proj"]},
            "middle": {"wanted": ["layers.15.mlp.down_proj"]},
        },
    ),
    "smollm2_lora": (
        smollm2_lora,
        {
            "words": {},
            "adapters": {"wanted": ["adapters"]},
            "adapters, 16": {"wanted": ["adapters"], "projection_dim": 16},
            "words, adapters, 16": {"wanted": ["embedding", "adapters"], "projection_dim": 16},
        },
    ),
}


def batch_of(model: nn.Module, *, seed: int) -> dict[str, Tensor]:
    """Random tokens, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30_000, (BATCH_SIZE, LENGTH), generator=generator)
    classes = getattr(model.config, "num_labels", 2) if isinstance(model, BertForSequenceClassification) else None
    labels = ids if classes is None else torch.randint(classes, (BATCH_SIZE,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Forward and backward for all that is trained."""
    model.train()
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def measure(make: Callable[[], nn.Module], settings: dict[str, dict[str, Any]], *, rounds: int) -> dict[str, Any]:
    """By setting its costs, see above."""
    torch.manual_seed(0)
    model = make()
    found: dict[str, list[float]] = {name: [] for name in ("step", *settings)}
    num_bytes = {}
    for number in range(rounds + 1):
        batch = batch_of(model, seed=number)
        took = {"step": seconds(lambda batch=batch: step(model, batch))}
        for name, options in settings.items():
            layers = choose_layers(model, **options) if options else None
            with EmbeddingGradientRecorder(model, tied="input", verify=False, layers=layers) as recorder:
                recorder.record(batch_of(model, seed=100))  # warm, the projections drawn
                took[name] = seconds(lambda recorder=recorder, batch=batch: recorder.record(batch))
                num_bytes[name] = 2 * recorder.record(batch).rows.numel() // BATCH_SIZE
        for name, value in took.items() if number else ():  # the first is warm-up
            found[name].append(value)
    return {
        name: {
            "over_step": round(statistics.median(a / b for a, b in zip(values, found["step"], strict=True)), 3),
            "over_words": round(statistics.median(a / b for a, b in zip(values, found["words"], strict=True)), 3),
            "bytes": num_bytes[name],
        }
        for name, values in found.items()
        if name != "step"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    figures = {}
    for name in args.models:
        figures[name] = measure(*SETTINGS[name], rounds=args.rounds)
        print(name, json.dumps(figures[name]), flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
