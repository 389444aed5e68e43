"""
Run against the Hub of the tests, by tests/hub/test_components_on_the_hub.py: indices of principal components are pushed, and read in parts.

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
seen = {}
for dtype in ("float16", "int8"):
    record_dataset(
        WORK / dtype,
        [WORK / "checkpoint-1"],
        classification_data(),
        tokenizer=tiny_tokenizer(),
        settings=RecordingSettings(projection="pca", projection_width=5, dtype=dtype),
        learning_rates=[0.1],
        progress=False,
    )
    local = InfluenceIndex.from_pretrained(WORK / dtype, cache_dir=WORK / "maps")
    local.push_to_hub(f"doge/{dtype}")
    fetched = InfluenceIndex.from_pretrained(f"doge/{dtype}", cache_dir=WORK / f"fetched-{dtype}")
    seen[f"fetched {dtype}"] = bool(np.array_equal(fetched.scores(QUERIES), local.scores(QUERIES)))
    seen[f"largest {dtype}"] = float(np.abs(local.scores(QUERIES, cosine=False)).max())
    if dtype == "float16":
        remote = InfluenceIndex.from_pretrained("doge/float16", streaming=True, cache_dir=WORK / "remote")
        options = {"cosine": False}
        seen["streamed"] = bool(np.array_equal(remote.scores(QUERIES, **options), local.scores(QUERIES, **options)))
        words = [one.search(QUERIES, top_k=3, **options)["word_scores"][:] for one in (remote, local)]
        seen["words"] = words[0] == words[1]
        seen["pushed again"] = local.push_to_hub("doge/float16").oid == local.push_to_hub("doge/float16").oid
print(json.dumps(seen))
