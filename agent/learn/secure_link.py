"""The messages of a secure round, to and from the device's part in it (agent/learn/secure.py)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from agent.learn.secure import Participant
from protocol.errors import ProtocolError
from protocol.rounds import Update
from protocol.secure import decode, encode
from protocol.sums import contribution
from protocol.topics import EDGE, SECURE, Cluster
from protocol.transport.base import Delivery, Transport


class SecureLink:
    """Subscribes at `transport`, which must not be started yet. `counts`: messages that were of no use."""

    def __init__(
        self, cluster: Cluster, me: str, transport: Transport, participant: Participant, clock: Callable[[], float]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._topic = cluster.path(SECURE, me, EDGE)
        self._transport = transport
        self._participant = participant
        self._clock = clock
        self._lock = threading.Lock()  # of the participant
        transport.subscribe(cluster.path(SECURE, EDGE, me), self._heard, qos=SECURE.qos)

    @property
    def refused(self) -> Counter[str]:
        """Steps that this device did not take, by reason."""
        return self._participant.refused

    def join(self, update: Update, seconds: float) -> bool:
        """Takes part with what `update` says, within that many seconds. False: not connected."""
        value = contribution(update.threshold, update.evidence, update.statistics)
        with self._lock:
            join = self._participant.join(update.round, update.subject, value, self._clock() + seconds)
        return self._transport.publish(self._topic, encode(join), qos=SECURE.qos)

    def _heard(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.payload)
        except ProtocolError:
            message = None
        if message is None:
            self.counts["malformed"] += 1
            return
        with self._lock:
            answers = self._participant.heard(message, self._clock())
        for answer in answers:
            self._transport.publish(self._topic, encode(answer), qos=SECURE.qos)
