"""Two processes on the CPU record one index, that of one process; and what becomes of it if one of them fails."""

import json
import signal

import pytest
from transformers import BertForSequenceClassification

from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.settings import RecordingSettings
from tests.launch import REPOSITORY, launch, run_processes, start_without_launcher
from tests.tracing.recorded_training import assert_rows_are_autograd, classification_data, segments
from tests.tracing.recording_launched import MaskingCollator
from tests.tracing.test_tracing_callback_resume import RATES, SEGMENT, pad, resume

SCRIPT = REPOSITORY / "tests" / "tracing" / "recording_launched.py"


def told(folder):
    """What each process has to tell, None if it did not come to that."""
    paths = [folder / f"told-{rank}.json" for rank in (0, 1)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Several trainings that two processes record, in one start."""
    folder = tmp_path_factory.mktemp("together")
    run_processes(SCRIPT, folder, "together")
    return folder, told(folder)


def recorded_by_one(folder, *, collator=pad, steps=(2, 4, 6), rates=RATES, **options):
    """The index that this process alone makes of the checkpoints that two have trained."""
    index = folder / "by-one"
    record_dataset(
        index,
        [folder / "run" / f"checkpoint-{step}" for step in steps],
        classification_data(),
        collator=collator,
        settings=RecordingSettings(
            **{**{name: SEGMENT[name] for name in ("dtype", "max_segment_bytes", "layers")}, **options}
        ),
        learning_rates=rates,
        batch_size=SEGMENT["batch_size"],
        progress=False,
    )
    return IndexReader.open(index, cache_dir=folder / "cache")


def open_index(folder):
    return IndexReader.open(folder / "index", cache_dir=folder / "cache")


def gradient_files(folder):
    files = (folder / "gradients").rglob("*")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.is_file()}


def test_the_index_of_two_processes_is_that_of_one_to_the_byte(together):
    folder = together[0] / "whole"
    found, alone = open_index(folder), recorded_by_one(folder)
    assert gradient_files(found.folder) == gradient_files(alone.folder)
    assert len(segments(found)["checkpoint-2"]) == 4
    assert found.examples["content_hash"] == alone.examples["content_hash"]
    for one, other in zip(found.config["checkpoints"], alone.config["checkpoints"], strict=True):
        assert {**one, "path": None, "learning_rate": None} == {**other, "path": None, "learning_rate": None}
        assert one["learning_rate"] == pytest.approx(other["learning_rate"])
    for position, step in enumerate((2, 4, 6)):
        model = BertForSequenceClassification.from_pretrained(folder / "run" / f"checkpoint-{step}")
        assert_rows_are_autograd(found, position, model, classification_data())


def test_both_processes_record_about_half(together):
    _, (main, other) = together
    assert (main["whole"]["calls"], other["whole"]["calls"]) == (
        1 + 3 * 2,
        1 + 3 * 2,
    )  # a trial, then half of 4 batches


def test_scales_top_k_and_the_default_layers_do_not_depend_on_the_number_of_processes(together):
    folder = together[0] / "float16"
    options = {"dtype": "float16", "top_k_tokens": 2, "layers": "auto"}
    alone = recorded_by_one(folder, steps=(2,), rates=[0.005], **options)
    assert [one["name"] for one in alone.config["layers"]["modules"]] == ["classifier"]
    assert gradient_files(open_index(folder).folder) == gradient_files(alone.folder)


def test_the_moments_that_two_processes_saved_are_those_that_they_recorded_with(together):
    folder = together[0] / "moments"
    alone = recorded_by_one(folder, steps=(2,), rates=[0.005], metric="optimizer")
    assert gradient_files(open_index(folder).folder) == gradient_files(alone.folder)
    metrics = [[one["metric"] for one in index.config["checkpoints"]] for index in (open_index(folder), alone)]
    assert metrics[0] == metrics[1]
    assert metrics[0][0][0]["num_tokens"] > 0
    calls = [told["moments"]["calls"] for told in together[1]]
    assert calls == [1 + 2, 1 + 2]  # a trial and half of 4 batches


def test_two_processes_project_to_the_basis_that_the_main_one_has_fitted(together):
    folder = together[0] / "components"
    options = {"projection": "pca", "projection_width": 4, "metric": "optimizer"}
    alone = recorded_by_one(folder, steps=(2,), rates=[0.005], **options)
    assert gradient_files(open_index(folder).folder) == gradient_files(alone.folder)
    bases = [[one["basis"] for one in index.config["checkpoints"]] for index in (open_index(folder), alone)]
    assert bases[0] == bases[1]
    main, other = (told["components"]["calls"] for told in together[1])
    assert main >= 1 + 4 + 2  # a trial, all 4 batches for the basis, and its share of the rows
    assert other <= 1 + 2


def test_random_numbers_of_a_collator_do_not_depend_on_the_number_of_processes(together):
    folder = together[0] / "random"
    alone = recorded_by_one(folder, collator=MaskingCollator(), steps=(2,), rates=[0.005])
    assert gradient_files(open_index(folder).folder) == gradient_files(alone.folder)


def test_an_error_of_one_process_ends_all_and_names_it(together):
    _, (main, other) = together
    assert other["fails"]["error"] == "ValueError: a bad example"
    assert main["fails"]["error"].startswith("ProcessFailedError: Process 1 (")
    assert main["fails"]["error"].endswith("failed: ValueError: a bad example")
    assert main["fails"]["seconds"] < 30


def test_what_failed_is_finished_by_both_as_if_nothing_had_been(together):
    folder, (main, other) = together
    if "don't know how to restore data location" in (main["mended"]["error"] or ""):
        pytest.skip("transformers 5.0 cannot read a checkpoint back to the device of a process on the CPU, `cpu:0`")
    assert (main["mended"]["error"], other["mended"]["error"]) == (None, None)
    assert gradient_files(folder / "fails" / "index") == gradient_files(folder / "whole" / "index")
    assert main["mended"]["calls"] + other["mended"]["calls"] < main["whole"]["calls"] + other["whole"]["calls"] - 4
    assert not list((folder / "fails").rglob("*.partial"))


def test_a_process_that_does_not_see_the_folder_is_named_before_training(together):
    folder, (main, other) = together
    assert "ValueError: All processes must see the folder of the index, but process 1 on" in other["own disk"]["error"]
    assert "machine-1" in other["own disk"]["error"]
    assert other["own disk"]["error"] in main["own disk"]["error"]
    assert not list((folder / "own-disk").rglob("checkpoint-*"))
    assert not list((folder / "own-disk").rglob(".seen*"))


# Killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A training in which process 1 is killed in the middle of a segment, without a launcher to end the other."""
    folder = tmp_path_factory.mktemp("killed")
    processes = start_without_launcher(SCRIPT, folder, "kill 1")
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL], outputs[0][-3000:]
    return folder


