"""Weights that are shares of tokens, and weights that change at parts of a training."""

import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from hf_doge.sampling.lengths import count_example_tokens, count_row_tokens
from hf_doge.sampling.phases import first_draw_of, read_phases
from hf_doge.sampling.sampler import DomainWeightedSampler
from hf_doge.sampling.streaming import interleave_domains

SIZES = {"short": 300, "long": 200, "mixed": 100}
WEIGHTS = {"short": 0.5, "long": 0.3, "mixed": 0.2}


def make_lengths(seed=0):
    """Tenfold: 10 tokens, 100, and anything between."""
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [generator.integers(8, 13, 300), generator.integers(80, 121, 200), generator.integers(10, 101, 100)]
    )


def make(weights=WEIGHTS, **options):
    options = {"unit": "tokens", "lengths": make_lengths(), "seed": 3, **options}
    return DomainWeightedSampler(SIZES, weights, **options)


def shares_of_tokens(sampler, start, stop):
    tokens = make_lengths()[sampler.indices(start, stop)]
    return np.bincount(sampler.domain_ids(start, stop), weights=tokens, minlength=3) / tokens.sum()


def test_shares_of_tokens_are_the_weights_and_those_of_examples_are_not():
    assert shares_of_tokens(make(), 0, 8000) == pytest.approx(list(WEIGHTS.values()), abs=2e-4)
    by_examples = make(unit="examples", lengths=None)
    assert abs(shares_of_tokens(by_examples, 0, 8000)[0] - 0.5) > 0.3


def test_tokens_of_a_domain_stay_within_the_longest_example_of_their_share():
    sampler, lengths = make(), make_lengths()
    tokens, domains = lengths[sampler.indices(0, 3000)], sampler.domain_ids(0, 3000)
    drawn = np.cumsum(np.eye(3, dtype=np.int64)[domains] * tokens[:, None], axis=0)
    expected = np.outer(drawn.sum(axis=1), list(WEIGHTS.values()))
    assert np.abs(drawn - expected).max() <= lengths.max()


def reference_draws(weights, rows_of, lengths, num_draws):
    """The plain rule: of the next examples of all domains, the one whose middle is due first."""
    tokens, ranks, drawn = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0), []
    for _ in range(num_draws):
        dues = {
            name: (tokens[name] + lengths[rows_of[name][ranks[name]]] / 2) / weight for name, weight in weights.items()
        }
        name = min(dues, key=dues.get)
        drawn.append(rows_of[name][ranks[name]])
        tokens[name] += lengths[drawn[-1]]
        ranks[name] += 1
    return drawn


def test_draws_are_those_of_the_plain_rule():
    sampler, lengths = make(), make_lengths()
    rows = sampler.indices(0, 2500)
    owners, names = sampler.domain_ids(0, 2500), list(SIZES)
    rows_of = {name: [*rows[owners == number].tolist(), 0] for number, name in enumerate(names)}
    assert rows.tolist() == reference_draws(WEIGHTS, rows_of, lengths, 2500)


@pytest.mark.parametrize("weights", [WEIGHTS, {"short": 0.98, "long": 0.0, "mixed": 0.02}, dict.fromkeys(SIZES, 1.0)])
def test_any_draw_is_reached_without_those_before(weights):
    whole = make(weights).indices(0, 60_000)
    counts = make(weights).domain_counts(60_000)
    for start in (1, 999, 20_000, 40_001, 59_990):
        assert make(weights).indices(start, start + 10).tolist() == whole[start : start + 10].tolist()
    assert list(counts.values()) == np.bincount(make(weights).domain_ids(0, 60_000), minlength=3).tolist()
    assert len(set(whole[:600].tolist()) & set(range(300))) == min(
        300, counts["short"], len(set(whole[:600]) & set(range(300)))
    )


def test_rows_without_a_token_come_with_the_others_and_end_nothing():
    lengths = np.array([0, 0, 5, 5, 0, 10])
    sampler = DomainWeightedSampler({"a": 4, "b": 2}, {"a": 0.5, "b": 0.5}, unit="tokens", lengths=lengths)
    assert np.bincount(sampler.indices(0, 600), minlength=6).tolist() == [100] * 6


def test_where_all_rows_are_as_long_the_units_are_one():
    lengths = np.full(600, 7)
    assert make(lengths=lengths).indices(0, 1000).tolist() == make(unit="examples").indices(0, 1000).tolist()


def test_independent_draws_have_their_share_of_the_tokens_on_average():
    assert shares_of_tokens(make(draw="iid"), 0, 40_000) == pytest.approx(list(WEIGHTS.values()), abs=0.01)


