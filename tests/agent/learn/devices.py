"""Devices that take part in rounds, without a model, and an edge of a few lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.learn.federation import Federation, RoundOptions
from agent.learn.goals import Goal, Price
from agent.learn.learner import Learner
from agent.learn.ledger import Ledger
from agent.learn.secure import Participant
from agent.learn.secure_link import SecureLink
from agent.link.identity import Identity
from agent.loop import Token
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance
from protocol.rounds import Agreed, Call, Learned, Level, Update, decode_update, encode
from protocol.topics import AGREED, CALL, EDGE, UPDATE, Cluster
from protocol.transport.base import Delivery
from protocol.transport.bus import Bus, BusTransport

CLUSTER = Cluster("home", "main")
PRICE = Price(0.3)


def escalate(learner: Learner, count: int, seed: int = 0) -> None:
    """Steps whose beta is u: the price is met at u = 0.3."""
    for at, u in enumerate(np.random.default_rng(seed).random(count).tolist()):
        differs = u > 0.5
        asked = (Provenance.CLOUD, Why.ESCALATE, 1.0, 0.01)
        learner.note(Token(int(differs), u, 0.5, *asked, draft=0, p_draft=0.5, beta=u), at)


@dataclass
class EdgeFake:
    """Calls, and hears updates; what is retained stays with the bus."""

    bus: Bus
    updates: list[Update] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.transport = BusTransport(self.bus, EDGE)
        self.transport.subscribe(CLUSTER.path(UPDATE), self.heard, qos=1)
        self.transport.start()
        self.bus.settle()

    def heard(self, delivery: Delivery) -> None:
        update = decode_update(delivery.payload)
        assert update is not None
        self.updates.append(update)

    def call(self, number: int, **fields: object) -> None:
        call = msgspec.structs.replace(Call(number, 10.0), **fields)
        self.transport.publish(CLUSTER.path(CALL, EDGE), encode(call), qos=1, retain=True)

    def agree(self, number: int, threshold: float, subject: str) -> None:
        agreed = Agreed(number, number, {subject: Learned(Level(threshold, 1e9, 100))})
        self.transport.publish(CLUSTER.path(AGREED, EDGE), encode(agreed), qos=1, retain=True)


class Device:
    def __init__(
        self,
        bus: Bus,
        folder: Path,
        goal: Goal = PRICE,
        options: RoundOptions | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        name: str = "barn",
        who: Identity | None = None,
        key_of: Callable[[str], bytes | None] = lambda name: None,
    ) -> None:
        self.policy = ThresholdPolicy(0.25, 0.01)
        who = who or Identity(Ed25519PrivateKey.generate())
        self.ledger = Ledger(folder / f"{name}.db")
        self.learner = Learner(self.ledger, self.policy, goal, "entropy", "model")
        self.transport = BusTransport(bus, name)
        participant = Participant(CLUSTER, name, who, key_of, os.urandom)
        self.federation = Federation(
            CLUSTER,
            name,
            self.transport,
            self.learner,
            options or RoundOptions(),
            SecureLink(CLUSTER, name, self.transport, participant, clock),
            clock,
            lambda: 0.5,
            lambda: 1.0,
        )
        self.federation.start()
        self.transport.start()

    def close(self) -> None:
        self.transport.close()
        self.federation.close()
        self.learner.close()
