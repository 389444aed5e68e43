"""The laws of sampling, and what is refused."""

import io
import itertools
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset
from torch.utils.data import DataLoader, RandomSampler

from hf_doge.sampling.domains import DomainIndex
from hf_doge.sampling.iid import IIDDraws
from hf_doge.sampling.ordering import ranks_among_equals, stable_order
from hf_doge.sampling.permutation import derive_key, pass_keys, permute
from hf_doge.sampling.quota import QuotaDraws, balance_lag, round_two_ways
from hf_doge.sampling.sampler import DomainWeightedSampler
from tests.reference_sampling import capped_shares, earliest_deadline, largest_deficit, largest_difference

SIZES = {"wiki": 7, "code": 5, "arxiv": 11, "books": 3}
WEIGHTS = {"wiki": 0.5, "code": 0.3, "arxiv": 0.2, "books": 0.0}
DRAWS = ["quota", "iid"]


def domain_of_row(row):
    return next(name for name, end in zip(SIZES, itertools.accumulate(SIZES.values()), strict=True) if row < end)


def random_weights(seed):
    """Weights of many shapes: even, skewed, with zeros, with friendly fractions, with one or many tiny ones."""
    rng = np.random.default_rng(seed)
    num_domains = int(rng.integers(2, 30))
    weights = [
        rng.dirichlet(np.ones(num_domains)),
        rng.dirichlet(np.full(num_domains, 0.2)),
        np.append(1, rng.integers(0, 4, num_domains)),
        np.append([5, 3, 2], rng.integers(1, 3, num_domains)),
        np.append(rng.dirichlet(np.ones(num_domains)), 1e-4),
        np.append(rng.dirichlet(np.ones(num_domains)), np.full(5, 1e-4)),
    ][seed % 6].astype(float)
    return weights / weights.sum()


# Law 7: the stream is a function of (seed, weights, draw number)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_stream_does_not_depend_on_how_it_is_read(draw):
    whole = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=500, draw=draw).indices(0, 1500)
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=500, draw=draw)
    assert [*sampler, *sampler, *sampler] == whole.tolist()
    for start, stop in [(1499, 1500), (3, 3), (700, 1100), (0, 1), (512, 1024)]:
        fresh = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=500, draw=draw)
        assert fresh.indices(start, stop).tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("draw", DRAWS)
def test_a_jump_to_draw_n_equals_drawing_the_n_before(draw):
    weights = dict(zip(map(str, range(40)), random_weights(1), strict=False))
    sizes = {name: 1000 + 17 * number for number, name in enumerate(weights)}
    sampler = DomainWeightedSampler(sizes, weights, draw=draw)
    domains = np.concatenate([sampler.domain_ids(start, start + 30_000) for start in range(0, 300_000, 30_000)])
    rows = sampler.indices(0, 300_000)
    for jump in (1, 1023, 1024, 65_535, 65_536, 200_000, 262_144):
        fresh = DomainWeightedSampler(sizes, weights, draw=draw)
        assert fresh.indices(jump, jump + 50).tolist() == rows[jump : jump + 50].tolist()
        counts = np.bincount(domains[:jump], minlength=len(sizes))
        assert list(fresh.domain_counts(jump).values()) == counts.tolist()


@pytest.mark.parametrize("draw", DRAWS)
def test_far_jumps_are_quick_and_consistent(draw):
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, draw=draw)
    for far in (10**9, 3 * 10**10 + 7):
        before, after = sampler.domain_counts(far), sampler.domain_counts(far + 100)
        names = [list(SIZES)[number] for number in sampler.domain_ids(far, far + 100)]
        assert Counter(names) == {name: after[name] - before[name] for name in SIZES if after[name] > before[name]}


