"""
kronfluence's pairwise scores with the identity as its Hessian, over all linear layers.

Another quantity than ours, it knows no embeddings: it is here for its time only.
"""

from pathlib import Path

import numpy as np
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.peers.measure import main
from benchmarks.peers.workload import Examples, Workload

TRAIN_BATCH_SIZE = 125  # the fastest of 8, 25, 50, 125 and 250


class AsDataset(Dataset):
    """Examples one by one."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, example: int) -> dict[str, Tensor]:
        return self.examples[example]


class Classification(Task):
    """The summed loss, for training examples as for queries."""

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        """Cross-entropy."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        """The same."""
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        """Which positions are not padding."""
        return batch["attention_mask"]


def first(model: nn.Module, workload: Workload, state_dir: Path) -> np.ndarray:
    """Scores `(num_train, num_queries)`."""
    task = Classification()
    analyzer = Analyzer(
        analysis_name="linear",
        model=prepare_model(model, task),
        task=task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(state_dir),
    )
    train, queries = AsDataset(workload.train), AsDataset(workload.queries)
    analyzer.fit_all_factors(
        "identity", train, factor_args=FactorArguments(strategy="identity"), overwrite_output_dir=True
    )
    scores = analyzer.compute_pairwise_scores(
        scores_name="scores",
        factors_name="identity",
        query_dataset=queries,
        train_dataset=train,
        per_device_query_batch_size=len(queries),
        per_device_train_batch_size=TRAIN_BATCH_SIZE,
        overwrite_output_dir=True,
    )
    scores = scores or analyzer.load_pairwise_scores("scores")
    return scores["all_modules"].T.numpy()


if __name__ == "__main__":
    main({"first": first})
