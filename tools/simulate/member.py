"""One simulated device on its connection: it answers, is cut off, goes away and comes back."""

from __future__ import annotations

import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import paho.mqtt.client as paho

from protocol.rounds import Agreed, Call, decode_agreed, decode_call
from protocol.topics import AGREED, CALL, EDGE, UPDATE, Cluster
from protocol.transport.inbox import packet_bytes
from tools.simulate.device import Device
from tools.simulate.loop import Loop

_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Shares: of the devices that are `away` in a round, whose connection is `cut` while they answer, that are
    `hostile`. Seconds: `spread`, over which the edge asks devices to spread their answers; `delay`, the mean of what
    comes on top, exponentially distributed."""

    devices: int
    rounds: int = 3
    away: float = 0.05
    cut: float = 0.02
    hostile: float = 0.0
    spread: float = 5.0
    delay: float = 0.5
    seed: int = 0

    @property
    def gone(self) -> int:
        """Devices that are away in each round."""
        return int(self.away * self.devices)

    @property
    def present(self) -> int:
        return self.devices - self.gone

    @property
    def patience(self) -> float:
        """Seconds after which a round has gone wrong."""
        return 120.0 + 3.0 * self.spread + 25.0 * self.delay


@dataclass(slots=True)
class Site:
    """What all members share, and what they count. `bytes`: PUBLISH packets up and down. `acknowledged`: rounds, by
    device, whose update the broker has. `called`, `agreed`: when the first device heard of a round; `heard`: how many
    know its result."""

    cluster: Cluster
    loop: Loop
    address: tuple[str, int]
    plan: Plan
    random: Random
    here: int = 0
    bytes: int = 0
    sent: int = 0
    cuts: int = 0
    acknowledged: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    called: dict[int, float] = field(default_factory=dict)
    agreed: dict[int, tuple[float, Agreed]] = field(default_factory=dict)
    heard: Counter[int] = field(default_factory=Counter)

    @property
    def filters(self) -> list[tuple[str, int]]:
        return [(self.cluster.path(kind, EDGE), kind.qos) for kind in (CALL, AGREED)]

    def client_id(self, name: str) -> str:
        return f"{self.cluster.fleet}.{self.cluster.name}.{name}"

    def later(self) -> float:
        """Seconds until a connection that broke is tried again."""
        return _RETRY_SECONDS * self.random.random()


class Member:
    """The Loop's owner of its connection. `here`: connected and subscribed."""

    __slots__ = ("_away", "_call", "_client", "_sent", "_site", "_tried", "device", "here")

    def __init__(self, site: Site, device: Device) -> None:
        self.device = device
        self.here = False
        self._site = site
        self._away = False
        self._client: paho.Client | None = None
        self._call: Call | None = None  # the last that was heard over this connection
        self._tried = 0  # the last round in which it sent something
        self._sent: tuple[int, int] | None = None  # packet and round that the broker has not acknowledged

    def connect(self) -> None:
        self._away = False
        site = self._site
        try:
            self._client = site.loop.connect(site.address, site.client_id(self.device.name), site.filters, self)
        except OSError:
            site.loop.later(site.later(), self.connect)

    def leave(self, politely: bool) -> None:
        """Until `connect`; its session stays at the broker."""
        assert self._client is not None
        self._away = True
        if politely:
            self._client.disconnect()
        else:
            self._cut()

    def up(self) -> None:
        self.here = True
        self._site.here += 1

    def down(self) -> None:
        self._site.here -= self.here
        self.here, self._call, self._sent = False, None, None
        if not self._away:
            self._site.loop.later(self._site.later(), self.connect)

    def heard(self, message: paho.MQTTMessage) -> None:
        topic, payload = message.topic, bytes(message.payload)
        self._site.bytes += packet_bytes(topic, payload, message.qos)
        if topic.endswith(AGREED.suffix):
            self._heed(decode_agreed(payload))
        else:
            self._consider(decode_call(payload))

    def _heed(self, agreed: Agreed | None) -> None:
        if agreed is not None and agreed.number > self.device.base:
            self._site.agreed.setdefault(agreed.round, (time.monotonic(), agreed))
            self._site.heard[agreed.round] += 1
            self.device.heed(agreed)

    def _consider(self, call: Call | None) -> None:
        known = max(self.device.answered, self._call.round if self._call else 0)
        if call is None or call.round <= known:
            return
        site = self._site
        site.called.setdefault(call.round, time.monotonic())
        delay = site.random.expovariate(1.0 / site.plan.delay) if site.plan.delay else 0.0
        self._call = call
        site.loop.later(site.random.random() * call.spread + delay, lambda: self._answer(call))

    def _answer(self, call: Call) -> None:
        """The same once more after each reconnection, until the broker has acknowledged it."""
        if self._call is not call or self._client is None:
            return
        site = self._site
        cut = self._tried != call.round and site.random.random() < site.plan.cut
        self._tried = call.round
        topic, payload = site.cluster.path(UPDATE, self.device.name), self.device.update(call)
        if cut and site.random.random() < 0.5:
            packet = _packet(topic, payload)
            self._cut(packet[: len(packet) // 2])
            return
        site.bytes += packet_bytes(topic, payload, UPDATE.qos)
        site.sent += 1
        self._sent = self._client.publish(topic, payload, UPDATE.qos).mid, call.round
        if cut:
            self._client.loop_write()
            self._cut()

    def acknowledged(self, packet: int) -> None:
        if self._sent and self._sent[0] == packet:
            (_, self.device.answered), self._sent = self._sent, None
            self._site.acknowledged[self.device.name] += 1
            self._site.answers[self.device.answered] += 1

    def _cut(self, packet: bytes = b"") -> None:
        assert self._client is not None
        self._site.cuts += 1
        self._site.loop.cut(self._client, packet)
        self.down()


def _packet(topic: str, payload: bytes) -> bytes:
    """A PUBLISH of QoS 1 (MQTT 3.1.1, section 3.3), to be cut off in the middle."""
    name = topic.encode()
    rest = struct.pack(f">H{len(name)}sH", len(name), name, 1) + payload
    return bytes((0x32, 0x80 | len(rest) & 0x7F, len(rest) >> 7)) + rest
