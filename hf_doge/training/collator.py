"""Carrying each example's domain through any data collator."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import ClassLabel

from hf_doge.sampling.collation import SeededCollator
from hf_doge.training.packing import lengths_in_line

DOMAIN_IDS = "domain_ids"


class DomainLookup:
    """
    From an entry of the domain column to the domain's position in `names`, -1 for any other entry.

    A class rather than a closure, so that DataLoader workers can be spawned with it.
    """

    def __init__(self, feature: Any, names: tuple[str, ...]) -> None:
        self.class_label = feature if isinstance(feature, ClassLabel) else None
        self.positions = {name: position for position, name in enumerate(names)}

    def __call__(self, label: Any) -> int:
        """Position of one entry."""
        if torch.is_tensor(label):
            label = label.item()
        if self.class_label is not None and label is not None:
            label = self.class_label.int2str(int(label))
        return self.positions.get(str(label), -1)


class ColumnCollator:
    """Calls the user's collator without the domain column, where the Trainer leaves all columns in the dataset."""

    def __init__(self, collator: Callable[[list], Any], domain_column: str) -> None:
        self.collator = collator
        self.domain_column = domain_column

    def __call__(self, features: list[Any]) -> Any:
        """Collate a list of examples."""
        return self.collator([_without(feature, self.domain_column) for feature in features])


def _without(feature: Any, column: str) -> Any:
    return {k: v for k, v in feature.items() if k != column} if isinstance(feature, Mapping) else feature


class DomainCollator(SeededCollator):
    """
    Calls the user's collator without the domain column and hands the domains on beside its batch, as `domain_ids` of
    shape `(batch_size,)`, -1 for a domain that is not a training domain.
    """

    def __init__(
        self,
        collator: Callable[[list], Mapping[str, Any]],
        domain_column: str,
        domain_of_label: DomainLookup,
        *,
        seed: int | None,
    ) -> None:
        super().__init__(collator, seed=seed)
        self.domain_column = domain_column
        self.domain_of_label = domain_of_label

    def __call__(self, features: list[dict[str, Any]], seed: int | None = None) -> dict[str, Any]:
        """Collate a list of examples."""
        domains = [self.domain_of_label(feature.get(self.domain_column)) for feature in features]
        features = [{k: v for k, v in feature.items() if k != self.domain_column} for feature in features]
        return {**super().__call__(features, seed), DOMAIN_IDS: torch.tensor(domains)}


class SwitchedDomainCollator(DomainCollator):
    """
    Hands the domains on only while `is_on`, for one that other loaders share; seeds nothing.

    Args:
        collator (`Callable`), domain_column (`str`), domain_of_label ([`DomainLookup`]): As for [`DomainCollator`].
        keeps_column (`bool`): Whether the collator gets the domain column, as it does where the Trainer leaves all columns.
    """

    def __init__(
        self,
        collator: Callable[[list], Mapping[str, Any]],
        domain_column: str,
        domain_of_label: DomainLookup,
        *,
        keeps_column: bool,
    ) -> None:
        super().__init__(collator, domain_column, domain_of_label, seed=None)
        self.keeps_column = keeps_column
        self.is_on = False

    def __call__(self, features: list[dict[str, Any]], seed: int | None = None) -> Any:
        """Collate a list of examples."""
        domains = [self.domain_of_label(feature.get(self.domain_column)) for feature in features] if self.is_on else []
        if not self.keeps_column:
            features = [_without(feature, self.domain_column) for feature in features]
        batch = self.collator(features)
        if not self.is_on:
            return batch
        return {**batch, **lengths_in_line(features, batch), DOMAIN_IDS: torch.tensor(domains)}
