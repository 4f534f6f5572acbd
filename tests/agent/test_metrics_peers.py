"""What was dropped on MQTT can be seen on the device's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.api.metrics import Metrics
from agent.device import Device
from protocol.peers import Answer, Ask, encode
from protocol.presence import status
from protocol.topics import ANSWER, ASK, DIRECTORY, EDGE, STATUS
from protocol.transport.bus import Bus
from tests.agent.peers.devices import A, acquainted, eventually
from tests.agent.peers.devices import Device as Peer
from tests.protocol.entries import SPACE, key_of, someone

NEWER = b'{"version": 99}'


@pytest.fixture
def bus() -> Iterator[Bus]:
    bus = Bus()
    yield bus
    bus.close()


def samples(peer: Peer) -> dict[tuple[str, ...], float]:
    agent = Mock()
    agent.shelf.entries = ()
    agent.scheduler.active = agent.scheduler.queued = agent.engine.threads = 0
    agent.options.policy.threshold = 0.25
    text = Metrics(Device(agent, None, None, peer.network)).text().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_kind_is_counted_with_its_reason(bus: Bus, tmp_path: Path) -> None:
    with Peer(tmp_path, "lamp", 1, bus=bus) as lamp, Peer(tmp_path, "fridge", 2, bus=bus) as fridge:
        acquainted(lamp, fridge)
        assert fridge.told(1) is None
        dropped = "skerry_broker_dropped_total"
        before = samples(lamp)
        assert not any(value for name, value in before.items() if name[0] == dropped)
        question = encode(Ask(1, SPACE, key_of(1).tobytes(), bytes(8), 0.5))
        for topic, payload in (
            (A.path(STATUS, "door"), b"{"),
            (A.path(STATUS, "door"), NEWER),
            (A.path(STATUS, "door"), status(5, True, someone(3).public)),
            (A.path(STATUS, "door"), status(4, True, someone(3).public)),
            *((A.path(STATUS, "door"), status(5, True, someone(number).public)) for number in range(4, 8)),
            (A.path(DIRECTORY, EDGE), b"{"),
            (A.path(DIRECTORY, EDGE), NEWER),
            (A.path(ASK, "door", "lamp"), b"{"),
            (A.path(ASK, EDGE, "lamp"), question),
            (A.path(ASK, EDGE, "lamp"), question),
            (A.path(ANSWER, "door", "lamp"), b"{"),
            (A.path(ANSWER, "door", "lamp"), encode(Answer(1))),
        ):
            fridge.transport.publish(topic, payload, qos=1)
        lamp.transport.oversized = lamp.transport.subscriptions_refused = 3  # as MqttTransport would count
        lamp.transport.subscribe("broken", Mock(side_effect=ValueError))
        bus.settle()
        fridge.transport.publish("broken", b"")
        eventually(lambda: lamp.transport.handler_errors == 1)
        after = samples(lamp)
        assert {name[1:]: value for name, value in after.items() if name[0] == dropped and value} == {
            ("any", "oversized"): 3,
            ("any", "error"): 1,
            ("status", "malformed"): 1,
            ("status", "version"): 1,
            ("status", "stale"): 1,
            ("status", "new_key"): 1,
            ("directory", "malformed"): 1,
            ("directory", "version"): 1,
            ("ask", "malformed"): 1,
            ("ask", "duplicate"): 1,
            ("answer", "malformed"): 1,
            ("answer", "unasked"): 1,
        }
        assert after["skerry_broker_refused_subscriptions_total",] == 3
        assert after["skerry_peers_rekeyed_total",] == 3
        assert after["skerry_peer_answers_total", "nothing"] == 2
