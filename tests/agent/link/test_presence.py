"""A device's presence on brokers that mix up the order, forget, and are lied to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.link.presence import Presence, SessionNumber
from protocol.presence import Roster, Seen, status
from protocol.topics import STATUS, Cluster
from protocol.transport.base import Transport
from protocol.transport.bus import Bus, BusTransport
from protocol.transport.mqtt import MqttOptions, MqttTransport
from tests.brokers import Broker, Embedded, Mosquitto, Network
from tests.protocol.transport.worlds import wait_until

CLUSTER = Cluster("home", "main")
TOPIC = CLUSTER.path(STATUS, "a")
KEY, SPACE = b"k" * 32, b"s" * 16


@dataclass
class Device:
    transport: Transport
    presence: Presence

    @classmethod
    def of(cls, transport: Transport, folder: Path, key: bytes = KEY) -> Device:
        presence = Presence(TOPIC, key, SessionNumber(folder / "session"), clock=lambda: 0.0)
        transport.will, transport.on_up = presence.will, presence.up
        presence.watch(transport)
        transport.start()
        return cls(transport, presence)


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = Bus()
    yield made
    made.close()


def watching(bus: Bus, id: str = "watch") -> tuple[Roster, list[bool | None]]:
    """A roster, and how the device's presence changed before its eyes."""
    changes: list[bool | None] = []
    roster = Roster(CLUSTER, lambda before, after: changes.append(after and after.online))
    transport = BusTransport(bus, id)
    roster.watch(transport)
    transport.start()
    bus.settle()
    return roster, changes


def seen(roster: Roster) -> Seen:
    found = roster.get("a")
    assert found is not None
    return found


def say(bus: Bus, payload: bytes) -> None:
    """Somebody else publishes the device's status."""
    liar = BusTransport(bus, "liar")
    liar.on_up = lambda: [liar.publish(TOPIC, payload, qos=1, retain=True), None][1]
    liar.start()
    bus.settle()
    liar.close()
    bus.settle()


def test_birth_end_and_return(bus: Bus, tmp_path: Path) -> None:
    roster, changes = watching(bus)
    device = Device.of(BusTransport(bus, "a"), tmp_path)
    device.presence.announce([SPACE])
    bus.settle()
    assert seen(roster) == Seen("a", 1, True, KEY, frozenset([SPACE]))
    bus.cut("a")
    bus.settle()
    assert not seen(roster).online
    bus.restore("a")
    bus.settle()
    assert seen(roster) == Seen("a", 2, True, KEY, frozenset([SPACE]))
    late, _ = watching(bus, "late")
    assert seen(late) == seen(roster)
    device.presence.leave()
    device.transport.close()
    bus.settle()
    assert not seen(roster).online
    assert changes[-1] is False
    assert device.presence.repairs == 0


def test_the_session_number_survives_a_restart(bus: Bus, tmp_path: Path) -> None:
    roster, _ = watching(bus)
    for expected in (1, 2, 3):
        device = Device.of(BusTransport(bus, "a"), tmp_path)
        bus.settle()
        assert seen(roster).session == expected
        device.transport.close()
        bus.settle()


def test_the_will_of_an_old_session_over_the_birth_is_repaired(bus: Bus, tmp_path: Path) -> None:
    """Home Assistant and zigbee2mqtt users know it: retained `offline` of a connection that ended long ago."""
    roster, changes = watching(bus)
    SessionNumber(tmp_path / "session").next(above=41)
    device = Device.of(BusTransport(bus, "a"), tmp_path)
    bus.settle()
    say(bus, status(42, False, KEY))
    assert seen(roster).online
    assert changes == [True]
    assert device.presence.repairs == 1
    late, late_changes = watching(bus, "late")
    assert seen(late).online
    assert late_changes == [True]


def test_an_end_of_the_present_session_begins_another(bus: Bus, tmp_path: Path) -> None:
    roster, changes = watching(bus)
    Device.of(BusTransport(bus, "a"), tmp_path)
    bus.settle()
    say(bus, status(1, False, KEY))
    assert seen(roster) == Seen("a", 2, True, KEY)
    assert changes == [True, False, True]
    assert SessionNumber(tmp_path / "session").now == 2


