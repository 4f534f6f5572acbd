"""Power cuts and broker failures while the outbox is at work."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.link.outbox import Outbox
from protocol.transport.bus import Bus, BusTransport
from protocol.transport.mqtt import MqttOptions, MqttTransport
from tests.brokers import ROOT, Broker, Embedded, Mosquitto, Network
from tests.protocol.transport.worlds import PATIENCE, Inbox, wait_until

KILLS = 12


def test_nothing_that_was_on_the_disk_is_missing_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    chance = random.Random(1)
    told = begin = 0
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.agent.link.writer", str(path), str(begin)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(chance.randrange(1, 60)):
                told = int(writer.stdout.readline())
            writer.kill()
            told = max([told, *map(int, writer.stdout.read().split())])
        begin = told + 1
    bus = Bus()
    inbox, reader, transport = Inbox(), BusTransport(bus, "reader"), BusTransport(bus, "device")
    reader.subscribe("t", inbox, qos=1)
    reader.start()
    outbox = Outbox(path, transport)
    transport.on_up = outbox.up
    transport.start()
    wait_until(lambda: outbox.waiting == 0)
    numbers = list(map(int, inbox.payloads))
    # A run begins at the last number told, so what a killed one wrote beyond it comes once more.
    assert set(range(told + 1)) <= set(numbers)
    assert len(numbers) < 2 * told
    outbox.close()
    bus.close()


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    made = Mosquitto(tmp_path / "broker") if request.param == "mosquitto" else Embedded(tmp_path / "broker")
    with made:
        yield made


class Device:
    """An outbox over MQTT, filled by a thread of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        options = MqttOptions(url, "device", keepalive=1, first_retry=0.02, longest_retry=0.2)
        self.transport = MqttTransport(options)
        self.outbox = Outbox(folder / "outbox.db", self.transport)
        self.transport.on_up, self.transport.on_down = self.outbox.up, self.outbox.down
        self.count = 0
        self.enough = threading.Event()
        self.thread = threading.Thread(target=self._fill)
        self.transport.start()
        self.thread.start()

    def _fill(self) -> None:
        while not self.enough.wait(0.002):
            self.outbox.put("t", b"%d" % self.count)
            self.count += 1

    def finish(self) -> None:
        """Until the broker has acknowledged everything."""
        self.enough.set()
        self.thread.join()
        wait_until(lambda: self.outbox.waiting == 0, f"{self.outbox.waiting} wait: {self.transport.state}")

    def close(self) -> None:
        self.enough.set()
        self.outbox.close()
        self.transport.close()


def reader(url: str) -> tuple[MqttTransport, Inbox]:
    transport, inbox = MqttTransport(MqttOptions(url, "reader", first_retry=0.02, longest_retry=0.2)), Inbox()
    subscribed = threading.Event()
    transport.subscribe("t", inbox, qos=1)
    transport.subscribe("own", lambda delivery: subscribed.set(), qos=1)
    transport.start()
    wait_until(lambda: transport.connected and transport.publish("own", b"", qos=1))
    assert subscribed.wait(PATIENCE), "what is published comes back once the subscriptions hold"
    return transport, inbox


def complete(inbox: Inbox, count: int) -> None:
    inbox.wait_for(lambda: len(set(inbox.payloads)) >= count)
    first = [int(payload) for payload in dict.fromkeys(inbox.payloads)]
    assert first == list(range(count))


def test_a_broker_that_dies_under_load(broker: Broker, tmp_path: Path) -> None:
    """What it had acknowledged may die with it; everything else comes, and nobody is stuck."""
    other, inbox = reader(broker.url)
    device = Device(broker.url, tmp_path)
    for _ in range(3):
        seen = len(inbox.got)
        inbox.wait(seen + 50)
        broker.kill()
        wait_until(lambda: not device.transport.connected)
        broker.restart(persistence=False)
        wait_until(lambda: device.transport.connected and other.connected)
    seen = len(inbox.got)
    inbox.wait(seen + 50)
    device.finish()
    inbox.wait_for(lambda: b"%d" % (device.count - 1) in inbox.payloads)
    assert len(set(inbox.payloads)) <= device.count
    device.close()
    other.close()


def test_a_broker_that_is_restarted_with_its_memory_loses_nothing(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker") as broker:
        other, inbox = reader(broker.url)
        device = Device(broker.url, tmp_path)
        for _ in range(3):
            inbox.wait(len(inbox.got) + 50)
            broker.stop()
            wait_until(lambda: not device.transport.connected)
            broker.restart(persistence=True)
            wait_until(lambda: device.transport.connected)
        device.finish()
        complete(inbox, device.count)
        device.close()
        other.close()


def test_a_network_that_freezes_and_breaks_loses_nothing(broker: Broker, tmp_path: Path) -> None:
    with Network(broker.port) as network:
        other, inbox = reader(broker.url)
        device = Device(network.url, tmp_path)
        for fail in (network.freeze, network.drop, network.freeze):
            inbox.wait(len(inbox.got) + 50)
            fail()
            wait_until(lambda: not device.transport.connected)
            network.well()
            wait_until(lambda: device.transport.connected)
        device.finish()
        complete(inbox, device.count)
        device.close()
        other.close()
