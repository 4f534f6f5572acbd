"""One answer's trouble stays its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from agent.agent import Account, Request
from models.engine.gguf import GgufEngine
from protocol.resolve import Message
from server.cloud.app import start
from server.cloud.embedded import EmbeddedUpstream
from tests.hybrid.conftest import answer, cloud_config, linked


def test_an_answer_too_long_for_the_cloud_leaves_the_next_one_its_help(weak: GgufEngine, smollm2: Path) -> None:
    """The first answer outgrows its session and goes on alone; the breaker stays closed for the second."""

    async def run() -> tuple[Account, str, Account]:
        engine = GgufEngine(smollm2, context=1024, sequences=4, threads=1, hidden=False)
        upstream = EmbeddedUpstream(engine, answer_tokens=8)
        server = await start(cloud_config(), upstream)
        try:
            async with linked(weak, f"http://127.0.0.1:{server.port}", 0.0) as (agent, link):
                _, long = await answer(agent, Request([Message("user", "Tell me a story.")], max_tokens=30))
                state = link.breaker.state
                _, short = await answer(agent, Request([Message("user", "Say hi.")], max_tokens=4))
                return long, state, short
        finally:
            await server.close()
            await upstream.close()

    long, state, short = asyncio.run(run())
    assert long.tokens == 30
    assert long.counts["fallback"] > 10
    assert state == "closed"
    assert short.counts["cloud"] == short.tokens


def test_opens_count_against_the_rate(weak: GgufEngine, smollm2: Path) -> None:
    """A client that opens session after session is told to wait, and its answers are complete."""

    async def run() -> list[Account]:
        engine = GgufEngine(smollm2, context=1024, sequences=4, threads=1, hidden=False)
        upstream = EmbeddedUpstream(engine)
        config = cloud_config()
        limits = msgspec.structs.replace(config.limits, asks_per_second=1.0)
        server = await start(msgspec.structs.replace(config, limits=limits), upstream, clock=lambda: 0.0)
        try:
            async with linked(weak, f"http://127.0.0.1:{server.port}", 0.0) as (agent, _):
                request = Request([Message("user", "Say hi.")], max_tokens=3)
                return [(await answer(agent, request))[1] for _ in range(3)]
        finally:
            await server.close()
            await upstream.close()

    accounts = asyncio.run(run())
    assert all(account.tokens == 3 for account in accounts)
    assert sum(account.counts["cloud"] for account in accounts) == 0
