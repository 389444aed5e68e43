"""AUC-DEL for `evaluate.load("<this folder>")`. It needs the library evaluate: `hf-doge[evaluate-influence]`."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
AUC-DEL of the TracIn-WE paper: the mean change of a test point's probability when the model is retrained without training
examples that a scorer chose, over test points and numbers of removed examples. Without proponents (AUC-DEL+) lower is
better, without opponents (AUC-DEL-) higher.
"""
_INPUTS = """
Args:
    predictions (`list` of `float`): Probability after retraining without the chosen examples; one per test point, seed
        and number of removed examples, in any order.
    references (`list` of `float`): Probability of the same point after training with all examples, same seed.

Returns:
    auc_del (`float`): Mean of prediction - reference, from -1 to 1.
"""
_CITATION = """
@inproceedings{yeh2022first,
  title={First is Better Than Last for Language Data Influence},
  author={Yeh, Chih-Kuan and Taly, Ankur and Sundararajan, Mukund and Liu, Frederick and Ravikumar, Pradeep},
  booktitle={NeurIPS}, year={2022}
}
"""


class AucDel(evaluate.Metric):
    """Mean change of probability over all retrainings, each number of removed examples equally often."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://huggingface.co/papers/2202.11844"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        changes = np.asarray(predictions, dtype=np.float64) - np.asarray(references, dtype=np.float64)
        return {"auc_del": float(changes.mean())}
