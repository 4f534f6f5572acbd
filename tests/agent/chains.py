"""Around the chain of help: steps that keep coming up, a cloud and peers that say what the test decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.chain import Chain, ChainConversation
from agent.link.identity import Identity
from agent.memory.keeper import Keeper, Look
from agent.memory.key import KeyMaker
from agent.memory.memory import EntryMemory
from agent.memory.rule_evidence import Evidence
from agent.peers.resolver import ENOUGH, Judge
from agent.peers.trust import Trust
from agent.resolver import Question, Reply, State, Ticket
from models.sampling import Shaped
from protocol.memory import Entry, sign_entry
from protocol.resolve import Sampling
from tests.agent.scripted import ScriptedResolver, says

WIDTH, VOCAB = 48, 32
SPACE = b"s" * 16


class Experienced(Evidence):
    """After so many audits that they are no longer made for theta's sake."""

    audit_rate = 0.0  # type: ignore[assignment]


@dataclass
class Case:
    """One step that keeps coming up: the SLM would say `draft`, the LLM says `truth`."""

    hidden: NDArray[np.float32]
    draft: int = 3
    truth: int = 7
    recent: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    position: int = 0
    audit: bool = False

    def question(self) -> Question:
        logits = np.zeros(VOCAB, np.float32)  # everything is plausible
        state = State(self.hidden, self.recent, logits, float(np.log(VOCAB)))
        x = Shaped(np.array([self.draft]), np.ones(1, np.float32))
        return Question([0] * self.position, self.draft, x, 0.9, self.position, self.audit, state)


def hidden(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


@dataclass
class Peers:
    """Stands for the peer resolver: keeps what it was asked, and answers when it is told to."""

    asked: list[tuple[Ticket, Judge]] = field(default_factory=list)
    given_up: list[Ticket] = field(default_factory=list)
    withdrawn: list[Ticket] = field(default_factory=list)
    there: bool = True

    def open(self, wake: Callable[[], None], traffic: object) -> Peers:
        return self

    def ask(self, lookup: object, judge: Judge) -> Ticket | None:
        if not self.there:
            return None
        ticket = Ticket(0.0, 0.005)
        self.asked.append((ticket, judge))
        return ticket

    def late(self, ticket: Ticket) -> None:
        self.given_up.append(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        self.withdrawn.append(ticket)

    def close(self) -> None:
        pass

    def answer(self, *entries: Entry) -> Ticket:
        ticket, judge = self.asked[-1]
        judged = judge(list(entries))
        if isinstance(judged, Reply):
            ticket.reply = judged
        ticket.failed = judged is ENOUGH
        return ticket


def keeper_of(memory: EntryMemory, me: Identity, folder: Path, audits: float, bound: float = 0.1) -> Keeper:
    """`audits`: share of the device's own hits that is audited."""
    trust = Trust(me.public, bound=bound, base=audits, records=memory)
    keys = KeyMaker(SPACE, np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    return Keeper(memory, keys, trust, Experienced(bound), me.public, me.sign, lambda: 1e9, folder / "evidence")


def cloud(truth: Callable[[Question], int]) -> ScriptedResolver:
    def opinion(question: Question) -> Reply:
        token = truth(question)
        return says(token, {token: 0.8})

    return ScriptedResolver(opinion)


def step(conversation: ChainConversation, question: Question) -> Reply | None:
    """What the token loop does with a question whose replies come at once; None: the draft stands."""
    ticket = conversation.known(question) or conversation.ask(question)
    while ticket is not None and ticket.reply is None:
        assert not ticket.last
        ticket = conversation.again(ticket)
    if ticket is None:
        return None
    conversation.taken(ticket)
    return ticket.reply


def recalled(keeper: Keeper, case: Case) -> Reply | None:
    """What the device says alone."""
    ticket = opened(Chain(keeper)).known(case.question())
    return None if ticket is None else ticket.reply


def opened(chain: Chain) -> ChainConversation:
    return chain.open("prompt", Sampling(), "take", lambda: None)


def entry(keeper: Keeper, case: Case, token: int, of: Identity) -> Entry:
    look = keeper.look(case.question(), "take")
    assert isinstance(look, Look)
    made = Entry(SPACE, look.lookup.key.tobytes(), look.lookup.tail, token, 0.9, 1, 1, of.public)
    return sign_entry(made, of.sign)


def near(memory: EntryMemory, keeper: Keeper, case: Case) -> list[bytes]:
    return [n.origin for n in memory.neighbours(SPACE, keeper.keys.key(case.hidden), b"t" * 8, 1)]
