"""Sessions over a real WebSocket, with a real LLM behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from models.chat import render
from models.engine.gguf import GgufEngine, GgufTokenizer
from models.sampling import log_softmax, shape, uniform
from protocol.resolve import (
    Answer,
    Ask,
    Close,
    Message,
    More,
    Open,
    Sampling,
    pack_floats,
    pack_ids,
    unpack_floats,
    unpack_ids,
)
from server.cloud.embedded import EmbeddedUpstream
from tests.server.helpers import SKY, Device, opening, serving, settled


def written(engine: GgufEngine, prompt: str | list[Message], length: int) -> list[int]:
    """What the LLM writes alone, greedily."""
    text = prompt if isinstance(prompt, str) else render(engine.tokenizer, prompt)
    tokens = engine.tokenizer.encode(text, start=isinstance(prompt, str), special=not isinstance(prompt, str))
    sequence = engine.open(tokens, length)
    try:
        missing, answer = sequence.align(tokens), list[int]()
        for _ in range(length):
            answer.append(int(engine.forward([(sequence, missing)])[0].logits.argmax()))
            missing = answer[-1:]
            if answer[-1] in engine.tokenizer.eog:
                break
        return answer
    finally:
        sequence.close()


@pytest.mark.parametrize("prompt", ["The capital of France is", SKY])
@pytest.mark.parametrize("mode", ["take", "verify"])
def test_asking_for_each_token_gives_the_llm_alone(
    llm: EmbeddedUpstream, alone: GgufEngine, tmp_path: Path, prompt: str | list[Message], mode: str
) -> None:
    expected = written(alone, prompt, 12)

    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            assert device.hello.exact
            assert device.hello.model == llm.name
            await device.send(opening(device.hello.tokenizer, prompt, mode=mode))  # type: ignore[arg-type]
            answer: list[int] = []
            for step in range(len(expected)):
                # A draft that is always wrong: verify has to replace it.
                wrong = {"draft": 5, "x_ids": pack_ids(np.array([5])), "x_p": pack_floats(np.ones(1))}
                await device.send(Ask(1, step, max(0, step - 1), tokens=answer[-1:], **wrong))  # type: ignore[arg-type]
                reply = await device.next(Answer)
                assert (reply.step, reply.llm_tokens) == (step, 1)
                answer.append(reply.tokens[0])
            assert answer == expected

    asyncio.run(run())


def test_an_answer_carries_the_likeliest_tokens(llm: EmbeddedUpstream, alone: GgufEngine, tmp_path: Path) -> None:
    prompt = "The capital of France is"
    tokens = alone.tokenizer.encode(prompt, start=True)
    sequence = alone.open(tokens, 1)
    logp = log_softmax(alone.forward([(sequence, sequence.align(tokens))])[0].logits)
    sequence.close()

    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            opened = opening(device.hello.tokenizer, prompt, mode="fuse", top=6)
            await device.send(opened, Ask(1, 9, 0, draft=int(logp.argmax())))
            reply = await device.next(Answer)
            ids = unpack_ids(reply.y_ids).astype(int)
            assert (len(ids), reply.tokens, reply.step) == (6, [], 9)
            np.testing.assert_allclose(unpack_floats(reply.y_logp), logp[ids], atol=0.1)
            assert reply.y_draft == pytest.approx(np.exp(logp.max()), abs=0.05)

    asyncio.run(run())


def test_sampled_tokens_depend_on_the_seed_alone(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            texts = []
            for session, seed in enumerate([7, 7, 8]):
                sampling = Sampling(temperature=1.0, seed=seed)
                opened = opening(device.hello.tokenizer, session=session, sampling=sampling)
                texts.append([reply.tokens[0] for reply in await device.write(opened, 8, units=[])])
            assert texts[0] == texts[1] != texts[2]

    asyncio.run(run())


def test_a_burst_goes_on_as_the_llm_would(llm: EmbeddedUpstream, alone: GgufEngine, tmp_path: Path) -> None:
    expected = written(alone, SKY, 6)

    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.send(opening(device.hello.tokenizer, SKY, burst=5), Ask(1, 3, 0))
            first = await device.next(Answer)
            more = [await device.next(More) for _ in range(5)]
            assert [first.tokens[0], *(each.token for each in more)] == expected
            assert {each.step for each in more} == {3}
            assert b"".join(each.text for each in more) == alone.tokenizer.decode(expected[1:])
            # What the burst computed is not computed again: one position for the token after it.
            await device.send(Ask(1, 4, 0, tokens=expected))
            assert (await device.next(Answer)).llm_tokens == 1

    asyncio.run(run())


def test_a_burst_ends_with_the_answer(llm: EmbeddedUpstream, tokenizer: GgufTokenizer, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            prompt = [Message("user", "Reply with the single word yes.")]
            await device.send(opening(device.hello.tokenizer, prompt, burst=60), Ask(1, 1, 0))
            reply = await device.next(Answer)
            tokens = reply.tokens[:1]
            while tokens[-1] not in tokenizer.eog:
                tokens.append((await device.next(More)).token)
            await device.send(Ask(1, 2, 0))  # nothing came after the end: the next message is the next Answer
            assert (await device.next(Answer)).step == 2

    asyncio.run(run())


def test_an_ask_cuts_a_burst_short(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            await device.send(opening(device.hello.tokenizer, SKY, burst=64), Ask(1, 1, 0))
            reply = await device.next(Answer)
            await device.next(More)
            await device.send(Ask(1, 2, 0, tokens=reply.tokens[:1]))
            seen = 1
            while isinstance(message := await device.message(), More):
                assert message.step == 1
                seen += 1
            assert isinstance(message, Answer)
            assert message.step == 2
            assert seen < 32

    asyncio.run(run())


def test_an_ask_that_was_taken_back_is_dropped(llm: EmbeddedUpstream, alone: GgufEngine, tmp_path: Path) -> None:
    expected = written(alone, SKY, 3)

    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            other = alone.tokenizer.encode(b"Bananas are yellow because they are")
            await device.send(
                opening(device.hello.tokenizer, SKY),
                Ask(1, 1, 0, tokens=expected[:1]),
                Ask(1, 2, 1, tokens=other),
                Ask(1, 3, 1, tokens=expected[1:2]),
            )
            replies = [await device.next(Answer) for _ in range(2)]
            assert [reply.step for reply in replies] == [1, 3]
            assert [reply.tokens[0] for reply in replies] == expected[1:3]

    asyncio.run(run())


def test_sessions_of_one_connection_do_not_mix(llm: EmbeddedUpstream, alone: GgufEngine, tmp_path: Path) -> None:
    prompts: list[str | list[Message]] = ["The capital of France is", "One, two, three,", SKY]
    expected = [written(alone, prompt, 5) for prompt in prompts]

    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            for session, prompt in enumerate(prompts):
                await device.send(opening(device.hello.tokenizer, prompt, session=session))
            answers: list[list[int]] = [[], [], []]
            for step in range(5):
                for session, answer in enumerate(answers):
                    await device.send(Ask(session, step, max(0, step - 1), tokens=answer[-1:]))
                for _ in answers:
                    reply = await device.next(Answer)
                    answers[reply.session].append(reply.tokens[0])
            assert answers == expected

    asyncio.run(run())


def test_sampled_verify_accepts_what_the_llm_would_write_itself(
    llm: EmbeddedUpstream, alone: GgufEngine, tmp_path: Path
) -> None:
    """x = y, up to rounding: nearly every draft is accepted, at any temperature."""
    text = alone.tokenizer.encode("The capital of France is", start=True)
    sequence = alone.open(text, 40)

    async def run() -> int:
        accepted = 0
        async with serving(llm, tmp_path) as service, service.device() as device:
            sampling = Sampling(temperature=0.9, seed=3)
            await device.send(opening(device.hello.tokenizer, mode="verify", sampling=sampling))
            answer: list[int] = []
            for step in range(25):
                logits = alone.forward([(sequence, sequence.align(text + answer))])[0].logits
                x = shape(logits, sampling, answer)
                draft = x.draw(uniform(sampling.seed, step))
                assert x.ids is not None
                ask = Ask(1, step, max(0, step - 1), answer[-1:], draft, pack_ids(x.ids), pack_floats(x.p))
                await device.send(ask)
                answer.append((await device.next(Answer)).tokens[0])
                accepted += answer[-1] == draft
        return accepted

    try:
        assert asyncio.run(run()) >= 23
    finally:
        sequence.close()


def test_another_tokenizer_speaks_bytes(qwen: Path, tokenizer: GgufTokenizer, tmp_path: Path) -> None:
    engine = GgufEngine(qwen, context=1024, sequences=2, threads=1, hidden=False)

    async def run() -> None:
        upstream = await asyncio.to_thread(EmbeddedUpstream, engine)
        async with serving(upstream, tmp_path) as service, service.device() as device:
            assert device.hello.tokenizer != tokenizer.fingerprint
            opened = opening(tokenizer.fingerprint, SKY)
            text = b"".join(reply.text for reply in await device.write(opened, 12, units=b""))
            assert b"sky" in text
            assert text.decode()
            # The device's draft may be longer than the LLM's token: it is followed as far as they agree.
            await device.send(Ask(1, 99, 0, draft_text=text[:20]))
            reply = await device.next(Answer)
            assert reply.text.startswith(text[:20])
            assert reply.llm_tokens > 1
            assert 0.0 < reply.y_draft <= 1.0
            assert max(reply.y_pieces, key=len)
            assert len(reply.y_pieces) * 4 == len(reply.y_logp)
            # A tail inside a character is no reason to fall over.
            await device.send(Ask(1, 100, 0, text=b"The sky \xf0\x9f"))
            assert (await device.next(Answer)).step == 100
        await upstream.close()

    asyncio.run(run())


def test_closing_a_session_makes_room_for_the_next(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            for session in range(12):  # three times what the engine has places for
                await device.send(opening(device.hello.tokenizer, session=session), Ask(session, 1, 0))
                assert (await device.next(Answer)).session == session
                await device.send(Close(session))
            await settled(lambda: not service.running.server._sessions.total())

    asyncio.run(run())


def test_an_open_session_begins_anew_when_opened_again(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            opened: Open = opening(device.hello.tokenizer)
            first = await device.write(opened, 2, units=[])
            again = await device.write(opened, 2, units=[])
            assert [reply.tokens for reply in again] == [reply.tokens for reply in first]

    asyncio.run(run())


def test_the_device_is_told_what_is_spoken(llm: EmbeddedUpstream, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(llm, tmp_path) as service, service.device() as device:
            assert isinstance(device, Device)
            await device.send(opening(device.hello.tokenizer), Ask(1, 1, 0, text=b"Paris"))
            assert (await device.refused("bad_request")).step == 1
            await device.send(Ask(1, 2, 0, tokens=[10**6]))
            assert (await device.refused("bad_request")).step == 2
            await device.send(Ask(1, 3, 99))
            assert (await device.refused("bad_request")).step == 3
            await device.send(Ask(1, 4, 0))
            assert (await device.next(Answer)).step == 4

    asyncio.run(run())
