"""A broker in memory, for tests with thousands of devices: MQTT 3.1.1's semantics without sockets.

One thread serves the whole bus: it is every transport's thread. All clients have persistent sessions. What happens to
a client (`cut`, `restore`, `stop`, `start`) takes its place in the queue behind what was published before it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from protocol.transport.base import Delivery, Handler, Transport, Will
from protocol.transport.filters import FilterTree, check_topic
from protocol.transport.inbox import Inbox, packet_bytes

# (client id, what is about to be handed to it) -> what is handed to it instead: nothing, twice, another order
Fault = Callable[[str, Delivery], Sequence[Delivery]]


@dataclass(slots=True, eq=False)
class _Session:
    """What the broker knows of a client, connected or not. `waiting`: QoS 1 messages for when it is back."""

    transport: BusTransport | None = None
    will: Will | None = None
    waiting: deque[Delivery] = field(default_factory=deque)


class Bus:
    """`fault` changes what a client gets. `close` ends the thread; every other method returns at once."""

    def __init__(self) -> None:
        self.fault: Fault = lambda client, delivery: (delivery,)
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._running = True
        self._started: dict[str, BusTransport] = {}
        self._cut: set[str] = set()
        self._forget()
        self._thread = threading.Thread(target=self._work, name="bus", daemon=True)
        self._thread.start()

    def cut(self, client: str) -> None:
        """Its connection breaks: the will is published, and it can't connect again until `restore`."""
        self._do(partial(self._cut_now, client))

    def restore(self, client: str) -> None:
        self._do(partial(self._restore_now, client))

    def stop(self) -> None:
        """The broker dies: every connection breaks, and no will is published."""
        self._do(self._stop_now)

    def start(self, *, persistence: bool = True) -> None:
        """It comes back, with its sessions and retained messages or without."""
        self._do(partial(self._start_now, persistence))

    def settle(self, timeout: float = 60.0) -> None:
        """Waits until there is nothing left to do. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout):
                raise TimeoutError("the bus does not come to rest")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # From here on: on the bus's thread, except for _do.

    def _do(self, job: Callable[[], None]) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                if not self._jobs:
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = self._jobs.popleft()
                self._busy = True
            job()

    def _forget(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._subscribers: FilterTree[dict[str, int]] = FilterTree()  # filter -> client -> QoS
        self._retained: dict[str, bytes] = {}
        self._retained_qos: dict[str, int] = {}

    def _cut_now(self, client: str) -> None:
        self._cut.add(client)
        self._lose(client, publish_will=True)

    def _restore_now(self, client: str) -> None:
        self._cut.discard(client)
        if client in self._started:
            self._connect(self._started[client])

    def _stop_now(self) -> None:
        self._running = False
        for client in list(self._sessions):
            self._lose(client, publish_will=False)

    def _start_now(self, persistence: bool) -> None:
        if not persistence:
            self._forget()
        self._running = True
        for transport in list(self._started.values()):
            self._connect(transport)

    def _connect(self, transport: BusTransport) -> None:
        """A second client with the same id takes the session over, and the first one stays away."""
        client = transport.client_id
        if transport.closed:
            return
        if self._started.get(client) not in (None, transport):
            self._lose(client, publish_will=True)
        self._started[client] = transport
        if not self._running or client in self._cut or transport.connected:
            return
        session = self._sessions.setdefault(client, _Session())
        session.will = transport.ask_will()
        session.transport = transport
        transport.up()
        for filter, qos in transport.inbox.filters():
            self._subscribe(client, filter, qos)
        waiting, session.waiting = session.waiting, deque()
        for delivery in waiting:
            self._deliver(client, delivery, 1)

    def _lose(self, client: str, *, publish_will: bool) -> None:
        session = self._sessions.get(client)
        if session is None or session.transport is None:
            return
        transport, session.transport = session.transport, None
        transport.down()
        if publish_will and session.will:
            self._publish(session.will.topic, session.will.payload, 1, retain=True)

    def _leave(self, transport: BusTransport) -> None:
        if self._started.get(transport.client_id) is transport:
            del self._started[transport.client_id]
        session = self._sessions.get(transport.client_id)
        if session and session.transport is transport:
            session.transport = None

    def _subscribe(self, client: str, filter: str, qos: int) -> None:
        clients = self._subscribers.get(filter)
        if clients is None:
            clients = {}
            self._subscribers.put(filter, clients)
        clients[client] = qos
        only: FilterTree[bool] = FilterTree()
        only.put(filter, True)
        for topic, payload in list(self._retained.items()):
            if any(only.matching(topic)):
                self._deliver(client, Delivery(topic, payload, True), min(qos, self._retained_qos[topic]))

    def _publish(self, topic: str, payload: bytes, qos: int, retain: bool) -> None:
        if retain and payload:
            self._retained[topic], self._retained_qos[topic] = payload, qos
        elif retain:
            self._retained.pop(topic, None)
        wanted: dict[str, int] = {}
        for clients in self._subscribers.matching(topic):
            for client, granted in clients.items():
                wanted[client] = max(wanted.get(client, 0), granted)
        for client, granted in wanted.items():
            self._deliver(client, Delivery(topic, payload, False), min(qos, granted))

    def _deliver(self, client: str, delivery: Delivery, qos: int) -> None:
        session = self._sessions[client]
        if session.transport is None or session.transport.closed:
            if qos:
                session.waiting.append(delivery)
            return
        for given in self.fault(client, delivery):
            session.transport.take(given, qos)


class BusTransport(Transport):
    """A client of the bus. The counters count what MQTT would have sent."""

    def __init__(
        self,
        bus: Bus,
        client_id: str,
        will: Callable[[], Will] | None = None,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(will, on_up, on_down)
        self.client_id = client_id
        self.inbox = Inbox()
        self.bytes_up = self.bytes_down = 0
        self.messages_up = self.messages_down = 0
        self._bus = bus
        self._lock = threading.Lock()
        self._connected = False
        self.closed = False

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def state(self) -> str:
        return "closed" if self.closed else "connected" if self._connected else "connecting"

    def start(self) -> None:
        self._bus._do(partial(self._bus._connect, self))

    def subscribe(self, filter: str, handler: Handler, *, qos: int = 0) -> None:
        granted = self.inbox.add(filter, handler, qos)
        if self._connected:
            self._bus._do(partial(self._subscribe_now, filter, granted))

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, done: Callable[[], None] | None = None
    ) -> bool:
        check_topic(topic)
        with self._lock:
            if not self._connected:
                return False
            self.bytes_up += packet_bytes(topic, payload, qos)
            self.messages_up += 1
            self._bus._do(partial(self._publish_now, topic, payload, qos, retain, done))
            return True

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._connected = False
        self._bus._do(partial(self._bus._leave, self))

    # From here on: on the bus's thread.

    def _publish_now(self, topic: str, payload: bytes, qos: int, retain: bool, done: Callable[[], None] | None) -> None:
        session = self._bus._sessions.get(self.client_id)
        if session is None or session.transport is not self:
            return  # the connection broke before this was on its way
        self._bus._publish(topic, payload, qos, retain)
        if done:
            self._call(done)

    def _subscribe_now(self, filter: str, qos: int) -> None:
        if self._connected:
            self._bus._subscribe(self.client_id, filter, qos)

    def _call(self, function: Callable[[], None]) -> None:
        self.inbox.call(function)
        self.handler_errors = self.inbox.errors

    def ask_will(self) -> Will | None:
        asked: list[Will | None] = []
        self._call(lambda: asked.append(self.will() if self.will else None))
        return asked[0] if asked else None

    def up(self) -> None:
        with self._lock:
            if self.closed:
                return
            self._connected = True
        self._call(self.on_up)

    def down(self) -> None:
        with self._lock:
            was, self._connected = self._connected, False
        if was:
            self._call(self.on_down)

    def take(self, delivery: Delivery, qos: int) -> None:
        self.bytes_down += packet_bytes(delivery.topic, delivery.payload, qos)
        self.messages_down += 1
        self.inbox.hand(delivery)
        self.handler_errors = self.inbox.errors
