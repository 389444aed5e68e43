"""captum's `TracInCP` on the embedding matrix: one backward per example, one dense gradient each."""

from pathlib import Path

import numpy as np
from captum.influence import TracInCP
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.measure import main
from benchmarks.peers.workload import EMBEDDING, Examples, Workload

# captum walks through the whole batch's graph once per example, and through all queries' gradients once per batch:
# the fastest of 1, 2, 4 and 8.
BATCH_SIZE = 8


class Logits(nn.Module):
    """captum calls the model with the fields of an example in order and wants its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def loader(examples: Examples, batch_size: int) -> DataLoader:
    """The examples in order."""
    return DataLoader(TensorDataset(*vars(examples).values()), batch_size=batch_size)


def learning_rate(model: nn.Module, checkpoint: str) -> float:
    """Nothing to load, the model is at its one checkpoint (captum asks for it anew at every batch)."""
    return 1.0


def attribute(model: nn.Module, train: Examples, queries: Examples) -> np.ndarray:
    """Scores `(num_train, num_queries)`."""
    tracer = TracInCP(
        Logits(model),
        loader(train, BATCH_SIZE),
        ["the only checkpoint"],
        checkpoints_load_func=learning_rate,
        layers=[f"model.{EMBEDDING}"],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
    )
    return tracer.influence(loader(queries, 1)).T.detach().numpy()


def first(model: nn.Module, workload: Workload, state_dir: Path) -> np.ndarray:
    """The first set of queries."""
    return attribute(model, workload.train, workload.queries)


def second(model: nn.Module, workload: Workload, state_dir: Path) -> np.ndarray:
    """The second set: nothing was kept, all again."""
    return attribute(model, workload.train, workload.second_queries)


if __name__ == "__main__":
    main({"first": first, "second": second})
