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
from hf_doge.sampling.lengths import COLUMNS, count_example_tokens, count_row_tokens, lengthless
from hf_doge.sampling.permutation import derive_key
from hf_doge.sampling.phases import first_draw_of, read_phases
from hf_doge.sampling.sampler import MOST_DRAWS, DomainWeightedSampler
from hf_doge.sampling.schedule import DRAW_MODES, UNITS, DrawSchedule
from hf_doge.sampling.token_streams import TokenTurns
from hf_doge.sampling.transforms import refuse_lost_transforms
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
    unit: str = "examples",
    num_planned: int | None = None,
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
            Finite, `>= 0`, not all 0, in any scale. A sequence follows the order of `domains`. Or phases, such as
            `[(0, weights), (0.8, other_weights)]`: which weights hold from which part of `num_planned` on.
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
        unit (`str`, *optional*, defaults to `"examples"`):
            What weights are shares of. With `"tokens"` rows must be tokenised: the tokens of one are its `labels` that count, or
            its `input_ids`. A stream then gives the example of the domain whose tokens are due next, see
            [`~hf_doge.sampling.token_streams`]; each part that is read apart keeps the shares by itself.
        num_planned (`int`, *optional*):
            Examples that phases are parts of. `num_samples` by default.

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
    check_choice("unit", unit, UNITS)
    phases = [(fraction, to_shares(one, names)) for fraction, one in read_phases(weights)]
    is_drawn = np.any([shares > 0 for _, shares in phases], axis=0)
    drawn = {name: domains[name] for name, has_weight in zip(names, is_drawn, strict=True) if has_weight}
    phases = [(fraction, shares[is_drawn]) for fraction, shares in phases]
    if all(isinstance(domain, datasets.Dataset) for domain in domains.values()):
        if stopping is not None:
            raise ValueError(f"`stopping` is for streams; the length of a dataset is `num_samples`. Got {stopping!r}.")
        sizes = np.array([len(dataset) for dataset in domains.values()])
        refuse_empty_domains(is_drawn, sizes, names)
        num_samples = int(sizes.sum()) if num_samples is None else num_samples
        options = {"seed": seed, "draw": draw, "unit": unit, "num_epochs": (num_planned or num_samples) / num_samples}
        return _mix_datasets(drawn, phases, num_samples, domain_column, **options)
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
    num_planned = num_samples if num_planned is None else num_planned
    if len(phases) > 1 and num_planned is None:
        raise ValueError(
            "Phases begin at parts of a training, so `num_samples` or `num_planned` must say how many examples it has, but both "
            "are None. Set one."
        )
    if unit == "tokens" and draw == "iid":
        raise ValueError(
            "Independent draws need the mean length of each domain, which is not known of streams before they are read, so with "
            "`unit='tokens'` the draw must be 'quota', but got 'iid'."
        )
    examples = _InterleavedExamples(
        drawn,
        [(first_draw_of(fraction, num_planned=num_planned or 0), shares) for fraction, shares in phases],
        unit=unit,
        draw=draw,
        seed=seed,
        num_samples=num_samples,
        stopping=stopping,
        domain_column=domain_column,
    )
    return datasets.IterableDataset(examples, info=datasets.DatasetInfo(features=examples.features))


def _mix_datasets(
    drawn: Mapping[str, datasets.Dataset],
    phases: list[tuple[float, np.ndarray]],
    num_samples: int,
    domain_column: str | None,
    **options: Any,
) -> datasets.Dataset:
    """Rows of several datasets in the order of a sampler."""
    if domain_column is None:
        refuse_lost_transforms(drawn)
    merged, index = concatenate_domains(drawn) if domain_column is None else merge_domains(drawn, domain_column)
    lengths = count_row_tokens(merged) if options["unit"] == "tokens" else None
    sampler = DomainWeightedSampler(index, phases, num_samples=num_samples, lengths=lengths, **options)
    return merged.select(sampler.indices(0, num_samples))


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
        phases: list[tuple[int, np.ndarray]],
        *,
        unit: str,
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
        self._phases = phases  # from which draw of this part on which shares hold
        self._unit = unit
        self._draw = draw
        self._seed = seed
        self._num_samples = num_samples
        self._stopping = stopping
        self._domain_column = domain_column
        self._first_draw, self._stride = 0, _STRIDE
        self._is_part = False
        self._features = self._merge_features(streams)
        if unit == "tokens" and self._features is not None and not set(COLUMNS) & self._features.keys():
            raise lengthless(list(self._features))

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
        if self._unit == "tokens":
            self._state_dict["tokens"] = TokenTurns.start(len(self._streams))
        return self._state_dict

    def _schedule(self) -> DrawSchedule:
        """Of the draws of this part, counted from where it begins."""
        schedule = DrawSchedule(self._phases[0][1], draw=self._draw, seed=self._seed)
        for first_draw, shares in self._phases[1:]:
            schedule.append(self._first_draw + first_draw, shares)
        return schedule

    def _draws(self, state: dict[str, Any]) -> Iterator[tuple[int, int]]:
        """Domain of each draw from where the state says on, and how often this part has drawn it before."""
        if self._unit == "tokens":
            turns = TokenTurns(self._phases, self._names, state["tokens"])
            while self._num_samples is None or state["draw"] < self._num_samples:
                yield turns.next(state["draw"])
            return
        schedule = self._schedule()
        counts_before = schedule.counts(self._first_draw)
        while self._num_samples is None or state["draw"] < self._num_samples:
            start = state["draw"]
            stop = start + _CHUNK if self._num_samples is None else min(start + _CHUNK, self._num_samples)
            domain_ids, ranks = schedule.draws(self._first_draw + start, self._first_draw + stop)
            yield from zip(domain_ids.tolist(), (ranks - counts_before[domain_ids]).tolist(), strict=True)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._state_dict is None:
            self._init_state_dict()
        state = self._state_dict
        turns = TokenTurns(self._phases, self._names, state["tokens"]) if self._unit == "tokens" else None
        readers: list[Iterator[tuple[Any, dict[str, Any]]] | None] = [None] * len(self._streams)
        for number, (domain, rank) in enumerate(self._draws(state)):
            # Workers of a loader that the main process reads for all take a few batches too, and then wait for ever.
            if not self._is_part and number % _CHUNK == 0 and (not torch.utils.data.get_worker_info() or number > 0):
                warn_that_all_processes_read_everything()
            reader = readers[domain]
            if reader is None:
                reader = readers[domain] = self._open(domain, state)
            found = next(reader, None)
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
                reader = readers[domain] = self._open(domain, state)
                found = next(reader, None)
                if found is None:
                    raise ValueError(
                        f"A domain must have examples whenever it is restarted, but {self._names[domain]!r} had "
                        f"none in pass {state['passes'][domain]}. Make it from a function that starts again each "
                        "time, or end with `stopping='first_exhausted'`."
                    )
            state["draw"] += 1
            example = found[1]
            if turns is not None:
                turns.note(domain, count_example_tokens(example))
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
        shard._phases = [(-(-first_draw // num_shards), shares) for first_draw, shares in self._phases]
        if self._num_samples is not None:
            shard._num_samples = self._num_samples // num_shards + (index < self._num_samples % num_shards)
        return shard

    def reshard_data_sources(self) -> "_InterleavedExamples":
        return self
