"""Recall of wrong labels for `evaluate.load("<this folder>")`. It needs evaluate: `hf-doge[evaluate-influence]`."""

import datasets
import evaluate
import numpy as np

from hf_doge.evaluation.influence.rank_metrics import area_under_roc, recall_at

_DESCRIPTION = (
    "How many of the wrong labels stand among the most suspicious examples, and the area under the ROC curve."
)
_INPUTS = """
Args:
    predictions (`list` of `float`): Suspicion of each example, such as its self-influence.
    references (`list` of `int`): 1 where the label is wrong.
    fraction (`float`): Share of the examples that are inspected, in (0, 1]. Defaults to 0.1.

Returns:
    recall (`float`): Share of the wrong labels found.
    auc (`float`): Area under the ROC curve; 0.5 is chance.
"""


class MislabelledRecall(evaluate.Metric):
    """[`recall_at`] and [`area_under_roc`] in the form of the library evaluate."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int], fraction: float = 0.1) -> dict[str, float]:
        suspicion, positive = np.asarray(predictions), np.asarray(references)
        return {"recall": recall_at(suspicion, positive, fraction), "auc": area_under_roc(suspicion, positive)}