def test_every_process_has_the_same_stream():
    code = (
        "import hashlib\nfrom hf_doge import DomainWeightedSampler\n"
        "weights = {f'domain {i}': 1 / (i + 1) for i in range(60)}\n"
        "for draw in ('quota', 'iid'):\n"
        "    sampler = DomainWeightedSampler({name: 50 for name in weights}, weights, seed=3, draw=draw)\n"
        "    print(hashlib.sha256(sampler.indices(0, 10_000).tobytes()).hexdigest())\n"
        "print(hash('domain 1'))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    other = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    with redirect_stdout(io.StringIO()) as own:
        exec(code, {})
    *first, first_hash = own.getvalue().split()
    *second, second_hash = other.stdout.split()
    assert first_hash != second_hash
    assert first == second
    assert len(set(first)) == 2


def test_weights_with_keys_go_by_name_whatever_their_order():
    weights = pandas.Series({"b": 0.9, "a": 0.1})
    assert DomainWeightedSampler({"a": 10, "b": 10}, weights).effective_weights == pytest.approx({"a": 0.1, "b": 0.9})
    assert DomainWeightedSampler([0, 1, 0], {1: 0.75, 0: 0.25}).effective_weights == {"0": 0.25, "1": 0.75}


def test_huge_weights_do_not_overflow():
    assert DomainWeightedSampler({"a": 1, "b": 1}, {"a": 1e308, "b": 1e308}).effective_weights == {"a": 0.5, "b": 0.5}


def test_the_stream_is_the_same_in_later_versions():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, seed=1)
    assert sampler.indices(0, 12).tolist() == GOLDEN_QUOTA
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, seed=1, draw="iid")
    assert sampler.indices(0, 12).tolist() == GOLDEN_IID


GOLDEN_QUOTA = [6, 11, 4, 16, 3, 10, 2, 7, 0, 12, 5, 9]
GOLDEN_IID = [11, 10, 6, 7, 16, 9, 8, 8, 12, 4, 11, 3]


def test_the_seed_changes_the_rows():
    first, second = (DomainWeightedSampler(SIZES, WEIGHTS, seed=seed) for seed in (0, 1))
    assert (first.domain_ids(0, 100) == second.domain_ids(0, 100)).all()
    assert first.indices(0, 100).tolist() != second.indices(0, 100).tolist()
    first, second = (DomainWeightedSampler(SIZES, WEIGHTS, seed=seed, draw="iid") for seed in (0, 1))
    assert (first.domain_ids(0, 100) != second.domain_ids(0, 100)).any()


def test_a_domain_keeps_its_order_when_others_come_or_go():
    def rows_of_wiki(sampler):
        return [row for row in sampler.indices(0, 200).tolist() if row < SIZES["wiki"]][:14]

    alone = DomainWeightedSampler({"wiki": 7}, {"wiki": 1})
    assert rows_of_wiki(alone) == rows_of_wiki(DomainWeightedSampler(SIZES, WEIGHTS))


# Law 8: without replacement until exhausted, then a fresh shuffle


@pytest.mark.parametrize("draw", DRAWS)
def test_a_domain_is_exhausted_before_it_repeats_also_across_epochs(draw):
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=13, draw=draw)
    drawn = {name: [] for name in SIZES}
    for epoch in range(40):
        sampler.set_epoch(epoch)
        for row in sampler:
            drawn[domain_of_row(row)].append(row)
    start = 0
    for name, size in SIZES.items():
        passes = [tuple(drawn[name][i : i + size]) for i in range(0, len(drawn[name]) - size + 1, size)]
        assert all(sorted(rows) == list(range(start, start + size)) for rows in passes)
        assert len(set(passes)) >= 0.7 * len(passes)  # shuffled anew: passes are hardly ever alike
        start += size
    assert drawn["books"] == []


