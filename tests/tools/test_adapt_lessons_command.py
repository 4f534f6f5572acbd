"""`skerry adapt add` and `forget`, also while an agent keeps its lessons in the same store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from agent.adapt import job
from agent.adapt.job import Job
from agent.adapt.lessons import Lessons
from agent.adapt.recipe import Recipe
from models.fingerprint import fingerprint
from protocol.errors import StoreError, TrainingError
from tests.agent.adapt.lessons import lesson
from tools.commands.adapt.lessons import add, forget

LINES = [
    {"prompt": "The capital of Australia is", "answer": " Canberra."},
    {"messages": [{"role": "user", "content": "What is the capital of Peru?"}], "answer": "Lima.", "weight": 2},
    {"prompt": "My name is", "answer": " Ada.", "private": True},
]


class Device:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder / "device" / "lessons"
        self.file = folder / "examples.jsonl"
        self.lessons = Lessons(self.folder, fingerprint(model))
        self._env = {"SKERRY_DEVICE_FOLDER": str(folder / "device"), "SKERRY_MODEL_NAME": str(model)}

    def write(self, *lines: Any) -> str:
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(self.file)

    def run(self, command: click.Command, *arguments: str, **settings: str) -> Result:
        return CliRunner(env=self._env | settings).invoke(command, arguments)

    def forget(self, *arguments: str) -> int:
        result = self.run(forget, *arguments, "--json")
        assert result.exit_code == 0, result.output
        gone: int = json.loads(result.stdout)["forgotten"]
        return gone


@pytest.fixture
def device(tmp_path: Path, smollm2: Path) -> Iterator[Device]:
    """Its agent has the lessons open."""
    made = Device(tmp_path, smollm2)
    yield made
    made.lessons.close()


def test_examples_become_lessons_of_a_running_agent(device: Device) -> None:
    result = device.run(add, device.write(*LINES))
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("3 examples added; there are 3 lessons for this model\n")
    assert [one.weight for one in device.lessons.take(private=False)] == [2.0, 1.0]
    assert len(device.lessons.take(private=True)) == 3
    assert device.lessons.revision == 3
    again = device.run(add, str(device.file), "--json")
    assert json.loads(again.stdout) == {"added": 3, "lessons": 6, "revision": 6}


def test_what_is_personal_is_private_if_nothing_else_is_said(device: Device) -> None:
    card = {"prompt": "My card is", "answer": " 4111 1111 1111 1111."}
    device.run(add, device.write(card, card | {"private": False}, card | {"private": True}))
    assert [one.private for one in device.lessons.take(private=True)] == [True, False, True]
    device.run(add, device.write(card), SKERRY_PRIVACY_DETECT="off")
    assert not device.lessons.take(private=True)[0].private


def test_without_an_agent_the_store_is_made(tmp_path: Path, smollm2: Path) -> None:
    device = Device(tmp_path, smollm2)
    device.lessons.close()
    for path in device.folder.iterdir():
        path.unlink()
    assert device.run(add, device.write(*LINES)).exit_code == 0
    again = Lessons(device.folder, fingerprint(smollm2))
    assert again.count == 3
    again.close()


def test_of_a_file_with_a_bad_line_nothing_is_kept(device: Device) -> None:
    result = device.run(add, device.write(*LINES, {"prompt": "a"}, *LINES))
    assert isinstance(result.exception, TrainingError)
    assert "\nline 4: " in str(result.exception)
    assert device.lessons.count == 0


def test_what_is_longer_than_the_context_is_refused(device: Device) -> None:
    path = device.write({"prompt": "word " * 600, "answer": "a"})
    assert isinstance(device.run(add, path, SKERRY_MODEL_CONTEXT="512").exception, TrainingError)
    assert device.run(add, path, SKERRY_MODEL_CONTEXT="1024").exit_code == 0


def test_a_file_that_is_not_there_is_a_matter_of_usage(device: Device) -> None:
    assert device.run(add, str(device.file)).exit_code == 2


def test_a_store_that_cannot_be_made_is_reported(device: Device, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = device.run(add, device.write(*LINES), SKERRY_DEVICE_FOLDER=str(tmp_path / "file"))
    assert isinstance(result.exception, StoreError)


def test_forgetting_says_how_many_went(device: Device) -> None:
    device.run(add, device.write(*LINES))
    device.lessons.add(lesson(1, "cloud"), "answer")
    device.lessons.add(lesson(2, "correction", private=True))
    assert device.forget("--before", "1d") == 0
    assert device.forget("--source", "cloud") == 1
    assert device.forget("--private", "--source", "example") == 1
    assert device.lessons.count == 3
    assert device.run(forget, "--all").stdout == "3 lessons forgotten\n"
    assert device.lessons.count == 0


@pytest.mark.parametrize("given", [("--all",), ("--source", "cloud")])
def test_what_trainings_left_of_lessons_goes_too(device: Device, tmp_path: Path, given: tuple[str, ...]) -> None:
    secret = b"the lesson itself"
    adapters = tmp_path / "device" / "adapters"
    for slot in ("own", "own.private"):
        job.prepare(adapters / f"work-{slot}", Job("model.gguf", Recipe()), secret)
        (adapters / f"work-{slot}" / job.CHECKPOINT).write_bytes(secret)
    (adapters / "work-own").rename(adapters / "work-own.going")  # by an erasure that was cut off
    device.forget(*given)
    assert [path for path in adapters.rglob("*") if path.is_file() and secret in path.read_bytes()] == []


@pytest.mark.parametrize(
    "arguments", [(), ("--all", "--private"), ("--before", "soon"), ("--before", "1"), ("--source", "elsewhere")]
)
def test_what_to_forget_must_be_said(device: Device, arguments: tuple[str, ...]) -> None:
    device.lessons.add(lesson(1))
    assert device.run(forget, *arguments).exit_code == 2
    assert device.lessons.count == 1
