"""The README.md of an influence index."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_doge.artifacts.card import is_edited, seal
from hf_doge.artifacts.influence.manifest import CARD_FILE, data_files

_CARD = """\
---
{configs}tags:
- hf_doge
- influence
- tracin-we
---

# Influence index

Gradients of the loss of {num_examples:,} training examples with respect to the word embeddings of the model, at
{num_checkpoints} of its checkpoints. From them follows which training examples, and which words in them, made the model
predict as it does.

{checkpoints}

Configuration `gradients` has a row for each checkpoint, token and example that holds the token: `grad` is the gradient of
the example's loss ({loss}) with respect to the embedding of `token_id`{form}. The influence of a training example on a
prediction is the sum, over checkpoints and the tokens that both hold, of the learning rate times the inner product of
their gradients. It is large and *positive* for a proponent: a training step on it lowered the loss of the prediction.
`examples` tells of each training example, `checkpoints` of each checkpoint, and `config.json` how all was made.

With `hf_doge`: `InfluenceIndex.from_pretrained("path/or/name").search(queries, top_k=10)`.
Without it: `datasets.load_dataset("path/or/name", "gradients")`.

Gradients belong to the weights and the tokenizer that they were computed with. They tell what single steps of gradient
descent did to first order, not what training without an example would have given. Examples that share no token with a
prediction score 0, tokens that all examples share ([CLS], punctuation) can carry most of a score, and nothing here says
that an example is right or wrong. Gradients can reveal the texts they came from: share them as you would share those.

The method is TracIn-WE, [First is Better Than Last for Language Data Influence](https://huggingface.co/papers/2202.11844)
(Yeh et al., 2022), a form of TracIn, [Estimating Training Data Influence by Tracing Gradient
Descent](https://huggingface.co/papers/2002.08484) (Pruthi et al., 2020). Please cite both.
"""


def configs_header(config: Mapping[str, Any]) -> str:
    """The YAML that makes `gradients` (by default), `examples` and `checkpoints` configurations of `load_dataset`."""
    parts = data_files(config)
    lines = ["configs:"]
    for name, paths in parts.items():
        lines += [f"- config_name: {name}", *["  default: true"] * (name == "gradients")]
        lines += ["  data_files:", "  - split: train", "    path:", *(f"    - {path}" for path in paths)]
    return "\n".join(lines) + "\n"


def write_card(config: Mapping[str, Any]) -> str:
    """The card, sealed with its own checksum."""
    lines = ["| checkpoint | step | learning rate |", "| --- | ---: | ---: |"]
    lines += [f"| {one['name']} | {one['step']} | {one['learning_rate']:g} |" for one in config["checkpoints"]]
    scaled = "" if config["dtype"] == "float32" else " times `scale`"
    projected = f", projected at random to width {config['stored_width']}" if config["projection"] else ""
    loss = f"{config['loss_reduction']} over its tokens" if config["loss_reduction"] else "as the model defines it"
    kept = f", of the {config['top_k']} tokens with the largest gradients" if config["top_k"] else ""
    body = _CARD.format(
        configs=configs_header(config),
        num_examples=config["num_examples"],
        num_checkpoints=len(config["checkpoints"]),
        checkpoints="\n".join(lines),
        loss=loss,
        form=f"{scaled}{projected}{kept}",
    )
    return seal(body)


def renewed_card(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The card as a file to write; none when somebody has edited the one in the folder."""
    card = folder / CARD_FILE
    written = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
    if written is None or not is_edited(written):
        return {CARD_FILE: write_card(config).encode()}
    if configs_header(config) not in written:
        warnings.warn(
            f"{str(card)!r} was edited, so it is kept. For `load_dataset`, let its header say\n{configs_header(config)}",
            stacklevel=5,
        )
    return {}
