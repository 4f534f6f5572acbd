"""From finished answers to lessons, and what is remembered of an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapt.answers import Answers, Remembered
from agent.adapt.collect import KEPT, Collector, lesson_of
from agent.adapt.lesson import Lesson, Target, check
from agent.adapt.lessons import Lessons
from agent.agent import Account, Agent, Event, Finished, Options, Request
from agent.loop import Token
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from protocol.errors import RequestError, UnknownAnswer
from protocol.resolve import Message, Sampling
from tests.agent.adapt.lessons import MODEL
from tests.agent.scripted import Clock, ScriptedResolver, says

PATIENCE = 60.0  # seconds after which a test gives up on something that never comes
PROMPT = [5, 6, 7]


def token(id: int, provenance: Provenance = Provenance.LOCAL, y: dict[int, float] | None = None) -> Token:
    made = Token(id, 0.5, 0.5, provenance)
    if provenance is not Provenance.LOCAL:
        made.why = Why.ESCALATE
    if y:
        made.y_ids, made.y_p = np.array(list(y)), np.array(list(y.values()), np.float32)
    return made


def answer(id: str = "", tokens: list[Token] | None = None, *, private: bool = False) -> Finished:
    request = Request("prompt", sampling=Sampling(seed=1), private=private, id=id)
    return Finished(request, PROMPT, tokens or [token(8), token(9, Provenance.CLOUD, {9: 0.75, 3: 0.125})])


def test_a_lesson_says_what_the_llm_said_where_it_was_asked() -> None:
    tokens = [
        token(8),
        token(9, Provenance.CLOUD, {9: 0.75, 3: 0.125}),
        token(10, Provenance.FALLBACK),
        token(11, Provenance.MEMORY),
        token(12, Provenance.PEER),
        token(13, Provenance.CLOUD),
    ]
    assert lesson_of(PROMPT, tokens, private=False, seed=0) == Lesson(
        [5, 6, 7, 8, 9, 10, 11, 12, 13],
        [Target(3, "kept"), Target(4, "cloud", [9, 3], [0.75, 0.125]), Target(8, "label", [13])],
        "cloud",
        prompt=3,
    )


def test_nothing_is_learned_where_the_llm_said_nothing() -> None:
    tokens = [token(8), token(9, Provenance.FALLBACK), token(10, Provenance.MEMORY)]
    assert lesson_of(PROMPT, tokens, private=False, seed=0) is None
    assert lesson_of(PROMPT, [], private=False, seed=0) is None


@given(st.lists(st.booleans(), max_size=120), st.integers(0, 1 << 48), st.booleans())
def test_kept_steps_are_a_bounded_sample(asked: list[bool], seed: int, private: bool) -> None:
    tokens = [token(9, Provenance.CLOUD, {9: 0.5}) if one else token(8) for one in asked]
    lesson = lesson_of(PROMPT, tokens, private, seed)
    if lesson is None:
        assert not any(asked)
        return
    check(lesson)
    kept = {target.position - 3 for target in lesson.targets if target.kind == "kept"}
    assert len(kept) == min(asked.count(False), asked.count(True), KEPT)
    assert not any(asked[step] for step in kept)
    assert lesson == lesson_of(PROMPT, tokens, private, seed)
    assert lesson.private == private


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(Lessons(tmp_path, MODEL), Answers(Clock()))
    yield made
    made.close()


def test_noting_never_waits_for_the_store(collector: Collector) -> None:
    with collector.lessons._lock:  # as while a slow disk writes
        for _ in range(10):
            collector.note(answer())
    collector.flush()
    assert collector.lessons.count == 10


def test_what_waits_for_the_store_is_bounded(collector: Collector) -> None:
    with collector._lock:
        for number in range(1000):
            collector.note(answer(f"{number}"))
    collector.flush()
    assert 30 < collector.lessons.count < 100
    assert collector.answer("999").tokens == [8, 9]


def test_a_thread_brings_lessons_to_the_disk(tmp_path: Path) -> None:
    written = threading.Event()

    class Told(Lessons):
        def add(self, lesson: Lesson, answer: str = "") -> int:
            added = super().add(lesson, answer)
            written.set()
            return added

    collector = Collector(Told(tmp_path, MODEL), Answers(Clock()))
    collector.note(answer())
    assert written.wait(PATIENCE)
    collector.note(answer())
    collector.close()
    lessons = Lessons(tmp_path, MODEL)
    assert lessons.count == 2, "closing writes the rest"
    lessons.close()


def test_what_a_cloud_says_that_makes_no_sense_is_not_learned(collector: Collector) -> None:
    for y in ({9: 0.9, 3: 0.9}, {9: float("nan")}, {-4: 0.5}):
        collector.note(answer("bad", [token(9, Provenance.CLOUD, y)]))
    collector.note(answer("good"))
    collector.flush()
    assert (collector.refused, collector.lessons.count) == (3, 1)
    assert collector.answer("bad").tokens == [9], "its reader may still correct it"


def test_answers_are_remembered_for_a_while(collector: Collector) -> None:
    clock = Clock()
    answers = Answers(clock, max_age=100.0)
    first = Remembered([Message("user", "why?")], PROMPT, [8, 9], private=True)
    answers.remember("first", first)
    clock.now += 90.0
    answers.remember("second", first)
    assert answers.find("first") is first
    clock.now += 20.0
    with pytest.raises(RequestError, match="too late"):
        answers.find("first")
    assert answers.find("second") is first
    for unknown in ("third", ""):
        with pytest.raises(UnknownAnswer):
            answers.find(unknown)


def test_answers_are_bounded_by_their_bytes() -> None:
    answers = Answers(Clock(), max_bytes=1_000_000)
    for number in range(100):
        answers.remember(f"{number}", Remembered("text" * 1000, PROMPT * 500, [8] * 100, private=False))
    kept = [number for number in range(100) if f"{number}" in answers._known]
    assert kept == list(range(100 - len(kept), 100))
    assert 5 < len(kept) < 20
    with pytest.raises(RequestError, match="too late"):
        answers.find("0")


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    engine = GgufEngine(smollm2, context=320, sequences=1, threads=1)
    yield engine
    engine.close()


Write = Callable[..., None]


@pytest.fixture
def write(engine: Engine, collector: Collector, word: int) -> Iterator[Write]:
    """Writes an answer in which the LLM is asked at every step, and always says the same word."""
    asked = ThresholdPolicy(-1.0)
    resolver = ScriptedResolver(lambda question: says(word, {word: 0.75, question.draft: 0.125}))
    agent = Agent(engine, Options(asked), resolver, finished=collector.note)

    def run(prompt: str, **options: object) -> None:
        done: Future[None] = Future()

        def hear(event: Event) -> None:
            if isinstance(event, Account | Exception):
                done.set_result(None)

        agent.submit(Request(prompt, max_tokens=4, sampling=Sampling(temperature=0.0), **options), hear)  # type: ignore[arg-type]
        done.result(PATIENCE)

    yield run
    agent.scheduler.close()


def test_an_agent_s_answer_becomes_a_lesson(write: Write, collector: Collector, engine: Engine, word: int) -> None:
    write("The sea is", id="first")
    found = collector.answer("first")
    (lesson,) = collector.lessons.take(private=False)
    prompt = engine.tokenizer.encode("The sea is", start=True)
    assert lesson.tokens == [*prompt, word, word, word, word]
    assert [target.position for target in lesson.targets] == list(range(len(prompt), len(prompt) + 4))
    for target in lesson.targets:
        assert target.kind == "cloud"
        assert target.ids[0] == word
        assert target.p == [0.75, 0.125][: len(target.p)]
    assert (found.asked, found.prompt, found.tokens) == ("The sea is", prompt, [word] * 4)


def test_a_private_answer_is_remembered_and_not_collected(write: Write, collector: Collector) -> None:
    write("My name is", id="first", private=True)
    assert collector.answer("first").private
    assert collector.lessons.count == 0
