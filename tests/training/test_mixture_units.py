"""Trainers on weights that are shares of tokens, and on weights that change at parts of the training."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.cli.train import MixtureArguments
from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.mixture_state import phases_by_draw
from hf_doge.training.trainer import DoGETrainer
from tests.launch import run_processes
from tests.one_layer import tiny_bert, tiny_llama
from tests.tiny import three_domains, tiny_classifier, tiny_tokenizer, tokens
from tests.training import units_processes
from tests.training.metrics_processes import read_told
from tests.training.mixture_processes import Line, NotingTrainer, SaveAt, domains, expected_rows
from tests.training.mixture_processes import arguments as line_arguments
from tests.training.test_mixture import arguments
from tests.training.units_processes import THEN, WEIGHTS, Smallest, pad, train

pytestmark = pytest.mark.timeout(600)  # processes learn in the setup of the first test that reads what they left
SHORT = {"max_steps": 200, "logging_steps": 100}  # on two processes, where a step takes long


def shares(logs, step):
    tokens = {name: logs[step][f"domain_tokens/{name}"] for name in WEIGHTS}
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    plan = [
        {"name": "datasets", "folder": str(folder / "datasets"), "save_at": [150], **SHORT},
        {"name": "streams", "folder": str(folder / "streams"), "streamed": True, **SHORT},
        {
            "name": "resumed",
            "folder": str(folder / "datasets"),
            "resume": str(folder / "datasets" / "checkpoint-150"),
            **SHORT,
        },
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    run_processes(Path(units_processes.__file__), folder / "plan.json")
    return folder


@pytest.mark.parametrize("kind", ["datasets", "streams"])
def test_after_a_thousand_steps_shares_of_tokens_are_the_weights_and_two_processes_draw_what_one_draws(
    on_two_processes, tmp_path, kind
):
    one, two = train(tmp_path, streamed=kind == "streams", logging_steps=100), read_told(on_two_processes, kind)
    assert shares(one, 1000) == pytest.approx(WEIGHTS, abs=0.005)
    assert two == {step: one[step] for step in (100, 200)}
    told = {name: one[1000][f"domain_share/{name}"] for name in WEIGHTS}
    assert told == pytest.approx(WEIGHTS, abs=0.01)  # of the last 100 steps alone


def test_a_resumed_run_draws_the_tokens_of_an_uninterrupted_one(on_two_processes, tmp_path):
    whole, checkpoint = read_told(on_two_processes, "datasets"), on_two_processes / "datasets" / "checkpoint-150"
    assert train(tmp_path, resume=str(checkpoint), **SHORT) == whole
    assert read_told(on_two_processes, "resumed") == whole


def test_phases_by_tokens_begin_with_their_step(tmp_path):
    for streamed in (False, True):
        logs = train(
            tmp_path, streamed=streamed, weights=[(0, WEIGHTS), (0.5, THEN)], max_steps=200, logging_steps=100
        )
        for step, expected in ((100, WEIGHTS), (200, THEN)):
            assert {n: logs[step][f"domain_share/{n}"] for n in WEIGHTS} == pytest.approx(expected, abs=0.01)


LATER = {"wiki": 0.1, "code": 0.1, "arxiv": 0.8}
EARLIER = {"wiki": 0.5, "code": 0.3, "arxiv": 0.2}
PHASES = [(0, EARLIER), (0.5, LATER)]


def noting(tmp_path, weights=PHASES, **options):
    args = line_arguments(tmp_path, num_processes=1, max_steps=11, lr_scheduler_type="constant", **options)
    trainer = NotingTrainer(Line(), args, train_dataset=domains(), domain_weights=weights)
    trainer.micro_batches, trainer.leads = [], []
    return trainer


def test_a_phase_begins_with_the_first_step_that_has_its_part_before_it(tmp_path):
    trainer = noting(tmp_path)
    trainer.train()
    rows = [row for batch in trainer.micro_batches for row in batch]
    assert rows == expected_rows(0, 44, weights=EARLIER, changes=[(6 * 4, LATER)])  # 6 of 11 steps before it


@pytest.mark.parametrize("step", [3, 8])
def test_a_run_in_phases_is_resumed_in_the_phase_that_it_was_in(tmp_path, step):
    whole = noting(tmp_path)
    whole.add_callback(SaveAt([step]))
    whole.train()
    resumed = noting(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.micro_batches == whole.micro_batches[step:]


@pytest.mark.parametrize("weights", [EARLIER, [(0, EARLIER), (0.6, LATER)], [(0, EARLIER), (0.5, EARLIER)]])
def test_a_run_goes_on_through_its_own_phases_only(tmp_path, weights):
    trainer = noting(tmp_path)
    trainer.add_callback(SaveAt([3]))
    trainer.train()
    with pytest.raises(ValueError, match=r"must go on as it began, but the checkpoint .* has .*'phases'"):
        noting(tmp_path, weights).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "run_identity.json").unlink()  # as of a version that knew no phases
    if weights is not EARLIER:
        with pytest.raises(ValueError, match="must go on through the phases it began with"):
            noting(tmp_path, weights).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_phases_follow_the_number_of_steps_that_is_set_later(tmp_path):
    trainer = noting(tmp_path)
    trainer.args.max_steps = 8
    trainer.train()
    rows = [row for batch in trainer.micro_batches for row in batch]
    assert rows == expected_rows(0, 32, weights=EARLIER, changes=[(4 * 4, LATER)])


def test_the_number_of_steps_of_streams_in_phases_stays(tmp_path):
    streams = {name: data.to_iterable_dataset() for name, data in three_domains().items()}
    first, then = dict.fromkeys(streams, 1.0), {**dict.fromkeys(streams, 1.0), "code": 5.0}
    trainer = DomainWeightedTrainer(
        tiny_llama(), arguments(tmp_path), train_dataset=streams, domain_weights=[(0, first), (0.5, then)]
    )
    trainer.args.max_steps = 9
    with pytest.raises(ValueError, match="`max_steps` must stay what the trainer was made with, 5, but is 9"):
        trainer.train()


@pytest.mark.parametrize("phases", [[0.8], [0.55, 0.7]])
def test_streams_have_the_phases_that_begin_with_a_step_of_theirs(tmp_path, phases):
    args = line_arguments(tmp_path, num_processes=1, max_steps=4)
    planned, _ = phases_by_draw([(0, "first"), *((one, f"from {one}") for one in phases)], args)
    assert planned == [(0, "first")] + ([(0.75, "from 0.7")] if 0.7 in phases else [])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([(0.5, EARLIER)], "The first phase must begin at 0"),
        ([(0, EARLIER), (0.8, LATER), (0.4, EARLIER)], "in the order in which they begin"),
        ([(0, EARLIER), (-0.2, LATER)], "at least 0 and below 1"),
        ([(0, EARLIER), (0.5, {"wiki": 1.0})], "Every domain of the data needs a weight"),
    ],
)
def test_bad_phases_are_refused_when_the_trainer_is_made(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        noting(tmp_path, weights)


# Units


def of_two_lengths(unit=None, lengths=(40, 10)):
    data = {n: Dataset.from_dict({"input_ids": [[1] * k] * 8}) for n, k in zip(("a", "b"), lengths, strict=True)}
    return data, DomainWeights({"a": 0.5, "b": 0.5}, recipe={"unit": unit} if unit else None)


def make(tmp_path, data, weights, **options):
    return DomainWeightedTrainer(
        Smallest(), arguments(tmp_path), train_dataset=data, domain_weights=weights, data_collator=pad, **options
    )


def test_weights_learned_in_tokens_on_rows_of_unequal_length_are_told(tmp_path, recwarn):
    data, weights = of_two_lengths("tokens")
    with pytest.warns(
        UserWarning, match=r"'a' has weight 0.500 and comes to 0.800 of the tokens. Pass `unit='tokens'`"
    ) as told:
        make(tmp_path, data, weights)
    assert told[0].filename == __file__  # where the trainer is made
    recwarn.clear()
    make(tmp_path, data, weights, unit="tokens")
    make(tmp_path, data, of_two_lengths("examples")[1])
    make(tmp_path, data, of_two_lengths()[1])
    make(tmp_path, of_two_lengths(lengths=(9, 9))[0], weights)
    assert not [one for one in recwarn if "shares of tokens" in str(one.message)]


def test_weights_in_tokens_need_rows_that_tell_theirs(tmp_path):
    data = {"a": Dataset.from_dict({"text": ["one"] * 8, "row": [1] * 8})}
    with pytest.raises(ValueError, match="Weights in tokens need rows whose tokens can be counted"):
        make(tmp_path, data, {"a": 1.0}, unit="tokens")
    streams = {name: one.to_iterable_dataset() for name, one in data.items()}
    with pytest.raises(ValueError, match="Weights in tokens need rows whose tokens can be counted"):
        make(tmp_path, streams, {"a": 1.0}, unit="tokens")
    with pytest.raises(ValueError, match="`unit` must be one of"):
        make(tmp_path, of_two_lengths()[0], {"a": 0.5, "b": 0.5}, unit="words")


@pytest.mark.parametrize(("model", "tokens"), [(tiny_llama, 7), (tiny_bert, 8)])
def test_the_first_token_counts_where_the_model_predicts_it(tmp_path, model, tokens):
    """The tokens of a row are those that its loss counts, which the logs count too."""
    data = three_domains(4)
    weights = dict.fromkeys(data, 1.0)
    trainer = DomainWeightedTrainer(
        model(), arguments(tmp_path, max_steps=1), train_dataset=data, domain_weights=weights, unit="tokens"
    )
    assert trainer._drawn["lengths"].tolist() == [tokens] * 12
    trainer.train()
    assert sum(trainer.state.log_history[0][f"domain_tokens/{name}"] for name in data) == 4 * tokens


def test_the_artifact_tells_the_unit(tmp_path):
    facts = {"a": {"num_tokens": 10}, "b": {"num_tokens": 30}}
    assert DomainWeights.natural(facts).unit == "tokens"
    assert DomainWeights.uniform(facts).unit is None
    DomainWeights({"a": 1.0}, recipe={"name": "mine", "unit": "examples"}).save_pretrained(tmp_path)
    assert DomainWeights.from_pretrained(tmp_path).unit == "examples"


def doge_trainer(tmp_path, **options):
    own = {"mode": options.pop("mode")} if "mode" in options else {}
    args = arguments(tmp_path, DoGEConfig, per_device_train_batch_size=6, max_steps=1, **own)
    return DoGETrainer(tiny_llama(), args, train_dataset=three_domains(8), **options)


@pytest.mark.parametrize(
    ("options", "unit"),
    [({}, "tokens"), ({"mode": "online"}, "examples"), ({"mode": "online", "unit": "tokens"}, "tokens")],
)
def test_learned_weights_tell_the_unit_that_they_were_learned_in(tmp_path, options, unit):
    """A proxy weighs mean losses of tokens, whatever the lengths of its rows; online, weights draw."""
    trainer = doge_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.domain_weights.unit == unit


def test_weights_learned_from_one_label_an_example_are_shares_of_examples(tmp_path, recwarn):
    """A classifier's loss counts an example once, however long its text is, so nobody is sent to `unit="tokens"`."""
    lengths = {"short": 4, "long": 12}
    data = {
        name: Dataset.from_dict({"input_ids": tokens(8, length=length).tolist(), "label": [0, 1, 2, 0] * 2})
        for name, length in lengths.items()
    }
    options = {"train_dataset": data, "data_collator": DataCollatorWithPadding(tiny_tokenizer())}
    args = arguments(tmp_path, DoGEConfig, per_device_train_batch_size=6, max_steps=1)
    learner = DoGETrainer(tiny_classifier(), args, **options)
    learner.train()
    weights = learner.domain_weights
    assert weights.unit == "examples"
    DomainWeightedTrainer(tiny_classifier(), arguments(tmp_path), domain_weights=weights, **options)
    assert not [one for one in recwarn if "shares of tokens" in str(one.message)]


def test_a_proxy_does_not_draw_by_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"A proxy sees the same number of examples .* but got None and 'tokens'"):
        doge_trainer(tmp_path, unit="tokens")


# The command


def test_the_command_reads_phases():
    flags = MixtureArguments(weights="uniform", phases=["0.8=natural", "0.95=folder=x"])
    assert flags.read_phases() == [(0.0, "uniform"), (0.8, "natural"), (0.95, "folder=x")]
    assert MixtureArguments(weights="uniform").read_phases() == [(0.0, "uniform")]


@pytest.mark.parametrize("phase", ["natural", "0.8", "0.8=", "late=natural"])
def test_a_phase_without_part_or_weights_is_refused(phase):
    with pytest.raises(ValueError, match=r"`--phases` must be parts of the training and weights, as in 0.8=natural"):
        MixtureArguments(weights="uniform", phases=[phase]).read_phases()
