"""The chain of help over a real memory: who is asked, in which order, and what is learned from the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.chain import Chain, ChainConversation
from agent.link.identity import Identity, identity
from agent.memory.keeper import Keeper, Look, recall_evidence
from agent.memory.key import KeyMaker
from agent.memory.memory import EntryMemory
from agent.memory.rule_evidence import Evidence
from agent.peers.resolver import ENOUGH, Judge
from agent.peers.trust import Trust
from agent.resolver import Provenance, Question, Reply, State, Ticket
from models.sampling import Shaped
from protocol.memory import Entry, sign_entry
from protocol.resolve import Mode, Sampling
from tests.agent.scripted import Clock, Scripted, ScriptedResolver, says

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


@pytest.fixture
def me(tmp_path: Path) -> Identity:
    return identity(tmp_path / "me.key")


@pytest.fixture
def other(tmp_path: Path) -> Identity:
    return identity(tmp_path / "other.key")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[EntryMemory]:
    with EntryMemory(tmp_path / "memory") as memory:
        yield memory


@pytest.fixture
def keeper(memory: EntryMemory, me: Identity, tmp_path: Path) -> Keeper:
    return keeper_of(memory, me, tmp_path, audits=0.0)


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


def test_what_the_cloud_said_once_is_known_from_then_on(keeper: Keeper) -> None:
    case, llm = Case(hidden(1)), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, cloud=llm))
    first = step(conversation, case.question())
    second = step(conversation, case.question())
    assert first is not None
    assert second is not None
    assert (first.provenance, second.provenance) == (Provenance.CLOUD, Provenance.MEMORY)
    assert list(second.tokens) == [7]
    assert len(llm.opened[0].questions) == 1
    assert keeper.memory.stats().entries == 1


def test_it_is_known_without_cloud_and_peers(keeper: Keeper) -> None:
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())
    alone = opened(Chain(keeper))
    assert alone.alone
    reply = step(alone, case.question())
    assert reply is not None
    assert list(reply.tokens) == [7]
    assert step(alone, Case(hidden(2)).question()) is None


def test_a_step_of_another_kind_is_not_answered(keeper: Keeper) -> None:
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), Case(hidden(1)).question())
    far = Case(hidden(2), recent=(9,) * 8)
    assert opened(Chain(keeper)).known(far.question()) is None


def test_what_the_model_finds_implausible_is_not_said(keeper: Keeper) -> None:
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())
    question = case.question()
    assert question.state is not None
    question.state.logits[7] = -20.0
    assert opened(Chain(keeper)).known(question) is None


def test_an_audit_of_the_threshold_goes_to_the_cloud_whatever_is_known(keeper: Keeper) -> None:
    case, llm = Case(hidden(1)), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, cloud=llm))
    step(conversation, case.question())
    case.audit = True
    reply = step(conversation, case.question())
    assert reply is not None
    assert reply.provenance is Provenance.CLOUD


def test_peers_are_asked_before_the_cloud_and_their_answer_is_enough(keeper: Keeper, other: Identity) -> None:
    case, peers, llm = Case(hidden(1)), Peers(), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, peers, llm))  # type: ignore[arg-type]
    keeper.trust.note(other.public, wrong=False)
    while keeper.trust.audit_rate([other.public]) > 0.02:
        keeper.trust.note(other.public, wrong=False)
    question = case.question()
    assert conversation.known(question) is None
    ticket = conversation.ask(question)
    assert ticket is not None
    assert not ticket.last
    assert not llm.opened[0].questions
    answered = peers.answer(entry(keeper, case, 9, other))
    assert answered.reply is not None
    assert list(answered.reply.tokens) == [9]
    assert answered.reply.provenance is Provenance.PEER
    assert answered.reply.origin == other.public.hex()[:8]


def test_after_the_peers_the_cloud_is_asked(keeper: Keeper) -> None:
    peers, llm = Peers(), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, peers, llm))  # type: ignore[arg-type]
    reply = step(conversation, Case(hidden(1)).question())
    assert reply is not None
    assert reply.provenance is Provenance.CLOUD
    assert len(peers.given_up) == 1
    assert keeper.memory.stats().entries == 1


def test_a_newcomers_first_hit_is_checked_with_the_cloud(keeper: Keeper, other: Identity) -> None:
    case, peers, llm = Case(hidden(1)), Peers(), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, peers, llm))  # type: ignore[arg-type]
    question = case.question()
    assert conversation.known(question) is None
    ticket = conversation.ask(question)
    assert ticket is not None
    assert peers.answer(entry(keeper, case, 9, other)).failed, "its word alone is not enough yet"
    passed_on = conversation.again(ticket)
    assert passed_on is not None
    assert passed_on.reply is not None
    conversation.taken(passed_on)
    assert list(passed_on.reply.tokens) == [7]
    assert keeper.counts["audits wrong"] == 1
    assert keeper.trust.standing(other.public).wrong == 1.0


def test_if_the_cloud_does_not_answer_the_hit_stands(memory: EntryMemory, me: Identity, tmp_path: Path) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())

    class Silent(ScriptedResolver):
        def open(self, *args: object) -> Scripted:
            return Scripted(lambda question: None, Clock(), prompt=True)

    reply = step(opened(Chain(keeper, cloud=Silent(lambda question: None))), case.question())
    assert reply is not None
    assert (list(reply.tokens), reply.provenance) == ([7], Provenance.MEMORY)


def test_no_cloud_to_audit_with_is_no_reason_to_forget(memory: EntryMemory, me: Identity, tmp_path: Path) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())
    reply = recalled(keeper, case)
    assert reply is not None
    assert list(reply.tokens) == [7]


def test_an_entry_that_proves_wrong_is_believed_less_than_what_was_said_instead(
    memory: EntryMemory, me: Identity, tmp_path: Path
) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    case = Case(hidden(1))
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    step(conversation, case.question())
    corrected = opened(Chain(keeper, cloud=cloud(lambda question: 11)))
    step(corrected, case.question())
    (wrong,) = [n for n in memory.neighbours(SPACE, keeper.keys.key(case.hidden), b"t" * 8, 8) if n.token == 7]
    assert wrong.trust < 1.0
    reply = recalled(keeper, case)
    assert reply is not None
    assert list(reply.tokens) == [11]


def test_a_poisoned_peer_says_nothing_and_is_quarantined_within_the_stated_audits(
    keeper: Keeper, memory: EntryMemory, other: Identity
) -> None:
    """Its entries are well-formed and wrong; the cloud is there. No token of it is ever emitted."""
    llm = cloud(lambda question: 7)
    conversation = opened(Chain(keeper, cloud=llm))
    cases = [Case(hidden(seed), position=seed) for seed in range(100, 140)]
    memory.add([entry(keeper, case, 9, other) for case in cases])
    said = [step(conversation, case.question()) for case in cases]
    assert [list(reply.tokens) for reply in said if reply is not None] == [[7]] * len(cases)
    assert keeper.trust.quarantined(other.public)
    assert keeper.counts["audits wrong"] <= keeper.trust.audits_to_quarantine
    assert not [n for case in cases for n in near(memory, keeper, case) if n == other.public]
    memory.add([entry(keeper, Case(hidden(999)), 9, other)])
    assert near(memory, keeper, Case(hidden(999))) != [other.public]


def test_what_was_learned_is_offered_to_peers_signed(keeper: Keeper, me: Identity) -> None:
    shared: list[Entry] = []
    keeper.share = shared.append
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), Case(hidden(1)).question())
    (entry,) = shared
    assert (entry.token, entry.origin, entry.space) == (7, me.public, SPACE)
    assert sign_entry(entry, me.sign) == entry


def test_the_llms_own_choice_is_kept_not_what_was_drawn(keeper: Keeper) -> None:
    drawn = ScriptedResolver(lambda question: says(4, {7: 0.6, 4: 0.3}))
    step(opened(Chain(keeper, cloud=drawn)), Case(hidden(1)).question())
    (found,) = keeper.memory.neighbours(SPACE, keeper.keys.key(hidden(1)), b"t" * 8, 1)
    assert found.token == 7
    assert found.p == pytest.approx(0.6)


def test_the_same_lesson_twice_is_one_entry(memory: EntryMemory, me: Identity, tmp_path: Path) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    for _ in range(5):
        step(conversation, Case(hidden(1)).question())
    assert memory.stats().entries == 1


def test_evidence_outlives_the_program(keeper: Keeper, tmp_path: Path) -> None:
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    for seed in range(40):
        step(conversation, Case(hidden(seed), recent=(seed,) * 8).question())
    keeper.save()
    assert recall_evidence(tmp_path / "evidence", 0.1).to_bytes() == keeper.evidence.to_bytes()


def test_damaged_evidence_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "evidence").write_bytes(b"\xc1 rubbish")
    assert recall_evidence(tmp_path / "evidence", 0.1).to_bytes() == Evidence(0.1).to_bytes()


def test_an_engine_without_hidden_states_goes_straight_to_the_cloud(keeper: Keeper) -> None:
    question = Case(hidden(1)).question()
    blind = Question(question.answer, question.draft, question.x)
    llm = cloud(lambda question: 7)
    reply = step(opened(Chain(keeper, cloud=llm)), blind)
    assert reply is not None
    assert reply.provenance is Provenance.CLOUD
    assert keeper.memory.stats().entries == 0


def entry(keeper: Keeper, case: Case, token: int, of: Identity) -> Entry:
    look = keeper.look(case.question(), "take")
    assert isinstance(look, Look)
    made = Entry(SPACE, look.lookup.key.tobytes(), look.lookup.tail, token, 0.9, 1, 1, of.public)
    return sign_entry(made, of.sign)


def near(memory: EntryMemory, keeper: Keeper, case: Case) -> list[bytes]:
    return [n.origin for n in memory.neighbours(SPACE, keeper.keys.key(case.hidden), b"t" * 8, 1)]


def test_a_liar_does_not_spoil_what_honest_devices_taught(keeper: Keeper, memory: EntryMemory, other: Identity) -> None:
    """Its wrong entries raise the threshold for everybody, but only until it is quarantined."""
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    theta = keeper.evidence.theta
    cases = [Case(hidden(seed), position=seed) for seed in range(100, 140)]
    memory.add([entry(keeper, case, 9, other) for case in cases])
    for case in cases:
        step(conversation, case.question())
    assert keeper.trust.quarantined(other.public)
    assert keeper.evidence.theta == theta
    reply = recalled(keeper, cases[0])
    assert reply is not None
    assert list(reply.tokens) == [7]


def test_a_token_that_this_model_does_not_have_is_ignored(keeper: Keeper, memory: EntryMemory, other: Identity) -> None:
    case = Case(hidden(1))
    memory.add([entry(keeper, case, VOCAB + 5, other)])
    assert opened(Chain(keeper)).known(case.question()) is None


def test_of_two_peers_the_one_whose_hit_is_audited_is_judged(keeper: Keeper, other: Identity, tmp_path: Path) -> None:
    third = identity(tmp_path / "third.key")
    case, peers = Case(hidden(1)), Peers()
    conversation = opened(Chain(keeper, peers, cloud(lambda question: 7)))  # type: ignore[arg-type]
    assert conversation.known(case.question()) is None
    question = case.question()
    conversation.known(question)
    ticket = conversation.ask(question)
    assert ticket is not None
    assert peers.answer(entry(keeper, case, 9, other)).failed
    passed_on = conversation.again(ticket)
    assert passed_on is not None
    conversation.taken(passed_on)
    assert keeper.trust.standing(other.public).wrong == 1.0
    assert keeper.trust.standing(third.public).right == 0.0


def test_one_entry_is_one_vote_however_often_a_peer_sends_it(keeper: Keeper, other: Identity, me: Identity) -> None:
    case, peers = Case(hidden(1)), Peers()
    honest, repeated = entry(keeper, case, 7, me), entry(keeper, case, 9, other)
    conversation = opened(Chain(keeper, peers))  # type: ignore[arg-type]
    question = case.question()
    conversation.known(question)
    conversation.ask(question)
    reply = peers.answer(honest, *[repeated] * 7).reply
    assert reply is not None
    assert reply.y_p.tolist() == pytest.approx([0.5]), "one against one"


@pytest.mark.parametrize("mode", ["verify", "fuse"])
def test_in_a_distribution_memory_speaks_for_the_candidate_alone(
    keeper: Keeper, memory: EntryMemory, me: Identity, other: Identity, mode: Mode
) -> None:
    """Whoever is outvoted is not audited, so nothing of what it says may be drawn."""
    case = Case(hidden(1))
    memory.add([entry(keeper, case, 7, me), entry(keeper, case, 9, other)])
    memory.add([entry(keeper, Case(hidden(1) + 1e-4), 7, me)])
    look = keeper.look(case.question(), mode)
    assert look is not None
    if look.reply is not None:
        assert list(look.reply.tokens) == []
        assert list(look.reply.y_ids) == [7]
        assert float(look.reply.y_p.sum()) < 1.0


def test_a_device_that_knows_nothing_of_its_hits_yet_audits_them(
    memory: EntryMemory, me: Identity, tmp_path: Path
) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=0.0)
    keeper.evidence = Evidence(0.1)
    llm = cloud(lambda question: len(question.answer) % 29)
    conversation = opened(Chain(keeper, cloud=llm))
    cases = [Case(hidden(seed), position=seed) for seed in range(200)]
    for case in cases:
        step(conversation, case.question())
    asked = len(llm.opened[0].questions)
    said = [step(conversation, case.question()) for case in cases]
    audits = len(llm.opened[0].questions) - asked
    assert said[0] is not None
    assert said[0].provenance is Provenance.CLOUD, "the first hit of all"
    assert 10 < audits < 60, "fewer and fewer: about twice the square root"
