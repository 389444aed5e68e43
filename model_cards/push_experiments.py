"""
Push what the experiments of `benchmarks/reproduce` left to the Hub of the tests, read it back, and take their cards from there.

    python -m benchmarks.reproduce doge_universal --data_dir ../shared/data --output_dir outputs/reproduce
    python -m benchmarks.reproduce doge_out_of_domain --data_dir ../shared/data --output_dir outputs/reproduce
    python -m benchmarks.reproduce.tracin_index --data_dir ../shared/data --output_dir outputs/reproduce
    python -m model_cards.push_experiments outputs/reproduce

Every learned weights and every index below the folder is pushed to a repository of its own by an ordinary client in a process of its own, and
compared with what another process loads from there. Those in `SHOWN` have a folder here: what a person wrote in its card is put into the
repository first, as its owner would, and the card as it stands after the push is written here. Look at the difference before you commit it.

The last line of the output is one line of JSON: repositories, files and bytes.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hf_doge import DomainWeights, InfluenceIndex
from hf_doge.artifacts.cards.weights import PLOT_FILE
from hf_doge.evaluation.influence.small_models import ConvolutionalClassifier
from tests.hub import HubServer, last_json, run_client

HERE = Path(__file__).parent
OWNER = "doge"  # who is logged in at the Hub of the tests
CARD = "README.md"
SHOWN = {
    "universal_weights": "doge_universal-paper_sum_cosine-nano-seed1",
    "out_of_domain_weights": "doge_out_of_domain-ca-seed1",
    "case_deletion_index": "tracin_case_deletion-index-ag_news-cnn",
}


def find_artifacts(folder: Path) -> dict[str, Path]:
    """Learned weights and indices below the output folder of the experiments, by the name of their repository."""
    weights = {
        f"{path.parents[2].name}-{path.parent.name}": path
        for path in sorted(folder.glob("doge_*/proxy/*/domain_weights"))
    }
    indices = {f"{path.parent.name}-{path.name}": path for path in sorted(folder.glob("tracin_*/index-*"))}
    return weights | indices


def load_classifier(path: Path) -> ConvolutionalClassifier:
    """The model of a checkpoint, which is no class of transformers; its sizes are read from its weights."""
    state = load_file(Path(path) / "model.safetensors")
    model = ConvolutionalClassifier(
        len(state["embedding.weight"]), len(state["classifier.bias"]), width=state["embedding.weight"].shape[1]
    )
    model.load_state_dict(state)
    return model


def push(folder: Path) -> None:
    """As an owner: every artifact below the folder; the reviewed cards first."""
    own_cards = {name: card for card, name in SHOWN.items() if (HERE / card / CARD).exists()}
    for name, path in find_artifacts(folder).items():
        repo_id = f"{OWNER}/{name}"
        if name in own_cards:
            api = HfApi()
            api.create_repo(repo_id, repo_type="dataset")
            api.upload_file(
                path_or_fileobj=HERE / own_cards[name] / CARD,
                path_in_repo=CARD,
                repo_id=repo_id,
                repo_type="dataset",
            )
        is_index = path.name.startswith("index-")
        artifact = (InfluenceIndex if is_index else DomainWeights).from_pretrained(path)
        artifact.push_to_hub(repo_id)
    print(json.dumps(sorted(find_artifacts(folder))))


def compare(folder: Path) -> None:
    """As somebody else: what is loaded is what was pushed, with this package and with `datasets` alone."""
    for name, path in find_artifacts(folder).items():
        repo_id = f"{OWNER}/{name}"
        if path.name.startswith("index-"):
            asked = load_dataset(repo_id, "examples", split="train").select_columns(["input_ids", "labels"]).take(5)
            here, there, streamed = (
                InfluenceIndex.from_pretrained(source, load_model=load_classifier, streaming=streaming).scores(asked)
                for source, streaming in ((path, False), (repo_id, False), (repo_id, True))
            )
            assert np.array_equal(here, there), name
            assert np.array_equal(here, streamed), name
            assert np.abs(here).max() > 0, name
        else:
            here, there = DomainWeights.from_pretrained(path), DomainWeights.from_pretrained(repo_id)
            assert (here.mean, here.last, here.recipe) == (there.mean, there.last, there.recipe), name
            assert np.array_equal(here.trajectory.weights, there.trajectory.weights), name
            table = load_dataset(repo_id, "weights", split="train")
            assert dict(zip(table["domain"], table["weight"], strict=True)) == here.mean, name
    print(json.dumps(len(find_artifacts(folder))))


def main(folder: Path) -> None:
    """Push, compare and take the cards."""
    with tempfile.TemporaryDirectory() as state, HubServer(Path(state) / "hub") as hub:
        names = last_json(run_client(hub, Path(__file__), "push", folder, timeout=600))
        home = Path(state) / "somebody-else"
        compared = last_json(run_client(hub, Path(__file__), "compare", folder, timeout=600, home=home))
        pushed = {name: hub.files(f"{OWNER}/{name}") for name in names}
    for card, name in SHOWN.items():
        if name in pushed:
            (HERE / card).mkdir(exist_ok=True)
            for file in {CARD, PLOT_FILE} & set(pushed[name]):
                (HERE / card / file).write_bytes(pushed[name][file])
    sizes = {name: sum(map(len, files.values())) for name, files in pushed.items()}
    figures = {"repositories": len(names), "compared": compared, "bytes": sum(sizes.values())}
    print(json.dumps({**figures, "cards": [card for card, name in SHOWN.items() if name in pushed]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    role, *rest = sys.argv[1:]
    if rest:
        {"push": push, "compare": compare}[role](Path(rest[0]).absolute())
    else:
        main(Path(role).absolute())
