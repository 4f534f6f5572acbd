"""What every Upstream must do, for each of them: the engine in this process, and a real foreign server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from models.engine.gguf import GgufTokenizer
from protocol.errors import ContextFull, RequestError
from protocol.resolve import Answer, Ask, Message, Open, Sampling, unpack_floats, unpack_ids
from server.cloud.config import UpstreamSection
from server.cloud.embedded import EmbeddedUpstream
from server.cloud.openai import OpenAiUpstream
from server.cloud.upstream import Upstream
from tests.server.helpers import opening

Opened: TypeAlias = Callable[[], AbstractAsyncContextManager[Upstream]]
# With a system message of its own, so that ChatML and the model's template write the same prompt.
SYSTEM = Message("system", "You are a helpful assistant.")
SKY = [SYSTEM, Message("user", "Why is the sky blue?")]
KINDS = ["embedded", "openai ids", "openai text", "openai chat"]


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tokenizer: GgufTokenizer) -> Opened:
    kind: str = request.param
    if kind == "embedded":
        llm: EmbeddedUpstream = request.getfixturevalue("llm")

        @asynccontextmanager
        async def shared() -> AsyncIterator[Upstream]:
            yield llm

        return shared
    endpoint = "chat" if kind == "openai chat" else "completions"
    section = UpstreamSection(kind="openai", url=request.getfixturevalue("foreign"), endpoint=endpoint)  # type: ignore[arg-type]
    own = tokenizer if kind == "openai ids" else None

    @asynccontextmanager
    async def client() -> AsyncIterator[Upstream]:
        upstream = OpenAiUpstream(section, own, prompt_tokens=512)
        yield upstream
        await upstream.close()

    return client


def ask_of(text: bytes, upstream: Upstream, request: Open, tokenizer: GgufTokenizer) -> tuple[Ask, list[int] | bytes]:
    """An Ask after `text`, in the session's units."""
    if upstream.same_tokenizer(request):
        tokens = tokenizer.encode(text)
        return Ask(1, 1, 0, tokens=tokens), tokens
    return Ask(1, 1, 0, text=text), text


def emitted(answer: Answer, tokenizer: GgufTokenizer) -> bytes:
    return tokenizer.decode(answer.tokens[:1]) if answer.tokens else answer.text


def pieces(answer: Answer, tokenizer: GgufTokenizer) -> list[bytes]:
    return answer.y_pieces or [tokenizer.piece(int(token)) for token in unpack_ids(answer.y_ids)]


def test_it_answers_for_the_answer_that_comes_with_the_ask(opened: Opened, tokenizer: GgufTokenizer) -> None:
    """Growing, shrinking and changing answers, in one conversation: as if each were the only one."""

    async def run() -> None:
        async with opened() as upstream:
            request = opening(tokenizer.fingerprint, SKY)
            texts = [b"", b"The sky", b"The sky appears blue because of", b"The sky", b"Bananas are"]
            conversation = await upstream.open(request)
            seen = [await conversation.ask(*ask_of(text, upstream, request, tokenizer)) for text in texts]
            conversation.close()
            for text, answer in zip(texts, seen, strict=True):
                fresh = await upstream.open(request)
                alone = await fresh.ask(*ask_of(text, upstream, request, tokenizer))
                fresh.close()
                assert emitted(answer, tokenizer) == emitted(alone, tokenizer)
                np.testing.assert_allclose(unpack_floats(answer.y_logp), unpack_floats(alone.y_logp), atol=0.1)

    asyncio.run(run())


