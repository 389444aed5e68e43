"""Domains of the `datasets` library, drawn in given proportions into one dataset or one stream."""

import copy
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets.iterable_dataset import _BaseExamplesIterable

from hf_doge.checks import check_choice, check_count, check_names, check_seed, check_text
from hf_doge.sampling.domains import concatenate_domains, merge_domains, refuse_different_features, refuse_splits
from hf_doge.sampling.permutation import derive_key
from hf_doge.sampling.sampler import MOST_DRAWS, DomainWeightedSampler
from hf_doge.sampling.schedule import DRAW_MODES, DrawSchedule
from hf_doge.sampling.weights import refuse_empty_domains, to_shares

STOPPING_RULES = ("all_exhausted", "first_exhausted")
_CHUNK = 2**10  # draws looked up at a time
_STRIDE = 7919  # a prime, so that parts of a mixture keep out of step whatever the period of its domains

logger = logging.getLogger(__name__)


def interleave_domains(
    domains: Mapping[str, datasets.Dataset] | Mapping[str, datasets.IterableDataset],
    weights: Mapping[str, float] | Sequence[float] | Any,
    *,
    seed: int = 0,
    draw: str = "quota",
    num_samples: int | None = None,
    stopping: str | None = None,
    domain_column: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Mix domains in given proportions: datasets into a dataset, streams into a stream.

    The domain of each draw is that of [`DomainWeightedSampler`] with the same weights, `draw` and, for `"iid"`, seed.
    Domains of weight 0 are never read.

    Datasets: rows of a domain come shuffled by the seed, without replacement until the domain is exhausted, and then
    in a fresh shuffle. The result refers to the rows and copies none. A plain Trainer shuffles it once more: the
    proportions then hold over an epoch, and in a batch on average.

    Streams: examples of a domain come in the order of its stream, so shuffle the streams if that matters. An exhausted
    domain is restarted as in its next epoch, as if by `set_epoch`. The result is an ordinary `IterableDataset`:

    - `state_dict` and `load_state_dict` are exact where those of the streams are: nothing is read ahead, and resuming
      reads none of the examples before. What `datasets` does not keep, the content of shuffle buffers, is refilled.
    - With `DataLoader` workers, and over processes where it is split by shards, every worker mixes its own shards of
      each domain in the given proportions, each from another place of the schedule, so that they do not all draw the
      same domain at a time; the counts of a part then differ from its share by less than two. So `num_shards` is that
      of the domain with the fewest, `stopping` is decided by each part for itself, and `num_samples` is divided among
      them: let it be a multiple of the global batch, or larger than the training needs.

    On several processes, accelerate (and so the Trainer) reads a stream in one of three ways. No example reaches two
    processes in any of them:

    - by default (`dispatch_batches=None` or `True`) the main process reads for all and sends each its part;
    - with `dispatch_batches=False`, and `num_shards` at least the number of processes, each reads shards of its own
      (accelerate 1.14 or newer): the way to choose if reading is slow, best where every domain has a multiple of as
      many shards as there are processes and workers;
    - with `dispatch_batches=False` and fewer shards, or with `split_batches=True` besides, every process reads
      everything and keeps its part. That is as much reading again as there are processes; it is warned of.

    Args:
        domains (mapping of `str` to `datasets.Dataset` or `datasets.IterableDataset`):
            One dataset or one stream per domain, all with the same features.
        weights (mapping of `str` to `float`, object whose `mean` is one, such as `DomainWeights`, or sequence):
            Finite, `>= 0`, not all 0, in any scale. A sequence follows the order of `domains`.
        seed (`int`, *optional*, defaults to 0):
            Of the `"iid"` draws and of the order inside datasets.
        draw (`str`, *optional*, defaults to `"quota"`):
            `"quota"` or `"iid"`; see [`DomainWeightedSampler`].
        num_samples (`int`, *optional*):
            Examples of the result, `> 0`. Defaults to the number of rows of all datasets; a stream ends by `stopping`.
        stopping (`str`, *optional*):
            Only for streams without `num_samples`. `"all_exhausted"` (default): end when a draw finds its domain at
            its end and all others have been there, so that every example is seen. `"first_exhausted"`: end when the
            first draw finds its domain at its end, so that no example is repeated.
        domain_column (`str`, *optional*):
            Add the domain in this column, as a `ClassLabel` to a dataset and by name to a stream.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`.

    Raises:
        `ValueError`: for bad weights, no domain, features that differ, or a domain with positive weight and no
        example; with streams, the last is known only when the domain is read.
        `TypeError`: for datasets and streams in one dict.
    """
    if not isinstance(domains, Mapping):
        raise TypeError(f"Domains must be a dict from name to dataset, but got {type(domains).__name__}.")
    if not domains:
        raise ValueError("There must be at least one domain, but got an empty dict.")
    refuse_splits(domains)
    num_samples = check_count("num_samples", num_samples, most=MOST_DRAWS, optional=True)
    seed = check_seed("seed", seed)
    check_choice("draw", draw, DRAW_MODES)
    check_choice("stopping", stopping, STOPPING_RULES, optional=True)
    check_text("domain_column", domain_column, what="the name of a column", optional=True)
    names = list(check_names(domains))
    shares = to_shares(weights, names)
    drawn = {name: domains[name] for name, share in zip(names, shares, strict=True) if share > 0}
    if all(isinstance(domain, datasets.Dataset) for domain in domains.values()):
        if stopping is not None:
            raise ValueError(f"`stopping` is for streams; the length of a dataset is `num_samples`. Got {stopping!r}.")
        sizes = np.array([len(dataset) for dataset in domains.values()])
        refuse_empty_domains(shares, sizes, names)
        merged, index = concatenate_domains(drawn) if domain_column is None else merge_domains(drawn, domain_column)
        num_samples = int(sizes.sum()) if num_samples is None else num_samples
        sampler = DomainWeightedSampler(index, shares[shares > 0], num_samples=num_samples, seed=seed, draw=draw)
        return merged.select(sampler.indices(0, num_samples))
    if not all(isinstance(domain, datasets.IterableDataset) for domain in domains.values()):
        kinds = {name: type(domain).__name__ for name, domain in domains.items()}
        raise TypeError(
            f"Domains must be all `datasets.Dataset` or all `datasets.IterableDataset`, but got {kinds}. Use "
            "`to_iterable_dataset()` on the former."
        )
    if num_samples is not None and stopping is not None:
        raise ValueError(
            f"Either `num_samples` or `stopping` ends a stream, but got {num_samples} and {stopping!r}. Drop one."
        )
    stopping = "all_exhausted" if stopping is None else stopping
    examples = _InterleavedExamples(
        drawn,
        shares[shares > 0],
        draw=draw,
        seed=seed,
        num_samples=num_samples,
        stopping=stopping,
        domain_column=domain_column,
    )
    return datasets.IterableDataset(examples, info=datasets.DatasetInfo(features=examples.features))


def holds_streams(domains: Any) -> bool:
    """Whether this is a mapping with a stream among its domains."""
    return isinstance(domains, Mapping) and any(isinstance(d, datasets.IterableDataset) for d in domains.values())


@functools.cache
def warn_that_all_processes_read_everything() -> None:
    """Warn on one process that would have no need to read this stream if it were split; once."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1 and os.environ.get("RANK") == "1":  # the main process reads where only one does
        logger.warning(
            f"Each of the {num_processes} processes reads the whole mixture to keep 1/{num_processes} of it, which is "
            f"{num_processes} times the reading. Give every domain at least {num_processes} shards (files, or "
            "`num_shards` of `to_iterable_dataset`) and leave `split_batches` off, or leave `dispatch_batches` on."
        )


class _InterleavedExamples(_BaseExamplesIterable):
    """What an `IterableDataset` iterates over: examples of several streams in the order of a schedule of draws."""

    is_typed = True

    def __init__(
        self,
        streams: Mapping[str, datasets.IterableDataset],
        shares: np.ndarray,
        *,
        draw: str,
        seed: int,
        num_samples: int | None,
        stopping: str,
        domain_column: str | None,
    ) -> None:
        super().__init__()
        self._names = list(streams)
        self._streams = list(streams.values())
        self._first_epochs = [stream.epoch for stream in self._streams]
        self._shares = shares
        self._draw = draw
        self._seed = seed
        self._num_samples = num_samples
        self._stopping = stopping
        self._domain_column = domain_column
        self._first_draw, self._stride = 0, _STRIDE
        self._is_part = False
        self._features = self._merge_features(streams)
        DrawSchedule(shares, draw=draw, seed=seed)  # refuses an unknown `draw` here rather than in a worker

    def _merge_features(self, streams: Mapping[str, datasets.IterableDataset]) -> datasets.Features | None:
        """The features of the examples, if all streams know theirs; none is read to find out."""
        features = {name: stream.features for name, stream in streams.items()}
        if None in features.values():
            return None
        refuse_different_features(features)
        merged = next(iter(features.values())).copy()
        if self._domain_column is not None:
            self._refuse_occupied_column(merged)
            merged[self._domain_column] = datasets.Value("string")
        return merged

    def _refuse_occupied_column(self, columns: Mapping[str, Any]) -> None:
        if self._domain_column in columns:
            raise ValueError(
                f"The streams get a column {self._domain_column!r}, but they have one already. Remove it or choose "
                "another `domain_column`."
            )

    @property
    def features(self) -> datasets.Features | None:
        return self._features

    @property
    def num_shards(self) -> int:
        return min(stream.num_shards for stream in self._streams)

    @property
    def sleep_on_threads_shutdown(self) -> bool:
        return any(stream._ex_iterable.sleep_on_threads_shutdown for stream in self._streams)

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict: dict[str, Any] = {
            "draw": 0,
            "passes": [0] * len(self._streams),
            "streams": [None] * len(self._streams),
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._state_dict is None:
            self._init_state_dict()
        state = self._state_dict
        schedule = DrawSchedule(self._shares, draw=self._draw, seed=self._seed)
        counts_before = schedule.counts(self._first_draw)
        readers: list[Iterator[tuple[Any, dict[str, Any]]] | None] = [None] * len(self._streams)
        num_chunks = 0
        while self._num_samples is None or state["draw"] < self._num_samples:
            start = state["draw"]
            stop = start + _CHUNK if self._num_samples is None else min(start + _CHUNK, self._num_samples)
            # Workers of a loader that the main process reads for all take a few batches too, and then wait for ever.
            if not self._is_part and (torch.utils.data.get_worker_info() is None or num_chunks > 0):
                warn_that_all_processes_read_everything()
            num_chunks += 1
            domain_ids, ranks = schedule.draws(self._first_draw + start, self._first_draw + stop)
            ranks = ranks - counts_before[domain_ids]
            for domain, rank in zip(domain_ids.tolist(), ranks.tolist(), strict=True):
                if readers[domain] is None:
                    readers[domain] = self._open(domain, state)
                found = next(readers[domain], None)
                if found is None:
                    if rank == 0:
                        raise ValueError(
                            f"Domains {[self._names[domain]]} have positive weight but no example. Drop them or set "
                            "their weight to 0."
                        )
                    if self._ends_at(domain, state["passes"]):
                        return
                    state["passes"][domain] += 1
                    state["streams"][domain] = None
                    readers[domain] = self._open(domain, state)
                    found = next(readers[domain], None)
                    if found is None:
                        raise ValueError(
                            f"A domain must have examples whenever it is restarted, but {self._names[domain]!r} had "
                            f"none in pass {state['passes'][domain]}. Make it from a function that starts again each "
                            "time, or end with `stopping='first_exhausted'`."
                        )
                state["draw"] += 1
                example = found[1]
                if self._domain_column is not None:
                    self._refuse_occupied_column(example)
                    example = {**example, self._domain_column: self._names[domain]}
                yield state["draw"] - 1, example

    def _ends_at(self, domain: int, passes: list[int]) -> bool:
        """Whether the stream ends, now that a draw found this domain at its end."""
        if self._num_samples is not None:
            return False
        others = (other for other in range(len(passes)) if other != domain)
        return self._stopping == "first_exhausted" or all(passes[other] > 0 for other in others)

    def _open(self, domain: int, state: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Read a domain in its current pass, from where the state says; the state follows the reading."""
        stream = self._streams[domain].shard(num_shards=1, index=0)  # a copy with an epoch of its own
        stream.set_epoch(self._first_epochs[domain] + state["passes"][domain])
        # `iter(stream)` would split the stream among DataLoader workers a second time.
        examples = stream._prepare_ex_iterable_for_iteration()
        if state["streams"][domain] is not None:
            examples.load_state_dict(state["streams"][domain])
        state["streams"][domain] = examples._state_dict
        return iter(examples)

    def shuffle_data_sources(self, generator: np.random.Generator) -> "_InterleavedExamples":
        """The same mixture over other epochs of the streams, and for `"iid"` of other draws."""
        shift = int(copy.deepcopy(generator).integers(2**31))
        shuffled = copy.copy(self)
        shuffled._first_epochs = [epoch + shift for epoch in self._first_epochs]
        shuffled._seed = derive_key(self._seed, "shuffle", shift)
        return shuffled

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "_InterleavedExamples":
        """The mixture of one shard of each stream, with its part of `num_samples` and its own place or draws."""
        num_shards = min(num_shards, self.num_shards)
        shard = copy.copy(self)
        if num_shards == 1:
            return shard
        shard._is_part = True
        if self._draw == "quota":
            # Processes split into workers: the strides of the two levels differ, so no two parts have one place.
            shard._first_draw = self._first_draw + index * self._stride
            shard._stride = self._stride * _STRIDE
        shard._streams = [
            stream.shard(num_shards=num_shards, index=index, contiguous=contiguous) for stream in self._streams
        ]
        shard._seed = derive_key(self._seed, "shard", num_shards, index)
        if self._num_samples is not None:
            shard._num_samples = self._num_samples // num_shards + (index < self._num_samples % num_shards)
        return shard

    def reshard_data_sources(self) -> "_InterleavedExamples":
        return self
