from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.learn.local import learn
from agent.learn.losses import Loss, PriceLoss, SquareLoss
from agent.learn.sample import Sample
from agent.learn.uhlm import Line
from tests.agent.learn.worlds import LINEAR, World

unit = st.floats(0.0, 1.0)
steps = st.lists(st.tuples(unit, unit, st.floats(0.05, 1.0)), min_size=1, max_size=30)
forms = pytest.mark.parametrize("form", [PriceLoss, SquareLoss])


def all_seen(world: World, n: int = 20_001) -> Sample:
    """Every step sent, u evenly spread, beta exactly its mean."""
    u = world.u(np.linspace(0.0, 1.0, n))
    none = np.zeros(n)
    return Sample.of(u, np.clip(world.beta(u), 0, 1), none + 1, none, none, none + 1)


def sample_of(rows: list[tuple[float, float, float]]) -> Sample:
    u, beta, propensity = zip(*rows, strict=True)
    none = [0] * len(rows)
    return Sample.of(u, beta, propensity, none, none, propensity)


@forms
@given(rows=steps, tau=unit, price=unit, kappa=st.floats(0.01, 0.05))
def test_the_gradient_is_the_slope_of_the_value(
    form: type[Loss], rows: list[tuple[float, float, float]], tau: float, price: float, kappa: float
) -> None:
    sample, loss, width = sample_of(rows), form(price, kappa), 1e-6
    slope = (loss.value(sample, tau + width) - loss.value(sample, tau - width)) / (2 * width)
    assert loss.gradient(sample, tau) == pytest.approx(slope, abs=1e-4, rel=1e-4)


@forms
@given(rows=steps, tau=unit, price=unit)
def test_the_step_has_the_sign_of_the_gradient_and_the_size_of_beta(
    form: type[Loss], rows: list[tuple[float, float, float]], tau: float, price: float
) -> None:
    sample, loss = sample_of(rows), form(price)
    step, gradient = loss.step(sample, tau), loss.gradient(sample, tau)
    assert abs(step) <= 3.0 + 1e-9
    assert step * gradient >= 0.0 or abs(gradient) < 1e-12


@forms
def test_the_step_does_not_vanish_far_from_the_data(form: type[Loss]) -> None:
    sample = sample_of([(0.001, 0.9, 1.0), (0.002, 0.9, 1.0)])
    loss = form(0.2, 0.01)
    assert abs(loss.gradient(sample, 1.0)) < 1e-30
    assert loss.step(sample, 1.0) > 0.5


@pytest.mark.parametrize("price", [0.1, 0.2, 0.5])
def test_as_kappa_falls_beta_at_the_threshold_is_the_price(price: float) -> None:
    sample = all_seen(World(lambda r: r, lambda u: u**2))
    errors = [abs(learn(sample, PriceLoss(price, kappa), 0.5).threshold ** 2 - price) for kappa in (0.05, 0.02, 0.002)]
    assert errors[-1] < 1e-3
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("price", [0.05, 0.2, 0.6])
def test_where_beta_is_linear_the_threshold_is_uhlms(price: float) -> None:
    sample = all_seen(LINEAR)
    line = Line.fit(sample)
    learned = learn(sample, PriceLoss(price, 0.01), 0.9).threshold
    assert learned == pytest.approx((price + 0.05) / 0.8, abs=2e-3)
    assert learned == pytest.approx(line.crosses(price), abs=0.01)


def test_uhlms_risk_averse_threshold_is_where_the_line_is_zero() -> None:
    u = np.linspace(0.2, 1.0, 1001)  # where the line is positive, so that it is exact
    ones = np.ones(1001)
    sample = Sample.of(u, 0.8 * u - 0.05, ones, ones, 0 * ones, ones)
    line = Line.fit(sample)
    assert (line.a, line.b, line.delta) == pytest.approx((0.8, -0.05, 1.0), abs=1e-4)
    assert line.averse() == pytest.approx(0.0625, abs=1e-3)
    assert line.averse() == line.crosses(0.0)
    assert line.prone() == line.crosses(line.delta) == 1.0


def test_risk_prone_is_where_beta_is_as_likely_as_everywhere() -> None:
    """Of 100 steps at each u, 100 u are rejected for sure: beta = u, and delta = 1 / 2."""
    u = np.repeat(np.arange(101) / 100, 100)
    beta = np.concatenate([np.arange(100) < count for count in range(101)]).astype(float)
    line = Line.fit(Sample.of(u, beta, np.ones(10_100), beta, 0 * u, np.ones(10_100)))
    assert line.averse() == pytest.approx(0.0, abs=1e-3)
    assert line.prone() == pytest.approx((line.delta - line.b) / line.a) == pytest.approx(0.5, abs=1e-3)


def test_a_line_that_does_not_rise_has_the_better_end() -> None:
    assert Line(0.0, 0.4, 0.3).crosses(0.2) == 0.0
    assert Line(0.0, 0.1, 0.3).crosses(0.2) == 1.0
    assert Line(-0.5, 0.9, 0.3).crosses(0.2) == 0.0
    assert Line.fit(Sample.empty()).prone() == 1.0


@pytest.mark.parametrize("price", [0.0, 0.2, 0.6])
def test_form_b_crosses_far_higher(price: float) -> None:
    sample = all_seen(World(lambda r: r, lambda u: u))
    assert learn(sample, SquareLoss(price, 0.005), 0.4).threshold == pytest.approx((1 + price) / 2, abs=5e-3)
    assert learn(sample, PriceLoss(price, 0.005), 0.4).threshold == pytest.approx(price, abs=5e-3)


@pytest.mark.parametrize("kappa", [0.0, -1.0, 0.051, float("nan")])
def test_a_softer_decision_than_the_theory_bears_is_refused(kappa: float) -> None:
    with pytest.raises(ValueError, match="kappa"):
        PriceLoss(0.2, kappa)
