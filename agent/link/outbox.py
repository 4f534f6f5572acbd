"""The outbox: QoS 1 messages that must survive an outage and a power cut.

    put ──► queue in RAM ──► SQLite ──► broker ──► PUBACK: deleted
            (any thread)     └───── writer thread ─────┘

What does not fit goes in this order: first what is older than `max_age` of running time (no wall clock is asked, so a
clock that jumps drops nothing, and neither does a month switched off), then, while there are more than `max_bytes`,
the lowest priority, of one priority the oldest. If the disk refuses, messages wait in RAM under the same rule with a
bound of their own, and are sent from there.

Each topic's messages are sent in the order of `put`, at least once: after a lost connection or a crash, what was not
acknowledged is sent again.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agent.link.outbox_store import Letter, LetterFile
from protocol.transport.base import Transport
from protocol.transport.filters import check_topic

log = logging.getLogger(__name__)

_WINDOW = 64  # messages on their way at once
_ACK_SECONDS = 60.0  # a broker that is connected and acknowledges nothing for so long is sent everything again
_TICK_SECONDS = 30.0  # the clock is saved and the age looked at this often
_DISK_SECONDS = 5.0  # until a disk that refused is tried again
_RETRY_SECONDS = 0.5  # until a transport that took nothing is tried again


class Outbox:
    """`put` returns at once, from any thread. Give `up` and `down` to the transport as (parts of) `on_up`, `on_down`.

    Counters: `sent` (acknowledged), `dropped_old`, `dropped_full`, `disk_errors`. Raises StoreError if the file can't
    be opened or another process has it.
    """

    def __init__(
        self,
        path: Path,
        transport: Transport,
        *,
        max_bytes: int = 16 << 20,
        max_age: float = 7 * 86_400.0,
        max_ram: int = 2 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sent = self.dropped_old = self.dropped_full = self.disk_errors = 0
        self._transport = transport
        self._max_bytes, self._max_age, self._max_ram = max_bytes, max_age, max_ram
        self._clock = clock
        self._file = LetterFile(path)
        self._epoch = self._file.seconds - clock()  # from that clock to ours

        self._changed = threading.Condition()  # of what follows, up to the blank line
        self._unsaved: deque[Letter] = deque()  # `put` appends, only the writer thread removes
        self._unsaved_bytes = 0
        self._newest = self._settled = self._file.last_id  # the last id given; up to here it is on the disk, or gone
        self._acknowledged: set[int] = set()  # not yet deleted
        self._sending: dict[int, float] = {}  # id -> when it was published on this connection
        self._connected = self._fresh = transport.connected
        self._closing = False

        # Of the writer thread alone.
        self._cursor = 0  # up to here everything was published on this connection
        self._disk_at = self._tick_at = self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Messages that the broker has not acknowledged, about."""
        return self._file.count + len(self._unsaved) - len(self._acknowledged)

    def put(self, topic: str, payload: bytes, priority: int = 0, retain: bool = False) -> None:
        """Raises ValueError for what is no topic name."""
        check_topic(topic)
        with self._changed:
            letter = Letter(self._newest + 1, topic, payload, priority, retain, self._now())
            # Twice the bound: until the writer has had its turn, nobody chooses what is dropped.
            if letter.size > self._max_bytes or self._unsaved_bytes + letter.size > 2 * self._max_ram:
                self.dropped_full += 1
                return
            self._newest = letter.id
            self._unsaved.append(letter)
            self._unsaved_bytes += letter.size
            self._changed.notify_all()

    def flush_to_disk(self, timeout: float = 30.0) -> bool:
        """Waits until all that was put before is on the disk; False if the disk refuses, or is slower than that."""
        with self._changed:
            last, errors = self._newest, self.disk_errors
            self._changed.wait_for(lambda: self._settled >= last or self.disk_errors > errors, timeout)
            return self._settled >= last

    def up(self) -> None:
        with self._changed:
            self._connected = self._fresh = True
            self._changed.notify_all()

    def down(self) -> None:
        with self._changed:
            self._connected = False

    def close(self) -> None:
        """Writes what is in RAM, and does not wait for the broker. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _now(self) -> float:
        return self._clock() + self._epoch

    def _done(self, id: int) -> None:
        """On the transport's thread."""
        with self._changed:
            self._sending.pop(id, None)
            self._acknowledged.add(id)
            self.sent += 1
            self._changed.notify_all()

    # From here on: on the writer thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, self._pause())
                closing = self._closing
                if self._fresh:
                    self._fresh = False
                    self._begin_again()
            self._save(closing)
            if closing:
                self._file.close()
                return
            self._send()

    def _begin_again(self) -> None:
        self._sending.clear()
        self._cursor = 0
        self._retry_at = 0.0

    def _has_work(self) -> bool:
        now = self._clock()
        disk = now >= self._disk_at and (self._unsaved or len(self._acknowledged) >= _WINDOW)
        room = self._connected and now >= self._retry_at and len(self._sending) < _WINDOW
        return bool(self._closing or self._fresh or disk or (room and self._cursor < self._newest))

    def _pause(self) -> float:
        """Seconds until something is due by the clock."""
        now = self._clock()
        return min((at - now for at in (self._disk_at, self._retry_at, self._tick_at) if at > now), default=0.0)

    def _save(self, closing: bool) -> None:
        now = self._clock()
        with self._changed:
            self._keep([letter for letter in self._unsaved if letter.id not in self._acknowledged])
            new, gone, newest = list(self._unsaved), set(self._acknowledged), self._newest
        if not closing and (now < self._disk_at or not (new or gone or now >= self._tick_at)):
            return
        try:
            seconds = self._now()
            old, full = self._file.write(new, gone, seconds, seconds - self._max_age, self._max_bytes)
        except sqlite3.Error as error:
            self._disk_refused(error, new)
            return
        with self._changed:
            self._keep([letter for letter in self._unsaved if letter.id > newest])
            self._acknowledged -= gone
            self._settled = newest
            self.dropped_old += old
            self.dropped_full += full
            self._disk_at, self._tick_at = 0.0, now + _TICK_SECONDS
            self._changed.notify_all()

    def _keep(self, letters: list[Letter]) -> None:
        self._unsaved = deque(letters)
        self._unsaved_bytes = sum(letter.size for letter in letters)

    def _disk_refused(self, error: sqlite3.Error, unsaved: list[Letter]) -> None:
        if not self.disk_errors:
            log.error("the outbox cannot be written (%s): messages wait in memory", type(error).__name__)
        self._disk_at = self._tick_at = self._clock() + _DISK_SECONDS
        excess = sum(letter.size for letter in unsaved) - self._max_ram
        dropped: set[int] = set()
        for letter in sorted(unsaved, key=lambda letter: (letter.priority, letter.id)):
            if excess <= 0:
                break
            dropped.add(letter.id)
            excess -= letter.size
        with self._changed:
            self.disk_errors += 1
            self.dropped_full += len(dropped)
            self._keep([letter for letter in self._unsaved if letter.id not in dropped])
            self._changed.notify_all()

    def _send(self) -> None:
        now = self._clock()
        with self._changed:
            if self._sending and now - min(self._sending.values()) > _ACK_SECONDS:
                self._begin_again()
        while letters := self._next_letters():
            for letter in letters:
                with self._changed:
                    if self._fresh:  # of a new connection, everything is sent in order
                        return
                    self._sending[letter.id] = now
                done = partial(self._done, letter.id)
                if not self._transport.publish(letter.topic, letter.payload, qos=1, retain=letter.retain, done=done):
                    with self._changed:
                        self._sending.pop(letter.id, None)
                    self._retry_at = now + _RETRY_SECONDS
                    return
                self._cursor = letter.id

    def _next_letters(self) -> list[Letter]:
        """In the order of `put`: what is on the disk, then what is not there yet."""
        with self._changed:
            room = _WINDOW - len(self._sending)
            if not self._connected or room <= 0 or self._clock() < self._retry_at:
                return []
            acknowledged, unsaved, newest = set(self._acknowledged), list(self._unsaved), self._newest
        try:
            letters = self._file.after(self._cursor, room + len(acknowledged))
        except sqlite3.Error:
            self.disk_errors += 1
            self._retry_at = self._clock() + _DISK_SECONDS
            return []
        letters += [letter for letter in unsaved if letter.id > self._cursor]
        letters = [letter for letter in letters if letter.id not in acknowledged][:room]
        if not letters:
            self._cursor = newest
        return letters
