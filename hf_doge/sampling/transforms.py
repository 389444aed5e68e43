"""The transforms that `with_transform` gave to the datasets of several domains, in the one dataset that these become."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


class DomainTransforms:
    """
    The transform of a dataset of several domains: every row goes through that of its own domain.

    A class rather than a closure, so that DataLoader workers can be spawned with it.

    Args:
        formats (mapping of `str` to mapping): The `format` of the dataset of each domain, in the order of the domains.
        domain_column (`str`): The column that tells the position of each row's domain. No transform sees it, and each
            row keeps it.
    """

    def __init__(self, formats: Mapping[str, Mapping[str, Any]], domain_column: str) -> None:
        self.names = tuple(formats)
        self.formats = tuple(dict(one) for one in formats.values())
        self.domain_column = domain_column

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, Any]:
        """
        Transform rows as they are stored, by column.

        Raises:
            `ValueError`: if the rows do not tell their domain, or do not have the same columns once they are transformed.
        """
        if self.domain_column not in batch:
            raise ValueError(
                f"Every row must keep its column {self.domain_column!r}, which tells whose transform it goes through, but the "
                f"columns are {list(batch)}. Keep it (a plain Trainer needs `remove_unused_columns=False`), or apply the "
                "transforms with `map` before the domains are mixed."
            )
        owners = np.asarray(batch[self.domain_column])
        transformed: dict[str, list] = {}
        first = self.names[owners[0]]
        for domain in dict.fromkeys(owners.tolist()):
            rows = np.flatnonzero(owners == domain).tolist()
            part = self._transform(domain, {name: [column[row] for row in rows] for name, column in batch.items()})
            if not transformed:
                transformed = {name: [None] * len(owners) for name in part}
            if part.keys() != transformed.keys():
                raise ValueError(
                    f"The rows of all domains must have the same columns once they are transformed, but those of "
                    f"{self.names[domain]!r} have {sorted(part)} and those of {first!r} {sorted(transformed)}. Let the "
                    "transforms return the same columns."
                )
            for name, values in part.items():
                for row, value in zip(rows, values, strict=True):
                    transformed[name][row] = value
        return transformed

    def _transform(self, domain: int, rows: dict[str, list]) -> dict[str, Any]:
        """Rows of one domain, with their domain; the values of one without a transform stay as they are stored."""
        given = self.formats[domain]
        labels = rows.pop(self.domain_column)
        shown = {name: column for name, column in rows.items() if given["columns"] is None or name in given["columns"]}
        rest = {name: column for name, column in rows.items() if name not in shown and given["output_all_columns"]}
        transform = given["format_kwargs"].get("transform")
        return {**(shown if transform is None else transform(shown)), **rest, self.domain_column: labels}


def with_own_transforms(
    merged: "datasets.Dataset", domains: "Mapping[str, datasets.Dataset]", domain_column: str
) -> "datasets.Dataset":
    """The rows of all domains, with their domain in a column, each transformed as its own domain's dataset says."""
    formats = {name: dataset.format for name, dataset in domains.items()}
    return merged.with_transform(DomainTransforms(formats, domain_column)) if have_transforms(domains) else merged


def have_transforms(domains: "Mapping[str, datasets.Dataset]") -> bool:
    """Whether any domain has a transform of its own."""
    return any(dataset.format["type"] == "custom" for dataset in domains.values())


def needs_domain_column(dataset: Any) -> bool:
    """Whether rows must keep their domain, by which they are transformed."""
    import datasets

    is_rows = isinstance(dataset, datasets.Dataset)
    return is_rows and isinstance(dataset.format["format_kwargs"].get("transform"), DomainTransforms)


def refuse_lost_transforms(domains: "Mapping[str, datasets.Dataset]") -> None:
    """Raise where rows do not tell their domain and domains have transforms that differ: `datasets` would drop them all."""
    formats = {name: dataset.format for name, dataset in domains.items()}
    first = next(iter(formats.values()))
    others = [name for name, one in formats.items() if one != first]
    if others and have_transforms(domains):
        raise ValueError(
            f"Rows must tell whose transform they go through, but there is no domain column, and the format of {others} is not "
            "that of the other domains. Set `domain_column`, or apply the transforms with `map` before."
        )
