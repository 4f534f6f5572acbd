"""Device and cloud in this process, over a real socket: two real models with one tokenizer, or with two."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent.agent import Account, Agent, Options, Piece, Request
from agent.breaker import Breaker
from agent.cloud import CloudOptions, CloudResolver
from agent.policy import ThresholdPolicy
from models.engine.gguf import GgufEngine
from server.cloud.config import Limits, Listen, ServeConfig


@pytest.fixture(scope="session")
def weak(smollm2_q2: Path) -> Iterator[GgufEngine]:
    """The device's SLM: SmolLM2 with few bits, so that it errs where the cloud's SmolLM2 does not."""
    engine = GgufEngine(smollm2_q2, context=2048, sequences=4, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def strong(smollm2: Path) -> Iterator[GgufEngine]:
    """The cloud's model by itself, to compare with."""
    engine = GgufEngine(smollm2, context=2048, sequences=1, threads=1, hidden=False)
    yield engine
    engine.close()


def cloud_config() -> ServeConfig:
    """On a free loopback port, without keys, and without a limit on Asks that a test could meet."""
    return ServeConfig(
        listen=Listen(port=0, keys_file="/nonexistent/keys.json"), limits=Limits(asks_per_second=100_000.0)
    )


@asynccontextmanager
async def linked(
    engine: GgufEngine, url: str, threshold: float, *, wait: bool = True, key: str = "", **settings: Any
) -> AsyncIterator[tuple[Agent, CloudResolver]]:
    """An agent whose cloud is at `url`. `settings`: of CloudOptions and of Options."""
    of_cloud = {name: settings.pop(name) for name in ("deadline", "top", "burst") if name in settings}
    cloud_options = CloudOptions(url=url, key=key, **{"deadline": 20.0, **of_cloud})
    breaker = Breaker(time.monotonic, lambda: 0.0, limit=3, pause=0.2, longest=0.5)
    resolver = CloudResolver(cloud_options, engine.tokenizer, breaker, time.monotonic, lambda: 0.0)
    link = asyncio.create_task(resolver.run())
    if wait:
        assert await resolver.connected(20.0), resolver.state
    agent = Agent(engine, Options(ThresholdPolicy(threshold), **settings), resolver)
    try:
        yield agent, resolver
    finally:
        agent.scheduler.close()
        link.cancel()
        with suppress(asyncio.CancelledError):
            await link


async def answer(agent: Agent, request: Request) -> tuple[list[Piece], Account]:
    pieces: list[Piece] = []
    async for event in agent.stream(request):
        if isinstance(event, Account):
            return pieces, event
        pieces.append(event)
    raise AssertionError("an answer ends with its account")
