"""Which rows of a dataset belong to which domain."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from hf_doge.checks import check_count, check_names, show
from hf_doge.sampling.ordering import stable_order
from hf_doge.sampling.transforms import with_own_transforms

if TYPE_CHECKING:
    import datasets

_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}


class DomainIndex:
    """
    Which dataset rows belong to which domain.

    Built with [`~DomainIndex.from_sizes`] or [`~DomainIndex.from_labels`]. Domains that are contiguous ranges of rows
    take O(num_domains) memory; others one row number per row.

    Attributes:
        names (`tuple[str, ...]`): Domain names, all different.
        sizes (`np.ndarray` of `int64` and shape `(num_domains,)`): Rows of each domain, `>= 0`.
    """

    def __init__(
        self, names: Sequence[str], sizes: np.ndarray, starts: np.ndarray, *, grouped_rows: np.ndarray | None = None
    ) -> None:
        names = check_names(names)
        if not sizes.any():
            raise ValueError(f"A dataset must have rows to draw from, but the domains {list(names)} have none.")
        self.names = names
        self.sizes = sizes
        self._starts = starts
        self._grouped_rows = grouped_rows

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int]) -> "DomainIndex":
        """
        Domains that lie one after the other, in the order of the mapping.

        Args:
            sizes (mapping of `str` to `int`): Rows of each domain, `>= 0`, not all 0.
        """
        rows = (check_count(f"size of domain {name!r}", size, least=0, most=2**62) for name, size in sizes.items())
        counts = np.fromiter(rows, dtype=np.int64, count=len(sizes))
        return cls(tuple(sizes), counts, np.cumsum(counts) - counts)

    @classmethod
    def from_labels(cls, labels: Sequence[str | int], *, names: Sequence[str] | None = None) -> "DomainIndex":
        """
        Domains given by one label per row, as in `dataset["domain"]`.

        Args:
            labels (sequence of `str` or `int`):
                A column of a `datasets.Dataset`, an array, a tensor or a list.
            names (sequence of `str`, *optional*):
                The domains in order: integer labels are positions in it, string labels are members of it. Defaults to
                the names of a `ClassLabel` column, or else to the labels that occur, sorted.

        Raises:
            `ValueError`: for no rows, rows without a label, or labels that are not in `names`.
            `TypeError`: for labels that are neither strings nor integers.
        """
        labels, column_names = _read_labels(labels)
        names = column_names if names is None else names
        if len(labels) == 0:
            raise ValueError("A dataset must have rows to draw from, but got no labels.")
        if labels.null_count:
            row = labels.is_null().to_numpy(zero_copy_only=False).argmax()
            raise ValueError(
                f"Every row needs a domain, but {labels.null_count} rows have none, the first of them row {row}. "
                "Filter them out or label them."
            )
        codes, found = labels.indices.to_numpy(), labels.dictionary.to_pylist()
        code_counts = np.bincount(codes, minlength=len(found))
        present = np.flatnonzero(code_counts)
        if names is None:
            domains = sorted(found[code] for code in present)
            names = [str(label) for label in domains]
        else:
            domains = range(len(names)) if pa.types.is_integer(labels.dictionary.type) else list(names)
        positions = {label: position for position, label in enumerate(domains)}
        unknown = sorted(found[code] for code in present if found[code] not in positions)
        if unknown:
            raise ValueError(f"Labels must belong to the domains {list(names)}, but got {unknown}.")
        domain_ids = np.array([positions[found[code]] for code in present])
        sizes, starts = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
        sizes[domain_ids] = code_counts[present]
        run_starts = np.append(0, np.flatnonzero(codes[1:] != codes[:-1]) + 1)
        if len(run_starts) == len(present):  # each domain is one run of rows
            starts[domain_ids[np.searchsorted(present, codes[run_starts])]] = run_starts
            return cls(names, sizes, starts)
        starts[domain_ids] = np.cumsum(sizes[domain_ids]) - sizes[domain_ids]
        rows = stable_order(codes, len(found))
        return cls(names, sizes, starts, grouped_rows=rows.astype(np.int32) if len(rows) <= 2**31 else rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DomainIndex):
            return NotImplemented
        return self.names == other.names and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("sizes", "_starts", "_grouped_rows")
        )

    __hash__ = None

    @property
    def num_rows(self) -> int:
        """Rows of all domains together."""
        return int(self.sizes.sum())

    def rows(self, domain_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """
        Find dataset rows.

        Args:
            domain_ids (`np.ndarray` of integers, shape `(N,)`): Positions in `names`.
            positions (`np.ndarray` of integers, shape `(N,)`): In `[0, sizes[domain])`, in dataset order.

        Returns:
            `np.ndarray` of `int64` and shape `(N,)`.
        """
        rows = self._starts[domain_ids] + positions
        return rows if self._grouped_rows is None else self._grouped_rows[rows].astype(np.int64)

    def fingerprint(self) -> str:
        """Digest of the names and of which rows belong to which."""
        digest = hashlib.blake2b(repr(self.names).encode(), digest_size=16)
        for part in (self.sizes, self._starts, self._grouped_rows):
            if part is not None:
                digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"DomainIndex({dict(zip(self.names, self.sizes.tolist(), strict=True))})"


@dataclass(frozen=True)
class StreamDomains:
    """
    What is known of the domains of streams before they are read: their names.

    Attributes:
        names (`tuple[str, ...]`): Domain names, all different.
        sizes (`None`): Rows of each domain; see [`DomainIndex`].
    """

    names: tuple[str, ...]
    sizes: None = None

    def __post_init__(self) -> None:
        check_names(self.names)


def merge_domains(
    train_dataset: "datasets.Dataset | Mapping[str, datasets.Dataset]", domain_column: str
) -> tuple["datasets.Dataset", DomainIndex]:
    """
    One dataset and the index of its domains, from either form in which users hold domains.

    Args:
        train_dataset (`datasets.Dataset`, or mapping of domain name to `datasets.Dataset`):
            One dataset with a `domain_column` of strings, integers or `ClassLabel`, which is returned as it is; or one
            dataset per domain, all with the same features, which are concatenated. What `with_transform` gave to any of
            these goes with its rows.
        domain_column (`str`):
            The column that tells the domain. Added, as a `ClassLabel`, to datasets given one per domain.

    Returns:
        `tuple[datasets.Dataset, DomainIndex]`

    Raises:
        `ValueError`: naming the missing or occupied column, the empty domain, or the domain whose features differ.
    """
    import datasets

    if isinstance(train_dataset, Mapping):
        refuse_splits(train_dataset)
        merged, index = concatenate_domains(train_dataset)
        if domain_column in merged.column_names:
            raise ValueError(
                f"Datasets given one per domain get a column {domain_column!r}, but they have one already. Remove it "
                "or choose another `domain_column`."
            )
        labels = np.repeat(np.arange(len(index.names)), index.sizes)
        feature = datasets.ClassLabel(names=list(index.names))
        labelled = merged.add_column(domain_column, pa.array(labels), feature=feature)
        return with_own_transforms(labelled, train_dataset, domain_column), index
    if domain_column not in train_dataset.column_names:
        raise ValueError(
            f"The dataset must have a column {domain_column!r} that tells the domain of each row, but its columns are "
            f"{train_dataset.column_names}. Set `domain_column`, or give one dataset per domain in a dict."
        )
    if len(train_dataset) == 0:
        raise ValueError("A dataset must have rows to draw from, but the one given is empty.")
    return train_dataset, DomainIndex.from_labels(train_dataset[domain_column])


def refuse_splits(domains: Mapping[str, object]) -> None:
    """Raise for what `load_dataset` returns without `split`, and for the same as a plain dict: test data is no domain."""
    import datasets

    words = {name: set(re.split(r"[^a-z]+", str(name).lower())) for name in domains}
    splits = [name for name, found in words.items() if found & _SPLITS]
    is_loaded = isinstance(domains, (datasets.DatasetDict, datasets.IterableDatasetDict))
    if splits and (is_loaded or ("train" in domains and len(splits) == len(domains) > 1)):
        raise ValueError(
            f"The entries of a dict of datasets are domains, but {splits} look like the splits of one dataset. Pass one "
            f"split, such as `dataset[{splits[0]!r}]`, with a column that tells the domain; if they are domains, rename them."
        )


def concatenate_domains(domains: "Mapping[str, datasets.Dataset]") -> tuple["datasets.Dataset", DomainIndex]:
    """The datasets of a mapping one after the other, without a domain column, and the index of their ranges."""
    import datasets

    if not domains:
        raise ValueError("There must be at least one domain, but got an empty dict.")
    others = {name: type(d).__name__ for name, d in domains.items() if not isinstance(d, datasets.Dataset)}
    if others:
        raise ValueError(
            f"Every domain must be a `datasets.Dataset`, but got {others}. Load them without `streaming=True`, or make "
            "them with `Dataset.from_list`."
        )
    empty = [name for name, dataset in domains.items() if len(dataset) == 0]
    if empty:
        raise ValueError(f"Every domain must have examples, but {empty} have none. Drop them.")
    refuse_different_features({name: dataset.features for name, dataset in domains.items()})
    merged = datasets.concatenate_datasets(list(domains.values()))
    return merged, DomainIndex.from_sizes({name: len(dataset) for name, dataset in domains.items()})


def refuse_different_features(features: "Mapping[str, datasets.Features]") -> None:
    """Raise if not all domains have the same columns of the same types, naming one that differs."""
    first_name, first = next(iter(features.items()))
    for name, other in features.items():
        if other != first:
            raise ValueError(
                f"All domains must have the same features, but {name!r} has {dict(other)} and {first_name!r} has "
                f"{dict(first)}. Cast or remove the columns that differ."
            )


def _read_labels(labels: Sequence[str | int]) -> tuple[pa.DictionaryArray, Sequence[str] | None]:
    """Labels as codes and the strings or integers they stand for, and the names of a `ClassLabel` column."""
    names, row_order = None, None
    if isinstance(labels, torch.Tensor):
        labels = labels.numpy()
    elif hasattr(labels, "to_numpy") and not isinstance(labels, (pa.Array, pa.ChunkedArray)):  # of pandas or polars
        labels = labels.to_numpy()
    if not isinstance(labels, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray)):
        if not hasattr(labels, "source") or not hasattr(labels, "features"):
            raise ValueError(
                f"Domain labels must be a column of a dataset, an array or a list, but got {show(labels)}. For sizes by"
                " domain, pass a dict."
            )
        labels, row_order, names = _read_column(labels)
    if not isinstance(labels, (pa.Array, pa.ChunkedArray)):
        try:
            labels = pa.array(labels)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise TypeError("Domain labels must be all strings or all integers, but got a mixture.") from error
    kind = labels.type
    if len(labels) and not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise TypeError(f"Domain labels must be strings or integers, but got {kind}.")
    labels = labels.dictionary_encode()
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.unify_dictionaries().combine_chunks()
    return labels if row_order is None else labels.take(row_order), names


def _read_column(
    column: "datasets.Column",
) -> tuple[Sequence | pa.ChunkedArray, pa.Array | None, Sequence[str] | None]:
    """The values of a dataset column as stored, the order of the rows in them, and the names of a `ClassLabel`."""
    import datasets

    names = column.features.names if isinstance(column.features, datasets.ClassLabel) else None
    if not isinstance(column.source, datasets.Dataset):  # a field of a nested column
        return column[:], None, names
    # Reading a shuffled dataset through its rows takes seconds per 100,000 rows; its table and its order do not.
    row_order = column.source._indices
    if row_order is not None:
        row_order = row_order.column(0).combine_chunks()
    return column.source.data.column(column.column_name), row_order, names
