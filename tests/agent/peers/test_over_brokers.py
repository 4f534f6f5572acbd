"""Devices over real brokers: outages, rubbish, and what can be seen on the wire."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.topics import TABLE
from protocol.transport.mqtt import MqttOptions, MqttTransport
from tests.agent.peers.devices import A, Device, acquainted, eventually
from tests.brokers import Broker, Embedded, Mosquitto, Network
from tests.protocol.entries import entry

Make = Callable[..., Device]


@pytest.fixture(params=[Mosquitto, Embedded])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    with request.param(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def make(broker: Broker, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:
        numbers = iter(range(1, 100))

        def made(name: str, url: str = "") -> Device:
            options = MqttOptions(url=url or broker.url, client_id=name, first_retry=0.05, longest_retry=0.2)
            transport = MqttTransport(options)
            return stack.enter_context(Device(tmp_path, name, next(numbers), transport=transport))

        yield made


def test_gossip_and_questions(make: Make) -> None:
    lamp, fridge = make("lamp"), make("fridge")
    acquainted(lamp, fridge)
    for number in range(50):
        lamp.learn(number)
    eventually(lambda: all(map(fridge.knows, range(50))))
    fridge.memory.add([entry(fridge.who, 100, token=42)])
    reply = lamp.told(100)
    assert reply is not None
    assert reply.tokens == [42]
    assert fridge.told(101) is None


@pytest.mark.parametrize("persistence", [True, False])
def test_nothing_is_lost_when_the_broker_goes_and_comes_back(make: Make, broker: Broker, persistence: bool) -> None:
    lamp, fridge = make("lamp"), make("fridge")
    acquainted(lamp, fridge)
    for number in range(30):
        lamp.learn(number)
    broker.kill()
    for number in range(30, 60):
        lamp.learn(number)
    eventually(lambda: lamp.network.gossip.sent == 60)
    broker.restart(persistence=persistence and broker.keeps)
    eventually(lambda: lamp.network.outbox.waiting == 0)
    acquainted(lamp, fridge)
    # What the broker had acknowledged before it died without persistence is gone with it; all else arrives.
    eventually(lambda: all(map(fridge.knows, range(30, 60))))
    eventually(lambda: fridge.network.intake.counts["accepted"] == fridge.memory.stats().entries)


def test_a_device_that_was_away_gets_what_it_missed(make: Make, broker: Broker) -> None:
    with Network(broker.port) as network:
        lamp, fridge = make("lamp"), make("fridge", network.url)
        acquainted(lamp, fridge)
        network.drop()
        eventually(lambda: not lamp.sees(fridge))
        for number in range(20):
            lamp.learn(number)
        eventually(lambda: lamp.network.outbox.sent > 0 and lamp.network.outbox.waiting == 0)
        network.well()
        eventually(lambda: all(map(fridge.knows, range(20))))


def test_rubbish_on_every_topic_changes_nothing(make: Make, broker: Broker) -> None:
    lamp, fridge = make("lamp"), make("fridge")
    acquainted(lamp, fridge)
    rubbish = ["", "x", "{", "[1,2", '{"version":1}', "\x93\x01\x02", "A" * 100_000, '{"version":99}']
    for kind in TABLE:
        for sender in ("fridge", "edge", "nobody", "lamp"):
            topic = A.path(kind, sender, "lamp")
            if kind.message == "Status" and sender in ("fridge", "lamp"):
                continue  # whoever can write a device's status can say that it is gone
            for text in rubbish:
                command = ["mosquitto_pub", "-p", str(broker.port), "-q", "1", "-t", topic, "-s" if text else "-n"]
                subprocess.run(command, input=text, text=True, check=True, timeout=60)
    fridge.learn(1)
    eventually(lambda: lamp.knows(1))
    fridge.memory.add([entry(fridge.who, 2, token=42)])
    reply = lamp.told(2)
    assert reply is not None
    assert reply.tokens == [42]
    assert lamp.memory.stats().entries == 2
    counts = lamp.network.intake.counts, lamp.network.answerer.counts, lamp.network.resolver.counts
    assert all(count["malformed"] > 5 for count in counts)
    assert lamp.transport.handler_errors == 0


def test_nothing_private_is_on_the_wire(make: Make, broker: Broker) -> None:
    with Network(broker.port) as network:
        lamp, fridge = make("lamp", network.url), make("fridge")
        acquainted(lamp, fridge)
        secret = lamp.learn(1, private=True)
        assert lamp.ask(2, private=True) is None
        public = lamp.learn(3)
        assert lamp.told(4) is None
        eventually(lambda: fridge.knows(3))
        sent = bytes(network.passed)
    assert public.key in sent
    assert entry(lamp.who, 4).key in sent
    assert secret.key not in sent
    assert entry(lamp.who, 2).key not in sent
