"""The coordinator on a bus: what it does with what it hears."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from protocol.rounds import MAX_JUMP, MAX_NUMBER, Level, Overall, Report, Told, Whole, encode, nearest
from protocol.topics import COORDINATOR, OVERALL, Cluster
from protocol.transport.bus import Bus, BusTransport
from server.coordinator.align import AlignOptions
from server.coordinator.service import ECHO, Coordinator, Link
from server.coordinator.store import NAME, StateFile, read
from tests.agent.peers.devices import eventually
from tests.server.coordinator.fleet import FLEET, KINDS, PATIENCE, SUBJECT, Edge, level, report, statistics

SILENCE = 100.0


class World:
    """Clusters with a bus each, or several on one: `layout` names the clusters of each bus."""

    def __init__(self, folder: Path, layout: Sequence[str]) -> None:
        self.folder = folder / "coordinator"
        self.now = 0.0
        self.stack = ExitStack()
        self.layout = layout
        self.buses = {names: Bus() for names in layout}
        for bus in self.buses.values():
            self.stack.callback(bus.close)
        self.edges = {
            name: Edge(BusTransport(self.buses[names], f"edge {name}"), name) for names in layout for name in names
        }
        self.service: Coordinator | None = None
        for edge in self.edges.values():
            eventually(lambda edge=edge: edge.transport.connected)  # type: ignore[misc]

    def start(self, options: AlignOptions | None = None, file: type[StateFile] = StateFile) -> Coordinator:
        links = [Link(BusTransport(self.buses[names], COORDINATOR), list(names)) for names in self.layout]
        self.service = Coordinator(
            FLEET,
            links,
            file(self.folder),
            options or AlignOptions(),
            pause=0.02,
            silence=SILENCE,
            clock=lambda: self.now,
        )
        self.service.start()
        return self.service

    def stop(self) -> None:
        if self.service:
            self.service.close()
            self.service = None

    def restart(self, options: AlignOptions | None = None, *, lost: bool = False) -> Coordinator:
        self.stop()
        if lost:
            for file in self.folder.iterdir():
                file.unlink()
        return self.start(options)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, ["A", "B", "CD"])
    yield made
    made.stop()
    made.stack.close()


def report_all(world: World, number: int, **thresholds: float) -> None:
    for name, threshold in thresholds.items():
        world.edges[name].tell(report(number, threshold))


def test_every_cluster_hears_what_all_have_learned(world: World) -> None:
    world.start()
    report_all(world, 1, A=0.2, B=0.3, C=0.3, D=0.4)
    for edge in world.edges.values():
        overall = edge.wait(0.3)
        assert overall.subjects == {SUBJECT: Whole(Level(pytest.approx(0.3), pytest.approx(400.0), 40))}


def test_nothing_is_published_without_a_change(world: World) -> None:
    world.start()
    report_all(world, 1, A=0.2, B=0.4)
    number = world.edges["A"].wait(0.3).number
    for again in range(2, 8):
        report_all(world, again, A=0.2, B=0.4)
    world.edges["A"].tell(report(8, 0.4))
    assert world.edges["A"].wait(0.4).number == number + 1
    assert len(set(world.edges["A"].numbers)) == len(world.edges["A"].heard)


def test_malformed_and_old_reports_change_nothing(world: World) -> None:
    service = world.start()
    report_all(world, 5, A=0.2, B=0.4)
    world.edges["A"].wait(0.3)
    hostile = world.edges["B"]
    good = encode(report(6, 0.9))
    for payload in (
        b"{",
        b"",
        good.replace(b"0.9", b"NaN"),
        good.replace(b"0.9", b"1e999"),
        good.replace(b"0.9", b"7.0"),
        good.replace(b"100.0", b"-1.0"),
        good.replace(b'"number":6', b'"number":-6'),
        good.replace(b'"version":1', b'"version":2'),
        encode(report(4, 0.9)),
        b"[" * 100_000,
        b"x" * (257 << 10),
    ):
        hostile.send(payload)
    hostile.tell(report(7, 0.5))
    world.edges["A"].wait(0.35)
    assert all(overall.subjects[SUBJECT].level.threshold <= 0.4 for overall in world.edges["A"].heard)
    assert (service.counts["malformed"], service.counts["version"]) == (8, 1)
    assert service.counts["old"] == 1


def test_a_cluster_that_is_silent_counts_for_the_stated_time_over_a_restart(world: World) -> None:
    world.start()
    report_all(world, 1, A=0.2, B=0.4)
    world.edges["A"].wait(0.3)
    world.now = 0.6 * SILENCE
    world.restart()
    world.edges["A"].tell(report(2, 0.3))
    world.edges["A"].wait(0.35)
    world.now = 1.1 * SILENCE
    world.edges["A"].tell(report(3, 0.25))
    assert world.edges["A"].wait(0.25).subjects[SUBJECT].level.devices == 10
    world.edges["B"].tell(report(1, 0.45))
    world.edges["A"].wait(0.35)  # it begins anew


def test_the_last_word_stays_when_nobody_counts_any_more(world: World) -> None:
    world.start()
    report_all(world, 1, A=0.2, B=0.4)
    number = world.edges["A"].wait(0.3).number
    world.now = 1.1 * SILENCE
    world.restart()
    world.edges["A"].tell(Report(2))
    eventually(lambda: read(world.folder).heard["A"].report == Report(2))  # and this with it: all are silent
    world.edges["B"].tell(report(2, 0.5))
    assert world.edges["A"].wait(0.5).number == number + 1
    assert all(overall.subjects for overall in world.edges["A"].heard)


def test_what_cannot_be_brought_together_does_not_end_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def failing(*_: object) -> None:
        failed.set()
        raise FloatingPointError

    with monkeypatch.context() as broken:
        broken.setattr("server.coordinator.service.aligned", failing)
        world.start()
        world.edges["A"].tell(report(1, 0.2))
        assert failed.wait(PATIENCE)
    world.edges["A"].tell(report(2, 0.3))
    world.edges["A"].wait(0.3)


def test_a_flood_costs_nothing_and_ends(world: World) -> None:
    service = world.start()
    report_all(world, 1, A=0.2, B=0.4)
    world.edges["A"].wait(0.3)
    for number in range(2, 500):
        world.edges["B"].tell(report(number, 0.9))
    world.buses["B"].settle()
    assert service.counts["flood"] >= 400
    world.now += 10.0
    world.edges["B"].tell(report(1000, 0.6))
    world.edges["A"].wait(0.4)


class TestNumbers:
    def test_they_go_on_after_a_restart(self, world: World) -> None:
        world.start()
        report_all(world, 1, A=0.2)
        first = world.edges["A"].wait(0.2).number
        world.restart()
        report_all(world, 2, A=0.3)
        assert world.edges["A"].wait(0.3).number == first + 1

    @pytest.mark.parametrize("source", ["broker", "report"])
    def test_a_lost_file_is_made_up_for(self, world: World, source: str) -> None:
        world.start()
        report_all(world, 1, A=0.2, C=0.2)
        first = world.edges["A"].wait(0.2)
        world.edges["C"].wait(0.2)
        if source == "report":
            world.stop()
            world.edges["A"].tell(Report(9, {SUBJECT: Told(level(0.2), overall=first.number + 70)}))
            for bus in world.buses.values():
                bus.stop()
                bus.start(persistence=False)
        world.restart(lost=True)
        if source == "broker":
            report_all(world, 2, A=0.4, C=0.4)
            last = world.edges["A"].wait(0.4)
            assert last.number > first.number
        else:
            world.edges["A"].wait_for(lambda: world.edges["A"].numbers[-1] == first.number + 71)
        for edge in world.edges.values():
            assert edge.numbers == sorted(edge.numbers)

    def test_a_file_that_is_from_a_backup_is_made_up_for(self, world: World) -> None:
        world.start()
        report_all(world, 1, A=0.2)
        world.edges["A"].wait(0.2)
        world.stop()
        backup = (world.folder / NAME).read_bytes()
        world.start()
        for number in range(2, 6):
            report_all(world, number, A=number / 10)
            world.edges["A"].wait(number / 10)
        world.stop()
        (world.folder / NAME).write_bytes(backup)
        world.start()
        report_all(world, 6, A=0.6)
        world.edges["A"].wait(0.6)
        assert world.edges["A"].numbers == sorted(world.edges["A"].numbers)

    def test_what_is_heard_while_it_writes_is_not_undercut(self, world: World) -> None:
        """B's broker comes back, with a number from before the file was lost, between two steps of the worker."""
        writing, go_on = threading.Event(), threading.Event()

        class Slow(StateFile):
            def write(self, *arguments: Any) -> None:
                if arguments[2]:  # there is something to publish
                    writing.set()
                    assert go_on.wait(PATIENCE)
                super().write(*arguments)

        topic = Cluster(FLEET, "B").path(OVERALL, COORDINATOR)
        world.edges["B"].transport.publish(topic, encode(Overall(500)), qos=1, retain=True)
        world.edges["B"].wait_for(lambda: world.edges["B"].numbers == [500])
        world.buses["B"].stop()
        world.start(file=Slow)
        report_all(world, 1, A=0.2)
        assert writing.wait(PATIENCE)
        world.buses["B"].start()
        world.buses["B"].settle()
        go_on.set()
        world.edges["B"].wait(0.2)
        assert world.edges["B"].said == [500, 501]

    @pytest.mark.parametrize(("kept", "first"), [(MAX_JUMP + 5, MAX_JUMP + 6), (MAX_NUMBER, 1)])
    def test_what_a_broker_kept_is_believed_while_numbers_are_left(self, world: World, kept: int, first: int) -> None:
        topic = Cluster(FLEET, "A").path(OVERALL, COORDINATOR)
        world.edges["A"].transport.publish(topic, encode(Overall(kept)), qos=1, retain=True)
        report_all(world, 1, A=0.2)
        world.buses["A"].settle()
        world.start()
        assert world.edges["A"].wait(0.2).number == first

    def test_a_lie_about_them_moves_them_once_and_not_far(self, world: World) -> None:
        service = world.start()
        liar = world.edges["B"]
        report_all(world, 1, A=0.2)
        world.edges["A"].wait(0.2)
        liar.tell(Report(1, {SUBJECT: Told(level(0.2), overall=MAX_NUMBER)}))
        liar.tell(Report(2, {SUBJECT: Told(level(0.2), overall=MAX_JUMP)}))
        liar.tell(Report(3, {SUBJECT: Told(level(0.2), overall=2 * MAX_JUMP)}))
        report_all(world, 2, A=0.4)
        world.edges["A"].wait(0.3)
        assert MAX_JUMP < world.edges["A"].numbers[-1] < MAX_JUMP + 10
        assert service.counts["absurd"] == 2


