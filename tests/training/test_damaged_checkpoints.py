"""
Whatever a file of ours in a checkpoint holds, a run resumes from it or refuses it by its name: hundreds of odd entries.

An entry that no run writes is never taken, unless nothing reads it; an odd value that a run may write is taken as it is.
"""

import copy
import json
import random
import shutil
from functools import cache

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedMixin, DomainWeightedTrainer
from hf_doge.training.trainer import DoGEMixin, DoGETrainer
from tests.one_layer import tiny_llama
from tests.tiny import three_domains

SEED, ENTRIES_PER_FILE = 3, 60
ARGUMENTS = {
    "max_steps": 4,
    "save_steps": 2,
    "save_strategy": "steps",
    "per_device_train_batch_size": 6,
    "logging_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
WEIGHTS = {"arxiv": 0.5, "books": 0.3, "code": 0.2}
STREAMS = {name: data.to_iterable_dataset() for name, data in three_domains(8).items()}
ODD = [
    *(None, True, False, -1, 0, 1, 3, 1.5, -2.5, float("nan"), float("inf"), 10**30, 2**63, "", "x", "1"),
    *(
        [],
        [None],
        ["x"],
        [1.0],
        [[1.0]],
        [[0.1, 0.2, 0.3]],
        [0.1, 0.2, 0.3],
        [0.1, "x", 0.3],
        {},
        {"x": 1},
        {"arxiv": 1},
    ),
]


class Taken(Exception):
    """A checkpoint was found good."""


class Stopping(Trainer):
    """Does not train."""

    def train(self, *args, **kwargs):
        raise Taken("a good checkpoint")


class StoppingLearner(DoGEMixin, Stopping):
    pass


class StoppingMixture(DomainWeightedMixin, Stopping):
    pass


def learner(folder, *, stops=True, **options):
    args = DoGEConfig(str(folder), **{**ARGUMENTS, **options})
    return (StoppingLearner if stops else DoGETrainer)(tiny_llama(), args, train_dataset=three_domains(8))


def mixture(folder, *, data, weights=WEIGHTS, stops=True, **options):
    make = StoppingMixture if stops else DomainWeightedTrainer
    args = TrainingArguments(str(folder), **ARGUMENTS)
    return make(tiny_llama(), args, train_dataset=data, domain_weights=weights, **options)


MAKERS = {
    "proxy": lambda folder, **how: learner(folder, recipe="doge_plus", stop_when_undecided=True, **how),
    "online": lambda folder, **how: learner(folder, mode="online", **how),
    "mixture": lambda folder, **how: mixture(folder, data=three_domains(8), weights=[(0, WEIGHTS), (0.5, dict.fromkeys(WEIGHTS, 1.0))], **how),
    "streams": lambda folder, **how: mixture(folder, data=STREAMS, **how),
}  # fmt: skip
FILES = {
    "proxy": ["doge_state.json", "run_identity.json", "domain_sampler.json", "trainer_state.json"],
    "online": ["doge_state.json", "domain_sampler.json"],
    "mixture": ["run_identity.json", "domain_sampler.json", "trainer_state.json"],
    "streams": ["run_identity.json", "domain_streams.json", "trainer_state.json"],
}


@cache
def checkpoint_of(kind, folder):
    MAKERS[kind](folder, stops=False).train()
    return folder / "checkpoint-2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return lambda kind: checkpoint_of(kind, base / kind)


def places_in(content, path=()):
    """Where there is an entry, for whichever it may be replaced."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, (dict, list)) and len(path) < 4:
            yield from places_in(value, (*path, key))


def changed(content, path, draws):
    """A copy with another value at a place, or none."""
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if draws.random() < 0.25:
        del inner[path[-1]]
        return content, "gone"
    inner[path[-1]] = value = draws.choice(ODD)
    return content, value


def resume(trainer, folder):
    """Up to the first step, and a look at all that was read."""
    with pytest.raises(Taken, match="good"):
        trainer.train(resume_from_checkpoint=str(folder))
    trainer.get_domain_epochs()
    if trainer.domain_sampler is not None:
        trainer.domain_sampler.indices(0, 100)
    if isinstance(trainer, DoGEMixin):
        state = trainer._learner.state
        trainer._learner.metrics.collect(state, None)
        assert trainer.domain_weights.last
        scores = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
        for _ in range(3):
            state.update(state.weights, scores, rate=0.1, burn_in_steps=0)
    elif trainer._domain_meter is not None:
        trainer._domain_meter.collect()


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_an_odd_entry_of_a_checkpoint_is_refused_by_its_file_or_does_no_harm(checkpoint, tmp_path, kind, file):
    draws = random.Random(f"{SEED} {kind} {file}")
    source, folder = checkpoint(kind), tmp_path / "checkpoint-2"
    shutil.copytree(source, folder)
    trainer = MAKERS[kind](tmp_path)
    content = json.loads((source / file).read_text())
    whole = content
    if file == "trainer_state.json":  # of the rest of it the Trainer takes care
        content = {name: content[name] for name in ("global_step", "stateful_callbacks")}
    places = [path for path in places_in(content) if path[:2] != ("stateful_callbacks", "TrainerControl")]
    for _ in range(ENTRIES_PER_FILE):
        path = draws.choice(places)
        odd, value = changed(content, path, draws)
        (folder / file).write_text(json.dumps({**whole, **odd} if value != "gone" or len(path) > 1 else odd))
        try:
            resume(trainer, folder)
        except ValueError as error:
            message = str(error)
            assert file in message or str(folder) in message, (path, value, message)
        except Exception as error:
            raise AssertionError(f"{path} was {value!r:.60}") from error
    (folder / file).write_text(json.dumps(whole))
    resume(trainer, folder)


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_a_file_of_a_checkpoint_that_is_none_is_refused_by_its_name(checkpoint, tmp_path, kind, file):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint(kind), folder)
    trainer = MAKERS[kind](tmp_path)
    for content in ("", "{", "[]", "null", "3", '"x"', "{}", "\xff", "[" * 10_000, '{"a": 1, "a": 2}'):
        (folder / file).write_bytes(content.encode("latin-1"))
        if (content, file) == ("{}", "run_identity.json"):  # an earlier hf_doge wrote down nothing of a run
            resume(trainer, folder)
        else:
            with pytest.raises(ValueError, match=file):
                trainer.train(resume_from_checkpoint=str(folder))


def test_an_infinite_loss_since_the_last_log_is_no_damage(tmp_path):
    """As of labels whose logit is -inf; NaN too."""
    args = TrainingArguments(str(tmp_path), **ARGUMENTS)
    options = {"train_dataset": three_domains(8), "domain_weights": WEIGHTS}
    DomainWeightedTrainer(tiny_llama(), args, **options).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["domain_metrics"]["losses"] = [float("inf"), float("nan"), 1.0]
    file.write_text(json.dumps(state))
    DomainWeightedTrainer(tiny_llama(), args, **options).train(resume_from_checkpoint=str(file.parent))
