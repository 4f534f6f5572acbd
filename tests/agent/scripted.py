"""Test doubles at the Resolver seam: a conversation whose replies, and their time, the test decides."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np

from agent.agreement import Agreement
from agent.loop import Feed, Need, Plan, Token, TokenLoop
from agent.resolver import Conversation, Provenance, Question, Reply, Resolver, Ticket, Traffic
from agent.uncertainty import Softmax
from models.engine.base import Engine, Step
from models.engine.base import Sequence as Place
from protocol.resolve import Message, Mode, Sampling


class Clock:
    """Stands still until it is told to go on; seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def says(token: int, y: dict[int, float] | None = None, y_draft: float = -1.0) -> Reply:
    """A resolver's decision for `token`, with what it tells of y."""
    y = y or {}
    ids, p = np.fromiter(y, np.intp, len(y)), np.fromiter(y.values(), np.float32, len(y))
    return Reply([token], [0.0], ids, p, y_draft)


def done(ticket: Ticket) -> bool:
    return ticket.failed or ticket.reply is not None


Opinion = Callable[[Question], Reply | None]
"""What the resolver thinks of a question; None: it fails."""


class Scripted(Conversation):
    """`prompt`: it replies as soon as it is asked; else `answer` does. `deaf`: it gives out no tickets."""

    def __init__(
        self, opinion: Opinion, clock: Clock, *, prompt: bool = False, deadline: float = 1.0, deaf: bool = False
    ) -> None:
        self.traffic = Traffic()
        self.questions: list[Question] = []
        self.tickets: list[Ticket] = []
        self.given_up: list[Ticket] = []
        self.withdrawn: list[Ticket] = []
        self.closed = 0
        self._opinion = opinion
        self._clock = clock
        self._prompt = prompt
        self._deadline = deadline
        self._deaf = deaf

    def ask(self, question: Question) -> Ticket | None:
        if self._deaf:
            return None
        ticket = Ticket(self._clock(), self._clock() + self._deadline)
        self.traffic.asked += 1
        self.questions.append(question)
        self.tickets.append(ticket)
        if self._prompt:
            self.answer(len(self.tickets) - 1)
        return ticket

    def answer(self, index: int) -> None:
        """Fills the ticket of the question with this index."""
        ticket = self.tickets[index]
        reply = self._opinion(self.questions[index])
        ticket.replied_at = self._clock()
        if reply is None:
            ticket.failed = True
        else:
            ticket.reply = reply

    def open_questions(self) -> list[int]:
        """Indices of those that are neither answered nor given up nor withdrawn, the latest last."""
        gone = self.given_up + self.withdrawn
        return [index for index, ticket in enumerate(self.tickets) if not done(ticket) and ticket not in gone]

    def late(self, ticket: Ticket) -> None:
        self.given_up.append(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        self.withdrawn.append(ticket)

    def close(self) -> None:
        self.closed += 1


class ScriptedResolver(Resolver):
    """Opens conversations that reply at once, and keeps them for the test to look at."""

    provenance = Provenance.CLOUD
    mode: Mode = "take"

    def __init__(self, opinion: Opinion) -> None:
        self.opened: list[Scripted] = []
        self._opinion = opinion

    def open(
        self, prompt: Sequence[Message] | str, sampling: Sampling, mode: Mode, wake: Callable[[], None]
    ) -> Conversation:
        self.opened.append(Scripted(self._opinion, Clock(), prompt=True, deadline=60.0))
        return self.opened[-1]


@dataclass
class Run:
    """One token loop, driven by hand. `on_wait` plays the outside world whenever the loop waits."""

    engine: Engine
    plan: Plan
    conversation: Scripted | None
    clock: Clock
    on_wait: Callable[[Run], None] = lambda run: None
    agreement: Agreement = field(default_factory=Agreement)
    stop_at: int = -1  # the emit callback says stop at this token
    emitted: list[Token] = field(default_factory=list)
    snapshots: list[tuple[int, str]] = field(default_factory=list)  # id and provenance when each was emitted
    waits: int = 0
    fed: int = 0
    furthest: int = 0  # most tokens that were drafted behind the settled ones
    finish: str = ""

    def __call__(self, prompt: Sequence[int]) -> Run:
        """Writes the whole answer to `prompt`."""
        place = self.engine.open(prompt, self.plan.max_tokens)
        place.rewind(0)
        try:
            self._drive(place, prompt)
        finally:
            place.rewind(0)
            place.close()
        return self

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.emitted]

    @property
    def provenance(self) -> list[str]:
        return [str(token.provenance) for token in self.emitted]

    def _drive(self, place: Place, prompt: Sequence[int]) -> None:
        eog = self.engine.tokenizer.eog
        softmax = Softmax(self.engine.info.vocab)
        self.loop = TokenLoop(self.plan, place, softmax, eog, self.conversation, self._emit, self.agreement, self.clock)
        needs: Generator[Need, Step | None, str] = self.loop.run(prompt)
        step: Step | None = None
        try:
            while True:
                need = needs.send(step)
                step = None
                self.furthest = max(self.furthest, len(self.loop.tokens) - self.loop.settled)
                if isinstance(need, Feed):
                    self.fed += len(need.tokens)
                    (step,) = self.engine.forward([(place, need.tokens)])
                else:
                    self.waits += 1
                    assert self.waits < 10_000
                    self.on_wait(self)
        except StopIteration as end:
            self.finish = end.value

    def _emit(self, token: Token) -> bool:
        self.emitted.append(token)
        self.snapshots.append((token.id, str(token.provenance)))
        return token.id == self.stop_at
