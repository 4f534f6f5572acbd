"""MQTT 3.1.1 through paho: one thread, one paho client per connection, reconnecting of our own.

A paho client is thrown away with its connection, so nothing of a lost one (half a packet, messages under way, a
downgraded protocol) reaches the next. Its callbacks only note what happened; handlers run after paho's turn, outside
of its locks, and a QoS 1 message is acknowledged when its handlers have seen it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from protocol.errors import ConfigError
from protocol.transport.base import Delivery, Handler, Transport, Will
from protocol.transport.filters import check_topic
from protocol.transport.inbox import Inbox, packet_bytes

log = logging.getLogger(__name__)

MAX_PAYLOAD = 256 * 1024

_CONNECT_SECONDS = 5.0  # for TCP, and again for each step of TLS
_ACCEPT_SECONDS = 10.0  # from then until the broker has accepted us
_CLOSE_SECONDS = 2.0  # a broker that does not read is not waited for
_TURN_SECONDS = 0.5  # the longest turn of paho's loop
_STABLE_SECONDS = 10.0  # a connection that lived shorter counts as a failed attempt
_FLAPS = 3
_MOST_PENDING, _MOST_PENDING_BYTES = 4096, 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class MqttOptions:
    """`url`: mqtt://host:port or mqtts://host:port (1883, 8883). `client_id`: names the session at the broker, one
    device each. `ca`, `certificate`, `key`: PEM files; without `ca` the system's authorities are trusted. Seconds:
    `keepalive`, after twice which a silent connection is given up; `first_retry` doubles up to `longest_retry` and is
    jittered fully; `refused_retry` is the same for a wrong password."""

    url: str
    client_id: str
    username: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    certificate: str = ""
    key: str = ""
    keepalive: int = 15
    first_retry: float = 0.2
    longest_retry: float = 30.0
    refused_retry: float = 60.0

    def address(self) -> tuple[str, int, bool]:
        """Host, port and whether with TLS. Raises ConfigError."""
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        else:
            if parts.username or parts.password or parts.path.strip("/"):
                host = None
        if not host or parts.scheme not in ("mqtt", "mqtts"):
            raise ConfigError(f"broker: {_public(self.url)!r} is not mqtt://host:port or mqtts://host:port")
        tls = parts.scheme == "mqtts"
        return host, port or (8883 if tls else 1883), tls

    def context(self) -> ssl.SSLContext:
        """Raises ConfigError for files that are missing or not what they should be."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key or None)
        except (OSError, ValueError) as error:
            files = ", ".join(name for name in (self.ca, self.certificate, self.key) if name)
            raise ConfigError(f"broker: cannot use the TLS files {files}: {error}") from None
        return context


def _public(url: str) -> str:
    """Without what might be a password."""
    return url if "@" not in url else "…@" + url.rpartition("@")[2]


@dataclass(slots=True)
class _Pending:
    """A publish that paho has not yet reported as done."""

    info: paho.MQTTMessageInfo
    size: int
    done: Callable[[], None] | None


