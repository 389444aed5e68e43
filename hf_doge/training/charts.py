"""One chart for all domains, where what a trainer reports to can show several metrics in one."""

from collections.abc import Sequence
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

_PREFIX = "train/"  # that the Trainer's integrations put before what is logged in training
MEASURED = ("domain_loss", "domain_share", "domain_epochs")  # of a trainer that does not learn
TITLES = {
    "domain_weight": "Weights",
    "domain_loss": "Losses",
    "domain_score": "Scores",
    "domain_share": "Shares of the examples",
    "domain_epochs": "Epochs",
}


class GroupedChartsCallback(TrainerCallback):
    """
    Lays out TensorBoard's tab "Custom Scalars", in the event file of each training: one chart a kind of metric, a line for each
    domain. Does nothing where nothing is reported to TensorBoard.

    Args:
        trainer (`Trainer`): Whose callbacks report.
        kinds (sequence of `str`): What stands before the `/` of the metrics, keys of [`TITLES`].
    """

    def __init__(self, trainer: Trainer, kinds: Sequence[str]) -> None:
        self._trainer = trainer
        self._layout = {"Domains": {TITLES[kind]: ["Multiline", [f"{_PREFIX}{kind}/.*"]] for kind in kinds}}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        # The callbacks that report have begun: the Trainer adds them first.
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_custom_scalars(self._layout)
