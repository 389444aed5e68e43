"""Resume law: a run that was interrupted ends like one that was not, bit for bit."""

import json
import math
import random
import re
import shutil
import signal
import textwrap
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_doge.training.checkpoints import resolve_checkpoint
from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.trainer import DoGETrainer
from tests.forks import Fork
from tests.launch import launch_environment
from tests.one_layer import tiny_bert, tiny_gpt2, tiny_llama
from tests.tiny import three_domains, tiny_tokenizer
from tests.training.mixture_processes import SaveAt

STEPS = 6


class Recorder:
    """A collator that notes the first token of every example it is given."""

    def __init__(self, collator):
        self.collator = collator
        self.seen = []

    def __call__(self, features):
        self.seen.append([tuple(feature["input_ids"]) for feature in features])
        return self.collator(features)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        control.should_save = True


def make_trainer(folder, stop_after=None, target=None, **kwargs):
    """Two epochs and a half of dropout, AdamW, a schedule, micro-batches and a remainder to carry over."""
    options = {
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "mu": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **kwargs,
    }
    args = DoGEConfig(str(folder), **options)
    callbacks = [] if stop_after is None else [StopAfter(stop_after)]
    domains = three_domains(8)
    trainer = DoGETrainer(
        tiny_gpt2(dropout=0.2),
        args,
        train_dataset=domains,
        **{
            "target_dataset": {"a": domains["arxiv"].select(range(5)), "b": domains["code"].select(range(7))},
            **(target or {}),
        },
        callbacks=callbacks,
    )
    trainer.data_collator.collator = Recorder(trainer.data_collator.collator)
    return trainer


def outcome(trainer):
    learned = trainer.domain_weights
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return learned.mean, learned.last, learned.trajectory, state


def assert_same(actual, expected):
    assert actual[0] == expected[0]
    assert actual[1] == expected[1]
    for name in ("steps", "learning_rates", "weights", "scores", "losses"):
        np.testing.assert_array_equal(getattr(actual[2], name), getattr(expected[2], name))
    for name, value in expected[3].items():
        assert torch.equal(actual[3][name], value), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer, outcome(trainer), trainer.data_collator.collator.seen


@pytest.fixture(scope="module")
def saving(tmp_path_factory):
    """A run that saves after every step."""
    trainer = make_trainer(tmp_path_factory.mktemp("saving"), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


def test_saving_changes_nothing(uninterrupted, saving):
    assert_same(outcome(saving), uninterrupted[1])


@pytest.mark.parametrize("step", range(1, STEPS))
def test_interrupted_after_any_step_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, saving, step):
    """What had been done after the step was not, for the one who resumes: `test_workers_and_streaming_resume_alike` stops."""
    _, expected, seen = uninterrupted
    checkpoint = shutil.copytree(f"{saving.args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(outcome(resumed), expected)
    last_batches = resumed.data_collator.collator.seen[-3:]
    assert last_batches == seen[-3:]


@pytest.mark.parametrize("options", [{}, {"recipe": "doge_plus", "optim": "adamw_torch"}])
def test_a_resumed_run_logs_of_the_domains_what_an_uninterrupted_one_logs(tmp_path, options):
    """Means over steps of both runs, and the noise of scores of both."""
    whole = make_trainer(tmp_path / "whole", logging_steps=3, **options)
    whole.train()
    make_trainer(tmp_path / "cut", stop_after=4, logging_steps=3, **options).train()
    resumed = make_trainer(tmp_path / "cut", logging_steps=3, **options)
    resumed.train(resume_from_checkpoint=True)
    logged, expected = (
        [
            {k: v for k, v in log.items() if k.startswith("domain_")}
            for log in trainer.state.log_history
            if "loss" in log
        ]
        for trainer in (resumed, whole)
    )
    assert "domain_score_noise/code" in expected[-1]
    assert logged == expected


@pytest.mark.parametrize("options", [{"dataloader_num_workers": 2}, {"alignment": "streamed"}])
def test_workers_and_streaming_resume_alike(tmp_path, options):
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    make_trainer(tmp_path / "cut", stop_after=4, **options).train()
    resumed = make_trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), outcome(whole))