class MqttTransport(Transport):
    """A broker at `options.url`. Raises ConfigError if that or the TLS files are unusable.

    `publish` also returns False while 4,096 messages or 8 MiB are on their way. `bytes_up` and `bytes_down` are sizes
    of PUBLISH packets (header, topic, payload), without acknowledgements, TCP and TLS.

    Brokers may deliver a message once per subscription if filters overlap (MQTT 3.1.1, 3.3.5). Paho reads a packet
    before its size can be judged: limit sizes at the broker.
    """

    def __init__(
        self,
        options: MqttOptions,
        will: Callable[[], Will] | None = None,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
        *,
        jitter: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(will, on_up, on_down)
        self.options = options
        self.bytes_up = self.bytes_down = 0
        self.messages_up = self.messages_down = 0
        self.oversized = self.malformed = self.subscriptions_refused = 0
        self.connections = 0
        self._host, self._port, self._tls = options.address()
        if self._tls:
            options.context()
        self._jitter = jitter or random.SystemRandom().random
        self._clock = clock
        self._inbox = Inbox()
        self._events: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # of what follows, up to the blank line
        self._client: paho.Client | None = None  # only while connected
        self._pending: dict[int, _Pending] = {}
        self._pending_bytes = 0
        self._asked: dict[int, list[str]] = {}

        self._closing = threading.Event()
        self._handling = threading.RLock()  # held while a handler runs
        self._closed = False  # no handler is called any more
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._up_since = math.inf
        self._failures = 0  # attempts in a row that did not end in a stable connection
        self._kicked = 0  # connections in a row that the broker ended at once
        self._refused = False
        self._problem = "connecting"

    @property
    def connected(self) -> bool:
        return self._client is not None

    @property
    def state(self) -> str:
        """`connected`, `connecting`, `closed`, or what is wrong."""
        if self._closing.is_set():
            return "closed"
        if self._kicked >= _FLAPS and not self._clock() - self._up_since > _STABLE_SECONDS:
            return (
                f"connections are ended {self._kicked} times in a row: does another client use the id "
                f"{self.options.client_id!r}?"
            )
        return "connected" if self.connected else self._problem

    def start(self) -> None:
        self._thread.start()

    def subscribe(self, filter: str, handler: Handler, *, qos: int = 0) -> None:
        wanted = self._inbox.add(filter, handler, qos)
        with self._lock:
            if self._client:
                self._ask(self._client, [(filter, wanted)])

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, done: Callable[[], None] | None = None
    ) -> bool:
        check_topic(topic)
        size = packet_bytes(topic, payload, qos)
        with self._lock:
            full = len(self._pending) >= _MOST_PENDING or self._pending_bytes + size > _MOST_PENDING_BYTES
            if self._client is None or full:
                return False
            info = self._client.publish(topic, payload, qos, retain)
            if info.rc:
                return False
            self.bytes_up += size
            self.messages_up += 1
            # The ids wrap after 65,535 messages: a QoS 0 message may meet one whose acknowledgement is still awaited.
            if info.mid not in self._pending:
                self._pending[info.mid] = _Pending(info, size, done)
                self._pending_bytes += size
            elif done:
                self._events.append(partial(self._call, done))
            return True

    def close(self) -> None:
        """Without a connection it does not wait for the attempt at one, which ends by itself. No handler runs after
        it returns."""
        self._closing.set()
        with self._lock:
            was = self.connected
            if self._client:
                self._client.disconnect()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS + 2 * _TURN_SECONDS if was else _TURN_SECONDS)
        with self._handling:
            self._closed = True

    # From here on: on the transport's thread.

    def _run(self) -> None:
        while not self._closing.is_set():
            self._refused = False
            self._up_since = math.inf
            try:
                self._connection()
            except Exception as error:  # whatever it was, the next attempt begins afresh
                self._problem = f"failed: {type(error).__name__}"
                log.error("the connection to the broker failed: %s", type(error).__name__)
            self._failures = 0 if self._clock() - self._up_since > _STABLE_SECONDS else self._failures + 1
            self._closing.wait(self._pause())

    def _pause(self) -> float:
        """Seconds until the next attempt: full jitter, so that a fleet does not come back all at once."""
        o = self.options
        if self._refused:
            return o.refused_retry * (0.5 + self._jitter() / 2)
        return min(o.longest_retry, o.first_retry * 2.0 ** min(self._failures, 30)) * self._jitter()

    def _connection(self) -> None:
        """From connecting to the end of it, however that comes."""
        try:
            client = self._new_client()
            client.connect(self._host, self._port, self.options.keepalive)
        except (ConfigError, OSError, ValueError) as error:  # ValueError: a certificate, a name that can't be one
            self._problem = f"unreachable: {_why(error)}"
            return
        self._problem = "the broker ended the connection"
        try:
            if not self._closing.is_set():  # else even a greeting would end the next connection with our id
                self._converse(client)
        finally:
            if left := client.socket():
                left.close()
            self._drain()
            self._down()

    def _converse(self, client: paho.Client) -> None:
        began = self._clock()
        closing_since: float | None = None
        while client.loop(_TURN_SECONDS) == paho.MQTT_ERR_SUCCESS:
            self._drain()
            now = self._clock()
            if not self.connected and now - began > _ACCEPT_SECONDS:
                self._problem = "the broker does not answer"
                return
            if self._closing.is_set():
                closing_since = closing_since or now
                if not self.connected or now - closing_since > _CLOSE_SECONDS:
                    return

    def _new_client(self) -> paho.Client:
        o = self.options
        client = paho.Client(
            CallbackAPIVersion.VERSION2, o.client_id, clean_session=False, manual_ack=True, reconnect_on_failure=False
        )
        client.connect_timeout = _CONNECT_SECONDS
        client.max_inflight_messages_set(0)  # no limit of paho's: `publish` has its own
        client.max_queued_messages_set(0)
        if o.username:
            client.username_pw_set(o.username, o.password)
        if self._tls:
            client.tls_set_context(o.context())  # anew each time: certificates are renewed
        if self.will:
            self._call(lambda: self._set_will(client))
        client.on_socket_open = _no_delay
        client.on_socket_register_write = lambda *_: None  # else paho writes on the thread that publishes
        note = self._events.append
        client.on_connect = lambda c, _u, _f, reason, _p: note(partial(self._accepted, c, reason))
        client.on_publish = lambda _c, _u, mid, _r, _p: note(partial(self._published, mid))
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: note(partial(self._subscribed, mid, reasons))
        client.on_message = lambda c, _u, message: note(partial(self._arrived, c, message))
        return client

    def _set_will(self, client: paho.Client) -> None:
        assert self.will is not None
        will = self.will()
        client.will_set(will.topic, will.payload, qos=1, retain=True)

    def _drain(self) -> None:
        while self._events:
            self._events.popleft()()

    def _call(self, function: Callable[[], None]) -> None:
        with self._handling:
            if not self._closed:
                self._inbox.call(function)
                self.handler_errors = self._inbox.errors

    def _accepted(self, client: paho.Client, reason: ReasonCode) -> None:
        if reason.is_failure:
            self._problem = f"refused: {reason.getName().lower()}"
            self._refused = reason.getName() != "Server unavailable"
            return
        with self._lock:
            if self._closing.is_set():
                return
            self._client = client
            if filters := self._inbox.filters():
                self._ask(client, filters)
        self.connections += 1
        self._up_since = self._clock()
        log.info("connected to the broker at %s:%d", self._host, self._port)
        self._call(self.on_up)

    def _ask(self, client: paho.Client, filters: list[tuple[str, int]]) -> None:
        _, mid = client.subscribe(filters)
        if mid is not None:
            self._asked[mid] = [filter for filter, _ in filters]

    def _subscribed(self, mid: int, reasons: list[ReasonCode]) -> None:
        with self._lock:
            asked = self._asked.pop(mid, [])
        for filter, reason in zip(asked, reasons, strict=False):
            if reason.is_failure:
                self.subscriptions_refused += 1
                log.warning("the broker refuses a subscription to %s: see its access list", filter)

    def _published(self, mid: int) -> None:
        with self._lock:
            pending = self._pending.get(mid)
            if pending is None or not pending.info.is_published():
                return
            del self._pending[mid]
            self._pending_bytes -= pending.size
        if pending.done:
            self._call(pending.done)

    def _arrived(self, client: paho.Client, message: paho.MQTTMessage) -> None:
        try:
            delivery = Delivery(message.topic, bytes(message.payload), message.retain)
        except UnicodeDecodeError:
            self.malformed += 1
        else:
            self.bytes_down += packet_bytes(delivery.topic, delivery.payload, message.qos)
            self.messages_down += 1
            if len(delivery.payload) > MAX_PAYLOAD:
                self.oversized += 1
            else:
                self._call(partial(self._inbox.hand, delivery))
        client.ack(message.mid, message.qos)

    def _down(self) -> None:
        with self._lock:
            was, self._client = self.connected, None
            self._pending.clear()
            self._pending_bytes = 0
            self._asked.clear()
        if not was:
            return
        self._kicked = self._kicked + 1 if self._clock() - self._up_since < _STABLE_SECONDS else 0
        log.info("the connection to the broker is lost")
        self._call(self.on_down)


def _no_delay(client: paho.Client, userdata: Any, connection: Any) -> None:
    """Nagle's algorithm and delayed acknowledgements together cost 40 ms per QoS 1 message."""
    with contextlib.suppress(OSError):  # it is gone already, as the loop will notice
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _why(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
