"""
What it costs to draw by domain weights: a billion examples in a thousand contiguous domains.

    python -m benchmarks.sampler

Ours draws a million rows of the billion. torch's `WeightedRandomSampler` cannot: it takes one weight per row, at most
2^24 of them, and draws a whole epoch at once, so it draws its million from 2^24 - 1 rows, weights already in memory.
Each is measured in a process of its own, construction included.

Last line: `rss_mb` (resident memory that our sampler and its million draws add at their peak), `rss_with_torch_mb` (that
of the whole process, nearly all of it torch), `first_index_ms` (construction to the first row), `indices_per_s` (median
of five), `over_torch` (our rows per second over torch's).
"""

import json
import statistics
import subprocess
import sys
import time

NUM_DRAWS = 1_000_000
NUM_REPEATS = 5

OURS = f"""
import json, resource, time
import numpy as np, psutil
from hf_doge.sampling.sampler import DomainWeightedSampler

DomainWeightedSampler({{"warm": 1}}, {{"warm": 1.0}}).indices(0, 1)
weights = np.random.default_rng(0).dirichlet(np.ones(1000))
weights = {{f"domain{{i}}": weight for i, weight in enumerate(weights)}}
sizes = dict.fromkeys(weights, 1_000_000)
before = psutil.Process().memory_info().rss
start = time.perf_counter()
sampler = DomainWeightedSampler(sizes, weights, num_samples={NUM_DRAWS}, seed=0)
iterator = iter(sampler)
next(iterator)
first = time.perf_counter() - start
for _ in iterator:
    pass
seconds = time.perf_counter() - start
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"first": first, "seconds": seconds, "rss": peak - before, "rss_with_torch": peak}}))
"""

TORCH = f"""
import json, time
import torch
from torch.utils.data import WeightedRandomSampler

weights = torch.rand(2**24 - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
start = time.perf_counter()
for _ in WeightedRandomSampler(weights, {NUM_DRAWS}, generator=torch.Generator().manual_seed(0)):
    pass
print(json.dumps({{"seconds": time.perf_counter() - start}}))
"""


def measure(code: str) -> dict[str, float]:
    """Figures that a fresh Python prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main() -> None:
    ours, torch = [], []
    for repeat in range(NUM_REPEATS):  # in turns, so that a busy machine slows both
        ours.append(measure(OURS))
        torch.append(measure(TORCH))
        print(f"{time.strftime('%X')} {repeat + 1} of {NUM_REPEATS}: {ours[-1]}, torch {torch[-1]}", flush=True)
    seconds = statistics.median(run["seconds"] for run in ours)
    figures = {
        "rss_mb": round(max(run["rss"] for run in ours) / 2**20, 1),
        "rss_with_torch_mb": round(max(run["rss_with_torch"] for run in ours) / 2**20, 1),
        "first_index_ms": round(1000 * statistics.median(run["first"] for run in ours), 2),
        "indices_per_s": round(NUM_DRAWS / seconds),
        "over_torch": round(statistics.median(run["seconds"] for run in torch) / seconds, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
