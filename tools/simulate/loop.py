"""Thousands of MQTT connections on one thread: a paho client for each, driven by one selector, and timers."""

from __future__ import annotations

import heapq
import itertools
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from protocol.errors import LinkError

_HEADERS = 52  # bytes of IPv4 and of TCP with time stamps, per segment
_TCP_INFO, _TCP_INFO_BYTES, _TCP_INFO_AT = 11, 144, 120  # linux/tcp.h: tcpi_bytes_acked … tcpi_segs_in


class Owner(Protocol):
    """Told of what happens on a connection. What raises here ends the run."""

    def up(self) -> None:
        """Accepted, and the subscriptions too."""

    def down(self) -> None: ...

    def heard(self, message: paho.MQTTMessage) -> None: ...

    def acknowledged(self, packet: int) -> None: ...


@dataclass(slots=True)
class Wire:
    """What went over TCP and IP, both ways: headers, acknowledgements, MQTT's own too."""

    bytes: int = 0

    def add(self, connection: socket.socket) -> None:
        """Linux only; elsewhere nothing is added."""
        if sys.platform == "linux":
            info = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
            acked, received, out, into = struct.unpack_from("=QQII", info, _TCP_INFO_AT)
            self.bytes += acked + received + _HEADERS * (out + into)


class Loop:
    """To be turned by whoever owns it."""

    def __init__(self) -> None:
        self._ended = Wire()
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), call))

    def turn(self, seconds: float) -> None:
        """Waits at most so long for something to happen, and does what is due."""
        if self._timers:
            seconds = max(0.0, min(seconds, self._timers[0][0] - time.monotonic()))
        for key, events in self._selector.select(seconds):
            client: paho.Client = key.data
            if events & selectors.EVENT_READ:
                client.loop_read()
            if events & selectors.EVENT_WRITE:
                client.loop_write()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def connect(self, address: tuple[str, int], id: str, filters: list[tuple[str, int]], owner: Owner) -> paho.Client:
        """A persistent session under `id`, without keep-alive. Raises OSError."""
        client = paho.Client(
            CallbackAPIVersion.VERSION2, id, clean_session=False, userdata=owner, reconnect_on_failure=False
        )
        client.on_connect = partial(_accepted, filters)
        client.on_subscribe = _up
        client.on_message = _heard
        client.on_publish = _acknowledged
        client.on_disconnect = _down
        self._join(client, address)
        return client

    def erase(self, address: tuple[str, int], id: str, topics: list[str], done: Callable[[], None]) -> None:
        """Ends the session `id`, with all that waits in it, and removes what is retained on `topics`. Raises
        OSError."""
        client = paho.Client(CallbackAPIVersion.VERSION2, id, clean_session=True, reconnect_on_failure=False)
        client.on_connect = partial(_erased, topics)
        client.on_disconnect = lambda *_: done()
        self._join(client, address)

    def _join(self, client: paho.Client, address: tuple[str, int]) -> None:
        client.on_socket_open = self._opened
        client.on_socket_close = self._closed
        client.on_socket_register_write = self._writes
        client.on_socket_unregister_write = self._reads
        client.connect(*address, keepalive=0)

    def cut(self, client: paho.Client, packet: bytes = b"") -> None:
        """Ends the connection where it is, at most with a last piece of a packet. Nobody is told; what is on its way
        to the client is lost."""
        connection = client.socket()
        if connection is None:
            return
        if packet:
            with suppress(OSError):
                connection.send(packet)
        client.on_socket_close = client.on_socket_unregister_write = None
        self._closed(client, None, connection)
        connection.close()

    def measured(self) -> int:
        """Bytes over TCP of all connections so far."""
        whole = Wire(self._ended.bytes)
        for key in self._selector.get_map().values():
            whole.add(key.fileobj)  # type: ignore[arg-type]  # sockets are all that is registered
        return whole.bytes

    def close(self) -> None:
        """Without a word to the broker."""
        for key in list(self._selector.get_map().values()):
            self.cut(key.data)
        self._selector.close()

    def _opened(self, client: paho.Client, owner: Owner, connection: Any) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _closed(self, client: paho.Client, owner: Owner | None, connection: Any) -> None:
        self._ended.add(connection)
        self._selector.unregister(connection)

    def _writes(self, client: paho.Client, owner: Owner, connection: Any) -> None:
        self._selector.modify(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, client)

    def _reads(self, client: paho.Client, owner: Owner, connection: Any) -> None:
        self._selector.modify(connection, selectors.EVENT_READ, client)


def _accepted(
    filters: list[tuple[str, int]], client: paho.Client, owner: Owner, flags: object, reason: ReasonCode, _: object
) -> None:
    if reason.is_failure:
        raise LinkError(f"the broker refuses a simulated device: {reason.getName().lower()}")
    client.subscribe(filters)


def _erased(topics: list[str], client: paho.Client, *_: object) -> None:
    for topic in topics:
        client.publish(topic, b"", retain=True)
    client.disconnect()


def _up(client: paho.Client, owner: Owner, *_: object) -> None:
    owner.up()


def _down(client: paho.Client, owner: Owner, *_: object) -> None:
    owner.down()


def _heard(client: paho.Client, owner: Owner, message: paho.MQTTMessage) -> None:
    owner.heard(message)


def _acknowledged(client: paho.Client, owner: Owner, packet: int, *_: object) -> None:
    owner.acknowledged(packet)
