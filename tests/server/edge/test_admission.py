"""Which updates are refused, for which reason; and whose are implausible without being malformed."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
import pytest

from protocol.rounds import Group, Learned, Level, Overall, Told, Update, Whole, decode_agreed, decode_report, encode
from protocol.topics import AGREED, REPORT, UPDATE
from server.edge.admission import BURST, REASONS, Admission
from server.edge.aggregate import Floats
from server.edge.levels import Kept, Pending, Recipe, agreed, conclude, implausible, merged, report
from tests.agent.peers.devices import eventually
from tests.server.edge.round_fleet import HOME, SUBJECT, Fleet, update

NAN = math.nan


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (update(5), None),
        (update(4), None),
        (update(5, threshold=0.0), None),
        (update(5, threshold=1.0, noise=1.5, clip=0.1), None),
        (update(5, threshold=NAN), "out_of_range"),
        (update(5, threshold=NAN, noise=1e-200), "noise"),
        (update(5, threshold=math.inf), "out_of_range"),
        (update(5, threshold=1.0000001), "out_of_range"),
        (update(5, threshold=-0.1), "out_of_range"),
        (update(5, evidence=0.0), "evidence"),
        (update(5, evidence=-1.0), "evidence"),
        (update(5, evidence=NAN), "evidence"),
        (update(5, evidence=1e9), "evidence"),
        (update(5, statistics=[0.1, NAN, 1.0]), "statistics"),
        (update(5, statistics=[0.1, 0.1, 1e9]), "statistics"),
        (update(5, noise=NAN), "noise"),
        (update(5, noise=-1.0), "noise"),
        (update(5, noise=1e-200), "noise"),
        (update(5, clip=math.inf), "noise"),
        (update(6), "future"),
        (update(2), "forgotten"),
    ],
)
def test_reasons(said: Update, reason: str | None) -> None:
    assert Admission(lambda: 0.0).judge(said, round=5, floor=2) == reason
    assert reason is None or reason in REASONS


def test_a_flood_is_held_back_by_sender() -> None:
    admission = Admission(lambda: 0.0)
    assert [admission.floods("a") for _ in range(BURST + 2)] == [False] * BURST + [True] * 2
    assert not admission.floods("b")


def test_refusals_are_counted_by_device_and_never_quoted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with Fleet(tmp_path) as fleet:
        fleet.edge()
        fleet.called(1)
        mallory = fleet.speak("mallory")
        topic = HOME.path(UPDATE, "mallory")
        for payload in (
            b"very private words",
            b'{"version":1,"round":1,"base":0,"subject":"x","threshold":0.5,"evidence":1}',
            b'{"version":1,"round":1,"base":0,"subject":"0123456789abcdef","threshold":1e999,"evidence":1}',
            b'{"version":1,"round":1,"base":0,"subject":"0123456789abcdef","threshold":NaN,"evidence":1}',
            b'{"version":9}',
            b"x" * (UPDATE.limit + 1),
            encode(update(1, threshold=3.0)),
            encode(update(9)),
        ):
            mallory.publish(topic, payload, qos=1)
        eventually(lambda: sum(fleet.look().reasons().values()) == 8)
        refused = fleet.look().refusals["mallory"]
        assert refused.pop("malformed") + refused.pop("out_of_range") == 6
        assert refused == {"version": 1, "future": 1}
        assert fleet.look().devices == 0
        assert fleet.transport.handler_errors == 0
    assert "refused" in caplog.text
    assert "private" not in caplog.text


class TestImplausible:
    honest = np.random.default_rng(1).normal(0.3, 0.05, 50).clip(0, 1)

    def judge(self, values: Floats, before: float = NAN, groups: Floats | None = None) -> list[int]:
        given = np.full(len(values), -1) if groups is None else groups
        return np.flatnonzero(implausible(values, np.full(len(values), before), given)).tolist()

    def test_one_that_is_far_from_the_others(self) -> None:
        assert self.judge(np.append(self.honest, 0.95)) == [50]

    def test_whoever_says_it_twice_is_believed(self) -> None:
        assert self.judge(np.append(self.honest, 0.95), before=0.93) == []

    def test_a_few_devices_tell_nothing(self) -> None:
        assert self.judge(np.append(self.honest[:10], 0.95)) == []

    def test_two_kinds_of_devices_are_all_honest(self) -> None:
        assert self.judge(np.append(self.honest, self.honest[:20] + 0.5)) == []

    def test_devices_with_other_data_are_measured_by_their_own_group(self) -> None:
        other = self.honest[:25] + 0.6
        groups = np.repeat([0, 1], [50, 25])
        assert self.judge(np.append(self.honest, other), groups=groups) == []
        swapped = np.append(np.append(self.honest, 0.95), other)
        assert self.judge(swapped, groups=np.repeat([0, 1], [51, 25])) == [50]

    def test_it_does_not_count_and_is_named(self) -> None:
        n = 51
        thresholds = np.append(self.honest, 0.99)
        pending = Pending(
            [f"d{at}" for at in range(n)],
            np.ones(n),
            thresholds,
            np.full(n, 10.0),
            np.full((n, 3), NAN),
            np.full(n, NAN),
        )
        kept, wrong = conclude(pending, 1, None, 0, Recipe("mean"), 1, Random(1))
        assert wrong == ["d50"]
        assert kept.told.level == Level(pytest.approx(self.honest.mean()), pytest.approx(500.0), 50)


@pytest.mark.parametrize(("least", "devices"), [(1, [3, 2, 1]), (2, [3, 2, 0]), (4, [0, 0, 0])])
def test_nothing_is_told_of_fewer_devices_than_wanted(least: int, devices: list[int]) -> None:
    statistics = np.array([[0.1, 0.1, 1.0], [0.1, 0.1, 1.0], [0.9, 0.9, 1.0]])
    groups = [Group(0.5, 1.0, 1, [0.1, 0.1, 1.0]), Group(0.5, 1.0, 1, [0.9, 0.9, 1.0])]
    whole = Whole(Level(0.5, 1.0, 1), groups)
    pending = Pending(["a", "b", "c"], np.ones(3), np.full(3, 0.3), np.full(3, 10.0), statistics, np.full(3, NAN))
    told = conclude(pending, 1, whole, 7, Recipe(), least, Random(1))[0].told
    assert [level.devices for level in (told.level, *told.groups)] == devices
    assert all(bool(level.evidence) == bool(level.devices) for level in told.groups)


class TestMessages:
    def kept(self, devices: int, round: int, sample: int = 0, groups: int = 0) -> Kept:
        level = Level(0.123456789, 1000.0, devices)
        return Kept(Told(level, 1, [level] * groups, [[0.123, 0.456, 789.1]] * sample), round)

    def test_made_up_subjects_do_not_push_out_what_others_share(self) -> None:
        shared = {SUBJECT: self.kept(50, 1)}
        made_up = {f"{number:016x}": self.kept(1, 2) for number in range(60)}
        assert SUBJECT in merged(shared, made_up, 2)
        assert len(merged(shared, made_up, 2)) == 32
        newer = {subject: self.kept(1, 2000) for subject in made_up}
        assert SUBJECT not in merged(shared, newer, 2000)  # which nobody has spoken of since

    def test_the_largest_messages_fit(self) -> None:
        numbers = count(1)
        kept = {f"{next(numbers):016x}": self.kept(10_000, 1, sample=256, groups=16) for _ in range(32)}
        group = Group(0.123456789012345, 123456.789012345, 10_000, [0.123456789012345] * 3)
        whole = Whole(Level(0.5, 1.0, 1), [group] * 16, [0.123456789012345] * 3)
        told = agreed(7, 7, kept, Overall(1, dict.fromkeys(kept, whole)))
        assert len(told) <= AGREED.limit
        read = decode_agreed(told)
        assert read is not None
        assert next(iter(read.subjects.values())) == Learned(Level(0.123456789, 1000.0, 10_000), whole)
        sent = report(7, kept)
        assert len(sent) <= REPORT.limit
        reported = decode_report(sent)
        assert reported is not None
        assert len(reported.subjects) == 32
        assert all(of.sample for of in reported.subjects.values())
