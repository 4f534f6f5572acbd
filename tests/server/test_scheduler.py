"""Whose turn it is: on an engine that records its passes and waits to be let through each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from models.engine.base import Engine, Step
from models.engine.base import Sequence as Place
from protocol.errors import ContextFull, Overloaded, UpstreamError
from server.cloud.scheduler import Job, Scheduler


class GatedEngine(Engine):
    """The logits after a sequence are its length. `passes` lists (sequence id, tokens fed) per pass."""

    def __init__(self) -> None:
        super().__init__(sequences=4, context=1000)
        self.passes: list[list[tuple[int, int]]] = []
        self.gate = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.fails = False
        self.closed = False

    @property
    def threads(self) -> int:
        return 1

    def forward(self, feeds: Sequence[tuple[Place, Sequence[int]]]) -> list[Step]:
        self.waiting.release()
        self.gate.acquire()
        if self.fails:
            raise RuntimeError("llama_decode returned -3")
        self.passes.append([(sequence.id, len(tokens)) for sequence, tokens in feeds])
        for sequence, tokens in feeds:
            sequence.tokens.extend(tokens)
        return [Step(np.array([len(sequence.tokens)], np.float32), None) for sequence, _ in feeds]

    def _trim(self, id: int, position: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def job(target: list[int], steps: int = 1) -> Job[list[float]]:
    """Grows `target` by 1, `steps` times; returns what it saw."""
    seen = []
    for _ in range(steps):
        seen.append(float((yield target)[0]))
        target = [*target, 1]
    return seen


@asynccontextmanager
async def scheduled() -> AsyncIterator[tuple[Scheduler, GatedEngine]]:
    engine = GatedEngine()
    now = 0.0

    def clock() -> float:  # every pass takes 0.1 s: then a pass of prompt tokens keeps its size
        nonlocal now
        now += 0.1
        return now

    scheduler = Scheduler(engine, clock)
    try:
        yield scheduler, engine
    finally:
        engine.gate.release(10_000)
        await scheduler.close()
        assert engine.closed


async def blocked(engine: GatedEngine) -> None:
    """Until the engine stands in a pass."""
    await asyncio.to_thread(engine.waiting.acquire)


def test_steps_of_all_sessions_share_a_pass() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            places = [await scheduler.open([0], 50) for _ in range(3)]
            first = asyncio.create_task(scheduler.run(places[0], job([0, 1])))
            await blocked(engine)
            others = [asyncio.create_task(scheduler.run(place, job([0, 1, 2]))) for place in places[1:]]
            await asyncio.sleep(0)
            engine.gate.release(2)
            assert await first == [2.0]
            assert [await other for other in others] == [[3.0], [3.0]]
            assert engine.passes == [[(places[0].id, 2)], [(places[1].id, 3), (places[2].id, 3)]]

    asyncio.run(run())


def test_a_long_prompt_gives_way_to_steps() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            prompt, step = await scheduler.open([0], 200), await scheduler.open([0], 50)
            reading = asyncio.create_task(scheduler.run(prompt, job([7] * 100)))
            await blocked(engine)
            asking = asyncio.create_task(scheduler.run(step, job([1, 2], steps=2)))
            await asyncio.sleep(0)
            engine.gate.release(100)
            await asking
            await reading
            fed = [(ids[0], total) for ids, total in (zip(*each, strict=True) for each in engine.passes)]
            order = [id for id, _ in fed][:4]
            assert order == [prompt.id, step.id, prompt.id, step.id]
            chunks = [tokens[0] for id, tokens in fed if id == prompt.id]
            assert sum(chunks) == 100
            assert max(chunks) <= 16

    asyncio.run(run())


def test_prompts_take_turns() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            long, short = await scheduler.open([0], 300), await scheduler.open([0], 300)
            first = asyncio.create_task(scheduler.run(long, job([7] * 200)))
            await blocked(engine)
            second = asyncio.create_task(scheduler.run(short, job([8] * 40)))
            await asyncio.sleep(0)
            engine.gate.release(100)
            await second
            await first
            assert max(at for at, each in enumerate(engine.passes) if each[0][0] == short.id) <= 6

    asyncio.run(run())


def test_a_burst_waits_while_anybody_asks() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            burst, ask = await scheduler.open([0], 50), await scheduler.open([0], 50)
            bursting = asyncio.create_task(scheduler.run(burst, job([1], steps=4), speculative=True))
            await blocked(engine)
            asking = asyncio.create_task(scheduler.run(ask, job([2], steps=3)))
            await asyncio.sleep(0)
            engine.gate.release(100)
            await asking
            await bursting
            assert [each[0][0] for each in engine.passes] == [burst.id] + [ask.id] * 3 + [burst.id] * 3

    asyncio.run(run())


def test_a_new_job_takes_the_place_of_the_old_one_and_keeps_what_was_computed() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            place = await scheduler.open([0], 200)
            prefill = asyncio.create_task(scheduler.run(place, job([7] * 100)))
            await blocked(engine)
            asking = asyncio.create_task(scheduler.run(place, job([7] * 100 + [1])))
            await asyncio.sleep(0)
            engine.gate.release(100)
            assert await asking == [101.0]
            with pytest.raises(UpstreamError):
                await prefill
            assert sum(tokens for each in engine.passes for _, tokens in each) == 101

    asyncio.run(run())


def test_a_cancelled_job_is_dropped() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            place, other = await scheduler.open([0], 200), await scheduler.open([0], 50)
            task = asyncio.create_task(scheduler.run(place, job([7] * 160)))
            await blocked(engine)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            engine.gate.release(100)
            await scheduler.run(other, job([1]))
            assert [each[0][0] for each in engine.passes] == [place.id, other.id]

    asyncio.run(run())


def test_errors_reach_who_caused_them() -> None:
    def failing() -> Job[None]:
        yield [1]
        raise ZeroDivisionError

    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            engine.gate.release(100)
            place = await scheduler.open([0], 3)
            with pytest.raises(ZeroDivisionError):
                await scheduler.run(place, failing())
            with pytest.raises(ContextFull):
                await scheduler.run(place, job([1] * 9))
            with pytest.raises(ContextFull):
                await scheduler.open([0], 5000)
            for _ in range(3):
                await scheduler.open([0], 3)
            with pytest.raises(Overloaded):
                await scheduler.open([0], 3)
            scheduler.release(place)
            assert await scheduler.run(await scheduler.open([0], 3), job([1])) == [1.0]
            assert scheduler.alive

    asyncio.run(run())


def test_a_pass_that_fails_fails_its_jobs_only() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            place = await scheduler.open([0], 50)
            engine.fails = True
            engine.gate.release(1)
            with pytest.raises(UpstreamError):
                await scheduler.run(place, job([1]))
            engine.fails = False
            engine.gate.release(1)
            assert await scheduler.run(place, job([1])) == [1.0]

    asyncio.run(run())


def test_closing_fails_what_waits() -> None:
    async def run() -> None:
        async with scheduled() as (scheduler, engine):
            place = await scheduler.open([0], 200)
            running: asyncio.Task[Any] = asyncio.create_task(scheduler.run(place, job([7] * 100)))
            await blocked(engine)
            closing = asyncio.create_task(scheduler.close())
            await asyncio.sleep(0)
            engine.gate.release(1)
            await closing
            with pytest.raises(UpstreamError):
                await running
            with pytest.raises(UpstreamError):
                await scheduler.open([0], 1)
            assert not scheduler.alive

    asyncio.run(run())
