from __future__ import annotations

import numpy as np
import pytest

from agent.learn.risk import estimate, highest_threshold, upper_bound
from agent.learn.sample import Sample
from tests.agent.learn.worlds import FALLING, FLAT, LINEAR, STEEP, TEXT, Device, World

BOUND, CONFIDENCE = 0.1, 0.9
# Worst of all: 10.1 % of the steps look surest and are wrong, so that every threshold but 0 is just over the bound.
TRAP = World(lambda r: np.where(r < 0.11, 0.001, r), lambda u: np.where(u < 0.01, 0.92, 0.0))
RUNS = {"text": (TEXT, 50), "linear": (LINEAR, 50), "flat": (FLAT, 50), "falling": (FALLING, 50), "steep": (STEEP, 50)}
RUNS["trap"] = (TRAP, 200)


def violated(world: World, seed: int, audit: float) -> bool:
    """One device's life: does the threshold, set anew from what the last ones let it see, ever break its promise?"""
    device = Device(world, np.random.default_rng(seed), 0.0, audit)
    broken = False
    for _ in range(6):
        device.live(250)
        device.tau = highest_threshold(device.sample, BOUND, CONFIDENCE)
        broken = broken or world.risk(device.tau) > BOUND
    return broken


@pytest.mark.parametrize("name", RUNS)
def test_the_bound_holds_on_fresh_data_at_every_moment(name: str) -> None:
    """In no more of 450 adaptive lives in all than the confidence allows, within binomial error (3 sigma)."""
    world, runs = RUNS[name]
    broken = sum(violated(world, seed, audit=0.05 if seed % 2 else 0.02) for seed in range(runs))
    allowed = 1 - CONFIDENCE
    assert broken / runs <= allowed + 3 * np.sqrt(allowed * CONFIDENCE / runs)
    assert world.risk(0.99) > BOUND, "or there would be nothing to prove"


def test_the_trap_would_catch_less_care() -> None:
    """An empirical mean below the bound, taken for granted, is over it in more lives than the confidence allows."""
    broken = 0
    for seed in range(50):
        device = Device(TRAP, np.random.default_rng(seed), 0.0, 0.02)
        device.live(250)
        broken += estimate(device.sample, 0.5) <= BOUND
    assert broken > 10


def test_it_finds_a_threshold_that_sends_far_less_than_everything() -> None:
    """A gate like the one measured on open text: after 5,000 steps at most 5 % are kept and differ, with 95 %
    confidence, while under half are sent; knowing the truth one would send a third."""
    device = Device(TEXT, np.random.default_rng(5), 0.0, 0.02)
    for _ in range(10):
        device.live(500)
        device.tau = highest_threshold(device.sample, 0.05, 0.95)
    assert TEXT.sent(device.tau) < 0.45
    assert TEXT.risk(device.tau) <= 0.05


def test_before_there_is_evidence_everything_is_asked() -> None:
    assert highest_threshold(Sample.empty(), 0.05, 0.95) == 0.0
    device = Device(TEXT, np.random.default_rng(0), 0.0, 0.02)
    device.live(20)
    assert highest_threshold(device.sample, 0.05, 0.95) == 0.0
    assert upper_bound(Sample.empty(), 0.5, 0.95) == 1.0
    assert estimate(Sample.empty(), 0.5) == 0.0


@pytest.mark.parametrize("audit", [0.0, 1e-4])
def test_steps_that_nobody_audits_prove_nothing(audit: float) -> None:
    """All that differs is kept, so nothing that is seen differs."""
    world = World(lambda r: r, lambda u: np.where(u < 0.6, 0.5, 0.0))
    device = Device(world, np.random.default_rng(0), 0.6, audit)
    device.live(20_000)
    assert len(device.sample) > 5000
    assert highest_threshold(device.sample, 0.1, 0.95) == 0.0
    device.tau = 0.0
    device.live(3000)
    assert 0.0 < highest_threshold(device.sample, 0.1, 0.95) <= 0.2, "what is asked since then counts"


def test_rows_of_unlikely_steps_do_not_break_it() -> None:
    device = Device(TEXT, np.random.default_rng(1), 0.0, 0.02)
    device.live(3000)
    before = highest_threshold(device.sample, 0.1, 0.95)
    odd = Sample.of([0.1] * 9, [1.0] * 9, [1e-9] * 9, [True] * 9, [10**6] * 9, [1e-9] * 9)
    assert before > 0.3
    assert highest_threshold(Sample.join([device.sample, odd]), 0.1, 0.95) == before
    assert 0.0 < upper_bound(Sample.join([odd, device.sample]), before, 0.95) <= 0.1


def test_the_upper_bound_covers_the_truth_and_closes_in_on_it() -> None:
    held, widths = 0, []
    for seed in range(40):
        device = Device(LINEAR, np.random.default_rng(seed), 0.5, 0.1)
        device.live(4000)
        few = upper_bound(device.sample, 0.5, 0.95)
        device.live(36_000)
        many = upper_bound(device.sample, 0.5, 0.95)
        held += many >= LINEAR.risk(0.5)
        widths.append((few - LINEAR.risk(0.5), many - LINEAR.risk(0.5)))
    assert held >= 36
    assert np.mean(widths, axis=0)[1] < np.mean(widths, axis=0)[0] / 1.5
    assert estimate(device.sample, 0.5) == pytest.approx(LINEAR.risk(0.5), abs=0.02)


def test_a_stricter_goal_has_a_lower_threshold() -> None:
    device = Device(TEXT, np.random.default_rng(7), 0.0, 0.02)
    device.live(4000)
    thresholds = [highest_threshold(device.sample, bound, 0.95) for bound in (0.01, 0.05, 0.1, 0.5)]
    assert thresholds == sorted(thresholds)
    assert thresholds[-1] == 1.0
    assert highest_threshold(device.sample, 0.05, 0.999) <= highest_threshold(device.sample, 0.05, 0.5)
