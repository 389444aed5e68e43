"""Learning domain weights from streams: all domains in every step, the same on two processes, resumed exactly."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGEMixin, DoGETrainer
from tests.launch import run_processes
from tests.one_layer import tiny_llama
from tests.tiny import language_model_rows, three_domains
from tests.training.learning_script import note
from tests.training.learning_streams_script import NAMES, STEPS, make_streams, make_trainer
from tests.training.mixture_processes import SPLITS_STREAMS
from tests.training.test_learning_processes import assert_same_learning
from tests.training.test_resume import assert_same, outcome

pytestmark = pytest.mark.timeout(600)  # processes learn in the setup of the first test that reads what they left
SCRIPT = Path(__file__).parent / "learning_streams_script.py"
NOT_DISPATCHED = {"dispatch_batches": False}
WAYS = {
    "dispatched": {},
    "read_by_all": {"accelerator": NOT_DISPATCHED},
    "split": {"accelerator": {"split_batches": True}, "per_device_train_batch_size": 4},
    "sharded": {"accelerator": NOT_DISPATCHED, "num_shards": 2},
    "sharded_unevenly": {"accelerator": NOT_DISPATCHED, "num_shards": 2, "gradient_accumulation_steps": 2},
}
READ_AS_ONE = ("dispatched", "read_by_all", "split")
if not SPLITS_STREAMS:  # an older accelerate lets every process read everything
    WAYS = {name: options for name, options in WAYS.items() if "sharded" not in name}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What two processes learned, all ways in one launch: a folder with a folder for each way."""
    folder, plan = tmp_path_factory.mktemp("streams"), []
    for name, options in WAYS.items():
        run = {"folder": str(folder / name), **options}
        plan.append({**run, "save_steps": 2})
        plan.append({**run, "save_strategy": "no", "resume": str(folder / name / "checkpoint-2")})
    run_processes(SCRIPT, json.dumps(plan))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process learned, and what it saw."""
    folder = tmp_path_factory.mktemp("one")
    trainer = make_trainer(folder)
    trainer.train()
    note(trainer, folder / "whole-0.pt")
    return trainer, torch.load(folder / "whole-0.pt")


def load(folder, name, rank=0, kind="whole"):
    return torch.load(folder / name / f"{kind}-{rank}.pt")


def counts_by_step(micro_batches, accumulation):
    """Examples of each domain in every step."""
    steps = [micro_batches[i : i + accumulation] for i in range(0, len(micro_batches), accumulation)]
    return [dict(Counter(domain for batch in step for domain in batch)) for step in steps]


def test_every_step_holds_as_many_examples_of_every_domain(whole):
    trainer, _ = whole
    assert counts_by_step(trainer.domains_seen, 3) == [{0: 4, 1: 4, 2: 4}] * STEPS


def test_examples_come_in_the_order_of_their_stream_which_begins_anew_at_its_end(whole):
    trainer, _ = whole
    domains = [domain for batch in trainer.domains_seen for domain in batch]
    examples = [example for batch in trainer.tokens_seen for example in batch]
    rows = three_domains(16)["arxiv"]["input_ids"]
    seen = [example for domain, example in zip(domains, examples, strict=True) if domain == 0]
    assert seen == [*rows, *rows[:8]]


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2}, {"remove_unused_columns": False}])
def test_streams_teach_what_datasets_of_the_same_examples_teach(tmp_path, options):
    # A step holds all rows, so that their order does not matter.
    options = {**options, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    options |= {"save_strategy": "no", "optim": "sgd", "learning_rate": 0.1}
    rows, learned = three_domains(4), []
    for domains in ({name: data.to_iterable_dataset() for name, data in rows.items()}, rows):
        trainer = make_trainer(tmp_path, streams=domains, with_target=False, **options)
        trainer.train()
        learned.append(trainer.domain_weights.trajectory.weights)
    assert abs(learned[1][-1] - 1 / 3).max() > 1e-3
    torch.testing.assert_close(torch.from_numpy(learned[0]), torch.from_numpy(learned[1]), rtol=1e-5, atol=1e-6)


def generate(shards):
    for rows in shards:
        yield from rows


def test_streams_that_do_not_know_their_columns_are_learned_from(tmp_path):
    streams = {
        name: IterableDataset.from_generator(generate, gen_kwargs={"shards": [list(rows)]})
        for name, rows in three_domains(5).items()
    }
    trainer = make_trainer(tmp_path, streams=streams, save_strategy="no", max_steps=3)
    assert trainer.train_dataset.column_names is None
    trainer.train()
    assert counts_by_step(trainer.domains_seen, 3) == [{0: 4, 1: 4, 2: 4}] * 3


def test_logs_and_artifact_tell_what_is_known_of_a_stream(tmp_path, whole):
    trainer, _ = whole
    logs = trainer.state.log_history[0]
    assert {f"domain_{kind}/code" for kind in ("weight", "loss", "score", "tokens")} <= logs.keys()
    assert not any(name.startswith("domain_epochs") for name in logs)
    trainer.domain_weights.save_pretrained(tmp_path / "artifact")
    restored = DomainWeights.from_pretrained(tmp_path / "artifact")
    assert restored.domains["code"] == {"num_rows": None, "num_tokens": None, "fingerprint": None}
    state = json.loads((Path(trainer.args.output_dir) / f"checkpoint-{STEPS}" / "doge_state.json").read_text())
    assert [state["domains"][name]["num_examples"] for name in NAMES] == [4 * STEPS] * 3
    assert state["run"]["num_rows"] == dict.fromkeys(NAMES)


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2, "num_shards": 2}])
def test_a_run_resumed_after_any_step_equals_one_that_was_not_interrupted(tmp_path, options):
    options = {"dropout": 0.2, "optim": "adamw_torch", "lr_scheduler_type": "linear", **options}
    trainer = make_trainer(tmp_path / "whole", **options)
    trainer.train()
    expected = outcome(trainer)
    for step in (2, 5) if "num_shards" in options else range(1, STEPS):
        # What an interrupted run would have left: a checkpoint knows nothing of the steps after it.
        resumed = make_trainer(tmp_path / str(step), save_strategy="no", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), expected)
        assert resumed.tokens_seen == trainer.tokens_seen[step * 3 :]


def test_training_a_second_time_begins_anew(tmp_path, whole):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    trainer.train()
    assert trainer.tokens_seen == whole[0].tokens_seen * 2
    assert trainer.domain_weights.trajectory.steps.tolist() == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 6}, r"'examples_per_step': 12.*'examples_per_step': 24"),
        ({"dataloader_num_workers": 2, "num_shards": 2}, r"'dataloader_num_workers': 2"),
        ({"streams": three_domains(16)}, r"'num_rows': \{'arxiv': None.*'arxiv': 16"),
        ({"seed": 5}, r"'seed': 42.*'seed': 5"),
        ({"streams": {"wiki": make_streams()["code"]}}, r"gone: \['arxiv', 'books', 'code'\], new: \['wiki'\]"),
    ],
)
def test_a_checkpoint_of_other_steps_or_data_is_refused(tmp_path, whole, changes, message):
    checkpoint = Path(whole[0].args.output_dir) / "checkpoint-2"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_datasets_is_not_resumed_on_streams(tmp_path):
    make_trainer(tmp_path, streams=three_domains(16), max_steps=1).train()
    with pytest.raises(ValueError, match=r"'num_rows': \{'arxiv': 16.*'arxiv': None"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


STREAM = make_streams()["code"]
OCCUPIED = {name: stream.map(lambda row: {**row, "domain": "x"}) for name, stream in make_streams().items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_steps": -1}, ValueError, "`max_steps` must be positive. Set it."),
        ({"mode": "online"}, ValueError, "got streams. Load them without `streaming=True`, or set `mode='proxy'`"),
        ({"streams": STREAM}, ValueError, "or pass a dict with one stream per domain"),
        ({"streams": {"a": STREAM, "b": three_domains()["code"]}}, TypeError, "all `datasets.IterableDataset`"),
        ({"streams": {" ": STREAM}}, ValueError, "Domain names must be non-empty strings"),
        ({"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}, ValueError, "cannot hold 3 domains"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_at_construction(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **changes)


@pytest.mark.parametrize("target", [STREAM, {"held_out": STREAM}])
def test_a_stream_as_target_is_refused(tmp_path, target):
    args = DoGEConfig(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    with pytest.raises(ValueError, match=r"must be a `datasets\.Dataset`.* but got .*IterableDataset"):
        DoGETrainer(tiny_llama(), args, train_dataset=make_streams(), target_dataset=target)


def test_a_column_that_exists_already_is_named(tmp_path):
    with pytest.raises(ValueError, match="The streams get a column 'domain', but they have one already"):
        make_trainer(tmp_path, streams=OCCUPIED).train()


def test_a_domain_without_examples_is_named(tmp_path):
    streams = {**make_streams(), "code": IterableDataset.from_generator(generate, gen_kwargs={"shards": [[]]})}
    with pytest.raises(ValueError, match=r"Domains \['code'\] have positive weight but no example"):
        make_trainer(tmp_path, streams=streams).train()


def test_sft_trainer_learns_from_streams_of_text(tmp_path, tokenizer):
    from trl import SFTConfig, SFTTrainer

    class DoGESFTTrainer(DoGEMixin, SFTTrainer):
        pass

    @dataclass
    class DoGESFTConfig(DoGEConfig, SFTConfig):
        pass

    def texts(low):
        ids = language_model_rows(12, low=low, high=low + 9)["input_ids"]
        return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in ids]}).to_iterable_dataset()

    options = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "mu": 0.001,
        "max_length": 16,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    streams = {"low": texts(0), "high": texts(18)}
    trainer = DoGESFTTrainer(
        model=tiny_llama(), args=DoGESFTConfig(**options), train_dataset=streams, processing_class=tokenizer
    )
    trainer.train()
    assert trainer._learner.state.num_examples.tolist() == [6, 6]
    assert trainer.domain_weights.last["high"] != 0.5
    packing = DoGESFTConfig(**{**options, "packing": True})
    packed = DoGESFTTrainer(model=tiny_llama(), args=packing, train_dataset=streams, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"some come without.*do not pack streams"):
        packed.train()


@pytest.mark.parametrize("name", READ_AS_ONE)
def test_a_mixture_read_as_one_teaches_two_processes_what_it_teaches_one(learned, whole, name):
    assert (whole[1]["weights"][-1] - 1 / 3).abs().max() > 1e-3
    assert_same_learning(load(learned, name), whole[1])


@pytest.mark.parametrize("name", WAYS)
def test_all_processes_hold_the_same_weights_and_parameters_to_the_bit(learned, name):
    first, second = (load(learned, name, rank) for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["parameters"], second["parameters"])


@pytest.mark.parametrize("name", WAYS)
def test_every_step_of_all_processes_holds_every_domain(learned, name):
    accumulation = WAYS[name].get("gradient_accumulation_steps", 3)
    seen = [json.loads((learned / name / f"whole-{rank}.json").read_text())[0] for rank in range(2)]
    together = [first + second for first, second in zip(*seen, strict=True)]
    counts = counts_by_step(together, accumulation)
    assert len(counts) == STEPS
    if "unevenly" not in name:
        assert counts == [{0: 4, 1: 4, 2: 4}] * STEPS
        return
    share = 4 * accumulation / 3
    assert all(len(step) == 3 and all(abs(n - share) < 2 for n in step.values()) for step in counts)


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_resume_as_if_never_interrupted(learned, name):
    for rank in range(2):
        resumed, expected = (load(learned, name, rank, kind) for kind in ("resumed", "whole"))
        for key in ("weights", "scores", "losses", "parameters", "tokens", "examples"):
            torch.testing.assert_close(resumed[key], expected[key], rtol=0, atol=0, equal_nan=True)


def test_one_process_goes_on_with_what_two_began(learned, whole, tmp_path):
    shutil.copytree(learned / "dispatched", tmp_path / "run")
    trainer = make_trainer(tmp_path / "run")
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    note(trainer, tmp_path / "resumed.pt")
    assert_same_learning(torch.load(tmp_path / "resumed.pt"), whole[1])


@pytest.mark.skipif(not SPLITS_STREAMS, reason="accelerate does not split streams")
def test_one_process_does_not_go_on_with_shards_that_two_read_apart(learned, tmp_path):
    shutil.copytree(learned / "sharded", tmp_path / "run")
    with pytest.raises(ValueError, match=r"must go on as it began.*'num_processes': 2"):
        make_trainer(tmp_path / "run", num_shards=2).train(resume_from_checkpoint=True)
