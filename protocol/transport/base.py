"""The Transport seam: publish and subscribe, with the semantics of MQTT 3.1.1.

A transport MUST:
- never block in `publish` or `subscribe`, from whatever thread they are called;
- call handlers on one thread of its own, one at a time, in the order of arrival; an error in a handler is counted in
  `handler_errors`, logged by its type alone, and ends nothing;
- keep messages of one publisher to one topic in order; deliver QoS 1 at least once (so possibly twice) over a session
  that survives reconnecting, QoS 0 at most once;
- subscribe again by itself after each connection, and reconnect for ever with capped, jittered backoff;
- send the will if the connection ends in any other way than by `close`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias


class Delivery(NamedTuple):
    """`retained`: the broker had kept it, it is not new."""

    topic: str
    payload: bytes
    retained: bool


class Will(NamedTuple):
    """Published by the broker, retained at QoS 1, when this client vanishes."""

    topic: str
    payload: bytes


Handler: TypeAlias = Callable[[Delivery], None]


class Transport(ABC):
    """`will`, if given, is asked for the present will before each connection. `on_up` and `on_down` are called on the
    transport's thread after each connection (before any message of it) and after each loss. `bytes_up`, `bytes_down`:
    PUBLISH packets, whole. `malformed`, `oversized`: messages that were dropped. `subscriptions_refused`: by the
    broker's access list."""

    handler_errors: int = 0
    malformed: int = 0
    oversized: int = 0
    subscriptions_refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def __init__(
        self,
        will: Callable[[], Will] | None = None,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self.will = will
        self.on_up = on_up
        self.on_down = on_down

    @property
    @abstractmethod
    def connected(self) -> bool: ...

    @property
    @abstractmethod
    def state(self) -> str:
        """For people: `connected`, `connecting`, `refused: …`."""

    @abstractmethod
    def start(self) -> None:
        """Begins to connect, and returns at once: whether and when that works is told by `on_up`."""

    @abstractmethod
    def subscribe(self, filter: str, handler: Handler, *, qos: int = 0) -> None:
        """May be called before `start`. `filter` may hold + and #; a message that several filters match is handed to
        each of their handlers once."""

    @abstractmethod
    def publish(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, done: Callable[[], None] | None = None
    ) -> bool:
        """False: not connected, nothing was sent or kept. `done` is called once the broker has it (QoS 1) or once it
        is on its way (QoS 0); never, if the connection is lost before: publish again then."""

    @abstractmethod
    def close(self) -> None:
        """Ends the connection properly and its thread. Idempotent."""
