"""A power cut leaves the old or the new: what is moved into place is on the disk before, and all of it before it is told of."""

import os
from pathlib import Path

import pytest

from hf_doge import InfluenceIndex
from tests.artifacts.influence_rows import NUM_EXAMPLES, grow_index, random_rows, some, write_index
from tests.artifacts.test_domain_weights import make_weights


@pytest.fixture
def disk(monkeypatch):
    """The system calls that write through or rename, in their order, as `(call, inode, ...)`."""
    events = []

    def watch(name, describe):
        call = getattr(os, name)

        def watched(*arguments, **options):
            before = describe(*arguments)
            result = call(*arguments, **options)
            events.append((name, *before))
            return result

        monkeypatch.setattr(os, name, watched)

    def inode(path):
        return os.stat(path).st_ino

    def moved(source, target):
        files = [path for path in Path(source).rglob("*") if path.is_file()] if Path(source).is_dir() else [source]
        return inode(Path(target).parent), [inode(path) for path in files], str(target)

    watch("fsync", lambda descriptor: (os.fstat(descriptor).st_ino,))
    watch("replace", moved)
    watch("rename", moved)
    watch("mkdir", lambda path, *_: (inode(Path(path).parent), str(path)))
    return events


def assert_lasts(events, *manifests):
    """Contents last before they take their place, and all names before a manifest tells of them, and its own before others."""

    def synced(inode, first, last):
        return ("fsync", inode) in events[first:last]

    moves = [number for number, (name, *_) in enumerate(events) if name in ("replace", "rename")]
    ends = [number for number in moves if Path(events[number][3]).name in manifests]
    assert len(ends) >= len(manifests)
    for number, (name, folder, *facts) in enumerate(events):
        if name == "fsync":
            continue
        until = next((end for end in ends if end > number), len(events))
        if number in ends:
            until = next((move for move in moves if move > number), len(events))
        assert synced(folder, number, until), f"the name of {facts[-1]} was not written through"
        if number in moves:
            assert all(synced(inode, 0, number) for inode in facts[0]), f"the content of {facts[1]} was not"


@pytest.mark.parametrize("before", [None, {"with_trajectory": False}, {}])
def test_weights(tmp_path, disk, before):
    if before is not None:
        make_weights(0, **before).save_pretrained(tmp_path / "weights")
    disk.clear()
    make_weights(1).save_pretrained(tmp_path / "weights")
    assert_lasts(disk, "domain_weights.json")


def test_an_index_and_its_growth(tmp_path, disk):
    rows = random_rows(NUM_EXAMPLES)
    write_index(tmp_path / "index", some(rows, 0, 30))
    assert_lasts(disk, "config.json")
    disk.clear()
    grow_index(tmp_path / "index", rows)
    assert_lasts(disk, "config.json")


def test_a_copy_of_an_index(tmp_path, disk):
    write_index(tmp_path / "index", random_rows(NUM_EXAMPLES))
    for _ in range(2):
        disk.clear()
        InfluenceIndex.from_pretrained(tmp_path / "index").save_pretrained(tmp_path / "copy")
        assert_lasts(disk)
        assert disk[-1] == ("fsync", tmp_path.stat().st_ino)  # the folders have changed places
        files = [path for path in (tmp_path / "copy").rglob("*") if not path.name.startswith(".")]
        assert [path for path in files if ("fsync", path.stat().st_ino) not in disk] == []
