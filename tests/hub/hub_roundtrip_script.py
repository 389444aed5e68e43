"""
A client of the Hub of the tests: learns, records, pushes, and reads all of it again in every way there is.

    python hub_roundtrip_script.py FOLDER

Prints what it saw as one line of JSON.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, HfFileSystem

from hf_doge import DomainWeights, InfluenceIndex
from tests.artifacts.test_domain_weights import make_weights
from tests.hub.handle import validate_card
from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer

WEIGHTS, INDEX = "doge/mixture", "doge/influence"
QUERIES = ["The rocket is winning.", "A new bank is the market."]


def check_weights(folder):
    weights = make_weights()
    first = weights.push_to_hub(WEIGHTS, tag="v1")
    again = weights.push_to_hub(WEIGHTS)
    other = make_weights(seed=1, with_trajectory=False)
    other.push_to_hub(WEIGHTS, commit_message="Another mixture")
    seen = {
        "weights_repeat_is_same_commit": first.oid == again.oid,
        "weights_head": DomainWeights.from_pretrained(WEIGHTS) == other,
        "weights_tag": DomainWeights.from_pretrained(WEIGHTS, revision="v1") == weights,
        "weights_commit": DomainWeights.from_pretrained(WEIGHTS, revision=first.oid) == weights,
        "weights_offline": DomainWeights.from_pretrained(WEIGHTS, local_files_only=True) == other,
        "trajectory_is_gone": "trajectory/train-00000-of-00001.parquet" not in HfApi().list_repo_files(WEIGHTS, repo_type="dataset"),
        "glob": HfFileSystem().glob(f"datasets/{WEIGHTS}@v1/**/*.parquet"),
    }  # fmt: skip
    other_cache = folder / "weights-cache"
    kept = DomainWeights.from_pretrained(WEIGHTS, cache_dir=other_cache)
    seen["weights_cache_dir"] = kept == other and any(other_cache.rglob("*.parquet"))
    for config, rows in (("weights", 3), ("trajectory", len(weights.trajectory.steps) * 3)):
        table = load_dataset(WEIGHTS, config, revision="v1", split="train")
        streamed = list(load_dataset(WEIGHTS, config, revision="v1", split="train", streaming=True))
        seen[f"load {config}"] = len(table) == rows and _same(table.to_list(), streamed)
    table = load_dataset(WEIGHTS, "weights", revision="v1", split="train")
    seen["weights_table"] = dict(zip(table["domain"], table["weight"], strict=True)) == weights.mean
    card = DatasetCard.load(WEIGHTS)
    validate_card(card)
    seen["weights_card"] = [card.data.size_categories, [one["config_name"] for one in card.data.configs]]
    return seen


def check_index(folder):
    tokenizer = wordpiece_tokenizer()
    local_folder = train(
        folder, classifier(tokenizer), tokenizer, tokenised(sentences(24), tokenizer), dtype="float16"
    )
    local = InfluenceIndex.from_pretrained(local_folder, cache_dir=folder / "maps")
    commit = local.push_to_hub(INDEX, tag="v1", private=True, commit_message="An index")
    again = local.push_to_hub(INDEX)
    fetched = InfluenceIndex.from_pretrained(INDEX, cache_dir=folder / "fetched")
    hits, remote = local.search(QUERIES, top_k=3), fetched.search(QUERIES, top_k=3)
    seen = {
        "index_repeat_is_same_commit": commit.oid == again.oid,
        "index_scores": np.array_equal(local.scores(QUERIES), fetched.scores(QUERIES)),
        "index_hits": hits.to_list() == remote.to_list(),
        "index_files": _checksums(local_folder) == _checksums(fetched.reader.folder),
        "index_paths": [one["path"] for one in fetched.reader.checkpoints],
        "index_revision": len(InfluenceIndex.from_pretrained(INDEX, revision="v1", cache_dir=folder / "fetched")),
    }
    for config in ("gradients", "examples", "checkpoints", "offsets"):
        table = load_dataset(INDEX, config, split="train")
        streamed = sum(1 for _ in load_dataset(INDEX, config, split="train", streaming=True))
        seen[f"load {config}"] = len(table) == streamed > 0
    card = DatasetCard.load(INDEX)
    validate_card(card)
    seen["index_card"] = [card.data.size_categories, [one["config_name"] for one in card.data.configs]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = InfluenceIndex.from_pretrained(INDEX, streaming=True, cache_dir=folder / "streamed")
        seen["stream_scores"] = np.array_equal(local.scores(QUERIES), stream.scores(QUERIES))
        seen["stream_hits"] = stream.search(QUERIES, top_k=3).to_list() == hits.to_list()
    local.push_to_hub(f"{INDEX}-redacted", redact_text=True, keep_columns=("label_name",))
    local.push_to_hub(f"{INDEX}-without-models", include_models=False)
    redacted = InfluenceIndex.from_pretrained(f"{INDEX}-redacted", cache_dir=folder / "redacted")
    seen["redacted_columns"] = sorted(redacted.examples.column_names)
    seen["redacted_scores"] = np.array_equal(local.scores(QUERIES), redacted.scores(QUERIES))
    found = redacted.search(QUERIES, top_k=3)
    redacted.to_html(found, folder / "redacted.html")
    seen["redacted_hits"] = found["example_id"] == hits["example_id"]
    return seen


def _same(rows, others):
    return json.dumps(rows) == json.dumps(others)  # NaN is NaN there


def _checksums(folder):
    config = json.loads((Path(folder) / "config.json").read_text())
    return [[file["sha256"], file["offsets_sha256"]] for one in config["checkpoints"] for file in one["files"]]


if __name__ == "__main__":
    print(json.dumps(check_weights(Path(sys.argv[1])) | check_index(Path(sys.argv[1]))))
