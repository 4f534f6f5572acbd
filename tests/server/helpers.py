"""A device for tests: speaks the protocol over a real WebSocket and says what it got."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from protocol.resolve import (
    Answer,
    Ask,
    FromCloud,
    FromDevice,
    Hello,
    Message,
    Mode,
    Open,
    Refused,
    Sampling,
    decode_from_cloud,
    encode,
)
from server.cloud.app import RunningServer, start
from server.cloud.config import Drain, Limits, Listen, ServeConfig
from server.cloud.upstream import Upstream

SKY = [Message("user", "Why is the sky blue?")]
F = TypeVar("F", bound=FromCloud)


def opening(
    tokenizer: str,
    prompt: list[Message] | str = "The capital of France is",
    *,
    session: int = 1,
    mode: Mode = "take",
    sampling: Sampling | None = None,
    top: int = 4,
    burst: int = 0,
) -> Open:
    return Open(session, prompt, tokenizer, sampling or Sampling(), mode, top, burst)


class Device:
    """One connection. `hello` is the server's first frame."""

    hello: Hello

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def send(self, *messages: FromDevice) -> None:
        for message in messages:
            await self.socket.send_bytes(encode(message))

    async def message(self) -> FromCloud | None:
        return decode_from_cloud(await self.socket.receive_bytes(timeout=30))

    async def next(self, kind: type[F]) -> F:
        message = await self.message()
        assert isinstance(message, kind), message
        return message

    async def refused(self, code: str) -> Refused:
        refusal = await self.next(Refused)
        assert refusal.code == code, refusal
        return refusal

    async def closed(self) -> int:
        """Reads until the server closes; the code."""
        while True:
            message = await self.socket.receive(timeout=30)
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED):
                assert self.socket.close_code is not None
                return self.socket.close_code

    async def write(self, opened: Open, length: int, *, units: list[int] | bytes) -> list[Answer]:
        """Has the server write `length` steps, one Ask each; `units` is the answer's beginning."""
        await self.send(opened)
        answers: list[Answer] = []
        keep = 0
        for step in range(length):
            new = {"text": units} if isinstance(units, bytes) else {"tokens": units}
            await self.send(Ask(opened.session, step, keep, **new))
            answers.append(await self.next(Answer))
            keep += len(units)
            units = answers[-1].text if isinstance(units, bytes) else answers[-1].tokens[:1]
            if not units or units == [2]:
                break
        return answers


class Service:
    """A running server and how to reach it."""

    def __init__(self, running: RunningServer, http: aiohttp.ClientSession) -> None:
        self.running = running
        self.http = http
        self.url = f"http://127.0.0.1:{running.port}"

    @asynccontextmanager
    async def device(self, key: str | None = None, **headers: str) -> AsyncIterator[Device]:
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        async with self.http.ws_connect(f"{self.url}/v1/resolve", headers=headers) as socket:
            device = Device(socket)
            device.hello = await device.next(Hello)
            yield device

    def metric(self, name: str, **labels: str) -> float:
        found = self.running.server.metrics.registry.get_sample_value(name, labels)
        return found or 0.0


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def serving(
    upstream: Upstream,
    folder: Path,
    *,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    clock: Clock | None = None,
    drain_s: float = 5.0,
) -> AsyncIterator[Service]:
    """A server on a free port, with its keys in `folder`."""
    config = ServeConfig(
        listen=Listen(host=host, port=0, keys_file=str(folder / "keys.json")),
        limits=limits or Limits(),
        drain=Drain(seconds=drain_s),
    )
    running = await start(config, upstream, **({"clock": clock} if clock else {}))
    try:
        async with aiohttp.ClientSession() as http:
            yield Service(running, http)
    finally:
        await running.close()


async def settled(predicate: Any) -> None:
    """Waits until it is true of a server that has been told everything it needs."""
    async with asyncio.timeout(30):
        while not predicate():
            await asyncio.sleep(0)
