"""Devices that misbehave, limits that are reached, keys, and shutting down."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import aiohttp
import msgspec
import pytest

from protocol.errors import ConfigError, UpstreamError
from protocol.resolve import Answer, Ask, Close, Message, More, Open, Sampling, encode
from server.cloud.app import start
from server.cloud.config import Limits, Listen, ServeConfig
from server.cloud.embedded import EmbeddedUpstream
from server.cloud.keys import KeyFile
from server.cloud.upstream import Conversation, Upstream
from tests.server.helpers import Clock, Service, opening, serving, settled


class Stalling(Conversation):
    """Answers nothing, until it is cancelled."""

    async def ask(self, ask: Ask, answer: list[int] | bytes) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    async def more(self) -> More | None:
        return None

    def close(self) -> None:
        pass


class Odd(Upstream):
    """An LLM that stalls, or fails in a way that nobody foresaw."""

    name, tokenizer, exact, top = "odd", "t", True, 4

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def open(self, request: Open) -> Conversation:
        if self._error:
            raise self._error
        return Stalling()

    async def ready(self) -> bool:
        return self._error is None

    async def close(self) -> None:
        pass


async def works(service: Service, key: str | None = None) -> None:
    """A device that does everything right is served."""
    async with service.device(key) as device:
        await device.send(opening(device.hello.tokenizer, session=77), Ask(77, 1, 0))
        assert (await device.next(Answer)).session == 77


@pytest.mark.parametrize(
    ("frame", "code", "reason"),
    [
        pytest.param(b"\xc1\xff\x00garbage", 1007, "malformed", id="garbage"),
        pytest.param(b"", 1007, "malformed", id="empty"),
        pytest.param(msgspec.msgpack.encode(["ask", "x", {}]), 1007, "malformed", id="wrong types"),
        pytest.param(b"\x91" * 5000, 1007, "malformed", id="nested too deep"),
        pytest.param(b"\x00" * 20_000, 1009, "oversized", id="oversized"),
        pytest.param("text", 1003, "text", id="text"),
    ],
)
def test_a_bad_frame_ends_its_connection_only(
    llm: EmbeddedUpstream, tmp_path: Path, frame: bytes | str, code: int, reason: str
) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path, limits=Limits(frame_bytes=16_384)) as service, service.device() as good:
            await good.send(opening(good.hello.tokenizer))
            async with service.device() as bad:
                await (bad.socket.send_str(frame) if isinstance(frame, str) else bad.socket.send_bytes(frame))
                assert await bad.closed() == code
            await good.send(Ask(1, 1, 0))
            assert (await good.next(Answer)).step == 1
            await settled(lambda: service.metric("skerry_serve_bad_frames_total", reason=reason) == 1)

    asyncio.run(run())


def test_a_newer_device_is_tolerated(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.socket.send_bytes(msgspec.msgpack.encode(["whisper", 1, 2]))
            opened = msgspec.msgpack.decode(encode(opening(device.hello.tokenizer)))
            await device.socket.send_bytes(msgspec.msgpack.encode([*opened, "a field of the future"]))
            await device.send(Ask(1, 1, 0))
            assert (await device.next(Answer)).step == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": Sampling(temperature=float("nan"))},
        {"sampling": Sampling(repetition_penalty=0.0)},
        {"sampling": Sampling(top_p=-1.0)},
        {"top": -1},
        {"burst": -1},
        {"prompt": []},
    ],
)
def test_a_senseless_open_is_refused(llm: EmbeddedUpstream, tmp_path: Path, changes: dict[str, object]) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.send(msgspec.structs.replace(opening(device.hello.tokenizer), **changes))
            assert (await device.refused("bad_request")).step == -1
            await device.send(Ask(1, 1, 0))
            await device.refused("unknown_session")

    asyncio.run(run())


def test_a_prompt_that_does_not_fit(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.send(opening(device.hello.tokenizer, [Message("user", "pineapple " * 2000)]))
            refusal = await device.refused("context_full")
            assert (refusal.step, refusal.retry_after) == (-1, 0.0)
            await works(service)

    asyncio.run(run())


def test_an_answer_that_does_not_fit(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.send(opening(device.hello.tokenizer), Ask(1, 1, 0, tokens=[100] * 400))
            assert (await device.refused("context_full")).step == 1
            await device.send(Ask(1, 2, 3))  # the first units counted all the same
            assert (await device.next(Answer)).step == 2

    asyncio.run(run())


def test_an_answer_without_end(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.send(opening("another tokenizer"), Ask(1, 1, 0, text=b"x" * 70_000))
            assert (await device.refused("context_full")).step == 1

    asyncio.run(run())


def test_sessions_are_limited(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        limits = Limits(sessions=3, sessions_per_key=2)
        keys = KeyFile(tmp_path / "keys.json")
        a, b = keys.add("a"), keys.add("b")
        async with serving(llm, tmp_path, limits=limits) as service, service.device(a) as one, service.device(b) as two:
            for number in range(3):
                await one.send(opening(one.hello.tokenizer, session=number))
            assert (await one.refused("overloaded")).session == 2
            for number in range(2):
                await two.send(opening(two.hello.tokenizer, session=number))
            refusal = await two.refused("overloaded")
            assert (refusal.session, refusal.step) == (1, -1)
            assert refusal.retry_after > 0
            # Close and Open may come in one packet: the place is free at once.
            await one.send(Close(0), opening(one.hello.tokenizer, session=9), Ask(9, 1, 0))
            assert (await one.next(Answer)).session == 9

    asyncio.run(run())


def test_the_engine_s_own_places_are_limited(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            for number in range(5):  # the engine has four
                await device.send(opening(device.hello.tokenizer, session=number))
            assert (await device.refused("overloaded")).step == -1

    asyncio.run(run())


def test_asks_per_second_are_limited(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        clock = Clock()
        async with (
            serving(llm, tmp_path, limits=Limits(asks_per_second=3.0), clock=clock) as service,
            service.device() as device,
        ):
            await device.send(opening(device.hello.tokenizer))
            for step in range(2):
                await device.send(Ask(1, step, 0))
                assert (await device.next(Answer)).step == step
            await device.send(Ask(1, 2, 0, tokens=[5]))
            refusal = await device.refused("rate_limited")
            assert (refusal.step, round(refusal.retry_after, 3)) == (2, 0.333)
            clock.now += 0.5
            await device.send(Ask(1, 3, 1))  # the refused Ask's token counts as sent
            assert (await device.next(Answer)).step == 3

    asyncio.run(run())


def test_silent_sessions_are_closed(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        clock = Clock()
        async with serving(llm, tmp_path, limits=Limits(idle_s=10), clock=clock) as service, service.device() as device:
            await device.send(opening(device.hello.tokenizer), opening(device.hello.tokenizer, session=2), Ask(1, 1, 0))
            await device.next(Answer)
            clock.now += 8
            await device.send(Ask(2, 1, 0))
            await device.next(Answer)
            clock.now += 8
            await service.running.server.sweep()
            refusal = await device.refused("unknown_session")
            assert (refusal.session, refusal.step) == (1, -1)
            await device.send(Ask(1, 2, 0))
            await device.refused("unknown_session")
            await device.send(Ask(2, 2, 0))
            assert (await device.next(Answer)).session == 2

    asyncio.run(run())


def test_too_many_waiting_steps_are_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(Odd(), tmp_path) as service, service.device() as device:
            await device.send(opening("t"), *(Ask(1, step, 0) for step in range(80)))
            assert (await device.refused("overloaded")).step >= 64

    asyncio.run(run())


@pytest.mark.parametrize("error", [UpstreamError("gone"), ZeroDivisionError("secret")])
def test_an_llm_that_fails_refuses_the_session(tmp_path: Path, error: Exception) -> None:
    async def run() -> None:
        async with serving(Odd(error), tmp_path) as service, service.device() as device:
            await device.send(opening("t"))
            refusal = await device.refused("upstream")
            assert refusal.step == -1
            assert "secret" not in refusal.message
            async with service.http.get(f"{service.url}/ready") as response:
                assert response.status == 503
            async with service.http.get(f"{service.url}/health") as response:
                assert response.status == 200

    asyncio.run(run())


def test_a_device_that_vanishes_frees_its_place(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service:
            async with service.device() as device:
                await device.send(opening(device.hello.tokenizer, burst=64), Ask(1, 1, 0))
                await device.next(Answer)
                await device.next(More)
                transport = device.socket._response.connection.transport  # type: ignore[union-attr]
                assert transport is not None
                transport.abort()
            await settled(lambda: not service.running.server._sessions.total())
            assert service.metric("skerry_serve_connections") == 0
            for _ in range(4):
                await works(service)

    asyncio.run(run())


def test_keys_are_needed_once_there_are_any(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        keys = KeyFile(tmp_path / "keys.json")
        async with serving(llm, tmp_path) as service:
            async with service.device() as anonymous:
                key = keys.add("phone")
                await service.running.server.sweep()
                assert await anonymous.closed() == 1008
            for wrong in (None, "", "sk-skerry-wrong", key[:-1]):
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    async with service.device(wrong):
                        pass
                assert caught.value.status == 401
            assert service.metric("skerry_serve_denied_total") == 4
            await works(service, key)
            async with service.device(key) as device:
                keys.revoke("phone")
                await service.running.server.sweep()
                assert await device.closed() == 1008
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await works(service, key)

    asyncio.run(run())


def test_other_machines_need_keys(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        for host in ("0.0.0.0", "::", "example.org", "192.0.2.1"):
            with pytest.raises(ConfigError, match="keys add"):
                await start(ServeConfig(Listen(host, 0, str(tmp_path / "keys.json"))), llm)
        key = KeyFile(tmp_path / "keys.json").add("phone")
        async with serving(llm, tmp_path, host="0.0.0.0") as service:
            await works(service, key)

    asyncio.run(run())


def test_a_port_that_is_taken(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service:
            listen = Listen(port=service.running.port, keys_file=str(tmp_path / "keys.json"))
            with pytest.raises(ConfigError, match="cannot listen"):
                await start(ServeConfig(listen), llm)

    asyncio.run(run())


def test_a_web_page_is_not_served(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with service.device(Origin="https://example.org"):
                    pass
            assert caught.value.status == 403

    asyncio.run(run())


def test_connections_are_limited(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path, limits=Limits(connections=1)) as service, service.device():
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with service.device():
                    pass
            assert caught.value.status == 503
            assert caught.value.headers is not None
            assert "Retry-After" in caught.value.headers

    asyncio.run(run())


def test_draining_lets_running_sessions_finish(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.send(opening(device.hello.tokenizer), Ask(1, 1, 0))
            await device.next(Answer)
            drain = asyncio.create_task(service.running.drain())
            await asyncio.sleep(0)
            await device.send(opening(device.hello.tokenizer, session=2))
            assert (await device.refused("draining")).session == 2
            async with service.http.get(f"{service.url}/ready") as response:
                assert response.status == 503
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with service.device():
                    pass
            assert caught.value.status == 503
            await device.send(Ask(1, 2, 0))
            await device.next(Answer)
            assert not drain.done()
            await device.send(Close(1))
            await drain
            closing = asyncio.create_task(service.running.close())
            assert await device.closed() == 1001
            await closing

    asyncio.run(run())


def test_draining_does_not_wait_for_ever(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(Odd(), tmp_path, drain_s=0.01) as service, service.device() as device:
            await device.send(opening("t"), Ask(1, 1, 0))
            await settled(lambda: service.running.server._sessions.total())
            await service.running.drain()

    asyncio.run(run())


def test_metrics_need_the_key_too(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        key = KeyFile(tmp_path / "keys.json").add("phone")
        async with serving(llm, tmp_path) as service:
            await works(service, key)
            async with service.http.get(f"{service.url}/metrics") as response:
                assert response.status == 401
            headers = {"Authorization": f"Bearer {key}"}
            async with service.http.get(f"{service.url}/metrics", headers=headers) as response:
                text = await response.text()
            assert 'skerry_serve_asks_total{mode="take"} 1.0' in text
            assert "skerry_serve_llm_tokens_total 1.0" in text

    asyncio.run(run())


def test_logs_tell_nothing_of_what_is_said(
    llm: EmbeddedUpstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> str:
        key = KeyFile(tmp_path / "keys.json").add("phone")
        limits = Limits(idle_s=10)
        clock = Clock()
        async with serving(llm, tmp_path, limits=limits, clock=clock) as service:
            async with service.device(key) as device:
                secret = [Message("user", "My name is Rumpelstiltskin. What is my name?")]
                await device.send(opening(device.hello.tokenizer, secret, burst=4), Ask(1, 1, 0))
                await device.next(Answer)
                await device.send(Ask(1, 2, 99), Ask(1, 3, 0, tokens=[10**7]), Ask(9, 1, 0, text=b"Rumpelstiltskin"))
                await device.send(
                    opening(device.hello.tokenizer, [Message("user", "Rumpelstiltskin " * 900)], session=4)
                )
                clock.now += 20
                await service.running.server.sweep()
                await device.socket.send_bytes(b"Rumpelstiltskin")
                await device.closed()
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with service.device("sk-skerry-rumpelstiltskin"):
                    pass
            await service.http.get(f"{service.url}/rumpelstiltskin?x=rumpelstiltskin")
        return key

    with caplog.at_level(logging.DEBUG):
        key = asyncio.run(run())
    assert caplog.records
    logged = " ".join(f"{record.getMessage()} {record.exc_text or ''} {record.args}" for record in caplog.records)
    assert "rumpel" not in logged.lower()
    assert key not in logged
    assert "10000000" not in logged
