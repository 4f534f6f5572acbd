"""HTTP to an OpenAI-compatible server: one completion at a time, whole or as a stream of positions."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import aiohttp
import msgspec

from protocol.errors import ContextFull, Overloaded, UpstreamError
from server.cloud.config import UpstreamSection
from server.cloud.logprobs import END, Position, positions

_TOO_LONG = {"exceed_context_size_error", "context_length_exceeded"}
_PROBE_S = 2.0  # how long the server may take to say that it is there


class Reply:
    """The positions of a completion, as they come in."""

    def __init__(self, response: aiohttp.ClientResponse, first: list[Position], *, streaming: bool) -> None:
        self._response = response
        self._waiting = deque(first)
        self._streaming = streaming

    async def next(self) -> Position | None:
        """None after the last one. Raises UpstreamError."""
        while not self._waiting and self._streaming:
            with _Failures():
                line = await self._response.content.readline()
            if not line or line.strip() == b"data: [DONE]":
                self._streaming = False
                self._response.release()
            elif line.startswith(b"data:"):
                self._waiting.extend(_read(line.removeprefix(b"data:")))
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Ends it, at the server too."""
        self._streaming = False
        self._response.close()


class OpenAiClient:
    """Make it inside a running event loop."""

    def __init__(self, config: UpstreamSection) -> None:
        self._config = config
        self._path = "/chat/completions" if config.endpoint == "chat" else "/completions"
        headers = {"Authorization": f"Bearer {config.key}"} if config.key else {}
        timeout = aiohttp.ClientTimeout(total=config.timeout_s)
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        )  # sessions are limited elsewhere

    async def complete(self, body: dict[str, Any], top: int, max_tokens: int) -> Reply:
        """Raises ContextFull, Overloaded, UpstreamError."""
        streaming = max_tokens > 1
        asked = {"logprobs": True, "top_logprobs": top} if self._config.endpoint == "chat" else {"logprobs": top}
        body = {
            **body,
            **asked,
            "model": self._config.model_name,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": streaming,
        }
        with _Failures():
            response = await self._post(body)
            try:
                await _check(response)
                if streaming:
                    return Reply(response, [], streaming=True)
                return Reply(response, _read(await response.read()), streaming=False)
            except BaseException:
                response.close()
                raise

    async def _post(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """Tries once more if there was no connection, or a kept one that the server had closed in the meantime."""
        url = self._config.url.rstrip("/") + self._path
        try:
            return await self._session.post(url, json=body)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            return await self._session.post(url, json=body)

    async def reachable(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=_PROBE_S)
        try:
            async with self._session.get(self._config.url.rstrip("/") + "/models", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def close(self) -> None:
        await self._session.close()


class _Failures:
    """Turns what aiohttp raises into UpstreamError, without the address and whatever else its texts hold."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if isinstance(error, TimeoutError | asyncio.TimeoutError):
            raise UpstreamError("the LLM's server did not answer in time") from None
        if isinstance(error, aiohttp.ClientError | ValueError | OSError):
            raise UpstreamError(f"the LLM's server cannot be used: {type(error).__name__}") from None


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    if response.status in (429, 503):
        raise Overloaded("the LLM's server is busy: try again later", _seconds(response.headers.get("Retry-After")))
    try:
        error = msgspec.json.decode(await response.read())["error"]
        kinds = {error.get("type"), error.get("code")}
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        kinds = set()
    if kinds & _TOO_LONG:
        raise ContextFull("prompt and answer do not fit the context of the LLM's server")
    raise UpstreamError(f"the LLM's server answered with HTTP status {response.status}")


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1.0), 0.0), 3600.0)
    except ValueError:  # a date
        return 1.0


def _read(raw: bytes) -> list[Position]:
    """The positions in one JSON body: a whole completion or a chunk of a stream."""
    try:
        choices = msgspec.json.decode(raw)["choices"]
        if not choices:
            return []
        choice = choices[0]
        text = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")
        found = positions(choice)
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        raise UpstreamError("the LLM's server answered something that is no completion") from None
    if not found and not text and choice.get("finish_reason") == "stop":
        return [END]
    return found
