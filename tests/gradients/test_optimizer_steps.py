"""The metric of an optimizer is what its step makes of a gradient: against the optimizers of torch themselves."""

import pytest
import torch
from torch import nn

from hf_doge.gradients.optimizer_metric import OptimizerMetric, kind_of_step, warn_of_other_step
from hf_doge.gradients.vectors import Vectors
from hf_doge.tracing.second_moments import second_moments_of

RATE = 0.1
OPTIONS = {"lr": RATE, "betas": (0.0, 0.9), "eps": 1e-2}  # no momentum, which is left out of the metric
OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": lambda parameters, **options: torch.optim.AdamW(parameters, weight_decay=0.0, **options),
    "AMSGrad": lambda parameters, **options: torch.optim.Adam(parameters, amsgrad=True, **options),
    "foreach": lambda parameters, **options: torch.optim.Adam(parameters, foreach=True, **options),
    "fused": lambda parameters, **options: torch.optim.Adam(parameters, fused=True, **options),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
}


class OwnStep(torch.optim.Adam):
    """Adam by name, and another optimizer."""

    def step(self, closure=None):
        return super().step(closure)


class WithoutStep(torch.optim.Optimizer):
    """Keeps second moments, and counts no steps of a parameter, as schedule-free optimizers do."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, options)

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg_sq"] = parameter.grad.square()


def begun(make, num_steps, **options):
    """An optimizer and its parameter, after some steps."""
    parameter = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    optimizer = make([parameter], **{**OPTIONS, **options})
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        step(optimizer, parameter, torch.randn(5, 3, generator=generator, dtype=torch.float64))
    return optimizer, parameter


def step(optimizer, parameter, gradient):
    """By how much a step lowers the parameter."""
    before, parameter.grad = parameter.detach().clone(), gradient
    optimizer.step()
    return before - parameter.detach()


GRADIENT = torch.linspace(-2, 3, 15, dtype=torch.float64).reshape(5, 3)


def measured(optimizer, parameter):
    metric = OptimizerMetric(optimizer)
    return metric(Vectors([("p", parameter)], None), [GRADIENT], weight=1.0)[0]


@pytest.mark.parametrize("num_steps", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_measured_gradient_is_the_step_that_the_optimizer_makes_of_it(name, num_steps):
    optimizer, parameter = begun(OPTIMIZERS[name], num_steps)
    found = measured(optimizer, parameter)
    torch.testing.assert_close(found, step(optimizer, parameter, GRADIENT), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_steps", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_moments_divide_a_gradient_as_the_last_step_did(name, num_steps):
    optimizer, parameter = begun(OPTIMIZERS[name], num_steps)
    update = step(optimizer, parameter, GRADIENT)
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    moments = second_moments_of(state, group, kind=kind_of_step(optimizer))
    found = RATE * GRADIENT / moments.divisors(torch.arange(5)) ** 2
    torch.testing.assert_close(found, update, rtol=1e-5, atol=1e-8)


def test_the_metric_of_radam_is_not_that_of_adam():
    (adam, one), (radam, other) = (begun(OPTIMIZERS[name], 9) for name in ("Adam", "RAdam"))
    assert (measured(adam, one) / measured(radam, other)).min() > 1.5


@pytest.mark.parametrize(
    ("make", "kind"), [(torch.optim.NAdam, "adam"), (torch.optim.RAdam, "radam"), (OwnStep, "other")]
)
def test_the_step_decides_what_an_optimizer_is(make, kind):
    class Subclass(make):
        """The same step."""

    for one in (make, Subclass):
        assert kind_of_step(begun(one, 0)[0]) == kind


def test_an_optimizer_that_is_not_known_is_told(recwarn):
    for name in OPTIMIZERS:
        warn_of_other_step(begun(OPTIMIZERS[name], 0)[0], "`x`", plain="`y`")
    assert not recwarn
    with pytest.warns(UserWarning, match="`x` takes what OwnStep keeps as `exp_avg_sq`.*approximate.*or use `y`"):
        warn_of_other_step(begun(OwnStep, 0)[0], "`x`", plain="`y`")


def test_adamax_is_refused_before_its_first_step():
    with pytest.raises(ValueError, match="the optimizer Adamax keeps none of that kind"):
        OptimizerMetric(begun(torch.optim.Adamax, 0)[0])


def test_moments_of_unknown_age_or_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="the optimizer WithoutStep keeps none of that kind"):
        measured(*begun(WithoutStep, 1))
    optimizer, parameter = begun(torch.optim.Adam, 1)
    optimizer.state[parameter]["exp_avg_sq"] = torch.ones(5, 1, dtype=torch.float64)  # of a projected gradient
    with pytest.raises(ValueError, match="keeps none of that kind"):
        measured(optimizer, parameter)


class Quantised(torch.Tensor):
    """An average that holds other numbers than those it stands for."""

    def dequantize(self):
        return 2 * self.as_subclass(torch.Tensor)


def test_of_a_quantised_average_what_it_stands_for_counts():
    optimizer, parameter = begun(torch.optim.Adam, 3)
    expected, state = measured(optimizer, parameter), optimizer.state[parameter]
    state["exp_avg_sq"] = (state["exp_avg_sq"] / 2).as_subclass(Quantised)
    torch.testing.assert_close(measured(optimizer, parameter), expected, rtol=1e-12, atol=0)
