"""The API as the official client sees it, on a running agent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.agent.running import RunningAgent, running

QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]
JSON = "application/json"
COUNTING = "one, two, three, four, five, six, seven,"


@pytest.fixture(scope="module")
def agent(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    settings = {"SKERRY_LOG_LEVEL": "debug", "SKERRY_MODEL_THREADS": "1", "SKERRY_API_BODY_BYTES": "65536"}
    with running(smollm2, tmp_path_factory.mktemp("agent"), settings) as started:
        yield started


@pytest.fixture(scope="module")
def client(agent: RunningAgent) -> Iterator[OpenAI]:
    with agent.client() as made:
        yield made


@pytest.fixture(scope="module")
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def chat(client: OpenAI, model: str, **parameters: Any) -> Any:
    given: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, **parameters}
    return client.chat.completions.create(model=model, **given)


def complete(client: OpenAI, model: str, **parameters: Any) -> Any:
    given: dict[str, Any] = {"prompt": COUNTING, "max_tokens": 12, "temperature": 0, **parameters}
    return client.completions.create(model=model, **given)


def test_a_chat_answer_with_its_account(client: OpenAI, model: str, smollm2: Path) -> None:
    answer = chat(client, model)
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert answer.model == model
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert choice.skerry["counts"] == {"local": 12, "memory": 0, "peer": 0, "cloud": 0, "fallback": 0}
    assert 0.0 < choice.skerry["mean_u"] < 1.0
    assert choice.skerry["fingerprint"] == hashlib.sha256(smollm2.read_bytes()).hexdigest()
    assert (choice.skerry["llm_tokens"], choice.skerry["bytes_up"], choice.skerry["bytes_down"]) == (0, 0, 0)
    assert choice.skerry["mode"] == "take"
    assert "tokens" not in choice.skerry


def test_content_parts_are_one_text(client: OpenAI, model: str) -> None:
    text = QUESTION[0]["content"]
    parts = [{"type": "text", "text": text[:10]}, {"type": "text", "text": text[10:]}]
    answer = chat(client, model, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == chat(client, model).choices[0].message.content


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, model: str) -> None:
    parameters = {"seed": 5, "temperature": 1.0, "extra_body": {"skerry": {"tokens": True}}}
    whole = chat(client, model, **parameters)
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}, **parameters))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    last = chunks[-2].choices[0]
    assert last.finish_reason == whole.choices[0].finish_reason
    assert last.skerry == whole.choices[0].skerry
    assert len(last.skerry["tokens"]) == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_a_stream_without_usage_has_none(client: OpenAI, model: str) -> None:
    assert all(chunk.usage is None for chunk in chat(client, model, stream=True))


def test_the_listed_tokens_make_up_the_text(client: OpenAI, model: str) -> None:
    choice = complete(client, model, extra_body={"skerry": {"tokens": True}}).choices[0]
    assert "".join(token["text"] for token in choice.skerry["tokens"]) == choice.text
    assert all(0.0 <= token["u"] <= 1.0 for token in choice.skerry["tokens"])
    assert {token["provenance"] for token in choice.skerry["tokens"]} == {"local"}


def test_a_completion_whole_and_streaming(client: OpenAI, model: str) -> None:
    whole = complete(client, model)
    assert whole.object == "text_completion"
    assert "eight" in whole.choices[0].text
    chunks = list(complete(client, model, stream=True, prompt=[COUNTING]))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].skerry == whole.choices[0].skerry


def test_the_same_seed_gives_the_same_text(client: OpenAI, model: str) -> None:
    def text(**seed: int) -> str:
        return str(complete(client, model, temperature=1.5, **seed).choices[0].text)

    assert text(seed=-1) == text(seed=-1)
    assert len({text(seed=seed) for seed in range(3)}) > 1
    assert len({text() for _ in range(3)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_out(client: OpenAI, model: str, stream: bool) -> None:
    text = complete(client, model).choices[0].text
    stop = text[9:13]  # neither begins nor ends where a token does
    answer = complete(client, model, stop=["never said", stop], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_chat_logprobs(client: OpenAI, model: str) -> None:
    answer = chat(client, model, logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    assert len(tokens) == 12
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer.message.content
    for token in tokens:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-3)
        assert token.token == token.top_logprobs[0].token
        values = [entry.logprob for entry in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0 + 1e-6


def test_chat_logprobs_of_a_stream_are_those_of_the_whole(client: OpenAI, model: str) -> None:
    whole = chat(client, model, logprobs=True).choices[0]
    choices = [chunk.choices[0] for chunk in chat(client, model, logprobs=True, stream=True)]
    streamed = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in whole.logprobs.content]
    assert all(token.top_logprobs == [] for token in streamed)


def test_completion_logprobs_point_into_the_text(client: OpenAI, model: str) -> None:
    choice = complete(client, model, logprobs=2).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 12
    for token, offset, logprob, top in zip(
        found.tokens, found.text_offset, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert choice.text[offset : offset + len(token)] == token
        assert top[token] == pytest.approx(logprob, abs=1e-3)


def test_logprobs_leave_out_what_a_stop_string_cut(client: OpenAI, model: str) -> None:
    choice = complete(client, model, logprobs=0, stop=" nine").choices[0]
    assert "".join(choice.logprobs.tokens).rstrip() == choice.text.rstrip()


def test_streamed_text_has_no_half_characters(client: OpenAI, model: str) -> None:
    answer = complete(client, model, prompt="🐦🦊🐻🐼🐦🦊🐻🐼🐦🦊🐻🐼🐦🦊", max_tokens=16, stream=True, logprobs=1)
    texts = [chunk.choices[0].text for chunk in answer]
    assert any(ord(character) > 0xFFFF for character in "".join(texts))
    assert all("\ufffd" not in text for text in texts[:-2])  # the last token may be cut off by max_tokens


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": "high"}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"n": 2}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"extra_body": {"skerry": {"privat": True}}}, "skerry"),
        ({"extra_body": {"skerry": {"mode": "guess"}}}, "skerry.mode"),
        ({"extra_body": {"top_k": 1.5}}, "top_k"),
    ],
)
def test_a_wrong_parameter_is_named(client: OpenAI, model: str, parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, **parameters)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert param.split(".")[0].split("[")[0] in caught.value.message


@pytest.mark.parametrize("prompt", [[1, 2, 3], ["a", "b"], [], None])
def test_only_one_text_can_be_completed(client: OpenAI, model: str, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="exactly one text"):
        complete(client, model, prompt=prompt)


def test_parameters_that_ask_for_nothing_special_are_fine(client: OpenAI, model: str) -> None:
    answer = chat(
        client,
        model,
        max_tokens=openai.omit,
        max_completion_tokens=2,
        n=1,
        presence_penalty=0,
        response_format={"type": "text"},
        user="me",
        stop=None,
        extra_body={"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1, "never_heard_of": [1]},
    )
    assert answer.usage.completion_tokens == 2


def test_the_model_by_any_of_its_names(client: OpenAI, model: str, smollm2: Path, agent: RunningAgent) -> None:
    assert model == smollm2.stem
    assert client.models.retrieve(model).owned_by == "skerry"
    assert complete(client, str(smollm2), max_tokens=1).model == model
    nameless = agent.call(
        "POST", "/v1/completions", b'{"prompt": "Hi", "max_tokens": 1}', content_type="application/json"
    )
    assert nameless.json["model"] == model


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, "gpt-99")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-99")


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_cannot_fit(client: OpenAI, model: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, model, prompt="word " * 5000, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"


def test_bodies_that_are_no_request(agent: RunningAgent) -> None:
    def error(body: bytes, content_type: str = JSON) -> tuple[int, str | None]:
        reply = agent.call("POST", "/v1/completions", body, content_type=content_type)
        return reply.status, reply.code

    assert error(b"{") == (400, "invalid_value")
    assert error(b"[1]") == (400, "invalid_value")
    assert error(b"\xff") == (400, "invalid_value")
    assert error(b"[" * 50_000) == (400, "invalid_value")
    assert error(b'{"prompt": "\\ud83d"}') == (400, "invalid_value")
    assert error(b'{"prompt": "hi", "max_tokens": 1}', "text/plain") == (400, "invalid_value")
    assert error(json.dumps({"prompt": "x" * 70_000}).encode()) == (413, "request_too_large")


def test_addresses_that_are_no_endpoint(agent: RunningAgent) -> None:
    assert agent.call("GET", "/v1/embeddings").code == "unknown_url"
    wrong_method = agent.call("GET", "/v1/completions")
    assert (wrong_method.status, wrong_method.headers["Allow"]) == (405, "POST")
    assert wrong_method.code == "method_not_allowed"


def test_a_web_page_cannot_use_it(agent: RunningAgent) -> None:
    for host in ("attacker.example:8430", "localhost.attacker.example", "localhost:x", "[::", "", "127.0.0.1@x"):
        assert agent.call("GET", "/v1/models", Host=host).status == 403
    for host in ("localhost:8430", "127.0.0.1", "[::1]:1"):
        assert agent.call("GET", "/v1/models", Host=host).status == 200
    reply = agent.call("GET", "/v1/models", Origin="https://attacker.example")
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_health_and_readiness(agent: RunningAgent, model: str) -> None:
    assert agent.call("GET", "/health").status == 200
    ready = agent.call("GET", "/ready")
    assert ready.status == 200
    assert ready.json == {"status": "ready", "model": model, "cloud": None, "broker": None, "active": 0, "queued": 0}


def test_metrics_count_each_token_once(client: OpenAI, model: str, agent: RunningAgent) -> None:
    def counted() -> list[float]:
        return [
            agent.metric("skerry_tokens_total", provenance="local"),
            agent.metric("skerry_uncertainty_count"),
            agent.metric("skerry_request_seconds_count"),
            agent.metric("skerry_first_token_seconds_count"),
            agent.metric("skerry_requests_total", endpoint="/v1/completions", outcome="ok"),
            agent.metric("skerry_requests_total", endpoint="/v1/completions", outcome="bad_request"),
        ]

    before = counted()
    complete(client, model, max_tokens=5, stop="never said")
    with pytest.raises(openai.BadRequestError):
        complete(client, model, max_tokens=-5)
    assert [after - was for after, was in zip(counted(), before, strict=True)] == [5, 5, 1, 1, 1, 1]
    assert agent.metric("skerry_engine_threads") == 1


def test_four_clients_write_at_the_same_time(agent: RunningAgent, model: str) -> None:
    seen = [0] * 4

    async def read(number: int, client: AsyncOpenAI) -> None:
        stream = await client.completions.create(
            model=model, prompt=f"{number}: {COUNTING}", max_tokens=500, temperature=0, stream=True
        )
        async with stream:
            async for chunk in stream:
                assert chunk.choices[0].finish_reason is None, "an answer ended before the others had begun"
                seen[number] += 1
                if min(seen) >= 3:
                    return

    async def together() -> None:
        async with AsyncOpenAI(base_url=f"{agent.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(read(number, client) for number in range(4)))

    asyncio.run(together())
    assert min(seen) >= 3
    until_idle(agent)


def until_idle(agent: RunningAgent) -> None:
    """Returns when no answer is being written any more; the tests' time-out bounds it."""
    while agent.metric("skerry_active_requests") + agent.metric("skerry_queued_requests"):
        pass


