from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.rounds import MAX_GROUPS, Group, Level, Whole, nearest
from server.coordinator.groups import MOVED, Grouping, k_means, moved, pooled, regrouped, silhouette
from tests.server.coordinator.fleet import KINDS, statistics


def grouped(count: int, seed: int, *, old: Grouping | None = None, wanted: int = 0, number: int = 1) -> Grouping:
    found = regrouped(old, pooled([statistics(count, seed)[0]]), wanted, number)
    assert found is not None
    return found


def whole(grouping: Grouping) -> Whole:
    level = Level(0.5, 1.0, 1)
    groups = [Group(level.threshold, level.evidence, level.devices, centre) for centre in grouping.centres]
    return Whole(level, groups, grouping.scale)


@pytest.mark.parametrize("count", [12, 60, 600, 3000])
@pytest.mark.parametrize("wanted", [0, 3])
def test_devices_of_one_kind_find_themselves_in_one_group(count: int, wanted: int) -> None:
    """As a device does it, from the published centres, with statistics that were in no sample."""
    found = whole(grouped(count, seed=1, wanted=wanted))
    assert len(found.groups) == 3
    fresh, kinds = statistics(300, seed=2)
    place_of = {kind: nearest(KINDS[kind].tolist(), found) for kind in (0, 1, 2)}
    assert len(set(place_of.values())) == 3
    assert [nearest(each, found) for each in fresh] == [place_of[kind] for kind in kinds]


@pytest.mark.parametrize("seed", range(3))
def test_devices_of_one_kind_are_one_group(seed: int) -> None:
    sample, _ = statistics(300, seed, kinds=(1,))
    found = regrouped(None, pooled([sample]), 0, 1)
    assert found is not None
    assert len(found.centres) == 1


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_as_they_are_under_noise(seed: int) -> None:
    first = grouped(90, seed=10)
    assert grouped(90, seed=seed, old=first, number=7) is first
    assert grouped(150, seed=seed, old=first, number=7) is first


def test_groups_keep_their_places_when_they_are_made_anew() -> None:
    first = grouped(90, seed=1)
    sample = np.array(statistics(90, seed=2)[0]) + np.array([0.15, 0.1, 0.0])
    again = regrouped(first, sample, 0, 9)
    assert again is not None
    assert again is not first
    assert again.since == 9
    moves = np.array(again.centres) - np.array(first.centres)
    assert np.allclose(moves, [0.15, 0.1, 0.0], atol=0.05)


def test_a_new_kind_comes_last_and_one_that_is_gone_leaves_the_others_in_order() -> None:
    two = regrouped(None, pooled([statistics(60, seed=1, kinds=(0, 2))[0]]), 0, 1)
    assert two is not None
    three = grouped(90, seed=2, old=two, number=2)
    assert len(three.centres) == 3
    assert np.allclose(three.centres[:2], two.centres, atol=0.1)
    assert np.allclose(three.centres[2], KINDS[1], atol=0.1)


def test_more_than_twice_the_devices_are_looked_at_anew() -> None:
    first = grouped(12, seed=1)
    assert grouped(24, seed=2, old=first) is first
    assert grouped(60, seed=2, old=first) is not first


def test_another_number_of_groups_is_made_at_once() -> None:
    first = grouped(90, seed=1)
    two = grouped(90, seed=1, old=first, wanted=2, number=2)
    assert len(two.centres) == 2
    assert grouped(90, seed=2, old=two, wanted=2, number=3) is two
    assert len(grouped(90, seed=2, old=two, number=3).centres) == 3


def test_too_few_devices_make_no_groups_and_leave_those_that_are() -> None:
    few = pooled([statistics(5, seed=1)[0]])
    assert regrouped(None, few, 0, 1) is None
    first = grouped(90, seed=1)
    assert regrouped(first, few, 0, 1) is first
    assert regrouped(None, pooled([statistics(8, seed=1)[0]]), 3, 1) is None


@pytest.mark.parametrize("row", [[1.0, 1.0, 100.0], [0.0, 0.0, -100.0], [1e308, -1e308, 1e308], [2.0, 0.5, 0.5]])
def test_a_minority_of_absurd_devices_does_not_hide_the_others_kinds(row: list[float]) -> None:
    honest, _ = statistics(180, seed=3)
    found = regrouped(None, pooled([honest[:60], honest[60:120], honest[120:], [row] * 18]), 0, 1)
    assert found is not None
    own = {nearest(kind.tolist(), whole(found)) for kind in KINDS}
    assert len(own) == 3
    fresh, kinds = statistics(90, seed=4)
    assert len({(nearest(each, whole(found)), kind) for each, kind in zip(fresh, kinds, strict=True)}) == 3
    assert regrouped(found, pooled([honest, [row] * 18]), 0, 2) is found


def test_clusters_have_the_same_share_of_too_many_samples() -> None:
    large, small = statistics(5000, seed=1, kinds=(0,))[0], statistics(200, seed=1, kinds=(1,))[0]
    rows = pooled([large, small])
    assert len(rows) == 512
    assert [row.tolist() for row in rows[1:400:2]] == small


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3), max_size=60),
    st.integers(0, MAX_GROUPS),
)
def test_whatever_is_reported_gives_usable_groups_that_then_stay(rows: list[list[float]], wanted: int) -> None:
    samples = pooled([rows])
    found = regrouped(None, samples, wanted, 1)
    if found is not None:
        assert 1 <= len(found.centres) <= MAX_GROUPS
        assert np.isfinite(found.centres).all()
        assert (np.array(found.scale) > 0).all()
        assert not moved(found, samples)


def test_the_bound_on_movement_is_the_stated_one() -> None:
    first = grouped(300, seed=1)
    sample = np.array(statistics(300, seed=1)[0])
    unit = np.array(first.scale) * np.array([1.0, 0.0, 0.0])
    assert not moved(first, sample + 0.9 * MOVED * unit)
    assert moved(first, sample + 1.1 * MOVED * unit)


def test_k_means_is_as_good_as_scipys() -> None:
    from scipy.cluster.vq import kmeans

    points = np.random.default_rng(1).normal(size=(200, 3)) + np.repeat(np.eye(3) * 4, [80, 60, 60], axis=0)

    def cost(centres: np.ndarray) -> float:  # type: ignore[type-arg]
        return float((np.linalg.norm(points[:, None] - centres[None], axis=2).min(axis=1) ** 2).mean())

    for k in (1, 2, 3):
        theirs, _ = kmeans(points, k, iter=40, rng=np.random.default_rng(2))
        assert cost(k_means(points, k)) <= cost(theirs) * 1.001


def test_the_silhouette_by_hand() -> None:
    """Points 0, 1 | 10: a = 1, 1; b = 10, 9; the single one counts 0."""
    points = np.array([0.0, 1.0, 10.0])
    apart = np.abs(points[:, None] - points[None, :])
    assert silhouette(apart, np.array([0, 0, 1])) == pytest.approx((9 / 10 + 8 / 9 + 0.0) / 3)
