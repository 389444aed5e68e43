"""A batch is collated alike, whatever was drawn before it, wherever the collator keeps what it draws from."""

import copy
import functools
import pickle
import random
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DataCollatorForLanguageModeling

from hf_doge.sampling.collation import SeededCollator, differ, find_generators
from hf_doge.tracing.batches import SequentialBatches
from tests.tiny import tiny_tokenizer

SHARED = np.random.default_rng(0)
BATCH = [{"input_ids": [4, 5, 6, 7, 8, 9] * 8} for _ in range(4)]
OTHER = [{"input_ids": [9, 8, 7, 6, 5, 4] * 8}]


def draw_from_a_global(examples):
    return {"x": torch.from_numpy(SHARED.random(3))}


helpers = types.ModuleType("helpers")  # of a user
helpers.GENERATOR = np.random.default_rng(0)


def draw_from_another_module(examples):
    return {"x": torch.from_numpy(helpers.GENERATOR.random(3))}


def draw_from_libraries(examples):
    return {"x": torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])}


def draw_from_a_default(examples, generator=np.random.Generator(np.random.Philox(3))):  # noqa: B008
    return {"x": torch.from_numpy(generator.random(3))}


def draw_from_a_closure():
    generator = torch.Generator()
    return lambda examples: {"x": torch.rand(3, generator=generator)}


class Drawing:
    shared = random.Random(3)

    def __init__(self):
        self.parts = {"mask": [np.random.RandomState(4)]}

    def __call__(self, examples):
        return {"x": torch.tensor([self.shared.random(), self.parts["mask"][0].rand()])}


class Slotted:
    __slots__ = ("generator",)

    def __init__(self):
        self.generator = torch.Generator()

    def __call__(self, examples):
        return {"x": torch.rand(3, generator=self.generator)}


class Late:
    generator = None

    def __call__(self, examples):
        self.generator = self.generator or np.random.default_rng()
        return {"x": torch.from_numpy(self.generator.random(3))}


class Wrapping:
    def __init__(self, collator):
        self.wrapped = collator

    def collate(self, examples):
        return self.wrapped(examples)


def masking(**options):
    return DataCollatorForLanguageModeling(tiny_tokenizer(), mlm_probability=0.4, **options)


COLLATORS = {
    "libraries": lambda: draw_from_libraries,
    "global": lambda: draw_from_a_global,
    "another module": lambda: draw_from_another_module,
    "default": lambda: draw_from_a_default,
    "closure": draw_from_a_closure,
    "attributes": Drawing,
    "slots": Slotted,
    "made late": Late,
    "masking": masking,
    "masking with a seed": lambda: masking(seed=7),
    "wrapped": lambda: Wrapping(masking(seed=7)).collate,
    "partial": lambda: functools.partial(lambda examples, draw: draw(examples), draw=Drawing()),
}


@pytest.mark.parametrize("name", COLLATORS)
def test_a_batch_is_collated_alike_whatever_was_drawn_before(name):
    collator = SeededCollator(COLLATORS[name](), seed=0)
    first = collator(copy.deepcopy(BATCH))
    collator(copy.deepcopy(OTHER))
    torch.rand(1), np.random.rand(), random.random(), SHARED.random()
    again = SeededCollator(COLLATORS[name](), seed=0)
    again(copy.deepcopy(OTHER))
    assert not differ(first, collator(copy.deepcopy(BATCH)))
    assert not differ(first, again(copy.deepcopy(BATCH)))
    assert differ(first, SeededCollator(COLLATORS[name](), seed=1)(copy.deepcopy(BATCH)))


@pytest.mark.parametrize("name", COLLATORS)
def test_collating_leaves_no_trace_in_any_generator(name):
    held = COLLATORS[name]()
    collator = SeededCollator(held, seed=0)
    collator(copy.deepcopy(OTHER))  # what is made late is there

    def states():
        own = [getattr(g, "bit_generator", g) for g in find_generators(held)]
        own = [
            g.state if hasattr(g, "state") else getattr(g, "getstate", getattr(g, "get_state", None))() for g in own
        ]
        return repr((own, random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    before = states()
    collator(copy.deepcopy(BATCH))
    assert states() == before


def counting():
    count = [0]

    def collate(examples):
        count[0] += 1
        return {"x": torch.tensor(count)}

    return collate


def draw_from_the_system(examples):
    return {"x": torch.tensor(random.SystemRandom().random())}


@pytest.mark.parametrize("collator", [counting(), draw_from_the_system])
def test_a_random_state_that_cannot_be_seeded_is_told(collator):
    with pytest.warns(UserWarning, match="must collate a batch alike each time, but it draws from a random state"):
        SeededCollator(collator, seed=0)(BATCH)


def test_a_collator_without_chance_is_called_with_its_examples_and_nothing_is_told():
    def pad(examples):
        for example in examples:
            example["input_ids"] = torch.tensor(example["input_ids"])
        return {
            "input_ids": torch.stack([example["input_ids"] for example in examples]),
            "x": torch.tensor(float("nan")),
        }

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SeededCollator(pad, seed=0)(copy.deepcopy(BATCH))["input_ids"].shape == (4, 48)


def test_an_image_is_told_by_its_pixels_not_by_its_place_in_memory():
    def batch(colour):
        return [{"image": Image.new("RGB", (2, 2), colour), "row": object()}]

    collator = SeededCollator(draw_from_libraries, seed=0)
    first = collator(batch("red"))
    kept = [batch("red") for _ in range(5)]  # elsewhere in memory
    assert not any(differ(first, collator(one)) for one in kept)
    assert differ(first, collator(batch("blue")))


def test_a_seeded_collator_goes_to_spawned_workers_and_shows_what_it_wraps():
    collator = SeededCollator(masking(), seed=0)
    first = collator(copy.deepcopy(BATCH))
    assert collator.mlm_probability == 0.4
    assert not differ(first, pickle.loads(pickle.dumps(collator))(copy.deepcopy(BATCH)))


def test_recording_draws_alike_whether_or_not_training_has_drawn():
    collator = masking(seed=7)
    data = [{"input_ids": [n % 28 + 4] * 12} for n in range(6)]
    before = dict(SequentialBatches(data, collator, batch_size=3).between(0, 6))
    collator(copy.deepcopy(data))
    after = dict(SequentialBatches(data, collator, batch_size=3).between(0, 6))
    assert not any(differ(before[start], after[start]) for start in (0, 3))
    assert differ(before[0], before[3])


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64, 100, 1000])
@pytest.mark.parametrize("count", [1, 2, 32])
def test_some_examples_come_from_all_over_a_dataset(size, count):
    batches = SequentialBatches(range(size), lambda items: {"input_ids": torch.tensor([items]).T}, batch_size=8)
    seen = [one for batch in batches.some(count) for one in batch["input_ids"].flatten().tolist()]
    assert seen == sorted(set(seen))
    assert len(seen) == min(count, size)
    assert seen[0] == 0
    if len(seen) > 1:
        assert seen[-1] == size - 1
        assert np.diff(seen).max() - np.diff(seen).min() <= 1