class Masking:
    """Masks by a generator of its own, of NumPy."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __call__(self, examples):
        ids = torch.tensor([example["input_ids"] for example in examples])
        masked = torch.from_numpy(self.generator.random(ids.shape) < 0.4)
        return {"input_ids": ids.masked_fill(masked, 1), "labels": ids.masked_fill(~masked, -100)}


def global_masking(examples):
    for example in examples:
        position = random.randrange(len(example["input_ids"]))
        example["labels"] = [-100] * len(example["input_ids"])
        example["labels"][position], example["input_ids"][position] = example["input_ids"][position], 1
    return {name: torch.tensor([example[name] for example in examples]) for name in ("input_ids", "labels")}


def masked_language_modeling(**options):
    return DataCollatorForLanguageModeling(tiny_tokenizer(), mlm_probability=0.4, **options)


@pytest.mark.parametrize(
    ("collator", "options"),
    [
        (masked_language_modeling, {}),
        (lambda: masked_language_modeling(seed=7), {}),
        (lambda: masked_language_modeling(seed=7), {"dataloader_num_workers": 2}),
        (lambda: masked_language_modeling(seed=7), {"mode": "online", "reweight_steps": 2}),
        (Masking, {"gradient_accumulation_steps": 2, "with_target": True}),
        (lambda: global_masking, {"with_target": True}),
        (lambda: masked_language_modeling(seed=7), {"weighted": True}),
        (masked_language_modeling, {"weighted": True, "eval_strategy": "steps", "eval_steps": 1}),
        (Masking, {"weighted": True, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2}),
        (lambda: global_masking, {"weighted": True, "streamed": True}),
        (lambda: global_masking, {"weighted": True, "late": True}),
        (lambda: masked_language_modeling(seed=7), {"weighted": True, "late": True}),
    ],
)
def test_random_masking_resumes_alike(tmp_path, collator, options):
    rows = {name: data.remove_columns("labels") for name, data in three_domains(16).items()}
    options = dict(options)
    extra = {"target_dataset": rows["code"]} if options.pop("with_target", False) else {}
    trainer_class, config_class = DoGETrainer, DoGEConfig
    if options.pop("weighted", False):
        trainer_class, config_class = DomainWeightedTrainer, TrainingArguments
        extra = {"domain_weights": WEIGHTS, "eval_dataset": rows["code"]}
    is_late = options.pop("late", False)
    if options.pop("streamed", False):
        rows = {name: data.to_iterable_dataset() for name, data in rows.items()}

    def make(stop_after=None):
        defaults = {"per_device_train_batch_size": 6, "max_steps": 4, "learning_rate": 0.02, "save_strategy": "no"}
        defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = config_class(str(tmp_path), **{**defaults, **options})
        callbacks = [] if stop_after is None else [StopAfter(stop_after)]
        data = {"train_dataset": rows, "data_collator": None if is_late else collator(), **extra}
        trainer = trainer_class(tiny_bert(), args, callbacks=callbacks, **data)
        if is_late:
            trainer.data_collator = collator()
        return trainer

    whole = make()
    whole.train()
    make(stop_after=2).train()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    if trainer_class is DoGETrainer:
        assert_same(outcome(resumed), outcome(whole))
    losses = [
        [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry] for one in (whole, resumed)
    ]
    assert losses[0] == losses[1]


KILLED_RUN = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from transformers import TrainerCallback
    from tests.training.test_resume import make_trainer
    from hf_doge.training.learning_state import LearningState

    folder, when = sys.argv[1:]

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if when == "between" and state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    if when == "while_saving":
        save = LearningState.save

        def save_and_die(self, folder, *, step, run):
            if step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, folder, step=step, run=run)

        LearningState.save = save_and_die

    trainer = make_trainer(folder, save_strategy="steps", save_steps=2)
    trainer.add_callback(Kill())
    trainer.train()
    """
)