def send(agent: RunningAgent, body: dict[str, Any]) -> socket.socket:
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = agent.connect()
    connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(agent: RunningAgent, stream: bool) -> None:
    """Its answer would take 3,000 tokens, a minute and more."""
    label = {"endpoint": "/v1/completions", "outcome": "cancelled"}
    cancelled = agent.metric("skerry_requests_total", **label)
    tokens = agent.metric("skerry_tokens_total", provenance="local")
    with send(agent, {"prompt": COUNTING, "max_tokens": 3000, "temperature": 0, "stream": stream}) as connection:
        if stream:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        while not agent.metric("skerry_active_requests"):
            pass
    until_idle(agent)
    while agent.metric("skerry_requests_total", **label) == cancelled:
        pass
    written = agent.metric("skerry_tokens_total", provenance="local") - tokens
    assert written < 3000, "the answer was written to its end"


def test_a_long_prompt_is_not_read_on_for_a_client_that_left(agent: RunningAgent) -> None:
    tokens = agent.metric("skerry_tokens_total", provenance="local")
    with send(agent, {"prompt": "word and " * 1900, "max_tokens": 100}):
        while not agent.metric("skerry_active_requests"):
            pass
    until_idle(agent)
    assert agent.metric("skerry_tokens_total", provenance="local") == tokens


def test_no_log_tells_what_was_said(agent: RunningAgent, client: OpenAI, model: str) -> None:
    secret = "xylophone"
    reply = complete(client, model, prompt=f"{secret}! {COUNTING}", logprobs=3)
    assert "eight" in reply.choices[0].text
    for body in ({"temperature": secret}, {"prompt": [secret, secret]}, {"stop": secret, "n": secret}):
        with pytest.raises(openai.BadRequestError):
            complete(client, model, **body)
    with agent.connect() as connection:  # what aiohttp itself cannot parse
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head + b"Content-Type: application/json\r\n\r\n" + secret.encode() + b"\r\n")
        assert b" 400 " in connection.recv(1 << 16)
    log = agent.log.read_text()
    assert "DEBUG" in log
    assert not re.search(rf"{secret}|\beight\b", log, re.IGNORECASE)
    assert "Traceback" not in log