def test_when_one_is_killed_the_other_ends_by_itself_and_says_who(killed):
    main, other = told(killed)
    assert main["error"].startswith("ProcessFailedError: Process 1 has sent no heartbeat for 6 seconds")
    assert main["seconds"] < 60
    assert other is None


def test_a_killed_process_leaves_nothing_half_and_one_process_finishes_it(killed, together):
    whole = open_index(together[0] / "whole")
    assert_nothing_half(killed, whole)
    assert_one_process_finishes(killed, whole)


def test_a_main_process_killed_under_the_launcher_leaves_nothing_half_and_one_process_finishes_it(tmp_path, together):
    result = launch(SCRIPT, tmp_path, "kill 0", check=False, timeout=120)
    assert result.returncode != 0
    assert told(tmp_path)[0] is None
    whole = open_index(together[0] / "whole")
    assert_nothing_half(tmp_path, whole)
    assert_one_process_finishes(tmp_path, whole)


def assert_one_process_finishes(folder, whole):
    reader = resume(folder)  # with the same global batch
    for name in ("checkpoint-2", "checkpoint-4"):  # the weights of the next were trained on another number
        assert segments(reader)[name] == segments(whole)[name]
    assert [checkpoint["learning_rate"] for checkpoint in reader.checkpoints] == pytest.approx(RATES)
    model = BertForSequenceClassification.from_pretrained(folder / "run" / "checkpoint-6")
    assert_rows_are_autograd(reader, 2, model, classification_data())
    assert not list(folder.rglob("*.partial"))
    assert not list((folder / "index").rglob("journal*"))


def assert_nothing_half(folder, whole):
    """What an interruption in checkpoint-4 may leave: checkpoint-2, and segments that journals know."""
    reader = open_index(folder)
    assert [checkpoint["name"] for checkpoint in reader.checkpoints] == ["checkpoint-2"]
    assert segments(reader)["checkpoint-2"] == segments(whole)["checkpoint-2"]
    journals = list((folder / "index" / "gradients" / "checkpoint-4.partial").glob("journal*.json"))
    known = {segment["sha256"] for journal in journals for segment in json.loads(journal.read_text())["segments"]}
    assert known
    assert known < set(segments(whole)["checkpoint-4"])
