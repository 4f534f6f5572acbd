"""One way to speak to the bus and to real brokers, so that one suite tests every transport against each."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from protocol.transport.base import Delivery, Transport
from protocol.transport.bus import Bus, BusTransport
from protocol.transport.mqtt import MqttOptions, MqttTransport
from tests.brokers import Broker, Network

PATIENCE = 30.0


def wait_until(true: Callable[[], Any], what: str = "") -> None:
    """For what nothing can be waited on: another process's or thread's state."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what or "it does not happen"
        threading.Event().wait(0.005)


class Inbox:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Delivery] = []
        self.threads: set[int] = set()
        self._changed = threading.Condition()

    def __call__(self, delivery: Delivery) -> None:
        with self._changed:
            self.got.append(delivery)
            self.threads.add(threading.get_ident())
            self._changed.notify_all()

    @property
    def payloads(self) -> list[bytes]:
        return [delivery.payload for delivery in self.got]

    def wait(self, count: int) -> list[Delivery]:
        return self.wait_for(lambda: len(self.got) >= count)

    def wait_for(self, predicate: Callable[[], bool]) -> list[Delivery]:
        with self._changed:
            assert self._changed.wait_for(predicate, PATIENCE), self.got[-3:]
            return list(self.got)


class World(ABC):
    """A broker, clients of it, and what can happen to them."""

    @abstractmethod
    def client(self, id: str, **callbacks: Any) -> Transport:
        """Not started. Another one with the same id replaces it after `close` or `cut`."""

    @abstractmethod
    def cut(self, id: str) -> None: ...

    @abstractmethod
    def restore(self, id: str) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def start(self, *, persistence: bool) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def up(self, id: str, **callbacks: Any) -> Transport:
        """Started and connected."""
        return self.connect(self.client(id, **callbacks))

    def connect(self, transport: Transport) -> Transport:
        transport.start()
        wait_until(lambda: transport.connected, "no connection")
        return transport


class BusWorld(World):
    def __init__(self) -> None:
        self.bus = Bus()

    def client(self, id: str, **callbacks: Any) -> Transport:
        return BusTransport(self.bus, id, **callbacks)

    def cut(self, id: str) -> None:
        self.bus.cut(id)
        self.bus.settle()

    def restore(self, id: str) -> None:
        self.bus.restore(id)

    def stop(self) -> None:
        self.bus.stop()

    def start(self, *, persistence: bool) -> None:
        self.bus.start(persistence=persistence)

    def close(self) -> None:
        self.bus.close()


class MqttWorld(World):
    """Each client has a network of its own."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.broker.start()
        self.networks: dict[str, Network] = {}
        self.clients: list[MqttTransport] = []

    def client(self, id: str, **callbacks: Any) -> Transport:
        if id not in self.networks:
            self.networks[id] = Network(self.broker.port)
        options = MqttOptions(self.networks[id].url, id, first_retry=0.02, longest_retry=0.2)
        self.clients.append(MqttTransport(options, **callbacks))
        return self.clients[-1]

    def cut(self, id: str) -> None:
        self.networks[id].drop()

    def restore(self, id: str) -> None:
        self.networks[id].well()

    def stop(self) -> None:
        self.broker.stop()

    def start(self, *, persistence: bool) -> None:
        self.broker.restart(persistence=persistence)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for network in self.networks.values():
            network.close()
        self.broker.__exit__()
