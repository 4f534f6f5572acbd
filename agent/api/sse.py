"""Server-sent events, as OpenAI streams them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from agent.api.errors import describe, log_unexpected
from agent.api.render import Json

_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(web.StreamResponse):
    """`outcome`: how it ended, a label of `skerry_requests_total`."""

    def __init__(self) -> None:
        super().__init__(headers=_HEADERS)
        self.outcome = "ok"

    async def send(self, data: bytes) -> None:
        await self.write(b"data: " + data + b"\n\n")


async def stream(http: web.Request, chunks: AsyncGenerator[Json, None]) -> EventStream:
    """Sends the chunks. An error before the first one is raised and so gets a status of its own; a later one becomes
    the last event."""
    async with aclosing(chunks) as source:
        chunk: Json | None = await anext(source)
        response = EventStream()
        await response.prepare(http)
        try:
            while chunk is not None:
                await response.send(msgspec.json.encode(chunk))
                chunk = await anext(source, None)
            await response.send(b"[DONE]")
        except ConnectionError:  # the client has gone
            raise
        except Exception as error:
            failure = describe(error)
            log_unexpected(error, failure)
            response.outcome = failure.outcome
            await response.send(msgspec.json.encode(failure.body))
    await response.write_eof()
    return response