def test_a_domain_is_exhausted_before_it_repeats_also_when_weights_change():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=10_000)
    rng = np.random.default_rng(0)
    for first_draw in range(50, 3000, 50):
        sampler.set_weights(rng.dirichlet(np.ones(4)), first_draw=first_draw)
    rows = sampler.indices(0, 3000)
    for first, size in zip(np.cumsum([0, *SIZES.values()]), SIZES.values(), strict=False):
        mine = rows[(rows >= first) & (rows < first + size)]
        assert len(mine) >= 2 * size
        for chunk in mine[: len(mine) // size * size].reshape(-1, size):
            assert sorted(chunk) == list(range(first, first + size))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("zeros", [[0], [3], [0, 3], [1, 2]])
def test_a_weight_0_domain_is_never_drawn(draw, zeros):
    weights = np.array([0.3, 0.1, 0.4, 0.2])
    weights[zeros] = 0
    domains = DomainWeightedSampler(SIZES, weights, draw=draw).domain_ids(0, 5000)
    assert set(domains.tolist()) == set(range(4)) - set(zeros)


def test_interleaved_labels_are_drawn_like_contiguous_ranges():
    labels = np.random.default_rng(0).permutation(np.repeat(list(SIZES), list(SIZES.values())))
    mixed = DomainWeightedSampler(labels, WEIGHTS)
    names = sorted(SIZES)
    contiguous = DomainWeightedSampler({name: SIZES[name] for name in names}, WEIGHTS)
    rows = np.argsort(labels, kind="stable")
    assert mixed.indices(0, 200).tolist() == rows[contiguous.indices(0, 200)].tolist()


def test_a_permutation_is_a_bijection_for_every_size():
    for size in [*range(1, 70), 100, 255, 256, 257, 1000, 65_536, 65_537]:
        keys = np.full(size, derive_key("test", size), np.uint64)
        assert sorted(permute(np.arange(size), np.full(size, size), keys)) == list(range(size))


def test_a_permutation_is_in_range_for_huge_sizes_and_gives_distinct_values():
    for size in (10**9 + 7, 2**40 + 1, 2**62):
        positions = np.arange(size - 1000, size)
        shuffled = permute(positions, np.full(1000, size), np.full(1000, derive_key(size), np.uint64))
        assert len(set(shuffled.tolist())) == 1000
        assert shuffled.min() >= 0
        assert shuffled.max() < size
        assert np.ptp(shuffled.astype(float)) > 0.9 * size


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_order_of_a_small_domain_is_equally_likely(size):
    num_passes = 40_000
    keys = pass_keys(np.full(num_passes, derive_key(0), np.uint64), np.arange(num_passes))
    orders = permute(np.tile(np.arange(size), num_passes), np.full(size * num_passes, size), np.repeat(keys, size))
    counts = np.array(list(Counter(map(tuple, orders.reshape(-1, size).tolist())).values()))
    num_orders = len(list(itertools.permutations(range(size))))
    expected = num_passes / num_orders
    assert len(counts) == num_orders
    assert ((counts - expected) ** 2 / expected).sum() < num_orders + 5 * (2 * num_orders) ** 0.5


def test_neighbours_of_a_large_domain_land_independently():
    size, num_passes = 101, 30_000
    keys = pass_keys(np.full(num_passes, derive_key(0), np.uint64), np.arange(num_passes))
    first, second = (permute(np.full(num_passes, at), np.full(num_passes, size), keys) for at in (40, 41))
    for values in (first, second, (second - first) % size):
        counts = np.bincount(values, minlength=size)
        counts = counts[counts > 0]  # the difference is never 0
        expected = num_passes / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < size + 5 * (2 * size) ** 0.5


# Quota draws


@pytest.mark.parametrize("seed", range(36))
def test_quota_counts_are_off_by_less_than_one_at_every_draw(seed):
    weights = random_weights(seed)
    draws = QuotaDraws(weights, block=256)  # many blocks in few draws
    domains, ranks = draws.draws(0, 3000)
    counts = np.zeros((3001, len(weights)), int)
    counts[np.arange(1, 3001), domains] = 1
    counts = counts.cumsum(axis=0)
    difference = np.abs(counts - np.arange(3001)[:, None] * weights).max(axis=0)
    is_rare = weights * 256 < 2
    assert difference[~is_rare].max() < 1
    assert difference.max() < (1 if is_rare.sum() < 2 else 2)
    assert (ranks == counts[np.arange(3000), domains]).all()


def test_quota_counts_are_off_by_less_than_one_after_billions_of_draws():
    for weights in ([0.5, 0.3, 0.2], [1 / 7, 2 / 7, 4 / 7], random_weights(0), random_weights(6)):
        names = [str(number) for number in range(len(weights))]
        sampler = DomainWeightedSampler(dict.fromkeys(names, 10), dict(zip(names, weights, strict=True)))
        for draw in (10, 10**6, 10**9, 10**9 + 1, 2**33, 10**12):
            counts = np.array(list(sampler.domain_counts(draw).values()))
            assert np.abs(counts - draw * np.array(weights)).max() < 1
            assert counts.sum() == draw


@pytest.mark.parametrize("seed", range(12))
def test_quota_draws_are_those_of_the_plain_rule_up_to_the_first_boundary(seed):
    weights = random_weights(seed)
    weights = weights[weights >= 2 / 256]  # rarer ones share a slot
    weights /= weights.sum()
    expected = earliest_deadline(weights, 64)
    assert QuotaDraws(weights, block=256).draws(0, 64)[0].tolist() == expected
    assert largest_difference(expected, weights) < 1


def test_the_largest_deficit_rule_leaves_the_bound_with_many_domains():
    weights = np.array([1] * 32 + [26, 26, 27]) / 111
    assert largest_difference(largest_deficit(weights, 111), weights) > 1.29
    assert largest_difference(earliest_deadline(weights, 111), weights) < 1
    assert largest_difference(QuotaDraws(weights).draws(0, 111)[0], weights) < 1


def test_quota_jumps_are_consistent_across_boundaries():
    for seed in range(12):
        weights = random_weights(seed)
        domains, ranks = QuotaDraws(weights, block=256).draws(0, 2000)
        for start in (0, 63, 64, 255, 256, 700, 1791):
            fresh = QuotaDraws(weights, block=256)
            counts = fresh.counts(start)
            assert counts.tolist() == np.bincount(domains[:start], minlength=len(weights)).tolist()
            part = QuotaDraws(weights, block=256).draws(start, start + 200)
            assert (part[0] == domains[start : start + 200]).all()
            assert (part[1] == ranks[start : start + 200]).all()


def test_equal_weights_give_plain_turns():
    for zeros in (0, 1):
        names = [f"domain {number}" for number in range(7)]
        sampler = DomainWeightedSampler(
            dict.fromkeys(names, 3), {name: float(number >= zeros) for number, name in enumerate(names)}
        )
        turns = list(range(zeros, 7))
        for start in (0, 10**12 // len(turns) * len(turns)):
            assert sampler.domain_ids(start, start + 100).tolist() == list(
                itertools.islice(itertools.cycle(turns), 100)
            )


def test_tiny_domains_are_not_starved_by_frequent_changes_of_the_weights():
    sampler = DomainWeightedSampler({"big": 100, "tiny": 100}, {"big": 0.998, "tiny": 0.002})
    for first_draw in range(50, 10_000, 50):
        sampler.set_weights({"big": 0.998, "tiny": 0.002}, first_draw=first_draw)
    assert sampler.domain_counts(10_000) == {"big": 9980, "tiny": 20}


def test_changing_weights_carries_the_draws_owed_over():
    rng = np.random.default_rng(0)
    names = [str(number) for number in range(8)]
    sampler = DomainWeightedSampler(dict.fromkeys(names, 50), dict.fromkeys(names, 1))
    ideal, draw, weights = np.zeros(8), 0, np.full(8, 1 / 8)
    for _ in range(60):
        length = int(rng.integers(1, 40))
        ideal, draw = ideal + length * weights, draw + length
        counts = np.array(list(sampler.domain_counts(draw).values()))
        assert np.abs(counts - ideal).max() < 1.5
        weights = weights * rng.uniform(0.8, 1.25, 8)
        weights /= weights.sum()
        sampler.set_weights(weights, first_draw=draw)


def test_draws_owed_are_paid_only_by_domains_that_are_drawn():
    lag = balance_lag(np.array([0.5, -0.9, 3.0, -2.0]), np.array([0.0, 0.2, 0.5, 0.3]))
    assert lag[0] == 0
    assert abs(lag.sum()) < 1e-12
    assert (np.abs(lag) < 1).all()
    assert (np.sign(lag[1:]) == [-1, 1, -1]).all()


@pytest.mark.parametrize("pin_last", [None, True, False])
def test_rounding_two_ways_moves_every_prefix_sum_by_less_than_one(pin_last):
    rng = np.random.default_rng(0)
    one = 2**20
    for _ in range(50):
        size = int(rng.integers(2, 40))
        values = rng.integers(1, one, size)
        values[0] = (-values[1:].sum()) % one
        first, second = rng.permutation(size), rng.permutation(size)
        rounded = round_two_ways(values, first, second, one=one, pin_last=pin_last)
        assert set(rounded.tolist()) <= {0, 1}
        for order in (first, second):
            assert np.abs(np.cumsum((rounded * one - values)[order])).max() < one
        if pin_last is not None:
            assert rounded[-1] == pin_last


# Independent draws


def test_iid_draws_have_the_frequencies_of_the_weights():
    weights = random_weights(0)
    counts = np.bincount(IIDDraws(weights, key=5).draws(0, 400_000)[0], minlength=len(weights))
    expected = 400_000 * weights
    assert ((counts - expected) ** 2 / expected).sum() < len(weights) + 5 * (2 * len(weights)) ** 0.5


def test_iid_draws_are_independent_of_each_other():
    weights = np.array([0.5, 0.3, 0.2])
    expected = np.outer(weights, weights)
    places = [(0, 1), (4095, 4096), (7, 2**28), (2**29 - 1, 2**29)]
    pairs = np.zeros((len(places), 3, 3))
    for key in range(400):
        draws = IIDDraws(weights, key=derive_key(key))
        for number, (first, second) in enumerate(places):
            pairs[number, draws.draws(first, first + 1)[0], draws.draws(second, second + 1)[0]] += 1
    assert (((pairs - 400 * expected) ** 2 / (400 * expected)).sum(axis=(1, 2)) < 8 + 5 * 4).all()  # 8 degrees


def test_iid_counts_vary_as_much_as_independent_draws_at_every_scale():
    weights = random_weights(0)
    domains = IIDDraws(weights, key=1).draws(0, 2**19)[0]
    for length in (10, 1000, 4096, 16_384):
        blocks = domains[: len(domains) // length * length].reshape(-1, length)
        counts = np.stack([(blocks == domain).sum(axis=1) for domain in range(len(weights))])
        ratio = (counts.var(axis=1) / (length * weights * (1 - weights))).mean()
        assert abs(ratio - 1) < 5 * (2 / (len(blocks) * len(weights))) ** 0.5


def test_iid_counts_before_a_draw_add_up_to_it():
    draws = IIDDraws(random_weights(0), key=1)
    for draw in (0, 1, 4096, 10**6 + 3, 2**29, 2**31 + 12_345):
        assert draws.counts(draw).sum() == draw


def test_iid_draws_are_counted_from_the_first_one_on_wherever_one_begins():
    draws = IIDDraws(random_weights(0), key=1)
    domains, ranks = draws.draws(0, 10_000)
    seen = np.zeros(domains.max() + 1, np.int64)
    for domain, rank in zip(domains, ranks, strict=True):
        assert rank == seen[domain]
        seen[domain] += 1
    for start in (4000, 4096, 9000):
        assert np.array_equal(IIDDraws(random_weights(0), key=1).draws(start, 10_000)[1], ranks[start:])


@pytest.mark.parametrize("limit", [2**16, 2**16 + 1, 2**17, 2**18])
def test_more_domains_than_16_bits_tell_apart_are_in_order(limit):
    values = np.array([limit - 1, 0, 2**16 - 1, limit - 1, 1, 0])
    assert stable_order(values, limit).tolist() == sorted(range(len(values)), key=lambda place: values[place])
    assert ranks_among_equals(values, limit).tolist() == [
        values[:place].tolist().count(values[place]) for place in range(6)
    ]


# Law 9: memory and jumps


def test_a_billion_rows_take_no_memory_per_row():
    sizes = {f"domain {number}": 10**6 for number in range(1000)}
    sampler = DomainWeightedSampler(sizes, dict.fromkeys(sizes, 1.0))
    assert len(sampler) == 10**9
    rows = sampler.indices(10**9 - 1000, 10**9)
    assert sorted(rows // 10**6) == list(range(1000))
    largest = max(array.nbytes for array in vars(sampler.domains).values() if isinstance(array, np.ndarray))
    assert largest <= 8 * 1000


# Epochs, loaders and state


def test_epochs_are_windows_of_one_stream():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=10)
    sampler.set_epoch(3)
    assert list(sampler) == sampler.indices(30, 40).tolist()
    assert len(sampler) == 10


def test_a_loop_without_set_epoch_goes_on_with_the_stream():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=10)
    assert [*sampler, *sampler] == sampler.indices(0, 20).tolist()
    assert sampler.epoch == 2


def test_an_iteration_broken_off_starts_again():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=10)
    taken = list(itertools.islice(sampler, 4))
    assert list(sampler) == sampler.indices(0, 10).tolist()
    assert taken == sampler.indices(0, 4).tolist()


def test_num_samples_defaults_to_the_number_of_rows():
    assert len(DomainWeightedSampler(SIZES, WEIGHTS)) == sum(SIZES.values())


def test_a_data_loader_yields_our_order():
    dataset = Dataset.from_dict({"row": range(26)})
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=20)
    batches = [batch["row"].tolist() for batch in DataLoader(dataset, sampler=sampler, batch_size=6)]
    rows = sampler.indices(0, 20).tolist()
    assert batches == [rows[0:6], rows[6:12], rows[12:18], rows[18:20]]
    assert all(type(row) is int for row in sampler)