@pytest.mark.parametrize("payload", [b"", b"rubbish", status(9, True, b"x" * 32), status(9, False, b"x" * 32)])
def test_whatever_else_is_said_is_repaired(bus: Bus, tmp_path: Path, payload: bytes) -> None:
    roster, _ = watching(bus)
    device = Device.of(BusTransport(bus, "a"), tmp_path)
    bus.settle()
    say(bus, payload)
    assert seen(roster) == Seen("a", 1, True, KEY)
    assert device.presence.repairs == 1


def lost(path: Path) -> None:
    path.unlink()


def damaged(path: Path) -> None:
    path.write_bytes(b"\xff\0 not a number")


@pytest.mark.parametrize("harm", [lost, damaged])
def test_a_lost_session_number_is_found_again(bus: Bus, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    roster, _ = watching(bus)
    SessionNumber(tmp_path / "session").next(above=500)
    device = Device.of(BusTransport(bus, "a"), tmp_path)
    bus.settle()
    bus.cut("a")
    bus.settle()
    assert seen(roster) == Seen("a", 502, False, KEY)
    device.transport.close()
    harm(tmp_path / "session")
    device = Device.of(BusTransport(bus, "a"), tmp_path)
    bus.restore("a")
    bus.settle()
    assert device.transport.connected
    assert seen(roster) == Seen("a", 503, True, KEY)


def test_two_devices_under_one_name_do_not_argue_for_ever(bus: Bus, tmp_path: Path) -> None:
    one = Device.of(BusTransport(bus, "a1"), tmp_path / "1")
    two = Device.of(BusTransport(bus, "a2"), tmp_path / "2", key=b"x" * 32)
    bus.settle()
    assert one.presence.repairs + two.presence.repairs <= 16


def test_a_number_from_far_away_is_not_followed(bus: Bus, tmp_path: Path) -> None:
    device = Device.of(BusTransport(bus, "a"), tmp_path)
    bus.settle()
    say(bus, status(1 << 52, False, KEY))
    assert SessionNumber(tmp_path / "session").now == 1
    assert device.presence.repairs == 1


def test_a_folder_that_cannot_be_written_costs_only_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    number = SessionNumber(tmp_path / "file" / "session")
    assert [number.next(), number.next()] == [1, 2]
    assert number.unsaved == 2


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    made = Mosquitto(tmp_path / "broker") if request.param == "mosquitto" else Embedded(tmp_path / "broker")
    with made:
        yield made


def options(url: str, id: str) -> MqttOptions:
    return MqttOptions(url, id, first_retry=0.02, longest_retry=0.2)


def test_a_device_that_is_back_before_its_old_connection_is_missed(broker: Broker, tmp_path: Path) -> None:
    """Its network freezes and it comes back through another: the broker ends the old connection, will and all."""
    roster, watch = Roster(CLUSTER), MqttTransport(options(broker.url, "watch"))
    roster.watch(watch)
    watch.start()
    with Network(broker.port) as network:
        Device.of(MqttTransport(options(network.url, "a")), tmp_path)
        wait_until(lambda: (found := roster.get("a")) and found.session == 1 and found.online)
        network.freeze()
        again = Device.of(MqttTransport(options(broker.url, "a")), tmp_path)
        wait_until(lambda: (found := roster.get("a")) and found.session == 2 and found.online)
        for number in range(5):
            late_roster, late = Roster(CLUSTER), MqttTransport(options(broker.url, f"late{number}"))
            late_roster.watch(late)
            late.start()
            wait_until(lambda: (found := late_roster.get("a")) and found.online)  # noqa: B023
            late.close()
        again.presence.leave()
        again.transport.close()
        wait_until(lambda: not seen(roster).online)
    watch.close()


def test_a_broker_that_forgot_everything_learns_it_again(broker: Broker, tmp_path: Path) -> None:
    roster, watch = Roster(CLUSTER), MqttTransport(options(broker.url, "watch"))
    roster.watch(watch)
    watch.start()
    device = Device.of(MqttTransport(options(broker.url, "a")), tmp_path)
    wait_until(lambda: (found := roster.get("a")) and found.online)
    broker.kill()
    wait_until(lambda: not watch.connected and not device.transport.connected)
    broker.restart(persistence=False)
    wait_until(lambda: (found := roster.get("a")) and found.session >= 2 and found.online)
    device.transport.close()
    watch.close()
