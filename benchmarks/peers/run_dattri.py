"""
dattri's TracIn on the embedding matrix: per-example dense gradients by `vmap`.

Its documented `layer_name` differentiates through all parameters, 76 times slower than a naive loop; freezing all but
the embedding is its fast way. Exact scores cannot be asked for by argument (`projector_kwargs=None` projects to 512
numbers), so the projection is taken out afterwards. transformers reads the values of a 2-D mask, which `vmap` forbids:
dattri is handed the ready additive mask.
"""

from pathlib import Path

import numpy as np
import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.measure import main
from benchmarks.peers.workload import EMBEDDING, Examples, Workload

TRAIN_BATCH_SIZE = 50  # the fastest of 25, 50 and 125


def loader(examples: Examples, batch_size: int) -> DataLoader:
    """The examples in order, the mask ready to be added to the attention scores `(N, 1, 1, num_positions)`."""
    mask = (1 - examples.attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    return DataLoader(TensorDataset(examples.input_ids, mask, examples.labels), batch_size=batch_size)


def first(model: nn.Module, workload: Workload, state_dir: Path) -> np.ndarray:
    """Scores `(num_train, num_queries)`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(EMBEDDING))

    def loss(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        input_ids, mask, label = (part.unsqueeze(0) for part in example)
        output = torch.func.functional_call(
            model, parameters, args=(), kwargs={"input_ids": input_ids, "attention_mask": mask}
        )
        return nn.functional.cross_entropy(output.logits, label)

    task = AttributionTask(
        loss_func=loss, model=model, checkpoints=[None], checkpoints_load_func=lambda model, checkpoint: model
    )
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None
    queries = loader(workload.queries, len(workload.queries))  # its gradients are computed anew per train batch
    return attributor.attribute(loader(workload.train, TRAIN_BATCH_SIZE), queries).numpy()


if __name__ == "__main__":
    main({"first": first})