@pytest.mark.parametrize("stop", [1, 100, 599, 1500])
def test_draws_by_tokens_are_taken_up_where_they_were_left(stop):
    whole = list(make(num_samples=2000))
    sampler = make(num_samples=2000)
    iterator = iter(sampler)
    taken = [next(iterator) for _ in range(stop)]
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = make(num_samples=2000)
    resumed.load_state_dict(state)
    assert taken + list(resumed) == whole


def test_other_lengths_or_another_unit_are_another_stream():
    state = make().state_dict()
    with pytest.raises(ValueError, match="saved with `tokens`"):
        make(lengths=make_lengths(seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with `unit` 'tokens', but this sampler has 'examples'"):
        make(unit="examples", lengths=None).load_state_dict(state)
    assert make().fingerprint() != make(lengths=make_lengths(seed=1)).fingerprint()


def test_new_weights_pay_the_tokens_owed():
    sampler = make()
    sampler.set_weights({"short": 0.1, "long": 0.1, "mixed": 0.8}, first_draw=777)
    assert shares_of_tokens(sampler, 0, 777) == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert shares_of_tokens(sampler, 777, 6000) == pytest.approx([0.1, 0.1, 0.8], abs=1e-3)
    assert sampler.indices(700, 900).tolist() == sampler.indices(0, 900)[700:].tolist()


def test_no_domain_is_repeated_more_than_the_limit_by_tokens():
    sampler = make(num_samples=600, max_epochs_per_domain=1.2)
    counts = sampler.domain_counts(600)
    assert all(counts[name] <= 1.2 * size + 1 for name, size in SIZES.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": None}, "Weights in tokens need the tokens of each row, but `lengths` is None"),
        ({"lengths": [1, 2]}, "`lengths` must be one whole number of tokens, at least 0, for each of the 600 rows"),
        ({"lengths": np.full(600, -1)}, "`lengths` must be one whole number"),
        ({"lengths": np.full(600, 1.5)}, "`lengths` must be one whole number"),
        ({"lengths": np.repeat([0, 3], [300, 300])}, r"Domains \['short'\] have a share of the tokens, but no row"),
        ({"lengths": np.zeros(600, int)}, "have a share of the tokens, but no row"),
        ({"unit": "words"}, "`unit` must be one of"),
    ],
)
def test_bad_units_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# Phases

FIRST, THEN = {"short": 0.8, "long": 0.2, "mixed": 0.0}, {"short": 0.0, "long": 0.25, "mixed": 0.75}


@pytest.mark.parametrize("options", [{"unit": "examples", "lengths": None}, {}, {"draw": "iid"}])
def test_phases_are_the_weights_that_are_set_on_the_way(options):
    phased = make([(0, FIRST), (0.8, THEN)], num_samples=500, num_epochs=2, **options)
    changed = make(FIRST, num_samples=500, num_epochs=2, **options)
    changed.set_weights(THEN, first_draw=800)
    assert phased.indices(0, 1000).tolist() == changed.indices(0, 1000).tolist()
    assert phased.fingerprint() == changed.fingerprint()
    assert 2 not in phased.domain_ids(0, 800)
    assert 0 not in phased.domain_ids(800, 1000)


def test_phases_are_taken_up_where_they_were_left():
    options = {"num_samples": 1000, "unit": "examples", "lengths": None}
    phased, whole = make([(0, FIRST), (0.5, THEN)], **options), list(make([(0, FIRST), (0.5, THEN)], **options))
    for stop in (100, 499, 500, 700):
        state = json.loads(json.dumps({**phased.state_dict(), "position": stop}))
        resumed = make([(0, FIRST), (0.5, THEN)], **options)
        resumed.load_state_dict(state)
        assert list(resumed) == whole[stop:]


@pytest.mark.parametrize(
    ("fraction", "num_planned", "step_size", "first"),
    [
        (0.8, 1000, 8, 800),
        (0.7, 10, 1, 7),
        (0.3, 10, 1, 3),
        (0.5, 24, 8, 16),
        (0.0, 10, 4, 0),
        (0.25, 100, 7, 28),
    ],
)
def test_a_phase_begins_with_the_first_step_that_has_its_part_before_it(fraction, num_planned, step_size, first):
    assert first_draw_of(fraction, num_planned=num_planned, step_size=step_size) == first
    assert first % step_size == 0


@pytest.mark.parametrize("limit", [None, 2])
def test_a_last_phase_of_no_step_is_none(limit):
    options = {"num_samples": 20, "max_epochs_per_domain": limit}
    phases = [(0, [1, 1]), (0.96, [1, 0])]
    with_it = DomainWeightedSampler({"a": 10, "b": 10}, phases, **options)
    without = DomainWeightedSampler({"a": 10, "b": 10}, [1, 1], **options)
    assert with_it.indices(0, 20).tolist() == without.indices(0, 20).tolist()


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_rows_whose_labels_a_collator_has_yet_to_leave_out_are_not_counted(mask):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], mask: [0, 0, 1]}])
    with pytest.raises(ValueError, match=f"rows have .'{mask}'. and no `labels`"):
        count_row_tokens(rows)
    with pytest.raises(ValueError, match=f"rows have .'{mask}'. and no `labels`"):
        count_example_tokens(rows[0])
    assert count_row_tokens(rows.add_column("labels", [[-100, -100, 3]])).tolist() == [1]


