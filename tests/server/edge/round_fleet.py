"""Light devices that speak the protocol of the rounds, and an edge's rounds on a bus."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from protocol.rounds import Agreed, Call, Level, Report, Update, decode_agreed, decode_call, decode_report, encode
from protocol.topics import AGREED, CALL, EDGE, REPORT, UPDATE, Cluster
from protocol.transport.base import Delivery, Transport
from protocol.transport.bus import Bus, BusTransport
from server.edge.overview import Overview, order, overview
from server.edge.round_store import RoundStore
from server.edge.rounds import Collector, RoundOptions, Rounds
from tests.agent.peers.devices import eventually

HOME = Cluster("home", "A")
SUBJECT = "0123456789abcdef"
OTHER = "fedcba9876543210"
OPTIONS = RoundOptions(every=1e6, collect=8e4, spread=0.0, share=0.0, settle=0.05)


def update(round: int, **values: object) -> Update:
    given = {"base": 0, "subject": SUBJECT, "threshold": 0.5, "evidence": 10.0, **values}
    return Update(round=round, **given)  # type: ignore[arg-type]


class Device:
    """Answers each Call once, like a real one: again, until the broker has it."""

    def __init__(self, transport: Transport, name: str, threshold: float = 0.5, evidence: float = 10.0) -> None:
        self.name = name
        self.threshold = threshold
        self.evidence = evidence
        self.answered = 0
        self.agreed: list[Agreed] = []
        self.calls: list[int] = []
        self.transport = transport
        self._lock = threading.Lock()
        transport.subscribe(HOME.path(CALL, EDGE), self._called, qos=CALL.qos)
        transport.subscribe(HOME.path(AGREED, EDGE), self._told, qos=AGREED.qos)
        transport.start()

    @property
    def number(self) -> int:
        return self.agreed[-1].number if self.agreed else 0

    def _called(self, delivery: Delivery) -> None:
        call = decode_call(delivery.payload)
        assert call is not None
        self.calls.append(call.round)
        if call.round > self.answered:
            self.answer(call)

    def answer(self, call: Call) -> None:
        told = update(call.round, base=self.number, threshold=self.threshold, evidence=self.evidence)
        self.say(told, lambda: self._done(call.round))

    def say(self, told: Update, done: Callable[[], None] | None = None) -> None:
        self.transport.publish(HOME.path(UPDATE, self.name), encode(told), qos=UPDATE.qos, done=done)

    def _done(self, round: int) -> None:
        self.answered = max(self.answered, round)

    def _told(self, delivery: Delivery) -> None:
        told = decode_agreed(delivery.payload)
        assert told is not None
        if told.number >= self.number:
            self.agreed.append(told)


class Fleet:
    """One cluster on a bus. `reports`: what the coordinator sees."""

    def __init__(self, folder: Path, options: RoundOptions = OPTIONS) -> None:
        self.folder = folder
        self.options = options
        self.stack = ExitStack()
        self.bus = Bus()
        self.stack.callback(self.bus.close)
        self.reports: list[Report] = []
        self.wire: list[Delivery] = []
        self.devices: list[Device] = []
        spy = BusTransport(self.bus, "spy")
        spy.subscribe(HOME.path(REPORT, EDGE), self._reported, qos=1)
        spy.subscribe("#", self.wire.append, qos=1)
        spy.start()
        self.coordinator = BusTransport(self.bus, "coordinator")
        self.coordinator.start()
        self.rounds: Rounds | None = None

    def speak(self, name: str) -> BusTransport:
        """A client that is connected."""
        transport = BusTransport(self.bus, name)
        transport.start()
        self.bus.settle()
        return transport

    def numbers(self) -> list[int]:
        """All that were agreed, in the order of their publication."""
        topic = HOME.path(AGREED, EDGE)
        told = (decode_agreed(delivery.payload) for delivery in list(self.wire) if delivery.topic == topic)
        return [agreed.number for agreed in told if agreed is not None]

    def _reported(self, delivery: Delivery) -> None:
        report = decode_report(delivery.payload)
        assert report is not None
        self.reports.append(report)

    def edge(self, collector: Collector | None = None, **options: object) -> Rounds:
        """Started, after the one before it is closed."""
        self.end()
        transport = BusTransport(self.bus, "edge")
        chosen = replace(self.options, **options)  # type: ignore[arg-type]
        self.rounds = Rounds(HOME, transport, RoundStore(self.folder), chosen, collector)
        transport.on_up, transport.on_down = self.rounds.up, self.rounds.down
        self.rounds.start()
        transport.start()
        self.transport = transport
        return self.rounds

    def end(self) -> None:
        if self.rounds is not None:
            self.transport.close()
            self.rounds.close()
            self.rounds = None

    def device(self, name: str, threshold: float = 0.5, evidence: float = 10.0) -> Device:
        device = Device(BusTransport(self.bus, name), name, threshold, evidence)
        self.devices.append(device)
        return device

    def look(self) -> Overview:
        return overview(self.folder)

    def order(self, kind: str, number: int | None = None) -> None:
        """And waits until it is done."""
        order(self.folder, kind, number=number)
        eventually(lambda: not self.look().orders)

    def waiting(self, devices: int) -> None:
        eventually(lambda: self.look().waiting == devices)

    def called(self, round: int) -> None:
        eventually(lambda: self.look().state.round == round and bool(self.look().state.collecting))

    def agreed(self, number: int) -> Agreed:
        """Waits until the devices were told of it."""
        eventually(lambda: all(device.number >= number for device in self.devices))
        self.bus.settle()
        return next(told for told in self.devices[0].agreed if told.number == number)

    def level(self, agreed: Agreed, subject: str = SUBJECT) -> Level:
        level = agreed.subjects[subject].cluster
        assert level is not None
        return level

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.stack.close()
