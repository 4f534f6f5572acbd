"""Devices and an edge in secure rounds, with every message encoded and decoded, and none lost by chance."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.learn.secure import Participant
from agent.link.identity import Identity
from protocol.secure import Message, decode, encode
from protocol.sums import Sum, Vector, contribution, nothing, read
from protocol.topics import Cluster
from server.edge.secure import SecureOptions, SecureRound

PLACE = Cluster("home", "main")
SUBJECT = "00112233445566aa"
LATER = 10_000.0  # a time at which joining is over


@cache
def someone(name: str) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


class Chance:
    """Bytes that look random, the same in each run."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.drawn = 0

    def __call__(self, count: int) -> bytes:
        self.drawn += 1
        return hashlib.shake_256(f"{self.seed}/{self.drawn}".encode()).digest(count)


class Fleet:
    """`count` devices d00, d01, … in one round. `sent`: what each device has sent; `wire`: bytes of every message, by
    sender and receiver. What is told to `silent` gets no further."""

    def __init__(self, count: int, options: SecureOptions, round: int = 7, cluster: Cluster = PLACE) -> None:
        self.names = [f"d{number:02}" for number in range(count)]
        self.known = {name: someone(name).public for name in self.names}
        self.options = options
        self.now = 0.0
        self.sent: list[tuple[str, Message]] = []
        self.told: list[tuple[str, Message]] = []
        self.wire: list[tuple[str, str, int]] = []
        self.edge = SecureRound(cluster, round, self.known.get, LATER, options)
        self.round = round
        self.devices = {
            name: Participant(cluster, name, someone(name), self.known.get, Chance(f"{name}/{round}"), options.least)
            for name in self.names
        }
        self.values = {
            name: contribution(number / max(1, count - 1), 1.0 + 37 * number, [0.25, number / 40, -number / 3])
            for number, name in enumerate(self.names)
        }
        self._queue: deque[tuple[str, Message]] = deque()

    def join(self, names: Iterable[str] | None = None, subject: str = SUBJECT) -> None:
        for name in self.names if names is None else names:
            self.says(name, self.devices[name].join(self.round, subject, self.values[name], 2 * LATER))

    def says(self, name: str, message: Message) -> None:
        """To the edge."""
        self.wire.append((name, "edge", len(encode(message))))
        self.sent.append((name, message))
        self._queue.extend(self.edge.heard(name, again(message), self.now))

    def closed(self) -> None:
        """No more devices may join. Those who are in a cohort already go through their steps before that."""
        while told := self.told_next():
            self.deliver(told)
        self.now = LATER
        self._queue.extend(self.edge.tick(self.now))

    def told_next(self) -> list[tuple[str, Message]]:
        """What the edge wants to have sent, which is then the caller's to deliver."""
        told = list(self._queue)
        self._queue.clear()
        return told

    def deliver(self, told: Iterable[tuple[str, Message]], gone: Mapping[str, type] | None = None) -> None:
        """Each of `gone` is silent from the message of that kind on."""
        for name, message in told:
            self.wire.append(("edge", name, len(encode(message))))
            self.told.append((name, message))
            for reply in self.devices[name].heard(again(message), self.now):
                if gone and isinstance(reply, gone.get(name, ())):
                    continue
                self.says(name, reply)

    def run(self, gone: Mapping[str, type] | None = None) -> None:
        """To the end of the round; steps that nobody ends by answering end by their deadline."""
        while not self.edge.over:
            while told := self.told_next():
                self.deliver(told, gone)
            self.wait()

    def wait(self) -> None:
        """Until the present steps are over."""
        self.now += self.options.patience
        self._queue.extend(self.edge.tick(self.now))

    def upto(self, kind: type) -> list[tuple[str, Message]]:
        """Joins all, and goes on to where the edge wants to send messages of this kind: those, not delivered."""
        self.join()
        self.closed()
        while True:
            told = self.told_next()
            assert told, f"it never came to {kind.__name__}"
            if all(isinstance(message, kind) for _, message in told):
                return told
            self.deliver(told)

    def expected(self, names: Iterable[str]) -> Sum:
        chosen = list(names)
        return read(total([self.values[name] for name in chosen]), len(chosen))

    def senders(self, kind: type) -> list[str]:
        return [name for name, message in self.sent if isinstance(message, kind)]


def total(values: Iterable[Vector]) -> Vector:
    """By Python's integers."""
    rows = [[int(number) for number in value] for value in values]
    result = nothing()
    for column in range(len(result)):
        result[column] = sum(row[column] for row in rows) % (1 << 64)
    return result


def again(message: Message) -> Message:
    """As it comes out at the other end."""
    read = decode(encode(message))
    assert read == message
    return read