def test_accelerate_keeps_our_sampler_and_its_order():
    from accelerate import Accelerator

    dataset = Dataset.from_dict({"row": range(26)}).with_format("torch")
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=20)
    assert not isinstance(sampler, RandomSampler)
    loader = Accelerator(cpu=True).prepare(DataLoader(dataset, sampler=sampler, batch_size=4))
    assert loader.batch_sampler.sampler is sampler
    for epoch in range(3):
        loader.set_epoch(epoch)
        rows = torch.cat([batch["row"] for batch in loader]).tolist()
        assert rows == sampler.indices(20 * epoch, 20 * epoch + 20).tolist()


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("stop", [0, 1, 9, 10, 23])
def test_a_stream_resumed_from_its_state_is_the_one_not_interrupted(draw, stop):
    def make(weights=WEIGHTS):
        return DomainWeightedSampler(SIZES, weights, num_samples=10, seed=4, draw=draw)

    def rows_and_states(sampler):
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for number, row in enumerate(sampler, start=1):
                yield row, json.dumps(sampler.state_dict())
                if number == 7:
                    sampler.set_weights(dict.fromkeys(SIZES, 0.25 + epoch))

    whole, states = zip(*rows_and_states(make()), strict=True)
    resumed = make({"wiki": 0, "code": 0, "arxiv": 0, "books": 1})  # the weights of the state win
    state = json.loads(states[stop - 1] if stop else json.dumps(make().state_dict()))
    resumed.load_state_dict(state)
    resumed.set_epoch(stop // 10)
    rows = list(whole[:stop])
    for epoch in range(stop // 10, 3):
        if epoch > stop // 10:
            resumed.set_epoch(epoch)
        for row in resumed:
            rows.append(row)
            if len(rows) % 10 == 7:
                resumed.set_weights(dict.fromkeys(SIZES, 0.25 + epoch))
    assert rows == list(whole)


def test_set_epoch_to_the_loaded_epoch_keeps_the_position_once():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=10)
    state = {**sampler.state_dict(), "epoch": 2, "position": 6}
    stream = sampler.indices(0, 40).tolist()
    sampler.load_state_dict(state)
    sampler.set_epoch(2)
    assert list(sampler) == stream[26:30]
    assert list(sampler) == stream[30:40]
    sampler.load_state_dict(state)
    sampler.set_epoch(1)
    assert list(sampler) == stream[10:20]
    sampler.load_state_dict(state)
    next(iter(sampler))
    sampler.set_epoch(2)
    assert list(sampler) == stream[20:30]


def test_new_weights_begin_with_the_next_draw_and_leave_the_past_alone():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=1000)
    before = sampler.indices(0, 300).tolist()
    rows = iter(sampler)
    taken = [next(rows) for _ in range(300)]
    sampler.set_weights({"wiki": 0, "code": 0, "arxiv": 0, "books": 1})
    assert taken == before == sampler.indices(0, 300).tolist()
    assert {domain_of_row(row) for row in rows} == {"books"}
    assert sampler.effective_weights == {"wiki": 0, "code": 0, "arxiv": 0, "books": 1}