@pytest.mark.parametrize("name", ["labels", "input_ids"])
def test_rows_with_several_tokens_at_a_position_are_not_counted(name):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], name: [[1, 2], [3, 4], [5, 6]]}])
    with pytest.raises(ValueError, match=f"rows whose `{name}` are one list of tokens, but they are lists of lists"):
        count_row_tokens(rows)
    with pytest.raises(ValueError, match=f"rows whose `{name}` are one list of tokens, but they are lists of lists"):
        count_example_tokens(rows[0])


def test_a_limit_on_epochs_counts_phase_by_phase():
    """A phase of a tenth may give a small domain all, and what it took is not there later."""
    options = {"unit": "examples", "lengths": None, "num_samples": 400, "max_epochs_per_domain": 1.0}
    phases = [(0, {"short": 0.0, "long": 0.0, "mixed": 1.0}), (0.2, {"short": 0.5, "long": 0.25, "mixed": 0.25})]
    sampler = make(phases, **options)
    assert sampler.domain_counts(80) == {"short": 0, "long": 0, "mixed": 80}
    assert sampler.domain_counts(400)["mixed"] <= 101


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([(0.1, FIRST), (0.8, THEN)], "The first phase must begin at 0, but begins at 0.1"),
        ([(0, FIRST), (0.8, THEN), (0.5, FIRST)], "Phases must be in the order in which they begin"),
        ([(0, FIRST), (0.5, THEN), (0.5, FIRST)], "Phases must be in the order in which they begin"),
        ([(-0.5, FIRST), (0.5, THEN)], "at least 0 and below 1, but got -0.5"),
        ([(0, FIRST), (1.0, THEN)], "at least 0 and below 1, but got 1.0"),
        ([(0, FIRST), (800, THEN)], "at least 0 and below 1, but got 800"),
        ([(0, FIRST), ("late", THEN)], "at least 0 and below 1, but got 'late'"),
        ([(0, FIRST, 3)], "Phases must be pairs"),
        ([(0, FIRST), (0.5, {"short": 1.0})], "Every domain of the data needs a weight"),
    ],
)
def test_bad_phases_are_refused(phases, message):
    with pytest.raises(ValueError, match=message):
        make(phases, unit="examples", lengths=None)


def test_weights_are_one_phase():
    assert read_phases(FIRST) == [(0.0, FIRST)]
    assert read_phases([0.5, 0.5]) == [(0.0, [0.5, 0.5])]


# Datasets and streams


def token_tables(column="input_ids"):
    lengths, starts = make_lengths(), {"short": 0, "long": 300, "mixed": 500}
    return {
        name: Dataset.from_dict({column: [[row] * lengths[row] for row in range(start, start + SIZES[name])]})
        for name, start in starts.items()
    }


def token_streams(num_shards=1):
    return {name: table.to_iterable_dataset(num_shards=num_shards) for name, table in token_tables().items()}


def shares_of(examples, column="input_ids"):
    tokens = np.zeros(3)
    for example in examples:
        row = example[column][0]
        tokens[0 if row < 300 else 1 if row < 500 else 2] += len(example[column])
    return tokens / tokens.sum()


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_datasets_are_mixed_by_tokens_in_the_order_of_the_sampler(column):
    mixed = interleave_domains(token_tables(column), WEIGHTS, unit="tokens", num_samples=2000, seed=3)
    assert [row[0] for row in mixed[column]] == make().indices(0, 2000).tolist()
    assert shares_of(mixed, column) == pytest.approx(list(WEIGHTS.values()), abs=0.002)


