"""
Render the example cards of this folder from what `hf-doge demo` made, for a person to review.

    hf-doge demo --output_dir demo
    python model_cards/render.py demo

Of a demo that was stopped after the weights were learned, the index is recorded here. What a person wrote around our block in a card stays. Look at the difference before you commit it: names of the domains and
numbers are those of the machine the demo ran on.
"""

import sys
from pathlib import Path

import torch

from hf_doge import DomainWeights
from hf_doge.artifacts.cards.card import read_card
from hf_doge.artifacts.cards.index import index_card
from hf_doge.artifacts.cards.weights import PLOT_FILE, draw_plot, weights_card
from hf_doge.artifacts.influence.manifest import read_config
from hf_doge.cli.demo_influence import trace_continuation

HERE = Path(__file__).parent
OWNER = "your-name"


def main(demo: Path) -> None:
    """Write `domain_weights/` and `influence_index/`."""
    proxy, index = demo / "proxy", demo / "tracing" / "influence"
    artifact = proxy / "domain_weights"
    if not index.exists():
        torch.set_num_threads(1)
        trace_continuation(
            demo / "corpus", index.parent, tokenizer_dir=proxy / "tokenizer", blocks_dir=proxy / "blocks"
        )
    weights = DomainWeights.from_pretrained(artifact)
    picture = draw_plot(weights)
    files = {path.relative_to(artifact).as_posix(): path for path in sorted(artifact.rglob("*.parquet"))}
    if picture is not None:
        files[PLOT_FILE] = picture
    cards = {
        "domain_weights": weights_card(weights, files, repo_id=f"{OWNER}/demo-domain-weights"),
        "influence_index": index_card(read_config(index), index, repo_id=f"{OWNER}/demo-influence-index"),
    }
    for name, rendered in cards.items():
        card = HERE / name / "README.md"
        card.parent.mkdir(exist_ok=True)
        card.write_text(rendered.merged_with(read_card(card)), encoding="utf-8")
    if picture is not None:
        (HERE / "domain_weights" / PLOT_FILE).write_bytes(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