class TestBrokers:
    def test_one_that_is_gone_does_not_hold_up_the_others(self, world: World) -> None:
        world.start()
        report_all(world, 1, A=0.2, B=0.4, C=0.3, D=0.3)
        for edge in world.edges.values():
            edge.wait(0.3)
        world.buses["B"].stop()
        report_all(world, 2, A=0.4)
        for name in "ACD":
            world.edges[name].wait(0.35)
        world.buses["B"].start(persistence=True)
        world.edges["B"].wait(0.35)

    def test_one_that_forgot_is_told_again(self, world: World) -> None:
        world.start()
        report_all(world, 1, A=0.2, B=0.4)
        before = world.edges["A"].wait(0.3)
        world.buses["A"].stop()
        world.buses["A"].start(persistence=False)
        late = Edge(BusTransport(world.buses["A"], "late"), "A")
        assert late.wait(0.3) == before

    def test_one_that_keeps_something_else_is_told_again(self, world: World) -> None:
        world.start()
        report_all(world, 1, A=0.2, B=0.4)
        before = world.edges["A"].wait(0.3)
        world.stop()
        topic = Cluster(FLEET, "A").path(OVERALL, COORDINATOR)
        for payload in (b"nonsense", encode(Overall(before.number - 1)), b""):
            world.edges["A"].transport.publish(topic, payload, qos=1, retain=True)
            world.buses["A"].settle()
            world.restart()
            late = Edge(BusTransport(world.buses["A"], f"late {payload!r}"), "A")
            assert late.wait_for(lambda late=late: late.numbers[-1:] == [before.number]) == before
            world.stop()

    def test_one_that_keeps_the_last_one_is_left_alone(self, world: World) -> None:
        world.start()
        report_all(world, 1, A=0.2, B=0.4)
        for name in "AB":
            world.edges[name].wait(0.3)
        heard = len(world.edges["B"].heard)
        world.restart()
        report_all(world, 2, A=0.4)
        world.edges["B"].wait(0.4)
        assert len(world.edges["B"].heard) == heard + 1

    def test_nothing_is_said_before_the_broker_was_heard(self, world: World) -> None:
        """Whatever is lost: what the broker kept is known before something is published there."""
        topic = Cluster(FLEET, "A").path(OVERALL, COORDINATOR)
        said: list[str] = []
        spy = BusTransport(world.buses["A"], "spy")
        spy.subscribe("#", lambda delivery: None if delivery.retained else said.append(delivery.topic))
        spy.start()
        world.edges["A"].transport.publish(topic, encode(Overall(500)), qos=1, retain=True)
        report_all(world, 1, A=0.2)
        world.buses["A"].settle()
        world.start()
        assert world.edges["A"].wait(0.2).number == 501
        assert [one.removeprefix(topic) for one in said if COORDINATOR in one][1:] == [ECHO.removeprefix("overall"), ""]