def test_new_weights_can_begin_later():
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=100)
    old = sampler.indices(0, 60).tolist()
    sampler.set_weights([0, 0, 0, 1], first_draw=60)
    sampler.set_weights([1, 0, 0, 0], first_draw=60)  # nothing is planned yet: the last word counts
    assert sampler.indices(0, 60).tolist() == old
    assert {domain_of_row(row) for row in sampler.indices(60, 100)} == {"wiki"}


@pytest.mark.parametrize(("taken", "first_draw", "earliest"), [(10, 9, 10), (0, 49, 50)])
def test_draws_handed_out_or_planned_keep_their_weights(taken, first_draw, earliest):
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, num_samples=100)
    rows = iter(sampler)
    for _ in range(taken):
        next(rows)
    if not taken:
        sampler.set_weights([0, 0, 0, 1], first_draw=50)
    with pytest.raises(ValueError, match=f"must be at least {earliest}, .* but got {first_draw}"):
        sampler.set_weights([1, 0, 0, 0], first_draw=first_draw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": {**SIZES, "web": 1}}, r"without \['web'\] and with \[\] besides"),
        ({"domains": {"wiki": 7, "code": 5, "arxiv": 11}}, r"without \[\] and with \['books'\] besides"),
        ({"domains": dict(reversed(SIZES.items()))}, "in another order"),
        ({"domains": {**SIZES, "code": 6}}, r"\(then, now\) are \{'code': \(6, 5\)\}"),
        ({"seed": 1}, "saved with `seed` 1, but this sampler has 0"),
        ({"draw": "iid"}, "saved with `draw` 'iid', but this sampler has 'quota'"),
        ({"num_samples": 5}, "saved with `num_samples` 5, but this sampler has 26"),
    ],
)
def test_a_state_of_another_stream_is_refused_by_name(change, message):
    sampler = DomainWeightedSampler(SIZES, WEIGHTS)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})


