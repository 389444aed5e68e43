"""How far loaders run ahead, and the places in the stream that a training loop can name."""

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_doge.sampling.domains import DomainIndex
from hf_doge.sampling.prefetch import prefetch_lead
from hf_doge.sampling.sampler import DomainWeightedSampler

SIZES = {"wiki": 110, "code": 70, "arxiv": 50}
WEIGHTS = {"wiki": 0.5, "code": 0.3, "arxiv": 0.2}


def make(**options):
    return DomainWeightedSampler(SIZES, WEIGHTS, **{"seed": 3, **options})


@pytest.mark.parametrize(("num_workers", "prefetch_factor"), [(0, None), (2, None), (2, 3), (4, None)])
def test_a_loader_is_as_far_ahead_as_its_lead_says(num_workers, prefetch_factor):
    sampler, rows = make(), Dataset.from_dict({"row": list(range(230))})
    loader = DataLoader(rows, batch_size=4, sampler=sampler, num_workers=num_workers, prefetch_factor=prefetch_factor)
    leads = [sampler.next_draw - 4 * step for step, _ in zip(range(20), loader, strict=False)]
    # a plain loader lacks the one batch that accelerate takes to see the end coming
    assert max(leads) == prefetch_lead(4, num_workers=num_workers, prefetch_factor=prefetch_factor) - 4


@pytest.mark.parametrize("draw", [0, 1, 23, 24, 25, 100])
def test_a_sampler_sent_to_a_draw_goes_on_from_there_to_the_end_of_the_epoch(draw):
    sampler = make(num_samples=24)
    sampler.seek(draw)
    assert sampler.next_draw == draw
    end = (draw // 24 + 1) * 24
    assert list(sampler) == make(num_samples=24).indices(draw, end).tolist()
    assert sampler.next_draw == end


def test_the_epoch_sought_may_be_announced_and_another_begins_at_its_first_row():
    sampler = make(num_samples=24)
    sampler.seek(30)
    sampler.set_epoch(1)
    assert sampler.next_draw == 30
    sampler.set_epoch(2)
    assert sampler.next_draw == 48


def test_a_draw_before_the_first_is_refused():
    with pytest.raises(ValueError, match="`draw` must be at least 0, but got -1"):
        make().seek(-1)


def test_the_fingerprint_is_that_of_the_stream_and_not_of_the_place():
    sampler, other = make(), make()
    other.seek(17)
    assert sampler.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        make(seed=4),
        make(draw="iid"),
        make(num_samples=24),
        DomainWeightedSampler(SIZES, {**WEIGHTS, "wiki": 0.5 + 2**-53}, seed=3),
        DomainWeightedSampler({"wiki": 110, "arxiv": 50, "code": 70}, WEIGHTS, seed=3),
        DomainWeightedSampler({**SIZES, "code": 71}, WEIGHTS, seed=3, num_samples=230),
    ],
)
def test_another_stream_has_another_fingerprint(other):
    assert other.fingerprint() != make().fingerprint()


def test_weights_set_for_later_are_part_of_the_fingerprint():
    sampler = make()
    sampler.set_weights([1, 1, 1], first_draw=100)
    assert sampler.fingerprint() != make().fingerprint()


def test_rows_in_other_places_have_another_fingerprint():
    labels = ["a", "b", "a", "b"], ["a", "b", "b", "a"], ["a", "a", "b", "b"]
    assert len({DomainIndex.from_labels(one).fingerprint() for one in labels}) == 3
