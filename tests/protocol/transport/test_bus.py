"""What only the bus can do: faults on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from protocol.transport.base import Delivery, Will
from protocol.transport.bus import Bus, BusTransport
from tests.protocol.transport.worlds import Inbox


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = Bus()
    yield made
    made.close()


def client(bus: Bus, id: str, filter: str = "") -> tuple[BusTransport, Inbox]:
    transport, inbox = BusTransport(bus, id, will=lambda: Will(f"will/{id}", id.encode())), Inbox()
    if filter:
        transport.subscribe(filter, inbox, qos=1)
    transport.start()
    bus.settle()
    return transport, inbox


def test_a_fault_can_drop_repeat_and_reorder(bus: Bus) -> None:
    a, _ = client(bus, "a")
    _, b = client(bus, "b", "t")
    _, c = client(bus, "c", "t")
    held: list[Delivery] = []

    def fault(client: str, delivery: Delivery) -> Sequence[Delivery]:
        if client == "c":
            return ()
        held.append(delivery)
        return [held.pop(), held.pop(), delivery] if len(held) == 2 else ()

    bus.fault = fault
    for payload in (b"1", b"2"):
        a.publish("t", payload, qos=1)
    bus.settle()
    assert b.payloads == [b"2", b"1", b"2"]
    assert c.got == []


def test_a_client_that_comes_twice_takes_the_session_over(bus: Bus) -> None:
    _, watch = client(bus, "watch", "will/#")
    first, _ = client(bus, "a")
    second, inbox = client(bus, "a", "t")
    bus.settle()
    assert not first.connected
    assert second.connected
    assert watch.payloads == [b"a"]
    second.publish("t", b"x", qos=1)
    bus.settle()
    assert inbox.payloads == [b"x"]


def test_a_dead_broker_sends_no_wills_and_takes_everybody_back(bus: Bus) -> None:
    _, watch = client(bus, "watch", "will/#")
    a, _ = client(bus, "a")
    bus.stop()
    bus.settle()
    assert not a.connected
    bus.start(persistence=True)
    bus.settle()
    assert a.connected
    assert watch.got == []


def test_a_thousand_devices_hear_each_other(bus: Bus) -> None:
    devices = [BusTransport(bus, f"d{i}") for i in range(1000)]
    for number, device in enumerate(devices):
        device.inbox.add(f"to/{number}", lambda delivery: None, 1)
        device.subscribe("all", lambda delivery: None)
        device.start()
    bus.settle()
    for number, device in enumerate(devices):
        device.publish(f"to/{(number + 1) % 1000}", b"x", qos=1)
    devices[0].publish("all", b"hello")
    bus.settle()
    assert all(device.messages_down == 2 for device in devices)
    assert sum(device.messages_up for device in devices) == 1001
