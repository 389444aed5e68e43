"""Several processes or threads save to one place: one whole artifact in the end, which each finds when its own call returns."""

import multiprocessing
import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from hf_doge import DomainWeights, InfluenceIndex, files
from hf_doge.artifacts.domain_weights import MANIFEST
from hf_doge.artifacts.influence import reader
from hf_doge.tracing.saved_index import copy_index
from tests.artifacts.influence_rows import random_rows, write_index
from tests.artifacts.test_domain_weights import make_weights

NUM_SAVERS, ROUNDS = 6, 3


@pytest.fixture(scope="module")
def indices(tmp_path_factory):
    """Two indices of other rows."""
    folder = tmp_path_factory.mktemp("indices")
    return [write_index(folder / str(seed), random_rows(40, seed=seed)) for seed in range(2)]


def open_index(folder, cache_dir):
    return InfluenceIndex.from_pretrained(folder, cache_dir=cache_dir)


def same_index(one, other):
    return (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def run_in_processes(work, folder):
    """`work(number)` in several processes at once, some times over; what went wrong, in words."""
    context = multiprocessing.get_context("fork")
    start, errors = context.Barrier(NUM_SAVERS), context.SimpleQueue()

    def run(number):
        for _ in range(ROUNDS):
            start.wait(60)
            try:
                work(number)
            except BaseException as error:
                errors.put(f"{type(error).__name__}: {error}")

    processes = [context.Process(target=run, args=(number,)) for number in range(NUM_SAVERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [errors.get() for _ in iter(errors.empty, True)]


def run_in_threads(work, folder):
    start, errors = threading.Barrier(NUM_SAVERS), []

    def run(number):
        for _ in range(ROUNDS):
            start.wait(60)
            try:
                work(number)
            except BaseException as error:
                errors.append(f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(NUM_SAVERS) as pool:
        list(pool.map(run, range(NUM_SAVERS)))
    return errors


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("together", [run_in_processes, run_in_threads])
@pytest.mark.parametrize("num_kinds", [1, 2], ids=["the same", "others"])
def test_weights_saved_by_many_at_once_are_whole_for_each(tmp_path, together, num_kinds):
    kinds = [make_weights(seed, with_trajectory=seed == 0) for seed in range(num_kinds)]

    def save(number):
        kinds[number % num_kinds].save_pretrained(tmp_path / "out" / "weights")
        assert DomainWeights.from_pretrained(tmp_path / "out" / "weights") in kinds

    assert together(save, tmp_path) == []
    assert DomainWeights.from_pretrained(tmp_path / "out" / "weights") in kinds
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("together", [run_in_processes, run_in_threads])
@pytest.mark.parametrize("num_kinds", [1, 2], ids=["the same", "others"])
def test_an_index_saved_by_many_at_once_is_whole_for_each(tmp_path, indices, together, num_kinds):
    opened = [open_index(folder, tmp_path / "maps") for folder in indices[:num_kinds]]

    def save(number):
        opened[number % num_kinds].save_pretrained(tmp_path / "out" / "index")
        open_index(tmp_path / "out" / "index", tmp_path / "maps")

    assert together(save, tmp_path) == []
    assert any(same_index(tmp_path / "out" / "index", folder) for folder in indices[:num_kinds])
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("together", [run_in_processes, run_in_threads])
def test_files_written_by_many_at_once_are_whole_for_each(tmp_path, together):
    contents = [bytes([number]) * 100_000 for number in range(NUM_SAVERS)]

    def write(number):
        files.write_atomically(tmp_path / "page.html", contents[number])
        assert (tmp_path / "page.html").read_bytes() in contents

    assert together(write, tmp_path) == []
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("together", [run_in_processes, run_in_threads])
def test_where_the_file_system_has_no_locks_the_same_weights_are_saved_by_many(tmp_path, together, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows, and some network file systems
    weights = make_weights()
    assert together(lambda number: weights.save_pretrained(tmp_path / "weights"), tmp_path) == []
    assert DomainWeights.from_pretrained(tmp_path / "weights") == weights


def test_without_locks_a_first_save_that_ends_while_another_looks_at_the_folder_is_no_stranger(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    weights, list_folder = make_weights(with_trajectory=False), files.Path.iterdir

    def list_as_the_other_save_ends(folder):
        monkeypatch.setattr(files.Path, "iterdir", list_folder)
        weights.save_pretrained(tmp_path)
        return folder.iterdir()

    monkeypatch.setattr(files.Path, "iterdir", list_as_the_other_save_ends)
    weights.save_pretrained(tmp_path)
    assert DomainWeights.from_pretrained(tmp_path) == weights


def test_without_locks_one_that_begins_to_save_the_same_leaves_what_another_has_saved_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    weights, write_out = make_weights(with_trajectory=False), files._write_out
    second = threading.Thread(target=weights.save_pretrained, args=(tmp_path,))
    opened, first_is_done = threading.Event(), threading.Event()

    def interleave(file, content):
        if threading.current_thread() is second and MANIFEST in file.name:
            opened.set()
            first_is_done.wait(60)
        write_out(file, content)
        if threading.current_thread() is not second and MANIFEST in file.name:
            second.start()  # between the first's staging and its moves
            assert opened.wait(60)

    monkeypatch.setattr(files, "_write_out", interleave)
    weights.save_pretrained(tmp_path)
    assert DomainWeights.from_pretrained(tmp_path) == weights  # while the second has its file open, yet empty
    first_is_done.set()
    second.join(60)
    assert DomainWeights.from_pretrained(tmp_path) == weights
    assert leftovers(tmp_path) == []


def test_a_plots_file_is_written_whole_by_many(tmp_path):
    pytest.importorskip("matplotlib")
    weights = make_weights(with_trajectory=False)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: weights.plot(tmp_path / "plot.png"), range(3)))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert leftovers(tmp_path) == []


# A reader next to a writer


def test_a_reader_next_to_a_writer_never_finds_a_mixture_of_weights(tmp_path):
    kinds = [make_weights(seed, with_trajectory=seed == 0) for seed in range(2)]
    kinds[0].save_pretrained(tmp_path)

    def work(number):
        if number < 2:
            kinds[number].save_pretrained(tmp_path)
        for _ in range(10):
            assert DomainWeights.from_pretrained(tmp_path) in kinds

    assert run_in_processes(work, tmp_path) == []


def test_a_reader_next_to_a_writer_always_finds_a_whole_index(tmp_path, indices):
    copy_index(indices[0], tmp_path / "index")

    def work(number):
        if number < 2:
            copy_index(indices[number], tmp_path / "index")
        else:
            for _ in range(5):
                open_index(tmp_path / "index", tmp_path / "maps")

    assert run_in_processes(work, tmp_path) == []


def test_what_is_altered_for_good_is_still_said_to_be(tmp_path):
    make_weights().save_pretrained(tmp_path)
    path = next((tmp_path / "weights").iterdir())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="altered or cut short"):
        DomainWeights.from_pretrained(tmp_path)


# Replacing a folder


@pytest.fixture(params=["in one step", "in two"])
def way_of_moving(request, monkeypatch):
    if request.param == "in two":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def test_a_kill_at_any_step_of_saving_over_an_index_leaves_the_old_or_the_new_one_whole(
    tmp_path, indices, monkeypatch
):
    """In one step, as Linux can: there is no moment with nothing in place."""
    assert files._exchange(*make_two_folders(tmp_path)), "this test is of a file system that can exchange"
    calls = []

    def counted(name, real):
        def call(*arguments, **options):
            if not any("maps" in str(argument) for argument in arguments):
                calls.append(name)
                if len(calls) == stop:
                    os._exit(9)
            return real(*arguments, **options)

        return call

    for number in range(1, 500):
        place, stop = tmp_path / str(number) / "index", number
        copy_index(indices[0], place)
        child = os.fork()
        if child == 0:
            for module, names in ((os, ("rename", "mkdir", "unlink", "rmdir")), (shutil, ("copyfile",))):
                for name in names:
                    setattr(module, name, counted(name, getattr(module, name)))
            files._exchange = counted("exchange", files._exchange)
            copy_index(indices[1], place)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        open_index(place, tmp_path / "maps")
        assert any(same_index(place, folder) for folder in indices)
        copy_index(indices[1], place)
        assert same_index(place, indices[1])
        assert leftovers(place.parent) == [], "the next save removes what the killed one has left"
        if ended == 0:
            break
    assert 10 < number < 499


def make_two_folders(folder):
    pair = [folder / "one", folder / "other"]
    for path in pair:
        path.mkdir()
    return pair


def test_a_folder_is_replaced_by_whatever_way_the_system_has(tmp_path, indices, way_of_moving):
    for source in (indices[0], indices[1], indices[1], indices[0]):
        copy_index(source, tmp_path / "index")
        assert same_index(tmp_path / "index", source)
        assert leftovers(tmp_path) == []


def test_a_copy_that_fails_leaves_the_old_index_and_nothing_else(tmp_path, indices, way_of_moving, monkeypatch):
    copy_index(indices[0], tmp_path / "index")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        copy_index(indices[1], tmp_path / "index")
    assert same_index(tmp_path / "index", indices[0])
    assert leftovers(tmp_path) == []


def test_an_index_that_is_replaced_while_it_is_copied_is_copied_whole(tmp_path, indices, monkeypatch):
    copy_index(indices[0], tmp_path / "source")
    real, copied = shutil.copyfile, []

    def copyfile(source, target):
        copied.append(source)
        if len(copied) == 4:
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "copyfile", real)
                copy_index(indices[1], tmp_path / "source")
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    copy_index(tmp_path / "source", tmp_path / "copy")
    open_index(tmp_path / "copy", tmp_path / "maps")
    assert same_index(tmp_path / "copy", indices[1])


# Modes


def modes(folder):
    return {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in [folder, *folder.rglob("*")]
        if not path.name.endswith(".lock")
    }


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(
    ("mask", "file_mode", "folder_mode"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755), (0o002, 0o664, 0o775)]
)
def test_modes_follow_the_umask_of_who_saves(tmp_path, indices, umask, mask, file_mode, folder_mode):
    from hf_doge.tracing.models import save_model
    from tests.tiny import tiny_gpt2

    source = tmp_path / "source"
    shutil.copytree(indices[0], source)
    save_model(tiny_gpt2(), source / "models" / "step-1")
    for path in source.rglob("*"):
        path.chmod(0o750 if path.is_dir() else 0o640)
    umask(mask)
    weights = make_weights()
    for name, save in {
        "weights": weights.save_pretrained,
        "weights again": weights.save_pretrained,
        "index": partial(copy_index, source),
        "recorded": lambda folder: write_index(folder, random_rows(40, seed=1)),
        "model": partial(save_model, tiny_gpt2()),
        "page": lambda folder: (folder.mkdir(), files.write_atomically(folder / "page.html", b"")),
    }.items():
        folder = tmp_path / name.split()[0]
        save(folder)
        found = modes(folder)
        assert {found[path] for path in found if (folder / path).is_dir()} == {folder_mode}, name
        assert {found[path] for path in found if not (folder / path).is_dir()} == {file_mode}, name


def test_an_index_that_is_replaced_by_another_and_back_while_it_is_read_is_read_again(tmp_path, indices, monkeypatch):
    place, check = tmp_path / "index", reader.check_files
    replacements = iter([1, 0, 1, 0])
    copy_index(indices[0], place)

    def replace_meanwhile(folder, checksums, *, verify):
        for number in (next(replacements, None), next(replacements, None)):
            if number is not None:
                copy_index(indices[number], place)
        if number is not None:
            raise FileNotFoundError("a file of the index that was there for a moment")
        check(folder, checksums, verify=verify)

    monkeypatch.setattr(reader, "check_files", replace_meanwhile)
    assert len(open_index(place, tmp_path / "maps")) == 40
