from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.rounds import Level
from server.coordinator.combine import REACH, ceiling, combine, weighted_median

SHARE = 0.4
levels = st.builds(
    Level, st.floats(0.0, 1.0), st.one_of(st.just(0.0), st.floats(1e-6, 1e12)), st.integers(0, 10_000_000)
)
telling = st.builds(Level, st.floats(0.0, 1.0), st.floats(1e-6, 1e12), st.integers(0, 10_000_000))
several = st.lists(levels, min_size=1, max_size=12)


def test_equal_thresholds_stay_and_evidence_and_devices_add_up() -> None:
    assert combine([Level(0.3, 10.0, 2), Level(0.3, 10.0, 3), Level(0.3, 10.0, 4)], SHARE) == Level(0.3, 30.0, 9)


def test_evidence_weighs() -> None:
    found = combine([Level(0.2, 30.0, 1), Level(0.3, 40.0, 1), Level(0.4, 30.0, 1), Level(0.4, 100 / 3, 1)], 1.0)
    assert found is not None
    assert found.threshold == pytest.approx((6.0 + 12.0 + 12.0 + 40 / 3) / (400 / 3))


def test_one_cluster_decides_for_itself() -> None:
    assert combine([Level(0.7, 5.0, 3)], SHARE) == Level(0.7, 5.0, 3)


def test_of_two_both_count_the_same() -> None:
    found = combine([Level(0.2, 1e9, 1000), Level(0.4, 10.0, 2)], SHARE)
    assert found is not None
    assert found.threshold == pytest.approx(0.3)
    assert found.evidence == 20.0


@pytest.mark.parametrize("empty", [[], [Level(0.5, 0.0, 10)]])
def test_without_evidence_there_is_nothing(empty: list[Level]) -> None:
    assert combine(empty, SHARE) is None


@given(several)
def test_the_result_lies_within_the_thresholds(given: list[Level]) -> None:
    found = combine(given, SHARE)
    count = [each.threshold for each in given if each.evidence]
    assert (found is None) == (not count)
    if found:
        assert min(count) <= found.threshold <= max(count)
        assert 0.0 < found.evidence <= 1e12


@given(several, st.randoms())
def test_order_does_not_matter(given: list[Level], random: object) -> None:
    mixed = list(given)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    one, other = combine(given, SHARE), combine(mixed, SHARE)
    assert (one is None) == (other is None)
    if one and other:
        assert one.threshold == pytest.approx(other.threshold, abs=1e-9)
        assert one.evidence == pytest.approx(other.evidence)


@given(st.lists(telling, min_size=2, max_size=11), levels)
def test_one_cluster_moves_the_others_by_a_stated_amount(honest: list[Level], hostile: Level) -> None:
    found = combine([*honest, hostile], SHARE)
    assert found is not None
    low, high = min(each.threshold for each in honest), max(each.threshold for each in honest)
    assert low - SHARE * REACH - 1e-9 <= found.threshold <= high + SHARE * REACH + 1e-9
    assert found.evidence <= sum(each.evidence for each in honest) / (1 - SHARE) * (1 + 1e-9)


@given(
    st.lists(telling, min_size=8, max_size=24),
    st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6),
)
def test_a_fifth_of_the_clusters_cannot_do_more_with_all_evidence_they_can_claim(
    honest: list[Level], said: list[float]
) -> None:
    hostile = [Level(each, 1e12, 10**6) for each in said[: len(honest) // 4]]
    found = combine([*honest, *hostile], SHARE)
    assert found is not None
    low, high = min(each.threshold for each in honest), max(each.threshold for each in honest)
    assert low - SHARE * REACH - 1e-9 <= found.threshold <= high + SHARE * REACH + 1e-9


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=30), st.floats(0.05, 1.0))
def test_no_fifth_has_more_than_its_share(evidence: list[float], share: float) -> None:
    top = ceiling(evidence, share)
    weights = sorted((min(each, top) for each in evidence), reverse=True)
    few = max(1, len(evidence) // 5)
    assert sum(weights[:few]) <= max(share, few / len(evidence)) * sum(weights) * (1 + 1e-6)
    assert top >= min(evidence)


@given(st.lists(st.floats(1.0, 1e6), min_size=3, max_size=30))
def test_the_ceiling_is_the_highest_one(evidence: list[float]) -> None:
    top = ceiling(evidence, SHARE) * 1.001
    weights = sorted((min(each, top) for each in evidence), reverse=True)
    few = max(1, len(evidence) // 5)
    assert top >= max(evidence) or sum(weights[:few]) > SHARE * sum(weights)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_nothing_is_capped_without_need(evidence: list[float]) -> None:
    assert ceiling(evidence, 1.0) >= max(evidence)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), min_size=1, max_size=9))
def test_the_weighted_median_is_that_of_repeated_values(pairs: list[tuple[float, int]]) -> None:
    repeated = sorted(itertools.chain.from_iterable([value] * times for value, times in pairs))
    half = len(repeated) // 2
    expected = repeated[half] if len(repeated) % 2 else (repeated[half - 1] + repeated[half]) / 2
    assert weighted_median([value for value, _ in pairs], [times for _, times in pairs]) == expected
