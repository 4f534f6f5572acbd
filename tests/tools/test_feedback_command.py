"""`skerry feedback` against an agent that answers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.adapt.answers import Answers
from agent.adapt.collect import Collector
from agent.adapt.lessons import Lessons
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from protocol.errors import AuthError, LinkError, RequestError
from tests.agent.adapt.lessons import MODEL
from tests.agent.adapt.serving import KEY, Served, serving
from tests.agent.scripted import Clock
from tools.commands.feedback import feedback

PROMPT = "The capital of Australia is"


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    engine = GgufEngine(smollm2, context=320, sequences=1, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def served(engine: Engine, tmp_path: Path) -> Iterator[Served]:
    collector = Collector(Lessons(tmp_path / "lessons", MODEL), Answers(Clock()))
    with serving(engine, collector, engine.tokenizer.encode(" banana")[0]) as served:
        yield served
    collector.close()


def run(served: Served | None, *arguments: str, key: str = KEY, port: str | None = None) -> Result:
    env = {
        "SKERRY_API_KEY": key,
        "SKERRY_API_PORT": port or (served.url.rpartition(":")[2] if served else "1"),
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    return CliRunner(env=env).invoke(feedback, arguments)


def taught(served: Served) -> list[str]:
    """By all lessons of readers, oldest first."""
    assert served.collector is not None
    found = served.collector.lessons.take(private=True)
    return [served.taught(one) for one in reversed(found) if one.source == "correction"]


def test_an_answer_is_corrected(served: Served) -> None:
    id = served.ask(PROMPT)
    done = run(served, id, " Canberra.")
    assert done.exit_code == 0, done.output
    assert done.output == "1 lessons learned, 1 dropped\n"
    assert taught(served) == [" Canberra."]


def test_an_answer_is_rated(served: Served) -> None:
    id = served.ask(PROMPT)
    assert run(served, id, "--good").exit_code == 0
    assert taught(served) == [" banana banana banana"]
    assert json.loads(run(served, id, "--bad", "--json").stdout)["dropped"] == 2
    assert taught(served) == []


def test_a_text_or_chat_is_answered_without_id(served: Served, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What is the capital of Australia?"}]
    for number, content in enumerate((chat, {"model": "x", "messages": chat})):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        assert run(served, "--messages", str(path), "Canberra.", "--private").exit_code == 0
    assert run(served, "--prompt", PROMPT, " Canberra.").exit_code == 0
    assert taught(served) == ["Canberra.", "Canberra.", " Canberra."]
    assert served.collector is not None
    assert len(served.collector.lessons.take(private=False)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("id",),
        ("id", "text", "more"),
        ("id", "text", "--good"),
        ("--prompt", "a"),
        ("--prompt", "a", "id", "text"),
    ],
)
def test_what_is_missing_is_a_matter_of_usage(arguments: tuple[str, ...]) -> None:
    result = run(None, *arguments)
    assert result.exit_code == 2
    assert "give ID or --messages or --prompt" in result.output


def test_what_the_agent_refuses_is_told_in_its_words(served: Served) -> None:
    result = run(served, "chatcmpl-ffff", "--bad")
    assert isinstance(result.exception, RequestError)
    assert "no answer of that id" in str(result.exception)
    result = run(served, "chatcmpl-ffff", "--bad", key="wrong")
    assert isinstance(result.exception, AuthError)


def test_a_file_without_messages_is_refused(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    for content in (b"{", b'{"text": "a"}', b'"text"', b"\xff"):
        path.write_bytes(content)
        assert isinstance(run(served, "--messages", str(path), "a").exception, RequestError), content
    assert isinstance(run(served, "--messages", str(tmp_path / "none"), "a").exception, RequestError)


def test_no_agent_there_is_told() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        result = run(None, "--prompt", "a", "b", port=str(held.getsockname()[1]))
    assert isinstance(result.exception, LinkError)
    assert "start `skerry agent`" in str(result.exception)
    assert isinstance(run(None, "--prompt", "a", "b", "--url", "nonsense").exception, LinkError)