@pytest.mark.parametrize(("when", "resumed_from"), [("between", 4), ("while_saving", 2)])
def test_a_killed_run_resumes_from_the_last_whole_checkpoint(tmp_path, uninterrupted, when, resumed_from):
    process = Fork(["-c", KILLED_RUN, tmp_path, when], env=launch_environment())
    assert process.wait(timeout=200) == -signal.SIGKILL, process.output
    resumed = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    _, expected, seen = uninterrupted
    assert_same(outcome(resumed), expected)
    share_run_again = (STEPS - resumed_from + 1) / STEPS
    assert len(resumed.data_collator.collator.seen) <= share_run_again * len(seen)


def test_a_checkpoint_of_other_domains_is_refused_by_name(tmp_path):
    make_trainer(tmp_path, stop_after=1).train()
    trainer = make_trainer(tmp_path)
    other = DoGETrainer(
        tiny_gpt2(),
        trainer.args,
        train_dataset={"books": three_domains()["books"], "wiki": three_domains()["code"]},
    )
    with pytest.raises(ValueError, match=r"gone: \['arxiv', 'code'\], new: \['wiki'\]"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    make_trainer(tmp_path, stop_after=1).train()
    with pytest.raises(ValueError, match=r"must go on as it began.*'mu': 0\.1.*'mu': 5\.0"):
        make_trainer(tmp_path, mu=5.0).train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder, stop_after=1).train()
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": {"target_dataset": None}}, "targets"),
        ({"target": {"target_dataset": three_domains()["books"]}}, "targets"),
        ({"target": {"target_weights": {"a": 1.0, "b": 2.0}}}, "targets"),
        ({"per_device_target_batch_size": 1}, "per_device_target_batch_size"),
        ({"alignment_parameters": "mlp"}, "alignment_parameters"),
        ({"lagged_update": True}, "lagged_update"),
    ],
)
def test_a_checkpoint_that_was_compared_with_something_else_is_refused(stopped, changes, named):
    with pytest.raises(ValueError, match=rf"must go on as it began, but the checkpoint .* has {{'{named}': "):
        make_trainer(stopped, **changes).train(resume_from_checkpoint=True)


SET_BACK = {
    "an earlier default": (
        {"recipe": "doge_plus", "mu": 3.0},
        {"mu": None},
        "recipe='doge_plus', mu=3.0, min_spread=0.0",
    ),
    "mu": ({}, {"mu": 5.0}, "recipe='paper', mu=0.1"),
    "recipe": ({}, {"recipe": "doge_plus", "mu": 3.0}, None),
    "bounds": ({}, {"score_min": 0.0, "score_max": 1.0}, "recipe='paper', score_min=-inf, score_max=inf"),
    "a norm": ({}, {"domain_max_grad_norm": 1.0}, "recipe='paper', domain_max_grad_norm=0.0"),
    "self term": ({"self_term": "none"}, {}, "recipe='paper', self_term='none'"),
    "seed": ({}, {"seed": 1}, "seed=42"),
    "seeds": ({"data_seed": 3}, {"seed": 1}, "seed=42, data_seed=3"),
    "training": ({"weight_decay": 0.1}, {"learning_rate": 0.5}, None),
    "ways": (
        {},
        {"lagged_update": True, "alignment_parameters": "mlp"},
        "alignment_parameters=None, lagged_update=False",
    ),
}


@pytest.mark.parametrize("name", SET_BACK)
def test_what_a_refusal_says_to_pass_lets_the_run_go_on(tmp_path, name):
    before, after, said = SET_BACK[name]
    make_trainer(tmp_path, stop_after=1, **before).train()
    with pytest.raises(ValueError, match=r"Set them back \(pass `.*`\) or start anew") as refused:
        make_trainer(tmp_path, **after).train(resume_from_checkpoint=True)
    passed = re.search(r"pass `(.*)`\)", str(refused.value)).group(1)
    assert said in (None, passed)
    back = eval(f"dict({passed})", {"inf": math.inf})
    make_trainer(tmp_path, stop_after=2, **{**after, **back}).train(resume_from_checkpoint=True)


