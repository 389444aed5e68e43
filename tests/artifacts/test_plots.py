"""The pictures: everything is on them, nothing overlaps, and colour is never needed."""

import itertools
import math
import os
import sys

import numpy as np
import pytest
import torch

from hf_doge.artifacts import DomainWeights, Trajectory
from hf_doge.artifacts.score_noise import undecided_groups, weight_noise
from hf_doge.plots import plot_comparison, plot_domain_weights, plot_sweep
from hf_doge.training.score_noise import ScoreNoise

pytest.importorskip("matplotlib")


def make_weights(num_domains, *, num_steps=40, with_trajectory=True, with_tokens=True):
    generator = np.random.default_rng(num_domains)
    names = [f"domain {i}" if i % 7 else f"a rather long name of a domain, number {i}" for i in range(num_domains)]
    logits = generator.normal(scale=0.3, size=(num_steps, num_domains)).cumsum(axis=0)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    unknown = np.full_like(weights, np.nan)
    trajectory = Trajectory(names, np.arange(1, num_steps + 1), np.ones(num_steps), weights, unknown, unknown)
    return DomainWeights(
        dict(zip(names, weights.mean(axis=0).tolist(), strict=True)),
        trajectory=trajectory if with_trajectory else None,
        domains={name: {"num_tokens": 100 + i} for i, name in enumerate(names)} if with_tokens else None,
    )


def make_table(mixtures=("uniform", "natural", "learned"), domains=("wiki", "web"), *, std=0.1):
    return [
        {"mixture": mixture, "domain": domain, "mean": 10.0 + i + j, "std": std}
        for i, mixture in enumerate(mixtures)
        for j, domain in enumerate(domains)
    ]


def texts_of(axes):
    return [text.get_text() for text in [*axes.get_yticklabels(), *axes.texts]]


def assert_no_overlap(texts):
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert boxes
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


@pytest.mark.parametrize("num_domains", [1, 3, 8, 50])
def test_no_label_overlaps_another_and_every_domain_has_its_bar(num_domains):
    weights = make_weights(num_domains)
    figure = plot_domain_weights(weights)
    figure.canvas.draw()
    trajectory, bars = figure.axes
    for axes in (trajectory, bars):
        assert_no_overlap(axes.texts)
        assert_no_overlap(axes.get_yticklabels())
    assert len(bars.patches) == num_domains
    assert [patch.get_width() for patch in bars.patches] == sorted(weights.mean.values(), reverse=True)


def test_every_label_lies_inside_the_picture():
    figure = plot_domain_weights(make_weights(50))
    figure.canvas.draw()
    trajectory, bars = figure.axes
    width, height = figure.canvas.get_width_height()
    for text in [*trajectory.texts, *bars.texts, *bars.get_yticklabels(), *bars.get_legend().get_texts()]:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


def test_lines_differ_by_dash_and_marker_so_that_colour_is_not_needed():
    figure = plot_domain_weights(make_weights(8))
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 40]
    assert len(lines) == 8
    assert len({line.get_marker() for line in lines}) == 8
    assert len({line.get_linestyle() for line in lines}) == 4


def test_the_trajectory_names_the_heaviest_domains_and_counts_the_rest():
    weights = make_weights(50)
    labels = texts_of(plot_domain_weights(weights).axes[0])
    heaviest = sorted(weights.mean, key=weights.mean.get, reverse=True)[:7]
    for name in heaviest:
        assert any(label.rstrip("…") == name[: len(label.rstrip("…"))] for label in labels if label)
    assert "43 smaller domains" in labels


def test_the_bars_stand_against_uniform_and_natural_proportions():
    weights = make_weights(3)
    _, bars = plot_domain_weights(weights).axes
    uniform, natural = bars.lines
    assert list(uniform.get_xdata()) == [1 / 3, 1 / 3]
    by_weight = sorted(weights.mean, key=weights.mean.get, reverse=True)
    assert list(natural.get_xdata()) == [weights.natural_proportions[name] for name in by_weight]
    legend = [text.get_text() for text in bars.get_legend().get_texts()]
    assert legend == ["weight", "uniform (1/3)", "natural (share of the tokens)"]


