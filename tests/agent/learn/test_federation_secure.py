"""Rounds of which the edge learns the sum alone: devices and the edge's collector on one bus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.learn.federation import RoundOptions
from agent.link.identity import Identity
from protocol.presence import Roster, status
from protocol.topics import SECURE, STATUS, UPDATE
from protocol.transport.base import Delivery
from protocol.transport.bus import Bus, BusTransport
from server.edge.collector import SecureCollector
from server.edge.levels import Recipe
from server.edge.round_store import RoundStore
from server.edge.rounds import RoundOptions as RoundOptionsOfEdge
from server.edge.rounds import Rounds
from tests.agent.learn.devices import CLUSTER, Device, EdgeFake, escalate
from tests.protocol.transport.worlds import wait_until as wait

NAMES = tuple(f"barn-{number}" for number in range(9))


@pytest.fixture
def bus() -> Iterator[Bus]:
    bus = Bus()
    yield bus
    bus.close()


@pytest.fixture
def fleet(bus: Bus, tmp_path: Path) -> Iterator[list[Device]]:
    who = {name: Identity(Ed25519PrivateKey.generate()) for name in NAMES}
    keys = {name: identity.public for name, identity in who.items()}
    devices = [
        Device(bus, tmp_path, options=RoundOptions(secure=True), name=name, who=who[name], key_of=keys.get)
        for name in NAMES
    ]
    bus.settle()
    for device, name in zip(devices, NAMES, strict=True):
        topic = CLUSTER.path(STATUS, name)
        device.transport.publish(topic, status(1, True, keys[name]), qos=1, retain=True)
    yield devices
    for device in devices:
        device.close()


def test_the_edge_hears_the_sum_and_no_update(bus: Bus, fleet: list[Device]) -> None:
    edge = EdgeFake(bus)
    now = [0.0]
    roster = Roster(CLUSTER)
    home = BusTransport(bus, "edge.secure")
    roster.watch(home)
    collector = SecureCollector(CLUSTER, home, roster, lambda: now[0])
    seen: list[Delivery] = []
    home.subscribe(CLUSTER.path(SECURE, other="+"), seen.append, qos=1)
    home.subscribe(CLUSTER.path(UPDATE), seen.append, qos=1)
    home.start()
    for number, device in enumerate(fleet):
        escalate(device.learner, 400 + 200 * number, seed=number)
    own = [device.learner.refresh() for device in fleet]
    bus.settle()
    collector.begin(1, 100.0)
    edge.call(1, secure=True, seconds=100.0)
    wait(lambda: len(seen) == len(NAMES))
    now[0] = 51.0  # joining is over
    wait(lambda: collector.enough())
    [(subject, total)] = collector.finish()
    assert subject == fleet[0].learner.subject
    assert total.devices == len(NAMES)
    weight = sum(one.evidence for one in own if one)
    mean = sum(one.evidence * one.threshold for one in own if one) / weight
    assert total.threshold == pytest.approx(mean, abs=1e-6)
    assert total.evidence == pytest.approx(weight, rel=1e-6)
    assert not edge.updates
    told = b"".join(delivery.payload for delivery in seen)
    assert not any(str(one.threshold).encode()[:8] in told for one in own if one)


def test_a_whole_secure_round_with_the_edges_own_rounds(bus: Bus, fleet: list[Device], tmp_path: Path) -> None:
    for number, device in enumerate(fleet):
        escalate(device.learner, 400 + 200 * number, seed=number)
    own = [device.learner.refresh() for device in fleet]
    home, roster = BusTransport(bus, "edge"), Roster(CLUSTER)
    roster.watch(home)
    options = RoundOptionsOfEdge(every=1000.0, collect=6.0, spread=0.0, settle=0.05, recipe=Recipe("mean"))
    collector = SecureCollector(CLUSTER, home, roster)
    rounds = Rounds(CLUSTER, home, RoundStore(tmp_path / "edge"), options, collector)
    home.on_up, home.on_down = rounds.up, rounds.down
    rounds.start()
    home.start()
    wait(lambda: all(device.federation.number == 1 for device in fleet))
    weight = sum(one.evidence for one in own if one)
    mean = sum(one.evidence * one.threshold for one in own if one) / weight
    found = fleet[0].learner.refresh()
    assert found is not None
    assert found.agreed == pytest.approx(mean, abs=1e-6), "what a device without evidence would go by"
    home.close()
    rounds.close()


def test_a_device_joins_a_secure_round_once(bus: Bus, fleet: list[Device]) -> None:
    edge = EdgeFake(bus)
    joins: list[Delivery] = []
    edge.transport.subscribe(CLUSTER.path(SECURE, other="edge"), joins.append, qos=1)
    for device in fleet:
        escalate(device.learner, 400)
    for _ in range(3):
        edge.call(1, secure=True)
        wait(lambda: len(joins) >= len(NAMES))
        bus.settle()
    assert len(joins) == len(NAMES)
