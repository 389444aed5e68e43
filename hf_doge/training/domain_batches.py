"""Which examples a step looks at beside those it trains on."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import ceil, isfinite
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_doge.sampling.domains import DomainIndex, merge_domains
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.training.provenance import describe_domains

TARGET_COLUMN = "__target__"  # not a name that a user's collator reads


class DomainBatches:
    """
    The same number of examples of every domain for each step, without replacement until a domain is exhausted. Which
    ones is a function of seed and step alone, so a resumed run reads what the uninterrupted one reads.

    Args:
        dataset (`datasets.Dataset`): All domains' rows. One of the same domains may be set later.
        domains (`DomainIndex`): Which row is of which domain.
        examples_per_domain (`int`): Examples of each domain in a step, on all processes together.
        batch_size (`int`): Most examples in one forward.
        seed (`int`): Seed of the order.
    """

    def __init__(
        self, dataset: Dataset, domains: DomainIndex, *, examples_per_domain: int, batch_size: int, seed: int
    ) -> None:
        self.dataset = dataset
        self._domains = domains
        self.plan(examples_per_domain=examples_per_domain, batch_size=batch_size, seed=seed)

    def plan(self, *, examples_per_domain: int, batch_size: int, seed: int) -> None:
        """Decide the examples of every step, as when this was made."""
        self._sampler = DomainWeightedSampler(self._domains, dict.fromkeys(self._domains.names, 1.0), seed=seed)
        self._examples_per_step = examples_per_domain * len(self._domains.names)
        self._batch_size = batch_size

    def batches(
        self,
        step: int,
        columns: Sequence[str] | None = None,
        *,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
        """
        Yield one process' share of the examples of one step in pieces, as a list of features and their domains, shape
        `(len(features),)`. The pieces are the same for any number of processes, which take turns, unless there are more
        processes than pieces: then the pieces are smaller.

        Args:
            step (`int`): Steps that looked before this one.
            columns (`Sequence[str]`, *optional*): Columns to keep; all when `None`.
            process_index (`int`), num_processes (`int`): Which share.
        """
        start = step * self._examples_per_step
        size = min(self._batch_size, ceil(self._examples_per_step / num_processes))
        for begin in range(start + process_index * size, start + self._examples_per_step, size * num_processes):
            end = min(begin + size, start + self._examples_per_step)
            rows = self._sampler.indices(begin, end).tolist()
            features = [
                {k: v for k, v in feature.items() if k != TARGET_COLUMN and (columns is None or k in columns)}
                for feature in self.dataset.__getitems__(rows)
            ]
            yield features, torch.from_numpy(self._sampler.domain_ids(begin, end))


class TargetBatches(DomainBatches):
    """
    [`DomainBatches`] of the targets.

    Args:
        target_dataset (`datasets.Dataset` or `Mapping[str, datasets.Dataset]`): One target, or several by name.
        target_weights (`Mapping[str, float]`, *optional*): How much each target counts, `>= 0`; all 1 by default.
        kwargs: As for [`DomainBatches`].
    """

    def __init__(
        self,
        target_dataset: Dataset | Mapping[str, Dataset],
        target_weights: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(target_dataset, Dataset):
            target_dataset = {"target": target_dataset}
        elif not isinstance(target_dataset, Mapping):
            raise ValueError(
                f"`target_dataset` must be a `datasets.Dataset` or a dict of them, but got {type(target_dataset).__name__}."
            )
        dataset, targets = merge_domains(target_dataset, TARGET_COLUMN)
        self.weights = _check_target_weights(target_weights, targets.names)
        super().__init__(dataset, targets, **kwargs)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of the content of each target, by name."""
        described = describe_domains(self.dataset, self._domains, domain_column=TARGET_COLUMN)
        return {name: facts["fingerprint"] for name, facts in described.items()}

    def describe(self) -> dict[str, dict[str, float]]:
        """Rows and weight of each target, by name."""
        sizes = zip(self._domains.names, self._domains.sizes.tolist(), strict=True)
        return {name: {"num_rows": size, "weight": self.weights[i]} for i, (name, size) in enumerate(sizes)}


def _check_target_weights(target_weights: Mapping[str, float] | None, names: tuple[str, ...]) -> dict[int, float]:
    """Weights by position; all 1 for `None`."""
    if target_weights is None:
        return dict.fromkeys(range(len(names)), 1.0)
    if not isinstance(target_weights, Mapping) or set(target_weights) != set(names):
        raise ValueError(f"`target_weights` must name the targets {list(names)}, but got {target_weights!r}.")
    bad = {name: w for name, w in target_weights.items() if not (isfinite(w) and w >= 0)}
    if bad or sum(target_weights.values()) == 0:
        raise ValueError(f"`target_weights` must be finite, >= 0 and not all 0, but got {dict(target_weights)}.")
    return {position: float(target_weights[name]) for position, name in enumerate(names)}
