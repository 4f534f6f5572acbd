"""Whole rounds between an edge and light devices, on a bus that loses, doubles and reorders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.rounds import Group, Level, Overall, Whole, decode_call, encode
from protocol.sums import Sum
from protocol.topics import CALL, COORDINATOR, EDGE, OVERALL, UPDATE
from protocol.transport.base import Delivery
from server.edge.levels import Recipe
from server.edge.overview import noisy_releases
from tests.agent.peers.devices import eventually
from tests.server.edge.round_fleet import HOME, OTHER, SUBJECT, Fleet, update


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as fleet:
        yield fleet


def test_fifty_devices_agree_round_after_round(fleet: Fleet) -> None:
    fleet.edge(every=1.0, devices=50)
    for number in range(50):
        fleet.device(f"d{number}", threshold=number / 100)
    first = fleet.agreed(1)
    level = fleet.level(first)
    assert level == Level(pytest.approx(0.245), 500.0, 50)
    for device in fleet.devices:
        device.threshold += 0.5
    assert fleet.level(fleet.agreed(2)).devices == 50
    last = fleet.level(fleet.agreed(3))
    assert last == Level(pytest.approx(0.745), 500.0, 50)
    for device in fleet.devices:
        assert device.calls == sorted(set(device.calls))
    assert fleet.reports[0].subjects[SUBJECT].level == level
    assert fleet.transport.handler_errors == 0


def test_doubled_and_reordered_updates_count_once(fleet: Fleet) -> None:
    held: list[Delivery] = []

    def fault(client: str, delivery: Delivery) -> list[Delivery]:
        """Every update twice, and each third one after the next."""
        if client != "edge" or "/round/update" not in delivery.topic:
            return [delivery]
        late, held[:] = list(held), []
        if len(late) == 0 and delivery.topic.endswith(("0/round/update", "3/round/update")):
            held.append(delivery)
            return []
        return [delivery, *late, delivery, *late]

    fleet.bus.fault = fault
    fleet.edge()
    for number in range(20):
        fleet.device(f"d{number:02}", threshold=0.4)
    fleet.device("last", threshold=0.4)
    fleet.waiting(21)
    fleet.edge(devices=21)  # and a restart in between
    assert fleet.level(fleet.agreed(1)) == Level(pytest.approx(0.4), 210.0, 21)
    eventually(lambda: fleet.look().reasons().get("duplicate", 0) >= 21)


def test_an_older_word_does_not_replace_a_newer_one(fleet: Fleet) -> None:
    fleet.edge(devices=1, every=1.0)
    device = fleet.device("d", threshold=0.2)
    fleet.agreed(2)
    fleet.edge(devices=2)
    fleet.order("round")
    eventually(lambda: fleet.look().waiting == 1)
    device.say(update(1, threshold=0.9))
    eventually(lambda: fleet.look().refusals == {"d": {"superseded": 1}})


def test_lateness_is_seen_in_the_evidence(fleet: Fleet) -> None:
    fleet.edge(devices=1)
    here = fleet.device("here", threshold=0.2)
    fleet.agreed(1)
    fleet.device("late", threshold=0.8)
    fleet.waiting(1)
    here.threshold = 0.2
    fleet.edge(devices=2, least=2)
    fleet.order("round")  # which both answer: the late one's word for round 1 is replaced by that for round 2
    assert fleet.level(fleet.agreed(2)) == Level(pytest.approx(0.5), 20.0, 2)
    fleet.devices.pop().transport.close()
    fleet.edge(devices=1, least=2)
    gone = fleet.speak("gone")
    gone.publish(HOME.path(UPDATE, "gone"), encode(update(1, threshold=0.8)), qos=1)
    fleet.waiting(1)
    fleet.order("round")
    level = fleet.level(fleet.agreed(3))
    assert level.evidence == pytest.approx(10.0 + 10.0 / 3**0.5)  # two rounds late
    assert level.threshold == pytest.approx((0.2 + 0.8 / 3**0.5) / (1 + 1 / 3**0.5))


def test_rounds_end_early_when_those_who_took_part_lately_have_answered(fleet: Fleet) -> None:
    fleet.edge(devices=3)
    for name in "abc":
        fleet.device(name)
    fleet.agreed(1)
    fleet.edge(share=1.0)  # no number any more
    fleet.order("round")
    assert fleet.level(fleet.agreed(2)).devices == 3


def test_a_deadline_ends_a_round_and_an_empty_one_changes_nothing(fleet: Fleet) -> None:
    fleet.edge(collect=0.5, every=1.0)
    eventually(lambda: fleet.look().state.round >= 2)
    assert fleet.look().state.number == 0
    fleet.device("d")
    fleet.agreed(1)


def test_a_device_that_was_away_takes_part_by_itself(fleet: Fleet) -> None:
    fleet.edge(devices=1, every=1.0)
    away = fleet.device("away", threshold=0.3)
    fleet.agreed(1)
    fleet.bus.cut("away")
    fleet.devices.remove(away)
    fleet.device("here", threshold=0.3)
    fleet.agreed(away.number + 5)
    fleet.edge(devices=2)
    fleet.bus.restore("away")
    fleet.devices.append(away)
    number = fleet.look().state.number + 1
    fleet.order("round")
    assert fleet.level(fleet.agreed(number)).devices == 2
    assert fleet.numbers() == sorted(fleet.numbers())


def test_the_broker_goes_away_in_mid_round(fleet: Fleet) -> None:
    fleet.edge(devices=2)
    fleet.device("one")
    fleet.waiting(1)
    fleet.bus.stop()
    fleet.bus.start(persistence=False)  # it has forgotten the Call too
    fleet.device("two")
    assert fleet.level(fleet.agreed(1)).devices == 2
    assert fleet.look().state.round == 1


def test_the_time_that_is_left_survives_a_restart(fleet: Fleet) -> None:
    fleet.edge(collect=30.0)
    fleet.called(1)
    eventually(lambda: fleet.look().left < 28.5)
    fleet.end()
    left = fleet.look().left
    fleet.edge(collect=30.0)
    eventually(lambda: fleet.look().left < left)
    assert fleet.look().state.round == 1


class TestNumbers:
    def lose(self, fleet: Fleet) -> None:
        fleet.end()
        for file in fleet.folder.glob("rounds.db*"):
            file.unlink()

    def test_a_lost_database_goes_on_above_what_the_broker_keeps(self, fleet: Fleet) -> None:
        fleet.edge(devices=2, every=1.0)
        for name in "ab":
            fleet.device(name, threshold=0.25)
        fleet.agreed(3)
        before = fleet.look().state
        self.lose(fleet)
        fleet.edge(devices=2)
        told = fleet.agreed(before.number + 1)
        assert fleet.level(told).threshold == 0.25  # nobody is told that nothing was agreed
        fleet.agreed(before.number + 2)
        assert fleet.look().state.round > before.round
        assert [entry.why for entry in fleet.look().history] == ["round", "found"]
        for device in fleet.devices:
            assert device.calls == sorted(device.calls)
        assert fleet.numbers() == sorted(fleet.numbers())

    def test_with_the_broker_lost_too_it_goes_on_above_what_devices_say(self, fleet: Fleet) -> None:
        fleet.edge(devices=1)
        device = fleet.device("d")
        fleet.called(1)
        device.say(update(70, base=90))
        eventually(lambda: fleet.look().refusals == {"d": {"future": 1}})
        fleet.order("round")
        fleet.agreed(91)
        eventually(lambda: fleet.look().state.round >= 71)

    def test_what_a_lost_database_may_have_counted_is_not_counted_again(self, fleet: Fleet) -> None:
        fleet.edge(devices=1, every=1.0)
        device = fleet.device("d")
        fleet.agreed(3)
        self.lose(fleet)
        fleet.edge(devices=5)
        fleet.waiting(1)
        other = fleet.device("other")
        fleet.waiting(2)
        device.say(update(2))
        other.say(update(2))
        eventually(lambda: fleet.look().reasons() == {"forgotten": 2})

    def test_a_device_cannot_use_the_numbers_up(self, fleet: Fleet) -> None:
        fleet.edge(devices=1)
        liar = fleet.device("liar")
        eventually(lambda: bool(liar.calls))
        for _ in range(3):
            liar.say(update(1 << 53, base=1 << 53, subject=OTHER))
        eventually(lambda: fleet.look().refusals.get("liar", {}).get("future") == 3)
        assert fleet.look().state.heard_number <= (1 << 40) + 2


class TestRollback:
    def test_old_content_comes_back_under_a_new_number(self, fleet: Fleet) -> None:
        fleet.edge(devices=1)
        device = fleet.device("d", threshold=0.2)
        fleet.agreed(1)
        device.threshold = 0.9
        fleet.order("round")
        assert fleet.level(fleet.agreed(2)).threshold == 0.9
        fleet.order("hold")
        fleet.order("rollback", 1)
        assert fleet.agreed(3).subjects == fleet.agreed(1).subjects
        assert fleet.reports[-1].number == 3
        assert fleet.reports[-1].subjects[SUBJECT].level.threshold == 0.2
        fleet.order("round")
        assert fleet.look().state.round == 2  # held
        fleet.edge()
        assert fleet.look().state.held  # over a restart
        fleet.order("resume")
        fleet.called(3)

    def test_a_round_under_way_does_not_undo_what_is_held(self, fleet: Fleet) -> None:
        fleet.edge(devices=1)
        device = fleet.device("d", threshold=0.2)
        fleet.agreed(1)
        fleet.edge(devices=2)
        device.threshold = 0.9
        fleet.order("round")
        fleet.waiting(1)
        fleet.order("hold")
        assert not fleet.look().state.collecting
        fleet.order("rollback", 1)
        assert fleet.level(fleet.agreed(2)).threshold == 0.2
        fleet.device("other", threshold=0.9)  # the last one that the round had waited for
        fleet.waiting(2)
        fleet.order("resume")
        fleet.order("round")
        assert fleet.level(fleet.agreed(3)) == Level(pytest.approx(0.9), pytest.approx(20.0), 2)
        assert [entry.why for entry in fleet.look().history] == ["round", "rollback", "round"]

    def test_what_is_not_in_the_history_is_left_alone(self, fleet: Fleet) -> None:
        fleet.edge(devices=1, history=1)
        fleet.device("d")
        fleet.agreed(1)
        fleet.order("rollback", 7)
        assert fleet.look().state.number == 1


class TestOverall:
    def overall(self, number: int) -> bytes:
        level = Level(0.6, 1000.0, 100)
        groups = [Group(0.1, 1.0, 1, [0.1, 0.1, 1.0]), Group(0.9, 1.0, 1, [0.9, 0.9, 1.0])]
        return encode(Overall(number, {SUBJECT: Whole(level, groups), OTHER: Whole(level)}))

    def publish(self, fleet: Fleet, number: int) -> None:
        topic = HOME.path(OVERALL, COORDINATOR)
        fleet.coordinator.publish(topic, self.overall(number), qos=1, retain=True)

    def test_devices_hear_of_it_and_groups_are_reported(self, fleet: Fleet) -> None:
        fleet.edge(devices=2)
        self.publish(fleet, 5)
        eventually(lambda: fleet.look().overall == 5)
        fleet.called(1)
        for name, mean, threshold in (("low", 0.2, 0.3), ("high", 0.8, 0.7)):
            transport = fleet.speak(name)
            told = update(1, threshold=threshold, statistics=[mean, mean, 1.0])
            transport.publish(HOME.path(UPDATE, name), encode(told), qos=1)
        eventually(lambda: bool(fleet.reports) and SUBJECT in fleet.reports[-1].subjects)
        told_of = fleet.reports[-1].subjects[SUBJECT]
        assert told_of.overall == 5
        assert [group.threshold for group in told_of.groups] == [0.3, 0.7]
        assert sorted(told_of.sample) == [[0.2, 0.2, 1.0], [0.8, 0.8, 1.0]]
        listener = fleet.device("listener")
        eventually(lambda: listener.number == fleet.look().state.number)
        learned = listener.agreed[-1].subjects
        assert learned[SUBJECT].overall is not None
        assert learned[SUBJECT].cluster is not None
        assert learned[OTHER].cluster is None

    def test_an_old_one_is_ignored_and_the_last_one_stays_without_a_coordinator(self, fleet: Fleet) -> None:
        fleet.edge(devices=1)
        self.publish(fleet, 5)
        eventually(lambda: fleet.look().overall == 5)
        self.publish(fleet, 4)
        fleet.coordinator.publish(HOME.path(OVERALL, COORDINATOR), b"", qos=1, retain=True)  # forgotten by the broker
        fleet.edge(devices=1)
        device = fleet.device("d")
        eventually(lambda: bool(device.agreed) and device.agreed[-1].subjects[SUBJECT].cluster is not None)
        assert device.agreed[-1].subjects[SUBJECT].overall is not None
        assert fleet.look().overall == 5


class Cohorts:
    """A collector whose two cohorts have come to an end at once."""

    def __init__(self) -> None:
        self.began: list[int] = []

    def begin(self, round: int, seconds: float) -> None:
        self.began.append(round)

    def enough(self) -> bool:
        return len(self.began) > 1

    def finish(self) -> list[tuple[str, Sum]]:
        return [(SUBJECT, Sum(8, 80.0, 0.2, None)), (SUBJECT, Sum(24, 240.0, 0.6, [0.1, 0.2, 0.3]))]


def test_what_is_refused_is_in_the_epsilon_ledger(fleet: Fleet) -> None:
    fleet.edge(collector=Cohorts())
    fleet.called(1)
    device = fleet.device("d")
    eventually(lambda: fleet.look().reasons() == {"not_secure": 1})  # its answer, without noise
    device.say(update(1, noise=4.0, clip=0.1))
    device.say(update(9, noise=4.0, clip=0.1))
    device.say(update(1, noise=1e-200, clip=0.1))  # which no ledger can count
    eventually(lambda: fleet.look().reasons() == {"not_secure": 2, "future": 1, "noise": 1})
    assert sorted(noisy_releases(fleet.folder)) == [("d", 0.0, 1), ("d", 4.0, 2)]


def test_secure_rounds_take_sums_only_and_begin_anew_after_a_restart(fleet: Fleet) -> None:
    fleet.edge(collector=(cohorts := Cohorts()), recipe=Recipe("mean"))
    device = fleet.device("d")  # which does not know of secure rounds
    eventually(lambda: fleet.look().reasons() == {"not_secure": 1})
    assert all(
        call is not None and call.secure
        for call in (decode_call(told.payload) for told in fleet.wire if told.topic == HOME.path(CALL, EDGE))
    )
    fleet.edge(collector=cohorts, recipe=Recipe("mean"))
    level = fleet.level(fleet.agreed(1))
    assert level == Level(pytest.approx(0.5), 320.0, 32)
    assert cohorts.began == [1, 2]
    assert device.number == 1
    assert fleet.reports[-1].subjects[SUBJECT].sample == [[0.1, 0.2, 0.3]]
