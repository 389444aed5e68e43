"""
dattri-llm's TracIn on the embedding matrix, in all of its ways.

Live and from its disk cache; `instance` scores (the default) and `token` scores, whose sum over a training example's
positions is the same number and cheaper. All parameters but the embedding are frozen, as its documentation advises.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    GradientStorageManager,
    HookManagerConfig,
    TracInAttributor,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.peers.measure import main
from benchmarks.peers.workload import EMBEDDING, Examples, Workload

TRAIN_BATCH_SIZE = {"instance": 25, "token": 12}  # the fastest of 4, 8, 12, 25, 50 and 125
HOOKS = {"hook_config": HookManagerConfig(hook_types={EMBEDDING: "linear_io"})}


class AsDataset(Dataset):
    """Examples one by one."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, example: int) -> dict[str, Tensor]:
        return self.examples[example]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum over examples, so that the size of the batch does not scale an example's gradient."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")


def attributor(model: nn.Module, num_queries: int, granularity: str) -> TracInAttributor:
    """The attributor, queries in one batch."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(EMBEDDING))
    args = AttributionArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=TRAIN_BATCH_SIZE[granularity],
        per_device_eval_batch_size=num_queries,
        use_cpu=True,
    )
    return TracInAttributor(args, task=AttributionTask(loss, model))


def first(model: nn.Module, workload: Workload, state_dir: Path, *, granularity: str) -> np.ndarray:
    """Build and score, nothing on disk."""
    score = attributor(model, len(workload.queries), granularity).attribute(
        AsDataset(workload.train), AsDataset(workload.queries), attribution_granularity=granularity, **HOOKS
    )
    return score.agnostic_matrix()[1].numpy()


def store(model: nn.Module, workload: Workload, state_dir: Path, *, granularity: str) -> None:
    """Write the training examples' gradients to its disk cache."""
    tracer = attributor(model, len(workload.queries), granularity)
    tracer.collect_gradients(
        tracer.generate_train_rep(AsDataset(workload.train), **HOOKS),
        GradientStorageManager(str(state_dir / f"train_{granularity}")),
    )


def second(model: nn.Module, workload: Workload, state_dir: Path, *, granularity: str) -> np.ndarray:
    """New queries against the disk cache."""
    tracer = attributor(model, len(workload.second_queries), granularity)
    queries = GradientStorageManager(tempfile.mkdtemp(), residency="memory")
    tracer.collect_gradients(tracer.generate_test_rep(AsDataset(workload.second_queries), **HOOKS), queries)
    score = tracer.attribute_from_cache(
        state_dir / f"train_{granularity}", queries, attribution_granularity=granularity
    )
    return score.agnostic_matrix()[1].numpy()


if __name__ == "__main__":
    main(
        {
            f"{step.__name__}_{granularity}": partial(step, granularity=granularity)
            for granularity in ("instance", "token")
            for step in (first, store, second)
        },
        needs={"second_instance": "store_instance", "second_token": "store_token"},
    )
