"""Gossip: what this device has just learned goes to its cluster, in batches and at a bounded rate."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protocol.limits import Bucket
from protocol.memory import MAX_KEY_BYTES, Entry, sign_entry, value_flaw
from protocol.peers import News, encode

log = logging.getLogger(__name__)

_ENTRY_OVERHEAD = 200  # bytes of an entry on the wire besides its key


@dataclass(frozen=True, slots=True)
class Sharing:
    """What may leave this device. `unshared`: spaces that stay here."""

    enabled: bool = True
    unshared: frozenset[bytes] = frozenset()

    def allows(self, space: bytes) -> bool:
        return self.enabled and space not in self.unshared


@dataclass(frozen=True, slots=True)
class GossipLimits:
    """`batch` entries go at once, or those that are there `pause` seconds after the first one. `per_second` and
    `per_hour`: bytes. `waiting`: entries that may wait for their turn; beyond that the oldest is dropped."""

    batch: int = 16
    pause: float = 0.25
    per_second: int = 32 << 10
    per_hour: int = 8 << 20
    waiting: int = 2048


class Outbox(Protocol):
    def put(self, topic: str, payload: bytes, priority: int) -> object:
        """Kept until the broker has it."""
        ...


class Gossip:
    """`share` may be called from any thread and returns at once; a thread of its own signs, batches and hands over to
    the outbox. `wanted`: did another device announce the space? `sent` and `dropped` count entries.

    `close` waits for what the limits let go at once; the rest is dropped: peers can still ask for it.
    """

    def __init__(
        self,
        topic: str,
        outbox: Outbox,
        sign: Callable[[bytes], bytes],
        sharing: Sharing,
        wanted: Callable[[bytes], bool],
        clock: Callable[[], float],
        limits: GossipLimits | None = None,
        priority: int = 0,
    ) -> None:
        self.sent = 0
        self.dropped = 0
        self._topic = topic
        self._outbox = outbox
        self._sign = sign
        self._sharing = sharing
        self._wanted = wanted
        self._clock = clock
        self._limits = limits = limits or GossipLimits()
        self._priority = priority
        largest = _ENTRY_OVERHEAD + MAX_KEY_BYTES  # has to fit in, or it would wait for ever and all others behind it
        self._room = max(limits.per_second, largest)
        self._second = Bucket(limits.per_second, self._room, clock)
        self._hour = Bucket(limits.per_hour / 3600, max(limits.per_hour, largest), clock)
        self._waiting: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="gossip", daemon=True)
        self._thread.start()

    def share(self, entry: Entry, *, private: bool = False) -> None:
        """`entry` is this device's own, signed or not. What is private never gets further than this line."""
        if private or not self._sharing.allows(entry.space) or not self._wanted(entry.space):
            return
        with self._changed:
            if value_flaw(entry):
                self.dropped += 1
                return
            self._waiting.append(entry)
            if len(self._waiting) > self._limits.waiting:
                self._waiting.popleft()
                self.dropped += 1
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            signed = [entry if entry.signature else sign_entry(entry, self._sign) for entry in batch]
            try:
                self._outbox.put(self._topic, encode(News(signed)), self._priority)
            except Exception as error:  # a full disk, say: learning and asking go on without gossip
                self.dropped += len(signed)
                log.error("gossip was dropped: %s", type(error).__name__)
            else:
                self.sent += len(signed)

    def _next(self) -> list[Entry]:
        """The next batch, when it is due and may go; nothing: it is time to end."""
        limits = self._limits
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._changed.wait_for(lambda: len(self._waiting) >= limits.batch or self._closing, limits.pause)
            while True:
                batch = self._first()
                size = sum(_ENTRY_OVERHEAD + len(entry.key) for entry in batch)
                patience = max(self._second.seconds_until(size), self._hour.seconds_until(size))
                if patience <= 0.0 or self._closing:
                    break
                self._changed.wait(patience)
            if patience > 0.0:
                self.dropped += len(self._waiting)
                self._waiting.clear()
                return []
            self._second.take(size)
            self._hour.take(size)
            for _ in batch:
                self._waiting.popleft()
            return batch

    def _first(self) -> list[Entry]:
        """As many of the oldest as fit into one message and into one second."""
        batch: list[Entry] = []
        room = self._room
        for entry in self._waiting:
            room -= _ENTRY_OVERHEAD + len(entry.key)
            if len(batch) == self._limits.batch or room < 0:
                break
            batch.append(entry)
        return batch
