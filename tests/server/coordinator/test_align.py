from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from protocol.rounds import (
    MAX_GROUPS,
    MAX_SUBJECTS,
    Group,
    Level,
    Overall,
    Report,
    Told,
    Whole,
    decode_overall,
    encode,
)
from server.coordinator.align import AlignOptions, adopted, aligned, fitted
from server.coordinator.groups import Grouping
from tests.server.coordinator.fleet import SUBJECT, level, report, statistics

SIMILAR = AlignOptions(similarity=True)


def names(count: int) -> list[str]:
    return [f"{number:016x}" for number in range(count)]


def test_each_subject_by_itself() -> None:
    one, two = names(2)
    reports = {
        "A": Report(1, {one: Told(level(0.2)), two: Told(level(0.9))}),
        "B": Report(1, {one: Told(level(0.4))}),
        "C": Report(1, {one: Told(Level(0.9, 0.0, 3))}),
    }
    wholes, kept = aligned(reports, {}, 0, 1, AlignOptions())
    assert {subject: whole.level.threshold for subject, whole in wholes.items()} == pytest.approx({one: 0.3, two: 0.9})
    assert all(whole.groups == [] and whole.scale is None for whole in wholes.values())
    assert kept == {}


def test_a_cluster_that_invents_subjects_displaces_none_that_is_shared() -> None:
    shared = f"{2**64 - 1:x}"
    invented = {subject: Told(level(0.5, 1e12)) for subject in names(MAX_SUBJECTS - 1)}
    reports = {
        "A": Report(1, {**invented, "a" * 16: Told(level(0.5))}),
        "B": Report(1, {shared: Told(level(0.1))}),
        "C": Report(1, {shared: Told(level(0.1))}),
    }
    wholes, _ = aligned(reports, {}, 0, 1, AlignOptions())
    assert len(wholes) == MAX_SUBJECTS
    assert shared in wholes


@cache
def grouped(count: int = 60) -> tuple[dict[str, Report], dict[str, Whole], dict[str, Grouping]]:
    """Two clusters whose samples have three kinds, and what comes of them as Overall 7."""
    samples = [statistics(count, seed)[0] for seed in (1, 2)]
    reports = {
        name: report(1, threshold, sample=sample)
        for name, threshold, sample in zip("AB", (0.2, 0.4), samples, strict=True)
    }
    wholes, kept = aligned(reports, {}, 6, 7, SIMILAR)
    return reports, wholes, kept


def test_groups_start_from_the_level_of_all() -> None:
    _, wholes, kept = grouped()
    whole = wholes[SUBJECT]
    assert len(whole.groups) == 3
    assert all((group.threshold, group.evidence) == (whole.level.threshold, 0.0) for group in whole.groups)
    assert whole.scale == kept[SUBJECT].scale
    assert kept[SUBJECT].since == 7


@pytest.mark.parametrize(
    ("overall", "count", "counts"),
    [(7, 3, True), (8, 3, True), (6, 3, False), (10, 3, False), (7, 2, False)],
)
def test_aggregates_of_groups_count_if_they_are_of_the_groups_that_are(overall: int, count: int, counts: bool) -> None:
    """Since 7 the groups are the same, and 9 is the last Overall."""
    reports, _, kept = grouped()
    levels = [level(0.1 + place / 10, 50.0) for place in range(count)]
    told = {name: each.subjects[SUBJECT] for name, each in reports.items()}
    fresh = {name: Report(2, {SUBJECT: Told(each.level, overall, levels, each.sample)}) for name, each in told.items()}
    wholes, again = aligned(fresh, kept, 9, 10, SIMILAR)
    assert again == kept
    thresholds = [group.threshold for group in wholes[SUBJECT].groups]
    if counts:
        assert thresholds == pytest.approx([0.1, 0.2, 0.3])
        assert [group.evidence for group in wholes[SUBJECT].groups] == [100.0] * 3
    else:
        assert thresholds == [wholes[SUBJECT].level.threshold] * 3


def test_without_similarity_samples_make_no_groups() -> None:
    reports, _, _ = grouped()
    wholes, _ = aligned(reports, {}, 6, 7, AlignOptions())
    assert wholes[SUBJECT].groups == []


def test_groups_are_taken_over_from_what_a_broker_kept() -> None:
    reports, wholes, kept = grouped()
    found = adopted(Overall(7, wholes))
    assert found[SUBJECT].centres == kept[SUBJECT].centres
    again, _ = aligned(reports, found, 7, 8, SIMILAR)
    centres = [group.centre for group in again[SUBJECT].groups]
    assert np.allclose(centres, kept[SUBJECT].centres, atol=0.01)


@pytest.mark.parametrize("scale", [[0.0, 1.0, 1.0], [1e300, 1.0, 1.0], None])
@pytest.mark.parametrize("centre", [[0.5, 0.5, 0.5], [1e308, 0.5, 0.5]])
def test_unusable_groups_are_not_taken_over(scale: list[float] | None, centre: list[float]) -> None:
    groups = [Group(0.5, 1.0, 1, centre), Group(0.5, 1.0, 1, [0.1, 0.1, 0.1])]
    assert adopted(Overall(7, {SUBJECT: Whole(level(0.5), groups, scale)})) == {}


def test_a_message_that_would_be_too_large_loses_what_has_the_least_evidence() -> None:
    groups = [Group(1 / 3, 1e6 / 7, 123_456, [1 / 3, 1 / 7, -1 / 9])] * MAX_GROUPS
    subjects = {
        subject: Whole(level(1 / 3, evidence=float(at + 1)), groups, [1 / 3, 1 / 7, 1 / 9])
        for at, subject in enumerate(names(MAX_SUBJECTS))
    }
    found = fitted(Overall(5, subjects))
    read = decode_overall(encode(found))
    assert read == found
    kept = [bool(whole.groups) for _, whole in sorted(found.subjects.items())]
    assert len(kept) == MAX_SUBJECTS
    assert kept == sorted(kept)
    assert 0 < sum(kept) < MAX_SUBJECTS
    assert fitted(found) == found
    assert math.isclose(found.subjects[names(1)[0]].level.threshold, 1 / 3)
