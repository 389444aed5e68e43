"""A disk that is full while something is saved: told by what was not saved and what to do, and nothing already saved is lost."""

import resource
from contextlib import contextmanager

import pytest

from hf_doge import DomainWeights, InfluenceIndex
from hf_doge.files import write_atomically
from tests.artifacts.influence_rows import NUM_EXAMPLES, random_rows, write_index
from tests.artifacts.test_domain_weights import make_weights

SAID = r"What was there before is as it was\. Free some space, or choose another place, and .* again"


@contextmanager
def no_file_longer_than(size):
    """What a full disk does, to a process that may not fill one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_weights_that_the_disk_does_not_take_leave_those_before_and_no_half_file(tmp_path):
    old, new, folder = make_weights(seed=1), make_weights(seed=2), tmp_path / "weights"
    old.save_pretrained(folder)
    with no_file_longer_than(1000), pytest.raises(OSError, match=SAID) as told:
        new.save_pretrained(folder)
    assert str(folder) in str(told.value)
    assert DomainWeights.from_pretrained(folder).mean == old.mean
    assert hidden(folder) == []
    new.save_pretrained(folder)
    assert DomainWeights.from_pretrained(folder).mean == new.mean


@pytest.mark.parametrize("size", [100, 100_000])  # less than a buffer, and more
def test_a_file_that_the_disk_does_not_take_stays_as_it_was(tmp_path, size):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with no_file_longer_than(10), pytest.raises(OSError, match=SAID) as told:
        write_atomically(path, b"x" * size)
    assert str(path) in str(told.value)
    assert path.read_text() == "before"
    assert hidden(tmp_path) == []


def test_a_copy_of_an_index_and_its_map_that_the_disk_does_not_take_say_where(tmp_path):
    one = write_index(tmp_path / "one", random_rows(NUM_EXAMPLES))
    two = write_index(tmp_path / "two", random_rows(NUM_EXAMPLES, seed=1))
    index = InfluenceIndex.from_pretrained(one, cache_dir=tmp_path / "maps")
    with no_file_longer_than(1000), pytest.raises(OSError, match=SAID) as told:
        index.save_pretrained(two)
    assert str(two) in str(told.value)
    assert hidden(tmp_path) == []
    with (
        no_file_longer_than(1000),
        pytest.raises(OSError, match=r"memory map of the index .* Pass `cache_dir`") as told,
    ):
        index.reader.self_influence(0)
    assert str(tmp_path / "maps") in str(told.value)
    assert list((tmp_path / "maps").iterdir()) == []
    assert index.reader.self_influence(0).any()
