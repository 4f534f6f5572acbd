"""The device among its peers: everything that speaks MQTT, put together."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from agent.link.identity import Identity
from agent.link.outbox import Outbox
from agent.link.presence import Presence, SessionNumber
from agent.peers.answer import Answerer, AnswerLimits, Shelf
from agent.peers.around import Around
from agent.peers.intake import Intake, IntakeLimits, Store
from agent.peers.resolver import AskOptions, PeerResolver
from agent.peers.reunion import Reunion
from agent.peers.sharing import Gossip, GossipLimits, Sharing
from agent.peers.trust import Trust
from protocol.memory import Entry
from protocol.topics import ANSWER, ASK, NEWS, STATUS, Cluster
from protocol.transport.base import Transport


class Memory(Shelf, Store, Protocol):
    """What peers need of the memory."""


class Network:
    """`transport` must not be started yet: `start` does that, and `close` ends it. `folder`: where outbox and session
    number are kept. `spaces`: those that this device uses; entries of others are refused, and those that are not
    `usable`."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        identity: Identity,
        transport: Transport,
        memory: Memory,
        trust: Trust,
        folder: Path,
        spaces: Sequence[bytes],
        usable: Callable[[Entry], bool],
        sharing: Sharing | None = None,
        asking: AskOptions | None = None,
        gossip: GossipLimits | None = None,
        intake: IntakeLimits | None = None,
        answering: AnswerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sharing = sharing or Sharing()
        self.me = me
        self.transport = transport
        self.memory = memory
        self.around = Around(cluster, me, barred=trust.quarantined, clock=clock)
        self.presence = Presence(cluster.path(STATUS, me), identity.public, SessionNumber(folder / "session"))
        self.outbox = Outbox(folder / "outbox.db", transport, clock=clock)
        self.reunion = Reunion(cluster, self.around.others, self.outbox.up)
        self.intake = Intake(cluster, me, memory, self.around, trust, frozenset(spaces), usable, clock, intake)
        self.around.newcomer = self.intake.retry
        self.gossip = Gossip(
            cluster.path(NEWS, me), self.outbox, identity.sign, sharing, self.around.wanted, clock, gossip
        )
        draw, new_id = random.SystemRandom().random, lambda: secrets.randbits(64)
        self.resolver = PeerResolver(
            cluster, me, transport, self.around, self.intake, sharing, clock, draw, new_id, asking
        )
        self.answerer = Answerer(
            cluster, me, transport, memory, sharing, identity.public, identity.sign, clock, answering
        )
        transport.will, transport.on_up, transport.on_down = self.presence.will, self._up, self._down
        self.presence.watch(transport)
        self.around.watch(transport)
        transport.subscribe(cluster.path(STATUS), self.reunion.status, qos=STATUS.qos)
        transport.subscribe(cluster.path(NEWS), self.intake.news, qos=NEWS.qos)
        transport.subscribe(cluster.path(ASK, other=me), self.answerer.heard, qos=ASK.qos)
        transport.subscribe(cluster.path(ANSWER, other=me), self.resolver.heard, qos=ANSWER.qos)
        self._sharing = sharing
        self.use(spaces)

    def use(self, spaces: Sequence[bytes]) -> None:
        """The spaces that this device uses from now on. Any thread."""
        self.intake.spaces = frozenset(spaces)
        self.presence.announce([space for space in spaces if self._sharing.allows(space)])

    def start(self) -> None:
        """Begins to connect."""
        self.transport.start()

    def _up(self) -> None:
        self.presence.up()
        self.reunion.up()

    def _down(self) -> None:
        self.reunion.down()
        self.outbox.down()

    def close(self) -> None:
        """Says goodbye; what waits in the outbox is sent the next time."""
        self.gossip.close()
        self.reunion.down()
        self.presence.leave()
        self.outbox.close()
        self.transport.close()
