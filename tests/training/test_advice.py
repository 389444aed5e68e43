"""At the end of a training the trainer says where its weights say nothing, and what to change."""

import logging

import numpy as np
import pytest
from transformers import TrainerCallback

from hf_doge.artifacts.cards.weights import advise
from hf_doge.artifacts.record import Trajectory, WeightsRecord
from hf_doge.artifacts.score_noise import undecided_groups
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_llama
from tests.tiny import three_domains
from tests.training.test_shrinkage import siblings
from tests.training.test_spread import SHORT
from tests.training.test_spread import learn as learn_to_target
from tests.training.test_undecided import learn

OPTIONS = {"stop_when_undecided": False, "save_strategy": "no", "max_steps": 14}


def told(caplog, level=logging.WARNING):
    return [
        one.getMessage() for one in caplog.records if one.levelno == level and "domain weights." in one.getMessage()
    ]


def test_a_run_that_tells_no_domains_apart_says_so_and_how_to_tell_more(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = learn(tmp_path, siblings(), per_device_train_batch_size=12, **OPTIONS)
    assert not told(caplog)  # where all domains count alike equal parts are what to expect
    (text,) = told(caplog, logging.INFO)
    assert "Weights that this run cannot tell apart" in text
    assert "As a rule equal parts are best then" in text
    assert "(ten or more of each domain in the train batch)" in text
    assert "So no two domains are told apart for sure." in " ".join(trainer.domain_weights.summary().split())
    assert "So no two domains are told apart for sure." in trainer.domain_weights._repr_html_()


def test_a_mu_that_left_no_room_is_told_whatever_the_recipe(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        learn_to_target(tmp_path, recipe="paper", mu=1.0, **OPTIONS)
    (text,) = told(caplog)
    assert "sums of the scores times the learning rate differ by" in text
    assert "less than mu (1)" in text


@pytest.mark.parametrize("options", [{}, {"recipe": "paper", "mu": 1e-9}])
def test_a_run_whose_weights_follow_its_scores_warns_of_nothing(tmp_path, caplog, options):
    with caplog.at_level(logging.WARNING):
        learn_to_target(tmp_path, **options, **OPTIONS)
    assert not told(caplog)


class Stop(TrainerCallback):
    """Ends a run after its twelfth step, as a machine that is taken away does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 12


def test_a_run_that_stops_before_its_end_is_told_of_once_it_has_ended(tmp_path, caplog):
    args = DoGEConfig(
        str(tmp_path), **{**SHORT, "recipe": "paper", "mu": 1.0, "save_steps": 12, "per_device_train_batch_size": 6}
    )
    data = {"train_dataset": three_domains(16), "target_dataset": three_domains(12)["code"]}
    with caplog.at_level(logging.WARNING):
        DoGETrainer(tiny_llama(), args, callbacks=[Stop()], **data).train()
        assert not told(caplog)
        DoGETrainer(tiny_llama(), args, **data).train(resume_from_checkpoint=True)
    assert len(told(caplog)) == 1


def record_of(shares, scores, **recipe):
    """Weights that stay as they are, with the scores of each step."""
    steps, kept = np.arange(1, len(scores) + 1), np.tile(list(shares.values()), (len(scores), 1))
    return WeightsRecord(
        shares,
        trajectory=Trajectory(tuple(shares), steps, np.ones(len(scores)), kept, scores, scores),
        recipe={"name": "doge_plus", "mu": 1.0, "score_metric": "optimizer"} | recipe,
    )


def test_a_domain_without_weight_or_without_scores_leaves_a_run_that_tells_no_others_apart_undecided():
    scores = np.random.default_rng(0).normal(size=(20, 4))
    scores[:, 3] = np.nan
    weights = record_of({"a": 0.35, "b": 0.35, "idle": 0.0, "never seen": 0.3}, scores, min_spread=6.0)
    assert "So no two domains are told apart for sure." in advise(weights, undecided_groups(weights))
    assert "`per_device_target_batch_size`" in advise(weights, undecided_groups(weights))


def test_a_domain_without_weight_does_not_say_what_room_mu_left_the_others():
    weights = record_of({"a": 0.55, "b": 0.45, "idle": 0.0}, np.tile([0.02, 0.01, 5.0], (20, 1)))
    assert "differ by 0.2, less than mu (1)" in advise(weights, undecided_groups(weights))


def test_a_run_too_short_to_tell_noise_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = learn_to_target(tmp_path, **{**OPTIONS, "max_steps": 6})
    (text,) = told(caplog)
    assert "6 updates" in text
    assert "`max_steps`" in text
    assert "6 updates" in trainer.domain_weights.summary()
