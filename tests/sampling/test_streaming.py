"""Interleaving domains of the `datasets` library: the mixture follows the weights, ends as told and resumes."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from datasets import Dataset, Features, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.sampling.streaming import interleave_domains

SIZES = {"wiki": 12, "code": 7, "arxiv": 5}
WEIGHTS = {"wiki": 0.5, "code": 0.3, "arxiv": 0.2}


def tables():
    return {name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(size)]}) for name, size in SIZES.items()}


TEXT = Features({"text": Value("string")})


def streams(**changes):
    return {**{name: table.to_iterable_dataset(num_shards=1) for name, table in tables().items()}, **changes}


def sized_tables():
    return zip(tables().items(), SIZES.values(), strict=True)


def texts(dataset):
    return [row["text"] for row in dataset]


def domains_of(dataset):
    return [text.split()[0] for text in texts(dataset)]


@pytest.mark.parametrize("draw", ["quota", "iid"])
def test_datasets_come_in_the_order_of_the_sampler(draw):
    mixed = interleave_domains(tables(), WEIGHTS, seed=3, draw=draw, num_samples=50)
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, seed=3, draw=draw, num_samples=50)
    rows = [f"{name} {i}" for name, size in SIZES.items() for i in range(size)]
    assert texts(mixed) == [rows[index] for index in sampler]


@pytest.mark.parametrize("draw", ["quota", "iid"])
def test_streams_draw_the_domains_that_datasets_draw(draw):
    stream = interleave_domains(streams(), WEIGHTS, seed=3, draw=draw, num_samples=50)
    table = interleave_domains(tables(), WEIGHTS, seed=3, draw=draw, num_samples=50)
    assert isinstance(stream, IterableDataset)
    assert isinstance(table, Dataset)
    assert domains_of(stream) == domains_of(table)


def test_a_stream_stays_within_one_example_of_its_weights():
    counts = Counter()
    for n, name in enumerate(domains_of(interleave_domains(streams(), WEIGHTS, num_samples=500)), start=1):
        counts[name] += 1
        assert all(abs(counts[name] - n * weight) < 1 for name, weight in WEIGHTS.items())
    assert counts.total() == 500


def test_a_domain_is_read_in_order_and_restarted_when_it_ends():
    mixed = texts(interleave_domains(streams(), WEIGHTS, num_samples=60))
    wiki = [text for text in mixed if text.startswith("wiki")]
    assert wiki == [f"wiki {i % 12}" for i in range(len(wiki))]


def test_all_exhausted_sees_every_example():
    assert set(texts(interleave_domains(streams(), WEIGHTS))) == {
        f"{n} {i}" for n, s in SIZES.items() for i in range(s)
    }


def test_first_exhausted_repeats_no_example():
    mixed = texts(interleave_domains(streams(), WEIGHTS, stopping="first_exhausted"))
    assert len(set(mixed)) == len(mixed)
    draws = domains_of(interleave_domains(streams(), WEIGHTS, num_samples=len(mixed) + 1))
    assert Counter(draws)[draws[-1]] == SIZES[draws[-1]] + 1  # the next draw would have been a repetition


def test_a_domain_of_weight_zero_is_never_read():
    def poison():
        raise AssertionError("read")
        yield

    mixed = interleave_domains(
        streams(arxiv=IterableDataset.from_generator(poison)), {"wiki": 0.5, "code": 0.5, "arxiv": 0}, num_samples=20
    )
    assert Counter(domains_of(mixed)) == {"wiki": 10, "code": 10}


def test_a_learned_artifact_can_be_mixed_with():
    assert len(texts(interleave_domains(streams(), DomainWeights(WEIGHTS), num_samples=11))) == 11


@pytest.mark.parametrize("position", [0, 1, 7, 29, 59])
def test_a_stream_resumes_with_the_next_example(position):
    whole = texts(interleave_domains(streams(), WEIGHTS, num_samples=60))
    stream = interleave_domains(streams(), WEIGHTS, num_samples=60)
    iterator = iter(stream)
    for _ in range(position):
        next(iterator)
    state = stream.state_dict()
    resumed = interleave_domains(streams(), WEIGHTS, num_samples=60)
    resumed.load_state_dict(state)
    assert texts(resumed) == whole[position:]


def test_the_domain_column_names_each_examples_domain():
    for source in (streams(), tables()):
        mixed = interleave_domains(source, WEIGHTS, num_samples=30, domain_column="domain")
        assert len(texts(mixed)) == 30
        for row in mixed:
            label = row["domain"]
            name = mixed.features["domain"].int2str(label) if isinstance(label, int) else label
            assert row["text"].startswith(name)


def test_a_shuffled_stream_restarts_in_the_order_of_its_next_epoch():
    sharded = {name: table.to_iterable_dataset(num_shards=size) for (name, table), size in sized_tables()}
    shuffled = {name: stream.shuffle(seed=0, buffer_size=1) for name, stream in sharded.items()}  # shards only
    mixed = interleave_domains(shuffled, WEIGHTS, num_samples=80)
    wiki = [text for text in texts(mixed) if text.startswith("wiki")]
    passes = [wiki[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(one) == sorted(f"wiki {i}" for i in range(12)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert texts(mixed) == texts(mixed)


@pytest.mark.parametrize("position", [3, 30, 55])
def test_a_stream_of_many_shards_resumes_in_the_pass_it_was_in(position):
    def make():
        sharded = {name: table.to_iterable_dataset(num_shards=size) for (name, table), size in sized_tables()}
        return interleave_domains(sharded, WEIGHTS, num_samples=80)

    whole, stream, resumed = texts(make()), make(), make()
    iterator = iter(stream)
    for _ in range(position):
        next(iterator)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert texts(resumed) == whole[position:]


def test_the_next_epoch_mixes_the_next_epochs_of_the_streams():
    sharded = {name: table.to_iterable_dataset(num_shards=size) for (name, table), size in sized_tables()}
    mixed = interleave_domains(
        {name: stream.shuffle(seed=0, buffer_size=1) for name, stream in sharded.items()}, WEIGHTS, num_samples=20
    ).shuffle(seed=0, buffer_size=1)
    first = texts(mixed)
    mixed.set_epoch(1)
    assert texts(mixed) != first
    assert domains_of(mixed) == [text.split()[0] for text in first]


def test_processes_read_different_shards_in_the_same_proportions():
    sharded = {name: table.to_iterable_dataset(num_shards=2) for name, table in tables().items()}
    mixed = interleave_domains(sharded, WEIGHTS, num_samples=20)
    parts = [texts(split_dataset_by_node(mixed, rank=rank, world_size=2)) for rank in range(2)]
    for part in parts:
        assert Counter(text.split()[0] for text in part) == {"wiki": 5, "code": 3, "arxiv": 2}
    assert not set(parts[0]) & set(parts[1])


def test_processes_draw_independently_of_each_other():
    sharded = {name: table.to_iterable_dataset(num_shards=2) for name, table in tables().items()}
    mixed = interleave_domains(sharded, WEIGHTS, num_samples=100, draw="iid")
    first, second = (domains_of(split_dataset_by_node(mixed, rank=rank, world_size=2)) for rank in range(2))
    assert first != second


def endless(shards):
    yield from ({"text": f"{shards[0]} {i}"} for i in range(10**6))


def endless_streams(names, num_shards):
    return {
        name: IterableDataset.from_generator(endless, gen_kwargs={"shards": [name] * num_shards}, features=TEXT)
        for name in names
    }


@pytest.mark.parametrize("num_processes", [2, 3, 4])
@pytest.mark.parametrize(
    "weights", [[0.5, 0.5], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.3, 0.2], [0.6, 0.25, 0.1, 0.05], [2**-0.5, 1 - 2**-0.5]]
)
def test_processes_draw_in_the_same_proportions_and_out_of_step(weights, num_processes):
    num_rows = 240
    mixed = interleave_domains(endless_streams("abcd"[: len(weights)], num_processes), weights)
    parts = [
        domains_of(split_dataset_by_node(mixed, rank=rank, world_size=num_processes).take(num_rows))
        for rank in range(num_processes)
    ]
    for part in parts:
        counts = Counter()
        for n, name in enumerate(part, start=1):
            counts[name] += 1
            assert all(abs(counts[name] - n * weight) < 2 for name, weight in zip("abcd", weights, strict=False))
    by_chance = sum(weight**2 for weight in weights)
    for first, second in pairwise(parts):
        equal = sum(one == other for one, other in zip(first, second, strict=True)) / num_rows
        assert equal < (1 + by_chance) / 2
    if len(set(weights)) == 1:  # plain turns: neighbours never meet
        assert not any(one == other for one, other in zip(*parts[:2], strict=True))


def test_workers_of_one_process_and_of_others_draw_out_of_step():
    mixed = interleave_domains(endless_streams("ab", 4), [0.5, 0.5])
    parts = [
        [
            domains_of(mixed.shard(num_shards=2, index=rank).shard(num_shards=2, index=worker).take(20))
            for worker in range(2)
        ]
        for rank in range(2)
    ]
    assert parts[0][0] != parts[0][1]  # two workers of a process
    assert parts[0][0] != parts[1][0]  # the workers that two processes read from at the same time
    assert parts[0][1] != parts[1][1]


@pytest.mark.parametrize("draw", ["quota", "iid"])
@pytest.mark.parametrize("position", [1, 7, 29])
def test_a_part_of_a_stream_resumes_with_the_next_example(draw, position):
    def make():
        sharded = {name: table.to_iterable_dataset(num_shards=2) for name, table in tables().items()}
        mixed = interleave_domains(sharded, WEIGHTS, num_samples=80, draw=draw)
        return split_dataset_by_node(mixed, rank=1, world_size=2)

    whole, stream, resumed = texts(make()), make(), make()
    iterator = iter(stream)
    for _ in range(position):
        next(iterator)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert texts(resumed) == whole[position:]


def test_a_mixture_is_an_ordinary_stream():
    mixed = interleave_domains(streams(), WEIGHTS, num_samples=20)
    shouted = mixed.map(lambda row: {"text": row["text"].upper()}).filter(lambda row: row["text"] != "WIKI 0").take(5)
    assert texts(shouted) == [text.upper() for text in texts(mixed)[1:6]]
    nested = interleave_domains({"mixed": mixed, "more": streams()["wiki"]}, [0.5, 0.5], num_samples=4)
    assert texts(nested) == [texts(mixed)[0], "wiki 0", texts(mixed)[1], "wiki 1"]


def test_streams_that_do_not_know_their_features_are_mixed_unread():
    def rows(name):
        yield from ({"text": f"{name} {i}"} for i in range(SIZES[name]))

    unknown = {name: IterableDataset.from_generator(rows, gen_kwargs={"name": name}) for name in SIZES}
    mixed = interleave_domains(unknown, WEIGHTS, num_samples=20)
    assert mixed.features is None
    assert texts(mixed) == texts(interleave_domains(streams(), WEIGHTS, num_samples=20))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_reads_every_draw_once(num_workers):
    sharded = {name: table.to_iterable_dataset(num_shards=2) for name, table in tables().items()}
    mixed = interleave_domains(sharded, WEIGHTS, num_samples=40)
    rows = [text for batch in DataLoader(mixed, batch_size=5, num_workers=num_workers) for text in batch["text"]]
    assert len(rows) == 40
    counts = Counter(text.split()[0] for text in rows)
    assert all(abs(counts[name] - 40 * weight) < 2 for name, weight in WEIGHTS.items())


@pytest.mark.parametrize(
    ("domains", "options", "error", "message"),
    [
        ({}, {}, ValueError, "at least one domain, but got an empty dict"),
        ({**streams(), "wiki": tables()["wiki"]}, {}, TypeError, "must be all `datasets.Dataset` or all"),
        (streams(), {"num_samples": 0}, ValueError, "`num_samples` must be at least 1, but got 0"),
        (
            streams(),
            {"num_samples": 5, "stopping": "first_exhausted"},
            ValueError,
            "Either `num_samples` or `stopping`",
        ),
        (streams(), {"stopping": "never"}, ValueError, "`stopping` must be one of"),
        (streams(), {"draw": "sometimes"}, ValueError, "sometimes"),
        (tables(), {"stopping": "all_exhausted"}, ValueError, "`stopping` is for streams"),
    ],
)
def test_bad_requests_are_refused(domains, options, error, message):
    weights = {name: WEIGHTS[name] for name in domains}
    with pytest.raises(error, match=message):
        interleave_domains(domains, weights, **options)


def test_an_empty_stream_with_weight_is_named_and_does_not_loop():
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match=r"Domains \['code'\] have positive weight but no example"):
        texts(interleave_domains(streams(code=empty), WEIGHTS, num_samples=10))


def test_a_stream_that_cannot_be_restarted_is_named_and_does_not_loop():
    once = iter([{"text": "code 0"}])
    with pytest.raises(ValueError, match="whenever it is restarted, but 'code' had none in pass 1"):
        texts(interleave_domains(streams(code=IterableDataset.from_generator(lambda: once)), WEIGHTS, num_samples=20))


@pytest.mark.parametrize("domains", [tables(), streams()])
def test_an_occupied_domain_column_is_refused(domains):
    with pytest.raises(ValueError, match="a column 'text', but they have one already"):
        interleave_domains(domains, WEIGHTS, domain_column="text")


def test_an_empty_dataset_is_named_if_it_has_weight_and_left_out_if_not():
    domains = {**tables(), "code": Dataset.from_dict({"text": []})}
    with pytest.raises(ValueError, match=r"Domains \['code'\] have positive weight but no example"):
        interleave_domains(domains, WEIGHTS)
    assert set(domains_of(interleave_domains(domains, {**WEIGHTS, "code": 0}))) == {"wiki", "arxiv"}


def test_weights_of_other_domains_are_refused():
    with pytest.raises(ValueError, match="books"):
        interleave_domains(streams(), {**WEIGHTS, "books": 0.1})


def test_features_that_differ_are_refused():
    other = {**tables(), "code": Dataset.from_dict({"content": ["x"]})}
    with pytest.raises(ValueError, match="code"):
        interleave_domains(other, WEIGHTS)
