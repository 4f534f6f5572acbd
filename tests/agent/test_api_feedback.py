"""POST /v1/feedback: what a reader says of an answer becomes a lesson, or takes one back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.adapt.answers import Answers
from agent.adapt.collect import Collector
from agent.adapt.lesson import Lesson
from agent.adapt.lessons import Lessons
from agent.api.feedback import CORRECTED, GOOD
from agent.privacy import Privacy
from models.chat import encode_chat
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from protocol.resolve import Message
from tests.agent.adapt.lessons import MODEL
from tests.agent.adapt.serving import Served, serving
from tests.agent.scripted import Clock

PROMPT = "The capital of Australia is"
CHAT = [{"role": "user", "content": "What is the capital of Australia?"}]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    engine = GgufEngine(smollm2, context=320, sequences=1, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def collector(tmp_path: Path, clock: Clock) -> Iterator[Collector]:
    made = Collector(Lessons(tmp_path, MODEL), Answers(clock, max_age=100.0))
    yield made
    made.close()


@pytest.fixture
def served(engine: Engine, collector: Collector, word: int) -> Iterator[Served]:
    with serving(engine, collector, word) as served:
        yield served


def feedback(served: Served, **body: Any) -> Any:
    status, answer = served.post("/v1/feedback", body)
    assert status == 200, answer
    return answer


def lessons(collector: Collector) -> list[Lesson]:
    """Oldest first."""
    collector.flush()
    return collector.lessons.take(private=True)[::-1]


def test_a_correction_takes_the_place_of_what_the_llm_said(served: Served, collector: Collector) -> None:
    id, other = served.ask(PROMPT), served.ask("The sea is")
    assert feedback(served, id=id, correction=" Canberra.") == {"object": "feedback", "lessons": 1, "dropped": 1}
    kept, corrected = lessons(collector)
    assert (kept.source, corrected.source) == ("cloud", "correction")
    assert served.engine.tokenizer.decode(corrected.tokens).decode() == f"{PROMPT} Canberra."
    assert served.taught(corrected) == " Canberra."
    assert corrected.tokens[-1] in served.engine.tokenizer.eog
    assert corrected.weight == CORRECTED > kept.weight
    feedback(served, id=id, correction=" the city of Canberra.")
    assert [served.taught(one) for one in lessons(collector)[1:]] == [" the city of Canberra."], "the last word counts"
    assert feedback(served, id=other, rating="bad")["dropped"] == 1


def test_a_good_answer_is_to_be_written_again(served: Served, collector: Collector, word: int) -> None:
    id = served.ask(PROMPT)
    assert feedback(served, id=id, rating="good") == {"object": "feedback", "lessons": 1, "dropped": 0}
    cloud, good = lessons(collector)
    assert cloud.source == "cloud"
    assert [target.ids for target in good.targets] == [[word]] * 3
    assert (good.source, good.weight) == ("correction", GOOD)
    assert good.tokens == cloud.tokens


def test_a_bad_answer_teaches_nothing(served: Served, collector: Collector) -> None:
    id = served.ask(PROMPT)
    feedback(served, id=id, rating="good")
    assert feedback(served, id=id, rating="bad") == {"object": "feedback", "lessons": 0, "dropped": 2}
    assert lessons(collector) == []
    assert feedback(served, id=id, rating="bad")["dropped"] == 0


def test_what_is_said_of_a_private_answer_is_private(served: Served, collector: Collector) -> None:
    id = served.ask("My name is", private=True)
    assert lessons(collector) == []
    feedback(served, id=id, correction=" Ada.")
    feedback(served, prompt=PROMPT, correction=" Canberra.", private=True)
    assert [one.private for one in lessons(collector)] == [True, True]
    assert collector.lessons.take(private=False) == []


def test_a_correction_with_something_personal_is_private(served: Served, collector: Collector) -> None:
    served.agent.privacy = Privacy("redact", ["GB"])
    id = served.ask(PROMPT)
    for body in ({"id": id}, {"prompt": PROMPT}, {"prompt": PROMPT, "private": False}):
        feedback(served, correction=" ada@lovelace.org.", **body)
    assert [one.private for one in lessons(collector)] == [True, True, False]
    feedback(served, prompt=PROMPT, correction=" Canberra.")
    assert not lessons(collector)[-1].private


def test_a_chat_s_answer_is_found_by_its_id(served: Served, collector: Collector) -> None:
    _, answer = served.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2})
    assert answer["id"].startswith("chatcmpl-")
    feedback(served, id=answer["id"], correction="Canberra.")
    feedback(served, messages=CHAT, correction="Canberra.")
    by_id, by_messages = lessons(collector)
    assert by_id == by_messages
    prompt = encode_chat(served.engine.tokenizer, [Message("user", CHAT[0]["content"])])
    assert by_id.tokens[: len(prompt)] == prompt
    assert served.engine.tokenizer.control(by_id.tokens[-1]) == "<|im_end|>"


def test_a_streamed_answer_is_found_by_its_id(served: Served, collector: Collector) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{served.url}/v1", api_key="a key", max_retries=0) as client:
        (*_, last) = client.completions.create(model="model", prompt=PROMPT, max_tokens=2, stream=True)
    assert feedback(served, id=last.id, rating="bad")["dropped"] == 1


def test_answers_that_are_not_known_or_forgotten(served: Served, collector: Collector, clock: Clock) -> None:
    status, answer = served.post("/v1/feedback", {"id": "cmpl-ffff", "rating": "bad"})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "answer_not_found", "id")
    id = served.ask(PROMPT)
    collector.flush()
    clock.now += 101.0
    status, answer = served.post("/v1/feedback", {"id": id, "rating": "bad"})
    assert (status, answer["error"]["code"]) == (400, "invalid_value")
    assert "too late" in answer["error"]["message"]


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "invalid_value"),
    "no object": (b"[]", "invalid_value"),
    "half a character": (b'{"prompt": "a", "correction": "\xc3"}', "invalid_value"),
    "deep": (b'{"messages":' + b"[" * 100_000, "invalid_value"),
    "nothing": ({}, "invalid_value"),
    "of nothing": ({"correction": "a"}, "invalid_value"),
    "of two": ({"id": "a", "prompt": "a", "correction": "a"}, "invalid_value"),
    "without a word": ({"prompt": "a"}, "invalid_value"),
    "an empty correction": ({"prompt": "a", "correction": ""}, "invalid_value"),
    "both": ({"id": "a", "correction": "a", "rating": "good"}, "invalid_value"),
    "another rating": ({"id": "a", "rating": "fine"}, "invalid_value"),
    "a rating of text": ({"prompt": "a", "rating": "bad"}, "invalid_value"),
    "no messages": ({"messages": [], "correction": "a"}, "invalid_value"),
    "a misspelt key": ({"prompt": "a", "correction": "a", "privat": True}, "invalid_value"),
    "too long": ({"prompt": "a", "correction": "one two " * 400}, "context_length_exceeded"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_makes_no_sense_is_refused_and_nothing_is_kept(
    served: Served, collector: Collector, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    caplog.set_level(logging.DEBUG)
    body, code = BAD[bad]
    status, answer = served.post("/v1/feedback", body)
    assert (status, answer["error"]["code"]) == (400, code)
    assert lessons(collector) == []
    assert "one two" not in caplog.text


def test_feedback_needs_the_key_and_json(served: Served) -> None:
    status, answer = served.post("/v1/feedback", {"prompt": "a", "correction": "b"}, key="wrong")
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_a_disk_that_fails_is_told(served: Served, collector: Collector) -> None:
    id = served.ask(PROMPT)
    collector.flush()
    collector.lessons._file._db.execute("PRAGMA query_only = ON")
    status, answer = served.post("/v1/feedback", {"id": id, "rating": "bad"})
    assert (status, answer["error"]["code"]) == (503, "store_failed")
    assert feedback(served, id=id, rating="good")["lessons"] == 1, "what is added waits in RAM"
    collector.lessons._file._db.execute("PRAGMA query_only = OFF")
    assert feedback(served, id=id, rating="bad")["dropped"] == 2


def test_an_agent_that_keeps_no_lessons_says_so(engine: Engine, word: int) -> None:
    with serving(engine, None, word) as served:
        status, answer = served.post("/v1/feedback", json.dumps({"prompt": "a", "correction": "b"}).encode())
    assert status == 400
    assert "adapt.enabled" in answer["error"]["message"]