def test_groups_are_found_told_of_and_filled_by_the_edges(world: World) -> None:
    options = AlignOptions(similarity=True)
    world.start(options)
    samples = {name: statistics(60, seed)[0] for seed, name in enumerate("AB")}
    for name, threshold in {"A": 0.2, "B": 0.4}.items():
        world.edges[name].tell(report(1, threshold, sample=samples[name]))
    edge = world.edges["D"]  # it knows nothing by itself
    overall = edge.wait_for(lambda: (whole := edge.whole()) and whole.level.devices == 20 and len(whole.groups) == 3)
    own = [nearest(kind.tolist(), overall.subjects[SUBJECT]) for kind in KINDS]
    assert sorted(each for each in own if each is not None) == [0, 1, 2]

    levels = [level(0.1 + place / 10) for place in range(3)]
    for number in (2, 3, 4):
        for name, threshold in {"A": 0.2, "B": 0.4}.items():
            told = Told(level(threshold), edge.numbers[-1], levels, statistics(60, number)[0])
            world.edges[name].tell(Report(number, {SUBJECT: told}))
    overall = edge.wait_for(lambda: (whole := edge.whole()) and [each.evidence for each in whole.groups] == [200.0] * 3)
    assert [group.threshold for group in overall.subjects[SUBJECT].groups] == pytest.approx([0.1, 0.2, 0.3])

    centres = [group.centre for group in overall.subjects[SUBJECT].groups]
    world.restart(options)
    world.edges["A"].tell(Report(5, {SUBJECT: Told(level(0.3), edge.numbers[-1], levels, samples["A"])}))
    overall = edge.wait(0.35)
    assert [group.centre for group in overall.subjects[SUBJECT].groups] == centres
    assert read(world.folder).groupings[SUBJECT].centres == centres
