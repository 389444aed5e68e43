"""The trial of sources whose labels differ in quality, on generated texts: what is drawn, and that all of its arms run."""

import gzip
import json
import random

import pytest

from benchmarks.pretrained.label_sources import ARMS, FLIPPED, NOT_TOXIC, SOURCES, TARGET, LabelSources, Settings
from tests.tiny import tiny_classifier, tiny_tokenizer

SETTINGS = Settings(
    num_source=40, num_target=40, num_test=20, length=20, steps=2, batch_size=6, draws=(1, 2), seeds=(11, 12)
)


def make_model():
    return tiny_classifier(num_labels=2), tiny_tokenizer()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Records as ../shared/data has them, each text once."""
    folder, rng = tmp_path_factory.mktemp("data") / "classification", random.Random(0)
    folder.mkdir()
    for name, other in NOT_TOXIC.items():
        for split in ("train", "test"):
            with gzip.open(folder / f"{name}.{split}.jsonl.gz", "wt", encoding="utf-8") as file:
                for label in (other, "yes") * 150:
                    text = " ".join(f"w{rng.randrange(28)}" for _ in range(20))
                    file.write(json.dumps({"text": text, "label_name": label}) + "\n")
    return folder.parent


def test_sources_are_disjoint_balanced_and_flipped_by_their_shares(data_dir, tmp_path):
    trial = LabelSources(make_model, data_dir, tmp_path, SETTINGS)
    sources, target = trial.records(1)
    with gzip.open(data_dir / "classification" / f"{TARGET}.train.jsonl.gz", "rt", encoding="utf-8") as file:
        clean = {row["text"]: int(row["label_name"] != NOT_TOXIC[TARGET]) for row in map(json.loads, file)}
    texts = [text for rows in (*sources.values(), target) for text, _ in rows]
    assert len(set(texts)) == len(texts) == 6 * 40 + 40
    for rows in (*sources.values(), target):
        assert sum(label for _, label in rows) == len(rows) / 2
    for name, share in FLIPPED.items():
        assert sum(clean[text] != label for text, label in sources[name]) == share * 40
    assert all(clean[text] == label for text, label in target)
    assert trial.records(1) == trial.records(1) != trial.records(2)


def test_every_arm_runs_and_a_second_call_finds_all_of_it(data_dir, tmp_path):
    found = LabelSources(make_model, data_dir, tmp_path, SETTINGS).figures(ARMS)
    assert sorted(found["against_uniform"]) == sorted(set(ARMS) - {"uniform"})
    for routes in found["weights"].values():
        assert all(set(weights) == set(SOURCES) for weights in routes.values())
    again = LabelSources(make_model, data_dir, tmp_path, SETTINGS)
    assert again.figures(ARMS) == found
    assert all(facts["was_finished"] for facts in again.store.used.values())
