"""Scripted edges: what they report, and what they hear from the coordinator."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from protocol.rounds import Level, Overall, Report, Told, Whole, decode_overall, encode
from protocol.rounds import subject as subject_id
from protocol.topics import COORDINATOR, EDGE, OVERALL, REPORT, Cluster
from protocol.transport.base import Delivery, Transport
from protocol.transport.mqtt import MqttOptions, MqttTransport

FLEET = "home"
SUBJECT = subject_id("entropy", "slm", "price 0.2")
PATIENCE = 60.0

# Three kinds of devices: mean u, mean beta, slope of beta on u.
KINDS = np.array([[0.3, 0.1, 0.3], [0.5, 0.4, 1.0], [0.6, 0.2, -0.1]])
NOISE = np.array([0.02, 0.02, 0.06])


def statistics(count: int, seed: int, kinds: Sequence[int] = (0, 1, 2)) -> tuple[list[list[float]], list[int]]:
    """Of devices of these kinds in turn, and the kind of each."""
    random = np.random.default_rng(seed)
    which = [kinds[at % len(kinds)] for at in range(count)]
    return (KINDS[which] + random.normal(0.0, NOISE, (count, 3))).tolist(), which


def level(threshold: float, evidence: float = 100.0, devices: int = 10) -> Level:
    return Level(threshold, evidence, devices)


def report(number: int, threshold: float, evidence: float = 100.0, subject: str = SUBJECT, **told: object) -> Report:
    return Report(number, {subject: Told(level(threshold, evidence), **told)})  # type: ignore[arg-type]


def mqtt(url: str, client_id: str) -> MqttTransport:
    return MqttTransport(MqttOptions(url=url, client_id=client_id, first_retry=0.02, longest_retry=0.1))


class Edge:
    """The edge of `cluster`, connected. `numbers`: of every Overall that it heard; `said`: without those that its
    broker had kept, which after a power cut may be old ones."""

    def __init__(self, transport: Transport, cluster: str) -> None:
        self.place = Cluster(FLEET, cluster)
        self.transport = transport
        self.heard: list[Overall] = []
        self.said: list[int] = []
        self._changed = threading.Condition()
        self._kept: bytes | None = None
        transport.on_up = self._tell
        transport.subscribe(self.place.path(OVERALL, COORDINATOR), self._hear, qos=1)
        transport.start()

    def tell(self, report: Report) -> None:
        self.send(encode(report))

    def send(self, payload: bytes) -> None:
        """Now, or once it is connected."""
        self._kept = payload
        self._tell()

    def _tell(self) -> None:
        if self._kept is not None:
            self.transport.publish(self.place.path(REPORT, EDGE), self._kept, qos=1, retain=True)

    def _hear(self, delivery: Delivery) -> None:
        overall = decode_overall(delivery.payload) if delivery.payload else None
        if overall is not None:
            with self._changed:
                self.heard.append(overall)
                if not delivery.retained:
                    self.said.append(overall.number)
                self._changed.notify_all()

    @property
    def numbers(self) -> list[int]:
        return [overall.number for overall in self.heard]

    @property
    def last(self) -> Overall | None:
        return self.heard[-1] if self.heard else None

    def whole(self, subject: str = SUBJECT) -> Whole | None:
        return self.last.subjects.get(subject) if self.last else None

    def wait(self, threshold: float) -> Overall:
        """Until the last that was heard has this threshold, about."""

        def there() -> bool:
            whole = self.whole()
            return whole is not None and abs(whole.level.threshold - threshold) < 1e-6

        return self.wait_for(there)

    def wait_for(self, true: object) -> Overall:
        assert callable(true)
        with self._changed:
            assert self._changed.wait_for(true, PATIENCE), [
                (each.number, {name: whole.level for name, whole in each.subjects.items()}) for each in self.heard[-3:]
            ]
            return self.heard[-1]
