"""The embedded MQTT 3.1.1 broker: amqtt, with its handling of connections and deliveries replaced.

For demos and single sites; it keeps everything in memory, so a restart forgets sessions and retained messages. For
production use Mosquitto (deploy/mosquitto/). As of amqtt 0.12.1 these faults made it unusable by itself:

- QoS 1 messages that were on their way when a connection broke are lost; those for an offline client arrive marked as
  retained, and for an anonymous client not at all;
- a client that connects again while its old connection lingers is taken for disconnected, and the will that is
  published for the old connection is the new one's;
- keep-alive is not enforced, so a client that vanished without a FIN stays connected, and no will is sent;
- a connection that failed to log in replaces the session of the one that did; wills bypass topic rules;
- a reconnecting client gets retained messages that it never subscribed to; overlapping filters deliver twice;
- packets of up to 256 MB are read; a shutdown may never end.

What remains: the QoS of a delivery is the subscription's, even where the message was published at QoS 0.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from amqtt.adapters import ReaderAdapter, StreamReaderAdapter, StreamWriterAdapter, WriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import Action, BrokerConfig, ListenerConfig, ListenerType
from amqtt.errors import AMQTTError, BrokerError, MQTTError, NoDataError
from amqtt.mqtt.connack import NOT_AUTHORIZED, ConnackPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session

from protocol.errors import ConfigError
from server.broker.access import Access
from server.broker.delivery import Deliveries, Parcel

MAX_PACKET = 512 * 1024

_LOGIN_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
_MOST_SESSIONS, _MOST_RETAINED = 4096, 10_000
_DELIVERIES = "skerry.deliveries"


class _Reader(StreamReaderAdapter):  # type: ignore[misc]  # amqtt has no types
    async def read(self, n: int = -1) -> bytes:
        if n > MAX_PACKET:
            raise ValueError("a packet over the limit")  # amqtt ends the connection
        data: bytes = await super().read(n)
        return data


class _Writer(StreamWriterAdapter):  # type: ignore[misc]  # amqtt has no types
    is_closed: bool

    async def close(self) -> None:
        """Without waiting for a client that does not read."""
        if not self.is_closed:
            self.is_closed = True
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._writer.drain()
                    self._writer.close()
                    await self._writer.wait_closed()
            self._writer.transport.abort()


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]  # amqtt has no types
    def handle_read_timeout(self) -> None:
        """Nothing came for one and a half times the keep-alive."""
        self._ending = asyncio.ensure_future(self.handle_connection_closed())

    async def stop(self) -> None:
        """The connection first: a reader may miss that it is cancelled (asyncio.wait_for), but not that it is over."""
        if self.writer is not None:
            await self.writer.close()
        await super().stop()


class EmbeddedBroker(Broker):  # type: ignore[misc]  # amqtt has no types
    """Start with `serve`."""

    def __init__(self, host: str, port: int, access: Access) -> None:
        listener = ListenerConfig(type=ListenerType.TCP, bind=f"{host}:{port}")
        super().__init__(BrokerConfig(listeners={"default": listener}, plugins={}))
        self._address = (host, port)
        self._access = access
        self._present: dict[str, tuple[_Handler, asyncio.Event]] = {}  # client id -> connection, its end

    @property
    def port(self) -> int:
        server = self._servers["default"].instance
        assert isinstance(server, asyncio.Server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _create_server_instance(self, *_: Any) -> asyncio.Server:
        host, port = self._address
        return await asyncio.start_server(self._accepted, host, port)  # asyncio sets TCP_NODELAY

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._client_connected("default", _Reader(reader), _Writer(writer))

    async def _client_connected(self, listener_name: str, reader: ReaderAdapter, writer: WriterAdapter) -> None:
        try:
            async with asyncio.timeout(_LOGIN_SECONDS):
                handler, asked = await _Handler.init_from_connect(reader, writer, self.plugins_manager)
                if not self._may_connect(asked):
                    await ConnackPacket.build(0, NOT_AUTHORIZED).to_stream(writer)
                    raise MQTTError("not authorised")
            await self._converse(handler, asked, reader, writer)
        except (AMQTTError, MQTTError, NoDataError, OSError, TimeoutError, ValueError) as error:
            self.logger.debug("a connection is ended: %s", type(error).__name__)
        finally:
            await writer.close()

    def _may_connect(self, asked: Session) -> bool:
        if not self._access.admits(asked.username, asked.password):
            return False
        full = asked.client_id not in self._sessions and len(self._sessions) >= _MOST_SESSIONS
        if full and not self._forget_one():
            return False
        return not asked.will_flag or self._access.may_publish(asked.username, asked.will_topic or "")

    def _forget_one(self) -> bool:
        gone = next((client for client in self._sessions if client not in self._present), None)
        if gone is not None:
            session, _ = self._sessions.pop(gone)
            for filter in list(self._subscriptions):
                self._del_subscription(filter, session)
        return gone is not None

    async def _converse(self, handler: _Handler, asked: Session, reader: ReaderAdapter, writer: WriterAdapter) -> None:
        """From the accepted login to the end of the connection."""
        client = asked.client_id
        assert client is not None
        while client in self._present:  # the old connection ends entirely, will included, before the new one begins
            old, ended = self._present[client]
            await old.handle_connection_closed()
            await ended.wait()
        ended = asyncio.Event()
        self._present[client] = handler, ended
        try:
            session = await self._session(client, asked)
            deliveries: Deliveries = session.attributes[_DELIVERIES]
            session.transitions.connect()
            handler.attach(session, reader, writer)
            self._sessions[client] = session, handler
            await handler.mqtt_connack_authorize(True)
            await handler.start()
            sending = asyncio.create_task(deliveries.run(handler))
            try:
                await self._client_message_loop(session, handler)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                await handler.stop()
                session.transitions.disconnect()
                deliveries.forget_qos0()
        finally:
            del self._present[client]
            ended.set()

    async def _session(self, client: str, asked: Session) -> Session:
        """The one that is kept, if both sides want that, with what the new connection said of itself."""
        asked.keep_alive += asked.keep_alive // 2  # MQTT-3.1.2-24
        kept, _ = self._sessions.get(client, (None, None))
        if kept is None or kept.clean_session or asked.clean_session:
            await self._delete_session(client)
            asked.attributes[_DELIVERIES] = Deliveries()
            return asked
        for name in ("will_flag", "will_message", "will_topic", "will_qos", "will_retain", "keep_alive", "username"):
            setattr(kept, name, getattr(asked, name))
        kept.parent = 1
        return kept

    async def _run_broadcast(self, running_tasks: Any) -> None:
        message = await self._broadcast_queue.get()
        wanted: dict[str, tuple[Session, int]] = {}
        for filter, subscriptions in self._subscriptions.items():
            if self._matches(message["topic"], filter):
                for session, qos in subscriptions:
                    client = session.client_id or ""
                    wanted[client] = session, max(qos, wanted.get(client, (session, 0))[1])
        for client, (session, qos) in wanted.items():
            if client in self._present or (qos and not session.clean_session):
                session.attributes[_DELIVERIES].put(Parcel(message["topic"], bytes(message["data"]), qos))

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        filter, qos = subscription
        for topic, kept in self._retained_messages.items():
            if self._matches(topic, filter):
                session.attributes[_DELIVERIES].put(Parcel(topic, bytes(kept.data), min(qos, kept.qos or 0), True))

    async def retain_message(
        self, source_session: Session | None, topic_name: str | None, data: Any, qos: int | None = None
    ) -> None:
        if topic_name in self._retained_messages or len(self._retained_messages) < _MOST_RETAINED:
            await super().retain_message(source_session, topic_name, data, qos)

    async def _topic_filtering(self, session: Session, topic: str, action: Action) -> bool:
        if action is Action.PUBLISH:
            return self._access.may_publish(session.username, topic)
        return action is not Action.SUBSCRIBE or self._access.may_hear(session.username, topic)


async def serve(host: str, port: int, passwords: Path | None) -> EmbeddedBroker:
    """A broker that listens; `shutdown` ends it. Raises ConfigError if it may not or can't listen there."""
    if passwords is None and not _loopback(host):
        raise ConfigError(
            f"{host} can be reached by other machines, which needs passwords: make some with `skerry broker password`, "
            "or listen on 127.0.0.1"
        )
    for name in ("amqtt", "transitions"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log every connection, and messages with them
    broker = EmbeddedBroker(host, port, Access.of(passwords))
    try:
        await broker.start()
    except BrokerError as error:
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else type(cause).__name__
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
    return broker


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
