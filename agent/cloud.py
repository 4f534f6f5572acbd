"""The cloud resolver: escalations over one persistent WebSocket.

Two threads meet here. The engine's thread calls `open`, `ask`, `late` and `close`, which never block; the event
loop's thread owns the socket, fills tickets and wakes the token loop. What both touch is a few single assignments and
dictionary operations, each atomic in CPython.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import aiohttp

from agent.breaker import Breaker
from agent.conversation import CloudConversation
from agent.resolver import Resolver, Ticket
from models.engine.base import Tokenizer
from protocol import resolve as wire
from protocol.errors import ProtocolError
from protocol.resolve import Message, Mode, Sampling

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_HEARTBEAT_SECONDS = 10.0
_CLOUD_FAILS = {"upstream", "overloaded", "draining"}  # the refusals that speak of the cloud, not of the question
_FIRST_RETRY, _LONGEST_RETRY, _REFUSED_RETRY = 0.2, 5.0, 30.0


@dataclass(frozen=True, slots=True)
class CloudOptions:
    """`deadline`: seconds a step may wait. `top`: log-probabilities of the LLM to ask for. `burst`: tokens that may
    follow one answer."""

    url: str
    key: str = ""
    deadline: float = 0.5
    top: int = 16
    burst: int = 0


@dataclass(slots=True, eq=False)
class Link:
    """One connection's life: what the other side said of itself, and the questions that are under way on it."""

    hello: wire.Hello
    outbox: asyncio.Queue[bytes]
    loop: asyncio.AbstractEventLoop
    open_questions: dict[tuple[int, int], tuple[CloudConversation, Ticket]] = field(default_factory=dict)
    bursts: dict[int, tuple[CloudConversation, int, Ticket]] = field(default_factory=dict)
    sessions: dict[int, CloudConversation] = field(default_factory=dict)

    def send(self, frame: bytes) -> None:
        """From any thread; returns at once."""
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, frame)
        except RuntimeError:  # the event loop was closed under us: the program is ending
            log.debug("frame dropped: the event loop is closed")


