"""What clients and logs are told when the agent itself fails."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp.test_utils import TestClient, TestServer

from agent.agent import Agent, Event, Piece
from agent.api.answer import portions
from agent.api.app import Api, ModelName
from agent.config import Api as ApiConfig
from agent.device import Device
from agent.loop import Token
from agent.resolver import Provenance
from protocol.errors import Overloaded

SECRET = "xylophone"
PIECE = Piece(Token(7, 0.5, 0.5, Provenance.LOCAL), b"so", "so")


def agent_that(submit: Callable[[Any, Callable[[Event], None]], Any]) -> Any:
    """The real streaming of an agent, over `submit`."""
    agent = Mock(submit=submit)
    agent.stream = partial(Agent.stream, agent)
    agent._submit_on_thread = partial(Agent._submit_on_thread, agent)
    agent.engine.info.fingerprint = "0" * 64
    agent.engine.threads = agent.scheduler.active = agent.scheduler.queued = 0
    return agent


def ask(agent: Any, *, stream: bool) -> tuple[int, str]:
    """Status and text of the API's reply."""

    async def call() -> tuple[int, str]:
        api = Api(Device(agent), ApiConfig(), ModelName("model", frozenset()))
        async with TestClient(TestServer(api.app)) as client:
            answer = await client.post("/v1/completions", json={"prompt": SECRET, "stream": stream})
            return answer.status, await answer.text()

    return asyncio.run(call())


@pytest.mark.parametrize("stream", [False, True])
def test_an_inner_failure_is_told_without_details(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    def submit(request: Any, on_event: Callable[[Event], None]) -> Any:
        raise KeyError(f"no such thing as {SECRET}")

    caplog.set_level(logging.DEBUG)
    status, text = ask(agent_that(submit), stream=stream)
    assert status == 500
    assert json.loads(text)["error"]["code"] == "internal_error"
    assert SECRET not in text
    assert "a request failed: KeyError at " in caplog.text
    assert SECRET not in caplog.text


def test_a_stream_that_fails_on_its_way_ends_with_an_error_object() -> None:
    def submit(request: Any, on_event: Callable[[Event], None]) -> Any:
        on_event(PIECE)
        on_event(Overloaded("the agent is shutting down"))
        return Mock()

    status, text = ask(agent_that(submit), stream=True)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert status == 200
    assert json.loads(events[0])["choices"][0]["text"] == "so"
    assert json.loads(events[-1])["error"]["code"] == "overloaded"
    assert "[DONE]" not in events


def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_place() -> None:
    begun, go_on, cancelled = threading.Event(), threading.Event(), threading.Event()
    writing = Mock(cancel=cancelled.set)

    def submit(request: Any, on_event: Callable[[Event], None]) -> Any:
        begun.set()
        assert go_on.wait(60)
        return writing

    async def leave() -> None:
        events = portions(agent_that(submit), Mock(), lambda event: None)
        first: Awaitable[Any] = asyncio.ensure_future(anext(events))
        await asyncio.to_thread(begun.wait)
        first.cancel()  # type: ignore[attr-defined]
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not cancelled.is_set()
        go_on.set()
        assert await asyncio.to_thread(cancelled.wait, 60)

    asyncio.run(leave())
