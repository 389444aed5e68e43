"""What a trainer was made with and has read then, for a look at train begin at what was set on it since: [`AsMade`]."""

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset
from transformers import Trainer

from hf_doge.sampling.domains import merge_domains

_READ_BY_TRAINER = ("label_smoothing_factor", "neftune_noise_alpha", "bf16")  # in its arguments, once
# Arguments of our trainers, which keep what they have made of them.
_READ_BY_US = (
    *("target_dataset", "target_weights", "initial_weights", "domain_weights", "domain_column", "domain_sampler"),
    *("max_epochs_per_domain", "unit", "draw"),
)


class AsMade:
    """
    What is read once, when a trainer is made.

    Args:
        trainer (`DomainWeightedMixin`): Just made.
        arguments (iterable of `str`): Names in its `args` that may not change, besides those that the Trainer itself reads once.
        given (mapping): The trainer's own arguments. A subclass may keep one under its name.
    """

    def __init__(self, trainer: Any, arguments: Iterable[str], given: Mapping[str, Any]) -> None:
        self.train_dataset, self.given = trainer.train_dataset, dict(given)
        self._processing_class = trainer.processing_class
        self._arguments = {name: getattr(trainer.args, name) for name in (*_READ_BY_TRAINER, *arguments)}
        own = {name: vars(trainer).get(name) for name in _READ_BY_US}
        self._attributes = {name: (value, given.get(name, value)) for name, value in own.items()}

    def refuse_changes(self, trainer: Any) -> None:
        """
        Raise a `ValueError` for what was set since, where that would count for nothing or for a part only.

        Another train set may take the place of the first, if it has the same rows in each domain; other columns do no harm.
        """
        for name, value in self._arguments.items():
            now = getattr(trainer.args, name, None)
            if now != value:
                raise ValueError(
                    f"`{name}` must stay what the trainer was made with, {value!r}, but is {now!r} now. Make another trainer."
                )
        for name, known in self._attributes.items():
            now = vars(trainer).get(name)
            if not any(now is one for one in known):
                raise ValueError(
                    f"`{name}` is read when the trainer is made, but was set later, which would have no effect. Make another "
                    "trainer with it."
                )
        self._refuse_other_rows(trainer)
        self._refuse_other_tokenizer(trainer)
        _refuse_untrained_model(trainer)

    def _refuse_other_rows(self, trainer: Any) -> None:
        data, column, sampler = trainer.train_dataset, trainer._domain_column, trainer.domain_sampler
        if data is self.train_dataset:
            return
        has_domains = isinstance(data, Dataset) and column in data.column_names
        if (
            sampler is None
            or not has_domains
            or data.features[column] != self.train_dataset.features[column]
            or merge_domains(data, column)[1] != sampler.domains
        ):
            raise ValueError(
                "`train_dataset` must stay what the trainer was made with, since its rows are drawn by their number, but it is "
                f"another {type(data).__name__} now. Make another trainer."
            )

    def _refuse_other_tokenizer(self, trainer: Any) -> None:
        """It would be saved and recorded in place of the one that the batches are made by."""
        made_with, used = self._processing_class, getattr(trainer.data_collator, "tokenizer", None)
        if made_with is not None and used is made_with and trainer.processing_class is not made_with:
            raise ValueError(
                "`processing_class` must be the tokenizer of the data collator, but another one was set after the trainer "
                "was made, which the collator does not know. Set `data_collator` too, or make another trainer."
            )


def _refuse_untrained_model(trainer: Trainer) -> None:
    """A Trainer trains its `model_wrapped`, which does not follow `model`."""
    model, wrapped = trainer.model, trainer.model_wrapped
    if model is None or wrapped is model or trainer.model_init is not None:
        return
    if not any(one is model for one in wrapped.modules()) and not any(one is wrapped for one in model.modules()):
        raise ValueError(
            "`model` must stay what the trainer was made with, but another one was set later, which the Trainer would not train. "
            "Make another trainer, or set `model_wrapped` to the same model."
        )
