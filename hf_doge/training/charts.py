"""One chart for all domains, where what a trainer reports to can show several metrics in one."""

import weakref
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
        # Held strongly, the trainer would be freed by the garbage collector alone, which waits 5 s for each persistent worker of
        # its loader.
        self._trainer = weakref.ref(trainer)
        self._layout = {"Domains": {TITLES[kind]: ["Multiline", [f"{_PREFIX}{kind}/.*"]] for kind in kinds}}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": self._trainer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _trainer=weakref.ref(state["_trainer"]))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        # The callbacks that report have begun: the Trainer adds them first.
        trainer = self._trainer()
        assert trainer is not None, "it trains"
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_custom_scalars(self._layout)