def test_what_is_not_known_is_not_drawn():
    figure = plot_domain_weights(make_weights(3, with_trajectory=False, with_tokens=False))
    (bars,) = figure.axes
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["weight", "uniform (1/3)"]


def test_a_trajectory_of_one_step_is_drawn():
    figure = plot_domain_weights(make_weights(3, num_steps=1))
    figure.canvas.draw()
    points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert len(points) == 3


def test_names_are_never_read_as_formulas(tmp_path):
    weights = DomainWeights({"$x_{": 0.5, "a$b$": 0.5})
    weights.plot(tmp_path / "weights.svg")
    plot_comparison(make_table(mixtures=("$x_{", "b"), domains=("$\\", "c$")), tmp_path / "comparison.svg")
    for name, texts in (("weights", ("$x_{", "a$b$")), ("comparison", ("$x_{", "$\\", "c$"))):
        picture = (tmp_path / f"{name}.svg").read_text()  # names the text of each label in a comment
        assert [text for text in texts if f"<!-- {text} -->" not in picture] == []


def test_the_picture_is_written_where_it_should_be_and_returned(tmp_path):
    figure = make_weights(3).plot(tmp_path / "new" / "weights.png")
    assert (tmp_path / "new" / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.png"]
    assert len(figure.axes) == 2
    make_weights(3).plot(tmp_path / "weights.svg")
    assert b"<svg" in (tmp_path / "weights.svg").read_bytes()


def test_an_interrupted_write_leaves_the_old_picture(tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt("stopped by the test")

    (tmp_path / "weights.png").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        make_weights(3).plot(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes() == b"old"


def test_drawing_leaves_pyplot_alone():
    from matplotlib._pylab_helpers import Gcf

    before = Gcf.get_all_fig_managers()
    make_weights(3).plot()
    plot_comparison(make_table())
    assert Gcf.get_all_fig_managers() == before


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "hf_doge.figure_plots", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'hf-doge\[plot\]'"):
        make_weights(3).plot()


@pytest.mark.parametrize(("num_mixtures", "num_domains"), [(1, 1), (3, 8), (8, 3), (4, 50)])
def test_every_mixture_has_a_mark_with_its_spread_in_every_domain(num_mixtures, num_domains):
    table = make_table([f"m{i}" for i in range(num_mixtures)], [f"d{i}" for i in range(num_domains)])
    figure = plot_comparison(table)
    figure.canvas.draw()
    absolute, relative = figure.axes
    assert_no_overlap(absolute.get_yticklabels())
    for i, container in enumerate(absolute.containers):
        assert list(container.lines[0].get_xdata()) == [row["mean"] for row in table if row["mixture"] == f"m{i}"]
        assert container.has_xerr
    assert len({container.lines[0].get_marker() for container in absolute.containers}) == num_mixtures
    np.testing.assert_array_equal(relative.containers[0].lines[0].get_xdata(), np.zeros(num_domains))


def test_marks_of_one_domain_never_lie_on_each_other():
    absolute, _ = plot_comparison(make_table(std=None)).axes
    heights = [container.lines[0].get_ydata() for container in absolute.containers]
    assert (np.diff(heights, axis=0) > 0).all()
    assert np.ptp(heights, axis=0).max() < 1


def test_the_change_is_counted_in_percent_of_the_first_mixture():
    table = [
        {"mixture": "uniform", "domain": "wiki", "mean": 20.0, "std": 1.0},
        {"mixture": "learned", "domain": "wiki", "mean": 18.0, "std": 0.5},
    ]
    _, relative = plot_comparison(table).axes
    assert relative.containers[1].lines[0].get_xdata() == pytest.approx([-10.0])
    (bar,) = relative.containers[1].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 0], [-12.5, -7.5])


@pytest.mark.parametrize("std", [None, math.nan])
def test_a_single_seed_has_no_spread_to_explain(std):
    assert plot_comparison(make_table(std=std)).get_supxlabel() == ""
    assert plot_comparison(make_table(std=0.1)).get_supxlabel() != ""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], r"1 to 8 mixtures, but got 0"),
        (make_table([f"m{i}" for i in range(9)]), r"1 to 8 mixtures, but got 9: \['m0'"),
        (make_table() + make_table()[:1], "'uniform' has 'wiki' twice"),
        (make_table()[:-1], "'learned' lacks 'web'"),
        (
            [{"mixture": "uniform", "domain": "wiki", "mean": math.nan, "std": 0.1}],
            "but got nan for 'uniform' on 'wiki'",
        ),
        ([{"mixture": "uniform", "domain": "wiki", "mean": 0.0, "std": 0.1}], "`mean` must be a finite number > 0"),
        ([{"mixture": "uniform", "domain": "wiki"}], r"row 0 has \['domain', 'mixture'\], without \['mean', 'std'\]"),
    ],
)
def test_a_table_that_is_no_comparison_is_refused_by_name(table, message):
    with pytest.raises(ValueError, match=message):
        plot_comparison(table)


