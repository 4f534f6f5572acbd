from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.learn.local import learn
from agent.learn.losses import Loss, PriceLoss, SquareLoss
from agent.learn.sample import Sample
from tests.agent.learn.worlds import FALLING, FLAT, LINEAR, STEEP, TEXT, Device, World

unit = st.floats(0.0, 1.0)


def best(world: World, price: float) -> float:
    grid = np.linspace(0, 1, 201)
    return float(grid[np.argmin([world.loss(tau, price) for tau in grid])])


def rounds(device: Device, price: float, count: int, steps: int = 1000) -> float:
    for _ in range(count):
        device.live(steps)
        device.tau = learn(device.sample, PriceLoss(price), device.tau).threshold
    return device.tau


@pytest.mark.parametrize(("world", "price"), [(TEXT, 0.3), (LINEAR, 0.2), (STEEP, 0.3)])
@pytest.mark.parametrize("start", [0.95, 0.02])
def test_audits_bring_a_wrong_threshold_home(world: World, price: float, start: float) -> None:
    """From far too high, where next to nothing is sent, and from far too low. Within 0.06, after 20,000 steps."""
    device = Device(world, np.random.default_rng(1), start, audit=0.02)
    assert rounds(device, price, 20) == pytest.approx(best(world, price), abs=0.06)


def test_without_audits_nothing_is_learned_of_what_is_kept() -> None:
    """TEXT: at 0.95 three steps in a hundred are sent, and all that is known of the others is nothing."""
    device = Device(TEXT, np.random.default_rng(1), 1.0, audit=0.0)
    assert rounds(device, 0.3, 20) == 1.0
    assert len(device.sample) == 0


@pytest.mark.parametrize("start", [0.0, 0.3, 0.9, 1.0])
def test_where_beta_does_not_rise_the_better_end_is_taken(start: float) -> None:
    def learned(world: World, price: float) -> float:
        device = Device(world, np.random.default_rng(2), 0.5, audit=0.2)
        device.live(20_000)
        return learn(device.sample, PriceLoss(price), start).threshold

    assert learned(FLAT, 0.1) == 0.0
    assert learned(FLAT, 0.3) == 1.0
    assert learned(FALLING, 0.2) == 0.0  # 0.35 at the mean, and what is best sent cannot be sent alone
    assert learned(FALLING, 0.55) == 1.0
    assert learned(LINEAR, 0.9) == 1.0
    assert learned(LINEAR, 0.0) < 0.15


@pytest.mark.parametrize("form", [PriceLoss, SquareLoss])
@given(
    rows=st.lists(st.tuples(unit, unit, st.floats(0.01, 1.0)), min_size=1, max_size=40),
    start=unit,
    price=unit,
    rate=st.floats(0.01, 5.0),
)
def test_it_never_costs_more_than_where_it_began(
    form: type[Loss], rows: list[tuple[float, float, float]], start: float, price: float, rate: float
) -> None:
    u, beta, propensity = zip(*rows, strict=True)
    none = [0] * len(rows)
    sample, loss = Sample.of(u, beta, propensity, none, none, propensity), form(price)
    own = learn(sample, loss, start, rate=rate)
    assert 0.0 <= own.threshold <= 1.0
    assert 0.0 <= own.evidence <= len(rows)
    assert loss.value(sample, own.threshold) <= loss.value(sample, start) + 1e-8


@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0, 4.0])
def test_it_ends_at_one_place_whatever_the_rate(rate: float) -> None:
    device = Device(LINEAR, np.random.default_rng(3), 0.4, audit=0.1)
    device.live(20_000)
    own = learn(device.sample, PriceLoss(0.2, 0.05), 0.5, rate=rate)
    again = learn(device.sample, PriceLoss(0.2, 0.05), own.threshold)
    assert own.threshold == pytest.approx(0.3, abs=0.05)
    assert again.threshold == pytest.approx(own.threshold, abs=2e-3), "what was learned stays when nothing is new"


def test_without_a_sample_the_start_stands() -> None:
    own = learn(Sample.empty(), PriceLoss(0.2), 0.7)
    assert (own.threshold, own.evidence) == (0.7, 0.0)


def test_evidence_counts_what_is_near_the_threshold() -> None:
    loss = PriceLoss(0.2)
    near, far = [0.5] * 40, [0.95] * 400
    ones = [1.0] * 440
    sample = Sample.of(near + far, ones, ones, ones, [0] * 440, ones)
    assert loss.evidence(sample, 0.5) == pytest.approx(40.0, abs=0.1)
    assert loss.evidence(sample, 0.95) == pytest.approx(400.0, abs=0.1)
    assert loss.evidence(sample, 0.7) < 2.0
    uneven = Sample.of(near, ones[:40], [1.0] * 20 + [0.05] * 20, ones[:40], [0] * 40, [0.05] * 40)
    assert loss.evidence(uneven, 0.5) == pytest.approx((20 + 20 * 20) ** 2 / (20 + 20 * 400)), "Kish, 1965"
