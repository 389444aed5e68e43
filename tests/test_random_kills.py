"""
Commands that are killed at random times and run again leave what an undisturbed run leaves, resumed after the end included.

The kills are real: SIGKILL to a process of its own. The processes are forks of a server that has imported the libraries,
so that most of their time is spent on what is to be killed.
"""

import json
import multiprocessing
import os
import random
import shutil
import time

import pytest
from transformers import AutoTokenizer

from hf_doge import InfluenceIndex
from hf_doge.artifacts import DomainWeights
from hf_doge.cli import main
from tests.artifacts.test_domain_weights import make_weights
from tests.cli.test_cli import TINY, write_data
from tests.hub.handle import HubServer, client_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAINING = [
    *(flag for flag in TINY if "max_steps" not in flag),
    "--max_steps=9",
    "--save_steps=2",
    "--logging_steps=1",
]
DATES = {"date", "seconds", "hf_doge_commit"}  # when, how long it took, and where this repository stood
MODULES = ["tests.test_random_kills", *(f"hf_doge.cli.{name}" for name in ("learn", "train", "index"))]


def training(command, material, folder):
    """What one types again after a kill: with `--resume_from_checkpoint=last` if there is anything to resume from."""
    flags = [f"--data_dir={material / 'data'}", f"--output_dir={folder / 'out'}", *TRAINING]
    if any(is_json(path) for path in (folder / "out").glob("checkpoint-*/trainer_state.json")):
        flags.append("--resume_from_checkpoint=last")
    return main([*command, f"--tokenizer={material / 'model' / 'tokenizer'}", *flags])


def learn(material, folder):
    return training(["learn"], material, folder)


def train(material, folder):
    return training(["train", "--weights=natural"], material, folder)


def index(material, folder, data="few.jsonl", *more):
    checkpoints = [str(material / "model" / f"checkpoint-{step}") for step in (4, 8, 9)]
    flags = [f"--data={material / data}", f"--output_dir={folder / 'out'}", "--batch_size=2", "--max_length=16"]
    flags += [f"--tokenizer={material / 'padding_tokenizer'}"]
    return main(["index", "--checkpoints", *checkpoints, *flags, *more])


def add_examples(material, folder):
    return index(material, folder, "all.jsonl", "--add_examples")


def save_weights(material, folder):
    make_weights(1).save_pretrained(folder / "out")


def save_index(material, folder):
    InfluenceIndex.from_pretrained(material / "index" / "out").save_pretrained(folder / "out")


def repository_of(folder):
    return f"doge/{folder.parent.name}-{folder.name}"


def push_weights(material, folder):
    make_weights(1).push_to_hub(repository_of(folder))


def push_index(material, folder):
    InfluenceIndex.from_pretrained(material / "index" / "out").push_to_hub(repository_of(folder))


# What is in the folder before the first run, and how many kills.
NOTHING, KILLS = (
    None,
    {
        learn: 8,
        train: 8,
        index: 6,
        add_examples: 6,
        save_weights: 6,
        save_index: 6,
        push_weights: 5,
        push_index: 5,
    },
)


def prepare(command, material, folder):
    """An artifact to be replaced or added to."""
    if command is save_weights:
        make_weights(0).save_pretrained(folder / "out")
    elif command is add_examples:
        shutil.copytree(material / "index" / "out", folder / "out")
    elif command is save_index:
        shutil.copytree(material / "older" / "out", folder / "out")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub, which the environment names to all processes started from here on."""
    with HubServer(tmp_path_factory.mktemp("hub") / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in client_environment(hub).items():
            patch.setenv(name, value)
        yield hub


@pytest.fixture(scope="module")
def processes(hub):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Data, a model with its checkpoints and tokenizer, and two indices of some of its training examples."""
    folder = tmp_path_factory.mktemp("material")
    data = write_data(folder / "data")
    flags = [f"--data_dir={data}", f"--output_dir={folder / 'model'}", "--train_tokenizer_vocab=300", *TRAINING]
    assert main(["train", "--weights=uniform", *flags]) == 0
    lines = (data / "code.train.jsonl").read_text().splitlines(keepends=True)
    for name, count in (("fewer", 9), ("few", 25), ("all", 40)):
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model" / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "padding_tokenizer")
    assert index(folder, folder / "index") == 0
    assert index(folder, folder / "older", "fewer.jsonl") == 0
    return folder


def in_process(command, material, folder):
    os._exit(command(material, folder) or 0)


def run(processes, command, material, folder, *, kill_after=None):
    """To its end, or for so many seconds: the exit code, which is -9 for one that was killed, and the time it took."""
    process = processes.Process(target=in_process, args=(command, material, folder))
    start = time.monotonic()
    process.start()
    process.join(kill_after)
    seconds = time.monotonic() - start
    process.kill()
    process.join()
    return process.exitcode, seconds


def is_json(path):
    try:
        return bool(json.loads(path.read_text()))
    except ValueError:
        return False


def without_dates(content):
    if isinstance(content, dict):
        return {key: without_dates(value) for key, value in content.items() if key not in DATES}
    return [without_dates(part) for part in content] if isinstance(content, list) else content


def outcome(hub, command, folder):
    """All numbers that were left: tables and weights as bytes, JSON without dates, the names of the checkpoints."""
    if command in (push_weights, push_index):
        files = hub.files(repository_of(folder))
    else:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = {name.partition("/checkpoint-")[2].partition("/")[0]: b"" for name in files if "/checkpoint-" in name}
    for name, content in files.items():
        if name.endswith((".parquet", ".safetensors")):
            found[name] = content
        elif name.rpartition("/")[2] in (
            "domain_weights.json",
            "domain_results.json",
            "config.json",
            "doge_state.json",
        ):
            found[name] = without_dates(json.loads(content))
    return found


def different(found, expected):
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


@pytest.mark.parametrize("command", KILLS, ids=lambda command: command.__name__)
def test_killed_at_random_times_and_run_again_it_leaves_what_an_undisturbed_run_leaves(
    hub, processes, material, tmp_path, command
):
    def fresh(name):
        folder = tmp_path / name
        folder.mkdir()
        prepare(command, material, folder)
        return folder

    whole = fresh("whole")
    run(processes, command, material, fresh("warm"))  # the first fork waits for the server's imports
    code, seconds = run(processes, command, material, whole)
    expected = outcome(hub, command, whole)
    assert (code, expected != {}) == (0, True)
    draw = random.Random(command.__name__)
    kills = 0
    for number in range(10 * KILLS[command]):
        folder = fresh(f"round-{number}")
        for _ in range(draw.randint(1, 3)):
            code, _ = run(processes, command, material, folder, kill_after=draw.uniform(0, seconds))
            assert code in (0, -9)
            kills += code == -9
        for when in ("to the end", "after the end"):
            code, _ = run(processes, command, material, folder)
            assert (code, different(outcome(hub, command, folder), expected)) == (0, []), when
        if command in (push_weights, push_index):
            assert len([one for one in hub.commits(repository_of(folder)) if one["title"].startswith("Upload")]) == 1
        if command in (save_weights,):
            assert DomainWeights.from_pretrained(folder / "out") == make_weights(1)
        if kills >= KILLS[command]:
            return
    pytest.fail(f"only {kills} of {KILLS[command]} kills met the process")
