"""The token loop where an answer may be known at once, or a question is passed on to the next in line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.loop import Plan
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance, Question, Reply, Ticket
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from models.sampling import softmax
from protocol.resolve import Sampling
from tests.agent.scripted import Clock, Opinion, Run, Scripted, says

LENGTH = 12
ALWAYS = ThresholdPolicy(-1.0)


class Remembering(Scripted):
    """`memory` says what is known at once; `second` is next in line after `opinion`."""

    def __init__(
        self,
        memory: Callable[[Question], Reply | None] = lambda question: None,
        opinion: Opinion = lambda question: None,
        second: Opinion | None = None,
        *,
        clock: Clock,
        deaf: bool = False,
        prompt: bool = False,
    ) -> None:
        super().__init__(opinion, clock, prompt=prompt, deaf=deaf, deadline=0.005)
        self.memory = memory
        self.second = second
        self.looked: list[Question] = []
        self.passed_on: list[Ticket] = []
        self.learned: list[Ticket] = []

    def known(self, question: Question) -> Ticket | None:
        self.looked.append(question)
        reply = self.memory(question)
        return None if reply is None else Ticket(self._clock(), self._clock(), reply=reply)

    def ask(self, question: Question) -> Ticket | None:
        ticket = super().ask(question)
        if ticket is not None:
            ticket.last, ticket.near = self.second is None, self.second is not None
        return ticket

    def again(self, ticket: Ticket) -> Ticket | None:
        self.passed_on.append(ticket)
        assert self.second is not None
        reply = self.second(self.questions[self.tickets.index(ticket)])
        return None if reply is None else Ticket(ticket.asked_at, self._clock() + 1.0, reply=reply)

    def taken(self, ticket: Ticket) -> None:
        self.learned.append(ticket)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    engine = GgufEngine(smollm2, context=1024, sequences=1, threads=1, hidden=True)
    yield engine
    engine.close()


def run(engine: Engine, conversation: Remembering, prompt: list[int], clock: Clock, **options: object) -> Run:
    plan = Plan(**({"sampling": Sampling(), "max_tokens": LENGTH, "policy": ALWAYS} | options))  # type: ignore[arg-type]

    def time_passes(_: Run) -> None:
        clock.now += 0.01

    return Run(engine, plan, conversation, clock, time_passes)(prompt)


def from_memory(token: int) -> Reply:
    return Reply([token], [1.0], np.array([token]), np.ones(1, np.float32), -1.0, Provenance.MEMORY, "hut")


def test_what_is_known_at_once_is_emitted_without_asking(engine: Engine, prompt: list[int], word: int) -> None:
    clock = Clock()
    conversation = Remembering(
        lambda question: from_memory(word) if len(question.answer) == 3 else None,
        lambda question: says(question.draft),
        clock=clock,
        prompt=True,
    )
    done = run(engine, conversation, prompt, clock)
    assert done.ids[3] == word
    assert done.provenance[3] == "memory"
    assert done.emitted[3].origin == "hut"
    assert done.loop.rewinds == 0
    assert [len(question.answer) for question in conversation.questions] == [n for n in range(LENGTH) if n != 3]
    assert conversation.questions[3].answer[3] == word  # what follows is written behind it
    assert [ticket.reply.provenance for ticket in conversation.learned if ticket.reply][3] is Provenance.MEMORY


def test_each_step_is_looked_up_once_even_while_its_question_is_held_back(engine: Engine, prompt: list[int]) -> None:
    clock = Clock()
    conversation = Remembering(opinion=lambda question: says(question.draft), clock=clock)
    run(engine, conversation, prompt, clock, in_flight=1, ahead=2)
    assert [len(question.answer) for question in conversation.looked] == list(range(LENGTH))


def test_a_question_that_nobody_answered_goes_to_the_next_in_line(engine: Engine, prompt: list[int], word: int) -> None:
    clock = Clock()
    conversation = Remembering(second=lambda question: says(word), clock=clock)
    done = run(engine, conversation, prompt, clock, max_tokens=4)
    assert done.ids == [word] * 4
    assert done.provenance == ["cloud"] * 4
    assert conversation.given_up == []
    assert len(conversation.learned) == 4


def test_without_a_next_in_line_the_draft_stands(engine: Engine, prompt: list[int]) -> None:
    clock = Clock()
    conversation = Remembering(second=lambda question: None, clock=clock)
    done = run(engine, conversation, prompt, clock, max_tokens=4)
    assert done.provenance == ["fallback"] * 4
    assert done.ids == [token.draft for token in done.emitted]


def test_the_cloud_hears_questions_in_their_order(engine: Engine, prompt: list[int]) -> None:
    """A question is not asked behind one that is still with the peers, but behind one that the cloud has."""
    clock = Clock()
    order: list[str] = []

    class Slow(Remembering):
        def again(self, ticket: Ticket) -> Ticket | None:
            order.append(f"passed on {self.tickets.index(ticket)} of {len(self.tickets)}")
            later = Ticket(ticket.asked_at, self._clock() + 1.0)
            self.waiting.append((self.questions[self.tickets.index(ticket)], later))
            return later

        waiting: list[tuple[Question, Ticket]] = []  # noqa: RUF012

    conversation = Slow(second=lambda question: None, clock=clock)

    def world(_: Run) -> None:
        clock.now += 0.01
        if len(conversation.waiting) >= 2:
            for question, ticket in conversation.waiting:
                if ticket.reply is None:
                    order.append("answered")
                    ticket.reply = says(question.draft)

    plan = Plan(sampling=Sampling(), max_tokens=2, policy=ALWAYS)
    done = Run(engine, plan, conversation, clock, world)(prompt)
    assert order == ["passed on 0 of 1", "passed on 1 of 2", "answered", "answered"]
    assert done.provenance == ["cloud"] * 2


def test_alone_without_an_answer_a_token_is_local(engine: Engine, prompt: list[int]) -> None:
    clock = Clock()
    conversation = Remembering(clock=clock, deaf=True)
    conversation.alone = True
    assert set(run(engine, conversation, prompt, clock).provenance) == {"local"}


def test_a_question_tells_what_the_model_had_before_it(engine: Engine, prompt: list[int]) -> None:
    clock = Clock()
    conversation = Remembering(opinion=lambda question: says(question.draft), clock=clock, prompt=True)
    run(engine, conversation, prompt, clock)
    for question in conversation.questions:
        state = question.state
        assert state is not None
        assert state.hidden.shape == (engine.info.width,)
        assert list(state.recent) == [*prompt, *question.answer][-8:]
        assert math.isclose(state.p(question.draft), float(softmax(state.logits)[question.draft]), rel_tol=1e-4)
    states = [question.state.hidden for question in conversation.questions if question.state is not None]
    assert not np.array_equal(states[0], states[1])  # copies: the engine's own array is one and the same


def test_an_audit_says_so(engine: Engine, prompt: list[int]) -> None:
    clock = Clock()
    conversation = Remembering(opinion=lambda question: says(question.draft), clock=clock, prompt=True)
    done = run(engine, conversation, prompt, clock, policy=ThresholdPolicy(1.0, audit=1.0))
    assert {token.why for token in done.emitted} == {Why.AUDIT}
    assert all(question.audit for question in conversation.questions)
