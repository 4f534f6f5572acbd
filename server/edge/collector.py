"""Collects the updates of secure rounds: the messages' way to and from `server/edge/secure.py`."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from protocol.errors import ProtocolError
from protocol.limits import Buckets
from protocol.presence import Roster
from protocol.secure import decode, encode
from protocol.sums import Sum
from protocol.topics import EDGE, SECURE, Cluster
from protocol.transport.base import Delivery, Transport
from server.edge.secure import Outgoing, SecureOptions, SecureRound

log = logging.getLogger(__name__)

_JOIN = 0.5  # of a round's time; the rest is for the steps, of which each waits for a tenth
_STEP = 0.1
_RATE, _BURST = 1.0, 32  # messages of one device: a round takes five


class SecureCollector:
    """`rounds.Collector`. `counts`: what was refused, and why; cohorts that came to nothing, by reason."""

    def __init__(
        self, cluster: Cluster, home: Transport, roster: Roster, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._cluster = cluster
        self._home = home
        self._roster = roster
        self._clock = clock
        self._senders = Buckets(_RATE, _BURST, clock, most=16_384)
        self._lock = threading.Lock()  # of what follows
        self._round: SecureRound | None = None
        home.subscribe(cluster.path(SECURE, other=EDGE), self._heard, qos=SECURE.qos)

    def begin(self, round: int, seconds: float) -> None:
        options = SecureOptions(patience=_STEP * seconds)
        with self._lock:
            self._round = SecureRound(self._cluster, round, self._key, self._clock() + _JOIN * seconds, options)

    def enough(self) -> bool:
        with self._lock:
            if self._round is None:
                return True
            self._send(self._round.tick(self._clock()))
            return self._round.over

    def finish(self) -> Sequence[tuple[str, Sum]]:
        with self._lock:
            ended, self._round = self._round, None
        if ended is None:
            return []
        wrong = ended.refused + Counter(result.reason for result in ended.results if result.reason)
        self.counts.update(wrong)
        if wrong:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(wrong.items()))
            log.info("secure round: messages refused, or cohorts without a sum: %s", reasons)
        return [(result.subject, result.total) for result in ended.results if result.total is not None]

    def _heard(self, delivery: Delivery) -> None:
        sender = self._cluster.sender(delivery.topic)
        if sender is None or delivery.retained:
            self.counts["malformed"] += 1
            return
        if not self._senders.take(sender):
            self.counts["flood"] += 1
            return
        try:
            message = decode(delivery.payload)
        except ProtocolError:
            self.counts["malformed"] += 1
            return
        with self._lock:
            if message is None:
                self.counts["version"] += 1
            elif self._round is not None:
                self._send(self._round.heard(sender, message, self._clock()))

    def _key(self, device: str) -> bytes | None:
        seen = self._roster.get(device)
        return seen.key if seen else None

    def _send(self, outgoing: Iterable[Outgoing]) -> None:
        for device, message in outgoing:
            self._home.publish(self._cluster.path(SECURE, EDGE, device), encode(message), qos=SECURE.qos)
