"""
Run against the Hub of the tests, by tests/hub/test_layers_on_the_hub.py: an index with rows of layers is pushed, and read in parts.

Prints what was seen as one line of JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np

from hf_doge import InfluenceIndex
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import tiny_classifier, tiny_tokenizer
from tests.tracing.recorded_training import classification_data

WORK = Path(sys.argv[1])
QUERIES = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [9, 6], "labels": 2}]
tiny_classifier().save_pretrained(WORK / "checkpoint-1")
tiny_tokenizer().save_pretrained(WORK / "checkpoint-1")
record_dataset(
    WORK / "index",
    [WORK / "checkpoint-1"],
    classification_data(),
    tokenizer=tiny_tokenizer(),
    settings=RecordingSettings(layers=["embedding", "classifier", "*.output.dense"], projection_dim=5),
    learning_rates=[0.1],
    progress=False,
)
local = InfluenceIndex.from_pretrained(WORK / "index", cache_dir=WORK / "maps")
local.push_to_hub("doge/layers")
remote = InfluenceIndex.from_pretrained("doge/layers", streaming=True, cache_dir=WORK / "remote")
fetched = InfluenceIndex.from_pretrained("doge/layers", cache_dir=WORK / "fetched")
options = {"cosine": False}
print(
    json.dumps(
        {
            "streamed": bool(np.array_equal(remote.scores(QUERIES, **options), local.scores(QUERIES, **options))),
            "fetched": bool(np.array_equal(fetched.scores(QUERIES), local.scores(QUERIES))),
            "words": remote.search(QUERIES, top_k=1, **options)[0]["words"],
            "largest": float(np.abs(local.scores(QUERIES, **options)).max()),
        }
    )
)
