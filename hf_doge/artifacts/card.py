"""The README.md of an artifact: short, generated, and left alone as soon as a person has edited it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_doge.artifacts.files import sha256

if TYPE_CHECKING:
    from hf_doge.artifacts.domain_weights import DomainWeights

_CARD = """\
---
{configs}tags:
- hf_doge
- domain-weights
---

# Domain weights

How much of each data domain to train on.

```text
{summary}
```

`weight` is the probability of drawing a training sequence from the domain.{trajectory} `domain_weights.json` holds
the same numbers with the recipe, its arguments and where the data came from.

With `hf_doge`: `DomainWeights.from_pretrained("path/or/name").mean`.
Without it: `datasets.load_dataset("path/or/name", "weights")`.

Weights belong to the domains, and if learned also to the tokenizer and the length of the run, that they come from. They
do not price repetition: compare them with the tokens each domain has. The method behind the recipes `paper` and
`official` is [DoGE](https://huggingface.co/papers/2310.15393).
"""
_SEAL = "\n<!-- hf_doge rewrites this file until somebody edits it: {checksum} -->\n"


def configs_header(data_files: Sequence[str]) -> str:
    """The YAML that makes each `<config>/<file>` a configuration of `datasets.load_dataset`, the first by default."""
    lines = ["configs:"]
    for number, path in enumerate(data_files):
        lines += [f"- config_name: {Path(path).parent.name}", *["  default: true"] * (number == 0)]
        lines += ["  data_files:", "  - split: train", f"    path: {path}"]
    return "\n".join(lines) + "\n"


def write_card(weights: "DomainWeights", data_files: Sequence[str]) -> str:
    """The card, sealed with its own checksum."""
    trajectory = " `trajectory/` holds them step by step." if weights.trajectory is not None else ""
    return seal(_CARD.format(configs=configs_header(data_files), summary=weights.summary(), trajectory=trajectory))


def seal(card: str) -> str:
    """The card with its own checksum at the end, by which [`is_edited`] knows it again."""
    return card + _SEAL.format(checksum=sha256(card.encode()))


def is_edited(card: str) -> bool:
    """Whether somebody had a hand in it since [`seal`]."""
    sealed = re.fullmatch(r"(.*)" + re.escape(_SEAL).replace(r"\{checksum\}", "([0-9a-f]{64})"), card, flags=re.DOTALL)
    return sealed is None or sha256(sealed[1].encode()) != sealed[2]
