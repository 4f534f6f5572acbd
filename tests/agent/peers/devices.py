"""Whole devices without a model: memory, trust and everything that speaks MQTT, on any transport."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from agent.memory.memory import EntryMemory
from agent.peers.network import Network
from agent.peers.resolver import AskOptions, Judge, Lookup
from agent.peers.sharing import GossipLimits, Sharing
from agent.peers.trust import Trust
from agent.resolver import Provenance, Reply, Ticket, Traffic
from protocol.memory import Entry
from protocol.topics import Cluster
from protocol.transport.base import Transport
from protocol.transport.bus import Bus, BusTransport
from tests.protocol.entries import SPACE, TAIL, WIDTH, entry, key_of, someone

PATIENCE = 60.0
A = Cluster("home", "A")
PATIENT = AskOptions(floor=PATIENCE, cap=PATIENCE, hops=2)
QUICK = GossipLimits(pause=0.01)


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what other threads bring about."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        pause.wait(0.005)


def reply_of(entries: Sequence[Entry]) -> Reply:
    return Reply([entries[0].token], [entries[0].p], np.empty(0, np.intp), np.empty(0, np.float32), -1, Provenance.PEER)


class Device:
    """`number` makes its key; give a `transport`, or a `bus` to be on."""

    def __init__(
        self,
        folder: Path,
        name: str,
        number: int,
        *,
        bus: Bus | None = None,
        transport: Transport | None = None,
        cluster: Cluster = A,
        spaces: Sequence[bytes] = (SPACE,),
        sharing: Sharing | None = None,
        asking: AskOptions = PATIENT,
        bound: float = 0.1,
    ) -> None:
        if transport is None:
            assert bus is not None
            transport = BusTransport(bus, name)
        self.name = name
        self.who = someone(number)
        self.transport = transport
        self.memory = EntryMemory(folder / name / "memory")
        self.trust = Trust(self.who.public, bound=bound, base=0.05, records=self.memory)
        self.network = Network(
            cluster,
            name,
            self.who,
            transport,
            self.memory,
            self.trust,
            folder / name,
            spaces,
            lambda entry: len(entry.key) == WIDTH,
            sharing,
            asking,
            gossip=QUICK,
        )
        self.woken = threading.Event()
        self.network.start()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.network.close()
        self.memory.close()

    def learn(self, number: int, token: int = 7, *, private: bool = False) -> Entry:
        """As after an answer of the cloud: known here, and told to the others."""
        made = entry(self.who, number, token=token)
        self.memory.learn(made)
        self.network.gossip.share(made, private=private)
        return made

    def knows(self, number: int) -> bool:
        """An entry for exactly this key."""
        near = self.memory.neighbours(SPACE, key_of(number), TAIL, 1)
        return bool(near) and near[0].similarity > 0.999

    def sees(self, *others: Device) -> bool:
        around = self.network.around
        return all(other.name in around.holders(SPACE) for other in others)

    def ask(self, number: int, judge: Judge = reply_of, *, private: bool = False) -> Ticket | None:
        lookup = Lookup(SPACE, key_of(number), b"\0" * 8, 0.9, private)
        return self.network.resolver.ask(lookup, judge, self.woken.set, Traffic())

    def told(self, number: int, judge: Judge = reply_of) -> Reply | None:
        """What peers answer; None: that they have nothing."""
        ticket = self.ask(number, judge)
        assert ticket is not None, "nobody was asked"
        eventually(lambda: ticket.reply is not None or ticket.failed)
        return ticket.reply


def acquainted(*devices: Device) -> None:
    """Waits until all of them know of each other."""
    for device in devices:
        eventually(lambda device=device: device.sees(*(other for other in devices if other is not device)))  # type: ignore[misc]