def test_runs_that_are_none_of_a_sweep_are_refused_by_name():
    with pytest.raises(ValueError, match="at least one run to draw"):
        plot_sweep([])
    with pytest.raises(ValueError, match=r"without \['predicted', 'predicted_left_out'\]"):
        plot_sweep([{"objective": 1.0}])


def noisy_weights(num_domains=3, *, num_steps=40, mu=10.0, **recipe):
    """Weights that follow from their scores by the update, from uniform ones."""
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(num_steps, num_domains)) * np.arange(1, num_domains + 1)
    logits = scores.cumsum(axis=0) / mu
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    names = [f"d{number}" for number in range(num_domains)]
    steps = np.arange(1, num_steps + 1)
    trajectory = Trajectory(names, steps, np.full(num_steps, 0.5), weights, scores, np.ones_like(scores))
    return DomainWeights(
        dict(zip(names, weights.mean(axis=0).tolist(), strict=True)),
        last=dict(zip(names, weights[-1].tolist(), strict=True)),
        trajectory=trajectory,
        recipe={"name": "doge_plus", "mu": mu, "score_metric": "optimizer"} | recipe,
    )


def bands(figure):
    """Steps, lower and upper edge of each band, in the order of the lines."""
    found = []
    for band in figure.axes[0].collections:
        edge = band.get_paths()[0].vertices
        steps = np.unique(edge[:, 0])
        found.append((steps, *(np.array([f(edge[edge[:, 0] == x, 1]) for x in steps]) for f in (np.min, np.max))))
    return found


def test_the_band_of_a_weight_is_where_the_noise_of_the_scores_alone_could_have_led_it(tmp_path):
    weights = noisy_weights()
    weights.save_pretrained(tmp_path / "saved", plot=True)
    weights = DomainWeights.from_pretrained(tmp_path / "saved")
    figure, trajectory = weights.plot(), weights.trajectory
    assert figure.axes[0].get_xlabel() == "step (bands: noise of the scores, two standard deviations)"
    shrunk = noisy_weights(shrinkage=True).plot().axes[0].get_xlabel()
    assert shrunk == "step (bands: noise of the scores before shrinkage, two standard deviations)"
    apart = trajectory.scores - (trajectory.weights * trajectory.scores).sum(axis=1, keepdims=True)
    squares = np.diff(apart, axis=0) ** 2 / 2
    noise = np.sqrt(np.vstack([squares[:1], squares]).cumsum(axis=0)) / 10
    heaviest_first = np.argsort([-weights.mean[name] for name in trajectory.domains])
    drawn = bands(figure)
    assert len(drawn) == 3
    for column, (steps, low, high) in zip(heaviest_first, drawn, strict=True):
        np.testing.assert_array_equal(steps, trajectory.steps)
        line, factor = trajectory.weights[:, column], np.exp(2 * noise[:, column])
        np.testing.assert_allclose(low, line / factor, rtol=1e-9)
        np.testing.assert_allclose(high, np.minimum(line * factor, 1), rtol=1e-9)
    assert drawn[0][2][-1] / drawn[0][1][-1] > drawn[0][2][0] / drawn[0][1][0]  # it widens


