"""At the end of a training the trainer says where its weights say nothing, and what to change."""

import logging

import pytest

from tests.training.test_shrinkage import siblings
from tests.training.test_spread import learn as learn_to_target
from tests.training.test_undecided import learn

OPTIONS = {"stop_when_undecided": False, "save_strategy": "no", "max_steps": 14}


def told(caplog):
    return [
        one.getMessage()
        for one in caplog.records
        if one.levelno == logging.WARNING and "domain weights." in one.getMessage()
    ]


def test_a_run_that_tells_no_domains_apart_says_so_and_how_to_tell_more(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = learn(tmp_path, siblings(), per_device_train_batch_size=12, **OPTIONS)
    (text,) = told(caplog)
    assert "Weights that this run cannot tell apart" in text
    assert "`per_device_target_batch_size`" in text
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
