"""The answering side: what this device knows, for whoever asks on the broker."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from agent.memory.base import Key, Neighbour
from agent.peers.sharing import Sharing
from protocol.limits import Bucket, Buckets
from protocol.memory import Entry, sign_entry
from protocol.peers import MAX_ANSWER, Answer, Ask, decode_ask, encode
from protocol.reading import read
from protocol.topics import ANSWER, ASK, Cluster, is_edge
from protocol.transport.base import Delivery, Transport

_SEEN = 1024  # questions of edge services, which may come by more than one way


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Questions per second, and at once, of one asker and of all. The edge speaks for many and has their rate."""

    asker_rate: float = 20.0
    asker_burst: int = 100
    rate: float = 100.0
    burst: int = 400


class Shelf(Protocol):
    """What is needed of the memory (`agent.memory.base`)."""

    def neighbours(self, space: bytes, key: Key, tail: bytes, k: int) -> list[Neighbour]: ...

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """As their origins signed them, in this order, those that are still there."""
        ...


class Answerer:
    """`heard` is called on the transport's thread. `public`, `sign`: this device's key, for own entries that were never
    sent before. `counts`: what became of questions, for metrics."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        transport: Transport,
        shelf: Shelf,
        sharing: Sharing,
        public: bytes,
        sign: Callable[[bytes], bytes],
        clock: Callable[[], float],
        limits: AnswerLimits | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._cluster = cluster
        self._me = me
        self._transport = transport
        self._shelf = shelf
        self._sharing = sharing
        self._public = public
        self._sign = sign
        limits = limits or AnswerLimits()
        self._all = Bucket(limits.rate, limits.burst, clock)
        self._askers = Buckets(limits.asker_rate, limits.asker_burst, clock)
        self._edges = Buckets(limits.rate, limits.burst, clock)
        self._seen: OrderedDict[int, None] = OrderedDict()

    def heard(self, delivery: Delivery) -> None:
        """A question, on the topic of questions to this device. Answered even with nothing, so that nobody waits."""
        asker = self._cluster.sender(delivery.topic)
        if asker is None or delivery.retained or delivery.topic != self._cluster.path(ASK, asker, self._me):
            self.counts["malformed"] += 1
            return
        buckets = self._edges if is_edge(asker) else self._askers
        if not buckets.take(asker) or not self._all.take():
            self.counts["flood"] += 1
            return
        ask = read(decode_ask, delivery.payload, self.counts)
        if ask is None:
            return
        if is_edge(asker) and self._seen_before(ask.id):
            self.counts["duplicate"] += 1
            return
        entries = self._entries(ask) if self._sharing.allows(ask.space) else []
        payload = encode(Answer(ask.id, entries))
        self._transport.publish(self._cluster.path(ANSWER, self._me, asker), payload, qos=ANSWER.qos)
        self.counts["answered" if entries else "nothing"] += 1

    def _entries(self, ask: Ask) -> list[Entry]:
        """What is near enough or has the same last tokens, most similar first, and fits into one message."""
        found = self._shelf.neighbours(ask.space, np.frombuffer(ask.key, np.int8), ask.tail, MAX_ANSWER)
        near = [one for one in found if one.trust > 0.0 and (one.similarity >= ask.similarity or one.tail == 8)]
        entries = [self._signed(entry) for entry in self._shelf.entries([one.id for one in near])]
        return [entry for entry in entries if entry.signature]

    def _signed(self, entry: Entry) -> Entry:
        own = entry.origin == self._public and not entry.signature
        return sign_entry(entry, self._sign) if own else entry

    def _seen_before(self, id: int) -> bool:
        if id in self._seen:
            return True
        self._seen[id] = None
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return False