def test_streams_are_mixed_by_tokens_as_they_are_read():
    mixed = interleave_domains(token_streams(), WEIGHTS, unit="tokens", num_samples=4000)
    assert shares_of(mixed) == pytest.approx(list(WEIGHTS.values()), abs=0.002)
    assert shares_of(mixed.take(200)) == pytest.approx(list(WEIGHTS.values()), abs=0.03)


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_phases_of_streams_begin_where_they_are_due_and_are_taken_up_where_they_were_left(unit):
    mixed = interleave_domains(token_streams(), [(0, FIRST), (0.8, THEN)], unit=unit, num_samples=500)
    whole = [example["input_ids"] for example in mixed]
    assert all(ids[0] < 500 for ids in whole[:400])
    assert all(ids[0] >= 300 for ids in whole[400:])
    for stop in (7, 399, 400, 450):
        iterator = iter(mixed)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(mixed.state_dict()))
        resumed = interleave_domains(token_streams(), [(0, FIRST), (0.8, THEN)], unit=unit, num_samples=500)
        resumed.load_state_dict(state)
        assert [example["input_ids"] for example in resumed] == whole[stop:]


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_every_part_of_a_stream_keeps_weights_and_phases_by_itself(unit):
    options = {"unit": unit, "num_samples": 1000}
    mixed = interleave_domains(token_streams(num_shards=2), [(0, FIRST), (0.5, THEN)], **options)
    for part in range(2):
        rows = [example["input_ids"][0] for example in mixed.shard(2, part)]
        assert len(rows) == 500
        assert all(row < 500 for row in rows[:250])
        assert all(row >= 300 for row in rows[250:])


def test_phases_of_datasets_begin_where_they_are_due():
    mixed = interleave_domains(token_tables(), [(0, FIRST), (0.8, THEN)], num_samples=500)
    rows = [ids[0] for ids in mixed["input_ids"]]
    assert all(row < 500 for row in rows[:400])
    assert all(row >= 300 for row in rows[400:])


def test_an_end_of_a_stream_by_tokens_is_found():
    examples = list(interleave_domains(token_streams(), WEIGHTS, unit="tokens", stopping="first_exhausted"))
    assert len({example["input_ids"][0] for example in examples}) == len(examples)
    assert shares_of(examples) == pytest.approx(list(WEIGHTS.values()), abs=0.02)


def texts(streamed):
    table = Dataset.from_dict({"text": ["one two"] * 4})
    return {"a": table.to_iterable_dataset() if streamed else table}


@pytest.mark.parametrize(
    ("domains", "weights", "options", "message"),
    [
        (texts(False), {"a": 1.0}, {"unit": "tokens"}, r"whose tokens can be counted, .* the columns are \['text'\]"),
        (texts(True), {"a": 1.0}, {"unit": "tokens", "num_samples": 3}, "whose tokens can be counted"),
        (token_streams(), WEIGHTS, {"unit": "tokens", "draw": "iid"}, "the draw must be 'quota', but got 'iid'"),
        (token_streams(), [(0, FIRST), (0.5, THEN)], {}, "`num_samples` or `num_planned` must say"),
        (token_streams(), WEIGHTS, {"unit": "words"}, "`unit` must be one of"),
    ],
)
def test_bad_mixtures_are_refused(domains, weights, options, message):
    with pytest.raises(ValueError, match=message):
        interleave_domains(domains, weights, **options)


def test_a_stream_that_turns_out_to_have_no_tokens_is_named():
    untyped = IterableDataset.from_generator(lambda: iter([{"text": "one"}] * 3))
    with pytest.raises(ValueError, match=r"whose tokens can be counted, .* \['text'\]"):
        list(interleave_domains({"a": untyped}, {"a": 1.0}, unit="tokens", num_samples=3))
    empty = IterableDataset.from_generator(lambda: iter([{"input_ids": []}] * 3))
    with pytest.raises(ValueError, match="the first 1000 examples of 'a' have none"):
        list(interleave_domains({"a": empty}, {"a": 1.0}, unit="tokens", num_samples=1000))
    assert len(list(interleave_domains({"a": empty}, {"a": 1.0}, unit="tokens", num_samples=999))) == 999


@pytest.mark.parametrize("shift", [0, 1])
def test_row_tokens_are_the_labels_that_count_or_else_the_tokens(shift):
    labels = [[-100, 1, 2], [5], [], [-100, -100], [1, -100, 3, 4]]
    data = Dataset.from_dict({"labels": labels, "input_ids": [[1] * 9] * 5}).select([4, 0, 1, 2, 3])
    expected = [sum(label != -100 for label in labels[row][shift:]) for row in (4, 0, 1, 2, 3)]
    assert count_row_tokens(data, shift=shift).tolist() == expected
    assert count_row_tokens(data.remove_columns("labels"), shift=shift).tolist() == [9 - shift] * 5
