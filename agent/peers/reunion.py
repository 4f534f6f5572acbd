"""After an outage, what waits in the outbox waits a little longer: until those who were here before are back.

A broker that lost its memory takes a message for nobody, acknowledges it, and it is gone. One that did not says at once
who is there, so that nothing is held up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from protocol.topics import Cluster
from protocol.transport.base import Delivery

SECONDS = 40.0  # by then everybody has tried to connect again (`MqttOptions.longest_retry`)


class Reunion:
    """`up`, `status` and `down` are called on the transport's thread. `others`: devices that are online as far as this
    one knows. `complete` is called once after each `up`, on a thread of its own if somebody does not come back."""

    def __init__(
        self,
        cluster: Cluster,
        others: Callable[[], set[str]],
        complete: Callable[[], None],
        seconds: float = SECONDS,
    ) -> None:
        self._cluster = cluster
        self._others = others
        self._complete = complete
        self._seconds = seconds
        self._lock = threading.Lock()  # of what follows
        self._missing: set[str] = set()
        self._timer: threading.Timer | None = None

    def up(self) -> None:
        with self._lock:
            self._missing = self._others()
            if self._missing:
                self._timer = threading.Timer(self._seconds, self._end)
                self._timer.daemon = True
                self._timer.start()
                return
        self._complete()

    def status(self, delivery: Delivery) -> None:
        """Somebody is there again, or known to be away: then the broker keeps what is meant for it."""
        name = self._cluster.sender(delivery.topic)
        with self._lock:
            if name is not None:
                self._missing.discard(name)
            complete = not self._missing
        if complete:
            self._end()

    def down(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _end(self) -> None:
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            self._complete()