# Weights


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        dict(reversed(WEIGHTS.items())),
        {name: 40 * weight for name, weight in WEIGHTS.items()},
        list(WEIGHTS.values()),
        np.array(list(WEIGHTS.values())),
        torch.tensor(list(WEIGHTS.values()), dtype=torch.float64),
        SimpleNamespace(mean=WEIGHTS),
    ],
)
def test_weights_come_in_any_form_and_scale(weights):
    sampler = DomainWeightedSampler(SIZES, weights)
    assert sampler.effective_weights == pytest.approx(WEIGHTS)
    assert sampler.indices(0, 100).tolist() == DomainWeightedSampler(SIZES, WEIGHTS).indices(0, 100).tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({**WEIGHTS, "web": 1, "news": 0}, r"got weights for \['news', 'web'\]"),
        ({"wiki": 1, "code": 1}, r"\['arxiv', 'books'\] have none"),
        ({**WEIGHTS, "code": -1}, r"finite and not negative, but got \{'code': -1\}"),
        ({**WEIGHTS, "code": float("nan")}, r"finite and not negative, but got \{'code': nan\}"),
        ({**WEIGHTS, "code": float("inf")}, r"finite and not negative, but got \{'code': inf\}"),
        (dict.fromkeys(WEIGHTS, 0), "must be positive, but the weights of .*'books'.* are all 0"),
        ([0.5, 0.5], r"each of the 4 domains, but got weights of shape \(2,\)"),
        (0.5, r"each of the 4 domains, but got weights of shape \(\)"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        DomainWeightedSampler(SIZES, weights)
    with pytest.raises(ValueError, match=message):
        DomainWeightedSampler(SIZES, WEIGHTS).set_weights(weights)


def test_a_domain_with_positive_weight_and_no_example_is_named():
    message = r"Domains \['web', 'wiki'\] have positive weight but no example. Drop them or set their weight to 0."
    with pytest.raises(ValueError, match=message):
        DomainWeightedSampler({"web": 0, "code": 5, "wiki": 0}, {"web": 1, "code": 1, "wiki": 1})
    DomainWeightedSampler({"web": 0, "code": 5}, {"web": 0, "code": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draw": "random"}, r"`draw` must be one of \['quota', 'iid'\], but got 'random'"),
        ({"num_samples": 0}, "`num_samples` must be at least 1, but got 0"),
        ({"num_epochs": -1}, r"`num_epochs` must be in \(0, .*, but got -1"),
        ({"max_epochs_per_domain": 0}, "`max_epochs_per_domain` must be positive, but got 0"),
        ({"max_epochs_per_domain": float("nan")}, "`max_epochs_per_domain` must be positive, but got nan"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DomainWeightedSampler(SIZES, WEIGHTS, **arguments)


# Repetition


def test_no_domain_is_repeated_more_than_the_limit():
    sizes = {"wiki": 100, "code": 2000, "arxiv": 30, "books": 4000}
    weights = {"wiki": 0.5, "code": 0.2, "arxiv": 0.2, "books": 0.1}
    for max_epochs in (0.5, 1, 2.5, 10):
        sampler = DomainWeightedSampler(
            sizes, weights, num_samples=1000, num_epochs=2, max_epochs_per_domain=max_epochs
        )
        counts = sampler.domain_counts(2000)
        assert all(counts[name] < max_epochs * size + 1 for name, size in sizes.items())
        limits = [max_epochs * size / 2000 for size in sizes.values()]
        expected = capped_shares(list(weights.values()), limits)
        assert list(sampler.effective_weights.values()) == pytest.approx(expected, rel=1e-9)


def test_every_row_comes_exactly_once_when_the_limit_leaves_nothing_else():
    sampler = DomainWeightedSampler(SIZES, {"wiki": 9, "code": 1, "arxiv": 1, "books": 1}, max_epochs_per_domain=1)
    assert sorted(sampler) == list(range(26))


def test_a_limit_that_is_not_reached_changes_nothing(caplog):
    with caplog.at_level(logging.INFO, logger="hf_doge"):
        sampler = DomainWeightedSampler(SIZES, WEIGHTS, max_epochs_per_domain=4, num_epochs=0.5)
    assert sampler.effective_weights == DomainWeightedSampler(SIZES, WEIGHTS).effective_weights
    assert caplog.messages == []


def test_a_lowered_weight_is_logged_with_before_and_after(caplog):
    with caplog.at_level(logging.INFO, logger="hf_doge"):
        DomainWeightedSampler({"wiki": 10, "code": 90}, {"wiki": 0.5, "code": 0.5}, max_epochs_per_domain=2)
    assert caplog.messages == [
        "Domain 'wiki': weight lowered from 0.5 to 0.2 by `max_epochs_per_domain`.",
        "Domain 'code': weight raised from 0.5 to 0.8 in exchange.",
    ]


def test_new_weights_have_the_epochs_that_are_left():
    sampler = DomainWeightedSampler(
        {"wiki": 10, "code": 90}, {"wiki": 0.2, "code": 0.8}, num_samples=100, max_epochs_per_domain=2
    )
    sampler.set_weights({"wiki": 1, "code": 1}, first_draw=50)
    assert sampler.domain_counts(50)["wiki"] == 10
    assert sampler.effective_weights == pytest.approx({"wiki": 0.2, "code": 0.8})
    assert sampler.domain_counts(100)["wiki"] == 20


def test_a_limit_that_leaves_too_few_draws_is_refused():
    with pytest.raises(ValueError, match="room for 26 draws, but it allows 12 from the domains with positive weight"):
        DomainWeightedSampler(SIZES, {"wiki": 1, "code": 1, "arxiv": 0, "books": 0}, max_epochs_per_domain=1)
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, max_epochs_per_domain=4)
    with pytest.raises(ValueError, match=r"within the 26 planned draws, but got `first_draw` 26\. Raise `num_epochs`"):
        sampler.set_weights(WEIGHTS, first_draw=26)


def test_an_index_can_be_given_and_a_class_label_column_names_its_domains():
    dataset = Dataset.from_dict({"domain": [0, 1, 1, 0]}).cast_column("domain", ClassLabel(names=["wiki", "code"]))
    weights = {"code": 0.5, "wiki": 0.5}
    by_column = DomainWeightedSampler(dataset["domain"], weights)
    by_index = DomainWeightedSampler(DomainIndex.from_labels([0, 1, 1, 0], names=["wiki", "code"]), weights)
    assert list(by_column) == list(by_index)
