from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from agent.learn import goals
from agent.learn.explain import explain
from agent.learn.goals import Bound, Fixed, Goal, Price, Share
from agent.learn.sample import Histogram, Sample
from protocol.errors import ConfigError
from tests.agent.learn.worlds import TEXT, Device

ALL: list[Goal] = [Fixed(0.3), Price(0.2), Share(0.25), Bound(0.05), Bound(0.05, 0.99)]


def device(tau: float, steps: int = 20_000, audit: float = 0.02) -> Device:
    one = Device(TEXT, np.random.default_rng(4), tau, audit)
    one.live(steps)
    return one


@pytest.mark.parametrize("goal", ALL)
def test_goals_survive_being_written_down(goal: Goal) -> None:
    assert goals.parse(goals.plain(goal)) == goal
    assert set(map(type, goals.plain(goal).values())) <= {str, float}


def test_names_tell_goals_apart_and_never_change() -> None:
    assert [goal.name for goal in ALL] == [
        "fixed threshold=0.3",
        "price price=0.2",
        "share share=0.25",
        "bound bound=0.05 confidence=0.95",
        "bound bound=0.05 confidence=0.99",
    ]
    assert goals.parse({"kind": "price", "price": 1}).name == "price price=1.0"


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"kind": "wish"},
        {"kind": "price"},
        {"kind": "price", "price": 1.5},
        {"kind": "price", "price": -0.1},
        {"kind": "share", "share": "much"},
        {"kind": "share", "share": math.nan},
        {"kind": "bound", "bound": 0.0},
        {"kind": "bound", "bound": 0.1, "confidence": 1.0},
        {"kind": "fixed", "threshold": math.inf},
    ],
)
def test_a_goal_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no goal"):
        goals.parse(wrong)


def test_a_fixed_threshold_is_nobody_elses_business() -> None:
    chosen = goals.own(Fixed(0.3), device(0.5).sample, Histogram(), 0.9)
    assert (chosen.threshold, chosen.evidence) == (0.3, math.inf)
    assert [goal.federated for goal in ALL] == [False, True, True, False, False]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("audit", [0.0, 0.02])
def test_a_share_includes_the_audits(share: float, audit: float) -> None:
    chosen = goals.own(Share(share), Sample.empty(), device(0.5).seen, 0.5, audit)
    now = Device(TEXT, np.random.default_rng(9), chosen.threshold, audit)
    now.live(50_000)
    assert len(now.sample) / 50_000 == pytest.approx(max(share, audit), abs=0.01)


def test_without_steps_a_share_keeps_the_start() -> None:
    chosen = goals.own(Share(0.2), Sample.empty(), Histogram(), 0.45)
    assert (chosen.threshold, chosen.evidence) == (0.45, 0.0)


def test_a_price_and_a_bound_are_met() -> None:
    one = device(0.3)
    chosen = goals.own(Price(0.3), one.sample, one.seen, 0.9)
    assert chosen.threshold == pytest.approx(0.4, abs=0.06)
    assert chosen.evidence > 100
    asked = device(0.0, 5000)
    assert 0.3 < goals.own(Bound(0.1), asked.sample, asked.seen, 0.9).threshold < 0.62


def test_explain_shows_what_was_seen_and_what_each_goal_would_do() -> None:
    one = device(0.3)
    told = explain(Price(0.3), one.sample, one.seen, 0.3, 0.02)
    assert sum(row.share for row in told.bins) == pytest.approx(1.0)
    assert sum(row.rows for row in told.bins) == told.rows == len(one.sample)
    for row in told.bins:
        if row.rows > 200:
            assert row.beta == pytest.approx(float(TEXT.beta(np.array((row.low + row.high) / 2))), abs=0.1)
    by = {choice.by: choice for choice in told.choices}
    assert next(iter(by)) == "in force"
    assert by["in force"].sent == pytest.approx(len(one.sample) / one.sample.steps, abs=0.02)
    assert by["in force"].disagreement == pytest.approx(TEXT.risk(0.3), abs=0.02)
    assert by["in force"].bound >= by["in force"].disagreement
    assert by["price price=0.3"].threshold == goals.own(Price(0.3), one.sample, one.seen, 0.3, 0.02).threshold
    assert by["share share=0.1"].sent == pytest.approx(0.1, abs=0.01)
    assert by["bound bound=0.05 confidence=0.95"].bound <= 0.051


def test_explain_has_something_to_say_before_anything_was_seen() -> None:
    told = explain(Bound(0.05), Sample.empty(), Histogram(), 0.5)
    assert (told.rows, told.steps) == (0, 0.0)
    assert all(row.beta is None and row.rows == 0 for row in told.bins)
    by = {choice.by: choice for choice in told.choices}
    assert by["in force"].bound == 1.0, "nothing is proven"
    assert by["bound bound=0.05 confidence=0.95"].threshold == 0.0
    assert by["bound bound=0.05 confidence=0.95"].sent == 1.0
