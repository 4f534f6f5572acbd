"""The API on a free port, over an agent whose answers become lessons."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agent.adapt.collect import Collector
from agent.adapt.lesson import Lesson
from agent.agent import Agent, Options
from agent.api.app import Api, ModelName
from agent.config import Api as ApiConfig
from agent.device import Device
from agent.policy import ThresholdPolicy
from models.engine.base import Engine
from tests.agent.scripted import ScriptedResolver, says

KEY = "a key"


@dataclass(frozen=True)
class Served:
    url: str
    agent: Agent
    engine: Engine
    collector: Collector | None

    def post(self, path: str, body: Any, key: str = KEY) -> tuple[int, Any]:
        """Status and JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, raw, headers)) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def ask(self, prompt: str, *, private: bool = False) -> str:
        """The id of the answer, of three tokens."""
        body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "skerry": {"private": private}}
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        id: str = answer["id"]
        return id

    def taught(self, lesson: Lesson) -> str:
        """The text of its labels, the end not counted."""
        return self.engine.tokenizer.decode([target.ids[0] for target in lesson.targets]).decode()


@contextmanager
def serving(engine: Engine, collector: Collector | None, word: int) -> Iterator[Served]:
    """The LLM is asked at every step and always says `word`."""
    resolver = ScriptedResolver(lambda question: says(word, {word: 0.75}))
    note = {} if collector is None else {"finished": collector.note}
    agent = Agent(engine, Options(ThresholdPolicy(-1.0)), resolver, **note)  # type: ignore[arg-type]
    api = Api(Device(agent), ApiConfig(key=KEY), ModelName("model", frozenset()), collector=collector)
    started: Future[str] = Future()
    stop = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(api.app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield Served(started.result(60.0), agent, engine, collector)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
        agent.scheduler.close()