class CloudResolver(Resolver):
    """Start `run` as a task on an event loop; `close` ends it."""

    def __init__(
        self,
        options: CloudOptions,
        tokenizer: Tokenizer,
        breaker: Breaker,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.fingerprint = tokenizer.fingerprint  # takes a moment, which the first answer should not wait for
        self.breaker = breaker
        self.clock = clock
        self.link: Link | None = None
        self.state = "connecting"
        self.late_replies = 0
        self.protocol_errors = 0
        self._jitter = jitter
        self._retry = _FIRST_RETRY  # seconds until the next attempt to connect
        self._sessions = count(1)
        self._connected = asyncio.Event()

    def open(
        self, prompt: Sequence[Message] | str, sampling: Sampling, mode: Mode, wake: Callable[[], None]
    ) -> CloudConversation:
        return CloudConversation(self, next(self._sessions), prompt, sampling, mode, wake)

    async def connected(self, timeout: float) -> bool:
        """Waits until the link stands, at most `timeout` seconds."""
        try:
            await asyncio.wait_for(self._connected.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Keeps a connection up until cancelled: capped, jittered backoff between attempts."""
        timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_connect=_CONNECT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                try:
                    await self._connection(http)
                except aiohttp.WSServerHandshakeError as error:
                    self._fail(f"refused: HTTP {error.status}")
                    if error.status in (401, 403):
                        self.state = "unauthorised: the cloud refuses the key (cloud.key)"
                        self._retry = _REFUSED_RETRY
                except ProtocolError as error:
                    self.protocol_errors += 1
                    self._fail(f"speaks nonsense: {error}")
                except Exception as error:  # whatever it was, the device goes on trying
                    self._fail(f"unreachable: {error or type(error).__name__}")
                pause, self._retry = self._retry, min(_LONGEST_RETRY, self._retry * 2)
                await asyncio.sleep(pause * (0.5 + self._jitter()))

    async def _connection(self, http: aiohttp.ClientSession) -> None:
        headers = {"Authorization": f"Bearer {self.options.key}"} if self.options.key else {}
        url = self.options.url.rstrip("/") + "/v1/resolve"
        async with asyncio.timeout(_CONNECT_SECONDS) as handshake:
            async with http.ws_connect(
                url, headers=headers, heartbeat=_HEARTBEAT_SECONDS, max_msg_size=wire.MAX_FRAME, compress=0
            ) as socket:
                hello = _hello(await socket.receive())
                handshake.reschedule(None)
                link = Link(hello, asyncio.Queue(), asyncio.get_running_loop())
                writer = asyncio.create_task(self._write(socket, link))
                self.link, self.state, self._retry = link, "connected", _FIRST_RETRY
                self._connected.set()
                try:
                    await self._read(socket, link)
                finally:
                    self.link = None
                    self._connected.clear()
                    writer.cancel()
                    self._abandon(link)

    async def _write(self, socket: aiohttp.ClientWebSocketResponse, link: Link) -> None:
        while True:
            try:
                await socket.send_bytes(await link.outbox.get())
            except (ConnectionError, aiohttp.ClientError):
                return  # the reader sees the same end and says so

    async def _read(self, socket: aiohttp.ClientWebSocketResponse, link: Link) -> None:
        async for frame in socket:
            if frame.type is not aiohttp.WSMsgType.BINARY:
                raise ProtocolError(f"a frame of type {frame.type.name} where only binary ones are spoken")
            message = wire.decode_from_cloud(frame.data)
            if message is not None:
                self._dispatch(link, message, len(frame.data))
        if isinstance(error := socket.exception(), aiohttp.WebSocketError):
            raise ProtocolError(str(error))
        raise ConnectionError("closed by the other side")

    def _dispatch(self, link: Link, message: wire.FromCloud, size: int) -> None:
        session = getattr(message, "session", None)
        if session is not None and (known := link.sessions.get(session)):
            known.traffic.bytes_down += wire.wire_size(size, masked=False)
        match message:
            case wire.Answer():
                found = link.open_questions.pop((message.session, message.step), None)
                if found is None:
                    if unwanted := link.sessions.get(message.session):
                        self.late_replies += unwanted.note_unwanted(message)
                    return
                conversation, ticket = found
                if message.session in link.sessions:
                    link.bursts[message.session] = (conversation, message.step, ticket)
                try:
                    conversation.fill(ticket, message, link.hello)
                except ProtocolError:  # ends the link; whoever waits need not do so until the deadline
                    ticket.failed = True
                    conversation.wake()
                    raise
                self.breaker.success()
            case wire.More():
                burst = link.bursts.get(message.session)
                if burst and burst[1] == message.step:
                    burst[0].extend(burst[2], message)
            case wire.Refused():
                self._refused(link, message)
            case wire.Hello():
                pass

    def _refused(self, link: Link, message: wire.Refused) -> None:
        found = link.open_questions.pop((message.session, message.step), None)
        conversation = found[0] if found else link.sessions.get(message.session)
        log.info("the cloud refused: %s: %s", message.code, message.message)
        if conversation:
            conversation.refused(message)
        tickets = [found[1]] if found else []
        if message.step < 0:
            open_here = [key for key in list(link.open_questions) if key[0] == message.session]
            tickets += [link.open_questions.pop(key)[1] for key in open_here]
        for ticket in tickets:
            ticket.failed = True
        if conversation and tickets:
            # What this answer did wrong says nothing of the cloud: the other answers may go on asking.
            if message.code in _CLOUD_FAILS:
                self.breaker.failure()
            else:
                self.breaker.abandoned()
            conversation.wake()

    def _abandon(self, link: Link) -> None:
        """The connection is gone: whoever waits on it is told at once."""
        questions = list(link.open_questions.values())
        link.open_questions.clear()
        for conversation, ticket in questions:
            ticket.failed = True
            conversation.wake()

    def _fail(self, state: str) -> None:
        if self.state == "connected":
            log.warning("cloud link lost: %s", state)
            self.breaker.failure()
        self.state = state


def _hello(frame: aiohttp.WSMessage) -> wire.Hello:
    hello = wire.decode_from_cloud(frame.data) if frame.type is aiohttp.WSMsgType.BINARY else None
    if not isinstance(hello, wire.Hello):
        raise ProtocolError("the other side is no Skerry cloud: its first frame is not a Hello")
    return hello
