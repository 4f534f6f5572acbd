"""What comes in: every entry that somebody sent is checked here before it can be found."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from agent.peers.trust import Trust
from protocol.errors import StoreError
from protocol.limits import Buckets
from protocol.memory import Entry, check_entry, signed_body, value_flaw
from protocol.peers import decode_news
from protocol.reading import read
from protocol.topics import Cluster
from protocol.transport.base import Delivery


class Verdict(StrEnum):
    """What became of an entry; `malformed` and `version` also of a whole message."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    UNSAVED = "unsaved"
    MALFORMED = "malformed"
    VERSION = "version"
    ABSURD = "absurd"
    OTHER_SPACE = "other_space"
    QUARANTINED = "quarantined"
    UNKNOWN_ORIGIN = "unknown_origin"
    FLOOD = "flood"
    BAD_SIGNATURE = "bad_signature"


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Entries per second, and at once, from one sender (each costs 0.1 ms to check), and of new ones in its news (each
    takes a place in the memory; above what `GossipLimits` let an honest one send). `seen`: genuine entries that are
    remembered, so that one that comes again is not checked again. `held` bytes, `held_messages`: news of devices
    that have not announced themselves yet may wait for that."""

    sender_rate: float = 200.0
    sender_burst: int = 1000
    news_rate: float = 5.0
    news_burst: int = 2000
    seen: int = 4096
    held: int = 512 << 10
    held_messages: int = 256


class Store(Protocol):
    """What is needed of the memory (`agent.memory.base`)."""

    def learn(self, entry: Entry) -> None: ...

    def add(self, entries: Sequence[Entry]) -> int: ...


class Known(Protocol):
    def key_of(self, device: str) -> bytes | None:
        """The public key that a device of this cluster announced."""
        ...

    def knows(self, origin: bytes) -> bool:
        """Did a device with this key announce itself, here or to an edge service?"""
        ...


class Intake:
    """Used on the transport's thread. `spaces`: those that this device can use, which may change; `usable`: is an
    entry of one of them what its model can make and read? `counts`: verdicts, for metrics."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        store: Store,
        known: Known,
        trust: Trust,
        spaces: frozenset[bytes],
        usable: Callable[[Entry], bool],
        clock: Callable[[], float],
        limits: IntakeLimits | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._cluster = cluster
        self._me = me
        self._store = store
        self._known = known
        self._trust = trust
        self.spaces = spaces
        self._usable = usable
        self._limits = limits = limits or IntakeLimits()
        self._senders = Buckets(limits.sender_rate, limits.sender_burst, clock)
        self._tellers = Buckets(limits.news_rate, limits.news_burst, clock)
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # digests of entries that were found genuine
        self._held: deque[Delivery] = deque()
        self._held_bytes = 0

    def news(self, delivery: Delivery) -> None:
        """A message on the topic of new entries."""
        sender = self._cluster.sender(delivery.topic)
        if sender == self._me:
            return
        if sender is None or delivery.retained:
            self.counts[Verdict.MALFORMED] += 1
            return
        key = self._known.key_of(sender)
        if key is None:
            self._hold(delivery)
            return
        message = read(decode_news, delivery.payload, self.counts)
        if message is None:
            return
        sound = self.check(sender, message.entries, first_hand=key)
        if not sound:
            return
        try:
            new = self._store.add(sound)  # durable before the broker hears that it was received
        except StoreError:  # it would not send them again: they wait in RAM for a disk that takes them
            for entry in sound:
                self._store.learn(entry)
            self.counts[Verdict.UNSAVED] += len(sound)
            return
        self.counts[Verdict.ACCEPTED] += new
        self.counts[Verdict.DUPLICATE] += len(sound) - new

    def retry(self) -> None:
        """Somebody new announced itself: news of it may have come before."""
        held, self._held, self._held_bytes = self._held, deque(), 0
        for delivery in held:
            self.news(delivery)

    def check(self, sender: str, entries: Sequence[Entry], first_hand: bytes | None = None) -> list[Entry]:
        """Those of the entries that may be believed; the others are counted. `first_hand`: only those with this
        origin, the sender's own; else those of any device that is known."""
        sound = []
        for entry in entries:
            verdict = self._verdict(sender, entry, first_hand)
            if verdict is Verdict.ACCEPTED:
                sound.append(entry)
            else:
                self.counts[verdict] += 1
        return sound

    def keep(self, sound: Sequence[Entry]) -> None:
        """Makes checked entries of an answer findable, and does not wait for the disk: other answers are waiting."""
        for entry in sound:
            self._store.learn(entry)
        self.counts[Verdict.ACCEPTED] += len(sound)

    def _verdict(self, sender: str, entry: Entry, first_hand: bytes | None) -> Verdict:
        """Cheap checks first. The limits are the sender's, whom the broker vouches for: a device can have a new key at
        any time, but not a new name."""
        if entry.space not in self.spaces:
            return Verdict.OTHER_SPACE
        if flaw := value_flaw(entry):
            return Verdict(flaw)
        if not self._usable(entry):
            return Verdict.ABSURD
        known = entry.origin == first_hand if first_hand else self._known.knows(entry.origin)
        if not known:
            return Verdict.UNKNOWN_ORIGIN
        if self._trust.quarantined(entry.origin):
            return Verdict.QUARANTINED
        if not self._senders.take(sender):
            return Verdict.FLOOD
        digest = hashlib.sha256(entry.signature + signed_body(entry)).digest()
        if digest in self._seen:
            self._seen.move_to_end(digest)
            return Verdict.ACCEPTED
        if flaw := check_entry(entry):
            return Verdict(flaw)
        if first_hand and not self._tellers.take(sender):
            return Verdict.FLOOD  # of what nobody asked for
        self._seen[digest] = None
        if len(self._seen) > self._limits.seen:
            self._seen.popitem(last=False)
        return Verdict.ACCEPTED

    def _hold(self, delivery: Delivery) -> None:
        """After a restart the broker may hand over queued news before it says who is there."""
        self._held.append(delivery)
        self._held_bytes += len(delivery.payload)
        while self._held_bytes > self._limits.held or len(self._held) > self._limits.held_messages:
            self._held_bytes -= len(self._held.popleft().payload)
            self.counts[Verdict.UNKNOWN_ORIGIN] += 1