def test_y_is_the_likeliest_tokens_at_temperature_1(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            for sampling in (Sampling(), Sampling(temperature=2.0, top_k=3, seed=1)):
                request = opening(tokenizer.fingerprint, SKY, sampling=sampling, top=8)
                conversation = await upstream.open(request)
                answer = await conversation.ask(*ask_of(b"The sky is", upstream, request, tokenizer))
                conversation.close()
                logp = unpack_floats(answer.y_logp)
                assert len(logp) == 8
                assert (np.diff(logp) <= 0).all()
                assert np.exp(logp).sum() < 1.01
                assert pieces(answer, tokenizer)[0] == b" blue"
                assert np.exp(logp[0]) == pytest.approx(0.5, abs=0.3)

    asyncio.run(run())


def test_a_cancelled_ask_leaves_no_trace(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            request = opening(tokenizer.fingerprint, SKY)
            conversation = await upstream.open(request)
            long = asyncio.create_task(
                conversation.ask(*ask_of(b"Bananas grow in bunches. " * 8, upstream, request, tokenizer))
            )
            await asyncio.sleep(0)
            long.cancel()
            answer = await conversation.ask(*ask_of(b"The sky is", upstream, request, tokenizer))
            conversation.close()
            assert emitted(answer, tokenizer) == b" blue"

    asyncio.run(run())


def test_what_is_decided_goes_on(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            request = opening(tokenizer.fingerprint, SKY, burst=4)
            conversation = await upstream.open(request)
            first = await conversation.ask(*ask_of(b"The", upstream, request, tokenizer))
            text = b"The" + emitted(first, tokenizer)
            for _ in range(4):
                more = await conversation.more()
                assert more is not None
                text += more.text
            after = await conversation.ask(*ask_of(text, upstream, request, tokenizer))
            again = await upstream.open(request)
            written = b"The"
            for _ in range(5):
                written += emitted(await again.ask(*ask_of(written, upstream, request, tokenizer)), tokenizer)
            assert text == written
            assert emitted(after, tokenizer)
            conversation.close()
            again.close()

    asyncio.run(run())


def test_an_unread_burst_is_forgotten(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            request = opening(tokenizer.fingerprint, SKY, burst=30)
            conversation = await upstream.open(request)
            await conversation.ask(*ask_of(b"The", upstream, request, tokenizer))
            assert await conversation.more()
            answer = await conversation.ask(*ask_of(b"The sky is", upstream, request, tokenizer))
            conversation.close()
            assert emitted(answer, tokenizer) == b" blue"

    asyncio.run(run())


def test_the_end_of_an_answer_is_told(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            request = opening(
                tokenizer.fingerprint, [SYSTEM, Message("user", "Reply with the single word yes.")], burst=5
            )
            conversation = await upstream.open(request)
            text = b""
            for _ in range(60):
                answer = await conversation.ask(*ask_of(text, upstream, request, tokenizer))
                if not (piece := emitted(answer, tokenizer)):
                    break
                text += piece
            assert piece == b""
            assert b"" in pieces(answer, tokenizer)
            assert await conversation.more() is None
            conversation.close()

    asyncio.run(run())


def test_a_prompt_over_the_limit_is_refused_without_being_quoted(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            request = opening(tokenizer.fingerprint, [Message("user", "pineapple " * 5000)])
            with pytest.raises(ContextFull) as caught:
                await upstream.open(request)
            assert "pineapple" not in str(caught.value)

    asyncio.run(run())


def test_an_answer_that_outgrows_the_context_is_refused(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            request = opening(tokenizer.fingerprint, SKY)
            conversation = await upstream.open(request)
            with pytest.raises(ContextFull) as caught:
                await conversation.ask(*ask_of(b"pineapple and " * 600, upstream, request, tokenizer))
            assert "pineapple" not in str(caught.value)
            answer = await conversation.ask(*ask_of(b"The sky is", upstream, request, tokenizer))
            conversation.close()
            assert emitted(answer, tokenizer) == b" blue"

    asyncio.run(run())


def test_the_wrong_units_are_refused(opened: Opened, tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with opened() as upstream:
            request = opening(tokenizer.fingerprint, SKY)
            conversation = await upstream.open(request)
            wrong: list[int] | bytes = b"The" if upstream.same_tokenizer(request) else [1, 2]
            with pytest.raises(RequestError):
                await conversation.ask(Ask(1, 1, 0), wrong)
            conversation.close()

    asyncio.run(run())


def test_another_tokenizer_follows_a_long_draft(opened: Opened) -> None:
    async def run() -> None:
        async with opened() as upstream:
            conversation = await upstream.open(opening("another", SKY))
            answer = await conversation.ask(Ask(1, 1, 0, draft_text=b" blue because"), b"The sky is")
            conversation.close()
            assert answer.text.startswith(b" blue")
            assert len(answer.text) > len(b" blue")
            assert answer.llm_tokens > 1
            assert answer.y_draft < np.exp(unpack_floats(answer.y_logp)[0])

    asyncio.run(run())


def test_it_is_ready(opened: Opened) -> None:
    async def run() -> None:
        async with opened() as upstream:
            assert await upstream.ready()

    asyncio.run(run())


def test_the_foreign_server_says_what_the_engine_says(llm: EmbeddedUpstream, foreign: str, smollm2: Path) -> None:
    tokenizer = GgufTokenizer.open(smollm2)

    async def run() -> None:
        upstream = OpenAiUpstream(UpstreamSection(kind="openai", url=foreign), tokenizer)
        assert upstream.tokenizer == llm.tokenizer
        replies = []
        for each in (llm, upstream):
            conversation = await each.open(opening(tokenizer.fingerprint, SKY, mode="fuse", top=5))
            replies.append(await conversation.ask(Ask(1, 1, 0, draft=28), tokenizer.encode(b"The sky is")))
            conversation.close()
        own, other = (dict(zip(unpack_ids(r.y_ids), unpack_floats(r.y_logp), strict=True)) for r in replies)
        shared = own.keys() & other.keys()
        assert len(shared) >= 4
        assert [own[id] for id in shared] == pytest.approx([other[id] for id in shared], abs=0.4)
        assert [reply.tokens for reply in replies] == [[], []]
        await upstream.close()

    asyncio.run(run())
