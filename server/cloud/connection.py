"""One device's WebSocket: frames in, sessions, frames out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from aiohttp import WSCloseCode, WSMsgType, web

from protocol.errors import ProtocolError, RequestError, SkerryError
from protocol.resolve import Ask, Close, FromCloud, Hello, Open, Refused, decode_from_device, encode
from server.cloud.keys import Key
from server.cloud.limits import Allowance, RateLimited
from server.cloud.metrics import Metrics
from server.cloud.sessions import Session, refused
from server.cloud.upstream import Upstream

log = logging.getLogger(__name__)

_REOPEN_S = 0.1  # after an idle session was closed


class Host(Protocol):
    """What a connection needs of the server around it."""

    upstream: Upstream
    metrics: Metrics
    clock: Callable[[], float]

    def admit(self, session: int, key: Key | None) -> Refused | None:
        """Counts a new session of `key`; why there can't be one, else None."""

    def leave(self, key: Key | None) -> None:
        """Counts it out again."""


class Connection:
    """`key`: whose it is, None where none is needed."""

    def __init__(self, host: Host, socket: web.WebSocketResponse, key: Key | None, allowance: Allowance) -> None:
        self.key = key
        self._host = host
        self._socket = socket
        self._allowance = allowance
        self._sessions: dict[int, Session] = {}

    async def run(self) -> None:
        """Serves it until it closes."""
        upstream = self._host.upstream
        await self.send(Hello(upstream.name, upstream.tokenizer, upstream.exact, upstream.top))
        try:
            async for message in self._socket:
                if message.type is WSMsgType.BINARY:
                    self._host.metrics.received.inc(len(message.data))
                    await self._receive(message.data)
                elif message.type is WSMsgType.TEXT:
                    await self._reject("text", WSCloseCode.UNSUPPORTED_DATA)
                elif message.type is WSMsgType.ERROR:
                    large = getattr(message.data, "code", None) == WSCloseCode.MESSAGE_TOO_BIG
                    self._host.metrics.bad_frames.labels("oversized" if large else "malformed").inc()
        finally:
            for number in list(self._sessions):
                self._end(number)

    def expire(self, idle_s: float) -> list[Refused]:
        """Closes sessions that have been silent for longer; what to tell the device."""
        now = self._host.clock()
        expired = [number for number, session in self._sessions.items() if now - session.active > idle_s]
        for number in expired:
            self._end(number)
        message = f"closed after {idle_s:g} s without an Ask: open it again"
        return [Refused(number, -1, "unknown_session", message, _REOPEN_S) for number in expired]

    async def close(self, code: int, reason: str) -> None:
        await self._socket.close(code=code, message=reason.encode())

    async def send(self, message: FromCloud) -> None:
        frame = encode(message)
        with suppress(ConnectionError):  # the reader meets it too and ends the connection
            await self._socket.send_bytes(frame)
            self._host.metrics.sent.inc(len(frame))
            if isinstance(message, Refused):
                self._host.metrics.refusals.labels(message.code).inc()

    async def _receive(self, frame: bytes) -> None:
        try:
            message = decode_from_device(frame)
        except ProtocolError:
            await self._reject("malformed", WSCloseCode.INVALID_TEXT)
            return
        if isinstance(message, Open):
            await self._open(message)
        elif isinstance(message, Ask):
            await self._ask(message)
        elif isinstance(message, Close):
            self._end(message.session)

    def _end(self, number: int) -> None:
        """Closes the session, if there is one, and counts it out at once: the next Open may be here already."""
        session = self._sessions.pop(number, None)
        if session is not None:
            session.close()
            self._host.leave(self.key)

    async def _reject(self, reason: str, code: int) -> None:
        self._host.metrics.bad_frames.labels(reason).inc()
        log.info("a connection is closed: %s frame", reason)
        await self.close(code, f"{reason} frame")

    async def _open(self, request: Open) -> None:
        number = request.session
        self._end(number)  # opened again: the device wants to begin anew
        try:
            self._allowance.take()
            _check(request)
        except RateLimited as error:
            await self.send(Refused(number, -1, "rate_limited", str(error), error.retry_after))
            return
        except RequestError as error:
            await self.send(refused(error, number, -1))
            return
        if refusal := self._host.admit(number, self.key):
            await self.send(refusal)
            return

        def ended() -> None:
            if self._sessions.get(number) is session:
                self._end(number)

        host = self._host
        session = Session(request, host.upstream, host.metrics, self.send, ended, host.clock)
        self._sessions[number] = session

    async def _ask(self, ask: Ask) -> None:
        session = self._sessions.get(ask.session)
        if session is None:
            message = "no such session here: open it again"
            await self.send(Refused(ask.session, ask.step, "unknown_session", message))
            return
        limited = None
        try:
            self._allowance.take()
        except RateLimited as error:
            limited = error
        try:
            session.push(ask, limited)
        except RateLimited as error:
            await self.send(Refused(ask.session, ask.step, "rate_limited", str(error), error.retry_after))
        except SkerryError as error:
            await self.send(refused(error, ask.session, ask.step))


def _check(request: Open) -> None:
    sampling = request.sampling
    numbers = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    if not all(math.isfinite(number) and number >= 0.0 for number in numbers) or sampling.repetition_penalty == 0.0:
        raise RequestError("sampling parameters must be finite and not negative", "sampling")
    if request.top < 0 or request.burst < 0:
        raise RequestError("top and burst must not be negative", "top")
    if not request.prompt:
        raise RequestError("the prompt is empty", "prompt")
