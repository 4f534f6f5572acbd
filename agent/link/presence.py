"""The device's own presence: birth, last will, and repair of what is retained (protocol/presence.py has the rules)."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from protocol.errors import ProtocolError
from protocol.presence import MAX_SESSION, MAX_SPACES, Status, decode_status, status
from protocol.topics import STATUS
from protocol.transport.base import Delivery, Transport, Will

log = logging.getLogger(__name__)

_REPAIRS, _REPAIR_SECONDS = 8, 10.0  # in a row, and how long until one more is allowed
_LONGEST_JUMP = 1 << 40  # what somebody else may add to our session number with one message


class SessionNumber:
    """A number that only grows, in a file. One that is lost or can't be written starts low: the retained status then
    shows what it was. `unsaved` counts the times that it could not be written."""

    def __init__(self, path: Path) -> None:
        self.unsaved = 0
        self._path = path
        try:
            self.now = min(max(0, int(path.read_text("ascii"))), MAX_SESSION)
        except FileNotFoundError:
            self.now = 0
        except (OSError, ValueError):
            log.warning("%s: not a session number; counting from 0", path)
            self.now = 0

    def next(self, above: int = 0) -> int:
        """The next number, greater than `above`."""
        self.now = min(max(self.now, above) + 1, MAX_SESSION)
        written = self._path.with_name(f".{self._path.name}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written.open("w") as file:
                file.write(f"{self.now}\n")
                file.flush()
                os.fsync(file.fileno())
            written.replace(self._path)
        except OSError:
            self.unsaved += 1
        return self.now


class Presence:
    """Give `will` and `up` to the transport as `will` and `on_up`, and call `watch` before it starts.

    `topic`: the device's status. `repairs` counts how often what was retained there had to be put right: an old
    connection's will, a status of a stranger, a removed one.
    """

    def __init__(
        self,
        topic: str,
        key: bytes,
        sessions: SessionNumber,
        agent: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.repairs = 0
        self._topic = topic
        self._key = key
        self._sessions = sessions
        self._agent = agent
        self._clock = clock
        self._transport: Transport | None = None
        self._allowed, self._allowed_at = float(_REPAIRS), clock()
        self._lock = threading.Lock()  # of what follows
        self._session = 0
        self._spaces: tuple[bytes, ...] = ()
        self._here = False
        self._born = 0  # the session whose birth the broker has confirmed

    def watch(self, transport: Transport) -> None:
        self._transport = transport
        transport.subscribe(self._topic, self._heard, qos=STATUS.qos)

    def will(self) -> Will:
        """Begins a session: asked for before each connection."""
        session = self._sessions.next()
        with self._lock:
            self._session = session
        return Will(self._topic, status(session, False, self._key, (), self._agent))

    def up(self) -> None:
        with self._lock:
            self._here = True
            self._publish()

    def announce(self, spaces: Sequence[bytes]) -> None:
        """The spaces that are shared from now on; at most 32 are told."""
        with self._lock:
            if tuple(spaces[:MAX_SPACES]) != self._spaces:
                self._spaces = tuple(spaces[:MAX_SPACES])
                if self._here:
                    self._publish()

    def leave(self) -> None:
        """Says goodbye. Before the transport is closed, since a proper end publishes no will."""
        with self._lock:
            if self._here:
                self._here = False
                self._publish()

    def _publish(self) -> None:
        assert self._transport is not None
        spaces = self._spaces if self._here else ()
        session = self._session
        payload = status(session, self._here, self._key, spaces, self._agent)
        self._transport.publish(
            self._topic, payload, qos=STATUS.qos, retain=True, done=lambda: self._confirmed(session)
        )

    def _confirmed(self, session: int) -> None:
        self._born = max(self._born, session)

    def _heard(self, delivery: Delivery) -> None:
        """What everybody now believes of this device."""
        told: Status | None = None
        with suppress(ProtocolError):
            told = decode_status(delivery.payload)
        if not self._here or self._is_right(told) or not self._may_repair():
            return
        self.repairs += 1
        session = self._session
        if told is not None and told.key == self._key.hex() and session <= told.session <= session + _LONGEST_JUMP:
            session = self._sessions.next(told.session)
        with self._lock:
            self._session = session
            if self._here:
                self._publish()

    def _is_right(self, told: Status | None) -> bool:
        if told is not None and told.key == self._key.hex():
            if told.session == self._session:
                return told.online
            if told.session > self._session:
                return False
            if told.online:
                return True
        return self._born < self._session  # our birth comes after it

    def _may_repair(self) -> bool:
        """Not for ever: two devices under one name would answer each other."""
        now = self._clock()
        self._allowed = min(_REPAIRS, self._allowed + (now - self._allowed_at) / _REPAIR_SECONDS)
        self._allowed_at = now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True