def test_what_is_no_argument_is_not_said_to_be_passed(tmp_path):
    make_trainer(tmp_path, stop_after=1).train()
    with pytest.raises(ValueError, match="Set them back or start anew"):
        make_trainer(tmp_path, target={"target_dataset": None}).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_an_optimizer_is_refused(tmp_path):
    make_trainer(tmp_path, stop_after=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="No whole checkpoint found"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_named_checkpoint_that_is_not_whole_is_refused(tmp_path):
    make_trainer(tmp_path, stop_after=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "trainer_state.json").write_text('{"epoch": ')
    with pytest.raises(ValueError, match=r"its trainer_state\.json is cut off"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "doge_state.json").unlink()
    with pytest.raises(ValueError, match=r"it has no doge_state\.json"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="No whole checkpoint found"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("cut", [True, False])
def test_a_checkpoint_without_the_random_state_of_this_process_is_passed_over(tmp_path, cut):
    make_trainer(tmp_path, stop_after=1).train()
    random_state = tmp_path / "checkpoint-1" / "rng_state.pth"
    random_state.write_bytes(random_state.read_bytes()[:-20]) if cut else random_state.unlink()
    with pytest.raises(ValueError, match="No whole checkpoint found"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"its rng_state\.pth is missing or cut off"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_with_a_cut_off_trajectory_is_refused(tmp_path):
    make_trainer(tmp_path, stop_after=1).train()
    trajectory = tmp_path / "checkpoint-1" / "doge_trajectory.parquet"
    trajectory.write_bytes(trajectory.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"doge_trajectory\.parquet must hold the trajectory.*altered or cut off"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_checkpoint_is_readable(tmp_path):
    trainer = make_trainer(tmp_path, stop_after=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "doge_state.json").read_text())
    assert state["domains"]["books"]["weight"] == trainer.domain_weights.last["books"]
    assert (checkpoint / "domain_weights" / "domain_weights.json").exists()
    shutil.rmtree(checkpoint / "domain_weights")  # the artifact is for people; the state stands alone
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.domain_weights.trajectory.steps) == STEPS


def test_a_weighted_trainer_resumes_with_the_same_examples_in_a_later_epoch(tmp_path):
    def make(folder, callback=None):
        args = TrainingArguments(
            str(folder),
            per_device_train_batch_size=5,
            max_steps=25,
            learning_rate=0.01,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = DomainWeightedTrainer(
            tiny_gpt2(dropout=0.1),
            args,
            train_dataset=three_domains(16),
            domain_weights={"arxiv": 0.6, "books": 0.1, "code": 0.3},
            callbacks=[] if callback is None else [callback],
        )
        trainer.data_collator = Recorder(trainer.data_collator)
        return trainer

    steps = (3, 10, 13, 20, 22)
    whole = make(tmp_path / "whole")
    whole.train()
    make(tmp_path / "saving", SaveAt(steps)).train()
    for step in steps:
        resumed = make(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "saving" / f"checkpoint-{step}"))
        assert resumed.data_collator.seen[-3:] == whole.data_collator.seen[-3:]
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value)


def make_weighted(folder, **options):
    """Four steps and a half of an epoch of eight."""
    defaults = {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    defaults |= {"learning_rate": 0.01, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    data = {"train_dataset": options.pop("data", three_domains(8)), "domain_weights": options.pop("weights", WEIGHTS)}
    if "collator" in options:
        data["data_collator"] = options.pop("collator")
    model = options.pop("model", None) or tiny_gpt2(dropout=0.1)
    trainer_class = options.pop("trainer_class", DomainWeightedTrainer)
    return trainer_class(model, TrainingArguments(str(folder), **{**defaults, **options}), **data)


WEIGHTS = {"arxiv": 0.6, "books": 0.1, "code": 0.3}
STREAMS = {name: rows.to_iterable_dataset() for name, rows in three_domains(16).items()}
FINISHED = {
    "proxy": lambda folder: make_trainer(folder, save_strategy="steps", save_steps=2, max_steps=3),
    "a part of an epoch": lambda folder: make_trainer(
        folder, save_strategy="steps", save_steps=2, max_steps=-1, num_train_epochs=0.5, trajectory_steps=2
    ),
    "whole epochs": lambda folder: make_weighted(folder, max_steps=-1, num_train_epochs=2, save_strategy="epoch"),
    "online": lambda folder: make_trainer(
        folder, mode="online", reweight_steps=2, save_strategy="steps", save_steps=2, max_steps=3
    ),
    "weighted": make_weighted,
    "streams": lambda folder: make_weighted(folder, data=STREAMS),
}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", FINISHED)
def test_a_finished_run_that_is_resumed_does_nothing_and_its_artifacts_stay_as_they_are(tmp_path, kind):
    whole = FINISHED[kind](tmp_path / "run")
    whole.train()
    checkpoints = contents(tmp_path / "run")
    if isinstance(whole, DoGETrainer):
        whole.domain_weights.save_pretrained(tmp_path / "artifact")
    artifact = contents(tmp_path / "artifact")
    saved_at = int(time.time())
    while int(time.time()) == saved_at:  # the artifact tells its date by the second
        time.sleep(0.01)
    resumed = FINISHED[kind](tmp_path / "run")
    result = resumed.train(resume_from_checkpoint=True)
    assert result.global_step == resumed.state.max_steps == whole.state.global_step
    assert result.training_loss == 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert contents(tmp_path / "run") == checkpoints
    if isinstance(whole, DoGETrainer):
        resumed.domain_weights.save_pretrained(tmp_path / "artifact")
    assert contents(tmp_path / "artifact") == artifact


def test_the_checkpoint_of_a_longer_run_is_refused_by_a_shorter_one(tmp_path):
    make_weighted(tmp_path, lr_scheduler_type="constant").train()
    shorter = make_weighted(tmp_path, lr_scheduler_type="constant", max_steps=3)
    with pytest.raises(ValueError, match=r"before its end, step 3, but .*checkpoint-5 is of step 5\. Name an earlier"):
        shorter.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("schedule", [{"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}])
def test_a_run_whose_schedule_knows_no_end_may_be_made_longer(tmp_path, schedule):
    make_weighted(tmp_path / "short", max_steps=3, **schedule).train()
    longer = make_weighted(tmp_path / "short", **schedule)
    longer.train(resume_from_checkpoint=True)
    expected = make_weighted(tmp_path / "long", **schedule)
    expected.train()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(longer.model.state_dict()[name], value), name


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted")
    make_weighted(folder, max_steps=4).train()
    return folder


def other_rows(change):
    rows = three_domains(8)
    return {**rows, "books": change(rows["books"])}


def change_one_token(rows):
    tokens = rows["input_ids"]
    return Dataset.from_dict({"input_ids": [*tokens[:-1], [*tokens[-1][:-1], 31]], "labels": rows["labels"]})


def larger_dropout():
    model = tiny_gpt2(dropout=0.1)
    model.config.resid_pdrop = 0.3
    return model


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.02}, "'learning_rate': 0.01} and this run {'learning_rate': 0.02}"),
        ({"learning_rate": 0.02, "weight_decay": 0.1}, "'weight_decay': 0.0} and this run {'learning_rate': 0.02"),
        ({"max_steps": 5}, "{'max_steps': 4} and this run {'max_steps': 5}; the schedule"),
        ({"max_steps": -1, "num_train_epochs": 1}, "{'max_steps': 4} and this run {'max_steps': 8}"),
        ({"lr_scheduler_type": "cosine"}, "{'lr_scheduler_type': 'linear'}"),
        ({"warmup_steps": 1}, "{'warmup_steps': 0"),
        ({"optim": "sgd"}, "{'optim': 'adamw"),
        ({"max_grad_norm": 0.5}, "{'max_grad_norm': 1.0}"),
        ({"per_device_train_batch_size": 4}, "{'examples_per_step': 3}"),
        ({"seed": 1}, "{'training_seed': 42, 'seed': 42}"),
        ({"weights": {**WEIGHTS, "code": 0.4}}, "{'weights': {"),
        ({"data": other_rows(change_one_token)}, "{'data': {'books': '"),
        ({"data": other_rows(lambda rows: rows.select(range(7, -1, -1)))}, "{'data': {'books': '"),
        ({"model": tiny_llama()}, "{'model': {'model_type': 'gpt2', 'parameters': '"),
        ({"model": larger_dropout()}, "{'model': {'resid_pdrop': 0.1}} and this run {'model': {'resid_pdrop': 0.3}}"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_by_what_differs(weighted, changes, named):
    trainer = make_weighted(weighted, **{"max_steps": 4, **changes})
    with pytest.raises(ValueError, match=f"must go on as it began, but the checkpoint .*{re.escape(named)}"):
        trainer.train(resume_from_checkpoint=True)


def test_the_checkpoint_of_a_run_that_masked_otherwise_is_refused(tmp_path):
    rows = {name: data.remove_columns("labels") for name, data in three_domains(8).items()}

    def make(**options):
        collator = masked_language_modeling(**options)
        return make_weighted(tmp_path, data=rows, model=tiny_bert(), collator=collator, max_steps=2)

    make(seed=1).train()
    make(seed=2, pad_to_multiple_of=4).train(resume_from_checkpoint=True)  # masks by the seed of the run
    with pytest.raises(ValueError, match=r"{'data_collator': {'random_replace_prob': 0\.1}} and this run"):
        make(random_replace_prob=0.2).train(resume_from_checkpoint=True)


class Tripled(DomainWeightedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 3 * model(**inputs).loss


def halved_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().logsumexp(-1).mean() / 2


def with_loss(folder, loss_func=None, **options):
    trainer = make_weighted(folder, max_steps=4, **options)
    trainer.compute_loss_func = loss_func
    return trainer


def with_schedule(factor):
    def make(folder):
        trainer = make_weighted(folder, max_steps=4)
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: factor)
        return trainer

    return make


def masking_by(token):
    def make(folder):
        tokenizer = tiny_tokenizer()
        tokenizer.mask_token = token or tokenizer.mask_token
        rows = {name: data.remove_columns("labels") for name, data in three_domains(8).items()}
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)
        return make_weighted(folder, max_steps=4, data=rows, model=tiny_bert(), collator=collator)

    return make


def first_masked(examples):
    batch = default_data_collator(examples)
    batch["labels"][:, 0] = -100
    return batch


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (with_loss, lambda folder: with_loss(folder, collator=first_masked), "first_masked"),
        (masking_by(None), masking_by(tiny_tokenizer().convert_ids_to_tokens(20)), "tokenizer.mask_token"),
        (with_loss, lambda folder: with_loss(folder, trainer_class=Tripled), "Tripled"),
        (with_loss, lambda folder: with_loss(folder, halved_loss), "halved_loss"),
        (with_schedule(1.0), with_schedule(0.1), "lr_scheduler"),
    ],
    ids=["collator", "tokenizer", "compute_loss", "compute_loss_func", "schedule"],
)
def test_the_checkpoint_of_a_run_with_another_loss_batch_or_schedule_is_refused(tmp_path, before, after, named):
    trainer = before(tmp_path)
    trainer.add_callback(StopAfter(2))
    trainer.train()
    before(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=f"must go on as it began, but .*{re.escape(named)}"):
        after(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    identity = tmp_path / "checkpoint-2" / "run_identity.json"
    saved = json.loads(identity.read_text())
    for name in ("loss", "lr_scheduler"):
        saved.pop(name, None)
    saved["data_collator"] = {
        name: value
        for name, value in saved["data_collator"].items()
        if name != "class" and not name.startswith("tokenizer.")
    }
    identity.write_text(json.dumps(saved))
    after(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # an earlier hf_doge wrote it


def test_what_moves_no_weight_may_differ_in_a_resumed_run(weighted, tmp_path):
    shutil.copytree(weighted, tmp_path / "moved")
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "save_steps": 1, "logging_steps": 2}
    changes |= {"dataloader_num_workers": 1, "gradient_checkpointing": True, "max_steps": -1, "num_train_epochs": 0.5}
    rows = {name: Dataset.from_list(list(data)) for name, data in three_domains(8).items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "checkpoint-2")
    trainer = make_weighted(tmp_path / "moved", data=rows, model=model, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_a_checkpoint_that_does_not_say_of_which_run_it_is_still_resumes(weighted, tmp_path):
    shutil.copytree(weighted, tmp_path / "old")
    for file in (tmp_path / "old").rglob("run_identity.json"):
        file.unlink()
    trainer = make_weighted(tmp_path / "old", max_steps=5, learning_rate=0.02)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run_identity.json", "{"),
        ("run_identity.json", "[]"),
        ("run_identity.json", "null"),
        ("run_identity.json", '{"domains": 5}'),
        ("run_identity.json", '{"domains": []}'),
        ("domain_sampler.json", "{"),
        ("domain_sampler.json", "[]"),
        ("domain_sampler.json", "{}"),
        ("domain_sampler.json", '{"schedule": 3, "examples_per_step": 3}'),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named(weighted, tmp_path, file, content):
    shutil.copytree(weighted / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}' must be"):
        make_weighted(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_resumed_run_that_does_not_skip_what_it_was_trained_on_is_refused_or_told(weighted, tmp_path):
    with pytest.raises(ValueError, match="with `ignore_data_skip=True` it would train on the first of an epoch again"):
        make_weighted(weighted, max_steps=4, ignore_data_skip=True).train(
            resume_from_checkpoint=str(weighted / "checkpoint-2")
        )
    make_weighted(tmp_path, data=STREAMS, max_steps=2).train()
    again = make_weighted(tmp_path, data=STREAMS, max_steps=2, ignore_data_skip=True)
    with pytest.warns(UserWarning, match="ends otherwise than one that was not interrupted"):
        again.train(resume_from_checkpoint=True)


def test_a_half_written_checkpoint_of_a_weighted_trainer_is_passed_over(weighted, tmp_path):
    shutil.copytree(weighted, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": ')
    trainer = make_weighted(tmp_path / "cut", max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_a_checkpoint_that_is_half_written_over_an_older_one_is_not_whole(weighted, tmp_path):
    shutil.copytree(weighted, tmp_path / "run")

    class Failing(DomainWeightedTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if output_dir.endswith("checkpoint-4"):
                raise KeyboardInterrupt("here")
            super()._save_optimizer_and_scheduler(output_dir)

    trainer = make_weighted(tmp_path / "run", max_steps=4, learning_rate=0.02, trainer_class=Failing)
    with pytest.raises(KeyboardInterrupt, match="here"):
        trainer.train()
    assert resolve_checkpoint(True, str(tmp_path / "run"), learns=False).name == "checkpoint-2"


def test_rows_that_a_transform_draws_at_random_are_told_since_no_resumed_run_sees_them_again(tmp_path):
    def transform(draw):
        return lambda rows: {**rows, "input_ids": [[draw(), *row[1:]] for row in rows["input_ids"]]}

    rows = concatenate_datasets(
        [data.add_column("domain", [name] * len(data)) for name, data in three_domains(8).items()]
    )
    data = {"weights": WEIGHTS, "max_steps": 1}
    with pytest.warns(UserWarning, match="must give the same row each time, but its transform draws at random"):
        make_weighted(tmp_path, data=rows.with_transform(transform(lambda: random.randrange(30))), **data).train()
    make_weighted(tmp_path / "plain", data=rows.with_transform(transform(lambda: 3)), **data).train()
