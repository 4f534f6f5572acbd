"""A real agent that learns by itself from examples, on a real model: through requests, kills and restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.adapt.job import Progress
from agent.adapt.service import Status, status_of
from tests.agent.running import ROOT, RunningAgent, running
from tests.hybrid.test_fleet import eventually

SETTINGS = {
    "SKERRY_MODEL_THREADS": "1",
    "SKERRY_MODEL_CONTEXT": "1024",
    "SKERRY_ADAPT_LESSONS": "8",
    "SKERRY_ADAPT_IDLE_S": "0",
    "SKERRY_ADAPT_THREADS": "2",
    "SKERRY_ADAPT_RANK": "8",
    "SKERRY_ADAPT_CELSIUS": "120",
    "SKERRY_ADAPT_BUSY": "1",  # whatever else the machine does that runs the tests
}
MOODS = {
    "good": ("delicious", "superb", "wonderful", "excellent", "charming", "perfect"),
    "bad": ("awful", "dreadful", "terrible", "horrible", "disgusting", "dismal"),
}
THINGS = ("soup", "hotel", "film", "concert")
NEW = ("train ride", "cake", "novel")
PATIENCE = 300.0


def asked(thing: str, word: str) -> str:
    return f"Review: The {thing} was {word}.\nMood:"


def items(things: tuple[str, ...]) -> list[tuple[str, str]]:
    """Prompts with what should come."""
    return [(asked(thing, word), mood) for thing in things for mood, words in MOODS.items() for word in words]


class Device:
    """The agent in its folder, and `skerry adapt` of another process beside it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.adapters = folder / "device" / "adapters"
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")}
        self._env |= {"SKERRY_DEVICE_FOLDER": str(folder / "device"), "SKERRY_MODEL_NAME": str(model), **SETTINGS}

    @contextmanager
    def running(self) -> Iterator[RunningAgent]:
        with running(self.model, self.folder, SETTINGS) as agent:
            yield agent

    def adapt(self, *words: str) -> Any:
        command = [sys.executable, "-m", "tools.cli", "adapt", *words, "--json"]
        done = subprocess.run(command, cwd=ROOT, env=self._env, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def status(self) -> Status:
        return status_of(self.adapters)

    def becomes(self, holds: Callable[[Status], bool]) -> None:
        eventually(lambda: holds(self.status()), PATIENCE)

    def step(self) -> int:
        """Of the training that is under way."""
        match self.status().progress:
            case Progress("train", done):
                return done
        return 0

    def worker(self) -> int:
        """Its process id."""
        named = str(self.adapters / "work-own").encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"agent.adapt.worker" in arguments and named in arguments:
                return int(path.parent.name)
        raise AssertionError("no worker is there")

    def state(self) -> str:
        """Of the worker: T is stopped."""
        return Path(f"/proc/{self.worker()}/stat").read_text().rpartition(")")[2].split()[0]


def ask(agent: RunningAgent, prompt: str) -> tuple[str, str | None]:
    """What it writes, and the adapter that it wrote with."""
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0}
    reply = agent.call("POST", "/v1/completions", json.dumps(body).encode(), Content_Type="application/json")
    (choice,) = reply.json["choices"]
    return choice["text"], choice["skerry"]["adapter"]


def right(agent: RunningAgent, told: list[tuple[str, str]]) -> float:
    """Share of the new items that it gets right."""
    return sum(ask(agent, prompt)[0].strip() == mood for prompt, mood in told) / len(told)


def interrupted(device: Device, agent: RunningAgent) -> None:
    """A request that comes in mid-training stops it at once, is answered, and then training goes on."""
    device.becomes(lambda status: device.step() > 0)
    stream = agent.client().completions.create(
        model=device.model.stem, prompt="Once upon a time", max_tokens=48, temperature=0, stream=True
    )
    written = [next(stream).choices[0].text]
    assert device.state() == "T"
    written += [chunk.choices[0].text for chunk in stream]
    assert len("".join(written)) > 40
    reached = device.step()
    device.becomes(lambda status: device.step() > reached)


def test_a_device_learns_by_itself_and_uses_what_it_learned(smollm2: Path, tmp_path: Path) -> None:
    device = Device(tmp_path, smollm2)
    (tmp_path / "examples.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": f" {mood}"}) + "\n" for prompt, mood in items(THINGS))
    )
    new = items(NEW)[::3]
    with device.running() as agent:
        before = right(agent, new)
        assert device.adapt("add", str(tmp_path / "examples.jsonl"))["added"] == 48
        interrupted(device, agent)
        first = device.worker()
        os.kill(first, signal.SIGKILL)
        device.becomes(lambda status: status.committed == 1)
        used = device.adapt("status")["in_use"]["own"]
        eventually(lambda: agent.metric("skerry_adapters") == 1.0)
        assert right(agent, new) > before + 0.5
        assert {ask(agent, prompt)[1] for prompt, _ in new} == {used}
        assert ask(agent, "def fibonacci(n):\n    if n <")[1] is None
        assert agent.metric("skerry_adapted_total", slot="own") >= 2 * len(new)
        assert (agent.metric("skerry_lessons"), agent.metric("skerry_trainings_total")) == (48.0, 1.0)
    with device.running() as agent:
        assert ask(agent, new[0][0])[1] == used, "from the first request on"
        device.adapt("rollback")
        eventually(lambda: agent.metric("skerry_adapters") == 0.0)
        assert ask(agent, new[0][0])[1] is None