def test_the_noise_of_a_weight_is_its_spread_over_runs_whose_scores_are_noise():
    """Against the spread itself, of two hundred runs without any signal."""
    draw, found, logs = np.random.default_rng(1), [], []
    for _ in range(200):
        scores = draw.normal(size=(60, 3))
        logits = scores.cumsum(axis=0) / 100
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        one = noisy_weights(num_steps=60, mu=100.0)
        one.trajectory.scores, one.trajectory.weights = scores, weights
        found.append(weight_noise(one))
        logs.append(np.log(weights))
    np.testing.assert_allclose(np.mean(found, axis=0)[[9, 59]], np.std(logs, axis=0)[[9, 59]], rtol=0.15)


def weights_of_run(scores, shares, **recipe):
    """Those of a run with these scores, and these weights after each."""
    weights = noisy_weights(scores.shape[1], num_steps=len(scores), **recipe)
    weights.trajectory.scores, weights.trajectory.weights = scores, shares
    weights.mean = dict(zip(weights.trajectory.domains, shares.mean(axis=0).tolist(), strict=True))
    return weights


def test_a_domain_of_much_noise_does_not_hide_that_quiet_ones_are_told_apart():
    draw = np.random.default_rng(0)
    scores = np.array([0.08, 0.03, 0.0]) + draw.normal(size=(100, 3)) * np.array([0.2, 0.01, 0.01])
    logits = scores.cumsum(axis=0)
    weights = weights_of_run(scores, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), mu=1.0)
    assert list(weights.mean) == sorted(weights.mean, key=weights.mean.get, reverse=True)
    assert undecided_groups(weights) == [["d0", "d1"]]


def shrunk_weights(scores):
    """Those that a run makes of its scores, at a mu of 1."""
    initial = torch.full((scores.shape[1],), 1 / scores.shape[1])
    noise, shares = ScoreNoise(initial, window=100, shrinks=True), []
    for one in torch.as_tensor(scores):
        noise.take(one, 1.0)
        shares.append(noise.shrink(initial).numpy())
    return weights_of_run(scores, np.array(shares), mu=1.0, shrinkage=True)


def test_shrunk_weights_are_told_apart_by_what_moved_them_and_noise_alone_seldom_does():
    """Over twelve runs: the weights themselves are nearer than the noise of what moved them."""
    told = {"signal": 0, "by the weights": 0, "noise": 0}
    for seed in range(12):
        noise = np.random.default_rng(seed).normal(scale=0.1, size=(200, 3))
        told["noise"] += len(undecided_groups(shrunk_weights(noise))[0]) < 3
        weights = shrunk_weights(noise + np.array([0.03, 0.0, 0.0]))
        told["signal"] += ["d1", "d2"] in map(sorted, undecided_groups(weights))
        weights.recipe["shrinkage"] = False
        told["by the weights"] += ["d1", "d2"] in map(sorted, undecided_groups(weights))
    assert told["noise"] <= 2
    assert told["signal"] >= 5 > told["by the weights"] + 2


def test_where_mu_changes_all_scores_so_far_are_over_that_of_the_step():
    constant, falling = noisy_weights(), noisy_weights()
    falling.trajectory.mus = np.geomspace(10, 1, len(falling.trajectory.steps))
    ratio = constant.recipe["mu"] / falling.trajectory.mus
    np.testing.assert_allclose(weight_noise(falling), ratio[:, None] * weight_noise(constant))


