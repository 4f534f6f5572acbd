"""The side of a transport that is the same for all of them: who wants what, and handing it over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from protocol.transport.base import Delivery, Handler
from protocol.transport.filters import FilterTree, check_filter

log = logging.getLogger(__name__)


def packet_bytes(topic: str, payload: bytes, qos: int) -> int:
    """Size of the PUBLISH packet: header, topic and payload. Acknowledgements, TCP and TLS come on top."""
    rest = 2 + len(topic.encode()) + (2 if qos else 0) + len(payload)
    length = 1 if rest < 128 else 2 if rest < 16_384 else 3 if rest < 2_097_152 else 4
    return 1 + length + rest


class Inbox:
    """Handlers by topic filter. `add` from any thread, `hand` and `call` from the transport's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tree: FilterTree[list[Handler]] = FilterTree()
        self._qos: dict[str, int] = {}
        self.errors = 0

    def add(self, filter: str, handler: Handler, qos: int) -> int:
        """The QoS to subscribe with. Raises ValueError for a malformed filter."""
        check_filter(filter)
        with self._lock:
            self._tree.put(filter, [*(self._tree.get(filter) or ()), handler])
            self._qos[filter] = max(qos, self._qos.get(filter, 0))
            return self._qos[filter]

    def filters(self) -> list[tuple[str, int]]:
        """Each filter with its QoS."""
        with self._lock:
            return list(self._qos.items())

    def hand(self, delivery: Delivery) -> None:
        with self._lock:
            handlers = [handler for found in self._tree.matching(delivery.topic) for handler in found]
        for handler in handlers:
            self.call(handler, delivery)

    def call(self, function: Callable[..., None], *arguments: Delivery) -> None:
        """An error of ours must not end the connection; its text may quote a message, so only its type is logged."""
        try:
            function(*arguments)
        except Exception as error:
            self.errors += 1
            log.error("%s in a handler of the transport", type(error).__name__)
