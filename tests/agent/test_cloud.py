"""The cloud resolver against a WebSocket server that the test plays, well or badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from agent.breaker import Breaker
from agent.cloud import CloudOptions, CloudResolver
from agent.conversation import CloudConversation
from agent.resolver import Question, Ticket
from models.engine.base import Tokenizer
from models.engine.gguf import GgufTokenizer
from models.sampling import Shaped
from protocol import resolve as wire
from protocol.resolve import Mode, Sampling
from tests.agent.scripted import Clock, done

PATIENCE = 30.0  # seconds after which a test gives up on something that never comes

Socket = web.WebSocketResponse
Serve = Callable[[Socket, "Cloud"], Awaitable[None]]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return GgufTokenizer.open(smollm2)


class Cloud:
    """The server's side. `serve` has each connection after the handshake; `received` is all that came in."""

    def __init__(self, serve: Serve, tokenizer: str) -> None:
        self.serve = serve
        self.tokenizer = tokenizer
        self.connections = 0
        self.received: list[Any] = []
        self.bytes_up = 0

    async def handle(self, request: web.Request) -> Socket:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        self.connections += 1
        await self.serve(socket, self)
        return socket

    async def hello(self, socket: Socket) -> None:
        await socket.send_bytes(wire.encode(wire.Hello("llm", self.tokenizer, True, 100)))

    async def read(self, socket: Socket) -> Any:
        """The next message, None if the other side left."""
        frame = await socket.receive()
        if frame.type is not aiohttp.WSMsgType.BINARY:
            return None
        self.bytes_up += wire.wire_size(len(frame.data), masked=True)
        self.received.append(wire.decode_from_device(frame.data))
        return self.received[-1]

    async def next_ask(self, socket: Socket) -> Any:
        while not isinstance(message := await self.read(socket), wire.Ask):
            if message is None:
                return None
        return message


def answering(reply: Callable[[wire.Ask], list[wire.FromCloud | bytes]]) -> Serve:
    """A server that says hello and then this to each question."""

    async def serve(socket: Socket, cloud: Cloud) -> None:
        await cloud.hello(socket)
        while (ask := await cloud.next_ask(socket)) is not None:
            for message in reply(ask):
                await socket.send_bytes(message if isinstance(message, bytes) else wire.encode(message))

    return serve


def agreeing(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
    return [wire.Answer(ask.session, ask.step, [ask.draft])]


class Device:
    """The device's side: a resolver that runs, and what a token loop would do with it."""

    def __init__(self, resolver: CloudResolver, clock: Clock) -> None:
        self.resolver = resolver
        self.clock = clock
        self.woken = asyncio.Event()

    def open(self, mode: Mode = "take") -> CloudConversation:
        return self.resolver.open("The capital of", Sampling(), mode, self.woken.set)

    async def done(self, ticket: Ticket | None) -> Ticket:
        assert ticket is not None
        while not done(ticket):
            self.woken.clear()
            await self.woken.wait()
        return ticket

    async def connected(self) -> None:
        assert await self.resolver.connected(PATIENCE)

    async def ask(self, conversation: CloudConversation, answer: list[int], draft: int) -> Ticket:
        await self.connected()
        return await self.done(conversation.ask(question(answer, draft)))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.001)


def question(answer: list[int], draft: int) -> Question:
    return Question(answer, draft, Shaped(np.array([draft]), np.ones(1, np.float32)))


@asynccontextmanager
async def link(serve: Serve, tokenizer: Tokenizer, foreign: bool = False, **options: Any) -> AsyncIterator[Any]:
    """A device connected to a cloud that behaves as `serve`."""
    cloud = Cloud(serve, "another" if foreign else tokenizer.fingerprint)
    app = web.Application()
    app.router.add_get("/v1/resolve", cloud.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    clock = Clock()
    resolver = CloudResolver(
        CloudOptions(f"http://127.0.0.1:{port}", **options),
        tokenizer,
        Breaker(clock, lambda: 0.5),
        clock,
        lambda: -0.5,  # no pause between attempts
    )
    running = asyncio.create_task(resolver.run())
    try:
        yield Device(resolver, clock), cloud
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await runner.cleanup()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE))


