"""Secure rounds through a broker: a bus, and Mosquitto."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.learn.secure import Participant
from protocol.presence import Roster, status
from protocol.secure import Join, Masked, Message, decode, encode
from protocol.sums import contribution
from protocol.topics import EDGE, SECURE, STATUS
from protocol.transport.base import Delivery, Transport
from protocol.transport.bus import Bus, BusTransport
from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.edge.secure import Outgoing, SecureOptions, SecureRound
from tests.agent.peers.devices import eventually
from tests.brokers import Mosquitto
from tests.server.edge.secure_fleet import LATER, PLACE, SUBJECT, someone

NAMES = [f"d{number:02}" for number in range(9)]
VALUES = {name: contribution(number / 8, 10.0, [0.1, 0.2, 0.3]) for number, name in enumerate(NAMES)}
LOST = "d03"  # which sends its shares and then no more


class Device:
    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self.transport = transport
        self.roster = Roster(PLACE)
        self.participant = Participant(PLACE, name, someone(name), self.key_of, os.urandom, least=3)
        self.roster.watch(transport)
        transport.subscribe(PLACE.path(SECURE, EDGE, name), self.heard, qos=SECURE.qos)
        transport.on_up = self.announce
        transport.start()

    def key_of(self, name: str) -> bytes | None:
        seen = self.roster.get(name)
        return seen.key if seen else None

    def announce(self) -> None:
        birth = status(1, True, someone(self.name).public)
        self.transport.publish(PLACE.path(STATUS, self.name), birth, qos=STATUS.qos, retain=True)

    def join(self) -> None:
        self.send(self.participant.join(7, SUBJECT, VALUES[self.name], LATER))

    def heard(self, delivery: Delivery) -> None:
        message = decode(delivery.payload)
        assert message is not None
        for reply in self.participant.heard(message, 0.0):
            if not (self.name == LOST and isinstance(reply, Masked)):
                self.send(reply)

    def send(self, message: Message) -> None:
        self.transport.publish(PLACE.path(SECURE, self.name, EDGE), encode(message), qos=SECURE.qos)


class Edge:
    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.roster = Roster(PLACE)
        self.lock = threading.Lock()
        self.got: Counter[type] = Counter()
        self.round = SecureRound(PLACE, 7, self.key_of, 100.0, SecureOptions(3, 9, 10.0))
        self.roster.watch(transport)
        transport.subscribe(PLACE.path(SECURE, other=EDGE), self.heard, qos=SECURE.qos)
        transport.start()

    def key_of(self, name: str) -> bytes | None:
        seen = self.roster.get(name)
        return seen.key if seen else None

    def heard(self, delivery: Delivery) -> None:
        sender, message = PLACE.sender(delivery.topic), decode(delivery.payload)
        assert sender is not None
        assert message is not None
        with self.lock:
            self.send(self.round.heard(sender, message, 0.0))
            self.got[type(message)] += 1

    def tick(self, now: float) -> None:
        with self.lock:
            self.send(self.round.tick(now))

    def send(self, outgoing: list[Outgoing]) -> None:
        for name, message in outgoing:
            assert self.transport.publish(PLACE.path(SECURE, EDGE, name), encode(message), qos=SECURE.qos)


@pytest.mark.parametrize("kind", ["bus", "mosquitto"])
def test_a_round_through_a_broker(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        made = _maker(kind, tmp_path, stack)
        edge = Edge(made(EDGE))
        devices = [Device(name, made(name)) for name in NAMES]
        for each in (edge, *devices):
            eventually(lambda each=each: len(each.roster.online()) == len(NAMES))  # type: ignore[misc]
        for device in devices:
            device.join()
        eventually(lambda: edge.got[Join] == len(NAMES))
        edge.tick(100.0)  # no more may join; the cohort begins
        eventually(lambda: edge.got[Masked] == len(NAMES) - 1)
        edge.tick(111.0)
        eventually(lambda: edge.round.over)
        (result,) = edge.round.results
        assert result.total is not None
        assert result.total.devices == len(NAMES) - 1
        assert result.total.threshold == pytest.approx((36 - 3) / 8 / 8)
        assert not edge.round.refused


def _maker(kind: str, folder: Path, stack: ExitStack) -> Callable[[str], Transport]:
    if kind == "bus":
        bus = Bus()
        stack.callback(bus.close)
        return lambda name: BusTransport(bus, name)
    broker = stack.enter_context(Mosquitto(folder))

    def made(name: str) -> Transport:
        transport = MqttTransport(MqttOptions(broker.url, name, first_retry=0.05, longest_retry=0.2))
        stack.callback(transport.close)
        return transport

    return made
