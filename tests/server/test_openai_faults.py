"""Servers that are there but do not do what they should, and the forms in which log-probabilities come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from models.engine.gguf import GgufTokenizer
from protocol.errors import ContextFull, Overloaded, RequestError, UpstreamError
from protocol.resolve import Answer, Ask, Message, Sampling, unpack_floats, unpack_ids
from server.cloud.config import UpstreamSection
from server.cloud.openai import OpenAiUpstream
from tests.server.helpers import SKY, opening

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def upstream_to(
    handler: Handler, tokenizer: GgufTokenizer | None = None, **section: Any
) -> AsyncIterator[OpenAiUpstream]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    upstream = OpenAiUpstream(UpstreamSection(kind="openai", url=url, **section), tokenizer)
    try:
        yield upstream
    finally:
        await upstream.close()
        await runner.cleanup()


async def asked(upstream: OpenAiUpstream, answer: list[int] | bytes = b"", **opened: Any) -> Answer:
    conversation = await upstream.open(opening(opened.pop("tokenizer", ""), SKY, **opened))
    try:
        return await conversation.ask(Ask(1, 1, 0), answer)
    finally:
        conversation.close()


def answering(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return handler


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": " Paris", "finish_reason": "length", **fields}]}


ECHO = {"error": {"message": "you sent: Why is the sky blue?"}}
TOO_LONG = {"error": {"code": "context_length_exceeded"}}
NO_LOGPROBS = choice(logprobs=None)
ODD_LOGPROBS = choice(logprobs={"content": [{"token": 7}]})


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        pytest.param(answering(ECHO, 500), UpstreamError, id="500"),
        pytest.param(answering(ECHO, 400), UpstreamError, id="400"),
        pytest.param(answering({"error": {"type": "exceed_context_size_error"}}, 400), ContextFull, id="too long"),
        pytest.param(answering(TOO_LONG, 400), ContextFull, id="OpenAI: too long"),
        pytest.param(answering(NO_LOGPROBS), UpstreamError, id="no log-probabilities"),
        pytest.param(answering(ODD_LOGPROBS), UpstreamError, id="odd log-probabilities"),
        pytest.param(answering([1, 2]), UpstreamError, id="a list"),
        pytest.param(answering({"choices": "none"}), UpstreamError, id="odd choices"),
        pytest.param(answering({"choices": []}), UpstreamError, id="no choice"),
    ],
)
def test_a_failing_server_is_an_error_that_quotes_nothing(handler: Handler, error: type[Exception]) -> None:
    async def run() -> None:
        async with upstream_to(handler) as upstream:
            with pytest.raises(error) as caught:
                await asked(upstream)
            assert "sky" not in str(caught.value)

    asyncio.run(run())


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), (None, 1.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0)])
def test_a_busy_server_says_when_to_come_back(header: str | None, seconds: float) -> None:
    async def run() -> None:
        async with upstream_to(answering({}, 429, {"Retry-After": header} if header else {})) as upstream:
            with pytest.raises(Overloaded) as caught:
                await asked(upstream)
            assert caught.value.retry_after == seconds

    asyncio.run(run())


def test_a_server_that_stalls_is_given_up() -> None:
    async def run() -> None:
        released = asyncio.Event()

        async def stall(request: web.Request) -> web.Response:
            await released.wait()
            return web.Response()

        async with upstream_to(stall, timeout_s=0.05) as upstream:
            with pytest.raises(UpstreamError, match="in time"):
                await asked(upstream)
            released.set()

    asyncio.run(run())


def test_a_server_that_is_not_there() -> None:
    async def run() -> None:
        upstream = OpenAiUpstream(UpstreamSection(kind="openai", url="http://127.0.0.1:9/v1"))
        with pytest.raises(UpstreamError):
            await asked(upstream)
        assert not await upstream.ready()
        await upstream.close()

    asyncio.run(run())


def test_a_connection_that_breaks_is_tried_once_more() -> None:
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(await request.json())
        if len(seen) == 1:
            assert request.transport is not None
            request.transport.abort()
        entry = {"token": " Paris", "logprob": -0.1}
        return web.json_response(choice(logprobs={"content": [{**entry, "top_logprobs": [entry]}]}))

    async def run() -> None:
        async with upstream_to(handler) as upstream:
            assert (await asked(upstream)).text == b" Paris"

    asyncio.run(run())
    assert len(seen) == 2
    assert seen[0] == seen[1]


def listed(*entries: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"token": token, "logprob": logp} for token, logp in entries]


@pytest.mark.parametrize(
    "logprobs",
    [
        pytest.param(
            {"content": [{"token": " Paris", "logprob": -0.2, "top_logprobs": listed((" a", -2.0), (" Paris", -0.2))}]},
            id="chat",
        ),
        pytest.param(
            {"tokens": [" Paris"], "token_logprobs": [-0.2], "top_logprobs": [{" a": -2.0, " Paris": -0.2}]},
            id="completions",
        ),
        pytest.param(
            {
                "tokens": ["token_id:7042"],
                "token_logprobs": [-0.2],
                "top_logprobs": [{"token_id:253": -2.0, "token_id:7042": -0.2}],
            },
            id="completions with ids",
        ),
    ],
)
def test_every_form_gives_token_ids(logprobs: dict[str, Any], tokenizer: GgufTokenizer) -> None:
    async def run() -> None:
        async with upstream_to(answering(choice(logprobs=logprobs)), tokenizer) as upstream:
            answer = await asked(upstream, [1, 2], tokenizer=tokenizer.fingerprint)
            assert answer.tokens == tokenizer.encode(" Paris") == [7042]
            assert unpack_ids(answer.y_ids).tolist() == [7042, 253]
            np.testing.assert_allclose(unpack_floats(answer.y_logp), [-0.2, -2.0])

    asyncio.run(run())


def test_the_end_may_be_told_by_the_finish_reason_alone() -> None:
    async def run() -> None:
        ended = {"choices": [{"message": {"content": ""}, "finish_reason": "stop", "logprobs": None}]}
        async with upstream_to(answering(ended), endpoint="chat") as upstream:
            answer = await asked(upstream)
            assert (answer.text, answer.y_pieces) == (b"", [b""])

    asyncio.run(run())


def test_a_server_with_another_tokenizer_than_configured_is_noticed(tokenizer: GgufTokenizer) -> None:
    entry = {"id": 7042, "token": "xyz", "bytes": list(b"xyz"), "logprob": -0.1}

    async def run() -> None:
        logprobs = {"content": [{**entry, "top_logprobs": [entry]}]}
        async with upstream_to(answering(choice(logprobs=logprobs)), tokenizer) as upstream:
            with pytest.raises(UpstreamError, match="tokenizer"):
                await asked(upstream, [1], tokenizer=tokenizer.fingerprint)

    asyncio.run(run())


def test_a_sampled_take_draws_from_the_listed_tokens() -> None:
    entries = listed(("a", np.log(0.5)), ("b", np.log(0.3)), ("c", np.log(0.2)))

    async def run() -> None:
        logprobs = {"content": [{**entries[0], "top_logprobs": entries}]}
        async with upstream_to(answering(choice(logprobs=logprobs))) as upstream:
            drawn = [(await asked(upstream, sampling=Sampling(temperature=1.0, seed=seed))).text for seed in range(60)]
            assert set(drawn) == {b"a", b"b", b"c"}
            assert drawn.count(b"a") > drawn.count(b"c")

    asyncio.run(run())


def test_the_chat_endpoint_cannot_continue_a_text() -> None:
    async def run() -> None:
        async with upstream_to(answering({}), endpoint="chat") as upstream:
            with pytest.raises(RequestError, match="chats"):
                await upstream.open(opening("", "Once upon a time"))

    asyncio.run(run())


def test_what_is_sent(tokenizer: GgufTokenizer) -> None:
    bodies: list[dict[str, Any]] = []
    headers: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        headers.append(request.headers["Authorization"])
        entry = {"token": " Paris", "logprob": -0.1}
        return web.json_response(choice(logprobs={"content": [{**entry, "top_logprobs": [entry]}]}))

    async def run() -> None:
        prompt = [Message("user", "Hi")]
        async with upstream_to(handler, tokenizer, key="k", model_name="m", top=3) as upstream:
            conversation = await upstream.open(opening(tokenizer.fingerprint, prompt, top=50))
            await conversation.ask(Ask(1, 1, 0), [11, 12])
        async with upstream_to(handler, key="k", top=3) as upstream:
            conversation = await upstream.open(opening("", prompt))
            await conversation.ask(Ask(1, 1, 0), "Grüß".encode() + b"\xf0\x9f")
        async with upstream_to(handler, key="k", endpoint="chat") as upstream:
            conversation = await upstream.open(opening("", prompt))
            await conversation.ask(Ask(1, 1, 0), b"Yo")

    asyncio.run(run())
    ids, text, chat = bodies
    assert ids["prompt"][-2:] == [11, 12]
    assert (ids["model"], ids["max_tokens"], ids["temperature"], ids["logprobs"]) == ("m", 1, 0, 3)
    assert text["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGrüß"
    assert chat["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert chat["continue_final_message"] is True
    assert set(headers) == {"Bearer k"}
