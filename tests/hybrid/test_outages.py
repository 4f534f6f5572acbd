"""The cloud fails in every way it can: the answer is complete each time, and says who wrote what."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.agent import Account, Agent, Options, Piece, Request
from agent.policy import ThresholdPolicy
from agent.resolver import Provenance
from models.engine.gguf import GgufEngine
from protocol.resolve import Message
from tests.hybrid.conftest import answer, linked
from tools.processes import Child, start_cloud

QUESTION = [Message("user", "Tell me a fact about whales.")]
REQUEST = Request(QUESTION, max_tokens=24)
SECRET = "the password of the lighthouse is barnacle-4711"


@pytest.fixture(scope="module")
def slm_alone(weak: GgufEngine) -> list[int]:
    async def run() -> list[int]:
        agent = Agent(weak, Options(ThresholdPolicy(1.0)))
        pieces, _ = await answer(agent, REQUEST)
        agent.scheduler.close()
        return [piece.token.id for piece in pieces]

    return asyncio.run(run())


@pytest.fixture
def cloud(smollm2: Path) -> Iterator[tuple[Child, int]]:
    child, port = start_cloud(str(smollm2), 1)
    with child:
        yield child, port


def test_no_cloud_at_all(weak: GgufEngine, slm_alone: list[int]) -> None:
    """Nobody listens: every token that wanted help is the SLM's own, and nothing waits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

        async def run() -> tuple[list[Piece], Account]:
            async with linked(weak, url, 0.0, wait=False) as (agent, _):
                return await answer(agent, REQUEST)

        pieces, account = asyncio.run(run())
    assert [piece.token.id for piece in pieces] == slm_alone
    assert {piece.token.provenance for piece in pieces} == {Provenance.FALLBACK}
    assert account.waited == 0.0
    assert account.bytes_up == 0


@asynccontextmanager
async def black_hole() -> AsyncIterator[int]:
    """Accepts connections, reads for ever and never says a word."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pass
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_black_hole(weak: GgufEngine, slm_alone: list[int]) -> None:
    async def run() -> tuple[list[Piece], Account]:
        async with black_hole() as port, linked(weak, f"http://127.0.0.1:{port}", 0.0, wait=False) as (agent, _):
            return await answer(agent, REQUEST)

    pieces, account = asyncio.run(run())
    assert [piece.token.id for piece in pieces] == slm_alone
    assert account.counts["fallback"] == len(pieces)


def test_killed_in_the_middle_and_back_again(weak: GgufEngine, cloud: tuple[Child, int], smollm2: Path) -> None:
    """kill -9 while an answer is under way; the same agent finds the restarted cloud by itself."""
    child, port = cloud

    async def run() -> tuple[list[Piece], Account]:
        async with linked(weak, f"http://127.0.0.1:{port}", 0.0, deadline=5.0, ahead=0) as (agent, link):
            pieces: list[Piece] = []
            async for event in agent.stream(REQUEST):
                if isinstance(event, Account):
                    break
                pieces.append(event)
                if len(pieces) == 6:
                    child.kill()
            assert len(pieces) == REQUEST.max_tokens or pieces[-1].token.id in weak.tokenizer.eog
            assert [piece.token.provenance for piece in pieces[:6]] == [Provenance.CLOUD] * 6
            assert pieces[-1].token.provenance is Provenance.FALLBACK
            again, _ = await asyncio.to_thread(start_cloud, str(smollm2), 1, "--port", str(port))
            with again:
                assert await link.connected(30.0), link.state
                return await answer(agent, REQUEST)

    _, account = asyncio.run(run())
    assert account.counts["cloud"] == account.tokens


def test_a_cloud_that_hangs_opens_the_breaker_and_closes_it_again(weak: GgufEngine, cloud: tuple[Child, int]) -> None:
    """SIGSTOP: the connection stands and nothing answers. Waiting is bounded by the breaker; SIGCONT heals it."""
    child, port = cloud

    async def run() -> tuple[Account, int, Account]:
        async with linked(weak, f"http://127.0.0.1:{port}", 0.0, deadline=0.2, ahead=0) as (agent, link):
            child.process.send_signal(19)
            stuck = (await answer(agent, REQUEST))[1]
            opened = link.breaker.opened
            child.process.send_signal(18)
            for _ in range(100):
                healed = (await answer(agent, REQUEST))[1]
                if healed.counts["cloud"]:
                    break
            return stuck, opened, healed

    stuck, opened, healed = asyncio.run(run())
    assert stuck.tokens == stuck.counts["fallback"]
    assert opened >= 1
    assert stuck.asked <= 3 + 2 * opened, "only the trials of the open breaker may ask"
    assert healed.counts["cloud"] > 0


def test_a_wrong_key_is_said_and_changes_nothing_else(
    weak: GgufEngine, smollm2: Path, tmp_path: Path, slm_alone: list[int]
) -> None:
    keys = tmp_path / "keys.json"
    environment = {"SKERRY_LISTEN_KEYS_FILE": str(keys)}
    with Child(["serve", "keys", "add", "device"], env=environment) as adding:
        key = adding.wait_for(r"(sk-skerry-\S+)")[1]
    child, port = start_cloud(str(smollm2), 1, env=environment)
    url = f"http://127.0.0.1:{port}"

    async def run(secret: str) -> tuple[list[Piece], str]:
        async with linked(weak, url, 0.0, wait=secret == key, key=secret) as (agent, link):
            if secret != key:
                while link.state == "connecting":
                    await asyncio.sleep(0)
            pieces, _ = await answer(agent, REQUEST)
            return pieces, link.state

    with child:
        wrong, state = asyncio.run(run("sk-skerry-wrong"))
        right, _ = asyncio.run(run(key))
    assert "unauthorised" in state
    assert [piece.token.id for piece in wrong] == slm_alone
    assert {piece.token.provenance for piece in right} == {Provenance.CLOUD}


@asynccontextmanager
async def recorder(target: int, heard: bytearray) -> AsyncIterator[int]:
    """A proxy that keeps every byte that leaves the device."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: bytearray | None) -> None:
        while data := await reader.read(1 << 16):
            if note is not None:
                note += data
            writer.write(data)
        writer.close()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pipe(reader, far_writer, heard), pipe(far_reader, writer, None))

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_a_private_request_sends_not_one_byte(weak: GgufEngine, cloud: tuple[Child, int]) -> None:
    """After the connection stands, nothing leaves the device for a private request; for another one it does."""
    prompt = [Message("user", f"Remember: {SECRET}. What did I say?")]

    async def run() -> tuple[int, int, Account]:
        heard = bytearray()
        async with recorder(cloud[1], heard) as port:
            async with linked(weak, f"http://127.0.0.1:{port}", 0.0) as (agent, _):
                before = len(heard)
                _, account = await answer(agent, Request(prompt, max_tokens=12, private=True))
                after = len(heard)
                await answer(agent, Request(prompt, max_tokens=2))
                return after - before, len(heard) - after, account

    private, open_, account = asyncio.run(run())
    assert private == 0
    assert account.counts["local"] == account.tokens
    assert open_ > len(SECRET), "the recorder must hear what is not private"