class TestGood:
    def test_a_question_is_answered(self, tokenizer: Tokenizer) -> None:
        def reply(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
            ids, logp = wire.pack_ids(np.array([9, 4])), wire.pack_floats(np.log([0.7, 0.2]))
            return [wire.Answer(ask.session, ask.step, [9], y_ids=ids, y_logp=logp, y_draft=0.2, llm_tokens=2)]

        async def test() -> None:
            async with link(answering(reply), tokenizer) as (device, _):
                await device.connected()
                conversation = device.open()
                ticket = await device.ask(conversation, [1, 2], 4)
                assert ticket.reply is not None
                assert list(ticket.reply.tokens) == [9]
                assert ticket.reply.y_ids.tolist() == [9, 4]
                assert ticket.reply.y_p.tolist() == pytest.approx([0.7, 0.2])
                assert ticket.reply.y_draft == pytest.approx(0.2)
                assert conversation.traffic.llm_tokens == 2

        run(test())

    def test_only_what_is_new_is_sent(self, tokenizer: Tokenizer) -> None:
        async def test() -> None:
            async with link(answering(agreeing), tokenizer) as (device, cloud):
                await device.connected()
                conversation = device.open()
                for answer in ([], [1], [1, 2, 3], [1, 2, 9], [1, 2, 9, 4]):
                    await device.ask(conversation, answer, 5)
                opened, *asks = cloud.received
                assert isinstance(opened, wire.Open)
                assert [(ask.keep, ask.tokens) for ask in asks] == [(0, []), (0, [1]), (1, [2, 3]), (2, [9]), (3, [4])]
                assert len({ask.step for ask in asks}) == 5

        run(test())

    def test_every_byte_is_counted(self, tokenizer: Tokenizer) -> None:
        async def test() -> None:
            async with link(answering(agreeing), tokenizer) as (device, cloud):
                await device.connected()
                conversation = device.open()
                for count in range(5):
                    await device.ask(conversation, list(range(count * 50)), 5)
                conversation.close()
                await device.until(lambda: isinstance(cloud.received[-1], wire.Close))
                assert conversation.traffic.bytes_up == cloud.bytes_up
                answers = [wire.encode(wire.Answer(ask.session, ask.step, [5])) for ask in cloud.received[1:-1]]
                assert conversation.traffic.bytes_down == sum(len(frame) + 2 for frame in answers)
                assert conversation.traffic.asked == 5

        run(test())

    def test_bursts_and_newer_messages(self, tokenizer: Tokenizer) -> None:
        def reply(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
            more: list[wire.FromCloud | bytes] = [wire.More(ask.session, ask.step, token) for token in (7, 8, 10**9, 9)]
            stray = wire.More(ask.session, ask.step + 1, 11)
            return [b"\x92\xa5later\x01", wire.Answer(ask.session, ask.step, [6]), more[0], stray, *more[1:]]

        async def test() -> None:
            async with link(answering(reply), tokenizer, burst=3) as (device, _):
                await device.connected()
                ticket = await device.ask(device.open(), [], 6)
                await device.until(lambda: len(ticket.burst) == 3)
                assert ticket.burst == [7, 8, 9]

        run(test())

    def test_another_tokenizer_speaks_bytes(self, tokenizer: Tokenizer) -> None:
        def reply(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
            logp = wire.pack_floats(np.log([0.8, 0.1]))
            answer = wire.Answer(ask.session, ask.step, text=b" Paris", y_pieces=[b" Paris", b""], y_logp=logp)
            return [answer, wire.More(ask.session, ask.step, text=b", a"), wire.More(ask.session, ask.step, text=b"")]

        async def test() -> None:
            async with link(answering(reply), tokenizer, foreign=True, burst=2) as (device, cloud):
                await device.connected()
                answer = tokenizer.encode("France is")
                ticket = await device.ask(device.open(), answer, tokenizer.end_id)
                (paris,) = tokenizer.encode(" Paris")
                assert ticket.reply is not None
                assert list(ticket.reply.tokens) == [paris]
                assert ticket.reply.y_ids.tolist() == [paris, tokenizer.end_id]
                await device.until(lambda: bool(ticket.burst) and ticket.burst[-1] == tokenizer.end_id)
                assert [paris, *ticket.burst] == [*tokenizer.encode(" Paris, a"), tokenizer.end_id]
                ask = cloud.received[-1]
                assert (ask.text, ask.draft_text, ask.tokens) == (b"France is", b"", [])

        run(test())

    def test_another_tokenizer_is_not_asked_within_a_character(self, tokenizer: Tokenizer) -> None:
        async def test() -> None:
            async with link(answering(agreeing), tokenizer, foreign=True) as (device, _):
                await device.connected()
                half = tokenizer.encode("é😀".encode()[:4])
                assert device.open().ask(question(half, 5)) is None

        run(test())


class TestLate:
    def test_a_reply_after_the_deadline_is_dropped(self, tokenizer: Tokenizer) -> None:
        asks: list[wire.Ask] = []

        def reply(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
            asks.append(ask)
            return [] if len(asks) == 1 else [wire.Answer(a.session, a.step, [a.draft]) for a in asks]

        async def test() -> None:
            async with link(answering(reply), tokenizer) as (device, _):
                await device.connected()
                conversation = device.open()
                first = conversation.ask(question([], 5))
                assert first is not None
                device.clock.now = first.deadline
                conversation.late(first)
                second = await device.ask(conversation, [5], 6)
                assert first.reply is None
                assert second.reply is not None
                assert list(second.reply.tokens) == [6]
                assert device.resolver.late_replies == 1

        run(test())

    def test_one_that_never_answers_is_left_alone_and_tried_again(self, tokenizer: Tokenizer) -> None:
        awake = False

        def reply(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
            return agreeing(ask) if awake else []

        async def test() -> None:
            nonlocal awake
            async with link(answering(reply), tokenizer) as (device, _):
                await device.connected()
                conversation = device.open()
                asked = 0
                while (ticket := conversation.ask(question([], 5))) is not None:
                    asked += 1
                    device.clock.now += 0.5
                    conversation.late(ticket)
                assert asked == 3
                awake = True
                device.clock.now += 60.0
                assert (await device.ask(conversation, [], 5)).reply is not None
                assert device.resolver.breaker.state == "closed"

        run(test())

    def test_a_trial_that_is_withdrawn_is_not_the_last_one(self, tokenizer: Tokenizer) -> None:
        async def test() -> None:
            async with link(answering(lambda ask: []), tokenizer) as (device, _):
                await device.connected()
                conversation = device.open()
                while (ticket := conversation.ask(question([], 5))) is not None:
                    conversation.late(ticket)
                device.clock.now += 60.0
                trial = conversation.ask(question([], 5))
                assert trial is not None
                assert conversation.ask(question([1], 5)) is None
                conversation.withdraw(trial)
                assert conversation.ask(question([2], 5)) is not None

        run(test())


def bad_answers(ask: wire.Ask) -> dict[str, wire.FromCloud | bytes]:
    session, step, one = ask.session, ask.step, wire.pack_floats(np.zeros(1))
    return {
        "garbage": b"\xc1\xff\x00",
        "nothing": b"",
        "other side's": wire.encode(wire.Close(1)),
        "oversized": b"\x00" * (wire.MAX_FRAME + 1),
        "token out of range": wire.Answer(session, step, [10**6]),
        "negative token": wire.Answer(session, step, [-1]),
        "id out of range": wire.Answer(session, step, y_ids=wire.pack_ids(np.array([10**6])), y_logp=one),
        "lengths differ": wire.Answer(session, step, [1], y_logp=one),
        "cut off": wire.Answer(session, step, [1], y_ids=b"abc"),
        "NaN": wire.Answer(
            session, step, y_ids=wire.pack_ids(np.array([1])), y_logp=wire.pack_floats(np.array([np.nan]))
        ),
        "more than all": wire.Answer(
            session, step, y_ids=wire.pack_ids(np.array([1])), y_logp=wire.pack_floats(np.array([9.0]))
        ),
        "empty": wire.Answer(session, step),
    }


class TestBad:
    @pytest.mark.parametrize("kind", bad_answers(wire.Ask(0, 0, 0)))
    def test_answers_fail_the_question_and_a_new_link_serves_the_next(self, tokenizer: Tokenizer, kind: str) -> None:
        async def serve(socket: Socket, cloud: Cloud) -> None:
            def reply(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
                return [bad_answers(ask)[kind]] if cloud.connections == 1 else agreeing(ask)

            await answering(reply)(socket, cloud)

        async def test() -> None:
            async with link(serve, tokenizer) as (device, cloud):
                await device.connected()
                conversation = device.open()
                ticket = await device.ask(conversation, [1, 2], 5)
                assert ticket.failed
                assert ticket.reply is None
                await device.until(lambda: cloud.connections == 2)
                again = await device.ask(conversation, [1, 2, 3], 5)
                assert again.reply is not None
                assert (cloud.received[-1].keep, cloud.received[-1].tokens) == (0, [1, 2, 3])
                assert device.resolver.protocol_errors == 1

        run(test())

    @pytest.mark.parametrize("kind", ["text", "garbage", "no hello", "closed", "gone"])
    def test_beginnings_are_tried_again(self, tokenizer: Tokenizer, kind: str) -> None:
        async def serve(socket: Socket, cloud: Cloud) -> None:
            if cloud.connections > 3:
                await answering(agreeing)(socket, cloud)
            elif kind == "text":
                await socket.send_str("hello")
            elif kind == "garbage":
                await socket.send_bytes(b"\xc1")
            elif kind == "no hello":
                await socket.send_bytes(wire.encode(wire.More(1, 2)))
            elif kind == "closed":
                await socket.close()
            else:
                assert socket._req is not None
                assert socket._req.transport is not None
                socket._req.transport.abort()

        async def test() -> None:
            async with link(serve, tokenizer) as (device, cloud):
                ticket = await device.ask(device.open(), [], 5)
                assert ticket.reply is not None
                assert cloud.connections == 4

        run(test())

    def test_a_text_frame_later_fails_the_question(self, tokenizer: Tokenizer) -> None:
        async def serve(socket: Socket, cloud: Cloud) -> None:
            await cloud.hello(socket)
            await cloud.next_ask(socket)
            await socket.send_str("answer")
            await socket.receive()

        async def test() -> None:
            async with link(serve, tokenizer) as (device, _):
                assert (await device.ask(device.open(), [], 5)).failed

        run(test())

    def test_a_death_with_questions_open_fails_them_all_at_once(self, tokenizer: Tokenizer) -> None:
        async def serve(socket: Socket, cloud: Cloud) -> None:
            await cloud.hello(socket)
            if cloud.connections == 1:
                for _ in range(3):
                    await cloud.next_ask(socket)
                assert socket._req is not None
                assert socket._req.transport is not None
                socket._req.transport.abort()
            await socket.receive()

        async def test() -> None:
            async with link(serve, tokenizer) as (device, _):
                await device.connected()
                conversation = device.open()
                tickets = [conversation.ask(question([1] * at, 5)) for at in range(3)]
                for ticket in tickets:
                    assert (await device.done(ticket)).failed

        run(test())

    def test_a_wrong_key_is_said(self, tokenizer: Tokenizer) -> None:
        async def refuse(request: web.Request) -> web.Response:
            raise web.HTTPUnauthorized

        async def test() -> None:
            app = web.Application()
            app.router.add_get("/v1/resolve", refuse)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            options = CloudOptions(f"http://127.0.0.1:{runner.addresses[0][1]}", key="wrong")
            clock = Clock()
            resolver = CloudResolver(options, tokenizer, Breaker(clock, lambda: 0.5), clock, lambda: 0.5)
            running = asyncio.create_task(resolver.run())
            await Device(resolver, clock).until(lambda: "unauthorised" in resolver.state)
            assert "cloud.key" in resolver.state
            assert resolver.open("x", Sampling(), "take", lambda: None).ask(question([], 1)) is None
            running.cancel()
            await runner.cleanup()

        run(test())

    def test_pauses_are_short_again_after_a_good_link(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def recorded(delay: float) -> None:
            if delay > 0.01:
                pauses.append(delay)
            await sleep(0)

        async def serve(socket: Socket, cloud: Cloud) -> None:
            if cloud.connections != 5:
                await cloud.hello(socket)
            await socket.close()

        async def test() -> None:
            async with link(serve, tokenizer) as (device, cloud):
                device.resolver._jitter = lambda: 0.5
                await device.until(lambda: cloud.connections >= 9)

        monkeypatch.setattr(asyncio, "sleep", recorded)
        run(test())
        assert max(pauses[:3]) == min(pauses[:3]) == 0.2
        assert pauses[4] > 0.2
        assert pauses[6] == 0.2


class TestRefused:
    @staticmethod
    def once(code: str, step: int | None, retry_after: float) -> Serve:
        """Refuses the first question, or its session with step -1, and agrees afterwards."""

        async def serve(socket: Socket, cloud: Cloud) -> None:
            refused = False

            def reply(ask: wire.Ask) -> list[wire.FromCloud | bytes]:
                nonlocal refused
                if refused:
                    return agreeing(ask)
                refused = True
                return [wire.Refused(ask.session, ask.step if step is None else step, code, "no", retry_after)]

            await answering(reply)(socket, cloud)

        return serve

    def test_for_a_while(self, tokenizer: Tokenizer) -> None:
        async def test() -> None:
            async with link(self.once("rate_limited", None, 2.0), tokenizer) as (device, _):
                await device.connected()
                conversation = device.open()
                assert (await device.ask(conversation, [], 5)).failed
                assert conversation.ask(question([], 5)) is None
                device.clock.now += 2.0
                assert (await device.ask(conversation, [], 5)).reply is not None

        run(test())

    def test_for_good(self, tokenizer: Tokenizer) -> None:
        async def test() -> None:
            async with link(self.once("context_full", -1, 0.0), tokenizer) as (device, _):
                await device.connected()
                conversation = device.open()
                assert (await device.ask(conversation, [], 5)).failed
                device.clock.now += 1e6
                assert conversation.ask(question([], 5)) is None
                assert (await device.ask(device.open(), [], 5)).reply is not None

        run(test())

    def test_because_the_session_is_forgotten_opens_it_again(self, tokenizer: Tokenizer) -> None:
        async def test() -> None:
            async with link(self.once("unknown_session", None, 0.0), tokenizer) as (device, cloud):
                await device.connected()
                conversation = device.open()
                assert (await device.ask(conversation, [1], 5)).failed
                assert (await device.ask(conversation, [1, 2], 5)).reply is not None
                kinds = [type(message).__name__ for message in cloud.received]
                assert kinds == ["Open", "Ask", "Open", "Ask"]
                assert cloud.received[-1].tokens == [1, 2]

        run(test())
