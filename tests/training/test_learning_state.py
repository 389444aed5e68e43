"""What has been learned so far goes into a checkpoint and comes back as it was, or is refused by name."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from hf_doge.training.learning_state import STATE_FILE, TRAJECTORY_FILE, LearningState, TrajectoryPoint

NAMES = ("wiki", "web", "code")
RUN = {"recipe": {"mu": 0.1}, "num_rows": {"wiki": 1}}
STEPS = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64))


def draws(count):
    torch.manual_seed(0)
    return [STEPS.sample() for _ in range(count)]


def learned(count=5, burn_in_steps=2):
    state = LearningState.fresh(NAMES, torch.full((3,), 1 / 3, dtype=torch.float64))
    for step, weights in enumerate(draws(count), start=1):
        state.update(weights, torch.zeros(3), rate=1.0, burn_in_steps=burn_in_steps)
        state.points.append(TrajectoryPoint(step, 0.1 * step, weights, weights - 1, weights + 1))
    state.num_examples += torch.tensor([5, 6, 7])
    state.num_tokens += torch.tensor([50, 60, 70])
    state.described = {"training": {"seed": 1}, "model": {"class": "Tiny"}}
    state.nonfinite_steps, state.nonfinite_in_a_row, state.seconds = 4, 2, 1.5
    state.unlogged = {"last_scores": [[0.1, 0.2, 0.3]], "losses": [], "scores": [[0.1, 0.2, 0.3]]}
    return state


def assert_same(found, expected):
    for field in fields(LearningState):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "points":
            assert len(one) == len(other)
            for mine, theirs in zip(one, other, strict=True):
                assert (mine.step, mine.learning_rate) == (theirs.step, theirs.learning_rate)
                assert all(
                    torch.equal(getattr(mine, name), getattr(theirs, name)) for name in ("weights", "scores", "losses")
                )
        elif isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        else:
            assert one == other, field.name


def test_before_the_first_step_nothing_is_counted_and_the_mean_is_the_initial_weights():
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    state = LearningState.fresh(NAMES, weights)
    assert state.weights.tolist() == state.mean.tolist() == [0.5, 0.3, 0.2]
    assert (state.num_updates, state.num_averaged, state.nonfinite_steps, state.nonfinite_in_a_row) == (0, 0, 0, 0)
    assert state.num_examples.tolist() == state.num_tokens.tolist() == [0, 0, 0]
    assert (state.seconds, state.points, state.trajectory) == (0.0, [], None)
    state.weights += 1
    state.num_examples += 1
    assert state.mean.tolist() == weights.tolist() == [0.5, 0.3, 0.2]  # none of them shares its memory
    assert state.num_tokens.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("count", "burn_in_steps"), [(5, 0), (5, 2), (5, 4), (5, 5), (3, 7)])
def test_the_mean_is_that_of_the_updates_past_the_burn_in_and_within_it_the_last_weights(count, burn_in_steps):
    state, weights = learned(count, burn_in_steps), draws(count)
    averaged = weights[burn_in_steps:] or weights[-1:]
    torch.testing.assert_close(state.mean, torch.stack(averaged).mean(dim=0), rtol=1e-12, atol=0)
    assert (state.num_updates, state.num_averaged) == (count, max(0, count - burn_in_steps))
    assert torch.equal(state.weights, weights[-1])


def test_a_state_comes_back_as_it_was_saved(tmp_path):
    learned().save(tmp_path, step=5, run=RUN)
    assert_same(LearningState.load(tmp_path, NAMES), learned())
    told = json.loads((tmp_path / STATE_FILE).read_text())
    assert (told["step"], told["num_processes"], told["run"]) == (5, 1, RUN)
    trajectory = LearningState.load(tmp_path, NAMES).trajectory
    assert trajectory.domains == NAMES
    np.testing.assert_array_equal(trajectory.learning_rates, [0.1 * step for step in range(1, 6)])
    fresh = LearningState.fresh(NAMES, torch.full((3,), 1 / 3, dtype=torch.float64))
    (tmp_path / "fresh").mkdir()
    fresh.save(tmp_path / "fresh", step=0, run=RUN)
    assert not (tmp_path / "fresh" / TRAJECTORY_FILE).exists()
    assert_same(LearningState.load(tmp_path / "fresh", NAMES), fresh)


def test_what_an_earlier_version_did_not_write_down_is_no_difference(tmp_path):
    learned().save(tmp_path, step=5, run={})
    content = json.loads((tmp_path / STATE_FILE).read_text())
    del content["seconds"], content["described"]
    (tmp_path / STATE_FILE).write_text(json.dumps(content))
    loaded = LearningState.load(tmp_path, NAMES)
    assert (loaded.seconds, loaded.described) == (0.0, None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("web", "wiki", "code"), r"written for the domains \['web', 'wiki', 'code'\], but was written for"),
        (("wiki", "web"), r"\(gone: \['code'\], new: \[\]\)"),
        ((*NAMES, "math"), r"\(gone: \[\], new: \['math'\]\)"),
    ],
)
def test_a_state_of_other_domains_is_refused_by_what_differs(tmp_path, names, message):
    learned().save(tmp_path, step=5, run=RUN)
    with pytest.raises(ValueError, match=message):
        LearningState.load(tmp_path, names)


def test_a_state_of_another_format_and_a_trajectory_that_is_cut_off_are_refused(tmp_path):
    learned().save(tmp_path, step=5, run=RUN)
    trajectory = tmp_path / TRAJECTORY_FILE
    trajectory.write_bytes(trajectory.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match="must hold the trajectory up to the checkpoint, but it is missing, altered or cut"
    ):
        LearningState.load(tmp_path, NAMES)
    content = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(ValueError, match="must have format version 1, but has 2"):
        LearningState.load(tmp_path, NAMES)
