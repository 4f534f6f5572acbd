from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.learn.goals import CERTAIN
from agent.learn.local import learn
from agent.learn.losses import PriceLoss
from agent.learn.personal import ENOUGH, OWN, in_force, personal, statistics
from agent.learn.sample import Histogram, Own, Sample
from protocol.rounds import STATISTICS, Group, Learned, Level, Whole
from tests.agent.learn.worlds import LINEAR, Device, World

NONE = [0.0] * len(STATISTICS)
PRICE = 0.2
unit = st.floats(0.0, 1.0)
evidence = st.floats(0.0, 1e9)


def level(threshold: float, evidence: float, devices: int = 10) -> Level:
    return Level(threshold, evidence, devices)


def device(best: float, steps: int, seed: int) -> Own:
    """What one learns by itself whose best threshold is `best`."""
    world = World(lambda r: r, lambda u: np.clip(PRICE + 0.8 * (u - best), 0.0, 1.0))
    one = Device(world, np.random.default_rng(seed), best, 0.02)
    one.live(steps)
    return learn(one.sample, PriceLoss(PRICE), 0.4)


def mean(owns: list[Own]) -> Level:
    total = sum(own.evidence for own in owns)
    return Level(sum(own.threshold * own.evidence for own in owns) / total, total, len(owns))


def errors(steps: int) -> dict[str, float]:
    """Root mean squares over 4 clusters of 10 devices that differ, each having seen so many steps."""
    rng = np.random.default_rng(11)
    squares: dict[str, list[float]] = {"personal": [], "own": [], "cluster": [], "overall": []}
    clusters = [rng.normal(centre, 0.07, 10) for centre in (0.3, 0.4, 0.45, 0.55)]
    owns = [[device(best, steps, int(rng.integers(1 << 30))) for best in cluster] for cluster in clusters]
    overall = mean([own for cluster in owns for own in cluster])
    for bests, cluster in zip(clusters, owns, strict=True):
        learned = Learned(mean(cluster), Whole(overall))
        for best, own in zip(bests, cluster, strict=True):
            squares["personal"].append((personal(own, learned, NONE) - best) ** 2)
            squares["own"].append((own.threshold - best) ** 2)
            squares["cluster"].append((mean(cluster).threshold - best) ** 2)
            squares["overall"].append((overall.threshold - best) ** 2)
    return {name: float(np.sqrt(np.mean(found))) for name, found in squares.items()}


def test_with_few_data_it_beats_the_device_alone() -> None:
    found = errors(300)
    assert found["personal"] < 0.8 * found["own"]
    assert found["personal"] < 1.05 * min(found.values())


def test_with_much_data_it_beats_the_cluster() -> None:
    found = errors(10_000)
    assert found["personal"] < 0.8 * found["cluster"]
    assert found["personal"] < 0.5 * found["overall"]
    assert found["personal"] < 1.05 * min(found.values())


def test_nobody_else_knows_anything() -> None:
    own = Own(0.3, 5.0)
    assert personal(own, None, NONE) == 0.3
    assert personal(own, Learned(), NONE) == 0.3


def test_a_new_device_takes_what_the_others_know() -> None:
    new = Own(0.9, 0.0)
    assert personal(new, Learned(cluster=level(0.4, 1e4)), NONE) == 0.4
    assert personal(new, Learned(overall=Whole(level(0.5, 1e4))), NONE) == 0.5
    assert personal(new, Learned(level(0.4, 1e6, 1000), Whole(level(0.5, 1e8))), NONE) == pytest.approx(0.4, abs=1e-3)
    assert personal(new, Learned(level(0.4, 0.0, 0), Whole(level(0.5, 1e8))), NONE) == 0.5


def test_the_devices_group_stands_for_its_cluster() -> None:
    groups = [Group(0.2, 1e6, 1000, [0.1, 0.1, 0.1]), Group(0.8, 1e6, 1000, [0.9, 0.9, 0.9])]
    learned = Learned(level(0.5, 1e6, 1000), Whole(level(0.5, 1e8), groups))
    assert personal(Own(0.9, 0.0), learned, [0.8, 0.8, 0.8]) == pytest.approx(0.8, abs=1e-3)
    assert personal(Own(0.9, 0.0), learned, [0.2, 0.2, 0.2]) == pytest.approx(0.2, abs=1e-3)


@given(own=unit, cluster=unit, overall=unit, mine=evidence, theirs=evidence, devices=st.integers(0, 10**6))
def test_the_mix_lies_between_what_is_mixed(
    own: float, cluster: float, overall: float, mine: float, theirs: float, devices: int
) -> None:
    learned = Learned(Level(cluster, theirs, devices), Whole(level(overall, 1e6)))
    mixed = personal(Own(own, mine), learned, NONE)
    assert min(own, cluster, overall) - 1e-9 <= mixed <= max(own, cluster, overall) + 1e-9


def test_certainty_and_much_evidence_are_not_outvoted() -> None:
    learned = Learned(level(0.9, 1e9), Whole(level(0.9, 1e12)))
    assert personal(Own(0.2, CERTAIN), learned, NONE) == 0.2
    assert personal(Own(0.2, 1e6), learned, NONE) == pytest.approx(0.2, abs=1e-3)
    assert personal(Own(0.2, OWN), Learned(level(0.9, 1e9)), NONE) == pytest.approx(0.55)


def test_statistics_tell_what_they_are_named() -> None:
    one = Device(LINEAR, np.random.default_rng(0), 0.5, 0.1)
    one.live(30_000)
    _, beta, _ = LINEAR.steps(np.random.default_rng(1), 30_000)
    assert statistics(one.sample, one.seen) == pytest.approx([0.5, beta.mean(), 0.8], abs=0.03)


@given(st.lists(st.tuples(unit, unit, st.floats(1e-6, 1.0)), max_size=5))
def test_statistics_are_finite(rows: list[tuple[float, float, float]]) -> None:
    u, beta, propensity = zip(*rows, strict=True) if rows else ((), (), ())
    none = [0] * len(rows)
    found = statistics(Sample.of(u, beta, propensity, none, none, propensity), Histogram())
    assert len(found) == len(STATISTICS)
    assert all(map(math.isfinite, found))


def test_one_device_that_has_seen_little_does_not_decide_for_a_cluster() -> None:
    told = Learned(level(1.0, 3.3, 1))
    assert in_force(Own(0.25, 0.0), told, NONE, 0.25) == pytest.approx(0.33 * 1.0 + 0.67 * 0.25)
    assert in_force(Own(0.25, 0.0), Learned(level(1.0, ENOUGH)), NONE, 0.25) == 1.0
    assert in_force(Own(0.8, ENOUGH), None, NONE, 0.25) == 0.8
    assert in_force(Own(0.8, 0.0), None, NONE, 0.25) == 0.25
    assert in_force(Own(0.8, CERTAIN), None, NONE, 0.25) == 0.8