def test_weights_are_told_apart_by_the_spread_of_their_means_over_runs_where_mu_falls():
    """Two domains without a signal: their mean weights differ by more than told in one run of twenty, about."""
    draw, mus, num_apart = np.random.default_rng(3), np.geomspace(100, 10, 60), 0
    for _ in range(200):
        scores = draw.normal(size=(60, 3))
        logits = scores.cumsum(axis=0) / mus[:, None]
        one = weights_of_run(scores, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), mu=100.0)
        one.trajectory.mus = mus
        groups = undecided_groups(one)
        num_apart += sum(map(len, groups)) < 3
    assert num_apart < 200 * 0.15  # of three pairs; by the mu of the recipe nearly all


def _without_mu():
    weights = noisy_weights()
    del weights.recipe["mu"]
    return weights


@pytest.mark.parametrize("weights", [noisy_weights(num_steps=9), _without_mu(), make_weights(3)])
def test_without_known_noise_there_is_no_band(weights):
    figure = weights.plot()
    assert bands(figure) == []
    assert figure.axes[0].get_xlabel() == "step"


def test_noise_beyond_all_bounds_is_drawn_as_the_whole_panel():
    (_, low, high), *_ = bands(noisy_weights(mu=1e-6).plot())
    assert np.isfinite([low, high]).all()
    assert high.max() <= 1


def test_of_a_recorded_part_of_the_updates_each_stands_for_as_many():
    every, tenth = noisy_weights(), noisy_weights(arguments={"trajectory_steps": 10})
    np.testing.assert_allclose(weight_noise(tenth), 10**0.5 * weight_noise(every))


def test_what_cannot_be_told_apart_follows_the_mean_that_was_taken():
    draw = np.random.default_rng(3)
    scores = 0.5 * draw.normal(size=(40, 2))
    scores[:, 0] += 0.3

    def groups(ratio, **recipe):
        one = noisy_weights(2, **recipe)
        one.trajectory.scores = scores
        one.mean = {"d0": ratio / (1 + ratio), "d1": 1 / (1 + ratio)}
        return undecided_groups(one)

    def noise(shares):
        """Of the logarithm of the ratio, where the weights after each update make up such shares of the mean."""
        reach = [sum(shares[step:]) / sum(shares) for step in range(40)]
        squares = np.diff(scores[:, 0] - scores[:, 1]) ** 2 / 2
        return np.sqrt(sum(np.square(reach) * [squares[0], *squares])) / 10

    squares = np.diff(scores - scores.mean(axis=1, keepdims=True), axis=0) ** 2 / 2
    plain, by_noise = noise(np.ones(40)), noise([0, *1 / np.cumsum(squares.mean(axis=1))])
    assert by_noise < 0.8 * plain  # early weights, with little noise, make up most of that mean
    for recipe, deviation in (({}, plain), ({"mean_weighting": "inverse_variance"}, by_noise)):
        assert groups(np.exp(1.95 * deviation), **recipe) == [["d0", "d1"]]
        assert groups(np.exp(2.05 * deviation), **recipe) == []
    warmed = noisy_weights(2, mean_weighting="inverse_variance")  # whose first learning rate is 0
    warmed.trajectory.learning_rates[0] = 0.0
    warmed.trajectory.scores = draw.normal(size=(40, 2))
    warmed.mean = {"d0": 0.501, "d1": 0.499}
    assert undecided_groups(warmed) == [["d0", "d1"]]
    late = noise([0] * 30 + [1] * 10)
    assert late > 1.2 * plain
    assert groups(np.exp(1.95 * late), burn_in_steps=30) == [["d0", "d1"]]
    assert groups(np.exp(2.05 * late), burn_in_steps=30) == []


def test_a_domain_without_a_weight_is_in_no_group():
    weights = noisy_weights(3)
    weights.mean = {"d0": 0.501, "d1": 0.499, "d2": 0.0}
    assert undecided_groups(weights) == [["d0", "d1"]]
